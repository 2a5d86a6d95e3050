"""CPU tensors: what is said about them, what they need, and what they cost."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from cases import Step, make_step
from helpers import call_tensors, check, diagonal, remodelled, run
from torch import Tensor

import gqa_cutlass
from gqa_cutlass import api, devices
from gqa_cutlass.call.plans import Plans
from gqa_cutlass.codegen import DType, KernelConfig, Math, Schedule, default_config
from gqa_cutlass.codegen.compile import compile_kernel
from gqa_cutlass.codegen.schema.launch import Pdl
from gqa_cutlass.cpu.executor import CpuKernel, program_from, program_of
from gqa_cutlass.dispatch import H200
from gqa_cutlass.errors import InputError, KernelMissingError, PtxError
from gqa_cutlass.kernels.store import Store
from gqa_cutlass.ptxsim.stats import Stats

SMALL = default_config(Math.TENSOROP, DType.F16, 64, 4, 8)


@pytest.fixture
def nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a new process: no plans and no programs."""
    monkeypatch.setattr(api, "_PLANS", Plans(devices.executor_of))
    program_of.cache_clear()


@pytest.mark.usefixtures("nothing_known")
def test_a_plan_says_once_what_runs_and_how_long_it_may_take(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO, logger="gqa_cutlass"):
        for _ in range(2):
            gqa_cutlass.gqa_decode(**call_tensors(max_seq_len=8192), cache_seqlens=3)
    said = [r.getMessage() for r in caplog.records if r.name == "gqa_cutlass"]
    (line,) = [each for each in said if not each.startswith("compiling ")]  # where it was not yet
    assert "CPU tensors" in line and "ptxsim" in line and "gqa_decode_sm90" in line
    assert "may take 0.8 s" in line  # 8 MiB of cache


