"""One long context on several GPUs: prompts and tokens spread over ranks, checked against one.

    torchrun --nproc-per-node 2 examples/context_parallel.py

Runs on GPUs with NCCL; where there are none, in the simulator with gloo, at toy sizes.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch import Tensor

from gqa_cutlass import gqa_decode
from gqa_cutlass.distributed import Sharding, decode_context_parallel

GPU = torch.cuda.is_available()
BATCH = 2
Q_HEADS, KV_HEADS, HEAD_DIM = (32, 8, 128) if GPU else (4, 1, 64)
PROMPT = 100_000 if GPU else 21
STEPS = 4


def main() -> float:
    """Decode on all ranks; returns the largest difference from one rank that holds everything."""
    rank, size = dist.get_rank(), dist.get_world_size()
    device = f"cuda:{torch.cuda.current_device()}" if GPU else "cpu"
    kind = {"dtype": torch.float16, "device": device}
    torch.manual_seed(0)  # the same on all ranks, as the layers before give them
    sharding = Sharding(rank=rank, size=size)
    room = sharding.first.count(PROMPT + STEPS)  # as many on every rank

    prompt = torch.randn(2, BATCH, PROMPT, KV_HEADS, HEAD_DIM, **kind)
    caches = torch.empty(2, BATCH, room, KV_HEADS, HEAD_DIM, **kind)
    caches[:, :, : sharding.count(PROMPT)] = prompt[:, :, rank::size]
    whole = torch.cat((prompt, prompt[:, :, :STEPS]), dim=2)  # with room for the tokens

    lengths = torch.full((BATCH,), PROMPT, dtype=torch.int32, device=device)
    worst = 0.0
    for _ in range(STEPS):
        q = torch.randn(BATCH, Q_HEADS, HEAD_DIM, **kind)
        k, v = torch.randn(2, BATCH, KV_HEADS, HEAD_DIM, **kind)
        out = decode_context_parallel(q, *caches, k, v, cache_seqlens=lengths)
        expected = gqa_decode(q, *whole, k, v, cache_seqlens=lengths)
        worst = max(worst, difference(out, expected))
        lengths += 1
    if rank == 0:
        print(f"{size} ranks with {room} of {PROMPT + STEPS} tokens: difference up to {worst:.1e}")
    return worst


def difference(out: Tensor, expected: Tensor) -> float:
    """The largest difference."""
    return (out - expected).abs().max().item()


if __name__ == "__main__":
    if GPU:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if GPU else "gloo")
    main()
    dist.destroy_process_group()
