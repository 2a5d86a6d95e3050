"""Lanes that stand at the same instruction."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gqa_cutlass.ptxsim.order.clocks import WARP
from gqa_cutlass.ptxsim.progress import THREADS_SHIFT

if TYPE_CHECKING:
    from gqa_cutlass.ptxsim.machine import Machine

Mask = NDArray[np.bool_]
Lanes = NDArray[np.int64]


class Group:
    """Lanes that execute the same instruction.

    Args:
        mask: Of all lanes of the machine.
        machine: Whose lanes.
    """

    __slots__ = ("_machine", "_whole", "covers", "full", "lanes", "mask", "weight")

    def __init__(self, mask: Mask, machine: Machine) -> None:
        self.mask = mask
        self.lanes: Lanes = np.flatnonzero(mask)
        self.full = len(self.lanes) == len(mask)  # every lane there ever was
        self.covers = len(self.lanes) == machine.num_live  # every lane that has not exited
        self.weight = 1 + (len(self.lanes) >> THREADS_SHIFT)  # see `Progress`
        self._machine = machine
        self._whole: bool | None = None

    def __len__(self) -> int:
        return len(self.lanes)

    @property
    def whole(self) -> bool:
        """Whether the group consists of complete warps."""
        if self._whole is None:
            per_warp = self.mask.reshape(-1, WARP)
            self._whole = bool((per_warp.all(axis=1) == per_warp.any(axis=1)).all())
        return self._whole

    @property
    def num_warps(self) -> int:
        """Warps that have lanes in the group."""
        return int(np.count_nonzero(self.mask.reshape(-1, WARP).any(axis=1)))
