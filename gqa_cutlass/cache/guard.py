"""What all methods of a cache refuse, and what they say when memory runs out."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from typing import Concatenate, NoReturn, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor

from gqa_cutlass.cache.allocation import available_bytes, gib
from gqa_cutlass.cache.inputs import check_memory, refuse, surroundings_flaw
from gqa_cutlass.call.stored import SCALES
from gqa_cutlass.errors import CacheAllocationError, GqaError
from gqa_cutlass.tracing import untraced


class Stored(Protocol):
    """A cache, as far as it is storage."""

    k: Tensor
    v: Tensor

    @property
    def seqlens(self) -> Tensor:
        """Tokens cached."""

    @property
    def device(self) -> torch.device:
        """Where the cache is."""


Cache = TypeVar("Cache", bound=Stored)
P = ParamSpec("P")
R = TypeVar("R")


def guarded(method: Callable[Concatenate[Cache, P], R]) -> Callable[Concatenate[Cache, P], R]:
    """Refuse where a cache cannot be worked on; let a lack of memory be an error of ours.

    Compiled code breaks its graph for it.
    """
    name = method.__name__.lstrip("_")

    @wraps(method)
    def call(self: Cache, /, *args: P.args, **kwargs: P.kwargs) -> R:
        if found := surroundings_flaw():
            refuse(name, "surroundings", *found)
        for what in ("k", "v", "seqlens", *SCALES):
            if isinstance(held := getattr(self, what), Tensor):
                check_memory(name, f"the cache's {what}", held)
        work = partial(method, self, *args, **kwargs)
        return with_memory(f"KVCache.{name}", self.device, work)

    return untraced(call, f"KVCache.{name} runs on the host; in one graph are decode and accept")


def lack_of_memory(error: RuntimeError) -> str:
    """What torch says of there being no memory: on a GPU, on the CPU, or pinned.

    Raises:
        RuntimeError: The error, if it is another one.
    """
    told = str(error)
    spoken = "out of memory" in told or "DefaultCPUAllocator: can't allocate memory" in told
    if isinstance(error, GqaError) or not (spoken or isinstance(error, torch.OutOfMemoryError)):
        raise error
    return told


def with_memory(call: str, device: torch.device, work: Callable[[], R]) -> R:
    """Do some work, and let a lack of memory be an error of ours.

    Raises:
        CacheAllocationError: There was no memory for something.
    """
    try:
        return work()
    except RuntimeError as error:
        told = lack_of_memory(error)
    raise_no_temporaries(call, device, told)  # where no traceback holds a tensor


def raise_no_temporaries(call: str, device: torch.device, told: str) -> NoReturn:
    """Say that a method of a cache had no memory for what it needs meanwhile."""
    available = available_bytes(device)
    raise CacheAllocationError(
        f"{call}: memory: got none for what the call needs ({told[:200]}); free "
        f"on {device}: {available} bytes ({gib(available)}). Nothing stays allocated, and all "
        "tokens that the lengths count are as they were. Free memory, and call it again."
    )
