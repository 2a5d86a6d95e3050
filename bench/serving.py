"""What servers run: lengths that differ and lie on the device, and caches with room for more.

Protocol: as for the grid. Ours is what a call gets that says nothing of its lengths. Beside it: the
same told that they are about equal (`ragged=False`), told how long they are at most
(`max_seqlen`), and batch-invariant (`batch_invariant=True`), where that changes the launch. Rooms
of the sets of a cache with room for more overlap, what they hold does not.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

import gqa_cutlass
from bench import baselines
from bench.data import Data, check, num_sets, pool_bytes, relative_error
from bench.pages import PagedData, check_paged
from bench.record import Served
from bench.serving_points import LENGTHS, ROOM, Serving
from bench.timing import Floor, agreeing, beside_floors, ours_graph

OURS = "ours"
_ROWS_CHECKED = 256  # behind the new token, where there is room for very many
_ROOM_MORE, _ROOM_TIMES = 0.3, 1.03  # target of a room: microseconds, or times that without


def bytes_needed(point: Serving) -> int:
    """Bytes of a point's buffer sets."""
    sets = num_sets(point.read_bytes)
    if point.kind != ROOM:
        return pool_bytes(point)
    held = sets * point.held * point.batch * point.row_bytes
    return held if point.page_size else held + point.cache_bytes


class RoomData(Data):
    """Buffer sets of equal lengths in caches with room for more.

    Args:
        point: The problem.
        pool: At least `bytes_needed(point)` of random numbers.
    """

    def __init__(self, point: Serving, pool: Tensor) -> None:
        self.point, self.num_sets = point, num_sets(point.read_bytes)
        span = point.tokens + self.num_sets * point.held
        shape = 2, point.batch, span, point.num_kv_heads, point.head_dim
        numbers = bytes_needed(point) // pool.element_size()
        caches = pool[:numbers].view(shape)
        first = [i * point.held for i in range(self.num_sets)]
        self.k, self.v = (
            [cache[:, n : n + point.tokens] for n in first] for cache in (caches[0], caches[1])
        )
        _fill(self, pool)


class PagedRoomData(PagedData):
    """The same in pages: the table has columns for the room, the pools pages for what is held."""

    def __init__(self, point: Serving, pool: Tensor) -> None:
        assert point.page_size
        self.point, self.num_sets = point, num_sets(point.read_bytes)
        columns = point.held // point.page_size
        pages = self.num_sets, 2, point.batch * columns, point.page_size
        numbers = bytes_needed(point) // pool.element_size()
        sets = pool[:numbers].view(*pages, point.num_kv_heads, point.head_dim)
        self.k, self.v = list(sets[:, 0]), list(sets[:, 1])
        _fill(self, pool)
        order = torch.randperm(len(self.k[0]), device=pool.device).to(torch.int32)
        room = point.tokens // point.page_size
        self.table = torch.zeros(point.batch, room, dtype=torch.int32, device=pool.device)
        self.table[:, :columns] = order.view(point.batch, -1)

    def plan(self, **options: Any) -> gqa_cutlass.Plan:
        """As of dense caches, with the table."""
        return super().plan(block_table=self.table, **options)

    def in_order(self, cache: Tensor) -> Tensor:
        """The tokens that are held: [batch, tokens, num_kv_heads, head_dim]."""
        assert isinstance(self.point, Serving) and self.point.page_size
        columns = self.point.held // self.point.page_size
        return cache[self.table[:, :columns].long()].flatten(1, 2)


def _fill(data: Data, pool: Tensor) -> None:
    """What does not depend on where tokens lie."""
    point = data.point
    read = point.read_bytes // pool.element_size()
    data.flat = [pool[i * read : (i + 1) * read] for i in range(data.num_sets)]
    data.q = data.random(point.batch, point.num_q_heads, point.head_dim)
    data.new_k = data.random(point.batch, point.num_kv_heads, point.head_dim)
    data.new_v = torch.randn_like(data.new_k)
    data.seqlens = torch.tensor(point.lengths, dtype=torch.int32, device=pool.device)


def data_of(point: Serving, pool: Tensor) -> Data:
    """A point's tensors."""
    if point.kind != ROOM:
        return Data(point, pool)
    return PagedRoomData(point, pool) if point.page_size else RoomData(point, pool)


def checked(plan: gqa_cutlass.Plan, data: Data) -> tuple[Tensor, float]:
    """Run the first set, as `check` does."""
    if isinstance(data, PagedData):
        return check_paged(plan, data)
    return check(plan, data, behind=_ROWS_CHECKED if isinstance(data, RoomData) else None)


def measure_serving(point: Serving, pool: Tensor, floor: Floor) -> Served:
    """Check and time one point."""
    data = data_of(point, pool)
    plan = data.plan()
    out, error = checked(plan, data)
    plans = {OURS: plan}
    for name, options in told(point).items():
        other = data.plan(**options)
        if other.dispatch != plan.dispatch:
            checked(other, data)
            plans[name] = other
    graphs = {name: ours_graph(each, data) for name, each in plans.items()}
    others = {}
    if point.kind == LENGTHS:
        makers = {n: partial(make, data) for n, make in baselines.running(point).items()}
        others = agreeing(point, makers, partial(relative_error, right=out), data.num_sets)
    times, lowest = beside_floors({**graphs, **others}, data, floor)
    return Served(
        point=str(point), kind=point.kind, mib=point.read_bytes / 2**20,
        kernel=plan.dispatch.config.name, launch=str(plan.dispatch.shape), relative_error=error,
        floor=lowest, ours=times[OURS], told={n: times[n] for n in plans if n != OURS},
        measured={name: times[name] for name in others},
        recorded=point.recorded.micros if point.recorded else {},
        recorded_floor=point.recorded.floor if point.recorded else None,
        limit=None if point.kind == ROOM else point.target(lowest),
    )  # fmt: skip


def told(point: Serving) -> dict[str, dict[str, Any]]:
    """What a call may say of its lengths, or ask for."""
    return {
        "equal": {"ragged": False},
        "longest": {"max_seqlen": max(point.lengths) + 1},
        "invariant": {"batch_invariant": True},
    }


def with_limits(rows: Iterable[Served], points: Iterable[Serving]) -> list[Served]:
    """Rows with the targets of rooms: what the step takes with room for just what is held."""
    tight: dict[object, float] = {}
    found = []
    for row, point in zip(rows, points, strict=True):
        if point.kind == ROOM:
            key = point.name, point.batch
            least = tight.setdefault(key, row.ours) if point.factor == 1 else tight.get(key)
            if least is not None:
                row = replace(row, limit=max(least + _ROOM_MORE, least * _ROOM_TIMES))
        found.append(row)
    return found
