"""Runs kernels on a GPU."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache, lru_cache
from threading import Lock

import torch
from torch import Tensor

from gqa_cutlass.call.executor import Task
from gqa_cutlass.call.flag import OverflowFlag
from gqa_cutlass.call.merge import MergeCall, Settled
from gqa_cutlass.codegen.merge import Kernel
from gqa_cutlass.codegen.schema.launch import LaunchShape
from gqa_cutlass.codegen.schema.merge import MergeParams
from gqa_cutlass.dispatch import Device
from gqa_cutlass.gpu import torch_private
from gqa_cutlass.gpu.driver import (
    LoadedKernel,
    describe_device,
    encode_tensor_map,
    load,
    relaxed_capture,
)
from gqa_cutlass.gpu.torch_private import allocator
from gqa_cutlass.gpu.workspace import borrow
from gqa_cutlass.tensormap import TensorMap

_MERGE_BYTES = ctypes.sizeof(MergeParams)


class GpuExecutor:
    """An `Executor` for one GPU.

    Args:
        device: The GPU.
    """

    survives_fork = False

    def __init__(self, device: Device) -> None:
        self.device = device
        self.name: int | str = device.index
        self.current_device = torch_private.current_device
        self.current_stream = torch_private.current_stream
        self.borrow: Callable[[int, int, int, int], tuple[object, int, int]] = borrow
        with self.entered(), relaxed_capture():
            memory = torch.zeros(1, dtype=torch.int32, device="cpu").pin_memory()
        self.flag = OverflowFlag(memory)

    def entered(self) -> AbstractContextManager[object]:
        """Make the GPU current."""
        return torch.cuda.device(self.device.index)

    def allocator(
        self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> Callable[[], Tensor]:
        """What makes contiguous tensors there, while it is current."""
        return allocator(shape, dtype, device)

    def encode(self, description: TensorMap) -> bytes:
        """A tensor map, by the driver."""
        return encode_tensor_map(description, self.device.index)

    def prepare(self, task: Task, argument: ctypes.Structure) -> Callable[[int], None]:
        """Load a kernel; while a CUDA graph is being captured, nothing is compiled."""
        return _load(task.dispatch.config, self.device).prepare(task.dispatch.shape, argument)

    def merge(self, call: MergeCall, stream: int) -> None:
        """Launch a merge; while a CUDA graph is being captured, nothing is compiled."""
        _merging(call.settled, self.device.index).launch(call.argument, stream)


class _Merging:
    """What launches merges by one kernel in one shape, from any thread.

    Args:
        kernel: The kernel.
        shape: Its launch.
    """

    def __init__(self, kernel: LoadedKernel, shape: LaunchShape) -> None:
        self._argument = MergeParams()
        self._launch, self._lock = kernel.prepare(shape, self._argument), Lock()

    def launch(self, argument: MergeParams, stream: int) -> None:
        """Launch with an argument."""
        with self._lock:
            ctypes.memmove(ctypes.byref(self._argument), ctypes.byref(argument), _MERGE_BYTES)
            self._launch(stream)


@lru_cache(maxsize=4096)
def _merging(settled: Settled, index: int) -> _Merging:
    return _Merging(_load(settled.config, describe_device(index)), settled.shape)


def _load(config: Kernel, device: Device) -> LoadedKernel:
    jit = False if torch.cuda.is_current_stream_capturing() else None
    return load(config, device, jit=jit)


@cache
def gpu_executor(index: int) -> GpuExecutor:
    """The executor of a GPU.

    Raises:
        DeviceError: As `describe_device`.
    """
    return GpuExecutor(describe_device(index))
