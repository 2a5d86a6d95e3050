"""The attention of a Qwen3 layer, a step in one launch, checked against plain operators of torch.

The kernel norms the heads of q and k (RMS), turns them (rotary embedding), appends k and v to the
cache and attends. Tokens of a prompt are stored as the layer has them, normed and turned. Runs on
the GPU; where there is none, in the simulator, at toy sizes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gqa_cutlass import KVCache

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
Q_HEADS, KV_HEADS, HEAD_DIM, WIDTH = (32, 8, 128, 4096) if GPU else (4, 1, 64, 128)
ROOM, BATCH, PROMPT = (4096, 8, 1000) if GPU else (32, 2, 5)
THETA, EPS = 1e6, 1e-6
KIND = {"dtype": torch.bfloat16, "device": DEVICE}


class Layer:
    """Random weights, named as transformers names them."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.qkv_proj = torch.randn(WIDTH, (Q_HEADS + 2 * KV_HEADS) * HEAD_DIM, **KIND) / WIDTH**0.5
        self.o_proj = torch.randn(Q_HEADS * HEAD_DIM, WIDTH, **KIND) / (Q_HEADS * HEAD_DIM) ** 0.5
        self.q_norm, self.k_norm = (1 + 0.1 * torch.randn(2, HEAD_DIM, **KIND)).unbind()
        turns = THETA ** -(torch.arange(0, HEAD_DIM, 2, device=DEVICE) / HEAD_DIM)
        angles = torch.arange(ROOM, device=DEVICE)[:, None] * turns
        self.cos, self.sin = angles.cos(), angles.sin()  # [positions, head_dim / 2], float32

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        """q, k and v of x, [batch, tokens, WIDTH], neither normed nor turned."""
        heads = (x @ self.qkv_proj).unflatten(-1, (-1, HEAD_DIM))
        return heads.split([Q_HEADS, KV_HEADS, KV_HEADS], dim=2)

    def step(self, x: Tensor, cache: KVCache) -> Tensor:
        """New tokens, [batch, tokens, WIDTH]: all between the projections is one launch."""
        q, k, v = self.project(x)
        out = cache.decode(
            q, k, v,
            q_norm_weight=self.q_norm, k_norm_weight=self.k_norm, norm_eps=EPS,
            rotary_cos=self.cos, rotary_sin=self.sin,
        )  # fmt: skip
        return out.flatten(2) @ self.o_proj

    def prefill(self, x: Tensor, cache: KVCache) -> None:
        """A prompt's keys and values; its attention is left out here."""
        _, k, v = self.project(x)
        cache.prefill(self.turned(k, self.k_norm).to(v), v)

    def turned(self, x: Tensor, weight: Tensor) -> Tensor:
        """Heads of tokens from position 0 on, normed and turned in float32."""
        x = F.rms_norm(x.float(), (HEAD_DIM,), weight.float(), EPS)
        cos, sin = (table[: x.shape[1], None] for table in (self.cos, self.sin))
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

    def plain(self, x: Tensor) -> Tensor:
        """The whole sequence without a cache, by operators of torch, in float32."""
        q, k, v = self.project(x)
        heads = self.turned(q, self.q_norm), self.turned(k, self.k_norm), v.float()
        q, k, v = (t.transpose(1, 2) for t in heads)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2).flatten(2).to(x) @ self.o_proj


def main() -> float:
    """A prompt, a token, and a draft of three; returns the largest difference from plain torch."""
    layer = Layer()
    cache = KVCache(BATCH, ROOM, KV_HEADS, HEAD_DIM, **KIND)
    x = torch.randn(BATCH, PROMPT + 4, WIDTH, **KIND)
    layer.prefill(x[:, :PROMPT], cache)
    one = layer.step(x[:, PROMPT : PROMPT + 1], cache)
    three = layer.step(x[:, PROMPT + 1 :], cache)
    cache.check()
    expected = layer.plain(x)[:, PROMPT:]
    difference = (torch.cat([one, three], dim=1) - expected).abs().max().item()
    print(f"{cache.lengths} tokens, difference from plain torch up to {difference:.1e}")
    return difference


if __name__ == "__main__":
    main()
