"""torch.compile on a GPU: CUDA graphs that Inductor records, memory beside their pools, devices."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cases import make_step, snapshot
from helpers import check, run
from token_scales import E4M3, STORED, case, in_pages
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

from gqa_cutlass import CacheOverflowError, KVCache, explain, gqa_decode
from gqa_cutlass.cache.scales import raw

pytestmark = pytest.mark.gpu

Q_HEADS, KV_HEADS, DIM, ROOM = 32, 8, 128, 4096
F16 = {"dtype": torch.float16, "device": "cuda"}


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


KINDS: dict[str, dict[str, Any]] = {
    "16 bits": {},
    "8 bits": {"dtype": E4M3, "k_scale": 0.02, "v_scale": 0.02},
    "8 bits, scales of tokens": {"dtype": E4M3, "k_scale": "token", "v_scale": "token"},
}


def caches(batch: int, layers: int = 3, kind: str = "16 bits") -> list[KVCache]:
    made = KVCache.for_layers(layers, batch, ROOM, KV_HEADS, DIM, **F16 | KINDS[kind])
    generator = torch.Generator("cuda").manual_seed(0)
    for cache in made:
        k, v = torch.randn(2, batch, 3000, KV_HEADS, DIM, generator=generator, **F16)
        cache.prefill(k, v, [3000 - 17 * b for b in range(batch)])
    return made


def token(batch: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator("cuda").manual_seed(seed)
    q = torch.randn(batch, Q_HEADS, DIM, generator=generator, **F16)
    k, v = torch.randn(2, batch, KV_HEADS, DIM, generator=generator, **F16)
    return q, k, v


def through(caches: list[KVCache], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One token through all layers, with something for Inductor to do that is exact."""
    for cache in caches:
        q = cache.decode(q * 0.5, k, v)  # type: ignore[assignment]
    return q


def graph_launches(function: Callable[[], object]) -> int:
    """How many CUDA graphs a call launches."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        function()
        torch.cuda.synchronize()
    return sum(event.name == "cudaGraphLaunch" for event in profile.events())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch", [1, 8, 32])
def test_reduce_overhead_replays_one_graph_for_all_lengths(batch: int, kind: str) -> None:
    """Also where a launch needs workspace, which is not allocated from the graph's pool."""
    q, k, v = token(batch, 0)
    eager, graphed = caches(batch, kind=kind), caches(batch, kind=kind)
    if kind == "16 bits":
        chosen = explain(q, eager[0].k, eager[0].v, k, v).dispatch
        assert (chosen.num_merge_counters > 0) == (batch == 32), (
            "another batch shows what this one is for"
        )
    compiled = torch.compile(through, mode="reduce-overhead", fullgraph=True)
    for seed in range(6):
        torch.compiler.cudagraph_mark_step_begin()
        out = compiled(graphed, *token(batch, seed))
        assert torch.equal(out, through(eager, *token(batch, seed)))
        assert graphed[0].lengths is None
    given = token(batch, 6)
    assert graph_launches(lambda: compiled(graphed, *given)) == 1
    through(eager, *given)
    assert counters["inductor"]["cudagraph_skips"] == 0
    assert graphed[0].refresh() == eager[0].lengths
    for ours, theirs in zip(graphed, eager, strict=True):
        for b, held in enumerate(eager[0].lengths or []):
            for mine, other in zip(of_tokens(ours), of_tokens(theirs), strict=True):
                assert torch.equal(mine[b, 2400:held], other[b, 2400:held])
    graphed[0].check()


def of_tokens(cache: KVCache) -> list[Tensor]:
    """What a cache has of its tokens, as bytes where they are of 8 bits or scales."""
    return [raw(held) for held in (cache.k, cache.v, *cache._scales.of_tokens)]


def test_a_graph_that_was_compiled_finds_a_full_cache() -> None:
    (cache,) = caches(8, layers=1)
    compiled = torch.compile(through, mode="reduce-overhead", fullgraph=True)
    for seed in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        compiled([cache], *token(8, seed))
    cache.seqlens[2] = ROOM
    torch.compiler.cudagraph_mark_step_begin()
    out = compiled([cache], *token(8, 9))
    assert out[2].isnan().all() and not out[[0, 1, 3]].isnan().any()
    with pytest.raises(CacheOverflowError, match=r"cache_seqlens\[2\]"):
        cache.check()
    assert cache.seqlens[2] == ROOM


