"""The runtime on a GPU: layouts, lengths, graphs, streams, errors, logging."""

from __future__ import annotations

import logging
import textwrap
import threading
from pathlib import Path

import pytest
import torch
from cases import Step, make_step, snapshot
from helpers import run_python

import gqa_cutlass
from gqa_cutlass import GQADecodeConfig, gqa_attention_decode, gqa_decode
from gqa_cutlass.codegen import DType, Math, default_config
from gqa_cutlass.errors import CacheOverflowError, InputError, KernelMissingError

pytestmark = pytest.mark.gpu


def run(step: Step, **options: object) -> torch.Tensor:
    return gqa_decode(*step.tensors(), cache_seqlens=step.seqlens, **options)


def check(step: Step, out: torch.Tensor) -> None:
    step.check_memory()
    assert step.errors(out).share <= 1


@pytest.mark.parametrize("vec_width", [8, 4, 2, 1])
@pytest.mark.parametrize("layout", ["NHD", "HND", "padded"])
def test_misaligned_and_strided_tensors(vec_width: int, layout: str) -> None:
    step = make_step(lengths=[33, 200, 0], max_seq_len=256, layout=layout, vec_width=vec_width)
    plan = gqa_cutlass.plan(*step.tensors(), cache_seqlens=step.seqlens)
    assert plan.dispatch.config.vec_width == vec_width
    check(step, run(step))


@pytest.mark.parametrize("head_dim", range(32, 257, 8))
def test_every_head_dim(head_dim: int) -> None:
    step = make_step(lengths=[70, 3], max_seq_len=100, head_dim=head_dim, group_size=2)
    check(step, run(step))


@pytest.mark.parametrize("group_size", [*range(1, 17), 24, 32, 48, 71])
def test_every_group_size(group_size: int) -> None:
    step = make_step(lengths=[70, 3], max_seq_len=100, group_size=group_size, num_kv_heads=1)
    check(step, run(step))


def test_32_query_heads_on_one_kv_head_of_the_largest_dim() -> None:
    step = make_step(
        lengths=[99], max_seq_len=100, head_dim=256, group_size=32, num_kv_heads=1, dtype=DType.BF16
    )
    check(step, run(step))


@pytest.mark.parametrize("splits", [0, 1, 2, 7, 64, 300])
def test_any_number_of_splits_gives_the_answer(splits: int) -> None:
    step = make_step(lengths=[4000, 100, 0, 1], max_seq_len=4096)
    check(step, run(step, num_splits=splits))


def test_int_and_device_lengths_agree_to_the_bit() -> None:
    steps = [make_step(lengths=[777] * 3, max_seq_len=1024) for _ in range(2)]
    from_tensor = run(steps[0])
    from_int = gqa_decode(*steps[1].tensors(), cache_seqlens=777)
    assert torch.equal(from_tensor, from_int)
    for step in steps:
        step.check_memory()


def test_four_dimensional_queries() -> None:
    step = make_step(lengths=[77], max_seq_len=128)
    out, lse = gqa_decode(
        step.q.unsqueeze(1), step.k_cache, step.v_cache, step.k.unsqueeze(1), step.v.unsqueeze(1),
        cache_seqlens=77, return_lse=True,
    )  # fmt: skip
    assert out.shape == (1, 1, 8, 128) and lse.shape == (1, 8) and lse.dtype == torch.float32
    check(step, out.squeeze(1))


def test_attend_only_leaves_the_cache_alone() -> None:
    step = make_step(lengths=[77, 128, 1], max_seq_len=128, append=False)
    check(step, run(step))


def test_attending_to_nothing_gives_zeros() -> None:
    step = make_step(lengths=[0, 5], max_seq_len=128, append=False)
    out, lse = run(step, return_lse=True)
    assert (out[0] == 0).all() and (lse[0] == float("-inf")).all()
    step.check_memory()
    assert not out[1].isnan().any()


def test_results_repeat_to_the_bit() -> None:
    outs = []
    for _ in range(20):
        step = make_step(lengths=[5000, 300, 17], max_seq_len=8192)
        outs.append(run(step))
    assert all(torch.equal(out, outs[0]) for out in outs)


def test_a_second_token_sees_the_first() -> None:
    step = make_step(lengths=[60, 15], max_seq_len=100)
    for _ in range(40):
        check(step, run(step))
        step.lengths = [n + 1 for n in step.lengths]
        step.seqlens += 1
        step.k.normal_()
        step.v.normal_()
        snapshot(step)


def test_graph_replays_with_changing_lengths() -> None:
    step = make_step(lengths=[1000, 40, 0], max_seq_len=2048)
    plan = gqa_cutlass.plan(*step.tensors(), cache_seqlens=step.seqlens, out=step.out)
    assert plan.dispatch.num_splits > 1
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plan(*step.tensors(), step.seqlens, step.out)
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


def test_one_kernel_launch_per_call() -> None:
    step = make_step(lengths=[3000, 10], max_seq_len=4096)
    run(step)
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        run(step, out=step.out)
        torch.cuda.synchronize()
    names = [e.name for e in profile.events() if e.device_type.name == "CUDA"]
    assert len(names) == 1 and names[0].startswith("gqa_decode_sm80_"), names


