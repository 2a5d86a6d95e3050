"""Runs kernels on CPU tensors, through ptxsim: the same PTX, dispatch and arguments as on a GPU."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Mapping
from functools import lru_cache
from typing import Unpack

import torch
from torch import Tensor

from gqa_cutlass.call.plan import FIELDS, LOG, OUT, Arguments, Plan, R_co, Settings
from gqa_cutlass.codegen.config import KernelConfig
from gqa_cutlass.codegen.schema.launch import LaunchShape
from gqa_cutlass.codegen.schema.params import Params, TmaParams
from gqa_cutlass.codegen.schema.problem import Problem
from gqa_cutlass.dispatch import Dispatch
from gqa_cutlass.gpu import workspace
from gqa_cutlass.gpu.torch_private import allocator
from gqa_cutlass.ptxsim.memory import Region
from gqa_cutlass.ptxsim.prepare import Launch, Program
from gqa_cutlass.ptxsim.ptx import parse
from gqa_cutlass.ptxsim.simulate import Checks, simulate
from gqa_cutlass.ptxsim.stats import Stats
from gqa_cutlass.store import Store
from gqa_cutlass.tensormap import TensorMap

_SECONDS_PER_LAUNCH, _SECONDS_PER_MEGABYTE = 0.04, 0.1  # measured on a 2-core CPU
_WRITTEN = ("out", "lse", "status")  # and never read
_WORKSPACE = ("partials",)  # contents undefined before the launch
_BOTH = ("tickets",)
_CACHES = ("k_cache", "v_cache")


class CpuPlan(Plan[R_co]):
    """A plan for CPU tensors: the kernel's PTX runs in ptxsim.

    What is checked and what is counted can be set between calls (`checks`, `stats`).

    Args:
        settings: As for `Plan`.
    """

    def __init__(self, **settings: Unpack[Settings]) -> None:
        super().__init__(flag=workspace.overflow_flag(workspace.CPU), **settings)
        self.program = program_of(self.dispatch.config)
        self.checks = Checks()
        self.stats: Stats | None = None
        LOG.info(
            "CPU tensors: ptxsim interprets the PTX of %s, for tests and trying things out; a call "
            "may take %.1f s with a full cache",
            self.dispatch.config.name, _seconds(self.problem),
        )  # fmt: skip

    def run(self, tensors: Arguments, cache_seqlens: int | Tensor, argument: bytes) -> R_co:
        """As `Plan.run`, in ptxsim."""
        self._flag.raise_if_set()
        out = tensors[OUT]
        if out is None:
            out = self._new_out()
        lse = self._new_lse() if self.return_lse else None
        bound: dict[str, Tensor | None] = dict(zip(FIELDS, tensors, strict=True))
        bound |= {"out": out, "lse": lse, "status": self._flag.memory}
        if isinstance(cache_seqlens, Tensor):
            bound["seqlens"] = cache_seqlens
        bound |= self.features.memory()
        partials = tickets = 0
        if self.dispatch.num_tickets:
            floats = _memory(self.dispatch.partial_floats, torch.float32)
            counters = _memory(self.dispatch.num_tickets, torch.int32)
            ctypes.memset(counters.data_ptr(), 0, counters.nbytes)
            partials, tickets = floats.data_ptr(), counters.data_ptr()
            bound |= {"partials": floats, "tickets": counters}
        if LOG.isEnabledFor(logging.DEBUG):
            self.log(cache_seqlens, "cpu", 0)
        regions = regions_of(bound, self.problem.append, overreads(self.dispatch))
        with self._lock:
            self._bind(argument, out, cache_seqlens, lse, partials, tickets)
            run(self.program, self.dispatch.shape, self._argument, regions, self.checks, self.stats)
        return out if lse is None else (out, lse)  # type: ignore[return-value]

    def _encode(self, description: TensorMap) -> bytes:
        return description.to_bytes()


def _memory(count: int, dtype: torch.dtype) -> Tensor:
    """Memory, whatever mode torch is in."""
    return allocator((count,), dtype, torch.device("cpu"))()


@lru_cache(maxsize=512)
def program_of(config: KernelConfig) -> Program:
    """A kernel's PTX, compiled if need be, ready for ptxsim.

    Raises:
        KernelMissingError, StoreError, CompileError, CompilerMissingError: As `Store.get`.
    """
    stored = Store.default().get(config, config.ptx_arch)
    return program_from(stored.compiled.code.decode(), config.name)


def _seconds(problem: Problem) -> float:
    """About how long a call takes with a full cache."""
    return _SECONDS_PER_LAUNCH + _SECONDS_PER_MEGABYTE * problem.cache_mib


def program_from(ptx: str, name: str) -> Program:
    """PTX text, ready for ptxsim.

    Raises:
        PtxError: It is cut short, or has what ptxsim does not know.
    """
    return Program(parse(ptx, name))


def overreads(chosen: Dispatch) -> bool:
    """Whether a block may read a row that another one appends meanwhile, and not use it.

    The box that ends with the last cached token reaches into that row. So may a tile that is asked
    for before the length is known, but the warp that asks for it is the one that appends, unless
    several blocks share a KV head.
    """
    return chosen.config.tma or (chosen.early and chosen.config.head_blocks > 1)


def regions_of(tensors: Mapping[str, Tensor | None], append: bool, overread: bool) -> list[Region]:
    """What a launch may read and write: the tensors, under the names of `Params`.

    Args:
        tensors: Each by its field of `Params`; None for those that are absent.
        append: Whether a new token is written to the caches.
        overread: Whether asynchronous copies may read what another block appends.
    """
    regions = []
    for name, t in tensors.items():
        if t is not None:
            size = t.element_size()
            regions.append(
                Region(
                    name=name,
                    address=t.data_ptr(),
                    shape=tuple(t.shape),
                    strides=tuple(stride * size for stride in t.stride()),
                    itemsize=size,
                    readable=name not in _WRITTEN,
                    writable=name in (*_WRITTEN, *_WORKSPACE, *_BOTH)
                    or (append and name in _CACHES),
                    fresh=name in _WORKSPACE,
                    overread=overread and name in _CACHES,
                )
            )
    return regions


def run(
    program: Program,
    shape: LaunchShape,
    params: Params | TmaParams,
    regions: list[Region],
    checks: Checks,
    stats: Stats | None = None,
) -> None:
    """Run one launch on the CPU.

    Raises:
        KernelFault: The kernel did what no kernel may.
    """
    launch = Launch(
        grid=shape.grid, block=shape.block, cluster=(1, shape.cluster, 1),
        shared_bytes=shape.shared_bytes,
    )  # fmt: skip
    simulate(program, launch, ctypes.string_at(ctypes.addressof(params), ctypes.sizeof(params)),
             regions, checks, stats)  # fmt: skip
