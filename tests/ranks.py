"""Ranks of process groups, each a process of its own, which run cases and note what came of them.

Four processes are started once. Groups of two and three of them, and all four, run the same cases
one after the other; what a rank found wrong is a traceback in its file. As a program: one rank.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from time import sleep

import torch
import torch.distributed as dist

from gqa_cutlass.codegen.compile import shared_headers

WORLD = 4
SIZES = (2, 3, 4)
_PATIENCE = timedelta(minutes=30)  # others compile kernels meanwhile, on a busy machine perhaps


@dataclass(frozen=True, kw_only=True)
class Group:
    """The ranks that run a case together.

    Args:
        group: Of torch.
        rank: This one's number in it.
        size: How many they are.
    """

    group: dist.ProcessGroup
    rank: int
    size: int

    def gathered(self, value: object) -> list[object]:
        """A value of every rank."""
        found: list[object] = [None] * self.size
        dist.all_gather_object(found, value, group=self.group)
        return found


Case = Callable[[Group], None]
CASES: dict[str, Case] = {}  # by their functions' names, in the order of the sources
_ONLY: dict[str, tuple[int, ...]] = {}  # sizes of groups that run a case; others all do


def case(function: Case) -> Case:
    """A case that groups of every size run."""
    CASES[function.__name__] = function
    return function


def case_for(*sizes: int) -> Callable[[Case], Case]:
    """A case that groups of these sizes run."""

    def register(function: Case) -> Case:
        _ONLY[function.__name__] = sizes
        return case(function)

    return register


def runs(*, thorough: bool) -> list[tuple[str, int]]:
    """The cases by their names, and the sizes of the groups that run them.

    Args:
        thorough: All of a case's sizes; or one, by turns, and of every second case the smallest.
    """
    found = []
    for i, name in enumerate(CASES):
        sizes = _ONLY.get(name, SIZES)
        chosen = sizes if thorough else [sizes[0 if i % 2 else i // 2 % len(sizes)]]
        found += [(name, size) for size in chosen]
    return found


def run_ranks(program: Path, folder: Path, *, thorough: bool) -> list[dict[str, str]]:
    """Start the ranks of a program that calls `serve`, and wait for them.

    Returns:
        Of every rank, by case and size: what went wrong, or nothing.
    """
    logs = [folder / f"{rank}.log" for rank in range(WORLD)]
    started = [
        subprocess.Popen(
            [sys.executable, program, str(rank), folder, "thorough" if thorough else "some"],
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
            stdout=log.open("w"),
            stderr=subprocess.STDOUT,
        )
        for rank, log in enumerate(logs)
    ]
    while any(process.poll() is None for process in started):
        if any(process.poll() for process in started):
            for process in started:
                process.kill()  # which would wait for the one that failed
        sleep(0.1)
    found = []
    for rank, log in enumerate(logs):
        path = folder / f"{rank}.json"
        found.append(json.loads(path.read_text()) if path.exists() else {"log": log.read_text()})
    return found


def serve(last: Case) -> None:
    """Be a rank: run all cases in all groups, and note what came of them.

    Args:
        last: What spoils the group of all ranks.
    """
    rank, folder, thorough = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] == "thorough"
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=WORLD,
        timeout=_PATIENCE,
    )  # fmt: skip
    groups = {size: dist.new_group(list(range(size)), timeout=_PATIENCE) for size in SIZES}
    outcome: dict[str, str] = {}

    def note(name: str, case: Case, group: Group) -> None:
        path = folder / f"{rank}.json"
        try:
            case(group)
        except BaseException:
            path.write_text(json.dumps(outcome | {name: traceback.format_exc()}))
            sleep(1)  # others may have something to say as well
            os._exit(1)
        outcome[name] = ""
        path.write_text(json.dumps(outcome))

    with shared_headers():
        for size in SIZES:
            if rank < size:
                group = Group(group=groups[size], rank=rank, size=size)
                for name in [name for name, of in runs(thorough=thorough) if of == size]:
                    note(f"{name}-{size}", CASES[name], group)
                    gc.freeze()  # programs of ptxsim, which stay
    note("last", last, Group(group=groups[WORLD], rank=rank, size=WORLD))
    os._exit(0)  # a group that a rank has left cannot be taken down in order
