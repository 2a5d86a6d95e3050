"""Windows: which tokens are seen, and that no others are read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import make_step, snapshot
from edges import Edge
from featured import KINDS, WINDOW, add_window, kernel_of, step_of
from helpers import check, diagonal, run, share_of_step, skip_unless_it_runs
from torch import Tensor

import gqa_cutlass
from gqa_cutlass.ptxsim.report import global_bytes
from gqa_cutlass.ptxsim.stats import Stats

PROCESS = "features"  # has all tests of this folder, for they have kernels in common


@pytest.mark.parametrize(("kind", "append"), diagonal(KINDS, [True, False]))
def test_windows_of_every_size(kind: str, append: bool, device: str) -> None:
    """They begin and end at, before and behind the edges of tiles, and what they hide is NaN."""
    config = kernel_of(kind, "window")
    skip_unless_it_runs(config, device)
    tile = config.block_n
    for window in (1, tile - 1, tile, tile + 1, 3 * tile):
        lengths = [4 * tile - 2, 4 * tile - 1, 4 * tile, window - 1, window, 0]
        step = make_step(
            dtype=config.dtype, lengths=lengths, max_seq_len=6 * tile, head_dim=64, num_kv_heads=1,
            vec_width=config.vec_width, append=append, device=device,
        )  # fmt: skip
        add_window(step, window)
        snapshot(step)
        plan = gqa_cutlass.plan(
            *step.tensors(), cache_seqlens=step.seqlens, return_lse=True, kernel=config,
            num_splits=2, **step.features(),
        )  # fmt: skip
        out, lse = plan(*step.tensors(), step.seqlens)
        check(step, out)
        torch.testing.assert_close(lse.double(), step.reference()[1], atol=2e-5, rtol=2e-6)


@pytest.mark.sanitized
@pytest.mark.parametrize("kind", KINDS)
def test_a_window_that_is_walked_in_one_block_and_in_a_cluster(kind: str, device: str) -> None:
    """More tiles than warps, so that slots which were cleared are filled again."""
    config = kernel_of(kind, "window")
    skip_unless_it_runs(config, device)
    block = config.block_n * config.num_warps
    for splits, by_value in ((1, True), (2, False)):
        edge = Edge(
            lengths=(3 * block + 5,), capacity=3 * block + 9, splits=splits, stages=1,
            by_value=by_value,
        )  # fmt: skip
        step = edge.step(config, device)
        add_window(step, 2 * block + 7)
        snapshot(step)
        assert share_of_step(edge, config, step) <= 1


@pytest.mark.parametrize("kind", KINDS)
def test_tiles_outside_of_a_window_are_not_read(kind: str) -> None:
    """As many bytes as a cache that holds no more than the window, and an edge of a tile."""
    window = 64
    read = []
    # The newest token is appended.
    for feature, length, room in (("window", 500, 512), ("softcap", window, window)):
        step = make_step(
            dtype=KINDS[kind][1], lengths=[length - 1] * 2, max_seq_len=room, head_dim=64,
            vec_width=KINDS[kind][2], num_kv_heads=1, device="cpu",
        )  # fmt: skip
        if feature == "window":
            add_window(step, window)
        else:
            step.softcap = 1.5
        config = kernel_of(kind, feature)
        plan: Any = gqa_cutlass.plan(
            *step.tensors(), cache_seqlens=step.seqlens, kernel=config, num_splits=1,
            **step.features(),
        )  # fmt: skip
        plan.kernel.stats = Stats(len(plan.kernel.program.code))
        plan(*step.tensors(), step.seqlens)
        read.append(global_bytes(plan.kernel.stats)[0])
    assert read[0] <= read[1] + 2 * config.tile_bytes  # of two sequences


@pytest.mark.parametrize("append", [True, False], ids=["append", "attend"])
def test_windows_that_hide_nothing_are_none(append: bool) -> None:
    step = make_step(lengths=[37], max_seq_len=64, head_dim=64, append=append, device="cpu")
    plain = gqa_cutlass.explain(*step.tensors()).dispatch
    for none in ((-1, -1), [-1, 0], (63, 0), (64, -1), (2**40, 7)):
        assert gqa_cutlass.explain(*step.tensors(), window_size=none).dispatch == plain
    found = gqa_cutlass.explain(*step.tensors(), window_size=(62, 0)).dispatch
    assert found.config.policies == (WINDOW,) and not found.prefetch_first_tile


def test_the_right_side_of_a_window_makes_no_difference(device: str) -> None:
    step = step_of("window", lengths=[37], max_seq_len=64, head_dim=64, append=False, device=device)
    for right in (-1, 0, 5):
        step.window_size = (step.window_size[0], right)
        check(step, run(step))


def meta_step(max_seq_len: int) -> tuple[Tensor, ...]:
    """Llama-3's tensors, without memory."""
    q = torch.empty(1, 32, 128, dtype=torch.float16, device="meta")
    cache, row = (
        torch.empty(1, *n, 8, 128, dtype=q.dtype, device="meta") for n in ((max_seq_len,), ())
    )
    return q, cache, cache, row, row


def test_launches_are_as_large_as_the_window_and_not_as_the_cache() -> None:
    windowed = gqa_cutlass.explain(*meta_step(131072), window_size=(1023, 0))
    small = gqa_cutlass.explain(*meta_step(1024))
    assert windowed.kv_bytes == small.kv_bytes
    assert windowed.dispatch.shape.grid == small.dispatch.shape.grid
    assert windowed.dispatch.config.schedule is small.dispatch.config.schedule
    assert "a window of 1024 of at most 131072 tokens" in str(windowed)
