"""How the C library uses the driver: what it opens and loads once, what a call costs then, threads,
several GPUs, captures, and the log."""

from __future__ import annotations

import logging
import subprocess
from pathlib import Path
from threading import Barrier, Thread
from typing import Any

import pytest
import torch
from c_build import (
    WARNINGS,
    build_fake_cuda,
    compile_with,
    includes,
    kernels,
    sources,
    write_dummies,
)
from c_library import NUM_MERGE_COUNTERS, Library, config_of, fresh_library, workspace_of
from c_simulator import recorded
from cases import Step, make_step
from helpers import REPOSITORY

import gqa_cutlass
from gqa_cutlass.call.record import parse
from gqa_cutlass.codegen import ARCHES, DType
from gqa_cutlass.codegen.schema.problem import Problem
from gqa_cutlass.dispatch import Device, Dispatch, dispatch

STEPS_C = REPOSITORY / "tests" / "c_steps.c"
PLAIN: dict[str, Any] = dict(lengths=[3, 3], max_seq_len=30, head_dim=64, device="cpu")
# Few heads in a cache that one block does not read at once: tensor copies, clusters that meet.
CLUSTERS: dict[str, Any] = dict(
    lengths=[3], max_seq_len=4096, num_kv_heads=1, poison=False, device="cpu"
)
THREADS = 8


@pytest.fixture
def library() -> Library:
    """As in a new process."""
    return fresh_library()


def problem_of(step: Step) -> Problem:
    """What a step asks for."""
    return gqa_cutlass.explain(*step.tensors(), out=step.out).problem


def chosen_on(step: Step, arch: str, num_sms: int, *, ragged: bool = False) -> Dispatch:
    """What Python launches for a step on another GPU."""
    device = Device(index=0, arch=ARCHES[arch], num_sms=num_sms)
    return dispatch(problem_of(step), device, 0, None, ragged)


def launches_as(library: Library, step: Step, chosen: Dispatch, *, ragged: bool = False) -> bool:
    """Whether decoding a step launches what was chosen."""
    config = config_of(step, workspace_of(chosen))
    flag = torch.zeros(1, dtype=torch.int32)
    status = library.decode_ragged(step, flag, config) if ragged else library.decode(step, config)
    assert status == "GQA_SUCCESS", library.error
    launched = library.driver.last_launch()
    return (launched.kernel, launched.shape) == (chosen.config.name, chosen.shape)


# -- Once


def test_the_first_call_opens_the_driver_and_loads_one_kernel(library: Library) -> None:
    assert library.decode(make_step(**PLAIN)) == "GQA_SUCCESS"
    assert library.driver.all_calls() == {
        "cuInit": 1, "cuCtxGetCurrent": 1, "cuDeviceGet": 1, "cuDevicePrimaryCtxRetain": 1,
        "cuCtxSetCurrent": 1, "cuCtxGetDevice": 1, "cuDeviceGetAttribute": 3,
        "cuThreadExchangeStreamCaptureMode": 2, "cuLibraryLoadData": 1, "cuLibraryGetKernel": 1,
        "cuKernelSetAttribute": 1, "cuKernelGetFunction": 1, "cuLaunchKernelEx": 1,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("sizes", "maps"), [(PLAIN, 0), (CLUSTERS, 2)], ids=["multistage", "clusters"]
)
def test_a_later_call_asks_for_the_context_and_launches(
    library: Library, sizes: dict[str, Any], maps: int
) -> None:
    step = make_step(**sizes)
    config = config_of(step, workspace_of(chosen_on(step, "sm_90a", 132)))
    assert library.decode(step, config) == "GQA_SUCCESS"
    before = library.driver.all_calls()
    for _ in range(10):
        assert library.decode(step, config) == "GQA_SUCCESS"
    after = library.driver.all_calls()
    made = {name: after[name] - before[name] for name in after if after[name] != before[name]}
    expected = {"cuCtxGetCurrent": 10, "cuCtxGetDevice": 10, "cuLaunchKernelEx": 10}
    assert made == expected | ({"cuTensorMapEncodeTiled": 10 * maps} if maps else {})


