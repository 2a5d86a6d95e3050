"""A search over many problems on the GPU at hand, which goes on where it was interrupted."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from gqa_cutlass.codegen.schema.problem import Problem
from gqa_cutlass.devices import gpu
from gqa_cutlass.errors import InputError
from gqa_cutlass.kernels.store import Store, build_each
from gqa_cutlass.proof.evidence import provenance
from gqa_cutlass.tuning.candidates import kernels_of, lengths_of
from gqa_cutlass.tuning.measure import Stand, check_fits, pool_bytes
from gqa_cutlass.tuning.search import tune
from gqa_cutlass.tuning.table import Table
from gqa_cutlass.tuning.timing import random_pool
from gqa_cutlass.version import __version__

_SHARE = 0.75  # of the GPU's free memory

Said = Callable[[str, str], None]


def tune_all(
    problems: Sequence[Problem], path: Path, say: Said, tiles: bool = True, *, again: bool = False
) -> Table:
    """Search for the best launch of each problem, and keep what there is after each.

    Args:
        problems: What to search for; those that the file has already are left alone.
        path: The table's file.
        say: Told of every problem that is done: its name, and what came of it.
        tiles: Whether other tiles than kernels have by default are tried.
        again: Whether those that the file has are searched too; each takes its old one's place.

    Raises:
        InputError: A problem does not fit into the GPU's memory, or the file is another GPU's.
        DeviceError: No usable GPU.
        OutputError: The file cannot be written.
    """
    device = gpu(torch.device("cuda"))
    like = {"arch": device.arch.name, "num_sms": str(device.num_sms)}
    table = _begun(path, run := {**provenance(), **like, "version": __version__})
    had = frozenset() if again else {tuned.problem for tuned in table.found}
    left = [problem for problem in problems if problem not in had]
    free = int(_SHARE * torch.cuda.mem_get_info()[0])
    for problem in left:
        check_fits(problem, free)
    if left:
        table.save(path)  # or an error, before anything is measured
    pool = random_pool(max(map(pool_bytes, left), default=0))
    kernels = dict.fromkeys(kernel for p in left for kernel in kernels_of(p, device, tiles))
    store, arch = Store.default(), device.arch.name
    missing = [(kernel, arch) for kernel in kernels if store.find(kernel, arch) is None]
    for _ in build_each(store, missing) if missing else ():
        pass  # those that the compiler rejects are not measured
    began = time.monotonic()
    for done, problem in enumerate(left, 1):
        stand = Stand(problem, lengths_of(problem), pool)
        tuned = tune(problem, device, stand.measure, tiles)
        found = {each.problem: each for each in _begun(path, run).found}  # other runs', too
        table = Table(run=run, found=tuple((found | {problem: tuned.kept(device)}).values()))
        table.save(path)
        del stand
        torch.cuda.empty_cache()
        rest = (time.monotonic() - began) / done * (len(left) - done)
        say(name_of(problem), f"{tuned.best}; about {rest:.0f} s left")
    return table


def _begun(path: Path, run: dict[str, str]) -> Table:
    """The table so far, or a new one.

    Raises:
        InputError: The file is no table, or another GPU's.
    """
    table = Table.load(path) if path.exists() else Table(run=run)
    if table.run["gpu"] != run["gpu"]:
        raise InputError(
            f"tune: --out: got {path}, a table of {table.run['gpu']}; allowed: one of this GPU, "
            f"{run['gpu']}, or no file. Name another one."
        )
    return table


def name_of(problem: Problem) -> str:
    """What a problem is called."""
    heads = f"{problem.num_q_heads}/{problem.num_kv_heads}/{problem.head_dim}"
    pages = f", pages of {problem.page_size}" if problem.page_size else ""
    others = [f", {p.feature}" for p in problem.policies if p.feature != "block_table"]
    return f"{heads} {problem.batch_size}x{problem.max_seq_len}{pages}{''.join(others)}"
