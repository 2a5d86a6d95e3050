"""How calls are timed: CUDA graphs over memory that is not in L2."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

_UNRELATED_BYTES = 256 << 20
_FILL = 1 << 28  # numbers at a time


def random_pool(num_bytes: int, device: torch.device | str = "cuda") -> Tensor:
    """Random numbers in so many bytes, of 16 bits each."""
    pool = torch.empty(num_bytes // 2, dtype=torch.float16, device=device)
    for part in pool.split(_FILL):
        part.normal_()
    return pool


class Graph:
    """One call per buffer set, captured; replaying it finds the caches cold in L2."""

    def __init__(self, call: Callable[[int], object], num_sets: int) -> None:
        for i in range(min(3, num_sets)):
            call(i)
        torch.cuda.synchronize()
        self._num_sets = num_sets
        self._call = (
            call  # keeps the memory that the graph uses, a baseline's workspace for instance
        )
        self._graph = torch.cuda.CUDAGraph()
        with _uncollected(), torch.cuda.graph(self._graph):
            for i in range(num_sets):
                call(i)

    def micros_per_call(self) -> float:
        """Replay once and time it."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        self._graph.replay()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) * 1e3 / self._num_sets


@contextmanager
def _uncollected() -> Iterator[None]:
    """Nothing is collected meanwhile: to destroy another graph ends a capture."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def evict() -> None:
    """Fill L2 with unrelated data, as the layers of a model between two of its caches do.

    Without it, a contender that reads its data as the first to be evicted leaves in L2 what the one
    before read last, and finds it there at the end: up to 6% of its time at 64 MiB.
    """
    torch.sum(_unrelated(), dtype=torch.float32)


@cache
def _unrelated() -> Tensor:
    return torch.randn(_UNRELATED_BYTES // 4, device="cuda")
