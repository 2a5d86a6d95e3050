"""What atomics, strong loads and stores, and fences order (PTX ISA 8.9, release and acquire)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gqa_cutlass.ptxsim.clocks import WARP, Vector
from gqa_cutlass.ptxsim.ledger import Foreign, merged
from gqa_cutlass.ptxsim.memory import AccessError

if TYPE_CHECKING:
    from gqa_cutlass.ptxsim.machine import Group, Machine

Ints = NDArray[np.int64]
SCOPES = ("cta", "cluster", "gpu")  # the narrower, the earlier; the system is one GPU

# Whose accesses of a scope include one another: the scope, and which block or cluster.
Place = tuple[str, int]
Published = dict[Place, Foreign]
# What was published through a cell, by space, block (of shared memory) and address.
Cells = dict[tuple[str, int, int], Published]


class Atomics:
    """The order that the lanes of one machine get from strong accesses.

    A release publishes what a lane did and knows through a cell; a read-modify-write adds to what
    others published there, a store replaces it. A fence lets later relaxed accesses publish what
    came before it, and makes known what earlier ones saw. Two accesses order something if the scope
    of each includes the other's thread: so a release of a scope is published in the lane's place at
    this scope and at all narrower ones, and an acquisition looks in as many.

    Args:
        machine: Whose lanes.
        cells: Of global memory, which outlive the machine.
    """

    def __init__(self, machine: Machine, cells: Cells) -> None:
        self._machine = machine
        self._cells = cells
        self._fenced: dict[int, Published] = {}  # by lane
        self._observed: dict[int, Published] = {}

    def read(self, group: Group, space: str, addresses: Ints, scope: str, acquire: bool) -> None:
        """Lanes read strongly."""
        if self._machine.context.ledger is None:
            return
        for key, lanes in self._by_cell(group, space, addresses).items():
            self._see(lanes, self._cells.get(key[1:], {}), scope, acquire)

    def write(self, group: Group, space: str, addresses: Ints, scope: str, release: bool) -> None:
        """Lanes store strongly."""
        if self._machine.context.ledger is None:
            return
        for key, lanes in self._by_cell(group, space, addresses).items():
            self._cells[key[1:]] = self._published(int(lanes[-1]), scope, release)

    def update(
        self,
        group: Group,
        space: str,
        addresses: Ints,
        scope: str,
        order: str,
        wrote: NDArray[np.bool_],
    ) -> None:
        """Lanes read, modify and (where a comparison did not fail) write, one after another."""
        if self._machine.context.ledger is None:
            return
        for lane, address, writes in zip(
            group.lanes.tolist(), addresses.tolist(), wrote.tolist(), strict=True
        ):
            key = self._key(lane, space, address)
            seen = self._cells.get(key, {})
            if writes:
                published = self._published(lane, scope, order in ("release", "acq_rel"))
                self._cells[key] = _joined(seen, published)
            self._see(np.array([lane]), seen, scope, order in ("acquire", "acq_rel"))

    def fence(self, group: Group, scope: str) -> None:
        """Lanes execute a fence."""
        if self._machine.context.ledger is None:
            return
        for lane in group.lanes.tolist():
            self._acquire(np.array([lane]), self._observed.get(lane, {}), scope)
            published = self._published(lane, scope, release=True)
            self._fenced[lane] = {**self._fenced.get(lane, {}), **published}

    def fence_inits(self, group: Group) -> None:
        """Lanes execute `fence.mbarrier_init`: to their cluster, their mbarriers alone."""
        if self._machine.context.ledger is None:
            return
        for lane in group.lanes.tolist():
            vector = self._machine.mbarriers.inits.get(lane)
            if vector is not None:
                places = self._places(lane, "cluster")
                published = dict.fromkeys(places, {places[-1][1]: vector})
                self._fenced[lane] = _joined(self._fenced.get(lane, {}), published)

    def fenced(self, lane: int, scope: str) -> Vector | None:
        """What a fence lets a relaxed arrival of a lane publish to its cluster."""
        places = self._places(lane, scope)
        cluster = self._places(lane, "cluster")[-1][1]
        return self._fenced.get(lane, {}).get(places[-1], {}).get(cluster)

    def observe(self, lanes: Ints, vector: Vector, scope: str) -> None:
        """Lanes of a warp saw, relaxed, what others of their cluster published by arriving."""
        if self._machine.context.ledger is not None:
            lane = int(lanes[0])
            seen = {self._places(lane, "cluster")[-1][1]: vector}
            self._see(lanes, {self._places(lane, scope)[-1]: seen}, scope, acquire=False)

    def _places(self, lane: int, scope: str) -> list[Place]:
        machine = self._machine
        block = machine.first_block + lane // machine.threads
        numbers = (block, block // machine.context.launch.cluster_size, 0)
        count = SCOPES.index(scope) + 1
        return list(zip(SCOPES[:count], numbers, strict=False))

    def _published(self, lane: int, scope: str, release: bool) -> Published:
        places = self._places(lane, scope)
        if not release:
            fenced = self._fenced.get(lane, {})
            return {place: fenced[place] for place in places if place in fenced}
        ledger = self._machine.context.ledger
        assert ledger is not None, "nothing is published without a ledger"
        vector = self._machine.clocks.release(np.array([lane]))
        return dict.fromkeys(places, ledger.publish(lane, vector))

    def _see(self, lanes: Ints, seen: Published, scope: str, acquire: bool) -> None:
        if acquire:
            self._acquire(lanes, seen, scope)
            return
        mine = {p: seen[p] for p in self._places(int(lanes[0]), scope) if p in seen}
        for lane in lanes.tolist() if mine else ():
            self._observed[lane] = _joined(self._observed.get(lane, {}), mine)

    def _acquire(self, lanes: Ints, seen: Published, scope: str) -> None:
        """Lanes of a warp learn what is in their places."""
        known: Foreign = {}
        for place in self._places(int(lanes[0]), scope):
            known = merged(known, seen.get(place, {}))
        ledger = self._machine.context.ledger
        if known and ledger is not None:
            ledger.acquire(lanes, known)

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


def _joined(a: Published, b: Published) -> Published:
    """What was published by either."""
    return {place: merged(a.get(place, {}), b.get(place, {})) for place in a.keys() | b.keys()}
