"""Cases of paged caches whose tokens ranks share, against whole ones; `ranks.py` runs them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from ranks import Group, case, case_for
from torch import Tensor

from gqa_cutlass import InputError, OutOfPagesError, PagedKVCache
from gqa_cutlass.cache.paged import storage
from gqa_cutlass.cache.scales import raw
from gqa_cutlass.distributed import ShardedPagedKVCache

LAYERS, PAGES, DIM = 2, 8, 64


def _numbered_from_0(kind: Callable[..., Any], *sizes: int, **options: Any) -> Any:
    """A cache whose sequences are 0, 1, 2, ..., as in a process that has no other."""
    storage._CACHES = itertools.count()
    return kind(*sizes, **options)


class Both:
    """A cache as this rank's shard and whole, through the same operations.

    Args:
        group: The ranks.
        interleave: Tokens that follow one another on a rank; a page has two stripes.
        kind: Of both caches.
    """

    def __init__(self, group: Group, interleave: int, **kind: Any) -> None:
        self.group, self.interleave = group, interleave
        sizes = PAGES, 2 * group.size * interleave, 1, DIM
        kind = {"device": "cpu", "num_layers": LAYERS, **kind}
        self.whole = _numbered_from_0(PagedKVCache, *sizes, **kind)
        spread = {"group": group.group, "interleave": interleave}
        self.shard = _numbered_from_0(ShardedPagedKVCache, *sizes, **kind, **spread)
        assert self.shard.k[0].shape[1] == 2 * interleave
        self.generator = torch.Generator().manual_seed(3)

    def random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, DIM, generator=self.generator).half()

    def run(self, method: str, *given: Any, **options: Any) -> Any:
        """Call a method of both."""
        one, other = (getattr(cache, method)(*given, **options) for cache in self.caches)
        assert one == other
        self.compare()
        return one

    @property
    def caches(self) -> tuple[ShardedPagedKVCache, PagedKVCache]:
        return self.shard, self.whole

    def step(self, sequences: Sequence[int], tokens: int = 1, **options: Any) -> None:
        """Decode with all layers of both."""
        several = (tokens,) * (tokens > 1)
        given = [
            [self.random(len(sequences), *several, heads) for heads in (4, 1, 1)]
            for _ in range(LAYERS)
        ]
        results = []
        for cache in self.caches:
            with cache.step(sequences, tokens) as step:
                results.append([step.decode(i, *of, **options) for i, of in enumerate(given)])
        for one, other in zip(*results, strict=True):
            assert torch.allclose(one, other, atol=2e-3, rtol=2e-3)
        self.compare()

    def compare(self) -> None:
        one, other = self.caches
        assert (one.sequences, one.free_pages) == (other.sequences, other.free_pages)
        for sequence in other.sequences:
            assert one.pages(sequence) == other.pages(sequence)
            first, length = other.freed(sequence), other.length(sequence)
            assert (one.freed(sequence), one.length(sequence)) == (first, length)
            turns = [t // self.interleave % self.group.size for t in range(first, length)]
            held = [t for t, rank in enumerate(turns) if rank == self.group.rank]
            for layer in range(LAYERS):
                found = [
                    [*cache.gather(layer, sequence), *self.scales(cache, layer, sequence)]
                    for cache in self.caches
                ]
                for mine, all_of_it in zip(*found, strict=True):
                    assert torch.equal(raw(mine), raw(all_of_it)[held])

    @staticmethod
    def scales(cache: PagedKVCache, layer: int, sequence: int) -> Sequence[Tensor]:
        """Those of a sequence's tokens, if they have any."""
        scale = cache.k_scale[layer]
        if not isinstance(scale, Tensor) or scale.dim() < 3:
            return ()
        return cache.gather_scales(layer, sequence)


