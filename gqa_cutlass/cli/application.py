"""The commands under their names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import typer

from gqa_cutlass.cli import benchmark, building, explaining, generation, inspection
from gqa_cutlass.cli.failures import status_of

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
    "inspect": inspection.inspect,
    "doctor": inspection.doctor,
}
app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    help="Generate, compile, check and measure kernels for GQA decode attention.",
)  # fmt: skip
for _name, _command in _COMMANDS.items():
    app.command(_name)(_command)


def run(arguments: Sequence[str]) -> int:
    """Run a command, or without one print which there are; returns the process' status."""
    given = [*arguments] or ["--help"]
    return status_of(partial(app, given, prog_name="gqa-cutlass", standalone_mode=False))
