"""What commands print. Names of files come as they are, which no markup may change or break."""

from __future__ import annotations

import json
import os
import sys
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from gqa_cutlass import env
from gqa_cutlass.cli.table import Column, cut, lay_out

_BAR, _TIME = 10, 12  # characters of a bar; of the time left, with what is between the columns
_COMMON = "gqa_decode_"  # of nearly all names


class Step(Protocol):
    """Told of everything that is done."""

    def __call__(self, name: str, outcome: str = "") -> None:
        """What was done, and what came of it."""


def say(text: str) -> None:
    """Print lines as they are, however narrow the terminal, so that names can be copied."""
    print(printable(text))


def note(text: str) -> None:
    """Print a line about the work, beside the output."""
    if sys.stderr is not None:
        print(printable(text), file=sys.stderr, flush=True)


def say_json(facts: object) -> None:
    """Print facts for programs."""
    print(json.dumps(facts, indent=1))


def print_table(columns: Sequence[Column], rows: Sequence[Sequence[str]], title: str = "") -> None:
    """Print a table as wide as the terminal at most; as wide as it is where there is none."""
    if title:
        say(f"\n{title}")
    cells = [[printable(cell) for cell in row] for row in rows]
    for line in lay_out(columns, cells, width()):
        print(line)


def say_labelled(report: str, indent: int) -> None:
    """Print lines of a label and a text, which goes on below itself where the terminal is narrow.

    Names are never broken: those that are too long for their place get a line of their own.

    Args:
        report: The lines.
        indent: Where the text begins.
    """
    room = width()
    for line in report.splitlines():
        label, text = line[:indent], line[indent:]
        if room is None:
            say(line)
            continue
        for part in textwrap.wrap(
            text, max(room - indent, indent), break_long_words=False, break_on_hyphens=False
        ):
            if indent + len(part) > room:
                say(f"{label.rstrip()}\n  {part}" if label.strip() else f"  {part}")
            else:
                say(f"{label}{part}")
            label = " " * indent


def width() -> int | None:
    """Characters of a line: what COLUMNS says, or the terminal; None where neither does."""
    if given := env.columns():
        return given
    try:
        return max(os.get_terminal_size(sys.stdout.fileno()).columns, 20)
    except (OSError, ValueError, AttributeError):
        return None


@contextmanager
def progress(total: int) -> Iterator[Step]:
    """Say how far the work is: on a terminal by a bar with the time left, elsewhere in lines.

    Args:
        total: How many steps there are; 0: say nothing.

    Yields:
        What to call after each.
    """
    if total == 0:
        yield lambda name, outcome="": None
        return
    if sys.stderr is None or not sys.stderr.isatty():
        yield _lines(total)
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    columns = (
        MofNCompleteColumn(), BarColumn(_BAR), TimeRemainingColumn(),
        TextColumn("{task.description}", markup=False),
    )  # fmt: skip
    # Where a line is too short for all, rich would cut the count and the time as well.
    room = max(console.width - 2 * len(str(total)) - _BAR - _TIME, 1)
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=total)

        def advance(name: str, outcome: str = "") -> None:
            short = printable(name).removeprefix(_COMMON)
            bar.update(task, advance=1, description=cut(short, room))

        yield advance


def _lines(total: int) -> Step:
    done = 0

    def advance(name: str, outcome: str = "") -> None:
        nonlocal done
        done += 1
        note(f"[{done}/{total}] {name}{f': {outcome}' if outcome else ''}")

    return advance


def printable(text: str) -> str:
    """Text with what is no text, or would command the terminal, escaped; lines stay lines."""
    named = text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in named
    )
