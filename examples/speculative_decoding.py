"""Speculative decoding: a step checks a token and three guesses, and keeps those that hold.

A small model with random weights decodes greedily, a token per step, and then by drafts: what
followed a token when the sequence had it last is guessed to follow it again. The tokens are the
same, in fewer steps. Numbers of guesses that hold stay on the device, where the cache reads them.
Runs on the GPU; where there is none, in the simulator, at toy sizes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gqa_cutlass import KVCache

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
LAYERS, BATCH, Q_HEADS, KV_HEADS, HEAD_DIM = (2, 4, 8, 2, 128) if GPU else (1, 2, 4, 1, 64)
TOKENS, VOCABULARY, DRAFT = (48, 16, 4) if GPU else (12, 8, 4)
WIDTH = Q_HEADS * HEAD_DIM
SEED = 109 if GPU else 49  # of models that are never in doubt, so that rounding decides nothing


class Model:
    """Attention layers between embeddings and a head, in float32 but for q, k and v."""

    def __init__(self) -> None:
        made = torch.Generator().manual_seed(SEED)
        heads = Q_HEADS + 2 * KV_HEADS
        projections = torch.randn(LAYERS, WIDTH, heads * HEAD_DIM, generator=made) / WIDTH**0.5
        tables = torch.randn(2, VOCABULARY, WIDTH, generator=made)
        self.embeddings, self.head = tables.to(DEVICE)
        self.projections = projections.to(DEVICE)

    def __call__(self, caches: list[KVCache], tokens: Tensor) -> Tensor:
        """What follows each of these tokens, [batch, tokens], behind all that the caches hold."""
        x = self.embeddings[tokens]
        for projection, cache in zip(self.projections, caches, strict=True):
            heads = (normed(x) @ projection).half().unflatten(-1, (-1, HEAD_DIM))
            q, k, v = heads.split([Q_HEADS, KV_HEADS, KV_HEADS], dim=2)
            x = x + cache.decode(q, k, v).flatten(2)  # appends all; each sees those before it
        return (normed(x) @ self.head.T).argmax(-1)


def normed(x: Tensor) -> Tensor:
    return torch.nn.functional.layer_norm(x, x.shape[-1:])


def new_caches() -> list[KVCache]:
    """Room for all tokens, and a draft that nothing of is kept."""
    return KVCache.for_layers(
        LAYERS, BATCH, TOKENS + DRAFT, KV_HEADS, HEAD_DIM, torch.float16, DEVICE
    )


def greedily(model: Model, first: Tensor) -> Tensor:
    """Token by token, [batch, TOKENS]."""
    caches, tokens = new_caches(), [first]
    while len(tokens) < TOKENS:
        tokens.append(model(caches, tokens[-1][:, None])[:, 0])
    return torch.stack(tokens, dim=1)


def by_drafts(model: Model, first: Tensor) -> tuple[Tensor, int]:
    """The same, and the number of steps that it took."""
    caches, rows = new_caches(), torch.arange(BATCH, device=DEVICE)
    follows = torch.zeros(BATCH, VOCABULARY, dtype=torch.int64, device=DEVICE)
    tokens = torch.zeros(BATCH, TOKENS + DRAFT, dtype=torch.int64, device=DEVICE)
    tokens[:, 0], last, found, steps = first, first, torch.ones_like(first), 0
    while found.min() < TOKENS:
        draft = [last]
        while len(draft) < DRAFT:
            draft.append(follows[rows, draft[-1]])
        said = model(caches, torch.stack(draft, dim=1))  # [batch, DRAFT]
        # A guess holds where the model says it, and if all before it held; what the model says
        # after the last of them is one token more.
        holds = torch.stack(draft[1:], dim=1) == said[:, :-1]
        kept = torch.minimum(holds.cumprod(1).sum(1) + 1, TOKENS - found)  # 0: it has them all
        caches[0].accept(kept.int())
        tokens.scatter_(1, found[:, None] + torch.arange(DRAFT, device=DEVICE), said)
        for i, token in enumerate(draft):
            follows[rows, token] = torch.where(i < kept, said[:, i], follows[rows, token])
        last = said[rows, (kept - 1).clamp(min=0)]
        found, steps = found + kept, steps + 1
    caches[0].check()
    return tokens[:, :TOKENS], steps


def main() -> tuple[Tensor, Tensor, int]:
    """Decode both ways; returns the tokens of both, and the steps of the second."""
    model = Model()
    first = torch.arange(BATCH, device=DEVICE)
    plain = greedily(model, first)
    ours, steps = by_drafts(model, first)
    print(f"{TOKENS - 1} steps of a token:", plain[0].tolist())
    print(f"{steps} steps of {DRAFT} drafts:", ours[0].tolist())
    return plain, ours, steps


if __name__ == "__main__":
    main()
