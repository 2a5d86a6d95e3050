"""A decode step in torch.compile: one graph, for all lengths, replayed as a CUDA graph on a GPU.

The cache is written in place. The device counts the tokens; `refresh` asks it. Where there is no
GPU the same graph runs without a compiler.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from gqa_cutlass import KVCache

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
BATCH, Q_HEADS, KV_HEADS, HEAD_DIM, ROOM = (8, 32, 8, 128, 4096) if GPU else (2, 4, 1, 64, 16)
KIND = {"dtype": torch.float16, "device": DEVICE}


class Block(torch.nn.Module):
    """An attention block: projections around a cache."""

    def __init__(self, cache: KVCache) -> None:
        super().__init__()
        width = Q_HEADS * HEAD_DIM
        self.cache = cache
        self.qkv = torch.nn.Linear(width, (Q_HEADS + 2 * KV_HEADS) * HEAD_DIM, **KIND)
        self.out = torch.nn.Linear(width, width, **KIND)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(x).unflatten(-1, (-1, HEAD_DIM))
        q, k, v = heads.split([Q_HEADS, KV_HEADS, KV_HEADS], dim=1)
        return self.out(self.cache.decode(q, k, v).flatten(1))


def main(steps: int = 4) -> tuple[list[int], int]:
    """Decode; returns the lengths, and how often something was compiled."""
    torch.manual_seed(0)
    block = Block(KVCache(BATCH, ROOM, KV_HEADS, HEAD_DIM, **KIND))
    counter = None if GPU else CompileCounterWithBackend("aot_eager")
    how = {"mode": "reduce-overhead"} if counter is None else {"backend": counter}
    step = torch.compile(block, fullgraph=True, **how)
    x = torch.randn(BATCH, Q_HEADS * HEAD_DIM, **KIND)
    with torch.no_grad():
        for _ in range(steps):
            y = step(x)
            x = torch.nn.functional.normalize(y, dim=-1) * x.norm(dim=-1, keepdim=True)
    lengths = block.cache.refresh()
    block.cache.check()
    print(f"{lengths} tokens, output up to {y.abs().max().item():.2f}")
    return lengths, 1 if counter is None else counter.frame_count


if __name__ == "__main__":
    main()
