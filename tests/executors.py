"""An executor that takes notes: what calls would launch on a GPU, without one."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from gqa_cutlass import api, devices
from gqa_cutlass.call.executor import Executor, Task
from gqa_cutlass.call.flag import OverflowFlag
from gqa_cutlass.call.plans import Plans
from gqa_cutlass.codegen import ARCHES, KernelConfig
from gqa_cutlass.codegen.schema.launch import LaunchShape
from gqa_cutlass.dispatch import model_device
from gqa_cutlass.tensormap import TensorMap

STREAM, MERGE_COUNTERS = 7, 4096


class Notes:
    """Stands in for a GPU, with tensors on the CPU.

    Attributes:
        launches: The argument of every launch.
        shapes: The launch shape of every plan.
        loaded: Its kernel.
        encoded: The tensor maps that were asked for.
        pause: Seconds that a launch takes.
    """

    name: int | str = 0
    survives_fork = False

    def __init__(self) -> None:
        self.device = replace(model_device(ARCHES["sm_90a"]), index=0)
        self.flag = OverflowFlag(torch.zeros(1, dtype=torch.int32))
        self.launches: list[Any] = []
        self.shapes: list[LaunchShape] = []
        self.loaded: list[KernelConfig] = []
        self.encoded: list[TensorMap] = []
        self.pause = 0.0
        self.partials = torch.empty(1 << 20)

    def current_device(self) -> int:
        return 0

    def current_stream(self, index: int) -> int:
        assert index == 0
        return STREAM

    def borrow(self, device: int, stream: int, floats: int, counters: int) -> tuple[Any, int, int]:
        assert (device, stream) == (0, STREAM) and floats <= self.partials.numel() and counters
        return self.partials, self.partials.data_ptr(), MERGE_COUNTERS

    def entered(self) -> AbstractContextManager[object]:
        return nullcontext()

    def allocator(
        self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> Callable[[], Tensor]:
        return lambda: torch.empty(shape, dtype=dtype, device=device)

    def encode(self, description: TensorMap) -> bytes:
        self.encoded.append(description)
        return description.to_bytes()

    def prepare(self, task: Task, argument: ctypes.Structure) -> Callable[[int], None]:
        self.loaded.append(task.dispatch.config)
        self.shapes.append(task.dispatch.shape)

        def launch(stream: int) -> None:
            assert stream == STREAM
            time.sleep(self.pause)
            self.launches.append(type(argument).from_buffer_copy(argument))

        return launch


@contextmanager
def running_on(executor: Executor) -> Iterator[None]:
    """Meanwhile, calls with CPU tensors make plans for an executor; there are none yet."""

    def executor_of(device: torch.device) -> Executor:
        return executor if device.type == "cpu" else devices.executor_of(device)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(api, "_PLANS", Plans(executor_of))
        yield
