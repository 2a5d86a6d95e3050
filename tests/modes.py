"""Dispatch modes: what torch's operations allocate, and faults in the middle of calls."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Fault(TorchDispatchMode):
    """Raises KeyboardInterrupt at one of the operations that do more than make a view.

    Args:
        number: Which one, from 0; None for none of them.
        done: Whether it is done before, and the following ones work; or it is not, nor do they.
    """

    def __init__(self, number: int | None, done: bool = False) -> None:
        super().__init__()
        self.count = 0
        self._number, self._done = number, done

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        if func.is_view:
            return func(*args, **(kwargs or {}))
        number = self.count
        self.count += 1
        if self._number is not None and not self._done and number >= self._number:
            raise KeyboardInterrupt
        result = func(*args, **(kwargs or {}))
        if self._done and number == self._number:
            raise KeyboardInterrupt
        return result


class Memory(TorchDispatchMode):
    """Follows the memory that results of operations take, and lets it run out.

    Args:
        most: Allocations after which there is no memory; None for any number.
    """

    def __init__(self, most: int | None = None) -> None:
        super().__init__()
        self.allocations = 0
        self.peak = 0
        self._most = most
        self._bytes: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        known = {*self._bytes, *(t.untyped_storage()._cdata for t in _tensors(args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            if storage._cdata not in known and storage.nbytes():
                self._allocated(storage)
        return result

    def _allocated(self, storage: torch.UntypedStorage) -> None:
        if self.allocations == self._most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB.")
        self.allocations += 1
        self._bytes[storage._cdata] = storage.nbytes()
        self.peak = max(self.peak, sum(self._bytes.values()))
        weakref.finalize(storage, self._bytes.pop, storage._cdata)


def _tensors(*values: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