def test_preparing_loads_what_is_launched_later(library: Library) -> None:
    step = make_step(**CLUSTERS)
    config = config_of(step, workspace_of(chosen_on(step, "sm_90a", 132)))
    assert library.c.gqa_prepare(config) == 0
    loading = ("cuLibraryLoadData", "cuKernelSetAttribute", "cuKernelGetFunction")
    before = library.driver.calls(*loading)
    assert before == 3 and library.driver.launches == 0
    flag = torch.zeros(1, dtype=torch.int32)
    assert library.decode(step, config) == "GQA_SUCCESS"
    assert library.decode_ragged(step, flag, config) == "GQA_SUCCESS"
    assert library.driver.calls(*loading) == before


def test_a_kernel_may_have_the_shared_memory_of_all_its_stages(library: Library) -> None:
    for sizes in (PLAIN, CLUSTERS):
        step = make_step(**sizes)
        chosen = chosen_on(step, "sm_90a", 132)
        assert launches_as(library, step, chosen)
        allowed = library.driver.shared_bytes(chosen.config.name, 0)
        assert allowed == chosen.config.shared_bytes >= chosen.shape.shared_bytes


def test_one_call_after_the_other_is_dispatched_for_itself(library: Library) -> None:
    """What a thread keeps of its last call does not serve another."""
    sizes = [
        PLAIN, PLAIN | dict(dtype=DType.BF16), PLAIN | dict(max_seq_len=31), PLAIN,
        PLAIN | dict(num_kv_heads=3), PLAIN | dict(lengths=[3]), PLAIN | dict(group_size=7),
        PLAIN | dict(vec_width=4), PLAIN | dict(head_dim=96), PLAIN | dict(max_seq_len=4096),
    ]  # fmt: skip
    steps = [make_step(**{"poison": False} | s) for s in sizes]
    for step in (*steps, *reversed(steps)):
        for ragged in (False, True, False):
            chosen = chosen_on(step, "sm_90a", 132, ragged=ragged)
            assert launches_as(library, step, chosen, ragged=ragged)


# -- GPUs and contexts


def test_without_a_context_the_first_gpus_becomes_current(library: Library) -> None:
    library.driver.set_device(1, 80, 108)
    assert library.driver.current == -1
    assert library.decode(make_step(**PLAIN)) == "GQA_SUCCESS"
    assert library.driver.current == library.driver.last_launch().device == 0


def test_each_gpu_has_its_kind_and_its_kernels(library: Library) -> None:
    step = make_step(**CLUSTERS | dict(num_kv_heads=8))
    library.driver.set_device(1, 80, 108)
    library.driver.set_device(2, 89, 30)
    gpus = {0: ("sm_90a", 132), 1: ("sm_80", 108), 2: ("sm_80", 30)}
    found = {index: chosen_on(step, *gpu) for index, gpu in gpus.items()}
    assert found[0].config.tma and not found[1].config.tma
    assert found[1].num_splits != found[2].num_splits
    for index in (0, 1, 2, 1, 0, 2):
        library.driver.enter(index)
        assert launches_as(library, step, found[index])
        assert library.driver.last_launch().device == index
    shared = found[1].config.name
    assert [library.driver.loads(chosen.config.name) for chosen in found.values()] == [1, 1, 1]
    assert [library.driver.shared_bytes(shared, i) > 0 for i in gpus] == [False, True, True]
    assert library.driver.calls("cuKernelGetFunction") == 3
    assert library.driver.calls("cuDeviceGetAttribute") == 3 * 3


def test_the_workspace_is_that_of_the_current_gpu(library: Library) -> None:
    config = config_of(make_step(**CLUSTERS | dict(num_kv_heads=8)))
    library.driver.set_device(1, 80, 108)
    needed = []
    for index, arch, num_sms in ((0, "sm_90a", 132), (1, "sm_80", 108)):
        library.driver.enter(index)
        needed.append(library.workspace_size(config))
        for ragged in (False, True):
            explained = library.explain(config, arch, num_sms, ragged)
            assert needed[index] >= explained.workspace_size
    assert 4 * NUM_MERGE_COUNTERS < needed[0] != needed[1] > 4 * NUM_MERGE_COUNTERS


