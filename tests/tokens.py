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
