"""Who knows what: vector clocks over the threads of a cluster.

The happens-before order of PTX's memory model (PTX ISA 8), as FastTrack keeps it (Flanagan and
Freund, PLDI 2009), adapted to warps: all lanes of a warp share one epoch, which moves on whenever
one of them synchronises, and what a warp knows of others is kept per warp. What a part of a warp
acquired is kept apart until the warp synchronises.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

WARP = 32
Lanes = NDArray[np.int64]
Vector = NDArray[np.int32]


class Clocks:
    """Clocks of the blocks that run together.

    A vector has one entry per lane of the cluster, and a last one: how many acquisitions of other
    blocks' writes to global memory (`GlobalLedger`) are known.

    Args:
        blocks: How many blocks.
        threads: Threads per block, a multiple of 32.
        cluster: Blocks per cluster.
    """

    def __init__(self, blocks: int, threads: int, cluster: int) -> None:
        self.lanes = threads * cluster
        self.warps = threads // WARP * cluster
        self.columns = self.lanes + 1
        num_warps = blocks * (threads // WARP)
        self.epoch = np.ones(num_warps, dtype=np.int64)
        self.synced = np.zeros(num_warps, dtype=np.int64)  # epoch of the last sync of all lanes
        self.known = np.zeros((num_warps, self.columns), dtype=np.int32)
        # Of every warp, what single lanes know besides.
        self._partial: dict[int, dict[int, Vector]] = {}
        # What a warp knew at earlier times, for accesses that are compared only at the end.
        self.history: list[Vector] = [np.zeros(self.columns, dtype=np.int32)]
        self._version = np.zeros(num_warps, dtype=np.int64)
        self._versions_of_lanes: dict[int, tuple[Vector, int, int]] = {}

    def stamps(self, lanes: Lanes) -> NDArray[np.int64]:
        """Stamps of accesses by lanes: the epoch, and the lane in its cluster."""
        return self.epoch[lanes // WARP] << 32 | lanes % self.lanes

    def is_known(self, lanes: Lanes, stamps: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Whether what was stamped happened before what lanes do now.

        Args:
            lanes: [n].
            stamps: [n, k].
        """
        owner = stamps & 0xFFFFFFFF
        epoch = stamps >> 32
        me = lanes[:, None]
        warp = me // WARP
        same_warp = owner // WARP == me % self.lanes // WARP
        fine: NDArray[np.bool_] = (owner == me % self.lanes) | same_warp & (
            epoch <= self.synced[warp]
        )
        if not fine.all():
            fine |= epoch <= self.known.reshape(-1)[warp * self.columns + owner]
        if self._partial and not fine.all():
            for row, column in np.argwhere(~fine):
                vector = self._partial_of(int(lanes[row]))
                if vector is not None:
                    fine[row, column] = vector[owner[row, column]] >= epoch[row, column]
        return fine

    def known_by(self, lanes: Lanes) -> Vector:
        """What lanes know of every lane of other warps: [n, columns]."""
        known = self.known[lanes // WARP]
        for i, lane in enumerate(lanes.tolist() if self._partial else ()):
            extra = self._partial_of(lane)
            if extra is not None:
                np.maximum(known[i], extra, out=known[i])
        return known

    def warp_sync(self, warps: Lanes) -> None:
        """All lanes of these warps have met."""
        for warp in self._partial.keys() & set(warps.tolist()) if self._partial else ():
            self._learn(warp, np.maximum.reduce(list(self._partial.pop(warp).values())))
        self.synced[warps] = self.epoch[warps]
        self.epoch[warps] += 1

    def release(self, lanes: Lanes) -> Vector:
        """What these lanes of one warp publish: what they did and what they know. [columns]."""
        warp = int(lanes[0]) // WARP
        vector = self.known[warp].copy()
        for lane in lanes:
            extra = self._partial_of(int(lane))
            if extra is not None:
                np.maximum(vector, extra, out=vector)
        first = warp * WARP % self.lanes
        own = vector[first : first + WARP]
        np.maximum(own, self.synced[warp], out=own)
        vector[lanes % self.lanes] = self.epoch[warp]
        self.epoch[warp] += 1
        return vector

    def barrier(self, warps: Lanes) -> None:
        """Barriers that all lanes of these warps passed, one per row: [barriers, warps]."""
        flat = warps.reshape(-1)
        self.warp_sync(flat)
        joined = self.known[warps].max(axis=1)
        own = (flat * WARP % self.lanes)[:, None] + np.arange(WARP)
        row = np.repeat(np.arange(len(warps)), warps.shape[1])[:, None]
        joined[row, own] = self.synced[flat][:, None]
        self.known[warps] = joined[:, None, :]
        self._version[warps] = len(self.history) + np.arange(len(warps))[:, None]
        self.history.extend(joined)

    def acquire(self, lanes: Lanes, vector: Vector) -> None:
        """These lanes of one warp learn what was published."""
        warp = int(lanes[0]) // WARP
        if len(lanes) == WARP:
            self._learn(warp, vector)
            return
        held = self._partial.setdefault(warp, {})
        for lane in lanes.tolist():
            held[lane] = np.maximum(vector, held[lane]) if lane in held else vector

    def _learn(self, warp: int, vector: Vector) -> None:
        np.maximum(self.known[warp], vector, out=self.known[warp])
        self._version[warp] = len(self.history)
        self.history.append(self.known[warp].copy())

    def versions(self, lanes: Lanes) -> NDArray[np.int64]:
        """What lanes know now, as positions in `history`."""
        versions: NDArray[np.int64] = self._version[lanes // WARP]
        for i, lane in enumerate(lanes.tolist() if self._partial else ()):
            extra = self._partial_of(lane)
            if extra is not None:
                versions[i] = self._version_of_lane(lane, extra, int(versions[i]))
        return versions

    def _version_of_lane(self, lane: int, extra: Vector, of_warp: int) -> int:
        """Position in `history` of what a lane knows besides its warp."""
        held = self._versions_of_lanes.get(lane)
        if held is None or held[0] is not extra or held[1] != of_warp:
            held = extra, of_warp, len(self.history)
            self._versions_of_lanes[lane] = held
            self.history.append(np.maximum(self.known[lane // WARP], extra))
        return held[2]

    def _partial_of(self, lane: int) -> Vector | None:
        held = self._partial.get(lane // WARP)
        return None if held is None else held.get(lane)
