"""Tables of launches that tests make up: of one problem, on a GPU that there is not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gqa_cutlass.codegen import ARCHES, DType
from gqa_cutlass.codegen.schema.problem import Problem
from gqa_cutlass.dispatch import Choice, Device, model_device
from gqa_cutlass.tuning import table as table_module
from gqa_cutlass.tuning.candidates import candidates, lengths_of
from gqa_cutlass.tuning.search import Tuned
from gqa_cutlass.tuning.table import FOLDER, Table, file_name, look_up

RUN = {"gpu": "NVIDIA X1", "date": "2026-01-02", "arch": "sm_90a", "num_sms": "132"}
X1 = replace(model_device(ARCHES["sm_90a"]), name="NVIDIA X1")
PROBLEM = Problem(
    batch_size=4, num_q_heads=8, num_kv_heads=2, head_dim=64, max_seq_len=4096, dtype=DType.F16,
    vec_width=8, append=True,
)  # fmt: skip


def tuned_of(problem: Problem, best: int = 3) -> Tuned:
    """As if this candidate were the best over all lengths, and the next one over equal ones."""
    first, second = candidates(problem, X1)[best : best + 2]
    lengths = lengths_of(problem)
    equal = {name: len(set(held)) == 1 for name, held in lengths.items()}
    full, *others = lengths
    return Tuned(
        problem=problem, lengths=lengths,
        times={
            first: {full: 4.0, **{name: 5.0 if equal[name] else 2.0 for name in others}},
            second: {name: 4.0 if equal[name] else 9.0 for name in lengths},
        },
    )  # fmt: skip


def entry_of(*choices: Choice, problem: Problem = PROBLEM) -> Tuned:
    """A table's entry with these launches, the first the best."""
    lengths = lengths_of(problem)
    return Tuned(
        problem=problem, lengths=lengths,
        times={c: dict.fromkeys(lengths, 1.0 + n) for n, c in enumerate(choices)},
    )  # fmt: skip


def choice_for(problem: Problem, device: Device, **options: Any) -> Choice | None:
    """The launch that tables say, as calls ask for it; None: nothing."""
    answer = look_up(problem, device, **options)
    answer.warn()
    return answer.choice


def own_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A store of this user's, and no tables of the package's: the body of a fixture."""
    monkeypatch.setenv("GQA_CUTLASS_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(table_module, "SHIPPED", tmp_path / "shipped")
    forget()
    yield tmp_path
    forget()


def forget() -> None:
    """Forget what was read of tables, and said of them."""
    for cached in (table_module._all, table_module.tables, table_module._warn):
        cached.cache_clear()


def saved(folder: Path, *found: Tuned, **run: str) -> Path:
    """Write a table into the store; returns its path."""
    path = folder / FOLDER / file_name(run.get("gpu", RUN["gpu"]))
    Table(run=RUN | run, found=found).save(path)
    return path
