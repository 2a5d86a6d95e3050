"""Runs the console script in this process, as a user's shell would see it."""

from __future__ import annotations

import io
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import cache

import pytest
import typer.main

from gqa_cutlass.cli import main

# Made once of the application, for most of a refused command's time goes into that.
_commands_of = cache(typer.main.get_command)
LONGEST = 1100  # characters of a line on stderr, whatever was given


@dataclass(frozen=True)
class Outcome:
    """What came of a command: its status, and what it printed."""

    status: object
    out: str
    err: str

    @property
    def is_refusal(self) -> bool:
        """Whether it ended with one clear line on stderr, and nothing else."""
        return (
            self.status == 2
            and self.out == ""
            and self.err.startswith("gqa-cutlass: ")
            and self.err.count("\n") == 1
            and len(self.err) < LONGEST
        )


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """No file gets larger meanwhile: what would is cut short, as it is on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def console_script(*arguments: object) -> Outcome:
    """Run a command; only a SystemExit may come out of it."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2))
    with (
        pytest.MonkeyPatch.context() as patch,
        redirect_stdout(out),
        redirect_stderr(err),
        pytest.raises(SystemExit) as stopped,
    ):
        patch.setattr(typer.main, "get_command", _commands_of)
        patch.setattr(sys, "argv", ["gqa-cutlass", *map(str, arguments)])
        main()
    printed = []
    for stream in (out, err):
        stream.flush()
        printed.append(stream.buffer.getvalue().decode())
    return Outcome(stopped.value.code, *printed)
