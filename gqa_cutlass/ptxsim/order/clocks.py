"""Who knows what: vector clocks over the threads of a cluster.

The happens-before order of PTX's memory model (PTX ISA 8), as FastTrack keeps it (Flanagan and
Freund, PLDI 2009), adapted to warps: all lanes of a warp share one epoch, which moves on whenever
one of them synchronises, and what a warp knows of others is kept per warp. What single lanes
acquired is kept apart until the warp synchronises.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

WARP = 32
Lanes = NDArray[np.int64]
Vector = NDArray[np.int32]
_HISTORY_BYTES = 64 << 20  # before what nobody needs is looked for
_ALWAYS = np.iinfo(np.int32).max


class Clocks:
    """Clocks of the blocks that run together.

    A vector has two entries per lane of the cluster: the epoch up to which the lane's doings are
    known, and behind all of these how many of its acquisitions of other clusters' writes to global
    memory are (see `GlobalLedger`). Behind those it has one entry per agent: what writes to shared
    memory asynchronously is no lane's doing, and its epochs are known to who waited for it.

    Args:
        blocks: How many blocks.
        threads: Threads per block, a multiple of 32.
        cluster: Blocks per cluster.
        agents: How many agents a block has.
    """

    def __init__(self, blocks: int, threads: int, cluster: int, agents: int = 0) -> None:
        self.lanes = threads * cluster
        self.warps = threads // WARP * cluster
        self.agents = agents
        self.columns = 2 * self.lanes + agents * cluster
        num_warps = blocks * (threads // WARP)
        self.epoch = np.ones(num_warps, dtype=np.int64)
        self.synced = np.zeros(num_warps, dtype=np.int64)  # epoch of the last sync of all lanes
        # Of a warp's own lanes no less than `synced`.
        self.known = np.zeros((num_warps, self.columns), dtype=np.int32)
        self._partial: dict[int, dict[int, Vector]] = {}  # by warp and lane
        # What a warp knew at earlier times, for accesses that are compared only later: by version.
        self.history: dict[int, Vector] = {0: np.zeros(self.columns, dtype=np.int32)}
        self.noted: Callable[[], list[int]] = list  # the versions that accesses were noted with
        self._next_version = 1
        self._least_room = max(1, _HISTORY_BYTES // self.known[0].nbytes)
        self._room = self._least_room
        self._version = np.zeros(num_warps, dtype=np.int64)
        self._partial_version: dict[int, tuple[int, int]] = {}  # of lanes, from the warp's version

    def stamps(self, lanes: Lanes) -> NDArray[np.int64]:
        """Stamps of accesses by lanes, positive: the epoch, and the lane in its cluster."""
        return self.epoch[lanes // WARP] << 32 | lanes % self.lanes

    def column_of_agent(self, rank: int, agent: int) -> int:
        """The entry of an agent of a block, by the block's rank in its cluster."""
        return 2 * self.lanes + rank * self.agents + agent % self.agents

    def alone(self, column: int, epoch: int) -> Vector:
        """What publishes one entry and nothing else."""
        vector = np.zeros(self.columns, dtype=np.int32)
        vector[column] = epoch
        return vector

    def is_known(self, lanes: Lanes, stamps: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Whether what was stamped happened before what lanes do now.

        Args:
            lanes: [n].
            stamps: [n, k].
        """
        owner = stamps & 0xFFFFFFFF
        epoch = stamps >> 32
        me = lanes[:, None]
        warp, own = me // WARP, me % self.lanes
        fine: NDArray[np.bool_] = (epoch <= self.synced[warp]) & (owner // WARP == own // WARP)
        fine |= owner == own
        if fine.all():
            return fine
        fine |= epoch <= self.known.reshape(-1)[warp * self.columns + owner]
        if self._partial and not fine.all():
            for row, column in np.argwhere(~fine):
                vector = self._partial_of(int(lanes[row]))
                if vector is not None:
                    fine[row, column] = vector[owner[row, column]] >= epoch[row, column]
        return fine

    def known_of(self, lanes: Lanes, warp: int) -> Vector:
        """Up to which epoch lanes know the doings of a warp of their cluster: [n, 32]."""
        if self._partial and len(lanes) > WARP:  # copies ask for every granule of a tile
            distinct, rows = np.unique(lanes, return_inverse=True)
            if len(distinct) < len(lanes):
                return self.known_of(distinct, warp)[rows]
        first = warp * WARP
        known = self.known[lanes // WARP, first : first + WARP]
        for row, lane in enumerate(lanes.tolist() if self._partial else ()):
            extra = self._partial_of(lane)
            if extra is not None:
                np.maximum(known[row], extra[first : first + WARP], out=known[row])
        place = lanes % self.lanes - first
        mine = np.flatnonzero((place >= 0) & (place < WARP))
        known[mine, place[mine]] = _ALWAYS
        return known

    def release_own(self, lane: int) -> Vector:
        """What a lane publishes of its own doings alone, not of what it knows. [columns]."""
        warp = lane // WARP
        vector = self.alone(lane % self.lanes, int(self.epoch[warp]))
        self.epoch[warp] += 1
        return vector

    def warp_sync(self, warps: Lanes) -> None:
        """All lanes of these warps have met."""
        for warp in self._partial.keys() & set(warps.tolist()) if self._partial else ():
            self._learn(warp, np.maximum.reduce(list(self._partial.pop(warp).values())))
        self.synced[warps] = self.epoch[warps]
        own = (warps * WARP % self.lanes)[:, None] + np.arange(WARP)
        self.known[warps[:, None], own] = self.synced[warps][:, None]
        self.epoch[warps] += 1

    def release(self, lanes: Lanes) -> Vector:
        """What these lanes of one warp publish: what they did and what they know. [columns]."""
        warp = int(lanes[0]) // WARP
        vector: Vector = self.known[warp].copy()
        for lane in lanes.tolist() if self._partial else ():
            extra = self._partial_of(lane)
            if extra is not None:
                np.maximum(vector, extra, out=vector)
        vector[lanes % self.lanes] = self.epoch[warp]
        self.epoch[warp] += 1
        return vector

    def barrier(self, warps: Lanes) -> None:
        """Barriers that all lanes of these warps passed, one per row: [barriers, warps]."""
        self.warp_sync(warps.reshape(-1))
        joined = self.known[warps].max(axis=1)
        self.known[warps] = joined[:, None, :]
        self._version[warps] = self._enter(joined) + np.arange(len(warps))[:, None]

    def acquire(self, lanes: Lanes, vector: Vector) -> None:
        """These lanes of one warp learn what was published."""
        warp = int(lanes[0]) // WARP
        if len(lanes) == WARP:
            self._learn(warp, vector)
            return
        held = self._partial.setdefault(warp, {})
        for lane in lanes.tolist():
            held[lane] = np.maximum(held[lane], vector) if lane in held else vector
            self._partial_version.pop(lane, None)

    def _learn(self, warp: int, vector: Vector) -> None:
        np.maximum(self.known[warp], vector, out=self.known[warp])
        self._version[warp] = self._enter(self.known[warp : warp + 1].copy())

    def _enter(self, vectors: NDArray[np.int32]) -> int:
        """Keep what is known, [n, columns], in `history`; returns the first of n versions."""
        if len(self.history) + len(vectors) > self._room:
            self.forget()
        first = self._next_version
        self._next_version += len(vectors)
        self.history.update(zip(range(first, self._next_version), vectors, strict=True))
        return first

    def forget(self) -> None:
        """Forget the versions that nobody has and no access was noted with."""
        self._partial_version = {
            lane: version
            for lane, version in self._partial_version.items()
            if self._partial_of(lane) is not None
        }
        used = {*self._version.tolist(), *self.noted()}
        used |= {version for _, version in self._partial_version.values()}
        self.history = {version: self.history[version].copy() for version in used}
        self._room = max(self._least_room, 2 * len(self.history))

    @property
    def history_bytes(self) -> int:
        """What `history` takes."""
        return len(self.history) * self.known.itemsize * self.columns

    def finish(self) -> None:
        """Nothing more will happen; `history` stays."""
        self.known = self.known[:0].copy()

    def versions(self, lanes: Lanes) -> NDArray[np.int64]:
        """What lanes know now, as positions in `history`."""
        versions: NDArray[np.int64] = self._version[lanes // WARP]
        for i, lane in enumerate(lanes.tolist() if self._partial else ()):
            extra = self._partial_of(lane)
            if extra is not None:
                versions[i] = self._version_with(lane, extra, int(versions[i]))
        return versions

    def _version_with(self, lane: int, extra: Vector, base: int) -> int:
        """Position in `history` of what a lane knows beyond its warp, entered once."""
        found = self._partial_version.get(lane)
        if found is None or found[0] != base:
            known = np.maximum(self.known[lane // WARP], extra)
            found = self._partial_version[lane] = base, self._enter(known[None, :])
        return found[1]

    def _partial_of(self, lane: int) -> Vector | None:
        held = self._partial.get(lane // WARP)
        return None if held is None else held.get(lane)


def by_warp(lanes: Lanes) -> Iterator[Lanes]:
    """The lanes of every warp."""
    warps = lanes // WARP
    for warp in np.unique(warps):
        yield lanes[warps == warp]


def joined(a: Vector | None, b: Vector | None) -> Vector | None:
    """What is known by either."""
    if a is None or b is None:
        return b if a is None else a
    return np.maximum(a, b)
