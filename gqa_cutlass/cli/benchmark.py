"""The command that measures on a GPU, or shows what was measured."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def bench(
    points: Annotated[
        str, typer.Option(help="Measure only points whose name contains this. Needs --out.")
    ] = "",
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for JSON, CSV and plots. Default: bench/results of a checkout, or here; "
            "with --from: write nothing."
        ),
    ] = None,
    source: Annotated[
        Path | None,
        typer.Option("--from", help="Measure nothing: show this record's tables."),
    ] = None,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the README's tables.")
    ] = False,
    commit: Annotated[
        str | None, typer.Option(help="Commit measured. Default: the checkout's, asked of git.")
    ] = None,
) -> None:
    """Time decode steps on the GPU against PyTorch and a kernel that only reads the same bytes."""
    from gqa_cutlass.bench.command import bench as run

    run(points=points, out=out, source=source, markdown=markdown, commit=commit)
