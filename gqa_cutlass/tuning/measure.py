"""Microseconds per step of launches that a problem may have, on the GPU at hand.

Every candidate is one CUDA graph: a step on each of several caches, which lie in memory of their
own. Lengths are on the device and change between replays, so that a graph serves them all, and the
room of the caches is what the problem says whatever they hold. Before each replay unrelated memory
is read; candidates take turns. Every candidate's output is compared with the first one's.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gqa_cutlass.api import plan
from gqa_cutlass.call.layout import DTYPES
from gqa_cutlass.call.plan import Plan
from gqa_cutlass.call.stored import FP8
from gqa_cutlass.codegen.schema.problem import Problem
from gqa_cutlass.dispatch import Choice
from gqa_cutlass.errors import GqaError, InputError
from gqa_cutlass.tuning.timing import Graph, evict

_MOST_SETS, _FEWEST_SETS, _FULL_BYTES = 24, 8, 4 << 30
_ALLOWED_ERROR = 1e-2  # by norm, between two kernels
_TORCH = {kind: name for name, kind in DTYPES.items()}

Lengths = Mapping[str, tuple[int, ...]]


def sets_of(problem: Problem) -> int:
    """Caches that a graph goes through: fewer of large ones."""
    return max(_FEWEST_SETS, min(_MOST_SETS, _FULL_BYTES // room_bytes(problem)))


def room_bytes(problem: Problem) -> int:
    """Bytes of the caches of K and V."""
    tokens = problem.batch_size * problem.max_seq_len
    dims = problem.head_dim + problem.value_dim
    return tokens * problem.num_kv_heads * dims * stored_as(problem).itemsize


def stored_as(problem: Problem) -> torch.dtype:
    """The type of the caches' elements."""
    of_8_bits = (kind for kind, policy in FP8.items() if policy in problem.policies)
    return next(of_8_bits, _TORCH[problem.dtype])


def pool_bytes(problem: Problem) -> int:
    """Bytes that measuring a problem takes."""
    return sets_of(problem) * room_bytes(problem)


class Stand:
    """A problem's tensors, and the graphs of candidates over them.

    Args:
        problem: The problem.
        lengths: What sequences hold, by name.
        pool: At least `pool_bytes(problem)` of random numbers.
    """

    def __init__(self, problem: Problem, lengths: Lengths, pool: Tensor) -> None:
        self.problem, self.lengths = problem, lengths
        self._times: dict[Choice, dict[str, list[float]]] = {}
        self._graphs: dict[Choice, Graph] = {}
        self._first: Plan | None = None
        device, dtype, stored = pool.device, _TORCH[problem.dtype], stored_as(problem)
        self._sets = sets_of(problem)
        per_set = room_bytes(problem) // stored.itemsize
        rows = problem.batch_size * problem.max_seq_len * problem.num_kv_heads
        numbers = pool.view(stored)[: self._sets * per_set]
        if stored in FP8:  # without the exponent's highest bit bytes are numbers below 2, none NaN
            numbers.view(torch.int8).bitwise_and_(~0x40)
        caches = numbers.view(self._sets, per_set)
        tokens = problem.batch_size, problem.max_seq_len
        options: dict[str, Any] = {}
        if problem.page_size:
            pages = rows // problem.num_kv_heads // problem.page_size
            tokens = pages, problem.page_size
            order = torch.randperm(pages, device=device).to(torch.int32)
            options["block_table"] = order.view(problem.batch_size, -1)
        self._options = options
        keys = rows * problem.head_dim
        of_head = problem.num_kv_heads, problem.head_dim
        self._k = [cache[:keys].view(*tokens, *of_head) for cache in caches]
        of_head = problem.num_kv_heads, problem.value_dim
        self._v = [cache[keys:].view(*tokens, *of_head) for cache in caches]

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, dtype=torch.float32, device=device).to(dtype)

        self._q = random(problem.batch_size, problem.num_q_heads, problem.head_dim)
        self._new = (
            random(problem.batch_size, problem.num_kv_heads, problem.head_dim),
            random(problem.batch_size, problem.num_kv_heads, problem.value_dim),
        )
        self._held = torch.zeros(problem.batch_size, dtype=torch.int32, device=device)

    def measure(self, choices: Sequence[Choice], repeats: int) -> dict[Choice, dict[str, float]]:
        """Time candidates in turn, so many times more.

        Returns:
            Median microseconds per step by lengths, of all repeats so far; a candidate that cannot
            run here, or is wrong, is left out.
        """
        running = {c: graph for c in choices if (graph := self._graph(c)) is not None}
        for name, held in self.lengths.items():
            self._hold(held)
            for turn in range(repeats + 1):
                for choice, graph in running.items():
                    evict()
                    micros = graph.micros_per_call()
                    if turn:  # the first warms up
                        self._times[choice].setdefault(name, []).append(micros)
        return {
            choice: {n: statistics.median(t) for n, t in self._times[choice].items()}
            for choice in running
        }

    def _graph(self, choice: Choice) -> Graph | None:
        if choice in self._graphs:
            return self._graphs[choice]
        try:
            step = plan(
                self._q, self._k[0], self._v[0], *self._new, cache_seqlens=self._held,
                kernel=choice, **self._options,
            )  # fmt: skip
            self._check(step)
            sets = [self._tensors(i) for i in range(self._sets)]
            graph = Graph(lambda i: step(*sets[i]), self._sets)  # and no way back to this object
        except (GqaError, AssertionError):  # a launch that this GPU refuses, say
            return None
        self._graphs[choice], self._times[choice] = graph, {}
        return graph

    def _tensors(self, i: int) -> tuple[Tensor, ...]:
        return self._q, self._k[i], self._v[i], *self._new, self._held

    def _check(self, step: Plan) -> None:
        """Compare a candidate with the first one, at the longest lengths."""
        self._first = self._first or step
        self._hold(next(iter(self.lengths.values())))
        out, right = (each(*self._tensors(0)) for each in (step, self._first))
        assert isinstance(out, Tensor) and isinstance(right, Tensor)
        error = float((out.float() - right.float()).norm() / right.float().norm())
        assert error < _ALLOWED_ERROR, f"relative error {error}"

    def _hold(self, held: tuple[int, ...]) -> None:
        self._held.copy_(torch.tensor(held, dtype=torch.int32))


def check_fits(problem: Problem, free: int) -> None:
    """Raise InputError unless a problem's caches fit into so many bytes."""
    if pool_bytes(problem) > free:
        raise InputError(
            f"tune: batch {problem.batch_size}, room {problem.max_seq_len}: got caches of "
            f"{pool_bytes(problem) / 2**30:.1f} GiB; allowed: {free / 2**30:.1f}. Name smaller "
            "ones."
        )
