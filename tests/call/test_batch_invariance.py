"""`batch_invariant`: a sequence's result depends on nothing but itself, to the bit."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from helpers import call_tensors, remodelled
from torch import Tensor

import gqa_cutlass
from gqa_cutlass import gqa_decode
from gqa_cutlass.codegen import Schedule
from gqa_cutlass.dispatch import H200

HELD = 600  # tokens of the sequence that is looked at: more than two blocks' warps take at once
PAGE = 16
# Batch, the sequence's place in it, what the others hold, and the room.
SURROUNDINGS = {
    "alone": (1, 0, 0, HELD + 1),
    "with room for more": (1, 0, 0, 4 * HELD),
    "among short ones": (5, 3, 7, 4096),
    "among longer ones": (3, 1, 900, 1024),
    "among many": (9, 8, 40, 4096),
    "among empty ones": (2, 0, 0, 8192),
}


def _decoded(name: str, device: str, paged: bool, **options: Any) -> tuple[Tensor, Tensor]:
    """The sequence's output and log-sum-exp in some surroundings."""
    batch, place, others, room = SURROUNDINGS[name]
    room = -(-room // PAGE) * PAGE
    tensors = call_tensors(
        batch=batch, q_heads=4, kv_heads=1, head_dim=64, max_seq_len=room, device=device
    )
    tensors.pop("out")
    generator = torch.Generator().manual_seed(3)
    for key, tensor in tensors.items():
        rows = HELD if "cache" in key else tensor.shape[1]
        drawn = torch.randn(rows, *tensor.shape[2:], generator=generator).to(tensor.dtype)
        tensor[place, :rows] = drawn.to(device)
    lengths = torch.full((batch,), others, dtype=torch.int32)
    lengths[place] = HELD
    if paged:
        order = torch.randperm(batch * room // PAGE, generator=generator)
        for key in ("k_cache", "v_cache"):
            pages = tensors[key].view(-1, PAGE, *tensors[key].shape[2:])
            tensors[key] = pages[order.to(device).argsort()].contiguous()
        options["block_table"] = order.to(torch.int32).view(batch, -1).to(device)
    out, lse = gqa_decode(**tensors, cache_seqlens=lengths.to(device), return_lse=True, **options)
    return out[place].cpu(), lse[place].cpu()


def _all_equal(found: list[tuple[Tensor, Tensor]]) -> bool:
    return all(
        torch.equal(mine, first)
        for pair in found
        for mine, first in zip(pair, found[0], strict=True)
    )


@pytest.mark.parametrize("paged", [False, True], ids=["dense", "pages"])
def test_a_result_does_not_depend_on_neighbours_or_room(device: str, paged: bool) -> None:
    names = list(SURROUNDINGS)[: 3 if paged else None]
    found = [_decoded(name, device, paged, batch_invariant=True) for name in names]
    assert _all_equal(found)
    fewer = _decoded("alone", device, paged, num_splits=1)
    assert not _all_equal([found[0], fewer])  # or the test could not fail


@pytest.mark.parametrize("options", [
    {"num_splits": 2}, {"ragged": False}, {"max_seqlen": 700}, {"window_size": (300, 0)},
], ids=lambda options: next(iter(options)))  # fmt: skip
def test_it_holds_with_other_options(device: str, options: dict[str, Any]) -> None:
    names = ("alone", "among short ones", "among longer ones")
    options = {"batch_invariant": True, **options}
    assert _all_equal([_decoded(name, device, False, **options) for name in names])


def test_the_early_first_tile_changes_no_bit(device: str) -> None:
    """Whether there is one depends on the room."""
    found = []
    for limit in (0, 1 << 20):
        with remodelled(prefetch_mib=limit):
            found.append(_decoded("with room for more", device, False, batch_invariant=True))
    assert _all_equal(found)


@pytest.mark.parametrize(("batch", "room"), list(product((1, 2, 64, 300), (64, 4096, 131072))))
def test_kernel_and_splits_are_the_same_for_all(batch: int, room: int) -> None:
    meta = {k: t.to("meta") for k, t in call_tensors(batch=1, max_seq_len=1).items() if k != "out"}
    shapes = {"q": 8, "k": 2, "v": 2, "k_cache": 2, "v_cache": 2}
    tensors = {
        key: tensor.new_empty(batch, *((room,) if "cache" in key else ()), shapes[key], 64)
        for key, tensor in meta.items()
    }
    chosen = gqa_cutlass.explain(**tensors, batch_invariant=True).dispatch
    assert chosen.config.schedule is Schedule.MULTISTAGE and not chosen.balanced
    assert (chosen.num_splits, chosen.shape.cluster) == (H200.invariant_splits, 1)


def test_a_kernel_of_the_callers_has_the_same_splits_for_all() -> None:
    tensors = call_tensors(max_seq_len=4096)
    lengths = torch.zeros(2, dtype=torch.int32)
    chosen = gqa_cutlass.plan(**tensors, cache_seqlens=lengths).dispatch
    for kernel in (chosen.config, None):
        plan = gqa_cutlass.plan(
            **tensors, cache_seqlens=lengths, batch_invariant=True, kernel=kernel
        )
        assert plan.dispatch.num_splits == H200.invariant_splits and not plan.dispatch.balanced
