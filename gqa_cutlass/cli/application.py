"""The commands under their names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated

import typer

from gqa_cutlass.cli import benchmark, building, explaining, generation, inspection, tuning
from gqa_cutlass.cli.failures import status_of
from gqa_cutlass.cli.output import say

_COMMANDS: dict[str, Callable[..., None]] = {
    "generate": generation.generate,
    "list": generation.list_,
    "models": generation.models,
    "build": building.build,
    "warmup": building.warmup,
    "export": building.export,
    "check": generation.check,
    "clean": generation.clean,
    "explain": explaining.explain,
    "verify": inspection.verify,
    "sim": inspection.sim,
    "bench": benchmark.bench,
    "tune": tuning.tune,
    "inspect": inspection.inspect,
    "doctor": inspection.doctor,
}
_STATUSES = (
    "Status: 0 done; 1 done, and something is wrong (a kernel failed, drift, something missing); "
    "2 refused, or not possible here; 130 interrupted."
)
app = typer.Typer(
    no_args_is_help=True, pretty_exceptions_enable=False, epilog=_STATUSES,
    help="Generate, compile, check and measure kernels for GQA decode attention.",
)  # fmt: skip
for _name, _command in _COMMANDS.items():
    app.command(_name)(_command)


def _show_version(asked: bool) -> None:
    if asked:
        from gqa_cutlass.version import __version__

        say(f"gqa-cutlass {__version__}")
        raise typer.Exit


@app.callback()
def _application(
    version: Annotated[
        bool,
        typer.Option("--version", is_eager=True, callback=_show_version, help="Print the version."),
    ] = False,
) -> None:
    """What stands before a command's name."""


def run(arguments: Sequence[str]) -> int:
    """Run a command, or without one print which there are; returns the process' status."""
    given = [*arguments] or ["--help"]
    return status_of(partial(app, given, prog_name="gqa-cutlass", standalone_mode=False))
