"""`gqa-cutlass`: thin commands over the package, each importing only what it needs."""

from __future__ import annotations

import sys
from collections.abc import Callable

import typer

from gqa_cutlass.cli import benchmark, generation, inspection
from gqa_cutlass.errors import GqaError

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
    no_args_is_help=True, add_completion=False, help=__doc__, pretty_exceptions_enable=False
)
for _name, _command in _COMMANDS.items():
    app.command(_name)(_command)


def main() -> None:
    """Run a command; an error is one line, not a traceback."""
    try:
        app()
    except (GqaError, OSError) as error:
        print(f"gqa-cutlass: {error}", file=sys.stderr)
        sys.exit(2)
