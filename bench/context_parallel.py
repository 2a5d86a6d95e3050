"""Decode steps over contexts that GPUs of one host share: how long attention and exchange take.

    torchrun --nproc-per-node 2 -m bench.context_parallel --out FILE

Every point runs on one GPU, with `gqa_decode`, and on all ranks, with every exchange: the whole
step; the local part alone, by ranks that are groups of their own; and the exchange alone. Steps
append their token, lengths are on the device, and every call is one of a CUDA graph whose caches
are cold. Times are medians of the slowest rank, in microseconds. Results are compared with those of
one GPU, and between ranks to the bit. Without GPUs it runs at toy sizes, and times are of ptxsim.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from bench.data import ALLOWED_ERROR, num_sets
from gqa_cutlass import check_overflow, gqa_decode
from gqa_cutlass.distributed import Sharding, decode_context_parallel
from gqa_cutlass.distributed.exchange import (
    EXCHANGES,
    Exchange,
    Part,
    chosen,
    received_bytes,
    whole,
)
from gqa_cutlass.distributed.groups import Ranks, ranks_of

GPU = torch.cuda.is_available()
WARM_UP, ROUNDS = (2, 12) if GPU else (0, 1)
_FILL = 1 << 28

Call = Callable[[int], object]  # a buffer set's index


@dataclass(frozen=True, kw_only=True)
class Point:
    """A problem.

    Args:
        batch: Sequences.
        tokens: Tokens of each before the step.
        num_q_heads: Query heads.
        num_kv_heads: KV heads.
        head_dim: Dimension per head.
    """

    batch: int
    tokens: int
    num_q_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128

    @property
    def cache_bytes(self) -> int:
        """Of K and V in bfloat16."""
        return self.batch * self.tokens * self.num_kv_heads * self.head_dim * 4


POINTS = (
    (
        Point(batch=1, tokens=131072),
        Point(batch=1, tokens=1048576),
        Point(batch=8, tokens=131072),
    )
    if GPU
    else (Point(batch=2, tokens=60, num_q_heads=8, num_kv_heads=2, head_dim=64),)
)


@dataclass(frozen=True, kw_only=True)
class Row:
    """What was measured of a point with one exchange; times are microseconds per step.

    Args:
        point: The problem.
        ranks: GPUs.
        exchange: How parts are exchanged.
        is_default: Whether the rule takes this one.
        received_bytes: What a rank receives.
        one_gpu: The step on one GPU, by `gqa_decode`.
        local: A rank's part of it.
        exchanged: The exchange and the merge.
        total: The step on all ranks.
        relative_error: By norm, against one GPU.
    """

    point: Point
    ranks: int
    exchange: Exchange
    is_default: bool
    received_bytes: int
    one_gpu: float
    local: float
    exchanged: float
    total: float
    relative_error: float

    def __str__(self) -> str:
        return (
            f"{self.point.batch} x {self.point.tokens}, {self.exchange}{'*' * self.is_default}: "
            f"one GPU {self.one_gpu:.1f} us, {self.ranks} GPUs {self.total:.1f} us, of which "
            f"{self.local:.1f} us local; exchange alone {self.exchanged:.1f} us; relative error "
            f"{self.relative_error:.1e}"
        )


class Data:
    """Buffer sets of a point, the same on every rank, and this rank's shards of them."""

    def __init__(self, point: Point, ranks: Ranks, device: torch.device) -> None:
        generator = torch.Generator(device).manual_seed(0)
        self.sets = num_sets(point.cache_bytes // ranks.size) if GPU else 1
        local = Sharding(rank=0, size=ranks.size).count(point.tokens + 1)
        room = local * ranks.size
        kind = {"dtype": torch.bfloat16, "device": device}
        shape = self.sets, 2, point.batch, room, point.num_kv_heads, point.head_dim
        self.caches = torch.empty(shape, **kind)  # type: ignore[call-overload]
        for part in self.caches.view(-1).split(_FILL):
            part.normal_(generator=generator)
        self.shards = self.caches[:, :, :, ranks.rank :: ranks.size].contiguous()
        self.q, self.k, self.v = (
            torch.randn(point.batch, heads, point.head_dim, generator=generator, **kind)  # type: ignore[call-overload]
            for heads in (point.num_q_heads, point.num_kv_heads, point.num_kv_heads)
        )
        count = torch.full((point.batch,), point.tokens, dtype=torch.int32, device=device)
        self.lengths = count
        held = Sharding(rank=ranks.rank, size=ranks.size).count(point.tokens)
        self.local_lengths = torch.full_like(count, min(held, local - 1))

    def on_one(self, i: int) -> Tensor:
        """The step on one GPU."""
        given = self.q, *self.caches[i], self.k, self.v
        return gqa_decode(*given, cache_seqlens=self.lengths)

    def on_all(self, i: int, exchange: Exchange | None) -> Tensor:
        """The step on all ranks."""
        given = self.q, *self.shards[i], self.k, self.v
        return decode_context_parallel(*given, cache_seqlens=self.lengths, exchange=exchange)

    def alone(self, i: int, group: dist.ProcessGroup) -> Tensor:
        """A rank's part, by a rank that is a group of its own."""
        given = self.q, *self.shards[i], self.k, self.v
        return decode_context_parallel(*given, cache_seqlens=self.local_lengths, group=group)


def micros(call: Call, sets: int, device: torch.device) -> float:
    """Median microseconds per call, of the slowest rank; all measure at once.

    Args:
        call: Captured once per buffer set.
        sets: How many there are.
        device: Where it runs.
    """
    replay = _captured(call, sets) if GPU else lambda: [call(i) for i in range(sets)]
    found = []
    for turn in range(WARM_UP + ROUNDS):
        dist.barrier()
        taken = torch.tensor([_timed(replay) / sets], device=device)
        dist.all_reduce(taken, op=dist.ReduceOp.MAX)
        if turn >= WARM_UP:
            found.append(taken.item())
    return statistics.median(found)


def _captured(call: Call, sets: int) -> Callable[[], object]:
    for i in range(sets):
        call(i)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    # NCCL has a thread that asks for events meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for i in range(sets):
            call(i)
    return graph.replay


def _timed(replay: Callable[[], object]) -> float:
    if not GPU:
        start = time.perf_counter()
        replay()
        return (time.perf_counter() - start) * 1e6
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    first.record()
    replay()
    last.record()
    last.synchronize()
    return float(first.elapsed_time(last)) * 1e3


def measure(point: Point, ranks: Ranks, own: dist.ProcessGroup, device: torch.device) -> list[Row]:
    """Measure a point with every exchange; on all ranks."""
    data = Data(point, ranks, device)
    expected = data.on_one(0)
    one = micros(data.on_one, data.sets, device)
    local = micros(partial(data.alone, group=own), data.sets, device)
    rows, heads = [], point.batch * point.num_q_heads
    default = chosen(ranks.size, heads, point.head_dim, sharded=False)
    for exchange in EXCHANGES:
        out = data.on_all(0, exchange)
        _check_alike(out, ranks)
        error = ((out.float() - expected.float()).norm() / expected.float().norm()).item()
        if not error < ALLOWED_ERROR:
            raise ValueError(f"{point}, {exchange}: relative error {error}")
        part = Part.empty((point.batch, point.num_q_heads, point.head_dim), device)
        part.memory.normal_()
        step = partial(data.on_all, exchange=exchange)
        merge = partial(_exchanged, ranks=ranks, part=part, exchange=exchange)
        rows.append(
            Row(
                point=point,
                ranks=ranks.size,
                exchange=exchange,
                is_default=exchange == default,
                received_bytes=received_bytes(exchange, ranks.size, heads, point.head_dim),
                one_gpu=one,
                local=local,
                exchanged=micros(merge, data.sets, device),
                total=micros(step, data.sets, device),
                relative_error=error,
            )
        )
    check_overflow(device)
    return rows


def _exchanged(_: int, ranks: Ranks, part: Part, exchange: Exchange) -> object:
    return whole(ranks, part, exchange, torch.bfloat16)


def _check_alike(out: Tensor, ranks: Ranks) -> None:
    """Raise ValueError unless all ranks have the same bits."""
    everything = out.new_empty(ranks.size, *out.shape)
    ranks.all_gather(everything.view(-1), out.contiguous().view(-1))
    if not torch.equal(everything, everything[:1].expand_as(everything)):
        raise ValueError("results differ between ranks")


def main() -> None:
    """Measure all points, print them, and write them to a file."""
    parser = argparse.ArgumentParser(prog="bench.context_parallel", description=__doc__)
    parser.add_argument("--out", type=Path, help="a JSON file to write")
    asked = parser.parse_args()
    local = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local) if GPU else torch.device("cpu")
    if GPU:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if GPU else "gloo")
    ranks = ranks_of(None)
    alone = [dist.new_group([rank]) for rank in range(ranks.size)]  # all ranks make all of them
    rows = []
    for point in POINTS:
        with torch.inference_mode():
            found = measure(point, ranks, alone[ranks.rank], device)
        rows += found
        if ranks.rank == 0:
            print("\n".join(map(str, found)), flush=True)
    if ranks.rank == 0 and asked.out:
        record = {
            "gpu": torch.cuda.get_device_name(device) if GPU else "ptxsim",
            "ranks": ranks.size,
            "torch": torch.__version__,
            "nccl": ".".join(map(str, torch.cuda.nccl.version())) if GPU else None,
            "rows": [asdict(row) for row in rows],
        }
        asked.out.write_text(json.dumps(record, indent=2) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
