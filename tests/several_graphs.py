"""Several CUDA graphs, replayed beside eager calls, in a process of its own: which allocator torch
uses is settled when it starts. Every result is compared with that of an eager call, to the bit."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from cases import Step, make_step
from torch import Tensor

import gqa_cutlass
from gqa_cutlass import gqa_decode

# Without a workspace, with one for splits, with clusters, and with clusters that share a sequence.
SHAPES = (
    dict(lengths=[500, 20], max_seq_len=512, num_kv_heads=64, group_size=1),
    dict(lengths=[3000, 10, 0], max_seq_len=4096, num_kv_heads=8, vec_width=4),
    dict(lengths=[900], max_seq_len=1024),
    dict(lengths=[60000], max_seq_len=65536, num_kv_heads=1),
)
ROUNDS, GENERATIONS = 20, 3
Call = Callable[[], Tensor]


@dataclass
class Case:
    """A call, what it gives, and graphs of it with the outputs that they write."""

    call: Call
    expected: Tensor
    graphs: list[tuple[torch.cuda.CUDAGraph, Tensor]]


def of_torch(step: Step) -> list[Call]:
    """The same with a call of torch alone: what an allocator cannot do for anyone."""
    return [lambda: torch.softmax(step.q.float(), dim=-1) + 1]


def of_ours(step: Step) -> list[Call]:
    """Calls of every kind for a step: an output from the capture's memory, or one given."""
    lengths = step.seqlens
    plan = gqa_cutlass.plan(*step.tensors(), cache_seqlens=lengths, out=step.out)
    dependent = gqa_cutlass.plan(*step.tensors(), cache_seqlens=lengths, dependent=True)
    return [
        partial(gqa_decode, *step.tensors(), cache_seqlens=lengths),
        lambda: plan(*step.tensors(), lengths, step.out),
        lambda: dependent(*step.tensors(), lengths),
    ]


def captured(call: Call) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """A graph of a call, and its output."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    return graph, out


def compare(cases: list[Case], chance: random.Random) -> None:
    """Replay and call in any order, on several streams, and compare all that comes of it."""
    streams = [torch.cuda.Stream() for _ in range(3)]
    results: list[tuple[Tensor, Tensor]] = []
    for _ in range(ROUNDS):
        for case in chance.sample(cases, len(cases)):
            graph, out = chance.choice(case.graphs)
            with torch.cuda.stream(chance.choice(streams)):  # others run on others meanwhile
                graph.replay()
                results.append((out.clone(), case.expected))
                results.append((case.call().clone(), case.expected))
        torch.cuda.synchronize()
    assert all(torch.equal(found, expected) for found, expected in results)


def main(what: str) -> None:
    """Capture graphs, use them, drop them and begin again, with `ours` or with `torch`."""
    chance = random.Random(0)
    calls_of = {"ours": of_ours, "torch": of_torch}[what]
    steps = [make_step(**shape, seed=i, device="cuda") for i, shape in enumerate(SHAPES)]  # type: ignore[arg-type]
    calls = [call for step in steps for call in calls_of(step)]
    expected = [call().clone() for call in calls]
    torch.cuda.synchronize()
    for generation in range(GENERATIONS):
        cases = []
        for call, result in zip(calls, expected, strict=True):
            cases.append(Case(call, result, [captured(call) for _ in range(2)]))
            print(f"{generation}: {len(cases)} of {len(calls)} captured", file=sys.stderr)
        compare(cases, chance)
        print(f"{generation}: compared", file=sys.stderr)
    print(torch.cuda.get_allocator_backend())
