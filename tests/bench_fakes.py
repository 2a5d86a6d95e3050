"""What the tests of the benchmark share: small points, a plan that attends in float32, records."""

from __future__ import annotations

import dataclasses
import types
from typing import Any

import torch
from torch import Tensor

from bench import baselines
from bench.data import pool_bytes
from bench.features import CASES, Case
from bench.merges import MERGES, Merge
from bench.points import GRID, PREFILL, RAGGED, Point, Ragged
from bench.record import Featured, Merged, Prefill, Record, Row, Served
from bench.serving_points import SERVING, Serving

SMALL_MIB = 32
SMALL = Point("small", 4, 2, 64, 3, 48)
SMALL_RAGGED = Ragged(
    "small", 4, 2, 64, 3, 48, name="three lengths", cached=(47, 0, 20), limit=1.5
)  # fmt: skip


def pool(point: Point) -> Tensor:
    """Random numbers for a point's data."""
    return torch.randn(pool_bytes(point) // 2, dtype=torch.float16)


class FakePlan:
    """Appends and attends in float32, or with a fault."""

    def __init__(self, fault: str = "", shape: str = "a shape") -> None:
        self.fault = fault
        config = types.SimpleNamespace(name="fake")
        self.dispatch = types.SimpleNamespace(config=config, num_splits=1, shape=shape)

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, new_k: Tensor, new_v: Tensor, lengths: Tensor
    ) -> Tensor:
        for b, n in enumerate(lengths.tolist()):
            if self.fault != "appends nothing":
                k[b, n], v[b, n] = new_k[b], new_v[b]
            if self.fault == "writes behind":
                v[b, n + 1 :] = 0
        extra = 1 if self.fault == "reads behind" else 0
        if self.fault == "is no attention":
            return q
        return attend(q, k, v, (lengths + 1 + extra).tolist()).to(q.dtype)


def attend(q: Tensor, k: Tensor, v: Tensor, attended: list[int]) -> Tensor:
    group = q.shape[1] // k.shape[2]
    outs = []
    for b, n in enumerate(attended):
        keys, values = (x[b, :n].float().repeat_interleave(group, 1) for x in (k, v))
        weights = torch.einsum("hd,nhd->hn", q[b].float(), keys) * q.shape[2] ** -0.5
        outs.append(torch.einsum("hn,nhd->hd", weights.softmax(-1), values))
    return torch.stack(outs)


def row_of(point: Point, **changes: Any) -> Row:
    """What might have been measured of a point, with round ratios."""
    floor = baselines.floor_by_bytes(point.read_bytes)
    row = Row(
        point=str(point), mib=point.read_bytes / 2**20, kernel="k", launch="l", source_digest="d",
        num_splits=1, relative_error=0.000125, floor=floor, ours=1.25 * floor,
        measured={"SDPA flash": 3 * floor, "SDPA cuDNN": 2 * floor},
        recorded_scaled={"SDPA cuDNN": floor, "TileOPs": 1.75 * floor},
    )  # fmt: skip
    return dataclasses.replace(row, **changes)


def prefill_of(point: Point) -> Prefill:
    """What might have been measured of a point's prompts."""
    decode = row_of(point).ours
    measured = {"SDPA flash": 40 * decode, "SDPA cuDNN": 32 * decode}
    return Prefill(point=str(point), decode=decode, measured=measured)


def featured_of(case: Case) -> Featured:
    """What might have been measured of a feature: a tenth more than the plain step."""
    plain = row_of(case.points[1]).ours
    return Featured(
        point=str(case.point), feature=case.feature, kernel="k",
        mib=case.point.read_bytes / 2**20, relative_error=0.000125, ours=1.1 * plain, plain=plain,
        limit=case.most * plain + case.more,
    )  # fmt: skip


def merged_of(merge: Merge) -> Merged:
    """What might have been measured of a merge: a tenth more than the floor."""
    floor = baselines.floor_by_bytes(merge.num_bytes)
    return Merged(
        merge=str(merge), mib=merge.num_bytes / 2**20, relative_error=0.000125, ours=1.1 * floor,
        operators=4 * floor, floor=floor, limit=1.2,
    )  # fmt: skip


def served_of(point: Serving) -> Served:
    """What might have been measured as servers run it: a quarter more than the floor."""
    floor = baselines.floor_by_bytes(point.read_bytes)
    return Served(
        point=str(point), kind=point.kind, mib=point.read_bytes / 2**20, kernel="k", launch="l",
        relative_error=0.000125, floor=floor, ours=1.25 * floor, told={"equal": 1.5 * floor},
        recorded=point.recorded.micros if point.recorded else {},
        recorded_floor=point.recorded.floor if point.recorded else None,
        limit=point.target(floor),
    )  # fmt: skip


def _grid_row(point: Point) -> Row:
    """As `row_of`; small points are faster as dependents, large ones slower when balanced."""
    row = row_of(point)
    if row.mib > SMALL_MIB:
        return dataclasses.replace(row, balanced=1.3 * row.floor)
    return dataclasses.replace(row, dependent=row.floor)


def full_record() -> Record:
    """A run over all points."""
    return Record(
        run={"gpu": "NVIDIA <X1>", "date": "2026-01-02", "clocks": "1 MHz, 2 MHz"},
        rows=[_grid_row(point) for point in GRID],
        ragged=[row_of(p, measured={}, recorded_scaled={}, limit=p.limit) for p in RAGGED],
        prefill=[prefill_of(point) for point in PREFILL],
        features=[featured_of(case) for case in CASES],
        merges=[merged_of(merge) for merge in MERGES],
        serving=[served_of(point) for point in SERVING],
        host={"plan": 7.04, "gqa_decode": 15.0, "SDPA, views made before": 20.0, "check": 0.052},
    )