def test_no_allocation_but_the_results() -> None:
    step = make_step(lengths=[3000, 10], max_seq_len=4096)
    run(step, return_lse=True, out=step.out)
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    run(step, return_lse=True, out=step.out)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] - before == 1  # lse


def test_overflow_of_an_int_length_writes_nothing() -> None:
    step = make_step(lengths=[128], max_seq_len=128, append=False)
    k = v = torch.zeros(1, 2, 128, device="cuda", dtype=torch.float16)
    with pytest.raises(CacheOverflowError, match="holds 128 tokens.*max_seq_len is 128"):
        gqa_decode(*step.tensors()[:3], k, v, cache_seqlens=128)
    torch.cuda.synchronize()
    step.check_memory()


@pytest.mark.parametrize("bad", [128, 129, -1, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("splits", [1, 4])
def test_overflow_on_the_device_spoils_only_its_sequence(bad: int, splits: int) -> None:
    step = make_step(lengths=[100, 5, 60], max_seq_len=128)
    step.seqlens[1] = bad
    out, lse = run(step, return_lse=True, num_splits=splits)
    with pytest.raises(CacheOverflowError, match=r"cache_seqlens\[1\]"):
        gqa_cutlass.check_overflow()
    gqa_cutlass.check_overflow()  # reported once
    assert out[1].isnan().all() and lse[1].isnan().all()
    step.check_memory(rejected=(1,))
    assert not out[0].isnan().any() and not out[2].isnan().any()


def test_the_next_call_reports_an_overflow_on_the_device() -> None:
    step = make_step(lengths=[100], max_seq_len=128)
    step.seqlens.fill_(128)
    run(step)
    torch.cuda.synchronize()
    with pytest.raises(CacheOverflowError, match="earlier call"):
        run(step)
    step.seqlens.fill_(100)
    check(step, run(step))


def test_bad_input_launches_nothing_and_writes_nothing() -> None:
    step = make_step(lengths=[100], max_seq_len=128)
    q, k_cache, v_cache, k, v = step.tensors()
    bad_calls = [
        dict(cache_seqlens=-1),
        dict(cache_seqlens=step.seqlens.long()),
        dict(cache_seqlens=step.seqlens.cpu()),
        dict(cache_seqlens=step.seqlens.repeat(2)),
        dict(cache_seqlens=100, out=q),
        dict(cache_seqlens=100, out=k_cache[:, :1].expand(1, 8, 2, 128)[:, :, 0]),
        dict(cache_seqlens=100, softmax_scale=float("nan")),
        dict(cache_seqlens=100, num_splits=-1),
    ]
    for options in bad_calls:
        with pytest.raises(InputError):
            gqa_decode(q, k_cache, v_cache, k, v, **options)
    with pytest.raises(InputError, match="device"):
        gqa_decode(q, k_cache.cpu(), v_cache, k, v, cache_seqlens=100)
    torch.cuda.synchronize()
    step.check_memory(rejected=(0,))


def test_a_plan_refuses_other_layouts() -> None:
    step = make_step(lengths=[100], max_seq_len=128)
    other = make_step(lengths=[100], max_seq_len=256)
    plan = gqa_cutlass.plan(*step.tensors(), cache_seqlens=step.seqlens)
    with pytest.raises(InputError, match="plan"):
        plan(*other.tensors(), other.seqlens)
    with pytest.raises(InputError, match="plan was made for"):
        plan(*step.tensors(), 100)
    other.check_memory(rejected=(0,))
    step.check_memory(rejected=(0,))


def test_a_second_call_with_aliased_caches_is_refused() -> None:
    step = make_step(lengths=[100], max_seq_len=128)
    run(step)
    snapshot(step)
    with pytest.raises(InputError, match="memory that k_cache also uses"):
        gqa_decode(step.q, step.k_cache, step.k_cache, step.k, step.v, cache_seqlens=step.seqlens)
    with pytest.raises(InputError, match="memory that q also uses"):
        gqa_decode(*step.tensors(), cache_seqlens=step.seqlens, out=step.q)
    torch.cuda.synchronize()
    step.check_memory(rejected=(0,))


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


def test_one_debug_line_per_launch(caplog: pytest.LogCaptureFixture) -> None:
    step = make_step(lengths=[10], max_seq_len=64)
    with caplog.at_level(logging.DEBUG, logger="gqa_cutlass"):
        run(step)
    (line,) = [r.getMessage() for r in caplog.records if r.name == "gqa_cutlass"]
    for part in ("kernel=gqa_decode_sm80_", "grid=", "block=", "shared_bytes=", "num_splits=",
                 "batch_size=1", "num_q_heads=8", "head_dim=128", "stream="):  # fmt: skip
        assert part in line


def test_a_cold_kernel_compiles_in_two_seconds(
    tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GQA_CUTLASS_CACHE_DIR", str(tmp_path))
    from gqa_cutlass.launcher import describe_device
    from gqa_cutlass.store import Store

    arch = describe_device(torch.cuda.current_device()).arch.name
    stored = Store.default().get(default_config(Math.TENSOROP, DType.F16, 128, 9, 8), arch)
    assert stored.was_built and stored.compiled.seconds < 2
