"""Runs kernels on CPU tensors, through ptxsim: the same PTX, dispatch and arguments as on a GPU."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from gqa_cutlass.call.executor import Task
from gqa_cutlass.call.flag import OverflowFlag
from gqa_cutlass.call.given import ROWS
from gqa_cutlass.call.merge import MergeCall
from gqa_cutlass.call.record import LOG
from gqa_cutlass.call.stored import SCALES, of_tokens
from gqa_cutlass.codegen.config import ARCHES
from gqa_cutlass.codegen.merge import Kernel
from gqa_cutlass.codegen.schema.arguments import BUFFERS, Access
from gqa_cutlass.codegen.schema.launch import LaunchShape
from gqa_cutlass.codegen.schema.params import Params
from gqa_cutlass.codegen.schema.policies import CALL
from gqa_cutlass.codegen.schema.problem import Problem
from gqa_cutlass.cpu.pages import by_page
from gqa_cutlass.dispatch import Dispatch, model_device
from gqa_cutlass.gpu.torch_private import allocator
from gqa_cutlass.kernels.store import Store
from gqa_cutlass.ptxsim.memory.spaces import Region
from gqa_cutlass.ptxsim.prepare import Launch, Program
from gqa_cutlass.ptxsim.simulate import Checks, simulate
from gqa_cutlass.ptxsim.stats import Stats
from gqa_cutlass.ptxsim.text.ptx import parse
from gqa_cutlass.tensormap import TensorMap

_SECONDS_PER_LAUNCH, _SECONDS_PER_MEGABYTE = 0.04, 0.1  # measured on a 2-core CPU
_ACCESS = {row.field: row.access for row in (*CALL.rows, *BUFFERS.rows)}
_WORD_BYTES = 4


class CpuExecutor:
    """An `Executor` for CPU tensors, which follows the dispatch of an H200."""

    name: int | str = "cpu"
    survives_fork = True

    def __init__(self) -> None:
        self.device = model_device(ARCHES["sm_90a"])
        self.flag = OverflowFlag(torch.zeros(1, dtype=torch.int32, device="cpu"))

    def current_device(self) -> int:
        """The one that there is."""
        return self.device.index

    def current_stream(self, index: int) -> int:
        """The one that there is."""
        return 0

    def entered(self) -> AbstractContextManager[object]:
        """Nothing is to be done."""
        return nullcontext()

    def borrow(
        self, index: int, stream: int, num_floats: int, num_merge_counters: int
    ) -> tuple[object, int, int]:
        """Floats, and zeroed merge counters, for one launch, whatever mode torch is in."""
        floats = self.allocator((num_floats,), torch.float32, torch.device("cpu"))()
        counters = self.allocator((num_merge_counters,), torch.int32, torch.device("cpu"))()
        ctypes.memset(counters.data_ptr(), 0, counters.nbytes)
        return (floats, counters), floats.data_ptr(), counters.data_ptr()

    def allocator(
        self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> Callable[[], Tensor]:
        """What makes contiguous tensors."""
        return allocator(shape, dtype, device)

    def encode(self, description: TensorMap) -> bytes:
        """A tensor map as ptxsim reads it."""
        return description.to_bytes()

    def prepare(self, task: Task, argument: ctypes.Structure) -> CpuKernel:
        """Compile a kernel to PTX, if need be."""
        kernel = CpuKernel(task, argument)
        LOG.info(
            "CPU tensors: ptxsim interprets the PTX of %s, for tests and trying things out; a call "
            "may take %.1f s with a full cache",
            task.dispatch.config.name, max(0.1, _seconds(task.problem)),
        )  # fmt: skip
        return kernel

    def merge(self, call: MergeCall, stream: int) -> None:
        """Run a kernel that merges.

        Raises:
            KernelFault: The kernel did what no kernel may.
        """
        regions = [_region_of(t, f"part {i}", readable=True) for i, t in enumerate(call.reads)]
        regions += [_region_of(t, f"result {i}", readable=False) for i, t in enumerate(call.writes)]
        settled = call.settled
        run(program_of(settled.config), settled.shape, call.argument, regions, Checks())


class CpuKernel:
    """A kernel of a plan, to be called with a stream; its argument is in memory.

    What is checked and what is counted can be set between calls.

    Args:
        task: What the plan is for.
        argument: What every launch reads.

    Attributes:
        program: The kernel.
        checks: What ptxsim looks for.
        stats: What it counts.
    """

    def __init__(self, task: Task, argument: Any) -> None:
        self.program = program_of(task.dispatch.config)
        self.checks = Checks()
        self.stats: Stats | None = None
        self._argument = argument
        self._params: Params = getattr(argument, "decode", argument)
        self._shape = task.dispatch.shape
        self._regions = _regions_of(task)

    def __call__(self, stream: int) -> None:
        """Run it.

        Raises:
            KernelFault: The kernel did what no kernel may.
        """
        regions = [replace(r, address=getattr(self._params, r.name)) for r in self._regions]
        run(self.program, self._shape, self._argument, regions, self.checks, self.stats)


@cache
def cpu_executor() -> CpuExecutor:
    """The executor of the CPU."""
    return CpuExecutor()


def _regions_of(task: Task) -> list[Region]:
    """What launches may read and write, under the names of `Params`, at no address yet."""
    problem, chosen, q = task.problem, task.dispatch, task.layout["q"]
    forms = {ROWS[n].field: (t.shape, t.strides, t.itemsize) for n, t in task.layout.items()}
    out = *q.shape[:-1], problem.value_dim
    forms.setdefault("out", (out, _packed(out), task.out_dtype.itemsize))
    words: dict[str, tuple[int, ...]] = {"overflow_flag": (1,)}
    if task.asked.return_lse:
        words["lse"] = task.tokens.lse_shape
    if chosen.num_merge_counters:
        words |= {
            "split_workspace": (chosen.partial_floats,),
            "merge_counters": (chosen.num_merge_counters,),
        }
    forms |= {name: (shape, _packed(shape), _WORD_BYTES) for name, shape in words.items()}
    overread = overreads(chosen)
    return [_region(name, 0, *form, problem.append, overread) for name, form in forms.items()]


def _region_of(tensor: Tensor, name: str, *, readable: bool) -> Region:
    """A tensor that a kernel reads, or else writes."""
    return Region(
        name=name,
        address=tensor.data_ptr(),
        shape=tuple(tensor.shape),
        strides=tuple(stride * tensor.itemsize for stride in tensor.stride()),
        itemsize=tensor.itemsize,
        readable=readable,
        writable=not readable,
    )


def _packed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides without gaps."""
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def _region(
    field: str,
    address: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    itemsize: int,
    append: bool,
    overread: bool,
) -> Region:
    access = _ACCESS[field]
    if field.removesuffix("s") in SCALES and of_tokens(shape):
        access = Access.APPEND
    cache = access is Access.APPEND
    return Region(
        name=field,
        address=address,
        shape=tuple(shape),
        strides=tuple(stride * itemsize for stride in strides),
        itemsize=itemsize,
        readable=access is not Access.WRITE,
        writable=access is not Access.READ and (append or not cache),
        fresh=access is Access.SCRATCH,
        overread=overread and cache,
    )


@lru_cache(maxsize=512)
def program_of(config: Kernel) -> Program:
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
    config = chosen.config
    shared = config.head_blocks > 1 or config.several_queries
    return config.tma or (chosen.prefetch_first_tile and shared)


def regions_of(tensors: Mapping[str, Tensor | None], append: bool, overread: bool) -> list[Region]:
    """What a launch may read and write: the tensors, under the names of `Params`.

    Args:
        tensors: Each by its field of `Params`; None for those that are absent.
        append: Whether a new token is written to the caches.
        overread: Whether asynchronous copies may read what another block appends.
    """
    return [
        _region(name, t.data_ptr(), t.shape, t.stride(), t.element_size(), append, overread)
        for name, t in tensors.items()
        if t is not None
    ]


def run(
    program: Program,
    shape: LaunchShape,
    params: ctypes.Structure,
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
             by_page(regions, params, shape.grid[-1]), checks, stats)  # fmt: skip
