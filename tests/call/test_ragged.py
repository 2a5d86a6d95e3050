"""Ragged batches: lengths on the device decide how many blocks share each sequence."""

from __future__ import annotations

import random
from math import prod

import pytest
from cases import Step, make_step
from helpers import THOROUGH

import gqa_cutlass
from gqa_cutlass import CacheOverflowError
from gqa_cutlass.codegen import DType, KernelConfig, Math, default_config
from gqa_cutlass.dispatch import Choice

MAX_SEQ_LEN = 4096
TENSOROP = default_config(Math.TENSOROP, DType.F16, 64, 4, 8)
SIMT = default_config(Math.SIMT, DType.F16, 64, 1, 2)


def step_of(config: KernelConfig, lengths: list[int], device: str, append: bool = True) -> Step:
    return make_step(
        dtype=config.dtype, head_dim=config.head_dim, group_size=config.group_size,
        lengths=lengths, max_seq_len=MAX_SEQ_LEN, num_kv_heads=1, vec_width=config.vec_width,
        append=append, device=device,
    )  # fmt: skip


def plan_of(step: Step, config: KernelConfig | Choice) -> gqa_cutlass.Plan:
    plan = gqa_cutlass.plan(
        *step.tensors(), cache_seqlens=step.seqlens, return_lse=True, out=step.out, kernel=config
    )
    assert plan.dispatch.balanced
    return plan


def check(step: Step, config: KernelConfig | Choice) -> None:
    out, _ = plan_of(step, config)(*step.tensors(), step.seqlens, step.out)
    assert step.errors(out).share <= 1
    step.check_memory()


LENGTHS = {
    "long first": [900, 3, 0, 17, 90, 1],
    "long last": [3, 0, 17, 90, 1, 900],
    "nothing but one": [0, 0, 0, 0, 700],
    "nothing": [0, 0, 0],
    "about equal": [300, 310, 305],
    "more than a warp looks at once": [5] * 40 + [600] + [7] * 30,
    "the last of a second look": [5] * 33 + [40],
}


@pytest.mark.parametrize(
    ("config", "lengths"),
    [
        *(pytest.param(TENSOROP, lengths, id=name) for name, lengths in LENGTHS.items()),
        pytest.param(SIMT, LENGTHS["long first"], id="simt, long first"),
        *(
            pytest.param(SIMT, lengths, id=f"simt, {name}", marks=THOROUGH)
            for name, lengths in list(LENGTHS.items())[1:]
        ),
    ],
)
def test_every_sequence_is_attended_whole(
    config: KernelConfig, lengths: list[int], device: str
) -> None:
    check(step_of(config, lengths, device), config)


@pytest.mark.parametrize("seed", range(6))
def test_any_lengths_fit_into_the_blocks_of_the_launch(seed: int, device: str) -> None:
    chosen = random.Random(seed)
    count = chosen.choice((2, 3, 5, 31, 33))
    lengths = [int(chosen.paretovariate(0.7)) % 400 for _ in range(count)]
    check(step_of(TENSOROP, lengths, device, append=seed % 2 == 0), TENSOROP)


def test_parts_of_a_sequence_are_kept_apart_among_many_blocks(device: str) -> None:
    """More blocks than run at a time, and parts of more than two rounds."""
    config = default_config(Math.TENSOROP, DType.F16, 256, 2, 8)
    launch = Choice(config=config, splits=3, num_stages=config.num_stages, spare=1)
    step = step_of(config, [3] * 99 + [4090] + [0, 40] * 50, device)
    assert prod(plan_of(step, launch).dispatch.shape.grid) > 768
    check(step, launch)


def test_wrong_and_negative_lengths_count_as_nothing(device: str) -> None:
    """What is too long is reported; what is negative is inactive."""
    step = step_of(TENSOROP, [700, 0, 5, 0], device)
    step.seqlens[1], step.seqlens[3] = -1, MAX_SEQ_LEN
    out, lse = plan_of(step, TENSOROP)(*step.tensors(), step.seqlens, step.out)
    with pytest.raises(CacheOverflowError, match=r"cache_seqlens\[3\]"):
        gqa_cutlass.check_overflow(device)
    step.check_memory(rejected=(1, 3))
    expected, _ = step.reference()
    assert (out[1] == 0).all() and (lse[1] == float("-inf")).all()
    assert out[3].isnan().all() and lse[3].isnan().all()
    for right in (0, 2):
        assert (out[right].double() - expected[right]).abs().max() < 5e-3


def test_results_repeat_to_the_bit(device: str) -> None:
    step = step_of(TENSOROP, [900, 3, 250, 17], device, append=False)
    plan = plan_of(step, TENSOROP)
    first, _ = plan(*step.tensors(), step.seqlens, step.out)
    first = first.clone()
    for _ in range(3):
        again, _ = plan(*step.tensors(), step.seqlens, step.out)
        assert again.equal(first)


def test_lengths_that_the_host_knows_are_not_dealt_out() -> None:
    step = step_of(TENSOROP, [9, 9], "cpu")
    plan = gqa_cutlass.plan(*step.tensors(), cache_seqlens=9, out=step.out, kernel=TENSOROP)
    assert not plan.dispatch.balanced
