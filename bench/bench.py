"""Microseconds per decode step against PyTorch SDPA and the read-only floor, on the grid.

Protocol: one CUDA graph per contender holds one call per buffer set; sets rotate through at least
256 MiB, four times an H200's L2, so the cache is cold. Contenders take turns in one process; the
median of twelve turns counts. Data are random. Ours appends the new token; SDPA only attends. Each
point is checked against float32 before it is timed, with NaN where the new token goes.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from points import GRID, Point
from rich.console import Console
from rich.table import Table
from timing import Floor, Graph, interleaved
from torch.nn.attention import SDPBackend, sdpa_kernel

import gqa_cutlass
from gqa_cutlass.codegen import source_digest
from gqa_cutlass.evidence import ask_gpu, provenance

RESULTS = Path(__file__).parent / "results"
ROTATE_BYTES, MAX_SETS = 256 << 20, 512
PEERS = {"SDPA flash": SDPBackend.FLASH_ATTENTION, "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION}


class Data:
    """Buffer sets for one point, cut from one pool of random numbers."""

    def __init__(self, point: Point, pool: torch.Tensor) -> None:
        elements = point.cache_bytes // 4
        wanted = -(-ROTATE_BYTES // point.cache_bytes) + 1
        self.num_sets = max(2, min(MAX_SETS, wanted, pool.numel() // (2 * elements)))
        shape = point.batch, point.tokens, point.num_kv_heads, point.head_dim
        halves = pool[: 2 * elements * self.num_sets].view(self.num_sets, 2, *shape)
        self.flat = [halves[i] for i in range(self.num_sets)]
        self.k, self.v = list(halves[:, 0]), list(halves[:, 1])
        kind = {"dtype": pool.dtype, "device": pool.device}
        self.q = torch.randn(point.batch, point.num_q_heads, point.head_dim, **kind)
        self.new_k = torch.randn(point.batch, point.num_kv_heads, point.head_dim, **kind)
        self.new_v = torch.randn_like(self.new_k)
        self.seqlens = torch.full(
            (point.batch,), point.tokens - 1, dtype=torch.int32, device=pool.device
        )


def sdpa(data: Data, i: int) -> torch.Tensor:
    return F.scaled_dot_product_attention(
        data.q[:, :, None], data.k[i].transpose(1, 2), data.v[i].transpose(1, 2), enable_gqa=True
    )


def check(plan: gqa_cutlass.Plan, data: Data) -> float:
    """Relative error by norm against float32; the last rows, NaN before, must be appended."""
    data.k[0][:, -1] = float("nan")
    data.v[0][:, -1] = float("nan")
    out = plan(data.q, data.k[0], data.v[0], data.new_k, data.new_v, data.seqlens)
    assert torch.equal(data.k[0][:, -1], data.new_k) and torch.equal(data.v[0][:, -1], data.new_v)
    difference = norm = 0.0
    for b in range(data.q.shape[0]):
        k, v = (x[0][b].float().transpose(0, 1) for x in (data.k, data.v))
        grouped = data.q[b].float().view(k.shape[0], -1, k.shape[2])
        scores = grouped @ k.transpose(1, 2) * k.shape[2] ** -0.5
        expected = (torch.softmax(scores, -1) @ v).view_as(out[b])
        difference += (out[b].float() - expected).square().sum().item()
        norm += expected.square().sum().item()
    return float((difference / norm) ** 0.5)


def measure(point: Point, pool: torch.Tensor, floor: Floor) -> dict[str, object]:
    """Check and time one point."""
    data = Data(point, pool)
    args = data.q, data.k[0], data.v[0], data.new_k, data.new_v
    plan = gqa_cutlass.plan(*args, cache_seqlens=data.seqlens)
    error = check(plan, data)
    assert error < 1e-2, f"{point}: relative error {error}"
    graphs = {
        "ours": Graph(
            lambda i: plan(data.q, data.k[i], data.v[i], data.new_k, data.new_v, data.seqlens),
            data.num_sets,
        )
    }
    for name, backend in PEERS.items():
        with sdpa_kernel(backend):
            try:
                graphs[name] = Graph(lambda i: sdpa(data, i), data.num_sets)
            except RuntimeError as failure:  # a backend that does not support the problem
                print(f"{name} on {point}: {str(failure).splitlines()[0]}", file=sys.stderr)
    for grid in Floor.GRIDS:
        graphs[f"floor {grid}"] = Graph(
            lambda i, grid=grid: floor.read(data.flat[i], grid), data.num_sets
        )
    times = interleaved(graphs)
    lowest = min(v for name, v in times.items() if name.startswith("floor"))
    return {
        "point": str(point),
        "mib": point.cache_bytes / 2**20,
        "kernel": plan.dispatch.config.name,
        "source_digest": source_digest(plan.dispatch.config),
        "num_splits": plan.dispatch.num_splits,
        "relative_error": error,
        "floor": lowest,
        **{name: v for name, v in times.items() if not name.startswith("floor")},
    }


def report(rows: list[dict[str, object]], run: dict[str, str]) -> None:
    """Print the table, the geometric mean and the worst point."""
    table = Table("point", "MiB", "floor", "ours", *PEERS, "to best SDPA", "to flash", "of floor")
    ratios = []
    for row in rows:
        ours = float(row["ours"])
        peers = [float(row[name]) for name in PEERS if name in row]
        ratios.append(min(peers, default=float("nan")) / ours)
        flash = float(row["SDPA flash"]) / ours if "SDPA flash" in row else float("nan")
        table.add_row(
            str(row["point"]), f"{row['mib']:.1f}", f"{row['floor']:.2f}", f"{ours:.2f}",
            *(f"{row[name]:.2f}" if name in row else "-" for name in PEERS),
            f"{ratios[-1]:.2f}x", f"{flash:.2f}x", f"{float(row['floor']) / ours:.0%}",
        )  # fmt: skip
    console = Console(width=140)
    console.print(", ".join(f"{key}: {value}" for key, value in run.items()))
    console.print(table)
    mean = float(torch.tensor(ratios).log().mean().exp())
    console.print(f"geometric mean {mean:.2f}x, worst {min(ratios):.2f}x of the best SDPA backend")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--points", default="", help="only points whose name contains this")
    parser.add_argument("--out", type=Path, help="JSON file; default: bench/results/<gpu>.json")
    options = parser.parse_args()
    if options.points and not options.out:
        parser.error("--points measures a part of the grid: name a file with --out")
    if not torch.cuda.is_available():
        sys.exit("bench: needs a GPU; the last results are in bench/results/")
    pool = torch.randn(7 << 28, dtype=torch.float16, device="cuda")
    floor = Floor()
    rows = [measure(p, pool, floor) for p in GRID if options.points in str(p)]
    run = {**provenance(), "clocks": ask_gpu("clocks.sm,clocks.mem")}
    name = run["gpu"].lower().replace(" ", "-")
    out = options.out or RESULTS / f"{name}.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps({"run": run, "microseconds": rows}, indent=1) + "\n")
    report(rows, run)


if __name__ == "__main__":
    main()
