"""Parts merged: `merge_states` beside PyTorch's operators and the floor of the bytes.

Protocol: as for the grid. The floor reads as many bytes as a merge reads and writes. Every result
is checked against the operators' in float32. `python3 -m bench.merges` measures this part alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from bench.data import ALLOWED_ERROR, num_sets, relative_error
from bench.record import Merged
from bench.timing import Floor, interleaved
from gqa_cutlass import merge_states
from gqa_cutlass.codegen.schema.rounding import ceil_div, round_up
from gqa_cutlass.merge import by_operators
from gqa_cutlass.tuning.timing import Graph

MOST = 1.2  # target: of the floor
_HEADS, _HEAD_DIM = 32, 128
_FLOAT_BYTES = 4
_DEVICE = "cuda"


@dataclass(frozen=True, kw_only=True)
class Merge:
    """What is merged.

    Args:
        parts: How many.
        batch: Sequences.
        dtype: Of the parts.
        out_dtype: Of the result.
    """

    parts: int
    batch: int
    dtype: torch.dtype
    out_dtype: torch.dtype = torch.bfloat16

    def __str__(self) -> str:
        kind = str(self.dtype).removeprefix("torch.")
        return f"{self.parts} parts of {self.batch}x{_HEADS}x{_HEAD_DIM} in {kind}"

    @property
    def _rows(self) -> int:
        return self.batch * _HEADS

    @property
    def read_bytes(self) -> int:
        """Bytes of outputs and log-sum-exps, read once."""
        return self.parts * self._rows * (_HEAD_DIM * self.dtype.itemsize + _FLOAT_BYTES)

    @property
    def num_bytes(self) -> int:
        """Bytes that are read, and those of the result."""
        return self.read_bytes + self._rows * (_HEAD_DIM * self.out_dtype.itemsize + _FLOAT_BYTES)


MERGES = tuple(
    Merge(parts=parts, batch=batch, dtype=dtype)
    for dtype in (torch.float32, torch.bfloat16)
    for batch in (64, 4096)
    for parts in (2, 8)
)


class Data:
    """Sets of parts, each part a tensor of its own, and memory as large for the floor.

    Args:
        merge: What is merged.
    """

    def __init__(self, merge: Merge) -> None:
        self.merge = merge
        self.num_sets = num_sets(merge.num_bytes)
        shape = self.num_sets, merge.parts, merge.batch, _HEADS
        self.outs = torch.randn(*shape, _HEAD_DIM, dtype=merge.dtype, device=_DEVICE)
        self.lses = torch.randn(*shape, device=_DEVICE)
        self._results: dict[int, tuple[Tensor, Tensor]] = {}  # kept, so that none is written twice

    def run(self, i: int) -> None:
        """Merge a set."""
        outs, lses = list(self.outs[i]), list(self.lses[i])
        self._results[i] = merge_states(outs, lses, out_dtype=self.merge.out_dtype)

    def run_operators(self, i: int) -> None:
        """The same by PyTorch's operators, of parts that lie in one tensor."""
        by_operators(self.outs[i], self.lses[i], self.merge.out_dtype)

    def error(self) -> float:
        """Relative error of the first set's result.

        Raises:
            AssertionError: It is wrong.
        """
        self.run(0)
        right, _ = by_operators(self.outs[0], self.lses[0], torch.float32)
        error = relative_error(self._results[0][0], right)
        assert error < ALLOWED_ERROR, f"{self.merge}: relative error {error}"
        return error

    @cached_property
    def flat(self) -> Tensor:
        """Per set, as many bytes as a merge reads and writes."""
        numbers = round_up(ceil_div(self.merge.num_bytes, _FLOAT_BYTES), 4)
        return torch.zeros(self.num_sets, numbers, device=_DEVICE)


def measure_merge(merge: Merge, floor: Floor) -> Merged:
    """Check and time one merge."""
    data = Data(merge)
    error = data.error()
    graphs = {"ours": Graph(data.run, data.num_sets)}
    graphs["operators"] = Graph(data.run_operators, data.num_sets)
    for grid in floor.GRIDS:
        graphs[f"floor {grid}"] = _floor_graph(data, floor, grid)
    times = interleaved(graphs)
    return Merged(
        merge=str(merge), mib=merge.num_bytes / 2**20, relative_error=error, ours=times["ours"],
        operators=times["operators"], floor=min(times[f"floor {grid}"] for grid in floor.GRIDS),
        limit=MOST,
    )  # fmt: skip


def _floor_graph(data: Data, floor: Floor, grid: int) -> Graph:
    return Graph(lambda i: floor.read(data.flat[i], grid), data.num_sets)


def main() -> None:
    """Measure and print."""
    floor = Floor()
    for merge in MERGES:
        row = measure_merge(merge, floor)
        print(
            f"{row.merge:40} {row.mib:7.1f} MiB  floor {row.floor:7.2f} us  ours {row.ours:7.2f} us"
            f"  {row.over_floor:.2f}x  operators {row.operators:8.2f} us"
        )


if __name__ == "__main__":
    main()
