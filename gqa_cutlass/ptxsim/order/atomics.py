"""What atomics, strong loads and stores, and fences order (PTX ISA 8.9, release and acquire)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gqa_cutlass.ptxsim.memory.spaces import AccessError
from gqa_cutlass.ptxsim.order.clocks import WARP, Vector
from gqa_cutlass.ptxsim.order.ledger import Foreign, merged

if TYPE_CHECKING:
    from gqa_cutlass.ptxsim.group import Group
    from gqa_cutlass.ptxsim.machine import Machine

Ints = NDArray[np.int64]
SCOPES = ("cta", "cluster", "gpu")  # the narrower, the earlier; the system is one GPU

# Whose accesses of a scope include one another: the scope, and which block or cluster.
Place = tuple[str, int]
Published = dict[Place, Foreign]
Cell = tuple[int, int]  # block of the launch, or -1 in global memory, and address
Cells = dict[Cell, Published]  # what was published through a cell, if there is anything
_CELLS_BYTES = 1 << 30  # of what is published through cells
_VECTOR = 256  # times what an access takes


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
        self._most_cells = _CELLS_BYTES // machine.clocks.known[0].nbytes
        self._fenced: dict[int, Published] = {}  # by lane
        self._observed: dict[int, Published] = {}

    def read(self, group: Group, space: str, addresses: Ints, scope: str, acquire: bool) -> None:
        """Lanes read strongly."""
        if self._machine.context.ledger is None or not self._cells:
            return
        for cell, lanes in self._by_cell(group, space, addresses):
            if cell in self._cells:
                self._see(lanes, self._cells[cell], scope, acquire)

    def write(self, group: Group, space: str, addresses: Ints, scope: str, release: bool) -> None:
        """Lanes store strongly."""
        if self._machine.context.ledger is None:
            return
        for cell, lanes in self._by_cell(group, space, addresses):
            self._keep(cell, int(lanes[-1]), self._published(int(lanes[-1]), scope, release))

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
        blocks, places = self._places_in_memory(group, space, addresses)
        for lane, block, place, writes in zip(
            group.lanes.tolist(), blocks.tolist(), places.tolist(), wrote.tolist(), strict=True
        ):
            cell = block, place
            seen = self._cells.get(cell, {})
            if writes:
                published = self._published(lane, scope, order in ("release", "acq_rel"))
                self._keep(cell, lane, _joined(seen, published))
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
        self._machine.progress.one_by_one(_VECTOR)
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
            self._machine.progress.one_by_one(_VECTOR * len(lanes))
            ledger.acquire(lanes, known)

    def _keep(self, cell: Cell, lane: int, published: Published) -> None:
        """From now on this is what was published through a cell."""
        if not published:
            self._cells.pop(cell, None)
            return
        self._cells[cell] = published
        if len(self._cells) > self._most_cells:
            raise self._machine.fault(
                f"what was published through {len(self._cells)} cells cannot be kept, to find "
                f"races; allowed: {self._most_cells}. Look for races in a smaller launch, or not "
                "at all",
                lane,
            )

    def _places_in_memory(self, group: Group, space: str, addresses: Ints) -> tuple[Ints, Ints]:
        """Block of the launch (-1 in global memory) and address of every lane's cell."""
        if space == "global":
            return np.full(len(addresses), -1), addresses
        machine = self._machine
        try:
            blocks, local = machine.shared_places(group.lanes, addresses, space)
        except AccessError as error:
            raise machine.memory_fault(error, group.lanes, space) from None
        return machine.first_block + blocks, local

    def _by_cell(self, group: Group, space: str, addresses: Ints) -> Iterator[tuple[Cell, Ints]]:
        """Lanes by warp and cell."""
        blocks, places = self._places_in_memory(group, space, addresses)
        keys = np.stack([places, blocks, group.lanes // WARP])
        order = np.lexsort(keys)
        keys, lanes = keys[:, order], group.lanes[order]
        starts = np.flatnonzero(np.any(keys[:, 1:] != keys[:, :-1], axis=0)) + 1
        for which in np.split(np.arange(len(lanes)), starts):
            yield (int(keys[1, which[0]]), int(keys[0, which[0]])), lanes[which]


def _joined(a: Published, b: Published) -> Published:
    """What was published by either."""
    return {place: merged(a.get(place, {}), b.get(place, {})) for place in a.keys() | b.keys()}
