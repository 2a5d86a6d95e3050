"""Memory for caches: how much they need, how much there is, and what to say if it is too little."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from gqa_cutlass.cache.inputs import surroundings_flaw
from gqa_cutlass.cache.sizes import Sizes, refuse
from gqa_cutlass.devices import capturing
from gqa_cutlass.errors import CacheAllocationError, DeviceError, InputError, shown

_MEMINFO = Path("/proc/meminfo")


@dataclass(frozen=True, kw_only=True)
class Memory:
    """What was allocated for the caches of a model's layers.

    Args:
        layers: Keys and values of each layer, not initialised.
        scales: Of the tokens of each layer's keys and values, float32, ones; if they have any.
        state: Int32, zeros: what the layers share.
        tables: Int32, not initialised, as the sizes ask for them.
    """

    layers: list[tuple[Tensor, Tensor]]
    scales: list[tuple[Tensor, Tensor]]
    state: Tensor
    tables: list[Tensor]


def placed(device: torch.device | int | str, owner: str = "KVCache") -> torch.device:
    """The device that is meant, with its index.

    Raises:
        InputError: Neither a CUDA device that there is nor the CPU.
        DeviceError: No usable GPU.
    """
    allowed = "a CUDA device, such as 'cuda:0', or 'cpu' (simulated, slow)"
    try:
        meant = torch.device("cuda", device) if type(device) is int else torch.device(device)
    except (RuntimeError, TypeError, ValueError):
        refuse(owner, "device", shown(device), allowed)
    if device not in (meant, meant.index, meant.type, str(meant)):  # torch keeps 8 bits of an index
        refuse(owner, "device", shown(device), allowed)
    if meant.type == "cpu":
        return torch.device("cpu")
    if meant.type != "cuda":
        refuse(owner, "device", str(meant), allowed)
    if not torch.cuda.is_available():
        raise DeviceError(
            f"{owner}: device: got {meant}; no usable GPU: torch.cuda.is_available() is False. "
            "Run `gqa-cutlass doctor` to see what was found, or pass device='cpu' (simulated, "
            "slow). Nothing was allocated."
        )
    index = torch.cuda.current_device() if meant.index is None else meant.index
    if not 0 <= index < torch.cuda.device_count():
        allowed = f"cuda:0 to cuda:{torch.cuda.device_count() - 1}, or 'cpu'"
        refuse(owner, "device", str(meant), allowed)
    return torch.device("cuda", index)


def allocate(sizes: Sizes, device: torch.device | int | str) -> Memory:
    """Memory for keys, values and lengths.

    Raises:
        CacheAllocationError: There is not enough; nothing stays allocated.
        DeviceError: No usable GPU.
        InputError: No such device, a CUDA graph is being captured, or what torch would make here
            is no memory.
    """
    where = placed(device, sizes.owner)
    if capturing(where):
        raise InputError(
            f"{sizes.owner}: got a CUDA-graph capture; allowed: to allocate before it, since every "
            "replay would empty the cache. Nothing was allocated."
        )
    if found := surroundings_flaw():
        refuse(sizes.owner, "surroundings", *found)
    available = available_bytes(where)
    memory = None
    if sizes.total_bytes <= available:
        memory = _try_to_allocate(sizes, where)
        if memory is None:
            # What torch holds was in pieces too small, and it has given back what it could.
            available = available_bytes(where, held=False)
    if memory is None:  # raised here, where no frame of the traceback holds a tensor
        _raise_too_large(sizes, where, available)
    return memory


def available_bytes(device: torch.device, held: bool = True) -> int:
    """Bytes that could be allocated on a device.

    Args:
        device: A GPU, the current one if it has no index, or the CPU.
        held: Whether to count what torch's allocator holds on the GPU and does not use.
    """
    if device.type == "cpu":
        return _available_on_the_host()
    index = torch.cuda.current_device() if device.index is None else device.index
    free, total = torch.cuda.mem_get_info(index)
    reserved = torch.cuda.memory_reserved(index)
    allowed = int(torch.cuda.get_per_process_memory_fraction(index) * total)
    unused = reserved - torch.cuda.memory_allocated(index)
    return max(0, min(free, allowed - reserved)) + held * unused


def _available_on_the_host() -> int:
    try:
        for line in _MEMINFO.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _try_to_allocate(sizes: Sizes, device: torch.device) -> Memory | None:
    # On the CPU torch raises nothing more special, and for nothing else.
    refusal = RuntimeError if device.type == "cpu" else torch.OutOfMemoryError
    tensors: list[Tensor] = []
    scales: list[Tensor] = []
    tables: list[Tensor] = []
    try:
        # Normal tensors, even in inference mode: outside of it nobody may write to the others.
        with torch.inference_mode(False):
            state = torch.zeros(sizes.state_shape, dtype=torch.int32, device=device)
            for shape in sizes.table_shapes:
                tables.append(torch.empty(shape, dtype=torch.int32, device=device))
            for shape in sizes.layer_shapes:
                tensors.append(torch.empty(shape, dtype=sizes.dtype, device=device))
                if sizes.by_token:
                    scales.append(torch.ones(shape[:-1], dtype=torch.float32, device=device))
    except refusal:
        tensors.clear()
        scales.clear()
        tables.clear()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        return None
    layers, of_tokens = (
        list(zip(each[::2], each[1::2], strict=True)) for each in (tensors, scales)
    )
    return Memory(layers=layers, scales=of_tokens, state=state, tables=tables)


def _raise_too_large(sizes: Sizes, device: torch.device, available: int) -> NoReturn:
    largest = min(sizes.largest(available), getattr(sizes, sizes.grows) - 1)
    fits = f"{sizes.grows} up to {largest}" if largest else f"no {sizes.grows}"
    raise CacheAllocationError(
        f"{sizes.owner}: memory: got a cache of {sizes.total_bytes} bytes "
        f"({gib(sizes.total_bytes)}): {sizes.text}; free on {device}: {available} bytes "
        f"({gib(available)}). Nothing was allocated. With the other sizes as they are {fits} fits: "
        f"{sizes.remedy}."
    )


def gib(count: int) -> str:
    """A number of bytes, as messages say it."""
    return f"{count / 2**30:.2f} GiB"
