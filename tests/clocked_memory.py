"""Memory of a few threads, whose accesses are ordered by vector clocks alone.

Lanes are numbered through all blocks; the first warp holds lanes 0 to 31, the second 32 to 63.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from gqa_cutlass.ptxsim.order.clocks import WARP, Clocks
from gqa_cutlass.ptxsim.order.ledger import Foreign, GlobalLedger
from gqa_cutlass.ptxsim.order.shadow import Shadow, ShadowError

GRANULE = 4


class Block:
    """Shared memory of a cluster whose blocks have `warps` warps each."""

    def __init__(self, warps: int = 2, cluster: int = 1, races: bool = True) -> None:
        self.clocks = Clocks(cluster, warps * WARP, cluster)
        self.shadow = Shadow(16 * GRANULE, GRANULE, self.clocks, races)
        self.threads = warps * WARP

    def read(self, *lanes: int, cell: int = 0, granules: int = 1) -> None:
        self.shadow.read(np.array(lanes), self._at(lanes, cell), granules * GRANULE)

    def write(self, *lanes: int, cell: int = 0, strong: bool = False) -> None:
        self.shadow.write(np.array(lanes), self._at(lanes, cell), GRANULE, strong)

    def read_strong(self, *lanes: int, cell: int = 0) -> None:
        self.shadow.read_strong(np.array(lanes), self._at(lanes, cell), GRANULE)

    def update(self, *lanes: int, cell: int = 0) -> None:
        self.shadow.update(np.array(lanes), self._at(lanes, cell), GRANULE)

    def copy(self, *lanes: int, cell: int = 0) -> Any:
        return self.shadow.begin_copy(np.array(lanes), self._at(lanes, cell), GRANULE)

    def _at(self, lanes: tuple[int, ...], cell: int) -> Any:
        return np.full(len(lanes), cell * GRANULE)

    def warp_sync(self, *warps: int) -> None:
        self.clocks.warp_sync(np.array(warps))

    def barrier(self) -> None:
        self.clocks.barrier(np.arange(self.clocks.warps)[None])

    def hand_over(self, source: int | tuple[int, ...], *targets: int) -> None:
        """What `source` knows and did is known to `targets`, lanes of one warp."""
        lanes = (source,) if isinstance(source, int) else source
        self.clocks.acquire(np.array(targets), self.clocks.release(np.array(lanes)))


def race(what: str) -> Any:
    return pytest.raises(ShadowError, match=f"race: {what}")


class Grid:
    """Global memory of a launch of blocks of two warps."""

    def __init__(self, blocks: int = 2, cluster: int = 1) -> None:
        self.threads = 2 * WARP
        self.clocks = Clocks(blocks, self.threads, cluster)
        self.ledger = GlobalLedger(self.threads * cluster)
        self.ledger.begin(0, self.clocks)

    def note(
        self, *lanes: int, write: bool, strong: bool = False, at: int = 0, size: int = 4
    ) -> None:
        addresses = np.full(len(lanes), 4096 + at)
        self.ledger.note(np.array(lanes), addresses, size, write=write, strong=strong, pc=0)

    def write(self, *lanes: int, at: int = 0, size: int = 4) -> None:
        self.note(*lanes, write=True, at=at, size=size)

    def read(self, *lanes: int, at: int = 0, size: int = 4) -> None:
        self.note(*lanes, write=False, at=at, size=size)

    def release(self, lane: int) -> Foreign:
        return self.ledger.publish(lane, self.clocks.release(np.array([lane])))

    def hand_over(self, source: int, *targets: int) -> None:
        self.ledger.acquire(np.array(targets), self.release(source))

    def races(self) -> list[tuple[int, int]]:
        """Lanes of every race, the earlier one first."""
        return [(r.other_lane, r.lane) for r in self.ledger.races(limit=100)]
