"""What `end_to_end` keeps of its measurements: rows, their file, and their table."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from bench.e2e_points import SHAPES, WAYS
from gqa_cutlass.codegen.files import read_json, update, writing
from gqa_cutlass.errors import InputError

_ABOUT = {"gpu", "date", "torch", "transformers"}  # what a table says of a run
_ALLOWED = "JSON that this benchmark wrote"
_REFERENCES = {shape.name: shape.reference for shape in SHAPES}

_TABLE = re.compile(r"(<!-- end to end -->\n).*?(<!-- /end to end -->)", re.DOTALL)

Key = tuple[str, int, int, int, str]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measurement, or why there is none.

    Args:
        model: Label.
        layers: Of the model that was measured.
        batch: Sequences.
        context: Tokens that each held when the first step began.
        way: Label.
        ms_per_step: Milliseconds per step, which makes one token for each sequence.
        tokens_per_second: Of all sequences.
        logits_difference: Of the first step from SDPA's, or eager attention's where SDPA cannot
            run the model, by norm; None where that is missing.
        missing: Why there are no numbers.
        date: Of the run.
        commit: That was measured.
    """

    model: str
    layers: int
    batch: int
    context: int
    way: str
    ms_per_step: float | None = None
    tokens_per_second: float | None = None
    logits_difference: float | None = None
    missing: str | None = None
    date: str = ""
    commit: str = ""

    @property
    def key(self) -> Key:
        """What a later run replaces."""
        return self.model, self.layers, self.batch, self.context, self.way


class Record:
    """The rows, in a file that is written after every one of them.

    Args:
        path: The JSON file; a table goes beside it. Rows that it has are kept.
        run: What the rows depend on.
    """

    def __init__(self, path: Path, run: dict[str, str]) -> None:
        self.path, self.run = path, run
        self.rows: dict[Key, Row] = {}
        if path.exists():
            self.join(path)

    def join(self, path: Path) -> None:
        """Take the rows of a record of the same GPU.

        Raises:
            InputError: It is none.
        """
        run, rows = load(path)
        if run["gpu"] == self.run["gpu"]:
            for row in rows:
                self.add(row)

    def add(self, row: Row) -> None:
        """Note a row; one that says why it is missing replaces no numbers."""
        if not (row.missing and self.has(row.key)):
            self.rows[row.key] = row

    def has(self, key: Key) -> bool:
        """Whether there are numbers."""
        return key in self.rows and not self.rows[key].missing

    def write(self) -> None:
        """Write the JSON file and the table.

        Raises:
            OutputError: The file system refuses.
        """
        content = {"run": self.run, "rows": [asdict(row) for row in self.rows.values()]}
        folder, sheet = self.path.parent, self.path.with_suffix(".md").name
        files = {
            self.path.name: json.dumps(content, indent=1) + "\n",
            sheet: table(list(self.rows.values()), self.run),
        }
        with writing("end_to_end: --out", folder):
            update(folder, files)


def load(path: Path) -> tuple[dict[str, str], list[Row]]:
    """What a record's run was on, and its rows.

    Raises:
        InputError: It is no record.
    """
    found = read_json("end_to_end: record", path, _ALLOWED)
    try:
        match found:
            case {"run": dict() as run, "rows": [*rows]} if _ABOUT <= run.keys():
                about = {"date": run["date"], "commit": run.get("commit", "")}
                return run, [Row(**about | fields) for fields in rows]
    except TypeError:  # other fields, or none
        pass
    raise InputError(f"end_to_end: record: got {path}, which is none; allowed: {_ALLOWED}.")


def table(rows: Sequence[Row], run: dict[str, str]) -> str:
    """Milliseconds per step, and how many times as fast ours is, in Markdown."""
    ways = [way.name for way in WAYS if any(row.way == way.name for row in rows)]
    dates = sorted({row.date for row in rows if row.date and not row.missing}) or [run["date"]]
    lines = [
        f"ms per step on {run['gpu']}, {' and '.join(dates)}, torch {run['torch']}, transformers "
        f"{run['transformers']}; every step makes one token for each sequence.",
        "",
        "| model, layers | sequences × tokens | " + " | ".join(ways) + " | best of ours, tokens/s "
        "| against SDPA (or eager) in the same form |",
        "| --- | --- |" + " --- |" * (len(ways) + 2),
    ]
    order = {shape.name: number for number, shape in enumerate(SHAPES)}
    places = sorted(
        {row.key[:4] for row in rows}, key=lambda place: (order.get(place[0], 0), *place)
    )
    for place in places:
        here = {row.way: row for row in rows if row.key[:4] == place}
        model, layers, batch, context = place
        ours = [row for way, row in here.items() if way.startswith("ours") and row.ms_per_step]
        best = max(ours, key=lambda row: row.tokens_per_second or 0, default=None)
        lines.append(
            f"| {model}, {layers} | {batch} × {context} | "
            + " | ".join(_cell(here.get(way)) for way in ways)
            + f" | {f'{best.tokens_per_second:.0f}' if best else '-'} | {_against(best, here)} |"
        )
    return "\n".join([*lines, *_reasons(rows)]) + "\n"


def replaced(document: str, content: str) -> str:
    """The document with other content between its markers; as it is, where it has none."""
    return _TABLE.sub(lambda found: f"{found[1]}\n{content}\n{found[2]}", document)


def same_form(row: Row) -> str:
    """The way that is run as one of ours is, with the attention that it is compared with."""
    return row.way.replace("ours", _REFERENCES.get(row.model, "sdpa"))


def _cell(row: Row | None) -> str:
    if row is None or row.ms_per_step is None:
        return "-"
    return f"**{row.ms_per_step:.2f}**" if row.way.startswith("ours") else f"{row.ms_per_step:.2f}"


def _against(best: Row | None, here: dict[str, Row]) -> str:
    """How many times as fast the best of ours is as the reference that is run the same way."""
    other = None if best is None else here.get(same_form(best))
    if best is None or other is None or not other.ms_per_step or not best.ms_per_step:
        return "-"
    return f"{other.ms_per_step / best.ms_per_step:.2f}×"


def _reasons(rows: Sequence[Row]) -> list[str]:
    """Why there are dashes, and of which models and ways."""
    found: dict[str, dict[str, None]] = {}
    for row in rows:
        if row.missing:
            found.setdefault(row.missing, {})[f"{row.model} {row.way}"] = None
    if not found:
        return []
    return ["", "Missing:", "", *(f"- {', '.join(who)}: {why}." for why, who in found.items())]
