"""Paged caches to test with, and a model of them: a dictionary of the tokens that they should hold.

A token is a number, which its keys and values spell out: so a cache's contents can be read off.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from gqa_cutlass import PagedKVCache
from gqa_cutlass.cache.scales import raw
from gqa_cutlass.proof.reference import scale_of_row, stored

HEADS, DIM, GROUP = 1, 64, 4  # those of other tests, and so their kernel
F16, E4M3 = torch.float16, torch.float8_e4m3fn
_BASE = 2000  # float16 has all ints up to 2048
_BASE_OF_8 = 16  # and 8 bits those up to 16, of a row whose scale is a power of two


def new_cache(
    num_pages: int = 12, page_size: int = 4, layers: int = 1, device: str = "cpu",
    window: int | None = None, by_token: bool = False,
) -> PagedKVCache:  # fmt: skip
    """By token: of 8 bits, with scales of tokens."""
    scales: dict[str, Any] = {"k_scale": "token", "v_scale": "token"} if by_token else {}
    return PagedKVCache(
        num_pages, page_size, HEADS, DIM, E4M3 if by_token else F16, device, num_layers=layers,
        window=window, **scales,
    )  # fmt: skip


class Told:
    """A cache, beside the tokens that each of its sequences has been told to hold."""

    def __init__(self, cache: PagedKVCache) -> None:
        self.cache = cache
        self.held: dict[int, list[int]] = {}
        self.gone = Counter[int]()  # pages that each had before its window
        self.drafts = Counter[int]()  # its last tokens, which may be taken back
        self._next = 0

    def new(self, count: int) -> list[int]:
        """Tokens that there were not yet."""
        self._next += count
        return list(range(self._next - count, self._next))

    def rows(self, tokens: Sequence[int], layer: int) -> tuple[Tensor, Tensor]:
        """Their keys and values in a layer, [tokens, heads, dim]."""
        number = torch.tensor(tokens, dtype=torch.int64, device=self.cache.device)[:, None]
        k = torch.zeros(len(tokens), HEADS, DIM, dtype=F16, device=self.cache.device)
        base = _BASE_OF_8 if self.by_token else _BASE
        for i in range(4):
            k[:, :, i] = number // base**i % base
        k[:, :, 4] = layer
        v = k.clone()
        v[:, :, 5] = 1
        if self.by_token:  # of unlike scales, in which the digits are what they are
            k[:, :, 6], v[:, :, 6] = torch.finfo(E4M3).max, -torch.finfo(E4M3).max
            k, v = ((t * 2.0 ** (number % n)[..., None]).half() for t, n in ((k, 7), (v, 5)))
        return k, v

    @property
    def by_token(self) -> bool:
        """Whether tokens are of 8 bits, each with its scale."""
        return self.cache.k[0].dtype == E4M3

    def gathered(self, layer: int, sequence: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a sequence, multiplied by their scales."""
        k, v = self.cache.gather(layer, sequence)
        if self.by_token:
            scales = self.cache.gather_scales(layer, sequence)
            k, v = ((t.float() * s[..., None]).to(F16) for t, s in zip((k, v), scales, strict=True))
        return k, v

    def all_rows(self, tokens: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Those of all layers, [layers, tokens, heads, dim]."""
        k, v = zip(*(self.rows(tokens, layer) for layer in self.layers), strict=True)
        return torch.stack(k), torch.stack(v)

    @property
    def layers(self) -> range:
        return range(self.cache.num_layers)

    def allocate(self, count: int = 0) -> int:
        """A sequence of so many new tokens."""
        sequence = self.cache.allocate()
        self.held[sequence] = []
        if count:
            tokens = self.new(count)
            self.cache.prefill(sequence, *self.all_rows(tokens))
            self.held[sequence] += tokens
        return sequence

    def fork(self, sequence: int, tokens: int | None = None) -> int:
        child = self.cache.fork(sequence, tokens)
        self.held[child] = self.held[sequence][:tokens]
        self.gone[child] = self.gone[sequence]
        return child

    def append(self, *sequences: int) -> None:
        """A new token for each."""
        tokens = self.new(len(sequences))
        self.cache.append(sequences, *self.all_rows(tokens))
        self.add(sequences, tokens)

    def add(self, sequences: Sequence[int], tokens: Sequence[int]) -> None:
        for sequence, token in zip(sequences, tokens, strict=True):
            self.held[sequence].append(token)
            self.drafts[sequence] = 0

    def draft(self, sequences: Sequence[int], tokens: Sequence[int]) -> None:
        """Let each have as many of these tokens, of which some may be taken back."""
        count = len(tokens) // max(1, len(sequences))
        for b, sequence in enumerate(sequences):
            self.held[sequence] += tokens[b * count : (b + 1) * count]
            self.drafts[sequence] = count

    def keep(self, sequences: Sequence[int], counts: Sequence[int]) -> None:
        """Of the drafts, so many."""
        for sequence, count in zip(sequences, counts, strict=True):
            length = len(self.held[sequence])
            del self.held[sequence][length - self.drafts[sequence] + count :]
            self.drafts[sequence] = 0

    def wanted(self, sequences: Sequence[int], tokens: Sequence[int], prompt: bool = False) -> int:
        """Free pages that so many more tokens take, found out by looking at all pages.

        A prompt takes none for what is then before the window.
        """
        size, window = self.cache.page_size, self.cache.window
        behind, writers = 0, Counter[int]()
        for sequence, count in zip(sequences, tokens, strict=True):
            pages, length = self.cache.pages(sequence), len(self.held[sequence])
            kept = max(0, length + count - window) // size if prompt and window else 0
            behind += len([i for i in range(len(pages), -(-(length + count) // size)) if i >= kept])
            if count and length % size and length >= kept * size:
                writers[pages[length // size]] += 1
        holders = self.holders()
        copies = sum(n if holders[page] > n else n - 1 for page, n in writers.items())
        return behind + copies

    def holders(self) -> Counter[int]:
        """How many sequences have each page."""
        return Counter(p for sequence in self.held for p in self.cache.pages(sequence) if p >= 0)

    def first(self, sequence: int) -> int:
        """The first token that it has: pages have gone with the window, and do not come back."""
        size, window = self.cache.page_size, self.cache.window
        length = len(self.held[sequence]) - self.drafts[sequence]  # of these the window may go back
        before = max(0, length - window) // size if window else 0
        self.gone[sequence] = max(self.gone[sequence], before) if length else 0
        return self.gone[sequence] * size

    def reach(self, sequences: Sequence[int]) -> int:
        """Newest tokens that they all have and may attend to."""
        window = self.cache.window
        assert window is not None
        return min(
            [window, *(len(self.held[s]) - self.first(s) for s in sequences if self.first(s))]
        )

    def check(self, *sequences: int) -> None:
        """The cache holds these tokens, of some sequences or of all, and no page is lost."""
        cache = self.cache
        assert cache.sequences == sorted(self.held)
        for sequence in sequences or self.held:
            tokens = self.held[sequence]
            assert cache.length(sequence) == len(tokens)
            pages, first = cache.pages(sequence), self.first(sequence)
            assert len(pages) >= -(-len(tokens) // cache.page_size)
            assert cache.freed(sequence) == first
            assert [page < 0 for page in pages].count(True) == first // cache.page_size
            assert all(page < 0 for page in pages[: first // cache.page_size])
            for layer in self.layers:
                for found, expected in zip(
                    self.gathered(layer, sequence), self.rows(tokens[first:], layer), strict=True
                ):
                    assert torch.equal(found, expected), (sequence, layer)
        self.check_pages()

    def check_pages(self) -> None:
        """Pages are held by as many as have them, and all others are free.

        Those ahead of a sequence's tokens are its own.
        """
        pages, holders = self.cache._storage.pages, self.holders()
        for sequence, tokens in self.held.items():
            ahead = self.cache.pages(sequence)[-(-len(tokens) // self.cache.page_size) :]
            assert [holders[page] for page in ahead] == [1] * len(ahead)
        assert [pages.holders(page) for page in range(pages.num_pages)] == [
            holders[page] for page in range(pages.num_pages)
        ]
        assert self.cache.free_pages == pages.num_pages - len(holders)
        free = [*pages._free, *range(len(pages._holders), pages.num_pages)]  # some were never taken
        assert sorted(free) == [p for p in range(pages.num_pages) if not holders[p]]


class State:
    """What can be seen of a cache: pages, lengths, and every bit of the pools."""

    def __init__(self, cache: PagedKVCache, bits: bool = True) -> None:
        self.seen = {s: (cache.length(s), cache.pages(s)) for s in cache.sequences}
        self.free = cache.free_pages
        of_tokens = [s for s in (*cache.k_scale, *cache.v_scale) if isinstance(s, Tensor)]
        self.bits = [raw(t).clone() for t in (*cache.k, *cache.v, *of_tokens)] if bits else []

    def __eq__(self, other: object) -> bool:
        assert isinstance(other, State)
        seen = (self.seen, self.free) == (other.seen, other.free)
        return seen and same_bits(self.bits, other.bits)


def same_bits(some: list[Tensor], others: list[Tensor]) -> bool:
    pairs = zip(some, others, strict=True)
    return all(torch.equal(*(t.view(torch.uint8) for t in pair)) for pair in pairs)


@contextmanager
def nothing_changed(cache: PagedKVCache) -> Iterator[None]:
    """Neither a page nor a length nor a bit of the pools changes meanwhile."""
    before = State(cache)
    yield
    assert State(cache) == before


def appending(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor | None, v: Tensor | None, *,
    cache_seqlens: Tensor, block_table: Tensor, k_scale: Tensor | None = None,
    v_scale: Tensor | None = None, **options: Any,
) -> Tensor:  # fmt: skip
    """In place of `gqa_decode`: appends as it does, and attends to nothing."""
    num_pages, page_size = k_cache.shape[:2]
    caches = k_cache, v_cache
    assert cache_seqlens.dtype == block_table.dtype == torch.int32
    assert cache_seqlens.shape == block_table.shape[:1] == q.shape[:1]
    if k is not None and v is not None:
        several = k.unsqueeze(1) if k.dim() == 3 else k, v.unsqueeze(1) if v.dim() == 3 else v
        for b, length in enumerate(cache_seqlens.tolist()):
            for i in range(several[0].shape[1] if length >= 0 else 0):
                page, row = int(block_table[b, (length + i) // page_size]), (length + i) % page_size
                assert 0 <= page < num_pages
                for cache, scales, new in zip(caches, (k_scale, v_scale), several, strict=True):
                    token = new[b, i]
                    if scales is not None:
                        scales[page, row] = scale_of_row(token, cache.dtype)
                        token = stored(token, scales[page, row, :, None], cache.dtype)
                    raw(cache)[page, row] = raw(token)
    return torch.zeros_like(q)
