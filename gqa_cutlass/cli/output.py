"""What commands print."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

console = Console()


def print_wide(table: Table) -> None:
    """Print without folding kernel names, however narrow the terminal."""
    Console(width=max(console.width, 160)).print(table)
