"""Padding and indices: which rows and tokens of the caches belong to a sequence."""

from __future__ import annotations

import math

import pytest
import torch
from cases import make_step, snapshot
from featured import ALL, KINDS, add_index, add_padding, every_schedule, kernel_of, step_of
from helpers import check, diagonal, run, skip_unless_it_runs

import gqa_cutlass
from gqa_cutlass.errors import CacheOverflowError

PROCESS = "features"  # has all tests of this folder, for they have kernels in common


@pytest.mark.parametrize(("kind", "append"), diagonal(KINDS, [True, False]))
def test_padding_of_every_size(kind: str, append: bool, device: str) -> None:
    """It ends at, before and behind the edges of tiles, and of the sequence."""
    config = kernel_of(kind, "leftpad")
    skip_unless_it_runs(config, device)
    tile = config.block_n
    length = 3 * tile + 5
    sizes = [
        0,
        1,
        tile - 1,
        tile,
        tile + 1,
        length - 1,
        length,
        length + 1,
        2**31 - 1,
        -7,
        -(2**31),
    ]
    for splits in (1, 3):
        step = make_step(
            dtype=config.dtype, lengths=[length] * len(sizes), max_seq_len=4 * tile, head_dim=64,
            num_kv_heads=1, vec_width=config.vec_width, append=append, device=device,
        )  # fmt: skip
        add_padding(step, *sizes)
        snapshot(step)
        plan = gqa_cutlass.plan(
            *step.tensors(), cache_seqlens=step.seqlens, return_lse=True, kernel=config,
            num_splits=splits, **step.features(),
        )  # fmt: skip
        out, lse = plan(*step.tensors(), step.seqlens)
        check(step, out)
        torch.testing.assert_close(lse.double(), step.reference()[1], atol=2e-5, rtol=2e-6)
        nothing = [b for b, size in enumerate(sizes) if size >= length + append]
        assert nothing and (out[nothing] == 0).all() and (lse[nothing] == -math.inf).all()


@pytest.mark.parametrize("bad", [4, 2**31 - 1, -1, -(2**31)])
@every_schedule
def test_an_index_of_no_row_spoils_only_its_sequence(kind: str, bad: int, device: str) -> None:
    """Nothing is read or written through it; that of an inactive row does not matter."""
    config = kernel_of(kind, "index")
    skip_unless_it_runs(config, device)
    step = make_step(
        dtype=config.dtype, lengths=[30, 5, 60], max_seq_len=80, head_dim=64, num_kv_heads=1,
        vec_width=config.vec_width, device=device,
    )  # fmt: skip
    add_index(step, spare=1)
    snapshot(step)
    expected = step.reference()[0]
    for length in (5, -1):
        step.cache_batch_idx[1], step.seqlens[1] = bad, length
        plan = gqa_cutlass.plan(
            *step.tensors(), cache_seqlens=step.seqlens, return_lse=True, kernel=config,
            num_splits=2, cache_batch_idx=step.cache_batch_idx,
        )  # fmt: skip
        out, lse = plan(*step.tensors(), step.seqlens)
        if length < 0:
            gqa_cutlass.check_overflow(device)
            assert (out[1] == 0).all() and (lse[1] == -math.inf).all()
        else:
            with pytest.raises(CacheOverflowError, match=r"cache_seqlens\[1\] .*cache_batch_idx"):
                gqa_cutlass.check_overflow(device)
            assert out[1].isnan().all() and lse[1].isnan().all()
        step.check_memory(rejected=(1,))
        for right in (0, 2):
            assert (out[right].double() - expected[right]).abs().max() < 4e-2


def test_sequences_may_share_a_row_that_they_only_read(device: str) -> None:
    step = make_step(
        lengths=[37, 20, 9], max_seq_len=64, head_dim=64, append=False, poison=False, device=device
    )
    step.cache_batch_idx = torch.tensor([2, 2, 0], dtype=torch.int32, device=device)
    check(step, run(step))


def test_rows_of_padded_batches_that_are_inactive(device: str) -> None:
    """With everything: as a continuous batch pads a CUDA graph, of numbers that mean nothing."""
    step = step_of(ALL, lengths=[37, 50, 20], max_seq_len=64, head_dim=64, device=device)
    step.seqlens[1] = -1
    step.cache_batch_idx[1], step.cache_leftpad[1] = -1, 99
    out, lse = run(step, return_lse=True)
    gqa_cutlass.check_overflow(device)
    assert (out[1] == 0).all()
    torch.testing.assert_close(lse[1], step.sinks.float(), rtol=1e-6, atol=1e-6)
    step.check_memory(rejected=(1,))
    expected = step.reference()[1]
    torch.testing.assert_close(lse[[0, 2]].double(), expected[[0, 2]], atol=2e-5, rtol=2e-6)
