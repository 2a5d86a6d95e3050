"""Several tokens of a sequence, for a step that has one, and trees of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from buffers import GUARD, guarded

if TYPE_CHECKING:
    from cases import Step


def take_tokens(step: Step, queries: int = 3, new: int | None = None) -> None:
    """Have several query tokens, and as many new ones or `new`, none the fewer tokens in all.

    What a sequence is too short for comes on top.
    """
    if step.q.dim() == 4:
        return
    offset, pad = step.q.storage_offset() - GUARD, step.q.stride(1) - step.q.shape[-1]
    generator = torch.Generator().manual_seed(queries)
    count = queries if new is None else new
    for name, tokens in (("q", queries), ("k", count), ("v", count), ("out", queries)):
        old = getattr(step, name)
        if old is None:
            continue
        batch, *row = old.shape
        data = torch.randn(batch, tokens, *row, generator=generator)
        buffer = guarded(data.shape, old.dtype, str(old.device), offset, pad)
        buffer.tensor.copy_(data if name != "out" else data.fill_(torch.nan))
        step.buffers.append(buffer)
        setattr(step, name, buffer.tensor)
    if step.k is not None:
        step.lengths = [max(length - count + 1, 0) for length in step.lengths]
        step.seqlens = step.seqlens.new_tensor(step.lengths)
        for b, length in enumerate(step.lengths):
            for token in range(length, step.k_cache.shape[1]):
                step.k_cache[step.place(b, token)] = torch.nan
                step.v_cache[step.place(b, token)] = torch.nan


def see_tree(step: Step) -> None:
    """Have every draft see some of the others, the first of each sequence none of them."""
    batch, tokens = step.q.shape[:2]
    generator = torch.Generator().manual_seed(tokens)
    mask = torch.rand(batch, tokens, tokens, generator=generator) < 0.5
    mask[:, 1:].diagonal(1, 1, 2).fill_(True)
    mask[:, 0] = False
    step.tree_mask = mask.to(step.q.device)


def take_unlike(step: Step, queries: list[int] | None, new: list[int] | None) -> None:
    """Have unlike many query tokens in sequences, or new ones, one sequence's behind another's.

    The caches must have room for them. None leaves those tokens as they are.
    """
    for counts, index, names in (
        (queries, "cu_seqlens_q", ("q", "out")), (new, "cu_seqlens_k_new", ("k", "v")),
    ):  # fmt: skip
        if counts is None or getattr(step, names[0]) is None:
            continue
        generator = torch.Generator().manual_seed(sum(counts))
        ends = torch.tensor([0, *counts]).cumsum(0).int()
        setattr(step, index, ends.to(step.q.device))
        for name in names:
            old = getattr(step, name)
            offset, pad = old.storage_offset() - GUARD, old.stride(-2) - old.shape[-1]
            data = torch.randn(sum(counts), *old.shape[-2:], generator=generator)
            buffer = guarded(data.shape, old.dtype, str(old.device), offset, pad)
            buffer.tensor.copy_(data if name != "out" else data.fill_(torch.nan))
            step.buffers.append(buffer)
            setattr(step, name, buffer.tensor)
