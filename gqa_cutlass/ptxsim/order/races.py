"""Accesses to global memory compared: pairs that nothing orders (see `ledger`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from gqa_cutlass.ptxsim.order.clocks import WARP, Vector

Ints = NDArray[np.int64]
Mask = NDArray[np.bool_]
# What a lane knew at a version of its clocks of the lanes of a cluster, or None for nothing.
Knowledge = Callable[[int, int, int], Vector | None]
_PAIRS = 1 << 21  # compared at once
_NOTHING: Ints = np.zeros(0, dtype=np.int64)


@dataclass(frozen=True, kw_only=True)
class Accesses:
    """One instruction's accesses.

    Args:
        start: Addresses, [n].
        size: Bytes of each.
        lanes: Of the launch, [n].
        stamps: Of `Clocks`, [n].
        synced: The last synchronisation of each lane's warp, [n].
        versions: What each lane knew, [n].
        write: Whether they write.
        strong: Whether they are strong, which may race with one another.
        pc: Position of the instruction.
        settled: Compared with all accesses before; then `synced` and `versions` are not needed.
    """

    start: Ints
    size: int
    lanes: Ints
    stamps: Ints
    synced: Ints
    versions: Ints
    write: bool
    strong: bool
    pc: int
    settled: bool = False

    @property
    def num_bytes(self) -> int:
        """What this takes."""
        arrays = self.start, self.lanes, self.stamps, self.synced, self.versions
        return sum(a.nbytes for a in arrays)

    def settle(self) -> Accesses:
        """The same, once it is compared with all that was before."""
        return replace(self, synced=_NOTHING, versions=_NOTHING, settled=True)

    def key(self) -> tuple[object, ...]:
        """Which accesses these are, whenever they happened."""
        where = blake2b(self.start.tobytes() + self.lanes.tobytes()).digest()
        return self.pc, self.size, self.write, self.strong, where


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


@dataclass(frozen=True, kw_only=True)
class _Hits:
    """Accesses to cells that somebody wrote, [n] each: by cell, and then as they happened."""

    cell: Ints
    entry: Ints
    lane: Ints
    epoch: Ints
    synced: Ints
    version: Ints
    write: Mask
    strong: Mask
    settled: Mask


def find_races(
    log: Sequence[Accesses], cluster: int, knowledge: Knowledge, limit: int
) -> list[Race]:
    """The first pairs of accesses that nothing orders, and that are not both settled.

    Args:
        log: In the order in which they happened.
        cluster: Lanes of a cluster.
        knowledge: What lanes knew.
        limit: How many to return at most.
    """
    if not any(a.write for a in log):
        return []
    unit = min(a.size & -a.size for a in log)
    hits = _hits(log, unit)
    first, second = _NOTHING, _NOTHING
    for a, b in _pairs(hits):
        wrong = ~_ordered(hits, a, b, cluster, knowledge)
        first, second = np.append(first, a[wrong]), np.append(second, b[wrong])
        earliest = np.lexsort((hits.entry[first], hits.entry[second]))[:limit]
        first, second = first[earliest], second[earliest]
    return [_race(log, hits, unit, i, j) for i, j in zip(first, second, strict=True)]


def _hits(log: Sequence[Accesses], unit: int) -> _Hits:
    touched = np.unique(np.concatenate([_units(a, unit).reshape(-1) for a in log if a.write]))
    cells, entries, columns = [], [], []
    for i, access in enumerate(log):
        units = _units(access, unit)
        at = np.searchsorted(touched, units)
        row, column = np.nonzero(touched[np.minimum(at, len(touched) - 1)] == units)
        cells.append(units[row, column])
        entries.append(np.full(len(row), i))
        known = (0 * row, 0 * row) if access.settled else (access.synced[row], access.versions[row])
        columns.append((access.lanes[row], access.stamps[row] >> 32, *known))
    cell, entry = np.concatenate(cells), np.concatenate(entries)
    lane, epoch, synced, version = (np.concatenate(c) for c in zip(*columns, strict=True))
    order = np.lexsort((entry, cell))
    entry = entry[order]
    return _Hits(
        cell=cell[order],
        entry=entry,
        lane=lane[order],
        epoch=epoch[order],
        synced=synced[order],
        version=version[order],
        write=np.array([a.write for a in log])[entry],
        strong=np.array([a.strong for a in log])[entry],
        settled=np.array([a.settled for a in log])[entry],
    )


def _units(access: Accesses, unit: int) -> Ints:
    """The cells of `unit` bytes that accesses touch: [n, k]."""
    return access.start[:, None] // unit + np.arange(access.size // unit)


def _pairs(hits: _Hits) -> Iterator[tuple[Ints, Ints]]:
    """What must be ordered: positions of the earlier and of the later access."""
    index = np.arange(len(hits.cell))
    first = np.concatenate(([True], hits.cell[1:] != hits.cell[:-1]))
    start = np.maximum.accumulate(np.where(first, index, 0))
    last_write = np.maximum.accumulate(np.where(hits.write, index, -1))
    before = np.concatenate(([-1], last_write[:-1]))
    later = before >= start  # has a write before it in the same cell
    yield before[later], index[later]
    next_write = np.where(hits.write, index, len(index))[::-1]
    next_write = np.minimum.accumulate(next_write)[::-1]
    has_next = ~hits.write & (next_write < len(index))
    has_next[has_next] &= hits.cell[next_write[has_next]] == hits.cell[has_next]
    yield index[has_next], next_write[has_next]
    plain, strong = ~hits.strong, hits.strong
    yield from _products(hits.cell, plain & hits.write, strong)
    yield from _products(hits.cell, plain & ~hits.write, strong & hits.write)


def _products(cell: Ints, some: Mask, others: Mask) -> Iterator[tuple[Ints, Ints]]:
    """All pairs of one of `some` and one of `others` in the same cell, not too many at once."""
    one, other = np.flatnonzero(some), np.flatnonzero(others)
    begin = np.searchsorted(cell[other], cell[one], "left")
    length = np.searchsorted(cell[other], cell[one], "right") - begin
    one, begin, length = one[length > 0], begin[length > 0], length[length > 0]
    total = np.cumsum(length)
    start = 0
    while start < len(one):
        done = total[start] - length[start]
        end = max(start + 1, int(np.searchsorted(total, done + _PAIRS, "right")))
        part = slice(start, end)
        a = np.repeat(one[part], length[part])
        # 0, 1, ..., length - 1 for every one of them, counted from the start of its cell.
        steps = np.arange(len(a)) - np.repeat(total[part] - length[part] - done, length[part])
        b = other[np.repeat(begin[part], length[part]) + steps]
        yield np.minimum(a, b), np.maximum(a, b)
        start = end


def _ordered(hits: _Hits, a: Ints, b: Ints, cluster: int, knowledge: Knowledge) -> Mask:
    """Whether each access a happened before b, or may race with it, or was compared before."""
    fine: Mask = hits.strong[a] & hits.strong[b] | hits.settled[a] & hits.settled[b]
    lane_a, lane_b, epoch = hits.lane[a], hits.lane[b], hits.epoch[a]
    fine |= lane_a == lane_b
    fine |= (lane_a // WARP == lane_b // WARP) & (epoch <= hits.synced[b])
    rest = np.flatnonzero(~fine)
    if not len(rest):
        return fine
    of_a, of_b = lane_a[rest] // cluster, lane_b[rest] // cluster
    keys = np.stack([hits.version[b[rest]], of_b, of_a])
    order = np.lexsort(keys)
    keys, rest = keys[:, order], rest[order]
    starts = np.flatnonzero(np.any(keys[:, 1:] != keys[:, :-1], axis=0)) + 1
    for which in np.split(rest, starts):
        lane, version = int(lane_b[which[0]]), int(hits.version[b[which[0]]])
        known = knowledge(lane, version, int(lane_a[which[0]]) // cluster)
        if known is not None:
            fine[which] = known[lane_a[which] % cluster] >= epoch[which]
    return fine


def _race(log: Sequence[Accesses], hits: _Hits, unit: int, a: int, b: int) -> Race:
    one, two = log[hits.entry[a]], log[hits.entry[b]]
    return Race(
        address=int(hits.cell[a]) * unit,
        lane=int(hits.lane[b]), pc=two.pc, write=two.write,
        other_lane=int(hits.lane[a]), other_pc=one.pc, other_write=one.write,
    )  # fmt: skip
