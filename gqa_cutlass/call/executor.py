"""What plans and merges ask of the place where their kernels run."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from gqa_cutlass.call.asked import Asked
from gqa_cutlass.call.flag import OverflowFlag
from gqa_cutlass.call.given import Layout, Tokens
from gqa_cutlass.call.merge import MergeCall
from gqa_cutlass.codegen.schema.problem import Problem
from gqa_cutlass.dispatch import Device, Dispatch
from gqa_cutlass.tensormap import TensorMap


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a plan is for.

    Args:
        layout: The tensors that calls give, but where they lie.
        problem: That they pose.
        dispatch: The kernel and its launch.
        asked: The other options.
        softmax_scale: Factor on the scores.
        out_dtype: Of the output.
        fields: What features put into the kernel's argument, but addresses.
        tokens: Of the sequences.
        positions: The longest length that rotations have tables for; None: any.
    """

    layout: Layout
    problem: Problem
    dispatch: Dispatch
    asked: Asked
    softmax_scale: float
    out_dtype: torch.dtype
    fields: dict[str, float]
    tokens: Tokens
    positions: int | None = None


class Executor(Protocol):
    """Where kernels run: a GPU, or the CPU in ptxsim.

    Attributes:
        device: The GPU whose dispatch is followed; its index is that of `current_device`.
        name: In the log.
        flag: Where kernels report lengths that are not allowed.
        survives_fork: Whether a child process may go on with its plans.
    """

    device: Device
    name: int | str
    flag: OverflowFlag
    survives_fork: bool

    @property
    def current_device(self) -> Callable[[], int]:
        """The index of the device that is current."""

    @property
    def current_stream(self) -> Callable[[int], int]:
        """A device's current stream."""

    @property
    def borrow(self) -> Callable[[int, int, int, int], tuple[object, int, int]]:
        """By device, stream and numbers of floats and merge counters: memory for the next launch.

        It returns something to hold until the launch, and the addresses of so many floats, and of
        as many zeros.
        """

    def entered(self) -> AbstractContextManager[object]:
        """Make the device current."""

    def allocator(
        self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> Callable[[], Tensor]:
        """What makes contiguous tensors there."""

    def encode(self, description: TensorMap) -> bytes:
        """A tensor map as kernels read it."""

    def prepare(self, task: Task, argument: ctypes.Structure) -> Callable[[int], None]:
        """Load a kernel, compiling it if need be.

        Args:
            task: Which, and how it is launched.
            argument: What every launch reads.

        Returns:
            What launches it on a stream; one call at a time.

        Raises:
            GqaError: There is no such kernel, or it cannot be loaded.
        """

    def merge(self, call: MergeCall, stream: int) -> None:
        """Launch a merge, compiling its kernel if need be.

        Raises:
            GqaError: There is no such kernel, or it cannot be loaded or launched.
        """
