"""A cache under CUDA graphs, and that nothing waits for the GPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cache_model import (
    DIM,
    F16,
    HEADS,
    Told,
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

from gqa_cutlass import (
    CacheOverflowError,
    InputError,
    KVCache,
    gqa_decode,
)

# CUDA graphs, as far as they can be had without a GPU: a call is taken to be a capture and a replay


def test_after_a_capture_the_host_knows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    recover: list[Callable[[KVCache], object]]
    recover = [lambda c: c.refresh(), lambda c: c.reset(), lambda c: c.truncate(0)]
    for again in recover:
        cache = new_cache()
        with captured(monkeypatch):
            cache.append(*token(cache))
            assert cache.lengths is None
        assert cache.lengths is None and cache.bound == 12
        cache.append(*token(cache))
        assert cache.lengths is None and cache.bound == 12
        again(cache)
        assert cache.lengths == cache.seqlens.tolist() and cache.bound == cache.lengths[0]


def test_a_captured_decode_does_not_raise_for_lengths_at_capture_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cache = new_cache(2, 4)
    filled(cache, [4, 1])
    with captured(monkeypatch):
        out = cache.decode(queries(cache), *token(cache))
    assert out[0].isnan().all() and not out[1].isnan().any()
    assert cache.seqlens.tolist() == [4, 2]
    with pytest.raises(CacheOverflowError):
        cache.check()


def test_captured_calls_that_move_nothing_leave_the_host_its_knowledge(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first, _last = KVCache.for_layers(2, 2, 8, HEADS, DIM, F16, "cpu")
    filled(_last, [3, 1])
    with captured(monkeypatch):
        first.decode(queries(first))
        first.append(*token(first))
    assert first.lengths == [3, 1]


@pytest.mark.parametrize("prompt", [0, 4])
@pytest.mark.parametrize("operation", ["append", "prefill", "ragged", "reorder", "on device"])
def test_replays_that_the_host_does_not_see_spoil_no_data(
    operation: str, prompt: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Capture, reset, prompts, replays, and on: without a refresh, which would be the rule."""
    told = Told([new_cache(3, 12)])
    (cache,) = told.caches
    with captured(monkeypatch):
        cache.append(*token(cache))
    cache.reset()
    told.prefill([prompt] * 3)
    for _ in range(7):
        replay(told)
    assert cache.lengths == [prompt] * 3  # outdated
    new = told.new(2)
    if operation == "append":
        cache.append(*new[0, :, :, :1])
        told.add(new, [1, 1, 1])
    elif operation in ("prefill", "ragged"):
        counts = [2, 2, 2] if operation == "prefill" else [2, 0, 1]
        cache.prefill(*new[0], counts)
        without = told.add(new, counts)
        assert without == ([b for b in range(3) if counts[b] > 1] if prompt else [])
        if without:
            with pytest.raises(CacheOverflowError, match="have no room"):
                cache.check()
    else:
        cache.reorder([1, 2, -1] if operation == "reorder" else on_device(cache, 1, 2, -1))
        told.held = [told.held[1], told.held[2], []]
    cache.refresh()
    told.check()


def replay(told: Told) -> None:
    """What a graph of an append does when it is replayed: the host sees nothing of it."""
    (cache,), new = told.caches, told.new(1)
    k, v = new[0]
    for b, length in enumerate(told.lengths):
        cache.k[b, length], cache.v[b, length] = k[b, 0], v[b, 0]
    cache.seqlens.add_(1)
    told.add(new, [1] * len(told.held))


