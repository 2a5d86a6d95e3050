"""How calls are timed: CUDA graphs over cold data, contenders taking turns."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from cuda.core import Device, LaunchConfig, ObjectCode, Stream, launch
from torch import Tensor

from bench.data import ALLOWED_ERROR, Data
from bench.points import Point
from gqa_cutlass.call.plan import Plan
from gqa_cutlass.codegen.compile import compile_source
from gqa_cutlass.gpu.driver import describe_device
from gqa_cutlass.tuning.timing import Graph, evict

WARM_UP, ROUNDS = 2, 12

Attend = Callable[[int], Tensor]  # a buffer set's index to the output


def interleaved(graphs: dict[str, Graph]) -> dict[str, float]:
    """Median microseconds per call of every contender, one replay each in turn, L2 cold."""
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for turn in range(WARM_UP + ROUNDS):
        for name, graph in graphs.items():
            evict()
            micros = graph.micros_per_call()
            if turn >= WARM_UP:
                times[name].append(micros)
    return {name: statistics.median(values) for name, values in times.items()}


def agreeing(
    point: Point,
    contenders: Mapping[str, Callable[[], Attend]],
    error: Callable[[Tensor], float],
    num_sets: int,
) -> dict[str, Graph]:
    """Graphs of the contenders that run here and are right; the others say why not.

    Args:
        point: What they attend.
        contenders: How each is made, by name.
        error: Relative error of the output for the first buffer set.
        num_sets: Buffer sets.
    """
    graphs = {}
    for name, make in contenders.items():
        try:
            attend = make()
            wrong = error(attend(0))
            if not wrong < ALLOWED_ERROR:
                raise ValueError(f"relative error {wrong}")
            graphs[name] = Graph(attend, num_sets)
        except Exception as failure:  # whatever another library raises is no reason to end here
            reason = (str(failure) or type(failure).__name__).splitlines()[0]
            print(f"bench: {name} left out at {point}: {reason}", file=sys.stderr)
    return graphs


class Floor:
    """The read-only kernel, on several grid sizes."""

    GRIDS = (132, 264, 528, 1056, 2112)

    def __init__(self) -> None:
        device = Device(torch.cuda.current_device())
        device.set_current()
        source = (Path(__file__).parent / "floor.cu").read_text()
        arch = describe_device(torch.cuda.current_device()).arch.name
        cubin = compile_source(source, "floor", arch).code
        self._kernel = ObjectCode.from_cubin(cubin).get_kernel("read_all")
        self._sink = torch.zeros(1, dtype=torch.int32, device="cuda")

    def read(self, data: Tensor, grid: int) -> None:
        """Read a tensor once."""
        stream = Stream.from_handle(torch.cuda.current_stream().cuda_stream)
        count = np.uint64(data.numel() * data.element_size() // 16)
        arguments = data.data_ptr(), count, self._sink.data_ptr()
        launch(stream, LaunchConfig(grid=grid, block=256), self._kernel, *arguments)


def ours_graph(plan: Plan, data: Data) -> Graph:
    """A plan's steps over all buffer sets."""
    return Graph(lambda i: data.step(plan, i), data.num_sets)


def beside_floors(
    graphs: dict[str, Graph], data: Data, floor: Floor
) -> tuple[dict[str, float], float]:
    """Microseconds of graphs, taken in turns with the roofline kernel, and of its fastest grid."""
    floors = {f"floor {grid}": _floor_graph(data, floor, grid) for grid in floor.GRIDS}
    times = interleaved({**graphs, **floors})
    return times, min(times[name] for name in floors)


def _floor_graph(data: Data, floor: Floor, grid: int) -> Graph:
    """The roofline kernel on one grid size, over the bytes that a step reads."""
    return Graph(lambda i: floor.read(data.flat[i], grid), data.num_sets)
