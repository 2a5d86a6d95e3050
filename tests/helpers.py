"""What several test files need: kernels as parameters, tensors of a call, compiled kernels, and
Python in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Step
from torch import Tensor

from gqa_cutlass import gqa_decode
from gqa_cutlass.codegen import KernelConfig
from gqa_cutlass.codegen.compile import Compiled
from gqa_cutlass.store import Store

REPOSITORY = Path(__file__).parent.parent


def by_name(configs: Iterable[KernelConfig]) -> list[Any]:
    """Test parameters whose ids are the kernels' names."""
    return [pytest.param(config, id=config.name) for config in configs]


def compiled(config: KernelConfig, arch: str = "sm_90a") -> Compiled:
    """A compiled kernel, by way of this user's store: what has not changed costs nothing."""
    return Store.default().get(config, arch, jit=True).compiled


def registers_allowed(config: KernelConfig) -> int:
    """Registers per thread when `min_blocks` blocks share the register file of a multiprocessor."""
    return min(255, 65536 // (config.num_threads * config.min_blocks))


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
    return gqa_decode(*step.tensors(), cache_seqlens=step.seqlens, **options)


def check(step: Step, out: Tensor) -> None:
    """The step's memory is as it should be, and its output right."""
    step.check_memory()
    assert step.errors(out).share <= 1
