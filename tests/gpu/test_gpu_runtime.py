"""What only a GPU has: graphs, streams, launches that overlap, and the time that they take."""

from __future__ import annotations

import textwrap
import threading
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Step, make_step, snapshot
from helpers import REPOSITORY, check, run, run_python, skip_unless_it_runs

import gqa_cutlass
from gqa_cutlass import GQADecodeConfig, gqa_attention_decode
from gqa_cutlass.codegen import DType, KernelConfig, Math, Schedule, default_config
from gqa_cutlass.codegen.schema.launch import Pdl
from gqa_cutlass.errors import KernelMissingError

pytestmark = pytest.mark.gpu


TMA = default_config(Math.TENSOROP, DType.F16, 128, 4, 8, Schedule.TMA)


@pytest.fixture
def tma() -> KernelConfig:
    """A kernel whose blocks form clusters, where the GPU has them."""
    skip_unless_it_runs(TMA, "cuda")
    return TMA


@pytest.mark.parametrize("splits", [8, 16, 3], ids=["cluster", "clusters", "clusters of one"])
def test_clusters_repeat_to_the_bit(tma: KernelConfig, splits: int) -> None:
    """Whichever block or cluster comes last, and with counters that are used again."""
    step = make_step(lengths=[5000, 3000, 17], max_seq_len=8192)
    plan = gqa_cutlass.plan(
        *step.tensors(), cache_seqlens=step.seqlens, num_splits=splits, kernel=tma
    )
    assert plan.dispatch.num_partials == splits // plan.dispatch.shape.cluster
    outs = [plan(*step.tensors(), step.seqlens) for _ in range(50)]
    assert all(torch.equal(out, outs[0]) for out in outs)
    check(step, outs[0])


@pytest.mark.parametrize("splits", [8, 16], ids=["cluster", "clusters"])
def test_graph_of_clusters_replays_with_changing_lengths(tma: KernelConfig, splits: int) -> None:
    step = make_step(lengths=[1000, 40, 0], max_seq_len=2048)
    plan = gqa_cutlass.plan(
        *step.tensors(), cache_seqlens=step.seqlens, num_splits=splits, out=step.out, kernel=tma
    )
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plan(*step.tensors(), step.seqlens, step.out)
    replay_with_changing_lengths(graph, step)


@pytest.mark.parametrize(("heads", "capacity", "cluster"), [(8, 40_000, 8), (32, 10_000, 2)])
@pytest.mark.parametrize("held", [1, 0.5, 0.01, 0])
def test_a_large_cache_of_one_sequence(
    tma: KernelConfig, held: float, heads: int, capacity: int, cluster: int
) -> None:
    length = int(held * (capacity - 1))
    step = make_step(lengths=[length], max_seq_len=capacity, num_kv_heads=heads)
    plan = gqa_cutlass.plan(*step.tensors(), cache_seqlens=step.seqlens)
    assert plan.dispatch.config == tma and plan.dispatch.shape.cluster == cluster
    check(step, plan(*step.tensors(), step.seqlens))


def test_results_repeat_to_the_bit() -> None:
    outs = []
    for _ in range(20):
        step = make_step(lengths=[5000, 300, 17], max_seq_len=8192)
        outs.append(run(step))
    assert all(torch.equal(out, outs[0]) for out in outs)


def test_graph_replays_with_changing_lengths() -> None:
    step = make_step(lengths=[1000, 40, 0], max_seq_len=2048)
    plan = gqa_cutlass.plan(*step.tensors(), cache_seqlens=step.seqlens, out=step.out)
    assert plan.dispatch.num_splits > 1
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plan(*step.tensors(), step.seqlens, step.out)
    replay_with_changing_lengths(graph, step)


def replay_with_changing_lengths(graph: torch.cuda.CUDAGraph, step: Step) -> None:
    """Replay a graph on new data, and check what it makes of them."""
    for lengths in ([1000, 40, 0], [5, 2047, 700], [0, 0, 0], [2047, 1, 1500]):
        step.lengths = lengths
        step.seqlens.copy_(torch.tensor(lengths))
        for cache in (step.k_cache, step.v_cache):
            cache.normal_()
            for b, length in enumerate(lengths):
                cache[b, length:] = float("nan")
        step.q.normal_()
        snapshot(step)
        graph.replay()
        check(step, step.out)


def test_graph_and_eager_launches_side_by_side() -> None:
    def step(seed: int) -> Step:
        return make_step(lengths=[3000], max_seq_len=4096, seed=seed)

    expected = [run(step(seed)) for seed in (1, 2)]
    captured, eager = step(1), step(2)
    streams = [torch.cuda.Stream() for _ in range(3)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=streams[0]):
        out = run(captured)
    torch.cuda.synchronize()
    outs = []
    for i in range(60):
        graph.replay()
        with torch.cuda.stream(streams[i % 3]):  # the first is the one that was captured on
            outs.append(run(eager))
    torch.cuda.synchronize()
    assert torch.equal(out, expected[0])
    assert all(torch.equal(other, expected[1]) for other in outs)


