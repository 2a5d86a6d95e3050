"""What commands print. Names of files come as they are, which no markup may change or break."""

from __future__ import annotations

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

console = Console(markup=False, emoji=False, highlight=False)


def say(text: str) -> None:
    """Print lines as they are, however narrow the terminal, so that names can be copied."""
    print(printable(text))


def print_wide(table: Table) -> None:
    """Print without folding kernel names, however narrow the terminal."""
    wide = Console(width=max(console.width, 160), markup=False, emoji=False, highlight=False)
    wide.print(table)


def progress() -> Progress:
    """A bar on a terminal, out of the way of what is printed; elsewhere nothing."""
    terminal = Console(stderr=True)
    return Progress(console=terminal, transient=True, disable=not terminal.is_terminal)


def printable(text: str) -> str:
    """Text with what is no text, or would command the terminal, escaped; lines stay lines."""
    named = text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in named
    )
