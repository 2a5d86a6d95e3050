"""Microseconds per decode step against its baselines and the read-only roofline.

Protocol: one CUDA graph per contender holds one call per buffer set; sets rotate through at least
256 MiB, four times an H200's L2, so the cache is cold. Contenders take turns in one process; before
each turn unrelated data is read, so that nobody finds in L2 what another left there. The median of
twelve turns counts. Data are random. Ours appends the new token; baselines only attend. Each
point is checked against float32 before it is timed, with NaN from where the new token goes to the
cache's end; baselines are checked against our output, and left out where they fail.

Ours has its lengths on the device. At points of the grid its plan is told that they are about
equal, as baselines are that get one length for all; what it takes without being told is measured
too (`balanced`), and what it takes when each call is launched as a dependent of the one before.

Baselines that are not installed enter with times recorded elsewhere (baselines.json), scaled by the
roofline.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

import gqa_cutlass
from bench import baselines
from bench.data import Data, check, pool_bytes, relative_error
from bench.features import CASES, Case, measure_feature
from bench.host import host_costs
from bench.merges import MERGES, measure_merge
from bench.points import GRID, PREFILL, RAGGED, Point, Ragged
from bench.prefill import measure_prefill
from bench.record import Record, Row
from bench.serving import bytes_needed, measure_serving, with_limits
from bench.serving_points import SERVING
from bench.timing import Floor, agreeing, beside_floors, ours_graph
from gqa_cutlass.cli.output import progress
from gqa_cutlass.codegen import source_digest
from gqa_cutlass.errors import InputError
from gqa_cutlass.proof.evidence import ask_gpu, provenance
from gqa_cutlass.tuning.timing import random_pool

_Point = TypeVar("_Point", bound=Point)
_Result = TypeVar("_Result")
POOL_SHARE = 0.8  # of the GPU's free memory
PARTS = "grid", "ragged", "prefill", "features", "merges", "serving", "host"
OURS, BALANCED, DEPENDENT = "ours", "ours, balanced", "ours, dependent"


def measure(point: Point, pool: Tensor, floor: Floor) -> Row:
    """Check and time one point."""
    data = Data(point, pool)
    plan = data.plan()
    out, error = check(plan, data)
    plans = {OURS: plan, **variants(plan, data)}
    ours = {name: ours_graph(each, data) for name, each in plans.items()}
    makers = {name: partial(adapter, data) for name, adapter in baselines.running(point).items()}
    others = agreeing(point, makers, partial(relative_error, right=out), data.num_sets)
    times, lowest = beside_floors({**ours, **others}, data, floor)
    return Row(
        point=str(point),
        mib=point.read_bytes / 2**20,
        kernel=plan.dispatch.config.name,
        launch=str(plan.dispatch.shape),
        source_digest=source_digest(plan.dispatch.config),
        num_splits=plan.dispatch.num_splits,
        relative_error=error,
        floor=lowest,
        ours=times[OURS],
        balanced=times.get(BALANCED),
        dependent=times.get(DEPENDENT),
        measured={name: times[name] for name in others},
        recorded_scaled=baselines.scaled(point, lowest),
        limit=point.limit if isinstance(point, Ragged) else None,
    )


def variants(plan: gqa_cutlass.Plan, data: Data) -> dict[str, gqa_cutlass.Plan]:
    """Other plans for the same steps, those that differ; each is checked."""
    others = {BALANCED: data.plan(ragged=True), DEPENDENT: data.plan(dependent=True)}
    differing = {n: p for n, p in others.items() if p.dispatch.shape != plan.dispatch.shape}
    for other in differing.values():
        check(other, data)
    return differing


def fitting(
    points: Iterable[_Point], free: float, needed: Callable[[_Point], int] = pool_bytes
) -> list[_Point]:
    """The points whose buffer sets fit into so many bytes; the others are named."""
    fit = []
    for point in points:
        if needed(point) <= free:
            fit.append(point)
        else:
            need = needed(point) / 2**30
            print(f"bench: {point} left out: needs {need:.1f} GiB", file=sys.stderr)
    return fit


def run(
    wanted: str, folder: Path, commit: str, only: Collection[str] = PARTS
) -> tuple[Record, Path]:
    """Measure, and write what there is after each part.

    Args:
        wanted: Part of the names of the points to measure.
        folder: Where the record goes, in a file named after the GPU.
        commit: What is measured.
        only: Which parts.

    Returns:
        The record and its file.

    Raises:
        InputError: No point is wanted, or none fits into the GPU's memory.
    """
    free = POOL_SHARE * torch.cuda.mem_get_info()[0]
    points = fitting((p for p in (*GRID, *RAGGED) if wanted in str(p)), free)
    cases = [
        case for case in CASES
        if wanted in str(case.point) and len(fitting(case.points, free)) == len(case.points)
    ]  # fmt: skip
    serving = fitting((p for p in SERVING if wanted in str(p)), free, bytes_needed)
    items: dict[str, list[Any]] = {
        "grid": [point for point in points if not isinstance(point, Ragged)],
        "ragged": [point for point in points if isinstance(point, Ragged)],
        "prefill": [point for point in points if point in PREFILL],
        "features": cases,
        "merges": [merge for merge in MERGES if wanted in str(merge)],
        "serving": serving,
    }
    items = {part: each if part in only else [] for part, each in items.items()}
    if not any(items[part] for part in ("grid", "ragged", "serving")):
        raise InputError(
            f"bench: --points: got {wanted!r}, in the name of no point that fits into this GPU's "
            f"memory; allowed: a part of a name, like {str(GRID[0])!r} or 'ragged'."
        )
    for name, module in baselines.missing().items():
        print(f"bench: {name} left out: no module {module} here", file=sys.stderr)
    attended = [*items["grid"], *items["ragged"]]
    attended += [point for case in items["features"] for point in case.points]
    needed = [*map(pool_bytes, attended), *map(bytes_needed, items["serving"])]
    with progress(sum(map(len, items.values())) + ("host" in only)) as step:
        pool, floor = random_pool(max(needed)), Floor()

        def each(part: str, measured: Callable[[Any], _Result]) -> list[_Result]:
            found = []
            for item in items[part]:
                found.append(measured(item))
                step(f"{item.feature} {item.point}" if isinstance(item, Case) else str(item))
            return found

        rows = each("grid", lambda point: measure(point, pool, floor))
        clocks = ask_gpu("clocks.sm,clocks.mem")
        record = Record(run={**provenance(), "clocks": clocks, "commit": commit}, rows=rows)
        path = folder / f"{record.run['gpu'].lower().replace(' ', '-')}.json"
        record.save(path)
        record = replace(record, ragged=each("ragged", lambda point: measure(point, pool, floor)))
        record.save(path)
        filled = each("prefill", lambda point: measure_prefill(point, pool))
        record = replace(record, prefill=[found for found in filled if found is not None])
        record.save(path)
        features = each("features", lambda case: measure_feature(case, pool))
        record = replace(record, features=features)
        record.save(path)
        record = replace(record, merges=each("merges", lambda merge: measure_merge(merge, floor)))
        record.save(path)
        served = each("serving", lambda point: measure_serving(point, pool, floor))
        record = replace(record, serving=with_limits(served, items["serving"]))
        record.save(path)
        if "host" in only:
            record = replace(record, host=host_costs())
            record.save(path)
            step("host")
    return record, path