def test_caches_of_ones_own_replay_once_they_are_marked() -> None:
    step = make_step(lengths=[3000, 10], max_seq_len=4096)
    for tensor in (step.k_cache, step.v_cache):
        torch._dynamo.mark_static_address(tensor)
    compiled = torch.compile(gqa_decode, mode="reduce-overhead", fullgraph=True)
    for lengths in ([3000, 10], [5, 4000], [1, 0], [7, 7]):
        step.lengths = lengths
        step.seqlens.copy_(torch.tensor(lengths))
        for cache in (step.k_cache, step.v_cache):
            cache.normal_()
            for b, length in enumerate(lengths):
                cache[b, length:] = float("nan")
        snapshot(step)
        torch.compiler.cudagraph_mark_step_begin()
        check(step, run_compiled(compiled, step))
    assert graph_launches(lambda: run_compiled(compiled, step)) == 1
    assert counters["inductor"]["cudagraph_skips"] == 0


def test_scales_of_tokens_of_ones_own_replay_once_they_are_marked() -> None:
    made = case("cuda", lengths=(300, 10), capacity=320, head_dim=DIM)
    for name in STORED:
        torch._dynamo.mark_static_address(getattr(made, name))
    compiled = torch.compile(gqa_decode, mode="reduce-overhead", fullgraph=True)
    for _ in range(6):
        torch.compiler.cudagraph_mark_step_begin()
        made.check(call=compiled)
        made.lengths = [length + 1 for length in made.lengths]
        for tokens in (made.k, made.v):
            tokens.copy_(tokens.roll(1, dims=0) * 1.25)
    assert graph_launches(lambda: made.run(compiled)) == 1
    assert counters["inductor"]["cudagraph_skips"] == 0


@pytest.mark.parametrize("paged", [False, True], ids=["rows", "pages"])
@pytest.mark.parametrize("tokens", [None, (4, 4)], ids=["one", "several"])
def test_scales_of_tokens_of_dynamic_batches_compile_once(
    tokens: tuple[int, int] | None, paged: bool
) -> None:
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(gqa_decode, backend=counter, fullgraph=True, dynamic=True)
    for batch in (3, 9, 5):
        for held in (100, 200):
            lengths = tuple(held - b for b in range(batch))
            made = case("cuda", lengths=lengths, capacity=272, head_dim=DIM, tokens=tokens)
            if paged:
                in_pages(made)
            made.check(call=compiled)
    assert counter.frame_count == 1


def run_compiled(compiled: Any, step: Any) -> Tensor:
    out = compiled(*step.tensors(), cache_seqlens=step.seqlens)
    assert isinstance(out, Tensor)
    return out


def test_dynamic_batches_and_lengths_compile_once() -> None:
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(gqa_decode, backend=counter, fullgraph=True, dynamic=True)
    for batch in (3, 9, 33, 5):
        for held in (1000, 2000):
            step = make_step(lengths=[held - b for b in range(batch)], max_seq_len=2048)
            check(step, run_compiled(compiled, step))
    assert counter.frame_count == 1


def test_workspace_does_not_come_from_a_pool_that_is_in_use() -> None:
    """As when Inductor runs a function before it records it: what is kept must be elsewhere."""
    step = make_step(lengths=[3000, 10], max_seq_len=4096)
    assert explain(*step.tensors()).dispatch.num_merge_counters, (
        "another step shows what this one is for"
    )
    pool, stream = torch.cuda.MemPool(), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream), torch.cuda.use_mem_pool(pool):  # a new stream has no workspace
        out = run(step)
    stream.synchronize()
    check(step, out)
    del out
    active = [
        block
        for segment in torch.cuda.memory_snapshot()
        if tuple(segment["segment_pool_id"]) == tuple(pool.id)
        for block in segment["blocks"]
        if block["state"] == "active_allocated"
    ]
    assert not active


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_at_once_each_with_its_graph() -> None:
    results: dict[int, bool] = {}

    def work(index: int) -> None:
        with torch.cuda.device(index):
            step = make_step(lengths=[3000, 10], max_seq_len=4096, device=f"cuda:{index}")
            run(step)
            step.seqlens.copy_(torch.tensor(step.lengths))
            snapshot(step)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                out = run(step)
            for _ in range(20):
                graph.replay()
            torch.cuda.synchronize()
            check(step, out)
            results[index] = True

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {0: True, 1: True}
    other = make_step(lengths=[500], max_seq_len=512, device="cuda:1")
    check(other, run(other))  # whichever GPU is current
