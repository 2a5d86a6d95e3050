"""The search: every candidate a little, the better ones more often, and variants of the best."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from gqa_cutlass.codegen.schema.problem import Problem
from gqa_cutlass.dispatch import Choice, Device, dispatch
from gqa_cutlass.tuning.candidates import APART, candidates, lengths_of, variants

FIRST, VARIED = 3, 2  # repeats of the first round, which doubles; how many choices are varied
_KEPT, _FEWEST = 1 / 3, 2

Times = Mapping[Choice, Mapping[str, float]]
Measure = Callable[[Sequence[Choice], int], Times]


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """What was measured of a problem.

    Args:
        problem: It.
        lengths: What sequences held, by name.
        times: Microseconds per step by choice and lengths, the best choice first.
    """

    problem: Problem
    lengths: dict[str, tuple[int, ...]]
    times: dict[Choice, dict[str, float]] = field(default_factory=dict)

    @property
    def best(self) -> Choice:
        """What loses least over all lengths."""
        return next(iter(self.times))

    def best_of(self, *, ragged: bool, longest: int | None) -> Choice | None:
        """What loses least where something is known of the lengths.

        Args:
            ragged: Whether sequences may differ in length.
            longest: Tokens of the longest one after the call; None: anything.

        Returns:
            None where nothing of the kind was measured.
        """
        names = [
            name
            for name, held in self.lengths.items()
            if (ragged or len(set(held)) == 1) and _is_near(max(held) + 1, longest)
        ]
        if not names:
            return None
        if len(names) == len(self.lengths):
            return self.best
        seen = {c: {name: times[name] for name in names} for c, times in self.times.items()}
        lowest = lowest_of(seen)
        return min(seen, key=lambda choice: regret(seen[choice], lowest))


def _is_near(held: int, longest: int | None) -> bool:
    """Whether what was held is about as long as the longest sequence is said to be."""
    return longest is None or longest / APART < held <= longest


def regret(times: Mapping[str, float], lowest: Mapping[str, float]) -> float:
    """By what factor times exceed the lowest of all choices: the geometric mean over lengths."""
    return math.exp(math.fsum(math.log(times[n] / lowest[n]) for n in lowest) / len(lowest))


def lowest_of(times: Times) -> dict[str, float]:
    """The lowest time for each of the lengths."""
    names = next(iter(times.values()))
    return {name: min(each[name] for each in times.values()) for name in names}


def tune(problem: Problem, device: Device, measure: Measure, tiles: bool = True) -> Tuned:
    """Search for the launch of least regret over lengths: by successive halving.

    Args:
        problem: The problem.
        device: The GPU.
        measure: Times choices so many times more; it may leave out those that do not run.
        tiles: Whether other tiles than kernels have by default are tried.
    """
    found: dict[Choice, Mapping[str, float]] = {}

    def measured(choices: list[Choice], repeats: int) -> list[Choice]:
        found.update(measure(choices, repeats))
        lowest = lowest_of(found)
        return sorted((c for c in choices if c in found), key=lambda c: regret(found[c], lowest))

    ranked = measured(candidates(problem, device), FIRST)
    varied = [
        other
        for choice in _unlike(ranked)
        for other in variants(choice, _is_early(problem, device, choice), tiles)
    ]
    measured(varied, FIRST)
    lowest = lowest_of(found)
    ranked, repeats = sorted(found, key=lambda c: regret(found[c], lowest)), FIRST
    while len(ranked) > _FEWEST:
        repeats *= 2
        ranked = measured(ranked[: max(_FEWEST, int(len(ranked) * _KEPT))], repeats)
    lowest = lowest_of(found)
    rest = sorted((c for c in found if c not in ranked), key=lambda c: regret(found[c], lowest))
    return Tuned(
        problem=problem, lengths=lengths_of(problem),
        times={choice: dict(found[choice]) for choice in (*ranked, *rest)},
    )  # fmt: skip


def _unlike(ranked: Sequence[Choice]) -> list[Choice]:
    """The best few of unlike kernels, or ways to balance."""
    best = {(c.config, c.spare > 0): c for c in reversed(ranked)}
    return [c for c in ranked if c in best.values()][:VARIED]


def _is_early(problem: Problem, device: Device, choice: Choice) -> bool:
    return dispatch(problem, device, 0, choice, True).prefetch_first_tile