@case_for(3)
def pages_with_tokens_of_all_ranks(group: Group) -> None:
    """Sequences that share pages and part, drafts, and what has no room, on all ranks alike."""
    both = Both(group, 1)
    page = 2 * group.size
    first, second = both.run("allocate"), both.run("allocate")
    both.run("prefill", first, *both.random(2, LAYERS, page + 1, 1))
    both.run("prefill", second, *both.random(2, LAYERS, 2, 1))
    both.step([first, second])
    third = both.run("fork", first)
    both.step([third, first])  # both write behind what they share
    both.step([first, second, third], 3)
    both.run("accept", [first, third], [1, 2])
    both.run("truncate", third, page - 1)
    both.run("reorder", [second, third], [1, 1])
    both.step([third, second])
    both.run("append", [first], *both.random(2, LAYERS, 1, 1))
    for cache in both.caches:
        with pytest.raises(OutOfPagesError):
            cache.prefill(first, *both.random(2, LAYERS, PAGES * page, 1))
    both.run("free", [first, third])
    batches = [cache.batch(2, 4 * page) for cache in both.caches]
    given = [[both.random(2, heads) for heads in (4, 1, 1)] for _ in range(2 * LAYERS)]
    results: list[list[Tensor]] = [[], []]
    for batch, found in zip(batches, results, strict=True):
        batch.assign([second], steps=2)
        for first in (0, LAYERS):
            with batch.step() as step:
                found += [step.decode(i, *given[first + i]) for i in range(LAYERS)]
        batch.check()
        batch.assign([])
    for one, other in zip(*results, strict=True):
        assert torch.allclose(one, other, atol=2e-3, rtol=2e-3) and not one[1].any()
    both.compare()


@case_for(2)
def pages_before_a_window(group: Group) -> None:
    """They are free on all ranks; tokens that follow one another fill a rank's part of a stripe."""
    page = 4 * group.size
    both = Both(group, 2, window=page + 3)
    sequence = both.run("allocate")
    both.run("prefill", sequence, *both.random(2, LAYERS, 3 * page + 1, 1))
    assert both.whole.freed(sequence)
    for _ in range(3):
        both.step([sequence], window_size=(page + 2, 0))


@case
def pages_of_8_bits(group: Group) -> None:
    scales = {"k_scale": [0.25, torch.tensor([0.5])], "v_scale": 2.0}
    both = Both(group, 1, dtype=torch.float8_e4m3fn, **scales)
    sequences = [both.run("allocate") for _ in range(2)]
    both.run("prefill", sequences[0], *both.random(2, LAYERS, 3, 1))
    both.run("append", sequences, *both.random(2, LAYERS, 2, 1))


@case_for(2, 3)
def pages_of_8_bits_with_scales_of_tokens(group: Group) -> None:
    """Which are shared and copied with the pages of their tokens."""
    by_token: dict[str, Any] = {"k_scale": "token", "v_scale": "token"}
    both = Both(group, 1, dtype=torch.float8_e4m3fn, **by_token)
    first, second = (both.run("allocate") for _ in range(2))
    both.run("prefill", first, *both.random(2, LAYERS, 3, 1))
    third = both.run("fork", first)
    both.run("append", [second, third], *both.random(2, LAYERS, 2, 1))
    both.step([first, third])
    both.step([first, second, third], 3)
    both.run("accept", [first, third], [1, 2])
    both.run("truncate", third, 3)
    both.step([third, first], 2)
    sizes: tuple[Any, ...] = PAGES, 2 * group.size, 1, DIM, torch.float8_e4m3fn
    told = ShardedPagedKVCache.bytes_needed(*sizes, num_layers=LAYERS, size=group.size, **by_token)
    assert told == LAYERS * 2 * PAGES * 2 * (DIM + 4)
    with pytest.raises(InputError, match="ShardedPagedKVCache: k_scale: got 1.0; allowed: 'token'"):
        ShardedPagedKVCache(*sizes, "cpu", group=group.group, k_scale=1.0, v_scale="token")


@case
def pools_that_are_refused_or_told_before(group: Group) -> None:
    sizes: tuple[Any, ...] = 8, 16 * group.size, 2, DIM
    whole = PagedKVCache.bytes_needed(*sizes, num_layers=2)
    told = ShardedPagedKVCache.bytes_needed(*sizes, num_layers=2, size=group.size, interleave=8)
    assert told == whole // group.size
    allowed = f"page_size: got {group.size + 1}; allowed: a multiple of {group.size}: pages of"
    with pytest.raises(InputError, match=allowed):
        ShardedPagedKVCache(8, group.size + 1, 2, DIM, device="cpu", group=group.group)
    cache = ShardedPagedKVCache(*sizes, device="cpu", group=group.group)
    assert repr(cache).startswith("ShardedPagedKVCache(num_pages=8, page_size=")
    sequence = cache.allocate()
    q, k = torch.zeros(1, 2, DIM).half(), torch.zeros(1, 2, DIM).half()
    with pytest.raises(InputError, match="rotary_cos: got one; allowed: none: it is not done over"):
        cache.decode([sequence], q, k, k, rotary_cos=torch.zeros(9, 8), rotary_sin=None)
    assert cache.length(sequence) == 0 and cache.free_pages == 8
