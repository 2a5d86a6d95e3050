"""Tables of what was measured: one JSON file per GPU, in the package and in the store's folder.

A table is for the GPU that it names and no other. It says for a problem, by its heads, head
dimensions, features, batch and room, which launches were tried and how long they took over several
lengths; the first is the one to take. It serves both 16-bit types, and rooms of up to a quarter
more or less. Whatever it does not have is left to dispatch's model.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from gqa_cutlass import env
from gqa_cutlass.codegen.config import ARCHES
from gqa_cutlass.codegen.files import read_json, update, writing
from gqa_cutlass.codegen.schema.kinds import DType, Math, Schedule
from gqa_cutlass.codegen.schema.policies import tagged
from gqa_cutlass.codegen.schema.problem import MAX_SEQ_LEN, WIDEST, Problem
from gqa_cutlass.codegen.variants import default_config
from gqa_cutlass.dispatch import Choice, Device, dispatch
from gqa_cutlass.errors import GqaError, InputError, StoreError, shown
from gqa_cutlass.tuning.candidates import chosen
from gqa_cutlass.tuning.search import Tuned

LOG = logging.getLogger("gqa_cutlass")
SHIPPED, FOLDER = Path(__file__).parent / "tables", "tuned"
_ALLOWED = "JSON that `gqa-cutlass tune` wrote"
_SIZES = "batch_size", "num_q_heads", "num_kv_heads", "head_dim", "head_dim_v", "max_seq_len"
_COLUMNS = (
    "schedule", "block_n", "warps", "stages", "splits", "cluster", "stages used", "spare",
    "early first tile", "microseconds",
)  # fmt: skip
_ODD = KeyError, TypeError, ValueError, AttributeError, ArithmeticError, GqaError
_FARTHEST = 1.25  # room of a problem over a table's, or the reverse


@dataclass(frozen=True, kw_only=True)
class Table:
    """What was measured on a GPU.

    Args:
        run: GPU with its architecture and multiprocessors, driver, compiler, torch, date and
            version.
        found: By problem.
    """

    run: dict[str, str]
    found: tuple[Tuned, ...] = ()

    @property
    def device(self) -> Device | None:
        """The GPU; None where the run does not say what it is like."""
        return _device(self.run)

    @classmethod
    def load(cls, path: Path) -> Table:
        """Read what `save` wrote.

        Raises:
            InputError: It is no such file.
        """
        content: Any = read_json("tune: table", path, _ALLOWED)
        try:
            run = {"gpu": ""} | {str(key): str(value) for key, value in content["run"].items()}
            _device(run)  # or an error
            return cls(run=run, found=tuple(map(_tuned, content["problems"])))
        except _ODD as wrong:
            reason = f"{type(wrong).__name__}: {wrong}"
            raise InputError(
                f"tune: table: got {path}, which is none ({reason}); allowed: {_ALLOWED}."
            ) from wrong

    def save(self, path: Path) -> None:
        """Write JSON, a line per launch.

        Raises:
            OutputError: The file system refuses.
        """
        problems = ",\n".join(map(_as_json, self.found))
        text = f'{{"run": {json.dumps(self.run)},\n"problems": [\n{problems}\n]}}\n'
        with writing("tune: --out", path.parent):
            update(path.parent, {path.name: text})

    def find(self, problem: Problem) -> Tuned | None:
        """The measurement that is for a problem: of the nearest room, the larger of two."""
        fitting = [
            (max(room, wanted) / min(room, wanted), -room, tuned)
            for tuned in self.found
            if _key(tuned.problem) == _key(problem)
            for room, wanted in ((tuned.problem.max_seq_len, problem.max_seq_len),)
            if max(room, wanted) <= _FARTHEST * min(room, wanted)
        ]
        return min(fitting, key=lambda entry: entry[:2])[2] if fitting else None


def file_name(gpu: str) -> str:
    """The name of a GPU's table."""
    return "".join(c if c.isalnum() else "-" for c in gpu.lower()) + ".json"


def choice_for(
    problem: Problem, device: Device, *, ragged: bool, longest: int | None = None
) -> Choice | None:
    """What the tables say of a problem on a GPU, the user's before the shipped one.

    Args:
        problem: What is asked for.
        device: The GPU.
        ragged: As for `dispatch`.
        longest: As for `dispatch`.

    Returns:
        None where no table says anything.
    """
    several = problem.num_tokens > 1 or problem.num_new_tokens > 1
    if not device.name or problem.vec_width < WIDEST or several or problem.window is not None:
        return None
    for table in tables(device.name):
        tuned = table.find(problem)
        if tuned is None:
            continue
        usual = chosen(dispatch(tuned.problem, device, ragged=ragged, longest=longest))
        best = tuned.best_of(usual, ragged=ragged, longest=longest)
        if choice := best and _rebuilt(best, problem):
            why = f"by the table of {table.run['gpu']}, {table.run.get('date', 'no date')}"
            return replace(choice, why=why)
    return None


@lru_cache(maxsize=8)
def tables(gpu: str) -> tuple[Table, ...]:
    """The tables for a GPU, read once; a file that is none is logged and left out."""
    return tuple(table for table in _all() if _is_for(table, gpu))


