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
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

import gqa_cutlass
from bench import baselines
from bench.data import Data, check, pool_bytes, random_pool, relative_error
from bench.features import CASES, Case, measure_feature
from bench.host import host_costs
from bench.merges import MERGES, measure_merge
from bench.points import GRID, PREFILL, RAGGED, Point, Ragged
from bench.prefill import measure_prefill
from bench.record import Record, Row
from bench.timing import Floor, Graph, agreeing, interleaved
from gqa_cutlass.cli.output import progress
from gqa_cutlass.codegen import source_digest
from gqa_cutlass.errors import InputError
from gqa_cutlass.proof.evidence import ask_gpu, provenance

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")
POOL_SHARE = 0.8  # of the GPU's free memory
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
    floors = {f"floor {grid}": floor_graph(data, floor, grid) for grid in Floor.GRIDS}
    times = interleaved({**ours, **others, **floors})
    lowest = min(times[name] for name in floors)
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


def ours_graph(plan: gqa_cutlass.Plan, data: Data) -> Graph:
    """A plan's steps over all buffer sets."""
    return Graph(lambda i: data.step(plan, i), data.num_sets)


def floor_graph(data: Data, floor: Floor, grid: int) -> Graph:
    """The roofline kernel on one grid size, over the bytes that a step reads."""
    return Graph(lambda i: floor.read(data.flat[i], grid), data.num_sets)


def fitting(points: Iterable[Point], free: float) -> list[Point]:
    """The points whose buffer sets fit into so many bytes; the others are named."""
    fit = []
    for point in points:
        if pool_bytes(point) <= free:
            fit.append(point)
        else:
            need = pool_bytes(point) / 2**30
            print(f"bench: {point} left out: needs {need:.1f} GiB", file=sys.stderr)
    return fit


def run(wanted: str, folder: Path, commit: str) -> tuple[Record, Path]:
    """Measure, and write what there is after each part.

    Args:
        wanted: Part of the names of the points to measure.
        folder: Where the record goes, in a file named after the GPU.
        commit: What is measured.

    Returns:
        The record and its file.

    Raises:
        InputError: No point is wanted, or none fits into the GPU's memory.
    """
    free = POOL_SHARE * torch.cuda.mem_get_info()[0]
    points = fitting((p for p in (*GRID, *RAGGED) if wanted in str(p)), free)
    if not points:
        raise InputError(
            f"bench: --points: got {wanted!r}, in the name of no point that fits into this GPU's "
            f"memory; allowed: a part of a name, like {str(GRID[0])!r} or 'ragged'."
        )
    for name, module in baselines.missing().items():
        print(f"bench: {name} left out: no module {module} here", file=sys.stderr)
    cases = [
        case for case in CASES
        if wanted in str(case.point) and len(fitting(case.points, free)) == len(case.points)
    ]  # fmt: skip
    attended = [*points, *(point for case in cases for point in case.points)]
    prompts = [point for point in points if point in PREFILL]
    merges = [merge for merge in MERGES if wanted in str(merge)]
    with progress(len(points) + len(prompts) + len(cases) + len(merges) + 1) as step:
        pool, floor = random_pool(attended), Floor()

        def each(items: Iterable[_Item], measured: Callable[[_Item], _Result]) -> list[_Result]:
            found = []
            for item in items:
                found.append(measured(item))
                step(f"{item.feature} {item.point}" if isinstance(item, Case) else str(item))
            return found

        grid = [point for point in points if not isinstance(point, Ragged)]
        rows = each(grid, lambda point: measure(point, pool, floor))
        clocks = ask_gpu("clocks.sm,clocks.mem")
        record = Record(run={**provenance(), "clocks": clocks, "commit": commit}, rows=rows)
        path = folder / f"{record.run['gpu'].lower().replace(' ', '-')}.json"
        record.save(path)
        uneven = [point for point in points if isinstance(point, Ragged)]
        record = replace(record, ragged=each(uneven, lambda point: measure(point, pool, floor)))
        record.save(path)
        filled = each(prompts, lambda point: measure_prefill(point, pool))
        record = replace(record, prefill=[found for found in filled if found is not None])
        record.save(path)
        record = replace(record, features=each(cases, lambda case: measure_feature(case, pool)))
        record.save(path)
        record = replace(record, merges=each(merges, lambda merge: measure_merge(merge, floor)))
        record.save(path)
        record = replace(record, host=host_costs())
        record.save(path)
        step("host")
    return record, path
