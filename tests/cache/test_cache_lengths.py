"""What the host knows of a cache's lengths."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cache_model import (
    DIM,
    F16,
    HEADS,
    bits,
    filled,
    new_cache,
    on_device,
    queries,
    same,
    token,
    tokens,
)
from compiling import GROUP

from gqa_cutlass import (
    CacheOverflowError,
    InputError,
    KVCache,
)


def test_the_host_knows_what_it_does_itself() -> None:
    cache = new_cache()
    for operation, expected in (
        (lambda: cache.prefill(*tokens(cache, 4), [4, 1, 2]), [4, 1, 2]),
        (lambda: cache.append(*token(cache)), [5, 2, 3]),
        (lambda: cache.prefill(*tokens(cache, 2)), [7, 4, 5]),
        (lambda: cache.decode(queries(cache), *token(cache)), [8, 5, 6]),
        (lambda: cache.truncate(7), [7, 5, 6]),
        (lambda: cache.truncate([9, 2, 3]), [7, 2, 3]),
        (lambda: cache.reorder([1, -1, 0]), [2, 0, 7]),
        (lambda: cache.reset([2]), [2, 0, 0]),
        (lambda: cache.reset(), [0, 0, 0]),
    ):
        operation()
        assert cache.lengths == cache.seqlens.tolist() == expected
        assert cache.bound == max(expected)


def test_after_values_from_the_device_the_host_knows_a_bound() -> None:
    cache = new_cache()
    for operation, bound in (
        (lambda: cache.prefill(*tokens(cache, 3), on_device(cache, 3, 0, 1)), 3),
        (lambda: cache.truncate(on_device(cache, 2, 2, 2)), 3),
        (lambda: cache.reorder(on_device(cache, 2, 1, 0)), 3),
        (lambda: cache.reorder([0, 2, 1]), 3),
        (lambda: cache.append(*token(cache)), 4),
        (lambda: cache.truncate([2, 3, 1]), 3),
        (lambda: cache.reset([1]), 3),
        (lambda: cache.prefill(*tokens(cache, 4)), 7),
        (lambda: cache.truncate(6), 6),
        (lambda: cache.prefill(*tokens(cache, 8), [8, 1, 1]), 12),
        (lambda: cache.forget(), 12),
    ):
        operation()
        assert cache.lengths is None and cache.bound == bound
        assert max(cache.seqlens.tolist()) <= bound
    exact = cache.refresh()
    assert cache.lengths == exact == cache.seqlens.tolist() and cache.bound == max(exact)


@pytest.mark.parametrize(
    "empty",
    [
        lambda c: c.reset(),
        lambda c: c.reset([2, 0, 1, 1]),
        lambda c: c.truncate(0),
        lambda c: c.truncate([0, 0, 0]),
    ],
    ids=["reset", "reset all", "truncate", "truncate all"],
)
def test_an_empty_cache_is_known_to_be_empty(empty: Callable[[KVCache], None]) -> None:
    cache = new_cache()
    filled(cache, [1, 2, 3])
    cache.forget()
    empty(cache)
    assert cache.lengths == cache.seqlens.tolist() == [0, 0, 0] and cache.bound == 0


def test_what_lengths_returns_is_the_callers() -> None:
    cache = new_cache()
    filled(cache, [1, 2, 3])
    for get in (lambda: cache.lengths, cache.refresh):
        mine = get()
        assert mine is not None
        mine[0] = 99
        assert cache.lengths == [1, 2, 3]


def test_lengths_written_by_the_user_need_a_refresh() -> None:
    cache = new_cache()
    filled(cache, [5, 5, 5])
    cache.seqlens[1] = 2
    assert cache.lengths == [5, 5, 5]  # it cannot know
    assert cache.refresh() == cache.lengths == [5, 2, 5]
    k, v = token(cache)
    cache.append(k, v)
    assert same(bits(cache.k[1, 2]), bits(k[1]))


@pytest.mark.parametrize("bad", [13, 2**31 - 1])
def test_refresh_refuses_lengths_that_nothing_can_have(bad: int) -> None:
    cache = new_cache()
    cache.seqlens[1] = bad
    expected = rf"KVCache.refresh: seqlens\[1\]: got {bad}; allowed: up to 12"
    with pytest.raises(InputError, match=expected):
        cache.refresh()
    assert cache.lengths is None and cache.bound == 12
    cache.append(*token(cache))  # what has such a length is left alone
    assert cache.seqlens.tolist() == [1, bad, 1]
    with pytest.raises(CacheOverflowError, match=r"\[1\]"):
        cache.check()


def test_layers_share_lengths_that_the_last_one_moves(device: str) -> None:
    first, last = KVCache.for_layers(2, 2, 8, HEADS, DIM, F16, device)
    k, v = tokens(first, 3)
    one = k[:, 0], v[:, 0]
    for operation, moved in (
        (lambda c: c.prefill(k, v, [3, 1]), [3, 1]),
        (lambda c: c.append(*one), [4, 2]),
        (lambda c: c.decode(queries(c), *one), [5, 3]),
        (lambda c: c.reorder([1, 0]), [3, 5]),
        (lambda c: c.prefill(k, v, on_device(c, 2, 3)), [5, 8]),
        (lambda c: c.reorder(on_device(c, 0, 0)), [5, 5]),
    ):
        before = first.seqlens.tolist(), first.lengths, first.bound
        operation(first)
        assert (first.seqlens.tolist(), first.lengths, first.bound) == before
        operation(last)
        assert first.seqlens.tolist() == last.seqlens.tolist() == moved
        assert first.lengths == last.lengths and first.bound == last.bound
    first.truncate(2)
    assert last.seqlens.tolist() == [2, 2] and last.bound == 2


@pytest.mark.xdist_group(GROUP)
def test_what_compiled_code_calls_does_what_it_does_elsewhere() -> None:
    cache, other = new_cache(2), new_cache(2)
    k, v = tokens(cache, 4)
    for operation in (
        lambda cache: cache.prefill(k, v, [4, 2]),
        lambda cache: cache.append(k[:, 0], v[:, 1]),
        lambda cache: cache.prefill(k, v, on_device(cache, 3, 1)),
        lambda cache: cache.refresh(),
        lambda cache: cache.reorder([1, 0]),
        lambda cache: cache.truncate(3),
        lambda cache: cache.check(),
        lambda cache: cache.reset([0]),
    ):
        torch._dynamo.reset()
        torch.compile(operation, backend="eager")(cache)
        operation(other)
        assert cache.lengths == other.lengths and torch.equal(cache.seqlens, other.seqlens)
        lengths = other.seqlens.tolist()
        held = (
            [t[b, :n] for b, n in enumerate(lengths) for t in (c.k, c.v)] for c in (cache, other)
        )
        assert same(*(bits(*each) for each in held))
    torch._dynamo.reset()
