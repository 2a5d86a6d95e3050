"""What several test files need: kernels as parameters, tensors of a call, compiled kernels, and
Python in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Step
from edges import Edge
from torch import Tensor

import gqa_cutlass
from gqa_cutlass import gqa_decode
from gqa_cutlass.call import plans
from gqa_cutlass.call.layout import launch_of
from gqa_cutlass.codegen import Kernel, KernelConfig
from gqa_cutlass.codegen.compile import Compiled
from gqa_cutlass.dispatch import MODELS, Dispatch, dispatch
from gqa_cutlass.gpu.driver import describe_device
from gqa_cutlass.kernels.store import Store

THOROUGH = pytest.mark.thorough
REPOSITORY = Path(__file__).parent.parent


def by_name(configs: Iterable[Kernel]) -> list[Any]:
    """Test parameters whose ids are the kernels' names."""
    return [pytest.param(config, id=config.name) for config in configs]


def compiled(config: Kernel, arch: str = "sm_90a") -> Compiled:
    """A compiled kernel, by way of this user's store: what has not changed costs nothing."""
    return Store.default().get(config, arch, jit=True).compiled


def sampled(items: Iterable[Any], key: Callable[[Any], object]) -> list[Any]:
    """Test parameters by name, of which CI takes the first of every kind."""
    seen: set[object] = set()
    found = []
    for item in items:
        first = key(item) not in seen
        seen.add(key(item))
        found.append(pytest.param(item, id=item.name, marks=() if first else THOROUGH))
    return found


def few(values: Iterable[Any], count: int = 1) -> list[Any]:
    """Test parameters, tuples of several, of which CI takes the first few; a GPU takes all."""
    return [_param(value, taken=i < count) for i, value in enumerate(values)]


def every(step: int, values: Iterable[Any]) -> list[Any]:
    """Test parameters, tuples of several, of which CI takes one of so many; a GPU takes all."""
    return [_param(value, taken=i % step == 0) for i, value in enumerate(values)]


def _param(value: Any, *, taken: bool) -> Any:
    values = value if isinstance(value, tuple) else (value,)
    return pytest.param(*values, marks=() if taken else THOROUGH)


def diagonal(*axes: Iterable[Any], count: int | None = None) -> list[Any]:
    """The product of axes as test parameters, of which CI takes every value of every axis.

    It takes as many as the longest axis has, or `count`, going down all axes at once, the shorter
    ones over and over; a GPU takes all. Axes of equal length go in step, so give what must meet as
    one axis.
    """
    lists = [list(axis) for axis in axes]
    steps = range(count or max(map(len, lists)))
    taken = [[axis[step % len(axis)] for axis in lists] for step in steps]
    return [
        pytest.param(
            *values,
            id="-".join(str(getattr(value, "name", value)) for value in values),
            marks=() if list(values) in taken else THOROUGH,
        )
        for values in product(*lists)
    ]


def on_devices(ptxsim: Iterable[Any], gpu: Iterable[Any]) -> list[Any]:
    """Test parameters, device and value: some in ptxsim, which takes its time, more on a GPU."""
    return [
        pytest.param(device, value, id=f"{device}-{getattr(value, 'name', value)}", marks=marks)
        for device, values, marks in (("cpu", ptxsim, ()), ("cuda", gpu, pytest.mark.gpu))
        for value in values
    ]


def check_registers(result: Compiled, allowed: int) -> None:
    """Everything is in registers, and as many blocks fit as the launch bound promises."""
    assert (result.spill_bytes, result.stack_bytes) == (0, 0)
    assert 16 <= result.registers <= allowed
    assert result.code[:4] == b"\x7fELF"


