"""What a kernel's author wants to know before spending GPU time: counts, conflicts, sectors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gqa_cutlass.ptxsim.order.clocks import WARP

if TYPE_CHECKING:
    from gqa_cutlass.ptxsim.group import Group

Ints = NDArray[np.int64]
_BANK_BYTES, _BANKS, _SECTOR = 4, 32, 32


@dataclass(kw_only=True)
class AccessStats:
    """Accesses of one instruction.

    Args:
        requests: Warps that executed it.
        passes: Shared memory: passes over the banks. Global memory: 32-byte sectors.
        ideal: The least that as many bytes could take.
        bytes: Bytes asked for.
        write: Whether it writes to global memory.
    """

    requests: int = 0
    passes: int = 0
    ideal: int = 0
    bytes: int = 0
    write: bool = False

    def plus(self, other: AccessStats) -> AccessStats:
        """The sum of two."""
        return AccessStats(
            requests=self.requests + other.requests,
            passes=self.passes + other.passes,
            ideal=self.ideal + other.ideal,
            bytes=self.bytes + other.bytes,
            write=self.write,
        )


class Stats:
    """Figures of one launch, by position in the code.

    Args:
        length: Instructions of the kernel.
        trace: Called for every instruction with its position, and how many warps and lanes
            executed it.
    """

    def __init__(self, length: int, trace: Callable[[int, int, int], None] | None = None) -> None:
        self._trace = trace
        self.executed = [0] * length  # warps
        self.shared_memory: dict[int, AccessStats] = {}
        self.global_memory: dict[int, AccessStats] = {}

    def count(self, pc: int, group: Group) -> None:
        """An instruction was executed."""
        self.executed[pc] += group.num_warps
        if self._trace is not None:
            self._trace(pc, group.num_warps, len(group))

    def shared(self, pc: int, lanes: Ints, addresses: Ints, size: int) -> None:
        """An access to shared memory: a pass serves 128 bytes, of different banks or equal words.

        Accesses of 8 bytes take a half warp at a time, those of 16 bytes a quarter.
        """
        entry = self.shared_memory.setdefault(pc, AccessStats())
        phase = lanes // (WARP * 4 // max(size, 4))
        words = addresses[:, None] // _BANK_BYTES + np.arange(max(1, size // _BANK_BYTES))
        keys = np.unique((phase[:, None] << 32) + words)
        per_bank = (keys >> 32) * _BANKS + (keys & 0xFFFFFFFF) % _BANKS
        banks, counts = np.unique(per_bank, return_counts=True)
        starts = np.flatnonzero(np.diff(banks // _BANKS, prepend=-1))
        entry.passes += int(np.maximum.reduceat(counts, starts).sum()) if len(starts) else 0
        entry.ideal += len(np.unique(phase))
        entry.requests += len(np.unique(lanes // WARP))
        entry.bytes += len(lanes) * size

    def global_(self, pc: int, lanes: Ints, addresses: Ints, size: int, *, write: bool) -> None:
        """An access to global memory: sectors of 32 bytes per request of a warp."""
        entry = self.global_memory.setdefault(pc, AccessStats(write=write))
        warps = lanes // WARP
        sectors = np.unique(np.stack([warps, addresses // _SECTOR], axis=1), axis=0)
        distinct = np.unique(np.stack([warps, addresses], axis=1), axis=0)
        _, pieces = np.unique(distinct[:, 0], return_counts=True)
        entry.passes += len(sectors)
        entry.ideal += int((-(-pieces * size // _SECTOR)).sum())
        entry.requests += len(pieces)
        entry.bytes += len(lanes) * size
