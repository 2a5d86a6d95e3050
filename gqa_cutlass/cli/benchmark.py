"""The command that measures on a GPU, or shows what was measured."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from gqa_cutlass.checkout import need_checkout
from gqa_cutlass.cli.options import Json, folder


def bench(
    points: Annotated[
        str, typer.Option(help="Measure only points whose name contains this. Needs --out.")
    ] = "",
    only: Annotated[
        str,
        typer.Option(
            help="Measure only these parts, with commas between: grid, ragged, prefill, features, "
            "merges, serving, host. Needs --out."
        ),
    ] = "",
    out: Annotated[
        Path | None,
        folder(
            "Folder for JSON, CSV and plots. Default: bench/results of a checkout, or here; "
            "with --from: write nothing."
        ),
    ] = None,
    source: Annotated[
        Path | None,
        typer.Option("--from", help="Measure nothing: show this record's tables."),
    ] = None,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the tables of docs/benchmark.md.")
    ] = False,
    commit: Annotated[
        str | None, typer.Option(help="Commit measured. Default: the checkout's, asked of git.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Time decode steps on the GPU against PyTorch and a kernel that only reads the same bytes."""
    folder_of_bench = str(need_checkout("bench", "its folder bench/"))
    if folder_of_bench not in sys.path:
        sys.path.insert(0, folder_of_bench)
    from bench.command import bench as run

    run(points=points, out=out, source=source, markdown=markdown, commit=commit,
        as_json=as_json, only=only)  # fmt: skip
