"""The tables that the package carries, and what the model would do in their place."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from gqa_cutlass.codegen import DType
from gqa_cutlass.codegen.variants import shipped
from gqa_cutlass.dispatch import Device, dispatch
from gqa_cutlass.tuning.candidates import chosen
from gqa_cutlass.tuning.run import name_of
from gqa_cutlass.tuning.search import Tuned, lowest_of, regret
from gqa_cutlass.tuning.table import SHIPPED, Table, file_name

TABLES = sorted(SHIPPED.glob("*.json"))
MEAN, WORST = 1.05, 1.15  # what the model may lose against a table


def behind(tuned: Tuned, device: Device, *, ragged: bool) -> float:
    """By what factor the model's launch has more regret than the table's, in known lengths."""
    names = [n for n, held in tuned.lengths.items() if ragged or len(set(held)) == 1]
    times = {c: {n: each[n] for n in names} for c, each in tuned.times.items()}
    model = chosen(dispatch(tuned.problem, device, ragged=ragged))
    best = tuned.best_of(model, ragged=ragged, longest=None)
    assert best is not None
    lowest = lowest_of(times)
    return regret(times[model], lowest) / regret(times[best], lowest)


def device_of(table: Table) -> Device:
    """The GPU, which tables of the package say all of."""
    assert table.device is not None
    return table.device


def test_there_are_tables() -> None:
    assert TABLES


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_a_table_says_where_it_is_from_and_asks_for_no_kernel_to_be_compiled(path: Path) -> None:
    table = Table.load(path)
    assert path.name == file_name(table.run["gpu"])
    assert table.run.keys() >= {"gpu", "driver", "compiler", "torch", "date", "version"}
    kernels, device = {*shipped()}, device_of(table)
    for tuned in table.found:
        for choice in tuned.times:
            launched = dispatch(tuned.problem, device, 0, choice, True)
            assert launched.num_splits == choice.splits
        for dtype in DType:
            assert {replace(c.config, dtype=dtype) for c in tuned.times} <= kernels


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
@pytest.mark.parametrize("ragged", [True, False], ids=["ragged", "equal"])
def test_the_model_loses_little_against_a_table(path: Path, ragged: bool) -> None:
    table = Table.load(path)
    device = device_of(table)
    lost = {name_of(t.problem): behind(t, device, ragged=ragged) for t in table.found}
    mean = math.exp(math.fsum(map(math.log, lost.values())) / len(lost))
    assert mean <= MEAN, lost
    assert {name: each for name, each in lost.items() if each > WORST} == {}
