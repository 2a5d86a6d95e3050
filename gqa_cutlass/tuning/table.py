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
from gqa_cutlass.codegen.config import ARCHES, KernelConfig
from gqa_cutlass.codegen.files import read_json, update, writing
from gqa_cutlass.codegen.schema.kinds import DType, Math, Schedule
from gqa_cutlass.codegen.schema.policies import Policy, tagged
from gqa_cutlass.codegen.schema.problem import MAX_SEQ_LEN, MAX_SPLITS, WIDEST, Problem
from gqa_cutlass.codegen.variants import default_config
from gqa_cutlass.dispatch import Choice, Device, dispatch
from gqa_cutlass.errors import GqaError, InputError, StoreError, shown
from gqa_cutlass.kernels.store import Store
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
_MUCH = 256 << 20  # bytes of parts that no GPU lacks
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

    @property
    def title(self) -> str:
        """Its GPU and date."""
        return f"{self.run['gpu']}, {self.run.get('date', 'no date')}"

    @classmethod
    def load(cls, path: Path) -> Table:
        """Read what `save` wrote.

        Raises:
            InputError: It is no such file.
        """
        content: Any = read_json("tune: table", path, _ALLOWED)
        try:
            run = {"gpu": ""} | {str(key): str(value) for key, value in content["run"].items()}
            device, found = _device(run), tuple(map(_tuned, content["problems"]))
            for choice in (choice for tuned in found for choice in tuned.times):
                if device and device.arch.name not in choice.config.archs:
                    raise ValueError(f"{choice.config.name} on {device.arch.name}")
            return cls(run=run, found=found)
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
        key, wanted = _key(problem), problem.max_seq_len
        fitting = [
            (max(room, wanted) / min(room, wanted), -room, tuned)
            for tuned in self.found
            if max(room := tuned.problem.max_seq_len, wanted) <= _FARTHEST * min(room, wanted)
            and _key(tuned.problem) == key
        ]
        return min(fitting, key=lambda entry: entry[:2])[2] if fitting else None


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the tables of a GPU say of a problem.

    Args:
        choice: The kernel and its launch; None: nothing that could be followed.
        table: Which one says so: its GPU and date.
        left_out: What tables say that cannot be launched, and why: a sentence for each.
    """

    choice: Choice | None = None
    table: str = ""
    left_out: tuple[str, ...] = ()

    def warn(self) -> None:
        """Log what was left out, once."""
        for reason in self.left_out:
            _warn(f"tune: a launch is not used: {reason}")


def file_name(gpu: str) -> str:
    """The name of a GPU's table."""
    return "".join(c if c.isalnum() else "-" for c in gpu.lower()) + ".json"


def look_up(
    problem: Problem,
    device: Device,
    *,
    ragged: bool,
    longest: int | None = None,
    dependent: bool = False,
) -> Answer:
    """What the tables say of a problem on a GPU, the user's before the shipped one.

    A launch that cannot be is left out; the next table is asked.

    Args:
        problem: What is asked for.
        device: The GPU.
        ragged: As for `dispatch`.
        longest: As for `dispatch`.
        dependent: Whether the kernel may start before the kernel before it is done.
    """
    several = problem.num_tokens > 1 or problem.num_new_tokens > 1
    if not device.name or problem.vec_width < WIDEST or several or problem.window is not None:
        return Answer()
    left_out: list[str] = []
    for table in tables(device):
        try:
            choice = _taken(table, problem, device, ragged, longest, dependent)
        except GqaError as error:
            left_out.append(f"the table of {table.title}: {error}")
            continue
        if choice:
            return Answer(choice=choice, table=table.title, left_out=tuple(left_out))
    return Answer(left_out=tuple(left_out))


def _taken(
    table: Table,
    problem: Problem,
    device: Device,
    ragged: bool,
    longest: int | None,
    dependent: bool,
) -> Choice | None:
    """What a table says of a problem; None: nothing.

    Raises:
        GqaError: There is no such launch, or nothing may be compiled and its kernel is not there.
    """
    room = problem.max_seq_len if longest is None else min(longest, problem.max_seq_len)
    tuned = table.find(replace(problem, max_seq_len=room))  # as the model weighs a bound, too
    if tuned is None:
        return None
    said = table.device
    if said and said.arch != device.arch:
        raise InputError(
            f"it says {said.arch.name}, and the GPU is {device.arch.name}. Tune it again."
        )
    usual = chosen(dispatch(tuned.problem, device, ragged=ragged))
    best = tuned.best_of(usual, ragged=ragged)
    why = f"which measured best over {'all' if ragged else 'equal'} lengths"
    choice = replace(_rebuilt(best, problem), why=why)
    if device.arch.name not in choice.config.archs:
        raise InputError(
            f"it says {choice.config.name}, which is for {', '.join(choice.config.archs)}, and the "
            f"GPU is {device.arch.name}. Tune it again."
        )
    found = dispatch(problem, device, 0, choice, ragged, dependent, longest)
    most = max(problem.cache_bytes, _MUCH)
    if found.workspace_bytes > most:
        raise InputError(
            f"it says {choice}, whose parts take {found.workspace_bytes} bytes, more than the "
            f"caches; allowed: {most}. Tune it again."
        )
    if env.jit_disabled():
        Store.default().get(found.config, device.arch.name)
    return choice


