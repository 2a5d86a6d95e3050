"""What type checkers make of a user's program: `make types` checks it, and nothing runs it."""

from __future__ import annotations

from typing import assert_type

from torch import Tensor

from gqa_cutlass import KVCache, PagedKVCache, Plan, gqa_decode, plan

Pair = tuple[Tensor, Tensor]


def calls(q: Tensor, cache: Tensor, token: Tensor, lengths: Tensor, either: bool) -> None:
    """One tensor unless the log-sum-exp is asked for."""
    gqa_decode(q, cache, cache, cache_seqlens=3).flatten(1)
    assert_type(gqa_decode(q, cache, cache, token, token, cache_seqlens=lengths, out=q), Tensor)
    assert_type(
        gqa_decode(q, cache, cache, cache_seqlens=3, return_lse=True, softmax_scale=0.1), Pair
    )
    assert_type(
        gqa_decode(q, cache, cache, cache_seqlens=3, return_lse=either, ragged=False),
        Tensor | Pair,
    )


def caches(cache: KVCache, q: Tensor, k: Tensor, v: Tensor, either: bool) -> None:
    """As the calls."""
    cache.decode(q, k, v).flatten(1)
    assert_type(cache.decode(q, k, v, num_splits=2, softcap=50), Tensor)
    assert_type(cache.decode(q, return_lse=True), Pair)
    assert_type(cache.decode(q, return_lse=either), Tensor | Pair)


def pages(cache: PagedKVCache, q: Tensor, k: Tensor, v: Tensor, either: bool) -> None:
    """As the calls, in steps and in batches of captured steps too."""
    sequence = cache.fork(cache.allocate())
    cache.decode([sequence], q, k, v).flatten(1)
    assert_type(cache.decode((sequence,), q, return_lse=True, sinks=q), Pair)
    with cache.step([sequence]) as step:
        assert_type(step.decode(0, q, k, v, softcap=50), Tensor)
        assert_type(step.decode(0, q, return_lse=either), Tensor | Pair)
    batch = cache.batch(8, 4096)
    with batch.step() as step_of_batch:
        assert_type(step_of_batch.decode(0, q, k, v, return_lse=True), Pair)
    assert_type(batch.run(lambda: 3), int)


def plans(q: Tensor, cache: Tensor, token: Tensor, either: bool) -> None:
    """A plan knows what it returns."""
    plain = plan(q, cache, cache, token, token, cache_seqlens=3, dependent=True, sinks=q)
    assert_type(plain, Plan[Tensor])
    plain(q, cache, cache, token, token, 3).flatten(1)
    both = plan(q, cache, cache, cache_seqlens=3, return_lse=True)
    assert_type(both(q, cache, cache, None, None, 3), Pair)
    any_of_them: Plan = plan(q, cache, cache, cache_seqlens=3, return_lse=either)
    assert_type(any_of_them(q, cache, cache, None, None, 3), Tensor | Pair)
