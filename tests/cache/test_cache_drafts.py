"""KVCache.decode of several tokens, and `accept`, which keeps some of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cache_model import (
    DIM,
    F16,
    HEADS,
    Told,
    appending,
    bits,
    captured,
    filled,
    new_cache,
    nothing_written,
    on_device,
    queries,
    same,
    token,
    tokens,
)
from compiling import GROUP
from torch import Tensor

from gqa_cutlass import CacheOverflowError, InputError, KVCache, gqa_decode
from gqa_cutlass.cache import kv_cache as cache_module
from gqa_cutlass.cache import some


@pytest.fixture
def instant(monkeypatch: pytest.MonkeyPatch) -> None:
    """Appends, and attends to nothing."""
    for module in (cache_module, some):
        monkeypatch.setattr(module, "gqa_decode", appending)


def drafted(cache: KVCache, count: int, **options: Any) -> tuple[Tensor, Tensor]:
    """Decode so many tokens of each sequence; returns them."""
    k, v = tokens(cache, count)
    cache.decode(queries(cache, count), k, v, **options)
    return k, v


# What is decoded


def test_several_tokens_see_those_before_them_in_every_layer(device: str) -> None:
    """Drafts are decoded and accepted in part, beside single tokens."""
    told = Told(KVCache.for_layers(2, 3, 12, HEADS, DIM, F16, device))
    told.prefill([3, 0, 5])
    told.draft(4)
    told.accept([2, 4, 0], 4)
    assert told.first.lengths == [5, 4, 5]
    told.decode()
    told.draft(4)
    told.accept([4, 1, 3], 4)
    assert told.first.lengths == [10, 6, 9] and told.first.bound == 10


def test_a_sequence_without_room_for_all_gets_none(device: str) -> None:
    """The device finds it, where the host does not know; the others are served."""
    cache = new_cache(3, 8, device)
    filled(cache, [5, 4, 8])
    cache.forget()
    before, q, (k, v) = bits(cache.k, cache.v), queries(cache, 4), tokens(cache, 4)
    out = cache.decode(q, k, v)
    with pytest.raises(CacheOverflowError):
        cache.check()
    assert cache.seqlens.tolist() == [5, 8, 8]
    assert out[[0, 2]].isnan().all() and not out[1].isnan().any()
    for old, now, new in zip(before, (cache.k, cache.v), (k, v), strict=True):
        old.view(F16)[1, 4:] = new[1]
        assert same([old], bits(now))
    cache.accept(1)
    assert cache.refresh() == [5, 5, 8]


def test_what_is_known_not_to_fit_is_refused(device: str) -> None:
    cache = new_cache(3, 8, device)
    filled(cache, [5, 4, 8])
    match = "KVCache.decode: .*sequence 0 holds 5 tokens and 4 are to be .* sequence 2 holds 8"
    with nothing_written(cache), pytest.raises(CacheOverflowError, match=match):
        drafted(cache, 4)
    with nothing_written(cache), pytest.raises(CacheOverflowError, match="sequence 2 holds 8"):
        cache.decode(queries(cache, 4)[:2], *(t[:2] for t in tokens(cache, 4)), rows=[1, 2])


def test_some_sequences_get_several_tokens(device: str) -> None:
    for known in (True, False):
        cache = new_cache(4, 12, device)
        filled(cache, [3, 0, 7, 11])
        rows: Any = [2, 0, 3][: 2 + (not known)]
        given = rows if known else on_device(cache, *rows)
        q, (k, v) = queries(cache, 3)[: len(rows)], (t[: len(rows)] for t in tokens(cache, 3))
        out = cache.decode(q, k, v, rows=given)
        assert cache.lengths == ([6, 0, 10, 11] if known else None)
        assert cache.seqlens.tolist() == [6, 0, 10, 11]
        if not known:
            with pytest.raises(CacheOverflowError):
                cache.check()
        held = on_device(cache, 10, 6)
        index = on_device(cache, 2, 0)
        again = gqa_decode(q[:2], cache.k, cache.v, cache_seqlens=held, cache_batch_idx=index)
        assert torch.allclose(out[:2], again, atol=2e-3)
        cache.accept([1, 0, 2, 3])  # of the others there is nothing to take back
        assert cache.lengths == ([4, 0, 9, 11] if known else None)
        assert cache.seqlens.tolist() == [4, 0, 9, 11]


@pytest.mark.xdist_group(GROUP)
def test_compiled_code_decodes_and_accepts() -> None:
    cache, other = new_cache(3, 12), new_cache(3, 12)
    torch._dynamo.reset()

    def step(cache: KVCache, q: Tensor, k: Tensor, v: Tensor, kept: Tensor) -> Tensor:
        out = cache.decode(q, k, v)
        cache.accept(kept)
        return out

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    for counts in ([4, 0, 1], [2, 3, 4]):
        given = queries(cache, 4), *tokens(cache, 4), on_device(cache, *counts)
        assert torch.equal(compiled(cache, *given), step(other, *given))
        assert cache.seqlens.tolist() == other.seqlens.tolist()
    assert cache.refresh() == [6, 3, 5]
    torch._dynamo.reset()
    with nothing_written(cache), pytest.raises(InputError, match="accept: lengths: got -1"):
        torch.compile(cache.accept, backend="eager")(-1)
    torch._dynamo.reset()


# What is kept


KEPT: dict[str, tuple[Callable[[KVCache], Any], list[int], bool]] = {
    "an int": (lambda cache: 2, [2, 2, 2], True),
    "ints": (lambda cache: [4, 0, 1], [4, 0, 1], True),
    "device": (lambda cache: on_device(cache, 4, 0, 1), [4, 0, 1], False),
    "device, too many": (lambda cache: on_device(cache, 2**31 - 1, 5, -1), [4, 4, 0], False),
    "device, none": (lambda cache: on_device(cache, -(2**31), -1, 0), [0, 0, 0], False),
}


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("kind", KEPT)
def test_every_sequence_keeps_what_is_accepted(kind: str, known: bool, instant: None) -> None:
    given, kept, told = KEPT[kind]
    first, last = KVCache.for_layers(2, 3, 12, HEADS, DIM, F16, "cpu")
    for cache in (first, last):
        filled(cache, [5, 0, 7])
    if not known:
        first.forget()
    for cache in (first, last):
        k, v = drafted(cache, 4)
    first.accept(given(first))
    lengths = [5 + kept[0], kept[1], 7 + kept[2]]
    assert last.seqlens.tolist() == lengths
    assert last.lengths == (lengths if known and told else None)
    assert max(lengths) <= last.bound <= (12 if not known else 11)
    for b, (start, stop) in enumerate(zip([5, 0, 7], lengths, strict=True)):
        assert torch.equal(last.k[b, start:stop], k[b, : stop - start])


def test_inactive_sequences_stay_so(instant: None) -> None:
    cache = new_cache()
    filled(cache, [5, 0, 7])
    cache.seqlens[1] = -1
    cache.forget()
    drafted(cache, 3)
    cache.accept(1)
    assert cache.seqlens.tolist() == [6, -1, 8]


BAD: dict[str, tuple[Callable[[KVCache], Any], str]] = {
    "more than there are": (lambda cache: 5, "lengths: got 5; allowed: an int from 0 to 4"),
    "negative": (lambda cache: [0, -1, 0], r"lengths\[1\]: got -1; allowed: an int from 0 to 4"),
    "true": (lambda cache: True, "lengths: got True"),
    "too few": (lambda cache: [1, 1], "lengths: got 2 values; allowed: 3"),
    "a float": (lambda cache: 1.0, "lengths: got a float"),
    "int64": (lambda cache: on_device(cache, 1, 1, 1, dtype=torch.int64), "lengths: got torch.int"),
    "of rows": (lambda cache: on_device(cache, 1, 1), r"lengths: got torch.int32 \[2\]"),
}


@pytest.mark.parametrize("kind", BAD)
def test_numbers_that_are_not_allowed_change_nothing(kind: str, instant: None) -> None:
    given, message = BAD[kind]
    cache = new_cache()
    drafted(cache, 4)
    with nothing_written(cache), pytest.raises(InputError, match=f"KVCache.accept: {message}"):
        cache.accept(given(cache))
    cache.accept(4)  # the drafts are still there to be accepted
    assert cache.lengths == [4, 4, 4]


BETWEEN: dict[str, Callable[[KVCache], object]] = {
    "nothing": lambda cache: cache.accept(2),
    "a token": lambda cache: cache.decode(queries(cache, 1), *tokens(cache, 1)),
    "append": lambda cache: cache.append(*token(cache)),
    "prefill": lambda cache: cache.prefill(*tokens(cache, 2)),
    "truncate": lambda cache: cache.truncate(3),
    "reorder": lambda cache: cache.reorder([1, 0, 2]),
    "reset": lambda cache: cache.reset([1]),
    "forget": lambda cache: cache.forget(),
}


@pytest.mark.parametrize("kind", BETWEEN)
def test_drafts_are_accepted_once_and_before_anything_else(kind: str, instant: None) -> None:
    cache = new_cache()
    with nothing_written(cache), pytest.raises(InputError, match="accept: call: got no decode of"):
        cache.accept(0)
    drafted(cache, 4)
    BETWEEN[kind](cache)
    with nothing_written(cache), pytest.raises(InputError, match="one accept.. after each, before"):
        cache.accept(0)


def test_looking_at_lengths_leaves_the_drafts(instant: None) -> None:
    cache = new_cache()
    drafted(cache, 4)
    assert cache.refresh() == [4, 4, 4]
    cache.accept([1, 2, 3])
    assert cache.lengths == cache.seqlens.tolist() == [1, 2, 3]


def test_an_error_leaves_no_drafts_and_no_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next accept would otherwise take back tokens of an earlier decode."""
    cache = new_cache()
    filled(cache, [2, 2, 2])

    def fail(*args: object, **options: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(cache_module, "gqa_decode", fail)
    with nothing_written(cache), pytest.raises(ZeroDivisionError):
        drafted(cache, 4)
    with nothing_written(cache), pytest.raises(InputError, match="no decode of several"):
        cache.accept(0)


# CUDA graphs, as far as they can be had without a GPU


def test_graphs_may_hold_the_decode_alone_or_accept_as_well(
    monkeypatch: pytest.MonkeyPatch, instant: None
) -> None:
    cache = new_cache()
    kept = on_device(cache, 1, 2, 3)
    with captured(monkeypatch):
        drafted(cache, 4)
        cache.accept(kept)
        assert cache.lengths is None and cache.seqlens.tolist() == [1, 2, 3]
        with nothing_written(cache), pytest.raises(InputError, match="in a CUDA-graph capture"):
            cache.accept([1, 2, 3])
        cache.accept(0)  # there is nothing left to take back
    assert cache.seqlens.tolist() == [1, 2, 3]
    for _ in range(2):  # a replay, and an accept that no graph holds
        with captured(monkeypatch):
            drafted(cache, 4)
        cache._lengths._drafts = None  # as the host does not see it
        cache.accept([3, 2, 0])
    assert cache.refresh() == [7, 6, 3]


def test_options_of_other_calls_are_refused_for_they_would_miss_the_lengths() -> None:
    cache = new_cache()
    ends = on_device(cache, 0, 1, 2, 3)
    with (
        nothing_written(cache),
        pytest.raises(InputError, match="decode: cu_seqlens_k_new: got an"),
    ):
        cache.decode(queries(cache), *token(cache), cu_seqlens_k_new=ends)  # type: ignore[call-overload]


@pytest.mark.gpu
def test_a_graph_decodes_and_accepts_drafts() -> None:
    cache = new_cache(3, 40, "cuda")
    q, (k, v) = queries(cache, 4), tokens(cache, 4)
    kept = on_device(cache, 1, 0, 4)

    def step() -> Tensor:
        out = cache.decode(q, k, v)
        cache.accept(kept)
        return out

    step()
    cache.reset()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for _ in range(3):
        graph.replay()
    kept.copy_(on_device(cache, 4, 2, 0))
    graph.replay()
    assert cache.refresh() == [7, 2, 12]
    expected = gqa_decode(q, cache.k, cache.v, cache_seqlens=cache.seqlens + 4 - kept)
    assert torch.allclose(out, expected, atol=2e-3)
    cache.check()