def test_gpus_beyond_those_that_are_remembered_work_too(library: Library) -> None:
    step = make_step(**PLAIN)
    for ordinal in (63, 64, 70):
        library.driver.set_device(ordinal, 80, 108)
        library.driver.enter(ordinal)
        for _ in range(2):
            assert launches_as(library, step, chosen_on(step, "sm_80", 108))
            assert library.driver.last_launch().device == ordinal
    assert library.driver.loads(chosen_on(step, "sm_80", 108).config.name) == 1


def test_a_refused_gpu_leaves_the_others_alone(library: Library) -> None:
    step = make_step(**PLAIN)
    library.driver.set_device(1, 75)
    library.driver.enter(1)
    assert library.decode(step) == "GQA_ERROR_DEVICE"
    library.driver.enter(0)
    assert library.decode(step) == "GQA_SUCCESS"
    library.driver.enter(1)
    assert library.decode(step) == "GQA_ERROR_DEVICE"


# -- Captures


@pytest.mark.parametrize("mode", [0, 1, 2], ids=["global", "thread-local", "relaxed"])
def test_a_kernel_is_loaded_during_a_capture_and_the_mode_restored(
    library: Library, mode: int
) -> None:
    library.driver.set_capturing(True)
    library.driver.capture_mode = mode
    assert library.decode(make_step(**PLAIN)) == "GQA_SUCCESS", library.error
    assert library.driver.capture_mode == mode
    assert library.driver.calls("cuThreadExchangeStreamCaptureMode") == 2


# -- Threads


def together(*calls: Any) -> list[Any]:
    """Run calls at the same time, each on a thread; returns their results."""
    barrier, results = Barrier(len(calls)), [None] * len(calls)

    def run(index: int) -> None:
        barrier.wait()
        results[index] = calls[index]()

    running = [Thread(target=run, args=(index,)) for index in range(len(calls))]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    return results


@pytest.mark.parametrize("repetition", range(5))
def test_first_calls_of_many_threads_load_each_kernel_once(
    library: Library, repetition: int
) -> None:
    steps = [make_step(**PLAIN), make_step(**PLAIN | dict(vec_width=4))]
    library.driver.set_load_microseconds(2000)
    results = together(*[lambda i=i: library.decode(steps[i % 2]) for i in range(THREADS)])
    assert results == ["GQA_SUCCESS"] * THREADS
    for step in steps:
        assert library.driver.loads(chosen_on(step, "sm_90a", 132).config.name) == 1
    for function in ("cuInit", "cuLibraryLoadData", "cuKernelGetFunction"):
        assert library.driver.calls(function) == (1 if function == "cuInit" else 2), function
    assert library.driver.launches == THREADS


def test_threads_on_different_gpus_make_a_kernel_ready_on_each(library: Library) -> None:
    step = make_step(**PLAIN)
    library.driver.set_load_microseconds(2000)
    for ordinal in range(THREADS):
        library.driver.set_device(ordinal, 80, 108)

    def decode_on(ordinal: int) -> str:
        library.driver.enter(ordinal)
        return library.decode(step)

    results = together(*[lambda i=i: decode_on(i) for i in range(THREADS)])
    kernel = chosen_on(step, "sm_80", 108).config
    assert results == ["GQA_SUCCESS"] * THREADS
    assert library.driver.loads(kernel.name) == 1
    for ordinal in range(THREADS):
        assert library.driver.shared_bytes(kernel.name, ordinal) == kernel.shared_bytes


def steps_program(folder: Path, *flags: str) -> Path:
    """tests/c_steps.c with the library, which opens libcuda.so.1 as anywhere; it is the fake."""
    bundle = write_dummies(folder / "bundle", kernels(), ("sm_80", "sm_90a"))
    build_fake_cuda(folder, *flags)
    compile_with(
        "gcc", "-std=c11", "-O1", "-g", *WARNINGS, *flags, *includes(bundle), *sources(bundle),
        STEPS_C, "-o", folder / "c_steps", f"-L{folder}", "-l:libcuda.so.1",
        "-Wl,-rpath,$ORIGIN", "-pthread", "-ldl", "-lm",
    )  # fmt: skip
    return folder / "c_steps"


