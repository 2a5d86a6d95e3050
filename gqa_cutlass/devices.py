"""Devices as calls name them, what runs kernels there, and whether graphs capture it."""

from __future__ import annotations

from contextlib import suppress

import torch

from gqa_cutlass.call.executor import Executor
from gqa_cutlass.dispatch import Device
from gqa_cutlass.errors import DeviceError, InputError, shown
from gqa_cutlass.gpu.driver import describe_device
from gqa_cutlass.gpu.executor import gpu_executor
from gqa_cutlass.tuning.table import gpus


def executor_of(device: torch.device) -> Executor:
    """Where the kernel for tensors on a device runs."""
    if device.type == "cuda":
        return gpu_executor(gpu_index(device))
    if device.type == "cpu":
        from gqa_cutlass.cpu.executor import cpu_executor  # which only CPU tensors need

        return cpu_executor()
    raise DeviceError(
        f"gqa_decode: got tensors on {device}; allowed: an NVIDIA GPU of compute capability 8.0 or "
        "newer, or the CPU (simulated, slow). Move q, the cache, k and v there with .to('cuda')."
    )


def device_of(device: torch.device | int | str) -> torch.device:
    """A device by its name or its index.

    Raises:
        DeviceError: No such name.
    """
    try:
        if isinstance(device, torch.device):
            return device
        if type(device) is int or isinstance(device, str):
            name = device if isinstance(device, str) else f"cuda:{device}"
            found = torch.device(name)
            if str(found) == name:  # torch keeps eight bits of an index
                return found
    except (RuntimeError, OverflowError, TypeError, ValueError):
        pass  # as for any other value
    raise DeviceError(
        f"device: got {shown(device)}; allowed: a CUDA device, such as 'cuda:0', or 'cpu'."
    )


def gpu(device: torch.device) -> Device:
    """What dispatch wants to know of a GPU."""
    return describe_device(gpu_index(device))


def at_hand() -> list[Device]:
    """The GPUs that can be used here."""
    found = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        with suppress(DeviceError):
            found.append(gpu(torch.device("cuda", index)))
    return found


def gpu_named(name: str) -> Device:
    """A GPU by the name that its driver has for it: one at hand, or one that a table is of.

    Raises:
        InputError: There is none.
    """
    known = gpus() | {device.name: device for device in at_hand()}
    if not isinstance(name, str) or name not in known:
        names = ", ".join(map(repr, sorted(known))) or "there is none"
        raise InputError(
            f"explain: gpu: got {shown(name)}; allowed: the name of a GPU at hand, or of one with "
            f"a table of launches: {names}. `gqa-cutlass tune` makes one of the GPU at hand."
        )
    return known[name]


def gpu_index(device: torch.device) -> int:
    """The index of a GPU that can be used.

    Raises:
        DeviceError: There is none.
    """
    if device.type != "cuda":
        raise DeviceError(f"device: got {device}; allowed: a CUDA device, such as 'cuda:0'.")
    if not torch.cuda.is_available():
        raise DeviceError(
            "no usable GPU: torch.cuda.is_available() is False; needed: an NVIDIA GPU of compute "
            "capability 8.0 or newer, its driver, and a torch built with CUDA. Run "
            "`gqa-cutlass doctor` to see what was found, or pass device='cpu' to simulate."
        )
    try:
        index = torch.cuda.current_device() if device.index is None else device.index
        torch.cuda.init()
    except RuntimeError as error:  # after a fork, for one
        raise DeviceError(f"no usable GPU: {error}; needed: CUDA in this process.") from error
    return index


def capturing(device: torch.device) -> bool:
    """Whether calls are being captured into a CUDA graph, on a GPU's current stream."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()
