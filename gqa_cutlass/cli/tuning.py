"""The command that searches for the fastest launches on the GPU at hand."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gqa_cutlass.cli.options import CacheDType, DryRun, Json, Model, Tp, number
from gqa_cutlass.cli.output import note, print_table, progress, say, say_json
from gqa_cutlass.cli.picking import cache_dtype_of, choose
from gqa_cutlass.cli.table import Column

if TYPE_CHECKING:
    from gqa_cutlass.codegen.schema.problem import Problem
    from gqa_cutlass.tuning.table import Table

_HEADS = re.compile(r"([1-9]\d{0,4})/([1-9]\d{0,4})/([1-9]\d{0,2})")
_BATCH, _ROOM = "1,8,64", "1024,8192,32768"
_COLUMNS = (
    Column(head="problem"),
    Column(head="launch"),
    Column(head="behind the best of each length", number=True),
)


def tune(
    heads: Annotated[
        str | None,
        typer.Option(help="Comma-separated query heads/KV heads/head_dim: 32/8/128,8/1/128."),
    ] = None,
    model: Model = None,
    tp: Tp = None,
    batch: Annotated[
        str | None, typer.Option(help=f"Comma-separated numbers of sequences. Default: {_BATCH}.")
    ] = None,
    room: Annotated[
        str | None,
        typer.Option(
            help=f"Comma-separated tokens that a sequence's cache has room for. Default: {_ROOM}."
        ),
    ] = None,
    page_size: Annotated[int, number("Tokens of a page. 0: caches in one piece.")] = 0,
    tiles: Annotated[
        bool,
        typer.Option(help="Try kernels with other tiles too, which calls compile on first use."),
    ] = True,
    cache_dtype: CacheDType = None,
    most_gib: Annotated[
        int, number("Leave out problems whose caches have more GiB than this.")
    ] = 8,
    out: Annotated[
        Path | None,
        typer.Option(
            help="File to write, or to go on with. Default: this user's, which calls look into."
        ),
    ] = None,
    again: Annotated[
        bool,
        typer.Option(
            "--again",
            help="Search what the file has again: the heads named, or of --cache-dtype, or all.",
        ),
    ] = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Search for the fastest launch of every problem on this GPU, for all lengths at once.

    Started again, it goes on where it was interrupted; with --again, as after an upgrade, it starts
    anew. Of a model it takes the heads: its windows, soft caps and sinks are other problems, which
    it does not search.
    """
    stored = cache_dtype_of("tune", cache_dtype)
    if again and heads is model is None:
        _check_unnamed({"batch": batch, "room": room, "page-size": page_size})
        asked = _had(out, stored)
    else:
        asked = [
            _problem(each, sequences, tokens, page_size, stored)
            for each in _sizes(heads, model, tp)
            for sequences in _numbers("batch", _BATCH if batch is None else batch)
            for tokens in _numbers("room", _ROOM if room is None else room)
        ]
    problems = _fitting(most_gib, asked)
    if dry_run:
        from gqa_cutlass.tuning.run import name_of

        names = [name_of(problem) for problem in problems]
        if as_json:
            say_json({"problems": names})
        else:
            say("\n".join(names))
        return
    table = _tuned(problems, out, tiles, again)
    if as_json:
        from gqa_cutlass.tuning.run import name_of as name

        say_json({"run": table.run, "best": {name(t.problem): str(t.best) for t in table.found}})
        return
    _show(table)


def _fitting(most_gib: int, asked: list[Problem]) -> list[Problem]:
    """Those whose caches are not too large; how many are, is said.

    Raises:
        InputError: All are.
    """
    from gqa_cutlass.errors import InputError

    problems = [problem for problem in asked if problem.cache_mib <= most_gib << 10]
    if not problems:
        least = math.ceil(min(problem.cache_mib for problem in asked) / 1024)
        raise InputError(
            f"tune: --most-gib: got {most_gib}, which leaves out all that was asked for; "
            f"allowed: {least} and more, or fewer sequences or tokens."
        )
    if left := len(asked) - len(problems):
        note(f"tune: {left} of {len(asked)} problems are left out, of more than {most_gib} GiB")
    return problems


def _check_unnamed(given: dict[str, str | int | None]) -> None:
    """Raise InputError for an option of heads where none are named."""
    from gqa_cutlass.errors import InputError

    for name, value in given.items():
        if value not in (None, 0):
            raise InputError(
                f"tune: --again: got --{name} {value} without heads; allowed: with --heads or "
                "--model, or without it for all that the file has."
            )


def _had(out: Path | None, cache_dtype: str | None) -> list[Problem]:
    """The problems of the table's file; with a type of 8 bits, those of that type.

    Raises:
        InputError: There are none.
    """
    from gqa_cutlass.errors import InputError
    from gqa_cutlass.tuning.table import Table

    path = out or _file_of_user()
    table = Table.load(path)
    features = {cache_dtype} if cache_dtype else set()
    problems = [
        tuned.problem
        for tuned in table.found
        if features <= {policy.feature for policy in tuned.problem.policies}
    ]
    if not problems:
        of = f" of {cache_dtype}" if cache_dtype else ""
        raise InputError(
            f"tune: --again: got {path}, which has no problem{of}; allowed: a file that has some. "
            "Name --heads or --model."
        )
    return problems


