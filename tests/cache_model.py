"""Caches to test with, and a model of them: lists of the tokens that they should hold."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from gqa_cutlass import (
    KVCache,
    gqa_decode,
)
from gqa_cutlass.cache import allocation, lengths
from gqa_cutlass.proof.reference import attend, errors

HEADS, DIM, GROUP = 1, 64, 2
F16 = torch.float16


def new_cache(batch: int = 3, room: int = 12, device: str = "cpu") -> KVCache:
    return KVCache(batch, room, HEADS, DIM, F16, device)


def filled(cache: KVCache, counts: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Give an empty cache so many random tokens per sequence, known to the host; returns them."""
    k, v = tokens(cache, max(counts))
    cache.prefill(k, v, list(counts))
    return k, v


def random_like(cache: KVCache, *shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float32).to(cache.k)


def tokens(cache: KVCache, count: int) -> tuple[Tensor, Tensor]:
    """Random K and V, [batch, count, heads, dim]."""
    shape = cache.batch_size, count, *cache.k.shape[2:]
    return random_like(cache, *shape), random_like(cache, *shape)


def token(cache: KVCache) -> tuple[Tensor, Tensor]:
    """Random K and V of one token, [batch, heads, dim]."""
    k, v = tokens(cache, 1)
    return k[:, 0], v[:, 0]


def queries(cache: KVCache, count: int | None = None) -> Tensor:
    """Of one token, [batch, heads, dim], or of several, [batch, count, heads, dim]."""
    several = () if count is None else (count,)
    return random_like(cache, cache.batch_size, *several, HEADS * GROUP, DIM)


def appending(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor | None, v: Tensor | None, *,
    cache_seqlens: Tensor, **options: Any,
) -> Tensor:  # fmt: skip
    """In place of `gqa_decode`: appends several tokens as it does, and attends to nothing."""
    index = options.get("cache_batch_idx")
    rows = list(range(len(q))) if index is None else index.tolist()
    if k is not None and v is not None:
        count = k.shape[1]
        for b, (row, length) in enumerate(zip(rows, cache_seqlens.tolist(), strict=True)):
            if 0 <= row < len(k_cache) and 0 <= length <= k_cache.shape[1] - count:
                k_cache[row, length : length + count] = k[b]
                v_cache[row, length : length + count] = v[b]
    return torch.zeros_like(q)


def on_device(cache: KVCache, *values: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=cache.device)


def bits(*tensors: Tensor) -> list[Tensor]:
    """Copies that compare equal only where every bit is."""
    return [t.clone().contiguous().view(torch.int16) for t in tensors]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(map(torch.equal, a, b))


@contextmanager
def nothing_written(cache: KVCache) -> Iterator[None]:
    """Neither a bit of the storage nor a length changes meanwhile."""
    before, held = bits(cache.k, cache.v), cache.seqlens.clone()
    known, bound = cache.lengths, cache.bound
    yield
    assert same(bits(cache.k, cache.v), before)
    assert torch.equal(cache.seqlens, held)
    assert (cache.lengths, cache.bound) == (known, bound)