def run_program(*command: object) -> subprocess.CompletedProcess[str]:
    """Run a program, whatever comes of it."""
    return subprocess.run([str(part) for part in command], capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
def test_sanitizers_find_nothing_in_the_first_calls_of_threads(
    sanitizer: str, tmp_path: Path
) -> None:
    flags = f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all"
    program = steps_program(tmp_path, *flags)
    done = run_program(program, "threads")
    if "unexpected memory mapping" in done.stderr:  # systems that spread addresses more
        done = run_program("setarch", "-R", program, "threads")
    if "unexpected memory mapping" in done.stderr:
        pytest.skip("the thread sanitizer does not run on this system")
    assert (done.returncode, done.stdout) == (0, "8 threads\n"), done.stderr


@pytest.mark.slow
def test_calls_in_steady_state_allocate_nothing(tmp_path: Path) -> None:
    done = run_program(steps_program(tmp_path, "-DCOUNT_ALLOCATIONS"), "count")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("1000 rounds, 7007 lines, 0 allocations, ")
    assert not done.stdout.endswith(", 0 before\n"), "what is counted is not what is called"


# -- The log


def python_line(step: Step, caplog: pytest.LogCaptureFixture, *, ragged: bool) -> str:
    """Python's line for a step that appends at a length that the host knows, or does not."""
    lengths = step.seqlens if ragged else step.lengths[0]
    plan = gqa_cutlass.plan(
        *step.tensors(), cache_seqlens=lengths, out=step.out, softmax_scale=step.scale
    )
    with caplog.at_level(logging.DEBUG, logger="gqa_cutlass"), recorded():
        caplog.clear()
        plan.log(lengths, "cpu", 0)
    (line,) = [r.getMessage() for r in caplog.records if r.getMessage().startswith("launch")]
    return line


@pytest.mark.parametrize("ragged", [False, True], ids=["length", "ragged"])
@pytest.mark.parametrize(
    "sizes",
    [PLAIN, CLUSTERS, PLAIN | dict(dtype=DType.BF16, group_size=7, vec_width=8)],
    ids=["multistage", "clusters", "bfloat16"],
)
def test_a_launch_is_logged_as_in_python(
    library: Library, sizes: dict[str, Any], ragged: bool, caplog: pytest.LogCaptureFixture
) -> None:
    step, lines = make_step(**sizes), list[str]()
    library.log_to(lines)
    assert launches_as(library, step, chosen_on(step, "sm_90a", 132, ragged=ragged), ragged=ragged)
    (line,) = lines
    expected, found = parse(python_line(step, caplog, ragged=ragged)), parse(line)
    assert line.startswith("launch kernel=")
    assert list(found) == list(expected)
    assert float(found.pop("softmax_scale")) == pytest.approx(step.scale, rel=1e-7)
    for theirs_alone in ("softmax_scale", "workspace_bytes", "device", "stream"):
        expected.pop(theirs_alone)
    config = config_of(step)
    own = {name: found.pop(name) for name in ("workspace_bytes", "device", "stream")}
    explained = library.explain(config, "sm_90a", 132, ragged)
    assert own == {
        "workspace_bytes": str(explained.workspace_size), "device": "0", "stream": "0x0",
    }  # fmt: skip
    assert found == expected


def test_the_log_names_device_and_stream(library: Library) -> None:
    lines: list[str] = []
    library.driver.set_device(3, 80)
    library.driver.enter(3)
    library.log_to(lines)
    library.decode(make_step(**PLAIN), stream=0x7F3A_0000_1C40)
    assert lines[0].endswith(" device=3 stream=0x7f3a00001c40")


def test_there_is_one_line_per_launch_and_none_otherwise(library: Library) -> None:
    step, lines = make_step(**PLAIN), list[str]()
    library.decode(step)
    library.log_to(lines)
    for count in (1, 2, 3):
        assert library.decode(step) == "GQA_SUCCESS"
        assert len(lines) == count
    library.decode(step, q=None)
    library.driver.fail("cuLaunchKernelEx", 719, times=1)
    assert library.decode(step) == "GQA_ERROR_LAUNCH"
    config = config_of(step)
    library.workspace_size(config)
    library.explain(config, "sm_80", 108)
    assert library.c.gqa_prepare(config) == 0
    assert len(lines) == 3
    library.log_to(None)
    assert library.decode(step) == "GQA_SUCCESS"
    assert len(lines) == 3
