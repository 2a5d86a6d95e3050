"""What a launch needs beside its tensors: partial outputs and merge counters.

Both belong to a stream, whose launches follow one another. A CUDA-graph capture by torch
(`torch.cuda.graph`) gets counters of its own, since replays may run beside the stream's later
launches, and takes the memory of its partial outputs from the graph's pool, as any temporary of the
capture does. Counters are zero before and after every launch, so they are zeroed once, when
allocated.
"""

from __future__ import annotations

import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from gqa_cutlass.gpu.driver import allocate_zeroed, capture_id
from gqa_cutlass.gpu.torch_private import allocator

_COUNTER_BYTES = 4
_ARENA_COUNTERS = 65536


class _Held(NamedTuple):
    """What a stream's launches outside captures use: memory for partial outputs, and counters."""

    memory: Tensor
    address: int
    num_floats: int
    counters: int
    num_counters: int


_held: dict[tuple[int, int], _Held] = {}  # by device and stream
_counters: dict[tuple[int, int, int], tuple[int, int]] = {}  # -> address, count
_arenas: dict[int, tuple[int, int]] = {}  # device -> address and count of counters not given away
_lock = threading.Lock()


def _enter_child() -> None:
    """Begin anew in a child process: a thread that held the lock in the parent is not there."""
    global _lock
    _lock = threading.Lock()


if sys.platform != "win32":
    os.register_at_fork(after_in_child=_enter_child)


def borrow(device: int, stream: int, num_floats: int, num_counters: int) -> tuple[Tensor, int, int]:
    """Memory for the stream's next launch.

    Args:
        device: The GPU, which is the current one.
        stream: The current stream's handle.
        num_floats: Float32 elements for partial outputs.
        num_counters: Counters.

    Returns:
        The memory for partial outputs, to be held until the launch, its address, and that of the
        zeroed counters.
    """
    if torch.cuda.is_current_stream_capturing():
        temporary = _floats(num_floats, device)
        counters = _counters_for((device, stream, capture_id(stream)), num_counters)
        return temporary, temporary.data_ptr(), counters
    held = _held.get((device, stream))
    if held is None or held.num_floats < num_floats or held.num_counters < num_counters:
        held = _held[device, stream] = _grown(held, device, stream, num_floats, num_counters)
    return held.memory, held.address, held.counters


def _grown(
    held: _Held | None, device: int, stream: int, num_floats: int, num_counters: int
) -> _Held:
    """What a stream holds once it has had so much."""
    memory = None if held is None or held.num_floats < num_floats else held.memory
    if memory is None:
        memory = _outside_of_pools(num_floats, torch.cuda.current_stream(device))
    return _Held(
        memory=memory,
        address=memory.data_ptr(),
        num_floats=memory.numel(),
        counters=_counters_for((device, stream, 0), num_counters),
        num_counters=num_counters,
    )


def _floats(count: int, device: int) -> Tensor:
    """Memory on the current GPU, whatever mode torch is in."""
    return allocator((count,), torch.float32, torch.device("cuda", device))()


def _outside_of_pools(num_floats: int, stream: torch.cuda.Stream) -> Tensor:
    """Memory for a stream, whatever pool this thread may be allocating from at present.

    Before torch.compile records a CUDA graph it runs the function once with all of the thread's
    allocations in the graph's pool, and fails when one of them outlives the run. A pool is in force
    for one thread, as are torch's modes: another one allocates beside both.
    """

    def allocate() -> Tensor:
        with torch.cuda.device(stream.device), torch.cuda.stream(stream):
            return torch.empty(num_floats, dtype=torch.float32, device=stream.device)

    with ThreadPoolExecutor(max_workers=1) as other_thread:
        return other_thread.submit(allocate).result()


def _counters_for(key: tuple[int, int, int], count: int) -> int:
    """Address of `count` zeroed counters for a (device, stream, capture).

    They are cut from arenas and never given back: launches and graphs keep their addresses.
    """
    address, held = _counters.get(key, (0, 0))
    if held >= count:
        return address
    with _lock:
        free, left = _arenas.get(key[0], (0, 0))
        if left < count:
            left = max(count, _ARENA_COUNTERS)
            free = allocate_zeroed(key[0], left * _COUNTER_BYTES)
        _arenas[key[0]] = free + count * _COUNTER_BYTES, left - count
        _counters[key] = free, count
    return free