def call_tensors(
    *,
    batch: int = 2,
    q_heads: int = 8,
    kv_heads: int = 2,
    head_dim: int = 64,
    max_seq_len: int = 16,
    dtype: torch.dtype = torch.float16,
    device: str = "cpu",
) -> dict[str, Tensor]:
    """Valid tensors of one call, by argument name, `out` included."""

    def filled(*shape: int) -> Tensor:
        return torch.ones(shape, dtype=dtype, device=device)

    cache = (batch, max_seq_len, kv_heads, head_dim)
    return {
        "q": filled(batch, q_heads, head_dim),
        "k_cache": filled(*cache),
        "v_cache": filled(*cache),
        "k": filled(batch, kv_heads, head_dim),
        "v": filled(batch, kv_heads, head_dim),
        "out": filled(batch, q_heads, head_dim),
    }


def run_python(code: str, *args: object, **environment: object) -> str:
    """Run code in a fresh interpreter; returns what it printed, and fails where it fails."""
    finished = subprocess.run(
        [sys.executable, "-c", code, *map(str, args)],
        env=os.environ | {name: str(value) for name, value in environment.items()},
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def run(step: Step, **options: object) -> Any:
    """Run a decode step through the public call."""
    return gqa_decode(*step.tensors(), cache_seqlens=step.seqlens, **step.features(), **options)


def check(step: Step, out: Tensor) -> None:
    """The step's memory is as it should be, and its output right."""
    step.check_memory()
    assert step.errors(out).share <= 1


def skip_unless_it_runs(config: KernelConfig, device: str) -> None:
    """Skip a test whose kernel is not for this GPU; ptxsim runs all of them."""
    if device == "cuda":
        arch = present_arch()
        if arch not in config.archs:
            pytest.skip(f"{config.name} is not for {arch}")


def present_arch() -> str:
    """The architecture of this process's GPU."""
    return describe_device(torch.cuda.current_device()).arch.name


@contextmanager
def remodelled(**figures: float) -> Iterator[None]:
    """Meanwhile, dispatch takes other figures of a GPU for measured."""
    with pytest.MonkeyPatch.context() as patch:
        for arch, model in MODELS.items():
            patch.setitem(MODELS, arch, replace(model, **figures))
        dispatch.cache_clear()
        yield
    dispatch.cache_clear()


@contextmanager
def launched_with(stages: int) -> Iterator[None]:
    """Plans made meanwhile, of kernels with tma, launch them with so many stages."""

    def fewer(*arguments: Any, **options: Any) -> Dispatch:
        chosen = launch_of(*arguments, **options)
        shared = chosen.config.shared_bytes_with(stages)
        shape = replace(chosen.shape, shared_bytes=shared)
        return replace(chosen, num_stages=stages, shape=shape)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plans, "launch_of", fewer)
        yield


def plan_of(edge: Edge, config: KernelConfig, step: Step) -> gqa_cutlass.Plan:
    """The plan that runs an edge's step, with its lse."""
    with nullcontext() if edge.stages is None else launched_with(edge.stages):
        return gqa_cutlass.plan(
            *step.tensors(), cache_seqlens=lengths_of(edge, step), num_splits=edge.splits,
            return_lse=True, out=step.out, kernel=config, **step.features(),
        )  # fmt: skip


def lengths_of(edge: Edge, step: Step) -> int | Tensor:
    """The lengths as the edge passes them."""
    return step.lengths[0] if edge.by_value else step.seqlens


def share_of_bound(edge: Edge, config: KernelConfig, device: str) -> float:
    """Run an edge's step, check memory and lse, and return the error over its bound."""
    return share_of_step(edge, config, edge.step(config, device))


def share_of_step(edge: Edge, config: KernelConfig, step: Step) -> float:
    """The same of a step that was made for the edge."""
    out, lse = plan_of(edge, config, step)(*step.tensors(), lengths_of(edge, step), step.out)
    assert out.data_ptr() == step.out.data_ptr()
    step.check_memory()
    check_lse(step, lse)
    return step.errors(out).share


def check_lse(step: Step, lse: Tensor) -> None:
    """The log-sum-exp is right; where rows are normed or rotated, but for one that is rounded the
    other way."""
    slack = torch.finfo(step.q.dtype).eps if step.turning.options() else 2e-5
    torch.testing.assert_close(lse.double(), step.reference()[1], atol=slack, rtol=2e-6)