@contextmanager
def captured(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What is called meanwhile is taken to be captured, and replayed once."""
    with monkeypatch.context() as patch:
        patch.setattr(lengths, "capturing", lambda device: True)
        patch.setattr(allocation, "capturing", lambda device: True)
        yield


class Told:
    """Caches of a model's layers, beside lists of the tokens that they have been told to hold."""

    def __init__(self, caches: list[KVCache]) -> None:
        self.caches = caches
        self.first = caches[0]
        self.held: list[list[Tensor]] = [[] for _ in range(self.first.batch_size)]

    @property
    def lengths(self) -> list[int]:
        return [len(sequence) for sequence in self.held]

    def new(self, count: int) -> Tensor:
        """Random tokens, [layers, 2, batch, count, heads, dim]."""
        pairs = [torch.stack(tokens(self.first, count)) for _ in self.caches]
        return torch.stack(pairs)

    def add(self, new: Tensor, counts: Sequence[int]) -> list[int]:
        """Let every sequence that has the room hold its tokens; returns those that have not."""
        without = []
        for b, (sequence, count) in enumerate(zip(self.held, counts, strict=True)):
            if 0 <= count <= new.shape[3] and len(sequence) + count <= self.first.max_seq_len:
                sequence += [new[:, :, b, j] for j in range(count)]
            else:
                without.append(b)
        return without

    def prefill(self, counts: list[int]) -> None:
        new = self.new(max(counts))
        for cache, (k, v) in zip(self.caches, new, strict=True):
            cache.prefill(k, v, counts)
        assert self.add(new, counts) == []
        self.check()

    def decode(self) -> None:
        """Every layer's output is right, and as `gqa_decode` computes it from the same tokens."""
        new = self.new(1)
        outs = []
        for cache, (k, v) in zip(self.caches, new, strict=True):
            outs.append((q := queries(cache), cache.decode(q, k, v)))
        assert self.add(new, [1] * len(self.held)) == []
        self.check()
        for layer, (q, out) in enumerate(outs):
            k, v = self.dense(layer)
            held = on_device(self.first, *self.lengths)
            assert torch.equal(out, gqa_decode(q, k, v, cache_seqlens=held))
            exact, in_f16 = (
                attend(q, k, v, self.lengths, DIM**-0.5, dtype)[0] for dtype in (torch.double, F16)
            )
            assert errors(out, exact, in_f16).share <= 1

    def draft(self, count: int) -> None:
        """Decode several tokens: every one sees those before it, in every layer."""
        new, before = self.new(count), self.lengths
        outs = []
        for cache, (k, v) in zip(self.caches, new, strict=True):
            outs.append((q := queries(cache, count), cache.decode(q, k, v)))
        assert self.add(new, [count] * len(self.held)) == []
        self.check()
        for layer, (q, out) in enumerate(outs):
            k, v = self.dense(layer)
            for i in range(count):
                seen = [length + i + 1 for length in before]
                exact, in_f16 = (
                    attend(q[:, i], k, v, seen, DIM**-0.5, dtype)[0]
                    for dtype in (torch.double, F16)
                )
                assert errors(out[:, i], exact, in_f16).share <= 1

    def accept(self, counts: list[int], count: int) -> None:
        """Of so many drafts, keep these numbers."""
        self.caches[0].accept(counts)
        kept = [n - count + c for n, c in zip(self.lengths, counts, strict=True)]
        self._keep(kept)

    def truncate(self, most: list[int]) -> None:
        self.caches[0].truncate(most)
        self._keep(most)

    def truncate_on_device(self, most: list[int]) -> None:
        self.caches[-1].truncate(on_device(self.first, *most))
        self._keep(most)

    def reorder(self, order: list[int]) -> None:
        for cache in self.caches:
            cache.reorder(order)
        self._take(order)

    def reorder_on_device(self, order: list[int]) -> None:
        for cache in self.caches:
            cache.reorder(on_device(cache, *order, dtype=torch.int64))
        self._take(order)

    def _keep(self, most: list[int]) -> None:
        self.held = [h[: max(0, n)] for h, n in zip(self.held, most, strict=True)]
        self.check()

    def _take(self, order: list[int]) -> None:
        rows = range(len(self.held))
        self.held = [list(self.held[i]) if i in rows else [] for i in order]
        self.check()

    def dense(self, layer: int) -> tuple[Tensor, Tensor]:
        """The tokens of a layer in new tensors of the cache's size, NaN where there is none."""
        k, v = (torch.full_like(t, float("nan")) for t in (self.first.k, self.first.v))
        for b, sequence in enumerate(self.held):
            for j, row in enumerate(sequence):
                k[b, j], v[b, j] = row[layer]
        return k, v

    def check(self) -> None:
        """The caches hold these tokens, and what the host claims to know is true."""
        for layer, cache in enumerate(self.caches):
            assert cache.seqlens.tolist() == self.lengths
            assert cache.lengths in (None, self.lengths)
            assert max(self.lengths) <= cache.bound <= cache.max_seq_len
            for tensor, expected in zip((cache.k, cache.v), self.dense(layer), strict=True):
                for b, length in enumerate(self.lengths):
                    assert same(bits(tensor[b, :length]), bits(expected[b, :length]))
