"""What atomics, strong loads and stores, and fences order (PTX ISA 8.9, release and acquire)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gqa_cutlass.ptxsim.clocks import WARP
from gqa_cutlass.ptxsim.ledger import Foreign
from gqa_cutlass.ptxsim.memory import AccessError

if TYPE_CHECKING:
    from gqa_cutlass.ptxsim.machine import Group, Machine

Ints = NDArray[np.int64]
# What was published through a cell, by space, block (of shared memory) and address.
Cells = dict[tuple[str, int, int], Foreign]


class Atomics:
    """The order that the lanes of one machine get from strong accesses.

    A release publishes what a lane did and knows through a cell; a read-modify-write adds to what
    others published there, a store replaces it. A fence lets later relaxed accesses publish what
    came before it, and makes known what earlier ones saw.

    Args:
        machine: Whose lanes.
        cells: Of global memory, which outlive the machine.
    """

    def __init__(self, machine: Machine, cells: Cells) -> None:
        self._machine = machine
        self._cells = cells
        self._fenced: dict[int, Foreign] = {}
        self._observed: dict[int, Foreign] = {}

    def read(self, group: Group, space: str, addresses: Ints, acquire: bool) -> None:
        """Lanes read strongly."""
        if self._machine.context.ledger is None:
            return
        for key, lanes in self._by_cell(group, space, addresses).items():
            self._see(lanes, self._cells.get(key[1:], {}), acquire)

    def write(self, group: Group, space: str, addresses: Ints, release: bool) -> None:
        """Lanes store strongly."""
        if self._machine.context.ledger is None:
            return
        for key, lanes in self._by_cell(group, space, addresses).items():
            self._cells[key[1:]] = self._published(int(lanes[-1]), release)

    def update(self, group: Group, space: str, addresses: Ints, order: str) -> None:
        """Lanes read, modify and write, one after another."""
        if self._machine.context.ledger is None:
            return
        for lane, address in zip(group.lanes, addresses, strict=True):
            key = self._key(int(lane), space, int(address))
            seen = self._cells.get(key, {})
            published = self._published(int(lane), order in ("release", "acq_rel"))
            self._see(np.array([lane]), seen, order in ("acquire", "acq_rel"))
            self._cells[key] = merged(seen, published)

    def fence(self, group: Group) -> None:
        """Lanes execute a fence."""
        if self._machine.context.ledger is None:
            return
        for lane in group.lanes.tolist():
            seen = self._observed.pop(lane, None)
            if seen:
                self._machine.context.ledger.acquire(np.array([lane]), seen)
            self._fenced[lane] = self._publish(lane)

    def _publish(self, lane: int) -> Foreign:
        ledger = self._machine.context.ledger
        assert ledger is not None
        return ledger.publish(lane, self._machine.clocks.release(np.array([lane])))

    def _published(self, lane: int, release: bool) -> Foreign:
        return self._publish(lane) if release else self._fenced.get(lane, {})

    def _see(self, lanes: Ints, seen: Foreign, acquire: bool) -> None:
        if not seen:
            return
        if acquire:
            assert self._machine.context.ledger is not None
            self._machine.context.ledger.acquire(lanes, seen)
            return
        for lane in lanes.tolist():
            self._observed[lane] = merged(self._observed.get(lane, {}), seen)

    def _key(self, lane: int, space: str, address: int) -> tuple[str, int, int]:
        if space == "global":
            return "global", 0, address
        machine = self._machine
        lanes = np.array([lane])
        try:
            blocks, local = machine.shared_places(lanes, np.array([address]), space)
        except AccessError as error:
            raise machine.memory_fault(error, lanes, space) from None
        return "shared", machine.first_block + int(blocks[0]), int(local[0])

    def _by_cell(
        self, group: Group, space: str, addresses: Ints
    ) -> dict[tuple[int, str, int, int], Ints]:
        """Lanes by warp and cell."""
        cells: dict[tuple[int, str, int, int], list[int]] = {}
        for lane, address in zip(group.lanes.tolist(), addresses.tolist(), strict=True):
            cells.setdefault((lane // WARP, *self._key(lane, space, address)), []).append(lane)
        return {key: np.array(lanes) for key, lanes in cells.items()}


def merged(a: Foreign, b: Foreign) -> Foreign:
    """What was published by either."""
    if not a or not b:
        return a or b
    return {**a, **{c: np.maximum(a[c], v) if c in a else v for c, v in b.items()}}
