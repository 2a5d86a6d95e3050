"""The C library gives every one of several tokens a scale, like Python."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from c_and_python import WIDE_64, assert_same
from c_build import build, write_dummies
from c_library import fresh_copy
from c_tokens import Call
from helpers import every
from token_scales import BF16, E5M2, STORED, Case, case, in_pages
from turnings import Turning

import gqa_cutlass
from gqa_cutlass import pack_tree_mask
from gqa_cutlass.call.record import parse
from gqa_cutlass.codegen import DType, KernelConfig, Math, default_config
from gqa_cutlass.codegen.schema.policies import tagged
from gqa_cutlass.proof.reference import same_bits

CAPACITY = 42  # of two tiles, and of six pages of 7


def steps(*counts: int, lengths: tuple[int, ...] = (20, 20), **options: Any) -> Case:
    queries, new = counts
    made = case("cpu", lengths=lengths, capacity=CAPACITY, tokens=(queries, new))
    made.options |= options
    return made


def apart(made: Case) -> Case:
    """Scales of keys in rows that lie apart."""
    batch, room, heads = made.k_scale.shape
    held = made.k_scale
    made.k_scale = torch.ones(batch, room + 3, heads)[:, :room]
    made.k_scale.copy_(held)
    return made


def paged(made: Case) -> Case:
    in_pages(made, 7)
    return made


def drafts(made: Case) -> Case:
    """A tree in which every draft but the first two has the one before its last as its parent."""
    batch, count = made.q.shape[:2]
    sees = torch.eye(count, dtype=torch.bool)
    for draft in range(2, count):
        sees[draft] |= sees[draft - 2]
    made.options["tree_mask"] = pack_tree_mask(sees.expand(batch, count, count))
    return made


def turned(made: Case) -> Case:
    made.options |= Turning().normed(made.q).rotated(made.q, CAPACITY).options()
    return made


def indexed(made: Case) -> Case:
    """In any of three rows, and padded."""
    for name in STORED:
        rows = getattr(made, name)
        setattr(made, name, torch.cat([rows, rows[:1]]).flip(0).contiguous())
    made.options["cache_batch_idx"] = torch.tensor([2, 1], dtype=torch.int32)
    made.options["cache_leftpad"] = torch.tensor([5, 11], dtype=torch.int32)
    return made


def unlike(made: Case) -> Case:
    """Of four queries and five new tokens, the first sequence's one and three."""
    for names, index, ends in (("q", "q", [0, 1, 4]), ("kv", "k_new", [0, 3, 5])):
        for name in names:
            tokens = getattr(made, name).flatten(0, 1)[: ends[-1]].contiguous()
            setattr(made, name, tokens)
        made.options[f"cu_seqlens_{index}"] = torch.tensor(ends, dtype=torch.int32)
    made.options["max_seqlen_q"] = 3
    return made


CASES: dict[str, Callable[[], Case]] = {
    "causal": lambda: apart(steps(3, 3)),
    "blocks of rows": lambda: case(
        "cpu", E5M2, BF16, lengths=(33, 33), capacity=CAPACITY, head_dim=128, tokens=(9, 9)
    ),
    "one query": lambda: steps(1, 3),
    "one new token": lambda: steps(3, 1),
    "all see all": lambda: steps(3, 3, causal=False),
    "a window": lambda: steps(3, 3, window_size=(7, 0)),
    "a tree": lambda: drafts(steps(4, 4)),
}
# With lengths on the device alone.
RAGGED: dict[str, Callable[[], Case]] = {
    "pages": lambda: paged(steps(3, 3, lengths=(5, 20))),
    "a tree in pages": lambda: drafts(paged(steps(4, 4, lengths=(26, 3)))),
    "turned in pages": lambda: paged(turned(steps(3, 3))),
    "an index and padding": lambda: indexed(steps(3, 3, lengths=(30, 20))),
    "unlike numbers": lambda: unlike(steps(3, 3, lengths=(30, 7))),
    "unlike numbers in pages": lambda: unlike(paged(steps(3, 3, lengths=(6, 13)))),
}


def call_of(made: Case) -> Call:
    """The step, as C and Python are asked for it."""
    options = {"k_scale": made.k_scale, "v_scale": made.v_scale} | made.options
    return Call(made.q, made.k_cache, made.v_cache, made.k, made.v, made.lengths, options)


def kernel_of(call: Call) -> KernelConfig:
    """What Python takes for it."""
    tensors = call.q, call.k_cache, call.v_cache, call.k, call.v
    plan = gqa_cutlass.plan(*tensors, cache_seqlens=call.seqlens, **call.options)
    return plan.dispatch.config