def _file_of_user() -> Path:
    """The table of the GPU at hand that calls look into first.

    Raises:
        DeviceError: There is no usable GPU.
    """
    import torch

    from gqa_cutlass import env
    from gqa_cutlass.tuning.table import FOLDER, file_name

    _check_gpu()
    return env.cache_dir() / FOLDER / file_name(torch.cuda.get_device_name())


def _check_gpu() -> None:
    """Raise DeviceError unless there is a GPU to measure on."""
    import torch

    from gqa_cutlass.devices import gpu
    from gqa_cutlass.errors import DeviceError

    if not torch.cuda.is_available():
        raise DeviceError(
            "tune: measures on a GPU, and torch finds none; `gqa-cutlass doctor` says what is "
            "missing, and --dry-run what would be measured."
        )
    gpu(torch.device("cuda"))  # or an error that says why it cannot be used


def _tuned(problems: list[Problem], out: Path | None, tiles: bool, again: bool) -> Table:
    from gqa_cutlass.tuning.run import tune_all

    _check_gpu()
    path = out or _file_of_user()
    with progress(len(problems)) as step:
        table = tune_all(problems, path, step, tiles, again=again)
    note(f"tune: {path}")
    return table


def _show(table: Table) -> None:
    from gqa_cutlass.tuning.run import name_of
    from gqa_cutlass.tuning.search import lowest_of, regret

    rows = [
        [name_of(t.problem), str(t.best),
         f"{regret(t.times[t.best], lowest_of(t.times)) - 1:.1%}"]
        for t in table.found
    ]  # fmt: skip
    print_table(_COLUMNS, rows)


def _sizes(heads: str | None, model: str | None, tp: str | None) -> list[tuple[int, int, int]]:
    """Query heads, KV heads and head_dim, of each once."""
    from gqa_cutlass.errors import InputError

    chosen = choose("tune", model, tp, None)
    if (chosen is None) == (heads is None):
        raise InputError("tune: --heads, --model: got both or neither; name one of them.")
    if chosen:
        layers = (each.layers for each in chosen.layers)
        return list(dict.fromkeys((a.num_q_heads, a.num_kv_heads, a.head_dim) for a in layers))
    found = [_HEADS.fullmatch(entry.strip()) for entry in (heads or "").split(",")]
    sizes = [tuple(map(int, each.groups())) for each in found if each]
    if len(sizes) < len(found):
        raise InputError(f"tune: --heads: got {heads!r}; allowed: 32/8/128, with commas between.")
    return list(dict.fromkeys(sizes))  # type: ignore[arg-type]


def _numbers(name: str, given: str) -> list[int]:
    from gqa_cutlass.errors import InputError

    entries = [entry.strip() for entry in given.split(",")]
    if not all(re.fullmatch(r"[1-9]\d{0,9}", entry) for entry in entries):
        allowed = "whole numbers from 1, with commas between"
        raise InputError(f"tune: --{name}: got {given!r}; allowed: {allowed}.")
    return list(dict.fromkeys(map(int, entries)))


def _problem(
    sizes: tuple[int, int, int], batch: int, room: int, page_size: int, cache_dtype: str | None
) -> Problem:
    from gqa_cutlass.codegen.schema.kinds import DType
    from gqa_cutlass.codegen.schema.problem import WIDEST, Problem
    from gqa_cutlass.codegen.variants import policies_for
    from gqa_cutlass.errors import InputError
    from gqa_cutlass.sizes import check_sizes

    q_heads, kv_heads, head_dim = sizes
    check_sizes("tune", batch=batch, max_seq_len=room, q_heads=q_heads, kv_heads=kv_heads,
                head_dim=head_dim)  # fmt: skip
    if q_heads % kv_heads:
        raise InputError(
            f"tune: --heads: got {q_heads} query heads for {kv_heads} KV heads; "
            "allowed: a multiple of the KV heads."
        )
    if page_size < 0 or page_size and room % page_size:
        raise InputError(f"tune: --page-size: got {page_size}; allowed: 0, or what divides {room}.")
    if cache_dtype and head_dim % (2 * WIDEST):  # kernels see pairs of 8 bits
        raise InputError(
            f"tune: --cache-dtype: got {cache_dtype} with head_dim {head_dim}; allowed: multiples "
            f"of {2 * WIDEST}, whose rows tables are for. Search the others without it."
        )
    features = ["block_table"] * (page_size > 0) + ([cache_dtype] if cache_dtype else [])
    return Problem(
        batch_size=batch, num_q_heads=q_heads, num_kv_heads=kv_heads, head_dim=head_dim,
        max_seq_len=room, page_size=page_size or None, dtype=DType.F16, vec_width=WIDEST,
        append=True, policies=policies_for(features),
    )  # fmt: skip