@pytest.mark.parametrize("allocator", ["backend:native", "backend:cudaMallocAsync"])
@pytest.mark.parametrize("what", ["torch", "ours"])
def test_several_graphs_and_eager_calls_with_each_allocator(what: str, allocator: str) -> None:
    """With torch alone first, to know what an allocator cannot do for anyone."""
    printed = run_python(
        f"import several_graphs; several_graphs.main({what!r})",
        PYTHONPATH=REPOSITORY / "tests", PYTORCH_CUDA_ALLOC_CONF=allocator,
    )  # fmt: skip
    assert printed == f"{allocator.removeprefix('backend:')}\n"


def test_a_stream_may_be_given_by_its_handle() -> None:
    """The default stream's is 0; what is on it is waited for, as for any other."""
    config = GQADecodeConfig(
        batch_size=1, cache_len=500, num_q_heads=8, num_kv_heads=2, head_dim=128,
        scale=128**-0.5, max_seq_len=512,
    )  # fmt: skip
    other = torch.cuda.Stream()
    default = torch.cuda.default_stream()
    for handle, stream in ((0, default), (1, default), (other.cuda_stream, other)):
        step = make_step(lengths=[500], max_seq_len=512)
        assert step.k is not None and step.v is not None
        late_q = torch.randn_like(step.q)
        tokens = (t.unsqueeze(1) for t in (step.q, step.k, step.v))
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)
            step.q.copy_(late_q)  # a kernel on any other stream would see the old queries
        with torch.cuda.stream(torch.cuda.Stream()):
            output = step.out.view(1, 1, 8 * 128)
            caches = step.k_cache, step.v_cache
            gqa_attention_decode(output, *tokens, *caches, config, stream=handle)
        torch.cuda.synchronize()
        step.before["q"] = late_q
        check(step, step.out)


def test_first_call_may_happen_inside_a_capture_once_warmed_up() -> None:
    gqa_cutlass.warmup(
        [
            GQADecodeConfig(
                batch_size=1,
                cache_len=0,
                num_q_heads=6,
                num_kv_heads=2,
                head_dim=72,
                scale=1.0,
                max_seq_len=512,
            )
        ]  # fmt: skip
    )
    step = make_step(lengths=[500], max_seq_len=512, head_dim=72, group_size=3)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(step)
    graph.replay()
    check(step, out)


