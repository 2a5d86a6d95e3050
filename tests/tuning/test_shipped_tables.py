"""The tables that the package carries, and what the model would do in their place."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from gqa_cutlass.codegen import DType, Math, default_config
from gqa_cutlass.codegen.schema.policies import FP8
from gqa_cutlass.codegen.schema.problem import WIDEST, Problem
from gqa_cutlass.codegen.variants import shipped
from gqa_cutlass.dispatch import Device, dispatch
from gqa_cutlass.tuning.candidates import chosen
from gqa_cutlass.tuning.run import name_of
from gqa_cutlass.tuning.search import Tuned, lowest_of, regret
from gqa_cutlass.tuning.table import SHIPPED, Table, file_name

TABLES = sorted(SHIPPED.glob("*.json"))
# What the model may lose against a table, in the mean and at worst. Of 8 bits, tables have tiles
# for each problem, and the model for each head dimension.
LOST = {"dense": (1.05, 1.15), "pages": (1.05, 1.16), "8 bits": (1.04, 1.2)}


def behind(tuned: Tuned, device: Device, *, ragged: bool) -> float:
    """By what factor the model's launch has more regret than the table's, in known lengths."""
    names = [n for n, held in tuned.lengths.items() if ragged or len(set(held)) == 1]
    times = {c: {n: each[n] for n in names} for c, each in tuned.times.items()}
    model = chosen(dispatch(tuned.problem, device, ragged=ragged))
    best = tuned.best_of(model, ragged=ragged)
    lowest = lowest_of(times)
    return regret(times[model], lowest) / regret(times[best], lowest)


def kind_of(problem: Problem) -> str:
    """Which problems of a table it is one of."""
    if {*FP8} & {*problem.policies}:
        return "8 bits"
    return "pages" if problem.page_size else "dense"


def device_of(table: Table) -> Device:
    """The GPU, which tables of the package say all of."""
    assert table.device is not None
    return table.device


def test_there_are_tables() -> None:
    assert TABLES


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_a_table_says_where_it_is_from(path: Path) -> None:
    table = Table.load(path)
    assert path.name == file_name(table.run["gpu"])
    assert table.run.keys() >= {"gpu", "driver", "compiler", "torch", "date", "version"}
    assert {kind_of(tuned.problem) for tuned in table.found} == LOST.keys()


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_launches_of_a_table_are_possible(path: Path) -> None:
    """In plain caches they ask for no kernel that does not ship, in pages for no other tiles."""
    table = Table.load(path)
    kernels, device = {*shipped()}, device_of(table)
    for tuned in table.found:
        problem = tuned.problem
        for choice in tuned.times:
            assert dispatch(problem, device, 0, choice, True).num_splits == choice.splits
            if kind_of(problem) == "pages":
                assert choice.config == default_config(
                    Math.TENSOROP, problem.dtype, problem.head_dim, problem.group_size, WIDEST,
                    choice.config.schedule, problem.policies,
                )  # fmt: skip
        if kind_of(problem) == "dense":
            for dtype in DType:
                assert {replace(c.config, dtype=dtype) for c in tuned.times} <= kernels


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
@pytest.mark.parametrize("ragged", [True, False], ids=["ragged", "equal"])
def test_the_model_loses_little_against_a_table(path: Path, ragged: bool) -> None:
    table = Table.load(path)
    device = device_of(table)
    for kind, (mean, worst) in LOST.items():
        problems = [tuned for tuned in table.found if kind_of(tuned.problem) == kind]
        lost = {name_of(t.problem): behind(t, device, ragged=ragged) for t in problems}
        assert math.exp(math.fsum(map(math.log, lost.values())) / len(lost)) <= mean, lost
        assert {name: each for name, each in lost.items() if each > worst} == {}
