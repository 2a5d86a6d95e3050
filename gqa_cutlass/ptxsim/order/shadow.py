"""What is known of every piece of shared memory: who wrote it, who read it, is it under way.

Granules are as wide as the narrowest access of the kernel. The last plain write is kept, and every
warp's reads since then, its strong reads and its strong writes: those race with plain accesses
alone (see `clocks` for the source and for what ordered means).
"""

from __future__ import annotations

import mmap
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gqa_cutlass.ptxsim.order.clocks import WARP, Clocks, Lanes

_WORD = 64  # bits, one per warp of a cluster
_KNOWN = 1  # a stamp from before the first epoch: everybody knows of it
_LANES = np.arange(WARP, dtype=np.uint32)
Ints = NDArray[np.int64]
Mask = NDArray[np.bool_]


class ShadowError(Exception):
    """A conflict: which access (a row), which of its granules, what is wrong, and with whom."""

    def __init__(self, row: int, column: int, why: str, other: int | None = None) -> None:
        super().__init__(why)
        self.row = row
        self.column = column
        self.other = other  # lane in the cluster


def _sparse_zeros(count: int, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Zeros that take memory in small pages where they are written, and nowhere else.

    NumPy's own may come in pages of 2 MiB, of which a few bytes in each make gigabytes.
    """
    memory = mmap.mmap(-1, max(1, count * dtype.itemsize))
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        with suppress(OSError):  # a kernel without huge pages
            memory.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(memory, dtype=dtype, count=count)


class Touches:
    """Accesses of one kind to every granule since they were last forgotten, by warp.

    Of each warp the last epoch in which it touched a granule, and the lanes that did; of earlier
    epochs only what the warp has not synchronised since.

    Args:
        size: How many granules.
        clocks: Who knows what.
    """

    def __init__(self, size: int, clocks: Clocks) -> None:
        self._size = size
        self._clocks = clocks
        # One row of granules per warp of a cluster, so that what a warp alone uses lies together.
        self._epoch = _sparse_zeros(size * clocks.warps, np.dtype(np.int32))
        self._lanes = _sparse_zeros(size * clocks.warps, np.dtype(np.uint32))
        self._warps = np.zeros(-(-clocks.warps // _WORD) * size, dtype=np.uint64)
        self._earlier: dict[int, list[tuple[int, int]]] = {}  # by place: epoch and lanes
        self._used = False  # few kernels have strong accesses

    def note(self, lanes: Lanes, cells: Ints) -> None:
        """Note accesses of lanes [n] to granules [n, k]."""
        self._used = True
        clocks, warps = self._clocks, lanes // WARP
        column = (warps % clocks.warps)[:, None]
        place = column * self._size + cells
        bit = np.broadcast_to(_bits(lanes)[:, None], cells.shape)
        epoch = clocks.epoch[warps][:, None]
        touched = self._touched(column, cells)
        before, lanes_before = self._epoch.take(place) * touched, self._lanes.take(place)
        again = before == epoch
        self._epoch[place] = epoch
        self._lanes[place] = np.where(again, lanes_before, np.uint32(0)) | bit
        lost = self._lanes.take(place) & bit == 0  # several lanes touch the same granule at once
        if lost.any():
            np.add.at(self._lanes, place[lost], bit[lost])
        unsynced = ~again & (before > clocks.synced[warps][:, None])
        if unsynced.any():
            unsynced &= lanes_before & ~self._lanes[place] != 0
            self._set_aside(place[unsynced], before[unsynced], lanes_before[unsynced])
        if not touched.all():
            self._touch(column, cells)

    def _touched(self, column: Ints, cells: Ints) -> Mask:
        """Whether warps have touched granules."""
        touched: Mask = self._warps.take(self._words(column, cells)) & _mark(column) != 0
        return touched

    def _words(self, column: Ints, cells: Ints) -> Ints:
        """Where the marks of warps lie."""
        return cells if self._clocks.warps <= _WORD else column // _WORD * self._size + cells

    def _touch(self, column: Ints, cells: Ints) -> None:
        words, mark = np.broadcast_arrays(self._words(column, cells), _mark(column))
        self._warps[words] |= mark
        lost = ~self._touched(column, cells)  # several warps touch the same granule at once
        if lost.any():
            np.bitwise_or.at(self._warps, words[lost], mark[lost])

    def _set_aside(self, places: Ints, epochs: Ints, lanes: NDArray[np.uint32]) -> None:
        entries = zip(places.tolist(), epochs.tolist(), lanes.tolist(), strict=True)
        for place, epoch, mask in dict.fromkeys(entries):
            # Who knows of a later access of a lane knows of those before.
            before = ((e, m & ~mask) for e, m in self._earlier.get(place, ()))
            self._earlier[place] = [*((e, m) for e, m in before if m), (epoch, mask)]

    def forget(self, cells: Ints) -> None:
        """Forget what was touched: whoever comes next knows of it by way of a write."""
        if self._used:
            self._warps.reshape(-1, self._size)[:, cells] = 0
        if self._earlier:
            gone = set(np.unique(cells).tolist())
            self._earlier = {p: e for p, e in self._earlier.items() if p % self._size not in gone}

    def conflict(self, lanes: Lanes, cells: Ints) -> tuple[int, int, int] | None:
        """An access that lanes do not know of: row and column in `cells`, and its lane."""
        words = self._warps.reshape(-1, self._size) if self._used else ()
        for word, marks in enumerate(words):
            touched = marks.take(cells)
            if not touched.any():
                continue
            touched[self._harmless(lanes, cells, touched, word)] = 0
            if not touched.any():
                continue
            seen = int(np.bitwise_or.reduce(touched, axis=None))
            for warp in range(word * _WORD, min(self._clocks.warps, (word + 1) * _WORD)):
                if not seen >> warp % _WORD & 1:
                    continue
                rows, columns = np.nonzero(touched & _mark(np.int64(warp)))
                found = self._unknown(lanes, cells, rows, columns, warp)
                if found is not None:
                    return found
        return None

    def _harmless(self, lanes: Lanes, cells: Ints, touched: NDArray[np.uint64], word: int) -> Mask:
        """Where only the lanes' own warp was, and they know of it: the usual case, and fast."""
        clocks, warps = self._clocks, lanes // WARP
        column = (warps % clocks.warps)[:, None]
        place = column * self._size + cells
        known = self._epoch.take(place) <= clocks.synced[warps][:, None]
        if not known.all():
            known |= self._lanes[place] == _bits(lanes)[:, None]
        known &= (touched == _mark(column)) & (column // _WORD == word)
        if self._earlier:
            known &= ~np.isin(place, list(self._earlier))
        return known

    def _unknown(
        self, lanes: Lanes, cells: Ints, rows: Ints, columns: Ints, warp: int
    ) -> tuple[int, int, int] | None:
        """The first of the granules whose touches by a warp are not all known."""
        if not len(rows):
            return None
        places = warp * self._size + cells[rows, columns]
        known = self._clocks.known_of(lanes[rows], warp)
        wrong = _spread(self._lanes[places]) & (self._epoch[places][:, None] > known)
        if self._earlier:
            for i in np.flatnonzero(np.isin(places, list(self._earlier))):
                for epoch, mask in self._earlier[int(places[i])]:
                    wrong[i] |= _spread(np.uint32(mask)) & (epoch > known[i])
        if not wrong.any():
            return None
        i, lane = np.argwhere(wrong)[0]
        return int(rows[i]), int(columns[i]), warp * WARP + int(lane)


class Shadow:
    """Shadow of the shared memory of the blocks that run together.

    Args:
        size: Bytes of all their shared memory.
        granule: Bytes of a granule.
        clocks: Who knows what.
        races: Whether to look for races; what is read too early is found without.
    """

    def __init__(self, size: int, granule: int, clocks: Clocks, races: bool) -> None:
        self.granule = granule
        self._clocks = clocks
        self._races = races
        # Stamp of the last plain write; 0: none, negative: an asynchronous copy is under way.
        self._writer: Ints = np.zeros(size // granule, dtype=np.int64)
        watched = size // granule if races else 0
        self._reads, self._strong_reads, self._strong_writes = (
            Touches(watched, clocks) for _ in range(3)
        )

    def _cells(self, at: Ints, size: int) -> Ints:
        """Granules of accesses of `size` bytes: [n, k]."""
        return (at // self.granule)[:, None] + np.arange(max(1, size // self.granule))

    def read(self, lanes: Lanes, at: Ints, size: int) -> None:
        """Note reads.

        Raises:
            ShadowError: Not initialised, under way, or racing with a write.
        """
        cells = self._cells(at, size)
        self._check_there(lanes, cells, "reads")
        if self._races:
            self._check(self._strong_writes, lanes, cells, "reads what another thread writes")
            self._reads.note(lanes, cells)

    def read_strong(self, lanes: Lanes, at: Ints, size: int) -> None:
        """Note strong reads.

        Raises:
            ShadowError: As `read`, but strong writes do no harm.
        """
        cells = self._cells(at, size)
        self._check_there(lanes, cells, "reads")
        if self._races:
            self._strong_reads.note(lanes, cells)

    def check(self, lanes: Lanes, at: Ints, size: int) -> None:
        """Check that lanes could read, and note nothing.

        Raises:
            ShadowError: As `read_strong`.
        """
        self._check_there(lanes, self._cells(at, size), "uses")

    def update(self, lanes: Lanes, at: Ints, size: int) -> None:
        """Note atomics that read, modify and write.

        Raises:
            ShadowError: As `read_strong`, or racing with a read.
        """
        cells = self._cells(at, size)
        self._check_there(lanes, cells, "atomic on")
        if self._races:
            self._check(self._reads, lanes, cells, "atomic on what another thread reads")
            self._strong_writes.note(lanes, cells)

    def _check_there(self, lanes: Lanes, cells: Ints, verb: str) -> None:
        """Raise unless granules are written, and by whom is known."""
        stamps = self._writer[cells]
        if stamps.min(initial=1) <= 0:
            if (stamps < 0).any():
                why = f"{verb} what an asynchronous copy has not finished writing"
                raise _error(stamps < 0, why, -stamps)
            raise _error(stamps == 0, f"{verb} shared memory that was never written")
        if self._races:
            self._check_writer(lanes, stamps, f"{verb} what another thread wrote")

    def write(self, lanes: Lanes, at: Ints, size: int, strong: bool = False) -> None:
        """Note writes, plain or strong ones.

        Raises:
            ShadowError: An asynchronous copy is under way, or a race with a read or a write.
        """
        cells = self._cells(at, size)
        if strong:
            self._write_strong(lanes, cells)
        else:
            self._write(lanes, cells, self._clocks.stamps(lanes))

    def begin_copy(self, lanes: Lanes, at: Ints, size: int) -> Ints:
        """Note that lanes start asynchronous writes; returns the granules, for `end_copy`.

        Raises:
            ShadowError: As `write`.
        """
        cells = self._cells(at, size)
        self._write(lanes, cells, -self._clocks.stamps(lanes))
        return cells

    def end_copy(self, lanes: Lanes, cells: Ints) -> None:
        """The copies that lanes started have been waited for: now they are writes of theirs."""
        self._writer[cells] = self._clocks.stamps(lanes)[:, None]

    def land(self, cells: Ints, stamp: int) -> None:
        """Copies have finished: now they are writes with the stamp of an agent (see `Clocks`)."""
        self._writer[cells] = stamp

    def leave(self, lane: int, granules: Ints) -> None:
        """Note that a block ends, of which this lane knows all that its own threads did.

        Args:
            lane: One of the block.
            granules: [n], those of the block that must be at rest.

        Raises:
            ShadowError: A copy is under way, or another block may still be at work there.
        """
        cells = granules[:, None]
        lanes = np.full(len(cells), lane)
        before = self._writer[cells]
        self._check_under_way(before, "exits")
        if self._races:
            self._check_writer(lanes, before, "exits while another thread writes")
            self._check_touches(lanes, cells, "exits while another thread")

    def _write(self, lanes: Lanes, cells: Ints, stamps: Ints) -> None:
        before = self._writer[cells]
        self._check_under_way(before, "writes")
        if self._races:
            self._check_writer(lanes, before, "writes over what another thread wrote")
            self._check_touches(lanes, cells, "writes what another thread")
            for touches in (self._reads, self._strong_reads, self._strong_writes):
                touches.forget(cells)
        marks = np.broadcast_to(stamps[:, None], cells.shape)
        self._writer[cells] = marks
        if self._races:
            twice = self._writer[cells] != marks
            if twice.any():
                raise _error(twice, "race: writes with another thread", abs(self._writer[cells]))

    def _write_strong(self, lanes: Lanes, cells: Ints) -> None:
        before = self._writer[cells]
        self._check_under_way(before, "writes")
        if self._races:
            self._check_writer(lanes, before, "writes over what another thread wrote")
            self._check(self._reads, lanes, cells, "writes what another thread reads")
            self._strong_writes.note(lanes, cells)
        self._writer[cells[before == 0]] = _KNOWN

    def _check_under_way(self, before: Ints, verb: str) -> None:
        if (before < 0).any():
            raise _error(before < 0, f"{verb} where an asynchronous copy is under way", -before)

    def _check_writer(self, lanes: Lanes, stamps: Ints, why: str) -> None:
        if stamps.any():
            fine = self._clocks.is_known(lanes, stamps)
            if not fine.all():
                raise self._unknown_writer(~fine, why, stamps)

    def _unknown_writer(self, wrong: Mask, why: str, stamps: Ints) -> ShadowError:
        error = _error(wrong, f"race: {why}", stamps)
        if error.other is None or error.other < self._clocks.lanes:
            return error
        why = why.replace("another thread", "an asynchronous copy")
        why = f"race: {why}, which this thread does not know to have finished"
        return ShadowError(error.row, error.column, why, error.other)

    def _check_touches(self, lanes: Lanes, cells: Ints, why: str) -> None:
        self._check(self._reads, lanes, cells, f"{why} reads")
        self._check(self._strong_reads, lanes, cells, f"{why} reads")
        self._check(self._strong_writes, lanes, cells, f"{why} writes")

    def _check(self, touches: Touches, lanes: Lanes, cells: Ints, why: str) -> None:
        found = touches.conflict(lanes, cells)
        if found is not None:
            row, column, other = found
            raise ShadowError(row, column, f"race: {why}", other)


def _bits(lanes: Lanes) -> NDArray[np.uint32]:
    """Each lane as a bit of its warp."""
    return np.uint32(1) << (lanes % WARP).astype(np.uint32)


def _spread(bits: NDArray[np.uint32] | np.uint32) -> Mask:
    """Bits to flags of lanes, along a new last axis."""
    flags: Mask = np.asarray(bits)[..., None] >> _LANES & np.uint32(1) != 0
    return flags


def _mark(warp: Ints | np.int64) -> NDArray[np.uint64]:
    """Each warp of a cluster as a bit of its word."""
    return np.asarray(np.uint64(1) << np.asarray(warp % _WORD).astype(np.uint64))


def _error(wrong: Mask, why: str, stamps: Ints | None = None) -> ShadowError:
    row, column = np.argwhere(wrong)[0]
    other = None if stamps is None else int(stamps[row, column] & 0xFFFFFFFF)
    return ShadowError(int(row), int(column), why, other)