def test_a_capture_refuses_what_no_replay_could_do(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = new_cache(2, 8)
    k, v = tokens(cache, 3)
    with captured(monkeypatch):
        for call in (
            lambda: cache.prefill(k, v, [1, 2]),
            lambda: cache.truncate([1, 2]),
            lambda: cache.reorder([1, 0]),
            lambda: cache.reset([1]),
            lambda: cache.refresh(),
            lambda: cache.check(),
        ):
            with nothing_written(cache), pytest.raises(InputError, match="in a CUDA-graph capture"):
                call()
        with pytest.raises(InputError, match="got a CUDA-graph capture; allowed: to allocate bef"):
            new_cache()
        for allowed in (
            lambda: cache.prefill(k, v),
            lambda: cache.prefill(k, v, on_device(cache, 1, 2)),
            lambda: cache.truncate(3),
            lambda: cache.truncate(on_device(cache, 1, 2)),
            lambda: cache.reorder(on_device(cache, 1, 0)),
            lambda: cache.reset(),
        ):
            allowed()
            assert cache.lengths is None and cache.bound == 8


# What only a GPU has


@pytest.fixture
def graph() -> torch.cuda.CUDAGraph:
    return torch.cuda.CUDAGraph()


@pytest.mark.gpu
@pytest.mark.parametrize("layers", [1, 2])
def test_a_graph_advances_the_lengths_until_they_overflow(
    layers: int, graph: torch.cuda.CUDAGraph
) -> None:
    told = Told(KVCache.for_layers(layers, 2, 6, HEADS, DIM, F16, "cuda"))
    q, new = queries(told.first), told.new(1)
    outs = [torch.empty_like(q) for _ in told.caches]

    def forward() -> None:
        for cache, out, (k, v) in zip(told.caches, outs, new, strict=True):
            cache.decode(q, k, v, out=out)

    told.first.forget()
    forward()
    told.first.reset()
    told.prefill([3, 1])
    with torch.cuda.graph(graph):
        forward()
    assert told.first.lengths is None and told.first.bound == 6
    assert told.first.seqlens.tolist() == [3, 1], "capturing moved the lengths"
    for full in (False, False, False, True):
        q.copy_(queries(told.first)), new.copy_(told.new(1))
        graph.replay()
        assert told.add(new.clone(), [1, 1]) == ([0] if full else [])
        told.check()
        for layer, out in enumerate(outs):
            held = on_device(told.first, *told.lengths)
            expected = gqa_decode(q, *told.dense(layer), cache_seqlens=held) if not full else None
            assert bool(out[0].isnan().all()) == full and not out[1].isnan().any()
            assert expected is None or torch.equal(out, expected)
    with pytest.raises(CacheOverflowError, match=r"cache_seqlens\[0\]"):
        told.first.check()
    assert told.first.refresh() == told.lengths == [6, 5]
    with pytest.raises(CacheOverflowError, match="KVCache.decode: .* sequence 0 holds 6 tokens"):
        told.first.decode(q, *new[0, :, :, 0])


@pytest.mark.gpu
def test_a_graph_of_appends_advances_the_lengths_until_they_overflow(
    graph: torch.cuda.CUDAGraph,
) -> None:
    told = Told([new_cache(2, 6, "cuda")])
    (cache,) = told.caches
    new = told.new(1)
    cache.forget()
    cache.append(*new[0])
    cache.reset()
    told.prefill([3, 1])
    with torch.cuda.graph(graph):
        cache.append(*new[0])
    for full in (False, False, False, True):
        new.copy_(told.new(1))
        graph.replay()
        assert told.add(new.clone(), [1, 1]) == ([0] if full else [])
        told.check()
    with pytest.raises(CacheOverflowError, match=r"\[0\] have no room"):
        cache.check()


@pytest.mark.gpu
def test_a_capture_on_a_gpu_refuses_what_no_replay_could_do(graph: torch.cuda.CUDAGraph) -> None:
    cache = new_cache(2, 8, "cuda")
    k, v = tokens(cache, 3)
    indices = on_device(cache, 1, 0)
    cache.prefill(k, v, indices)
    cache.reorder(indices)
    cache.reset()
    with torch.cuda.graph(graph):
        for call in (lambda: cache.prefill(k, v, [1, 2]), cache.refresh, cache.check):
            with pytest.raises(InputError, match="in a CUDA-graph capture"):
                call()
        cache.prefill(k, v, indices)
        cache.reorder(indices)
    assert cache.lengths is None
    graph.replay()
    assert cache.refresh() == [0, 1]
    assert same(bits(cache.k[1, 0]), bits(k[0, 0]))


@pytest.mark.gpu
def test_nothing_waits_for_the_gpu() -> None:
    first, last = KVCache.for_layers(2, 3, 40, HEADS, DIM, F16, "cuda")
    k, v = tokens(first, 2)
    q, counts, order = queries(first), on_device(first, 2, 0, 1), on_device(first, 1, -1, 0)

    def everything() -> None:
        for cache in (first, last):
            cache.prefill(k, v)
            cache.prefill(k, v, [1, 2, 0])
            cache.decode(q, k[:, 0], v[:, 0])
            cache.append(k[:, 0], v[:, 0])
            cache.reorder([1, 0, -1])
            cache.truncate([3, 4, 5])
            cache.reset([1])
            cache.prefill(k, v, counts)
            cache.reorder(order)
            cache.truncate(counts)
            cache.append(k[:, :1], v[:, :1])
            cache.decode(q, k[:, 0], v[:, 0])
            cache.forget()
            cache.append(k[:, 0], v[:, 0])
            cache.decode(q, k[:, 0], v[:, 0])
            cache.truncate(5)
            cache.reset()

    everything()  # kernels are loaded
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(100_000_000)
        everything()
        waited = torch.cuda.current_stream().query()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not waited, "the calls waited for the stream"
    last.check()
