"""Microseconds per decode step against its peers and the read-only floor.

Protocol: one CUDA graph per contender holds one call per buffer set; sets rotate through at least
256 MiB, four times an H200's L2, so the cache is cold. Contenders take turns in one process; the
median of twelve turns counts. Data are random. Ours appends the new token; peers only attend. Each
point is checked against float32 before it is timed, with NaN from where the new token goes to the
cache's end; peers are checked against our output, and left out where they fail.

Peers that are not installed enter with times recorded elsewhere (peers.json), scaled by the floor.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

import peers
import report
import torch
from data import Data, check, pool_bytes, random_pool, relative_error
from host import host_costs
from points import GRID, RAGGED, Point, Ragged
from record import Record, Row
from timing import Floor, Graph, interleaved
from torch import Tensor

import gqa_cutlass
from gqa_cutlass.codegen import source_digest
from gqa_cutlass.evidence import ask_gpu, provenance

RESULTS = Path(__file__).parent / "results"
ALLOWED_ERROR = 1e-2
POOL_SHARE = 0.8  # of the GPU's free memory


def measure(point: Point, pool: Tensor, floor: Floor) -> Row:
    """Check and time one point."""
    data = Data(point, pool)
    plan = gqa_cutlass.plan(
        data.q, data.k[0], data.v[0], data.new_k, data.new_v, cache_seqlens=data.seqlens
    )
    out, error = check(plan, data)
    assert error < ALLOWED_ERROR, f"{point}: relative error {error}"
    ours = Graph(lambda i: data.step(plan, i), data.num_sets)
    others = peer_graphs(data, out)
    floors = {f"floor {grid}": floor_graph(data, floor, grid) for grid in Floor.GRIDS}
    times = interleaved({"ours": ours, **others, **floors})
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
        ours=times["ours"],
        measured={name: times[name] for name in others},
        recorded_scaled=peers.scaled(point, lowest),
        limit=point.limit if isinstance(point, Ragged) else None,
    )


def floor_graph(data: Data, floor: Floor, grid: int) -> Graph:
    return Graph(lambda i: floor.read(data.flat[i], grid), data.num_sets)


def peer_graphs(data: Data, out: Tensor) -> dict[str, Graph]:
    """Graphs of the peers that run here and agree with our output; the others say why not."""
    graphs = {}
    for name, adapter in peers.running(data.point).items():
        try:
            attend = adapter(data)
            error = relative_error(attend(0), out)
            if not error < ALLOWED_ERROR:
                raise ValueError(f"relative error {error}")
            graphs[name] = Graph(attend, data.num_sets)
        except Exception as failure:  # whatever another library raises is no reason to end here
            reason = (str(failure) or type(failure).__name__).splitlines()[0]
            print(f"bench: {name} left out at {data.point}: {reason}", file=sys.stderr)
    return graphs


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


def run(wanted: str, path: Path | None) -> Record:
    """Measure, and write what there is after each part.

    Args:
        wanted: Part of the names of the points to measure.
        path: JSON file; None: one named after the GPU.
    """
    free = POOL_SHARE * torch.cuda.mem_get_info()[0]
    points = fitting((p for p in (*GRID, *RAGGED) if wanted in str(p)), free)
    if not points:
        sys.exit(f"bench: no point to measure has {wanted!r} in its name")
    pool, floor = random_pool(points), Floor()
    rows = [measure(p, pool, floor) for p in points if not isinstance(p, Ragged)]
    about = {**provenance(), "clocks": ask_gpu("clocks.sm,clocks.mem")}
    path = path or RESULTS / f"{about['gpu'].lower().replace(' ', '-')}.json"
    Record(run=about, rows=rows).save(path)
    ragged = [measure(p, pool, floor) for p in points if isinstance(p, Ragged)]
    Record(run=about, rows=rows, ragged=ragged).save(path)
    record = Record(run=about, rows=rows, ragged=ragged, host=host_costs())
    record.save(path)
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--points", default="", help="only points whose name contains this")
    parser.add_argument("--out", type=Path, help="JSON file; default: bench/results/<gpu>.json")
    parser.add_argument("--markdown", type=Path, help="measure nothing; print this file's tables")
    options = parser.parse_args()
    if options.markdown:
        print(report.markdown(Record.load(options.markdown)))
        return
    if options.points and not options.out:
        parser.error("--points measures a part of the grid: name a file with --out")
    if not torch.cuda.is_available():
        sys.exit("bench: needs a GPU; the last results are in bench/results/")
    report.show(run(options.points, options.out))


if __name__ == "__main__":
    main()
