"""Bugs planted in kernels whose caches have a scale for every token, and what finds them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from helpers import THOROUGH, few
from mutants.planted import program
from token_scales import (
    BF16,
    Case,
    by_multistage,
    by_tma,
    case,
    growing,
    in_pages,
    is_seen_alone,
    of_values_scaled,
    seen_alone,
    unlike_sizes,
)

import gqa_cutlass
from gqa_cutlass import api
from gqa_cutlass.codegen.headers import include_dir
from gqa_cutlass.cpu import executor as cpu
from gqa_cutlass.errors import CacheOverflowError, KernelFault

PROCESS = "features"  # has all tests of this folder, for they have kernels in common

HEADER = "policy/element_fp8_tokens.cuh"
LOOP = "schedule/multistage/attend_of_tokens.cuh"
TMA = "schedule/tma/scales_of_tokens.cuh"


def one_token() -> Case:
    return case("cpu", lengths=(20, 35), capacity=64)


def zeros() -> Case:
    made = one_token()
    made.k[0, 0] = 0
    return made


def unlike_rows() -> Case:
    return unlike_sizes("cpu")


def more_than_twice() -> Case:
    return growing("cpu", 2.2)


def one_seen() -> Case:
    return by_multistage(seen_alone("cpu", 600))


def scales_of_zero() -> Case:
    return of_values_scaled("cpu", 0.0, 64)


def very_large() -> Case:
    return by_multistage(of_values_scaled("cpu", 2e5, 300))


def just_below_a_power_of_two() -> Case:
    return of_values_scaled("cpu", 1 - 2.0**-14, 300)


def drafts() -> Case:
    return case("cpu", lengths=(20, 35), capacity=64, tokens=(5, 5))


def many_drafts() -> Case:
    """Of several blocks of rows, in several tiles."""
    return case("cpu", lengths=(50, 3), capacity=96, tokens=(40, 40))


def lost() -> Case:
    """The last draft of a sequence has no page."""
    made = case("cpu", lengths=(20, 30), capacity=64, tokens=(3, 3))
    in_pages(made)
    made.options["block_table"][1, 2] = -1
    return made


def one_token_by_tma() -> Case:
    return by_tma(one_token())


def unlike_rows_by_tma() -> Case:
    """Of all warps of a block, which have a tile each."""
    made = by_tma(case("cpu", queries=BF16, lengths=(100, 128), capacity=160, tail=4.0))
    made.options["num_splits"] = 1
    return made


def one_seen_by_tma() -> Case:
    """In a tile of one of several warps."""
    return by_tma(seen_alone("cpu", 64))


def many_by_tma() -> Case:
    """Several tiles of a warp."""
    made = by_tma(unlike_sizes("cpu"))
    made.options["num_splits"] = 1
    return made


def drafts_by_tma() -> Case:
    return by_tma(drafts())


@dataclass(frozen=True, kw_only=True)
class Planted:
    """One bug.

    Args:
        name: What is wrong.
        old: Text that occurs once in the header.
        new: What it becomes.
        wrong: What is not as it should be, or what the fault says.
        made: The step that shows it.
        left_out: Sequences of that which are refused.
        header: Where it is.
    """

    name: str
    old: str
    new: str
    wrong: str
    made: Callable[[], Case] = one_token
    left_out: frozenset[int] = field(default_factory=frozenset)
    header: str = HEADER


BUGS = (
    Planted(
        name="rows of zeros that have no scale",
        old="return largest > 0.f ? __fdiv_rn(largest, Format::kMax) : 1.f;",
        new="return __fdiv_rn(largest, Format::kMax);",
        wrong="k_cache",
        made=zeros,
    ),
    Planted(
        name="the scale of the row behind the new one",
        old="bool const own = int(threadIdx.x) % kWarpSize == row;",
        new="bool const own = int(threadIdx.x) % kWarpSize == row + 1;",
        wrong="output",
    ),
    Planted(
        name="keys without their scales",
        old="sum[1][h / 2][i], h) * scale;",
        new="sum[1][h / 2][i], h);",
        wrong="output",
    ),
    Planted(
        name="scales of the first KV head",
        old=" + work_.kv_head;",
        new=";",
        wrong="k_scale",
    ),
    Planted(
        name="sums of another range",
        old="      multiply(acc, __uint_as_float(kOne > grown ? kOne - grown : 0));\n",
        new="",
        wrong="output",
        made=unlike_rows,
    ),
    Planted(
        name="scales that float16 has no room for",
        old="kRoom = 15u << 23;",
        new="kRoom = 16u << 23;",
        wrong="output",
        made=more_than_twice,
    ),
    Planted(
        name="outputs that are relative",
        old="{ multiply(acc, unit()); }",
        new="{}",
        wrong="output",
    ),
    Planted(
        name="values whose scales lose what float16 has not",
        old="share < 1.f ? share : 0.f",
        new="0.f",
        wrong="output",
        made=one_seen,
    ),
    Planted(
        name="sums that count what scores alone should",
        old="        row_sum[h] = fmaf(probability[h][t], -rest, row_sum[h]);\n",
        new="",
        wrong="output",
        made=one_seen,
    ),
    Planted(
        name="values whose scales are not split",
        old="    value = kept;\n",
        new="",
        wrong="output",
        made=just_below_a_power_of_two,
    ),
    Planted(
        name="tokens whose scale is zero, of which the rest is no number",
        old="share < 1.f ? share : 0.f",
        new="share",
        wrong="output",
        made=scales_of_zero,
    ),
    Planted(
        name="ranges so far apart that the factor between them is no number",
        old="kOne > grown ? kOne - grown : 0",
        new="kOne - grown",
        wrong="output",
        made=very_large,
    ),
    Planted(
        name="the scale of the draft before",
        old="scale = *scale_in_tile<T, Tile>(rows, row);",
        new="scale = *scale_in_tile<T, Tile>(rows, max(row - 1, 0));",
        wrong="shared memory that was never written",
        made=drafts,
    ),
    Planted(
        name="drafts whose values' scales nobody takes",
        header=LOOP,
        old="        scales.take_values(tile, values);\n",
        new="",
        wrong="v_scale",
        made=drafts,
    ),
    Planted(
        name="drafts whose keys' scales nobody takes",
        header=LOOP,
        old="        scales.take_keys(tile, keys);\n",
        new="",
        wrong="k_scale",
        made=drafts,
    ),
    Planted(
        name="drafts that go into values before these are there",
        header=LOOP,
        old="        ring.drain();\n",
        new="",
        wrong="an asynchronous copy is under way",
        made=drafts,
    ),
    Planted(
        name="scales behind the last draft",
        old=" || number >= work_.new_tokens.count",
        new="",
        wrong="shared memory that was never written",
        made=drafts,
    ),
    Planted(
        name="scales of drafts one of which is lost",
        old="work_.head_block == 0 && !NewTokens<T>::any_lost(params_, work_)",
        new="work_.head_block == 0",
        wrong="k_scale",
        made=lost,
        left_out=frozenset({1}),
    ),
    Planted(
        name="scales that every block writes",
        old="work_.head_block == 0 && !NewTokens<T>::any_lost",
        new="!NewTokens<T>::any_lost",
        wrong="race in global memory",
        made=many_drafts,
    ),
    Planted(
        name="scales that are read where this launch writes them",
        old="row < T::kBlockN && token < work_.num_cached &&",
        new="row < T::kBlockN && token < work_.num_tokens &&",
        wrong="race in global memory",
        made=many_drafts,
    ),
    Planted(
        name="scales that two lanes write into a tile",
        old="    QuantisedRow<T, kDims, Format, is_value>::template store_to<Tile>(tile, row);\n"
        "    if (int(threadIdx.x) % kWarpSize == 0) ",
        new="    QuantisedRow<T, kDims, Format, is_value>::template store_to<Tile>(tile, row);\n"
        "    if (int(threadIdx.x) % kWarpSize < 2) ",
        wrong="race",
        made=drafts,
    ),
    Planted(
        name="a new key without its scale",
        header=TMA,
        old="for (float& factor : scaled.factor) factor *= scale;",
        new="",
        wrong="output",
        made=one_token_by_tma,
    ),
    Planted(
        name="a new value without its scale",
        old="::number(row, dim) * scale;",
        new="::number(row, dim);",
        wrong="output",
        made=one_token_by_tma,
    ),
    Planted(
        name="a new value that counts its key's scale",
        header=TMA,
        old="(shared.new_value) = token.value.scale;",
        new="(shared.new_value) = token.key.scale;",
        wrong="output",
        made=one_token_by_tma,
    ),
    Planted(
        name="values relative to what a warp has alone",
        header=TMA,
        old="largest_of_warp(table(shared)[int(threadIdx.x) % T::kNumWarps])",
        new="largest_of_warp(this->value)",
        wrong="output",
        made=unlike_rows_by_tma,
    ),
    Planted(
        name="the largest scale of one lane",
        header=TMA,
        old="float const largest = largest_of_warp(this->value);",
        new="float const largest = fabsf(this->value);",
        wrong="output",
        made=unlike_rows_by_tma,
    ),
    Planted(
        name="outputs of a block that are relative",
        header=TMA,
        old="return make_float2(sums.x * range_.unit(), sums.y * range_.unit());",
        new="return sums;",
        wrong="output",
        made=unlike_rows_by_tma,
    ),
    Planted(
        name="outputs of warps that are relative",
        header=TMA,
        old="{ range_.finish(acc); }",
        new="{}",
        wrong="output",
        made=many_by_tma,
    ),
    Planted(
        name="sums of a block that count what scores alone should",
        header="schedule/tma/single_tile.cuh",
        old="scales.scale(scores, sum, shared);",
        new="float counted[T::kLaneHeads] = {};\n  scales.scale(scores, counted, shared);",
        wrong="output",
        made=one_seen_by_tma,
    ),
    Planted(
        name="scales of the tile before",
        header="schedule/tma/decode_tma.cuh",
        old="    scales.load(tile + w.tile_step());\n",
        new="",
        wrong="output",
        made=many_by_tma,
    ),
    Planted(
        name="drafts whose values come after their scales",
        header=TMA,
        old="kWithRows = !kOneQuery<T>;",
        new="kWithRows = false;",
        wrong="race: writes over what another thread wrote",
        made=drafts_by_tma,
    ),
    Planted(
        name="a value's scale in the place of a key's that is still read",
        header=TMA,
        old="    __syncwarp();  // others take their place\n",
        new="",
        wrong="race: writes what another thread reads",
        made=drafts_by_tma,
    ),
)


def rule_of(bug: Planted) -> tuple[str, bool]:
    """What it breaks, of which CI takes one each."""
    return bug.wrong, bug.made.__name__.endswith("by_tma")


STEPS = {bug.made: bug.left_out for bug in BUGS}


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Planted | None], None]]:
    """Plants a bug in the kernels of the calls to come, whose plans nobody else has."""

    def plant(bug: Planted | None) -> None:
        change = (bug.header.rpartition("/")[2], bug.old, bug.new) if bug else ()
        monkeypatch.setattr(cpu, "program_of", lambda config: program(config, *change))

    for name in ("known", "latest"):
        monkeypatch.setattr(api._PLANS, name, {})
    yield plant
    with suppress(CacheOverflowError):
        gqa_cutlass.check_overflow("cpu")


def test_scores_that_do_not_count_the_rest_of_scales(
    planted: Callable[[Planted | None], None],
) -> None:
    """Outputs of a token alone are right then, but no sum of exponentials."""
    bug = Planted(
        name="", old="fmaf(rest, kLog2E, logit(dot, h, end.at(score.token(t))))",
        new="logit(dot, h, end.at(score.token(t)))", wrong="",
    )  # fmt: skip
    made = by_multistage(seen_alone("cpu", 64))
    assert is_seen_alone(made)
    planted(bug)
    assert not is_seen_alone(made)


@pytest.mark.parametrize("made", few(STEPS, 4), ids=lambda made: made.__name__)
def test_the_kernels_as_they_are_pass(
    made: Callable[[], Case], planted: Callable[[Planted | None], None]
) -> None:
    planted(None)
    made().check(STEPS[made])


@pytest.mark.parametrize(
    "bug",
    [
        pytest.param(
            bug, id=bug.name.replace(" ", "-"),
            marks=THOROUGH if rule_of(bug) in map(rule_of, BUGS[:i]) else (),
        )
        for i, bug in enumerate(BUGS)
    ],
)  # fmt: skip
def test_planted_bugs_are_found(bug: Planted, planted: Callable[[Planted | None], None]) -> None:
    planted(bug)
    with pytest.raises((AssertionError, KernelFault), match=bug.wrong):
        bug.made().check(bug.left_out)


def test_every_bug_has_its_place_in_the_source() -> None:
    texts = {
        name: Path(include_dir(), "gqa", name).read_text() for name in (b.header for b in BUGS)
    }
    wrong = [b.name for b in BUGS if texts[b.header].count(b.old) != 1 or b.new == b.old]
    assert wrong == []
