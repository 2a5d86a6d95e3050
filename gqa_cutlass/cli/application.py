"""`gqa-cutlass`: thin commands over the package, each importing only what it needs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial

import typer

from gqa_cutlass.cli import benchmark, generation, inspection
from gqa_cutlass.cli.failures import status_of

__all__ = ["app", "main"]

_COMMANDS: dict[str, Callable[..., None]] = {
    "generate": generation.generate,
    "list": generation.list_,
    "build": generation.build,
    "export": generation.export,
    "check": generation.check,
    "clean": generation.clean,
    "explain": inspection.explain,
    "verify": inspection.verify,
    "sim": inspection.sim,
    "bench": benchmark.bench,
    "doctor": inspection.doctor,
}
app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    help="Generate, compile, check and measure kernels for GQA decode attention.",
)  # fmt: skip
for _name, _command in _COMMANDS.items():
    app.command(_name)(_command)


def main() -> None:
    """Run a command, or without one print which there are."""
    given = sys.argv[1:] or ["--help"]
    sys.exit(status_of(partial(app, given, prog_name="gqa-cutlass", standalone_mode=False)))
