"""The search: every candidate a little, the better ones more often, and variants of the best."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from gqa_cutlass.codegen.schema.problem import Problem
from gqa_cutlass.dispatch import Choice, Device, dispatch
from gqa_cutlass.tuning.candidates import candidates, chosen, lengths_of, variants

FIRST, VARIED = 3, 2  # repeats of the first round, which doubles; how many choices are varied
_KEPT, _FEWEST = 1 / 3, 2
_IN_TABLES = 10  # launches of a problem, beside those that calls take
# By what factor a launch may be slower than dispatch's own where the cache is full, in the end and
# while little is measured; or so many microseconds.
_SLACK, _EARLY_SLACK, _SLACK_MICROS = 1.005, 1.03, 0.03

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
        """What loses least over all lengths, and nothing where the cache is full."""
        return next(iter(self.times))

    def best_of(self, usual: Choice | None = None, *, ragged: bool) -> Choice:
        """The same where sequences may be known to be equally long.

        Args:
            usual: What the model takes then, which may not be slower where the cache is full.
            ragged: Whether sequences may differ in length.
        """
        equal = [name for name, held in self.lengths.items() if len(set(held)) == 1]
        if ragged or len(equal) == len(self.lengths):
            return self.best
        seen = {c: {name: times[name] for name in equal} for c, times in self.times.items()}
        return ranked(seen, usual)[0]

    def kept(self, device: Device) -> Tuned:
        """What a table has of it: the first few launches, and those that calls or the model take.

        Args:
            device: The GPU.
        """
        usual = {r: chosen(dispatch(self.problem, device, ragged=r)) for r in (True, False)}
        best = (self.best_of(usual[ragged], ragged=ragged) for ragged in usual)
        kept = {*list(self.times)[:_IN_TABLES], *best, *usual.values()}
        return replace(self, times={c: each for c, each in self.times.items() if c in kept})


def regret(times: Mapping[str, float], lowest: Mapping[str, float]) -> float:
    """By what factor times exceed the lowest of all choices: the geometric mean over lengths."""
    return math.exp(math.fsum(math.log(times[n] / lowest[n]) for n in lowest) / len(lowest))


def ranked(times: Times, usual: Choice | None = None, slack: float = _SLACK) -> list[Choice]:
    """Choices by regret; behind them those that are slower where the first of the lengths is held.

    Args:
        times: Of each, the same lengths.
        usual: Slower than this one; None, or where it was not measured: than the fastest.
        slack: By what factor others may be so.
    """
    lowest = lowest_of(times)
    first = next(iter(lowest))
    allowed = times[usual][first] if usual and usual in times else lowest[first]
    most = max(slack * allowed, allowed + _SLACK_MICROS)
    return sorted(times, key=lambda c: (times[c][first] > most, regret(times[c], lowest)))


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
    usual = chosen(dispatch(problem, device, ragged=True))

    def measured(choices: Sequence[Choice], repeats: int, slack: float) -> list[Choice]:
        found.update(measure(choices, repeats))
        order = ranked(found, usual, slack)
        return [choice for choice in order if choice in choices]

    first = measured(candidates(problem, device), FIRST, _EARLY_SLACK)
    measured(
        [other for choice in _unlike(first) for other in variants(choice, tiles)],
        FIRST,
        _EARLY_SLACK,
    )
    left, repeats = ranked(found, usual, _EARLY_SLACK), FIRST
    while len(left) > _FEWEST:
        repeats *= 2
        kept = max(_FEWEST, int(len(left) * _KEPT))
        left = measured(left[:kept], repeats, _EARLY_SLACK if kept > _FEWEST else _SLACK)
    rest = [choice for choice in ranked(found, usual) if choice not in left]
    return Tuned(
        problem=problem, lengths=lengths_of(problem),
        times={choice: dict(found[choice]) for choice in (*left, *rest)},
    )  # fmt: skip


def _unlike(ranked: Sequence[Choice]) -> list[Choice]:
    """The best few of unlike kernels, or ways to balance."""
    best = {(c.config, c.spare > 0): c for c in reversed(ranked)}
    return [c for c in ranked if c in best.values()][:VARIED]