def others() -> list[KernelConfig]:
    """Of one token with such scales, and of several with others, which must not be taken."""
    tags = "e4m3t", "e4m3_multi", "paged_e4m3_multi", "multi"
    of_tags = [
        default_config(Math.TENSOROP, DType.F16, 64, 4, 8, policies=tagged(tag)) for tag in tags
    ]
    return [WIDE_64, *of_tags]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scales_several")
    kernels = [kernel_of(call_of(make())) for make in (CASES | RAGGED).values()]
    kernels = list(dict.fromkeys((*others(), *kernels)))
    return build(write_dummies(folder, kernels, ("sm_90a",)), folder / "libgqa.so")


@pytest.mark.parametrize("name", every(3, [*CASES, *RAGGED]))
def test_several_tokens_have_scales_as_in_python(library: Path, name: str) -> None:
    """Written to the bit, with one length for all where it is allowed, and on the device."""
    made = (CASES | RAGGED)[name]()
    right = made.right() if name != "turned in pages" else None
    call = call_of(made)
    for ragged in (False, True) if name in CASES else (True,):
        expected = call.by_python(ragged=ragged)
        lines, c = list[str](), fresh_copy(library)
        c.log_to(lines)
        found = call.by_c(c, ragged=ragged)
        assert_same(found, expected)
        assert found.launched.kernel == parse(lines[-1])["kernel"] == kernel_of(call).name
        assert right is None or all(same_bits(getattr(made, n), right[n]) for n in STORED)
        assert not call.out.isnan().any()
        call.restore()


@pytest.mark.parametrize("name", ["causal", "pages", "unlike numbers in pages"])
def test_tokens_that_do_not_fit_have_no_scales(library: Path, name: str) -> None:
    """Of a sequence none is written, and of the others all."""
    made = (CASES | RAGGED)[name]()
    made.lengths[1] = CAPACITY - 1
    right, call = made.right(left_out={1}), call_of(made)
    flag = torch.zeros(1, dtype=torch.int32)
    expected = call.by_python(ragged=True)
    assert_same(call.by_c(fresh_copy(library), ragged=True, flag=flag), expected)
    assert all(same_bits(getattr(made, n), right[n]) for n in STORED)
    asked_by_first = 1 if "unlike" in name else 3
    outs = call.out.flatten(0, -3).split([asked_by_first, 3])
    assert not outs[0].isnan().any() and outs[1].isnan().all() and flag.item() == 1 + 1


def test_slots_say_where_several_scales_go(library: Path) -> None:
    """A token that has none is attended to, and its scale not written."""
    made = RAGGED["pages"]()
    whole = made.right()
    places = [[made.place(b, n + i) for i in range(3)] for b, n in enumerate(made.lengths)]
    slots = torch.tensor([[7 * page + at for page, at in row] for row in places])
    left_out, slots[1, 1] = places[1][1], -1
    made.options["slot_mapping"] = slots
    call, before = call_of(made), made.held()
    expected = call.by_python(ragged=True)
    assert_same(call.by_c(fresh_copy(library), ragged=True), expected)
    for name in STORED:
        rows, right = (t.view(torch.uint8) for t in (getattr(made, name), whole[name]))
        right[left_out] = before[name].view(torch.uint8)[left_out]
        assert torch.equal(rows, right), name


def test_narrow_rows_of_several_tokens_are_refused(library: Path) -> None:
    call, c = call_of(CASES["causal"]()), fresh_copy(library)
    for side in "qkv":
        given = getattr(call, side)
        setattr(call, side, given.new_zeros(given.numel() + 1)[1:].view(given.shape))
        assert call.decode(c, call.config()) == "GQA_ERROR_INVALID_VALUE"
        assert (
            "scales_of_tokens: got 1 with narrow rows; allowed: tensors whose rows are" in c.error
        )
        assert "Nothing was launched. Align them, or have scales of KV heads" in c.error
        setattr(call, side, given)
    assert c.driver.launches == 0
    assert call.decode(c, call.config()) == "GQA_SUCCESS", c.error


def test_scales_are_those_of_one_step_after_another(library: Path) -> None:
    made = CASES["causal"]()
    single = replace(made, **made.held())
    for i in range(3):
        step = replace(
            single, q=made.q[:, i], k=made.k[:, i], v=made.v[:, i],
            lengths=[n + i for n in made.lengths],
        )  # fmt: skip
        step.run()
    call_of(made).by_c(fresh_copy(library), ragged=True)
    assert all(same_bits(getattr(made, name), getattr(single, name)) for name in STORED)