def gpus() -> dict[str, Device]:
    """The GPUs that there are tables of, by name; those of the user's tables before the others."""
    found = [table.device for table in _all()]
    return {device.name: device for device in reversed(found) if device}


def _is_for(table: Table, gpu: str) -> bool:
    if table.run["gpu"] != gpu:
        LOG.info("tune: a table of %s is not used on %s", table.run["gpu"], gpu)
    return table.run["gpu"] == gpu


@cache
def _all() -> tuple[Table, ...]:
    try:
        folders = [env.cache_dir() / FOLDER, SHIPPED]
    except StoreError:
        folders = [SHIPPED]
    found = []
    for path in (path for folder in folders for path in sorted(folder.glob("*.json"))):
        try:
            found.append(Table.load(path))
        except InputError as error:
            LOG.warning("%s It is not used.", error)
    return tuple(found)


def _device(run: dict[str, str]) -> Device | None:
    """The GPU of a run; anything wrong raises one of what `Table.load` catches."""
    if "arch" not in run:
        return None
    num_sms = _whole(int(run["num_sms"]), "num_sms")
    return Device(index=-1, arch=ARCHES[run["arch"]], num_sms=num_sms, name=run["gpu"])


def _key(problem: Problem) -> tuple[object, ...]:
    """What a table's problem and one that it serves have in common."""
    sizes = (getattr(problem, name) for name in _SIZES if name != "max_seq_len")
    whole_pages = problem.page_size is None or problem.page_size % 16 == 0
    tags = tuple(policy.tag for policy in problem.policies)
    return *sizes, problem.page_size is None, whole_pages, tags


def _rebuilt(choice: Choice, problem: Problem) -> Choice | None:
    """The same launch of the problem's kernel with these tiles."""
    tiles = choice.config
    try:
        config = default_config(
            Math.TENSOROP, problem.dtype, problem.head_dim, problem.group_size, WIDEST,
            tiles.schedule, problem.policies, problem.head_dim_v,
        )  # fmt: skip
        config = replace(
            config, block_n=tiles.block_n, num_warps=tiles.num_warps, num_stages=tiles.num_stages
        )
        return replace(choice, config=config)
    except GqaError:
        return None


def _as_json(tuned: Tuned) -> str:
    problem = {
        **{name: getattr(tuned.problem, name) for name in _SIZES},
        "page_size": tuned.problem.page_size,
        "policies": [policy.tag for policy in tuned.problem.policies],
    }
    lines = [
        json.dumps(
            [
                c.config.schedule,
                c.config.block_n,
                c.config.num_warps,
                c.config.num_stages,
                c.splits,
                c.cluster,
                c.num_stages,
                c.spare,
                c.prefetch,
                [round(times[name], 3) for name in tuned.lengths],
            ]
        )  # fmt: skip
        for c, times in tuned.times.items()
    ]
    return (
        f'{{"problem": {json.dumps(problem)},\n "lengths": {json.dumps(tuned.lengths)},\n'
        f' "columns": {json.dumps(_COLUMNS)},\n "launches": [\n  ' + ",\n  ".join(lines) + "\n]}"
    )


def _tuned(entry: Any) -> Tuned:
    """Read a problem's entry; anything wrong raises one of what `Table.load` catches."""
    sizes = {name: _whole(entry["problem"][name], name) for name in _SIZES}
    tags = entry["problem"]["policies"]
    problem = Problem(
        **sizes, page_size=_whole(entry["problem"]["page_size"], "page_size"), dtype=DType.F16,
        vec_width=WIDEST, append=True, policies=tagged("".join(f"_{tag}" for tag in tags)),
    )  # fmt: skip
    lengths = {str(name): _held(each) for name, each in entry["lengths"].items()}
    times = dict(_launch(row, problem, list(lengths)) for row in entry["launches"])
    if not times or not lengths:
        raise ValueError("nothing was measured of a problem")
    return Tuned(problem=problem, lengths=lengths, times=times)


def _launch(row: Any, problem: Problem, lengths: list[str]) -> tuple[Choice, dict[str, float]]:
    schedule, block_n, warps, stages, splits, cluster, used, spare, prefetch, micros = row
    base = default_config(
        Math.TENSOROP, problem.dtype, problem.head_dim, problem.group_size, WIDEST,
        Schedule(schedule), problem.policies, problem.head_dim_v,
    )  # fmt: skip
    choice = Choice(
        config=replace(base, block_n=block_n, num_warps=warps, num_stages=stages), splits=splits,
        num_stages=used, cluster=cluster, spare=spare, prefetch=prefetch,
    )  # fmt: skip
    times = dict(zip(lengths, map(float, micros), strict=True))
    if not all(0 < each < 1e9 for each in times.values()):
        raise ValueError(f"microseconds: got {micros}")
    return choice, times


def _held(lengths: Any) -> tuple[int, ...]:
    """What sequences held, of at least one."""
    if not lengths or any(type(n) is not int or n < 0 for n in lengths):
        raise ValueError(f"lengths: got {shown(lengths)}")
    return tuple(lengths)


def _whole(value: object, name: str) -> Any:
    """A size; None where there may be none."""
    if value is None and name in ("head_dim_v", "page_size"):
        return None
    if type(value) is not int or not 1 <= value <= MAX_SEQ_LEN:
        raise ValueError(f"{name}: got {shown(value)}")
    return value
