"""The comparison with a GPU finds what is wrong and lets pass what PTX leaves open."""

from __future__ import annotations

import numpy as np
import pytest
from agreement import TOLERANCES, Tally, Verdict, distance, judge
from instructions import Array, Form, element_wise
from operands import operands
from warp_agreement import election_is_wrong, judge_mma
from warp_instructions import WARP, products
from warp_operands import mma_operands

from gqa_cutlass.ptxsim.element.arith import APPROXIMATE, forms

FORMS = {form.name: form for form in element_wise()}


def bits(form: Form, *rows: tuple[int, ...]) -> list[Array]:
    """Sources, one row per thread."""
    widths = [array.dtype for array in operands(form)]
    return [
        np.array(column, dtype)
        for column, dtype in zip(zip(*rows, strict=True), widths, strict=True)
    ]


def verdict_on(name: str, got: int, *sources: int) -> Verdict:
    form = FORMS[name]
    arrays = bits(form, sources)
    (expected, *_) = form.run(*arrays)
    return judge(form, arrays, np.array([got], expected.dtype), expected)


ONE, INF, NAN = 0x3F800000, 0x7F800000, 0x7FFFFFFF


@pytest.mark.parametrize(
    ("name", "got", "sources", "wrong", "left_open"),
    [
        ("add.f32", 0x40000000, (ONE, ONE), False, False),
        ("add.f32", 0x40000001, (ONE, ONE), True, False),
        ("add.f32", 0x80000000, (0, 0), True, False),
        ("add.f32", 0xFFC00001, (NAN, ONE), False, True),
        ("add.f32", INF, (NAN, ONE), True, True),
        ("add.f32", NAN, (ONE, ONE), True, False),
        ("div.u32", 5, (7, 0), False, True),
        ("div.u32", 4, (7, 2), True, False),
        ("mov.f32", 0x7FC00000, (NAN,), True, False),
        ("ex2.approx.f32", ONE + 1, (0x00800000,), False, False),
        ("ex2.approx.f32", ONE + 3, (0x00800000,), True, False),
        ("ex2.approx.f32", INF - 1, (INF,), True, False),
        ("ex2.approx.ftz.f32", 0, (0xC2FC0001,), False, False),
        ("rcp.approx.f32", 0, (0xFF800000,), True, False),
        ("sin.approx.f32", 0x3F000000, (0x4B000000,), False, True),
        ("sin.approx.f32", 0x3F000000, (0x3F000000,), True, False),
        ("div.approx.f32", 0x3F800001, (ONE, ONE), False, False),
        ("rcp.approx.ftz.f64", 0x3FF00001 << 32, (0x3FF << 52,), False, True),
        ("rcp.approx.ftz.f64", (0x3FF << 52) + 1, (0x3FF << 52,), True, True),
    ],
)
def test_judgement(
    name: str, got: int, sources: tuple[int, ...], wrong: bool, left_open: bool
) -> None:
    found = verdict_on(name, got, *sources)
    assert (bool(found.wrong[0]), bool(found.open[0])) == (wrong, left_open)


def test_halves_are_judged_apart() -> None:
    form = FORMS["add.f16x2"]
    sources = bits(form, (0x7C013C00, 0x3C003C00))
    found = judge(form, sources, np.array([0xFE014001], np.uint32), *form.run(*sources))
    assert found.wrong.tolist() == [True, False] and found.open.tolist() == [False, True]


def test_every_documented_bound_is_checked() -> None:
    bounded = {name.removesuffix("x2") for name in APPROXIMATE if not name.endswith("f64")}
    assert bounded == set(TOLERANCES)


def test_there_is_a_kernel_for_every_form() -> None:
    assert {form.opcode for form in FORMS.values()} == set(forms())
    assert len({form.symbol for form in FORMS.values()}) == len(FORMS)


def test_every_form_gets_many_operands() -> None:
    for form in FORMS.values():
        assert len(operands(form)[0]) >= 2048, form.name


def test_distance_counts_steps_across_zero() -> None:
    pairs = np.array([[0x3F800000, 0x3F800003], [0x80000001, 0x00000002]], np.uint32)
    assert distance(*pairs.T).tolist() == [3, 3]


@pytest.mark.parametrize("form", products(), ids=lambda form: ".".join(form.opcode[3:]))
def test_judgement_of_mma(form: Form) -> None:
    sources = mma_operands(form)
    expected = form.run(*sources)
    assert not judge_mma(form, sources, expected, expected).wrong.any()
    # The last bit may differ, but not where sums are exact, and never the sign or the exponent.
    nudged = [expected[0] ^ np.uint32(1), *expected[1:]]
    integers = slice(64, 128)
    found = judge_mma(form, sources, nudged, expected)
    assert found.wrong[integers].any() and not found.wrong[:64].any() and found.share.max() < 1
    negated = [expected[0] ^ np.uint32(0x80008000), *expected[1:]]
    assert judge_mma(form, sources, negated, expected).wrong[:64].any()


def test_elections() -> None:
    mask = np.full(WARP, 0b110, np.uint32)
    leader, elected = np.full(WARP, 2, np.uint32), (np.arange(WARP) == 2).astype(np.uint32)
    assert not election_is_wrong(mask, leader, elected).any()
    assert election_is_wrong(mask, leader + np.uint32(1), elected).any()
    assert election_is_wrong(mask, leader, np.ones_like(elected)).any()
    assert election_is_wrong(mask, np.where(np.arange(WARP) == 1, 1, leader), elected).any()


def test_a_failure_names_instruction_operands_and_both_results() -> None:
    tally = Tally()
    tally.blame(
        "add.u32", np.array([False, True]), [np.array([1, 2]), np.array([3, 4])],
        np.array([4, 7]), np.array([4, 6]),
    )  # fmt: skip
    with pytest.raises(
        AssertionError, match=r"add.u32: 1 of 2 wrong\n.*\(0x2, 0x4\): GPU 0x7, p.* 0x6"
    ):
        tally.check()
