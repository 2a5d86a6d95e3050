"""What is known of every piece of shared memory: who wrote it, who read it, is it under way.

Granules are as wide as the narrowest access of the kernel. The last write is kept, and of every
warp the last read since then (see `clocks` for the source and for what ordered means).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from gqa_cutlass.ptxsim.clocks import WARP, Clocks, Lanes

MAX_WARPS = 64  # bits of a word: warps of a cluster
_LANE_BITS = 6
_SEVERAL = WARP  # instead of a lane: more than one lane read
_UNDER_WAY = -1
Ints = NDArray[np.int64]


class ShadowError(Exception):
    """A conflict: which access (a row), which of its granules, what is wrong, and with whom."""

    def __init__(self, row: int, column: int, why: str, other: int | None = None) -> None:
        super().__init__(why)
        self.row = row
        self.column = column
        self.other = other  # lane in the cluster


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
        cells = size // granule
        # Stamp of the last write; 0: none, negative: an asynchronous copy is under way.
        self._writer: Ints = np.zeros(cells, dtype=np.int64)
        watched = cells if races else 0
        # Of every warp of the cluster, the last read: epoch and lane. Zeros take no memory.
        self._reads = np.zeros(watched * clocks.warps, dtype=np.int32)
        self._readers = np.zeros(watched, dtype=np.uint64)  # warps whose reads count, as bits

    def _cells(self, at: Ints, size: int) -> Ints:
        """Granules of accesses of `size` bytes: [n, k]."""
        return (at // self.granule)[:, None] + np.arange(max(1, size // self.granule))

    def read(self, lanes: Lanes, at: Ints, size: int) -> None:
        """Note reads.

        Raises:
            ShadowError: Not initialised, under way, or racing with a write.
        """
        cells = self._cells(at, size)
        stamps = self._writer[cells]
        if stamps.min(initial=1) <= 0:
            if (stamps < 0).any():
                raise _error(stamps < 0, "reads what an asynchronous copy has not finished writing")
            raise _error(stamps == 0, "reads shared memory that was never written")
        if not self._races:
            return
        fine = self._clocks.is_known(lanes, stamps)
        if not fine.all():
            raise _error(~fine, "race: reads what another thread wrote", stamps)
        self._note_reads(lanes, cells)

    def read_strong(self, lanes: Lanes, at: Ints, size: int) -> None:
        """Look at what an atomic reads: it must be there, and a plain write of it be known.

        Raises:
            ShadowError: As `read`.
        """
        races, self._races = self._races, False
        try:
            self.read(lanes, at, size)
        finally:
            self._races = races
        if races:
            stamps = self._writer[self._cells(at, size)]
            fine = self._clocks.is_known(lanes, stamps)
            if not fine.all():
                raise _error(~fine, "race: atomic on what another thread wrote", stamps)

    def _note_reads(self, lanes: Lanes, cells: Ints) -> None:
        clocks = self._clocks
        warps = lanes // WARP
        column = (warps % clocks.warps)[:, None]
        epoch = (clocks.epoch[warps] << _LANE_BITS).astype(np.int32)[:, None]
        mine = np.broadcast_to(epoch | (lanes % WARP)[:, None].astype(np.int32), cells.shape)
        slot = cells * clocks.warps + column
        old = self._reads[slot]
        shared = (old >> _LANE_BITS == mine >> _LANE_BITS) & (old != mine)
        if shared.any():
            mine = np.where(shared, epoch | _SEVERAL, mine)
        self._reads[slot] = mine
        clash = self._reads[slot] != mine
        if clash.any():
            self._reads[slot[clash]] = np.broadcast_to(epoch | _SEVERAL, cells.shape)[clash]
        bit = np.broadcast_to(np.uint64(1) << column.astype(np.uint64), cells.shape)
        missing = np.ones(cells.shape, dtype=bool)
        while True:  # once, but for granules that several warps read with the same instruction
            self._readers[cells[missing]] |= bit[missing]
            missing = self._readers[cells] & bit == 0
            if not missing.any():
                return

    def write(self, lanes: Lanes, at: Ints, size: int) -> None:
        """Note writes.

        Raises:
            ShadowError: An asynchronous copy is under way, or a race with a read or a write.
        """
        cells = self._cells(at, size)
        self._check_write(lanes, cells)
        stamps = np.broadcast_to(self._clocks.stamps(lanes)[:, None], cells.shape)
        self._writer[cells] = stamps
        if self._races:
            twice = self._writer[cells] != stamps
            if twice.any():
                raise _error(twice, "race: writes with another thread", self._writer[cells])

    def begin_copy(self, lanes: Lanes, at: Ints, size: int) -> Ints:
        """Note that lanes start asynchronous writes; returns the granules, for `end_copy`.

        Raises:
            ShadowError: As `write`.
        """
        cells = self._cells(at, size)
        self._check_write(lanes, cells)
        self._writer[cells] = _UNDER_WAY
        return cells

    def end_copy(self, lanes: Lanes, cells: Ints) -> None:
        """The copies that lanes started have been waited for: now they are writes of theirs."""
        self._writer[cells] = self._clocks.stamps(lanes)[:, None]

    def _check_write(self, lanes: Lanes, cells: Ints) -> None:
        stamps = self._writer[cells]
        if (stamps < 0).any():
            raise _error(stamps < 0, "writes where an asynchronous copy is under way")
        if not self._races:
            return
        if stamps.any():
            fine = (stamps == 0) | self._clocks.is_known(lanes, stamps)
            if not fine.all():
                raise _error(~fine, "race: writes over what another thread wrote", stamps)
        readers = self._readers[cells]
        if readers.any():
            self._check_readers(lanes, cells, readers)
            self._readers[cells] = 0

    def _check_readers(self, lanes: Lanes, cells: Ints, readers: NDArray[np.uint64]) -> None:
        clocks = self._clocks
        warps = lanes // WARP
        column = (warps % clocks.warps)[:, None]
        mine = np.uint64(1) << column.astype(np.uint64)
        by_me = readers & mine != 0
        read = self._reads[cells * clocks.warps + column]
        own = (read >> _LANE_BITS <= clocks.synced[warps][:, None]) | (
            read & (1 << _LANE_BITS) - 1 == (lanes % WARP)[:, None]
        )
        suspect = readers & ~mine != 0  # read by another warp, or by another lane of mine
        suspect |= by_me & ~own
        if suspect.any():
            for warp in range(clocks.warps):
                asked = suspect & (readers >> np.uint64(warp) & np.uint64(1) != 0)
                asked &= (column != warp) | ~own
                rows, columns = np.nonzero(asked)
                if len(rows):
                    self._check_reader(lanes[rows], cells[rows, columns], warp, rows, columns)

    def _check_reader(
        self, lanes: Lanes, cells: Ints, warp: int, rows: Ints, columns: Ints
    ) -> None:
        """Compare writes with the reads of one other warp."""
        clocks = self._clocks
        read = self._reads[cells * clocks.warps + warp]
        lane = read & (1 << _LANE_BITS) - 1
        first = warp * WARP
        epochs: NDArray[Any] = read >> _LANE_BITS
        several = lane == _SEVERAL
        known = clocks.known_by(lanes)
        limit = np.where(
            several,
            known[:, first : first + WARP].min(axis=1),
            known[np.arange(len(lanes)), first + lane % WARP],
        )
        wrong = epochs > limit
        if wrong.any():
            i = int(wrong.argmax())
            raise ShadowError(
                int(rows[i]), int(columns[i]), "race: writes what another thread reads",
                first + int(lane[i]) % WARP,
            )  # fmt: skip


def _error(wrong: NDArray[np.bool_], why: str, stamps: Ints | None = None) -> ShadowError:
    row, column = np.argwhere(wrong)[0]
    other = None if stamps is None else int(stamps[row, column] & 0xFFFFFFFF)
    return ShadowError(int(row), int(column), why, other)
