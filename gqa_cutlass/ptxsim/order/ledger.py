"""Accesses to global memory, compared when the launch is over: what was not ordered is a race.

Most of global memory is only read, so looking at every access when it happens would be a waste.
What is compared are accesses to bytes that somebody wrote: each read with the write before and the
write after it, and each write with the one before; where there are strong accesses, which nothing
need order among themselves, each of the others with all of them. Blocks are ordered by releases and
acquisitions through atomics alone (see `clocks`).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from gqa_cutlass.ptxsim.order.clocks import WARP, Clocks, Vector
from gqa_cutlass.ptxsim.order.races import Accesses, Race, find_races

Ints = NDArray[np.int64]
_NOTHING: Ints = np.zeros(0, dtype=np.int64)
# Bytes of accesses that are kept before they are compared, and for every byte of the tensors; at
# most so many are kept in the end. Reading everything once takes 2.5 (by 16 bytes) to 40 (by one).
_ROOM, _ROOM_PER_BYTE = 256 << 20, 4
_MOST, _MOST_PER_BYTE = 1 << 30, 64
# What a cluster's blocks are known to have done, by the cluster's number.
Foreign = dict[int, Vector]


class GlobalLedger:
    """All accesses to global memory of one launch.

    When they are many, those so far are compared, and of those that a lane makes again and again
    only the last is kept: what comes later and is ordered after the last is ordered after all.

    Args:
        lanes_per_cluster: Threads of a cluster.
        num_bytes: Of all the tensors of the launch.
        room: Bytes of accesses that are kept before they are compared, for small tensors.
    """

    def __init__(self, lanes_per_cluster: int, num_bytes: int = 0, room: int = _ROOM) -> None:
        self._cluster = lanes_per_cluster
        self._log: list[Accesses] = []
        self._first_of_batch = 0
        self._found: list[Race] = []  # before the launch is over
        self._least_room = room + _ROOM_PER_BYTE * num_bytes
        self._most = _MOST + _MOST_PER_BYTE * num_bytes
        self._room = self._least_room
        self._logged = 0  # bytes
        self._kept = 0  # bytes of `_acquired`
        self._clocks: list[tuple[int, Clocks]] = []  # first lane of a batch of blocks
        # What each lane of the launch knew of other clusters after each time that it acquired.
        self._acquired: dict[int, list[Foreign]] = {}

    def begin(self, first_lane: int, clocks: Clocks) -> None:
        """A batch of blocks starts, whose lanes count from `first_lane`."""
        if self._clocks:
            _, last = self._clocks[-1]
            self._logged += last.history_bytes
            last.finish()
        self._first_of_batch = len(self._log)
        clocks.noted = self._noted
        self._clocks.append((first_lane, clocks))

    def _noted(self) -> list[int]:
        """The versions of the present batch's clocks that accesses were noted with."""
        versions = [a.versions for a in self._log[self._first_of_batch :] if not a.settled]
        used: list[int] = np.unique(np.concatenate([_NOTHING, *versions])).tolist()
        return used

    @property
    def overfull(self) -> str:
        """How many bytes of how many that are allowed all this takes, or "" if that is less."""
        taken = self._logged + self._kept
        return f"{taken} bytes; allowed: {self._most}" if taken > self._most else ""

    def note(
        self, lanes: Ints, addresses: Ints, size: int, *, write: bool, strong: bool, pc: int
    ) -> None:
        """Note accesses of lanes of the present batch."""
        if self._found:
            return
        first, clocks = self._clocks[-1]
        warps = lanes // WARP
        accesses = Accesses(
            start=addresses,
            size=size,
            lanes=lanes + first,
            stamps=clocks.stamps(lanes),
            synced=clocks.synced[warps],
            versions=clocks.versions(lanes),
            write=write,
            strong=strong,
            pc=pc,
        )
        self._log.append(accesses)
        self._logged += accesses.num_bytes
        if self._logged > self._room:
            self._settle()

    def _settle(self) -> None:
        """Compare what is there, and keep what later accesses have to be compared with."""
        self._found = self.races()
        latest = {} if self._found else {a.key(): i for i, a in enumerate(self._log)}
        self._log = [self._log[i].settle() for i in sorted(latest.values())]
        self._first_of_batch = len(self._log)
        self._clocks = self._clocks[-1:]
        self._clocks[0][1].forget()
        self._logged = sum(a.num_bytes for a in self._log)
        self._room = max(self._least_room, 2 * self._logged)

    def acquire(self, lanes: Ints, seen: Foreign) -> None:
        """Lanes of one warp of the present batch learn what was published."""
        first, clocks = self._clocks[-1]
        for lane in lanes.tolist():
            cluster = (lane + first) // self._cluster
            learned = seen.get(cluster, np.zeros(clocks.columns, dtype=np.int32)).copy()
            others = {c: vector for c, vector in seen.items() if c != cluster}
            if others:
                learned[clocks.lanes + lane % clocks.lanes] = self._enter(lane + first, others)
            clocks.acquire(np.array([lane]), learned)

    def _enter(self, lane: int, seen: Foreign) -> int:
        """Add to what a lane acquired; returns how many times it has."""
        held = self._acquired.setdefault(lane, [])
        before = held[-1] if held else {}
        if any(c not in before or (v > before[c]).any() for c, v in seen.items()):
            held.append(merged(before, seen))
            self._kept += sum(v.nbytes for v in seen.values())
        return len(held)

    def publish(self, lane: int, vector: Vector) -> Foreign:
        """What a lane of the present batch releases: its cluster's doings and what it knows."""
        first, _ = self._clocks[-1]
        cluster = (lane + first) // self._cluster
        known: Foreign = {}
        for acquired in self._foreign(cluster, vector):
            known = merged(known, acquired)
        return {**known, cluster: vector}

    def _foreign(self, cluster: int, vector: Vector) -> Iterator[Foreign]:
        """What is known of other clusters by who knows a vector of this one."""
        times = vector[self._cluster : 2 * self._cluster]
        for place in np.flatnonzero(times).tolist():
            yield self._acquired[cluster * self._cluster + place][times[place] - 1]

    def races(self, limit: int = 1) -> list[Race]:
        """Pairs of accesses that nothing orders; at most `limit`."""
        if self._found:
            return self._found[:limit]
        return find_races(self._log, self._cluster, self._knowledge, limit)

    def _knowledge(self, lane: int, version: int, of_cluster: int) -> Vector | None:
        """What a lane knew of a cluster's lanes."""
        row = self._clocks_of(lane).history[version]
        cluster = lane // self._cluster
        if cluster == of_cluster:
            return row
        found = [f[of_cluster] for f in self._foreign(cluster, row) if of_cluster in f]
        return np.maximum.reduce(found) if found else None

    def _clocks_of(self, lane: int) -> Clocks:
        return next(clocks for first, clocks in reversed(self._clocks) if first <= lane)


def merged(a: Foreign, b: Foreign) -> Foreign:
    """What was published by either."""
    if not a or not b:
        return a or b
    return {**a, **{c: np.maximum(a[c], v) if c in a else v for c, v in b.items()}}
