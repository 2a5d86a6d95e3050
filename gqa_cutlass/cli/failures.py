"""What a command that fails says, in one line, and the status that it ends with."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import typer

from gqa_cutlass.cli.output import printable
from gqa_cutlass.errors import CompileError, GqaError

BROKEN_PIPE, REFUSED, INTERRUPTED = 1, 2, 130
_LONGEST = 1000  # characters of a line: what is longer was given by the user
# What the parser of options raises: typer's own in some versions, and click's in others.
_UsageError: Any = typer.BadParameter.__base__


def status_of(command: Callable[[], object]) -> int:
    """Run a command; of what goes wrong it prints a line on stderr.

    Args:
        command: Returns its status where it has one.

    Returns:
        The status for the process to end with.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # so that nothing is too odd for a terminal
            stream.reconfigure(errors="backslashreplace")
    try:
        found = command()
        if sys.stdout is not None:
            sys.stdout.flush()  # what fails at exit is not reported any more
        return found if isinstance(found, int) else 0
    except (KeyboardInterrupt, typer.Abort):
        status = INTERRUPTED
    except BrokenPipeError:  # the reader has what it wants
        status = BROKEN_PIPE
    except (_UsageError, GqaError, OSError, ImportError, MemoryError) as error:
        status = REFUSED
        _complain(f"gqa-cutlass: {_explanation(error)}")
    _forget_output()
    return status


def _explanation(error: Any) -> str:
    """What was wrong, in a line; only the compiler has more to say."""
    match error:
        case CompileError():
            return printable(str(error))
        case GqaError():
            text = str(error)
        case MemoryError():
            text = "memory: there is not enough for this"
        case ImportError():
            text = f"{error}; `gqa-cutlass doctor` says what is missing"
        case OSError():
            name = "" if error.filename is None else f"{error.filename!r}: "
            text = f"{name}{error.strerror or error}"
        case _:
            text = error.format_message()
    line = " ".join(printable(text).split("\n"))
    half = _LONGEST // 2
    return line if len(line) <= _LONGEST else f"{line[:half]} [...] {line[-half:]}"


def _complain(line: str) -> None:
    if sys.stderr is not None:
        try:
            print(line, file=sys.stderr, flush=True)
        except OSError:  # nobody listens
            pass


def _forget_output() -> None:
    """Drop output that cannot be written, for the interpreter would try once more and complain."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
