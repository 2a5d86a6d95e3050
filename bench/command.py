"""`gqa-cutlass bench`: measures or reads a record, prints its tables, writes its CSV and plots."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import torch

from bench import checkout, measure, report, spreadsheet
from bench.record import Record
from gqa_cutlass.codegen.files import update, writing
from gqa_cutlass.errors import DeviceError, InputError

SHIPPED = "nvidia-h200.json"


def bench(
    *, points: str, out: Path | None, source: Path | None, markdown: bool, commit: str | None,
    as_json: bool = False, only: str = "",
) -> None:  # fmt: skip
    """Measure, or read what was measured; print tables and write files.

    Args:
        points: Part of the names of the points to measure; empty for all.
        out: Folder for the files; None: the checkout's results or the current folder, and nothing
            is written of what was only read.
        source: A record to read instead of measuring.
        markdown: Print the tables of docs/benchmark.md instead of a terminal's.
        commit: What is measured; None: what git says of the checkout.
        as_json: Print the record instead of tables.
        only: Parts to measure, with commas between them; empty for all.

    Raises:
        InputError: Options that do not go together, no such point, or no record.
        DeviceError: There is no GPU to measure on.
        OutputError: The file system refuses.
    """
    if markdown and as_json:
        raise InputError("bench: --json: got --markdown as well; leave one of them out.")
    if source is None:
        record, path = _measured(points, out, commit, only)
    elif points or commit or only:
        raise InputError(
            "bench: --from: got --points or --commit or --only as well; these are for measuring, "
            "which --from does not. Leave them out."
        )
    else:
        record, path = Record.load(source), (out or Path()) / source.name
    if as_json:
        print(record.as_json(), end="")
    elif markdown:
        print(report.markdown(record))
    else:
        report.show(record)
    if source is None or out is not None:
        written = _write(record, path.with_suffix(""))
        print(f"bench: wrote {', '.join(map(str, written))}", file=sys.stderr)


def _measured(points: str, out: Path | None, commit: str | None, only: str) -> tuple[Record, Path]:
    """The record of a run, and its file."""
    for option, given in (("points", points), ("only", only)):
        if given and out is None:
            raise InputError(
                f"bench: --{option}: got {given!r}, a part of all, and no --out; its record would "
                "replace that of the whole grid. Name a folder with --out."
            )
    parts = [part.strip() for part in only.split(",")] if only else list(measure.PARTS)
    if unknown := [part for part in parts if part not in measure.PARTS]:
        allowed = ", ".join(measure.PARTS)
        raise InputError(f"bench: --only: got {unknown[0]!r}; allowed: {allowed}.")
    if not torch.cuda.is_available():
        raise DeviceError(
            "bench: measures on a GPU, and torch finds none; see the shipped record with "
            f"`gqa-cutlass bench --from {_shipped()}`."
        )
    return measure.run(points, out or checkout.results_folder(), commit or checkout.commit(), parts)


def _write(record: Record, base: Path) -> list[Path]:
    """Write CSV, and plots if matplotlib is there; returns the files."""
    sheets = {
        "": spreadsheet.decode_csv(record),
        "-prefill": spreadsheet.prefill_csv(record),
        "-features": spreadsheet.features_csv(record),
        "-merges": spreadsheet.merges_csv(record),
        "-serving": spreadsheet.serving_csv(record),
    }
    files: dict[str, str | bytes] = {
        f"{base.name}{ending}.csv": text for ending, text in sheets.items() if text
    }
    if importlib.util.find_spec("matplotlib") is None:
        print("bench: no plots, which need `pip install 'gqa-cutlass[plots]'`", file=sys.stderr)
    else:
        from bench import plot

        files |= plot.draw(record, base.name)
    with writing("bench: --out", base.parent):
        update(base.parent, files)
    return [base.parent / name for name in files]


def _shipped() -> str:
    """Where this user finds the shipped record."""
    path = checkout.RESULTS / SHIPPED
    return os.path.relpath(path) if path.exists() else f"<repository>/bench/results/{SHIPPED}"