@cache
def _warn(message: str) -> None:
    """Say something once."""
    LOG.warning("%s", message)


@lru_cache(maxsize=8)
def tables(device: Device) -> tuple[Table, ...]:
    """The tables for a GPU, read once; a file that is none is logged and left out."""
    found = []
    for table in _all():
        if table.run["gpu"] == device.name:
            found.append(table)
        else:
            LOG.info("tune: a table of %s is not used on %s", table.run["gpu"], device.name)
    return tuple(found)


def gpus() -> dict[str, Device]:
    """The GPUs that there are tables of, by name; those of the user's tables before the others."""
    found = [table.device for table in _all()]
    return {device.name: device for device in reversed(found) if device}


@cache
def _all() -> tuple[Table, ...]:
    try:
        folders = [env.cache_dir() / FOLDER, SHIPPED]
    except StoreError:
        folders = [SHIPPED]
    found = []
    for path in (path for folder in folders for path in _listed(folder)):
        try:
            found.append(Table.load(path))
        except InputError as error:
            LOG.warning("%s It is not used.", error)
    return tuple(found)


def _listed(folder: Path) -> list[Path]:
    """The files of tables in a folder; none where it cannot be looked into."""
    try:
        return sorted(folder.glob("*.json"))
    except OSError as error:
        LOG.warning("tune: no table of %s is used: %s", folder, error)
        return []


def _device(run: dict[str, str]) -> Device | None:
    """The GPU of a run; anything wrong raises one of what `Table.load` catches."""
    if "arch" not in run:
        return None
    num_sms = _whole(int(run["num_sms"]), "num_sms", MAX_SPLITS)  # more than any GPU has
    return Device(index=-1, arch=ARCHES[run["arch"]], num_sms=num_sms, name=run["gpu"])


def _key(problem: Problem) -> tuple[object, ...]:
    """What a table's problem and one that it serves have in common."""
    sizes = (getattr(problem, name) for name in _SIZES if name != "max_seq_len")
    whole_pages = problem.page_size is None or problem.page_size % 16 == 0
    tags = tuple(policy.tag for policy in problem.policies)
    return *sizes, problem.page_size is None, whole_pages, tags


def _rebuilt(choice: Choice, problem: Problem) -> Choice:
    """The same launch of the problem's kernel with these tiles.

    Raises:
        ConfigError: There is no such kernel.
    """
    tiles = choice.config
    config = _kernel(problem, tiles.schedule, tiles.block_n, tiles.num_warps, tiles.num_stages)
    return replace(choice, config=config)


def _kernel(problem: Problem, schedule: Schedule, *tiles: int) -> KernelConfig:
    """The kernel of a problem that has these tiles.

    Raises:
        ConfigError: There is none.
    """
    return _tiled(
        problem.dtype, problem.head_dim, problem.group_size, problem.policies, problem.head_dim_v,
        schedule, *tiles,
    )  # fmt: skip


@lru_cache(maxsize=4096, typed=True)  # of many launches, few kernels; and 16.0 tokens are not 16
def _tiled(
    dtype: DType, head_dim: int, group_size: int, policies: tuple[Policy, ...],
    head_dim_v: int | None, schedule: Schedule, block_n: int, num_warps: int, num_stages: int,
) -> KernelConfig:  # fmt: skip
    base = default_config(
        Math.TENSOROP, dtype, head_dim, group_size, WIDEST, schedule, policies, head_dim_v
    )
    return replace(base, block_n=block_n, num_warps=num_warps, num_stages=num_stages)


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
    choice = Choice(
        config=_kernel(problem, Schedule(schedule), block_n, warps, stages), splits=splits,
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


def _whole(value: object, name: str, most: int = MAX_SEQ_LEN) -> Any:
    """A size; None where there may be none."""
    if value is None and name in ("head_dim_v", "page_size"):
        return None
    if type(value) is not int or not 1 <= value <= most:
        raise ValueError(f"{name}: got {shown(value)}")
    return value
