"""A decode loop: prompts of different lengths, then tokens, checked against PyTorch's SDPA.

Runs on the GPU; where there is none, in the simulator, at toy sizes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gqa_cutlass import KVCache

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
Q_HEADS, KV_HEADS, HEAD_DIM = (32, 8, 128) if GPU else (4, 1, 64)
ROOM = 4096 if GPU else 32
PROMPTS = [ROOM // 2, 3, 1]
KIND = {"dtype": torch.float16, "device": DEVICE}


def main(steps: int = 4) -> float:
    """Decode; returns the largest difference from SDPA."""
    torch.manual_seed(0)
    batch = len(PROMPTS)
    cache = KVCache(batch, ROOM, KV_HEADS, HEAD_DIM, **KIND)
    k, v = torch.randn(2, batch, max(PROMPTS), KV_HEADS, HEAD_DIM, **KIND)  # padded on the right
    cache.prefill(k, v, lengths=PROMPTS)

    worst = 0.0
    for step in range(steps):
        q = torch.randn(batch, Q_HEADS, HEAD_DIM, **KIND)
        k, v = torch.randn(2, batch, KV_HEADS, HEAD_DIM, **KIND)
        out = cache.decode(q, k, v)  # one kernel: appends the token, attends to all of them
        worst = max(worst, (out - attention(q, cache)).abs().max().item())
        print(f"step {step}: {cache.lengths} tokens, difference from SDPA up to {worst:.1e}")
    cache.check()
    return worst


def attention(q: Tensor, cache: KVCache) -> Tensor:
    """The same by SDPA, sequence by sequence."""
    outs = []
    for b, held in enumerate(cache.refresh()):
        keys, values = (t[b, None, :held].transpose(1, 2) for t in (cache.k, cache.v))
        query = q[b, None, :, None]
        outs.append(F.scaled_dot_product_attention(query, keys, values, enable_gqa=True)[0, :, 0])
    return torch.stack(outs)


if __name__ == "__main__":
    main()