def test_warmup_prepares_ptx(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program_of.cache_clear()
    monkeypatch.setenv("GQA_CUTLASS_CACHE_DIR", str(tmp_path))
    assert gqa_cutlass.warmup([SMALL], device="cpu") == [SMALL]
    assert [path.suffix for path in tmp_path.glob("*compute_80*") if "lock" not in path.name] in (
        [".ptx", ".json"], [".json", ".ptx"],
    )  # fmt: skip
    monkeypatch.setenv("GQA_CUTLASS_DISABLE_JIT", "1")
    program_of.cache_clear()
    assert program_of(SMALL).kernel.name == SMALL.name
    assert Store.default().clean() == 2  # the text, and what is known of it


@pytest.mark.usefixtures("nothing_known")
def test_without_a_compiler_missing_ptx_is_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("GQA_CUTLASS_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("GQA_CUTLASS_DISABLE_JIT", "1")
    with pytest.raises(KernelMissingError, match=SMALL.ptx_arch):
        gqa_cutlass.gqa_decode(**call_tensors(), cache_seqlens=3)


def test_truncated_ptx_is_refused() -> None:
    text = Store.default().get(SMALL, SMALL.ptx_arch, jit=True).compiled.code.decode()
    body = text.index("{")
    for end in (0, body // 2, body + 1, body + 5000):
        with pytest.raises(PtxError):
            program_from(text[:end], SMALL.name)


def steps_of(plan: gqa_cutlass.Plan, step: Step) -> int:
    """Run a step, and count what the interpreter does one after the other."""
    kernel = plan.kernel
    assert isinstance(kernel, CpuKernel)
    executed: list[int] = []
    length = len(kernel.program.code)
    kernel.stats = Stats(length, trace=lambda pc, warps, lanes: executed.append(pc))
    check(step, plan(*step.tensors(), step.seqlens))
    return len(executed)


@pytest.mark.parametrize("schedule", Schedule)
def test_heads_and_splits_are_interpreted_together(schedule: Schedule) -> None:
    """How long a call takes follows from it: 8 blocks cost the instructions of one."""
    config = default_config(Math.TENSOROP, DType.F16, 128, 4, 8, schedule)
    tokens = config.block_n * config.num_warps  # what each block of the longest one takes
    steps = []
    for heads, splits in ((1, 1), (4, 1), (4, 2)):
        step = make_step(
            lengths=[tokens * splits - 1], max_seq_len=tokens * splits, num_kv_heads=heads,
            device="cpu",
        )  # fmt: skip
        plan = gqa_cutlass.plan(
            *step.tensors(), cache_seqlens=step.seqlens, num_splits=splits, kernel=config
        )
        steps.append(steps_of(plan, step))
    one, heads_only, with_splits = steps
    assert heads_only <= 1.05 * one
    assert with_splits <= 2 * one  # and what it takes to combine them


def test_a_long_cache_takes_the_shared_memory_of_a_short_one() -> None:
    config = default_config(Math.TENSOROP, DType.F16, 128, 4, 8)
    shared = set()
    for tokens in (64, 2048):
        step = make_step(lengths=[tokens - 1], max_seq_len=tokens, device="cpu")
        plan = gqa_cutlass.plan(
            *step.tensors(), cache_seqlens=step.seqlens, num_splits=1, kernel=config
        )
        check(step, plan(*step.tensors(), step.seqlens))
        shared.add(plan.dispatch.shape.shared_bytes)
    assert len(shared) == 1


@pytest.mark.parametrize("math", Math)
def test_ptx_for_sm_90_runs_too(math: Math) -> None:
    config = default_config(math, DType.F16, 64, 4, 8)
    step = make_step(lengths=[100, 3], max_seq_len=128, head_dim=64, device="cpu")
    plan = gqa_cutlass.plan(*step.tensors(), cache_seqlens=step.seqlens, kernel=config)
    assert isinstance(plan.kernel, CpuKernel)
    text = compile_kernel(config, "compute_90").code.decode()
    plan.kernel.program = program_from(text, config.name)
    check(step, plan(*step.tensors(), step.seqlens))


def test_the_default_device_does_not_matter() -> None:
    step = make_step(lengths=[300], max_seq_len=512, device="cpu")
    torch.set_default_device("meta")
    try:
        out = run(step, num_splits=2)
    finally:
        torch.set_default_device(None)
    check(step, out)


def test_tensors_without_memory_are_refused() -> None:
    step = make_step(lengths=[30], max_seq_len=64, append=False, device="cpu")
    k_cache = step.k_cache.clone()
    plan = gqa_cutlass.plan(step.q, k_cache, step.v_cache, cache_seqlens=30)
    k_cache.untyped_storage().resize_(0)
    with pytest.raises(InputError, match="k_cache: got a tensor without memory"):
        plan(step.q, k_cache, step.v_cache, None, None, 30)


def test_a_plan_and_a_call_agree_to_the_bit() -> None:
    steps = [make_step(lengths=[300, 17], max_seq_len=512, device="cpu") for _ in range(2)]
    plan = gqa_cutlass.plan(*steps[0].tensors(), cache_seqlens=steps[0].seqlens)
    first = plan(*steps[0].tensors(), steps[0].seqlens)
    assert torch.equal(first, run(steps[1]))
    assert plan.dispatch.config.name in str(gqa_cutlass.explain(*steps[0].tensors()))


@pytest.mark.parametrize(
    ("sizes", "way"),
    diagonal(
        [  # tokens, head_dim, schedule
            (128, 128, Schedule.MULTISTAGE),
            (512, 128, Schedule.TMA),
            (100, 64, Schedule.MULTISTAGE),
            (500, 96, Schedule.TMA),
        ],
        [(False, Pdl.WHOLE), (True, Pdl.END), (False, Pdl.END), (True, Pdl.WHOLE)],
        count=2,
    ),
)
def test_a_dependent_launch_gives_the_same_bits(
    sizes: tuple[int, int, Schedule], way: tuple[bool, Pdl]
) -> None:
    """Whenever it lets the launch behind it start."""
    (tokens, head_dim, schedule), (by_value, next_starts) = sizes, way

    def decode(dependent: bool) -> tuple[gqa_cutlass.Plan, Step, Tensor]:
        step = make_step(lengths=[tokens - 5], max_seq_len=tokens, head_dim=head_dim, device="cpu")
        lengths = step.lengths[0] if by_value else step.seqlens
        plan = gqa_cutlass.plan(*step.tensors(), cache_seqlens=lengths, dependent=dependent)
        return plan, step, plan(*step.tensors(), lengths)

    with remodelled(pdl_whole_mib=0 if next_starts is Pdl.END else H200.pdl_whole_mib):
        _, plain, expected = decode(dependent=False)
        plan, step, out = decode(dependent=True)
    chosen = plan.dispatch
    assert (chosen.pdl, chosen.config.schedule) == (next_starts, schedule)
    assert chosen.config.name.endswith("_pdl")
    check(step, out)
    for a, b in ((out, expected), (step.k_cache, plain.k_cache), (step.v_cache, plain.v_cache)):
        assert torch.equal(a.view(torch.int16), b.view(torch.int16))


def test_dispatch_is_the_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = call_tensors(max_seq_len=4096)
    on_cpu = gqa_cutlass.plan(**tensors, cache_seqlens=3).dispatch
    assert on_cpu == gqa_cutlass.explain(**tensors).dispatch
    assert isinstance(on_cpu.config, KernelConfig) and on_cpu.num_splits > 1
