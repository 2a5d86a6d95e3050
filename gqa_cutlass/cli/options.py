"""Options that several commands have, and how what is given for them is read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

_MOST_JOBS = 1024


def folder(help: str) -> Any:
    """An option for a folder to write to."""
    return typer.Option(parser=_folder, metavar="FOLDER", help=help)


def number(help: str) -> Any:
    """An option for a whole number, of which the command knows what it allows."""
    return typer.Option(parser=_number, metavar="INTEGER", help=help)


def fraction(help: str) -> Any:
    """An option for a number, likewise."""
    return typer.Option(parser=_fraction, metavar="NUMBER", help=help)


def _folder(name: str | Path) -> Path:
    from gqa_cutlass.codegen.files import unfit

    if reason := unfit(name):
        raise typer.BadParameter(reason)
    return Path(name)


def _number(text: str | int) -> int:
    try:
        return int(text)
    except ValueError:
        raise typer.BadParameter(f"got {text!r}; allowed: a whole number.") from None


def _fraction(text: str | float) -> float:
    try:
        return float(text)
    except ValueError:
        raise typer.BadParameter(f"got {text!r}; allowed: a number.") from None


def _jobs(text: str | int) -> int:
    jobs = _number(text)
    if not 0 <= jobs <= _MOST_JOBS:
        raise typer.BadParameter(f"got {jobs}; allowed: 0 (one per CPU) to {_MOST_JOBS}.")
    return jobs


def presets(incomplete: str) -> list[str]:
    """Presets that begin so, for a shell that completes what is typed."""
    from gqa_cutlass.codegen.models import MODELS

    return [model.name for model in MODELS if model.name.startswith(incomplete)]


def kernel_names(incomplete: str) -> list[str]:
    """The same of kernels that are shipped."""
    from gqa_cutlass.codegen import carried

    return [config.name for config in carried() if config.name.startswith(incomplete)]


Kernels = Annotated[
    str | None,
    typer.Option(
        "--kernels",
        autocompletion=kernel_names,
        help="Comma-separated; each entry is `*`-separated whole parts of a name: 'f16*d128_g4'. "
        "Default: all.",
    ),
]
Exclude = Annotated[
    str | None,
    typer.Option("--exclude-kernels", help="The same of what to leave out again."),
]
Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        autocompletion=presets,
        help="Kernels of this model, shipped or not: a config.json of Hugging Face, a folder with "
        "one, or a preset (`gqa-cutlass models`).",
    ),
]
Tp = Annotated[
    str | None,
    typer.Option(
        "--tp",
        metavar="INTEGERS",
        help="Ranks that the model's heads are divided by: 1,2,4,8. Default: 1.",
    ),
]
DTypes = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        help="float16, bfloat16 or both, with a comma. Default: the model's; without a model all.",
    ),
]
CacheDType = Annotated[
    str | None,
    typer.Option(
        "--cache-dtype",
        help="float8_e4m3fn or float8_e5m2. Default: 16 bits, as queries have.",
    ),
]
Paged = Annotated[
    bool, typer.Option("--paged", help="With --model: all kernels for caches in pages.")
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Say what would be done, and write nothing.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Archs = Annotated[
    str, typer.Option("--arch", help="Comma-separated targets, or `all`. Default: sm_90a.")
]
Jobs = Annotated[
    int,
    typer.Option(
        parser=_jobs, metavar="INTEGER", help="Kernels to compile at a time. 0: one per CPU."
    ),
]
