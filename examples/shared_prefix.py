"""One prompt for a whole batch: held and attended to once, and what is each sequence's own apart.

To the prefix, which is one sequence, the whole batch's queries are more heads: its keys are read
once. What each sequence has of its own is attended to as ever, and `merge_states` makes one of
both. Checked against caches that hold everything.

Runs on the GPU; where there is none, in the simulator, at toy sizes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gqa_cutlass import gqa_decode, merge_states

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
BATCH = 32 if GPU else 3
Q_HEADS, KV_HEADS, HEAD_DIM = (32, 8, 128) if GPU else (4, 1, 64)
PREFIX, ROOM = (16384, 1024) if GPU else (40, 16)  # tokens that are shared, and of each sequence
KIND = {"dtype": torch.float16, "device": DEVICE}
PART = {"return_lse": True, "out_dtype": torch.float32}  # rounded once, when they are merged


def main() -> float:
    """Decode one token per sequence; returns the largest difference from one attention to all."""
    torch.manual_seed(0)
    prefix = torch.randn(2, 1, PREFIX, KV_HEADS, HEAD_DIM, **KIND)
    own = torch.randn(2, BATCH, ROOM, KV_HEADS, HEAD_DIM, **KIND)
    lengths = torch.randint(0, ROOM, (BATCH,), dtype=torch.int32).to(DEVICE)
    q = torch.randn(BATCH, Q_HEADS, HEAD_DIM, **KIND)
    k, v = torch.randn(2, BATCH, KV_HEADS, HEAD_DIM, **KIND)

    whole = torch.cat([prefix.expand(-1, BATCH, -1, -1, -1), own], dim=2)
    expected = gqa_decode(q, *whole, k, v, cache_seqlens=lengths + PREFIX)

    shared, shared_lse = attend_to_prefix(q, *prefix)
    rest, rest_lse = gqa_decode(q, *own, k, v, cache_seqlens=lengths, **PART)
    out, _ = merge_states([shared, rest], [shared_lse, rest_lse], out_dtype=q.dtype)
    difference = (out - expected).abs().max().item()
    print(f"{BATCH} sequences, {PREFIX} tokens shared: the cache is {saved():.1f} times as small")
    print(f"difference from caches that hold everything up to {difference:.1e}")
    return difference


def attend_to_prefix(q: Tensor, k_cache: Tensor, v_cache: Tensor) -> tuple[Tensor, Tensor]:
    """All sequences' queries, as heads of the one sequence that the prefix is."""
    group = Q_HEADS // KV_HEADS
    heads_first = q.view(BATCH, KV_HEADS, group, HEAD_DIM).transpose(0, 1)
    query = heads_first.reshape(1, KV_HEADS * BATCH * group, HEAD_DIM)
    out, lse = gqa_decode(query, k_cache, v_cache, cache_seqlens=PREFIX, **PART)
    out = out.view(KV_HEADS, BATCH, group, HEAD_DIM).transpose(0, 1)
    lse = lse.view(KV_HEADS, BATCH, group).transpose(0, 1)
    return out.reshape(BATCH, Q_HEADS, HEAD_DIM), lse.reshape(BATCH, Q_HEADS)


def saved() -> float:
    """How many times the memory and the bytes read shrink."""
    return BATCH * (PREFIX + ROOM) / (PREFIX + BATCH * ROOM)


if __name__ == "__main__":
    main()