def test_an_unknown_kernel_is_not_compiled_during_a_capture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GQA_CUTLASS_CACHE_DIR", str(tmp_path))
    step = make_step(lengths=[5], max_seq_len=16, head_dim=88, group_size=11)
    with (
        pytest.raises(KernelMissingError, match="warmup"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        run(step)
    torch.cuda.synchronize()
    step.check_memory(rejected=(0,))


def test_runs_on_the_current_stream() -> None:
    step = make_step(lengths=[500], max_seq_len=512)
    run(step)
    late_q = torch.randn_like(step.q)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        step.q.copy_(late_q)  # a kernel on any other stream would see the old queries
        out = run(step)
        assert not stream.query(), "the call waited for the stream"
    stream.synchronize()
    step.before["q"] = late_q
    check(step, out)


def test_a_thread_that_never_used_cuda_can_call_a_plan() -> None:
    step = make_step(lengths=[500], max_seq_len=512)
    plan = gqa_cutlass.plan(*step.tensors(), cache_seqlens=step.seqlens, num_splits=1, out=step.out)
    plan(*step.tensors(), step.seqlens, step.out)
    step.out.fill_(float("nan"))
    torch.cuda.synchronize()
    thread = threading.Thread(target=plan, args=(*step.tensors(), step.seqlens, step.out))
    thread.start()
    thread.join()
    torch.cuda.synchronize()
    check(step, step.out)


def test_default_device_and_inference_mode_do_not_matter() -> None:
    code = """
        import torch, gqa_cutlass
        torch.set_default_device("cuda")
        kind = dict(dtype=torch.float16)
        shapes = (1, 8, 64), (1, 16, 2, 64), (1, 2, 64)
        q, cache, token = (torch.randn(*shape, **kind) for shape in shapes)
        seqlens = torch.tensor([16], dtype=torch.int32)
        with torch.inference_mode():
            gqa_cutlass.gqa_decode(q, cache, cache.clone(), token, token, cache_seqlens=seqlens)
        try:
            gqa_cutlass.check_overflow()
        except gqa_cutlass.CacheOverflowError:
            print("reported")
    """
    assert run_python(textwrap.dedent(code)) == "reported\n"


def test_threads_share_a_plan() -> None:
    steps = [make_step(lengths=[900 + i], max_seq_len=1024, seed=i) for i in range(8)]
    plan = gqa_cutlass.plan(*steps[0].tensors(), cache_seqlens=steps[0].seqlens)
    outs: dict[int, torch.Tensor] = {}

    def work(i: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(50):
                outs[i] = plan(*steps[i].tensors(), steps[i].seqlens)
            torch.cuda.current_stream().synchronize()

    torch.cuda.synchronize()
    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, step in enumerate(steps):
        check(step, outs[i])


def test_a_plan_serves_inference_mode_and_other_calls() -> None:
    step = make_step(lengths=[3000, 10], max_seq_len=4096)
    plan = gqa_cutlass.plan(*step.tensors(), cache_seqlens=step.seqlens)
    outs = []
    for inference in (False, True, True, False):
        with torch.inference_mode(inference):
            outs.append(plan(*step.tensors(), step.seqlens))
            assert plan.bind_quickly((*step.tensors(), None, step.seqlens)) is not None
    assert [out.is_inference() for out in outs] == [False, True, True, False]
    for out in outs:
        check(step, out)


def test_a_plan_runs_on_its_gpus_addresses_whatever_they_were_before() -> None:
    """Tensors that move between calls, as an engine's layers and temporaries do."""
    steps = [make_step(lengths=[500 + i], max_seq_len=1024, seed=i) for i in range(4)]
    plan = gqa_cutlass.plan(*steps[0].tensors(), cache_seqlens=steps[0].seqlens)
    for _ in range(3):
        outs = [plan(*step.tensors(), step.seqlens) for step in steps]
        for step, out in zip(steps, outs, strict=True):
            check(step, out)


@pytest.mark.parametrize("captured", [False, True], ids=["stream", "graph"])
@pytest.mark.parametrize(
    ("capacity", "next_starts"), [(1024, Pdl.WHOLE), (16384, Pdl.END)], ids=["whole", "end"]
)
@pytest.mark.parametrize("schedule", Schedule)
def test_dependent_launches_wait_for_what_they_read(
    schedule: Schedule, capacity: int, next_starts: Pdl, captured: bool
) -> None:
    """Each call's output is the next one's query, key and value; it reads the row just appended."""
    kernel = default_config(Math.TENSOROP, DType.F16, 128, 4, 8, schedule)
    skip_unless_it_runs(kernel, "cuda")
    count = 20
    lengths = torch.arange(700, 700 + count, dtype=torch.int32, device="cuda")
    results = []
    for dependent in (False, True):
        step = make_step(lengths=[700], max_seq_len=capacity)
        caches = step.k_cache, step.v_cache
        outs = [step.q, *(torch.empty_like(step.q) for _ in range(count))]
        calls = [
            (last, *caches, last[:, :2], last[:, 2:4], lengths[i : i + 1], out)
            for i, (last, out) in enumerate(pairwise(outs))
        ]
        *tensors, seqlens, out = calls[0]
        plan = gqa_cutlass.plan(
            *tensors, cache_seqlens=seqlens, out=out, dependent=dependent, kernel=kernel
        )
        assert plan.dispatch.pdl == (next_starts if dependent else Pdl.NONE)

        def chain(plan: gqa_cutlass.Plan = plan, calls: list[Any] = calls) -> None:
            for call in calls:
                plan(*call)

        if captured:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                chain()
            graph.replay()
        else:
            torch.cuda._sleep(5_000_000)  # so that calls queue up
            chain()
        results.append([*outs, *(cache[:, : 700 + count] for cache in caches)])
    for plain, other in zip(*results, strict=True):
        assert torch.equal(plain, other)


def test_a_dependent_launch_waits_for_every_stream_that_its_own_waits_for() -> None:
    """Two things come before it: a kernel of its stream, and one of another stream."""
    step = make_step(lengths=[700], max_seq_len=1024)
    plan = gqa_cutlass.plan(*step.tensors(), cache_seqlens=step.seqlens, dependent=True)
    right = plan(*step.tensors(), step.seqlens)
    q, side = torch.zeros_like(step.q), torch.cuda.Stream()
    k_cache = torch.zeros_like(step.k_cache)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            torch.cuda._sleep(2_000_000)
            k_cache.copy_(step.k_cache)
        q.copy_(step.q)
        torch.cuda.current_stream().wait_stream(side)
        out = plan(q, k_cache, step.v_cache, step.k, step.v, step.seqlens)
    graph.replay()
    assert torch.equal(out, right)


def test_one_kernel_launch_per_call() -> None:
    step = make_step(lengths=[3000, 10], max_seq_len=4096)
    run(step)
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        run(step, out=step.out)
        torch.cuda.synchronize()
    names = [e.name for e in profile.events() if e.device_type.name == "CUDA"]
    assert len(names) == 1 and names[0].startswith("gqa_decode_"), names


def test_no_allocation_but_the_results() -> None:
    step = make_step(lengths=[3000, 10], max_seq_len=4096)
    run(step, return_lse=True, out=step.out)
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    run(step, return_lse=True, out=step.out)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] - before == 1  # lse


def test_the_storys_form() -> None:
    step = make_step(lengths=[10], max_seq_len=64)
    output = torch.empty(1, 1, 8 * 128, dtype=torch.float16, device="cuda")
    config = GQADecodeConfig(
        batch_size=1, cache_len=10, num_q_heads=8, num_kv_heads=2, head_dim=128,
        scale=step.scale, max_seq_len=64,
    )  # fmt: skip
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    gqa_attention_decode(
        output, step.q.unsqueeze(1), step.k.unsqueeze(1), step.v.unsqueeze(1),
        step.k_cache, step.v_cache, config, stream,
    )  # fmt: skip
    stream.synchronize()
    check(step, output.view(1, 8, 128))
