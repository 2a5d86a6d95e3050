"""Accesses to global memory, compared when the launch is over: what was not ordered is a race.

Most of global memory is only read, so looking at every access when it happens would be a waste.
What is compared are accesses to bytes that somebody wrote: each read with the write before and the
write after it, and each write with the one before; where there are strong accesses, which nothing
need order among themselves, each of the others with all of them. Blocks are ordered by releases and
acquisitions through atomics alone (see `clocks`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gqa_cutlass.ptxsim.clocks import WARP, Clocks, Vector

Ints = NDArray[np.int64]
# What a cluster's blocks are known to have done, by the cluster's number.
Foreign = dict[int, Vector]


@dataclass(frozen=True, kw_only=True)
class _Accesses:
    """One instruction's accesses, [n] each."""

    start: Ints
    size: int
    lanes: Ints  # of the launch
    stamps: Ints
    synced: Ints
    versions: Ints
    write: bool
    strong: bool
    pc: int


@dataclass(frozen=True, kw_only=True)
class Race:
    """Two accesses that nothing orders: lanes of the launch, and positions in the code."""

    address: int
    lane: int
    pc: int
    write: bool
    other_lane: int
    other_pc: int
    other_write: bool


class GlobalLedger:
    """All accesses to global memory of one launch.

    Args:
        lanes_per_cluster: Threads of a cluster.
    """

    def __init__(self, lanes_per_cluster: int) -> None:
        self._cluster = lanes_per_cluster
        self._log: list[_Accesses] = []
        self._clocks: list[tuple[int, Clocks]] = []  # first lane of a batch of blocks
        # What each lane of the launch knew of other clusters after each time that it acquired.
        self._acquired: dict[int, list[Foreign]] = {}

    def begin(self, first_lane: int, clocks: Clocks) -> None:
        """A batch of blocks starts, whose lanes count from `first_lane`."""
        self._clocks.append((first_lane, clocks))

    def note(
        self, lanes: Ints, addresses: Ints, size: int, *, write: bool, strong: bool, pc: int
    ) -> None:
        """Note accesses of lanes of the present batch."""
        first, clocks = self._clocks[-1]
        warps = lanes // WARP
        self._log.append(
            _Accesses(
                start=addresses,
                size=size,
                lanes=lanes + first,
                stamps=clocks.stamps(lanes),
                synced=clocks.synced[warps],
                versions=clocks.versions(lanes),
                write=write,
                strong=strong,
                pc=pc,
            )  # fmt: skip
        )

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
        writes = [a for a in self._log if a.write]
        if not writes:
            return []
        unit = min(a.size & -a.size for a in self._log)
        touched = np.unique(np.concatenate([_units(a, unit).reshape(-1) for a in writes]))
        cells, entries, rows = [], [], []
        for i, access in enumerate(self._log):
            units = _units(access, unit)
            at = np.searchsorted(touched, units)
            hit = touched[np.minimum(at, len(touched) - 1)] == units
            row, column = np.nonzero(hit)
            cells.append(units[row, column])
            rows.append(row)
            entries.append(np.full(len(row), i))
        return self._compare(
            np.concatenate(cells), np.concatenate(entries), np.concatenate(rows), unit, limit
        )

    def _compare(self, cells: Ints, entries: Ints, rows: Ints, unit: int, limit: int) -> list[Race]:
        """Accesses to the same cell, in the order in which they happened."""
        order = np.lexsort((entries, cells))
        cells, entries, rows = cells[order], entries[order], rows[order]
        write = np.array([a.write for a in self._log])[entries]
        index = np.arange(len(cells))
        first = np.concatenate(([True], cells[1:] != cells[:-1]))
        start = np.maximum.accumulate(np.where(first, index, 0))
        last_write = np.maximum.accumulate(np.where(write, index, -1))
        before = np.concatenate(([-1], last_write[:-1]))
        later = before >= start  # has a write before it in the same cell
        pairs = [(before[later], index[later])]
        next_write = np.where(write, index, len(index))[::-1]
        next_write = np.minimum.accumulate(next_write)[::-1]
        has_next = ~write & (next_write < len(index))
        has_next[has_next] &= cells[next_write[has_next]] == cells[has_next]
        pairs.append((index[has_next], next_write[has_next]))
        pairs.append(self._mixed(cells, write, np.array([a.strong for a in self._log])[entries]))
        a = np.concatenate([p[0] for p in pairs])
        b = np.concatenate([p[1] for p in pairs])
        wrong = np.flatnonzero(~self._ordered(entries[a], rows[a], entries[b], rows[b]))
        wrong = wrong[np.lexsort((entries[a[wrong]], entries[b[wrong]]))]  # what came first
        return [
            self._race(int(cells[a[i]]) * unit, a[i], b[i], entries, rows) for i in wrong[:limit]
        ]

    def _mixed(
        self, cells: Ints, write: NDArray[np.bool_], strong: NDArray[np.bool_]
    ) -> tuple[Ints, Ints]:
        """Pairs of a plain and a strong access to the same cell, in the order of the cells."""
        at = np.flatnonzero(np.isin(cells, np.unique(cells[strong])))
        _, start, cell, count = np.unique(
            cells[at], return_index=True, return_inverse=True, return_counts=True
        )
        plain = np.flatnonzero(~strong[at])
        length, begin = count[cell[plain]], start[cell[plain]]
        one = at[np.repeat(plain, length)]
        # 0, 1, ..., length - 1 for every plain access, counted from the start of its cell.
        steps = np.arange(len(one)) - np.repeat(np.cumsum(length) - length, length)
        other = at[np.repeat(begin, length) + steps]
        both = strong[other] & (write[one] | write[other])
        return np.minimum(one, other)[both], np.maximum(one, other)[both]

    def _race(self, address: int, a: int, b: int, entries: Ints, rows: Ints) -> Race:
        one, two = self._log[entries[a]], self._log[entries[b]]
        return Race(
            address=address,
            lane=int(two.lanes[rows[b]]), pc=two.pc, write=two.write,
            other_lane=int(one.lanes[rows[a]]), other_pc=one.pc, other_write=one.write,
        )  # fmt: skip

    def _ordered(self, a: Ints, a_row: Ints, b: Ints, b_row: Ints) -> NDArray[np.bool_]:
        """Whether each access a happened before b, or both are atomic."""
        fine = np.zeros(len(a), dtype=bool)
        strong = np.array([x.strong for x in self._log])
        fine |= strong[a] & strong[b]
        keys = a * len(self._log) + b
        for key in np.unique(keys[~fine]):
            which = np.flatnonzero((keys == key) & ~fine)
            one, two = self._log[int(key) // len(self._log)], self._log[int(key) % len(self._log)]
            fine[which] = self._pairs(one, a_row[which], two, b_row[which])
        return fine

    def _pairs(self, a: _Accesses, a_row: Ints, b: _Accesses, b_row: Ints) -> NDArray[np.bool_]:
        lane_a, lane_b = a.lanes[a_row], b.lanes[b_row]
        epoch = a.stamps[a_row] >> 32
        fine: NDArray[np.bool_] = lane_a == lane_b
        same_warp = lane_a // WARP == lane_b // WARP
        fine |= same_warp & (epoch <= b.synced[b_row])
        rest = np.flatnonzero(~fine)
        of_a, of_b = lane_a[rest] // self._cluster, lane_b[rest] // self._cluster
        most = int(max(of_a.max(initial=0), of_b.max(initial=0))) + 1
        keys = (b.versions[b_row[rest]] * most + of_b) * most + of_a
        for key in np.unique(keys):
            which = rest[keys == key]
            row = self._knowledge(int(lane_b[which[0]]), int(key) // most // most, int(key) % most)
            if row is not None:
                fine[which] = row[lane_a[which] % self._cluster] >= epoch[which]
        return fine

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


def _units(access: _Accesses, unit: int) -> Ints:
    """The cells of `unit` bytes that accesses touch: [n, k]."""
    return access.start[:, None] // unit + np.arange(access.size // unit)


def merged(a: Foreign, b: Foreign) -> Foreign:
    """What was published by either."""
    if not a or not b:
        return a or b
    return {**a, **{c: np.maximum(a[c], v) if c in a else v for c, v in b.items()}}
