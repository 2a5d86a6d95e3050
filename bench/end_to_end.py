"""`python -m bench.end_to_end`: tokens per second of whole models in transformers.

Every row is written as soon as it is measured, to a JSON file that a later run on the same GPU
completes, and to a table beside it. A row that fails, does not fit or is not reached says why.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product, starmap
from pathlib import Path
from typing import Any

import torch

from bench import checkout
from bench.e2e_points import (
    BATCHES,
    CONTEXTS,
    SHAPES,
    WAYS,
    Job,
    Point,
    Run,
    Shape,
    jobs,
)
from gqa_cutlass.cli.failures import status_of
from gqa_cutlass.codegen.files import read_json, update, writing
from gqa_cutlass.errors import InputError
from gqa_cutlass.proof.evidence import provenance

_COMPILE_SECONDS, _OTHER_SECONDS = 60, 5  # what a row may take
_ABOUT = {"gpu", "date", "torch", "transformers"}  # what a table says of a run
_ALLOWED = "JSON that this benchmark wrote"
_REFERENCE = "sdpa"  # whose logits the others are compared with


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
        logits_difference: Of the first step from SDPA's, by norm; None where that is missing.
        missing: Why there are no numbers.
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

    @property
    def key(self) -> tuple[str, int, int, int, str]:
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
        self.rows: dict[tuple[str, int, int, int, str], Row] = {}
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
        known = self.rows.get(row.key)
        if row.missing and known is not None and not known.missing:
            return
        self.rows[row.key] = row

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
                return run, [Row(**fields) for fields in rows]
    except TypeError:  # other fields, or none
        pass
    raise InputError(f"end_to_end: record: got {path}, which is none; allowed: {_ALLOWED}.")


def table(rows: Sequence[Row], run: dict[str, str]) -> str:
    """Milliseconds per step, and how many times as fast ours is, in Markdown."""
    ways = [way.name for way in WAYS if any(row.way == way.name for row in rows)]
    lines = [
        f"ms per step on {run['gpu']}, {run['date']}, torch {run['torch']}, transformers "
        f"{run['transformers']}; every step makes one token for each sequence.",
        "",
        "| model, layers | sequences × tokens | " + " | ".join(ways) + " | best of ours, tokens/s "
        "| against SDPA in the same form |",
        "| --- | --- |" + " --- |" * (len(ways) + 2),
    ]
    places = dict.fromkeys((r.model, r.layers, r.batch, r.context) for r in rows)
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
    reasons = dict.fromkeys(row.missing for row in rows if row.missing)
    if reasons:
        lines += ["", "Missing: " + "; ".join(map(str, reasons)) + "."]
    return "\n".join(lines) + "\n"


def _cell(row: Row | None) -> str:
    if row is None or row.ms_per_step is None:
        return "-"
    return f"**{row.ms_per_step:.2f}**" if row.way.startswith("ours") else f"{row.ms_per_step:.2f}"


def _against(best: Row | None, here: dict[str, Row]) -> str:
    """How many times as fast the best of ours is as SDPA that is run the same way."""
    other = None if best is None else here.get(best.way.replace("ours", "sdpa"))
    if best is None or other is None or not other.ms_per_step or not best.ms_per_step:
        return "-"
    return f"{other.ms_per_step / best.ms_per_step:.2f}×"


class Bench:
    """Measures jobs, one after the other, within a time.

    Args:
        record: Where rows go.
        minutes: After so many nothing is begun that may not end in time.
        layers: Instead of the models' own numbers.
        device: Where; the CPU is for tests.
        dtype: Of weights and caches.
    """

    def __init__(
        self, record: Record, *, minutes: float, layers: int | None, device: str, dtype: torch.dtype
    ) -> None:
        self._record = record
        self._deadline = time.monotonic() + 60 * minutes
        self._layers, self._device, self._dtype = layers, device, dtype
        self._shape: Shape | None = None
        self._model: Any = None
        self._logits: dict[tuple[str, Point], torch.Tensor] = {}

    def measure(self, job: Job) -> Row:
        """Measure a job, or note why not, and print it."""
        try:
            found = self._measured(job)
        except torch.OutOfMemoryError:
            found = {"missing": "out of memory"}
        except Exception as error:  # one row that fails must not lose the others
            found = {"missing": f"{type(error).__name__}: {error}"[:300]}
        row = Row(
            model=job.shape.name, layers=self._layers or job.shape.layers, batch=job.point.batch,
            context=job.point.context, way=job.way.name, **found,
        )  # fmt: skip
        self._record.add(row)
        self._record.write()
        said = row.missing or f"{row.ms_per_step:.3f} ms, differs by {row.logits_difference}"
        print(f"{row.model} {row.batch} × {row.context} {row.way}: {said}", flush=True)
        _free()
        return row

    def _measured(self, job: Job) -> dict[str, Any]:
        from bench import e2e_steps

        compiled = job.way.run is Run.COMPILED
        needed = _COMPILE_SECONDS if compiled else _OTHER_SECONDS
        if time.monotonic() + needed > self._deadline:
            return {"missing": "no time was left"}
        if job.way.run is Run.CAPTURED and self._device == "cpu":
            return {"missing": "CUDA graphs need a GPU"}
        if self._shape != job.shape:
            self._model = None
            _free()
            self._model = e2e_steps.build(job.shape, self._layers, self._device, self._dtype)
            self._shape = job.shape
        if why := e2e_steps.too_large(self._model, job.point, job.way):
            return {"missing": why}
        step, logits = e2e_steps.make_step(self._model, job.point, job.way)
        seconds = e2e_steps.seconds_per_step(step)
        if compiled:
            torch._dynamo.reset()
        return {
            "ms_per_step": round(1e3 * seconds, 4),
            "tokens_per_second": round(job.point.batch / seconds, 1),
            "logits_difference": self._difference(job, logits),
        }

    def _difference(self, job: Job, logits: torch.Tensor) -> float | None:
        """From SDPA's logits after the same tokens, by norm."""
        key = job.shape.name, job.point
        if job.way.name == _REFERENCE:
            self._logits[key] = logits
        right = self._logits.get(key)
        return None if right is None else round(float((logits - right).norm() / right.norm()), 5)


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what the options say; a row without numbers is no failure."""
    parser = argparse.ArgumentParser(prog="end_to_end", description=__doc__)
    names = [shape.name for shape in SHAPES]
    ways = [way.name for way in WAYS]
    add = parser.add_argument
    add("--models", default=",".join(names), help="comma-separated; default: all")
    add("--ways", default=",".join(ways), help="comma-separated; default: all")
    add("--batches", type=_numbers, default=BATCHES)
    add("--contexts", type=_numbers, default=CONTEXTS)
    add("--layers", type=int, help="fewer than the models have")
    add("--minutes", type=float, default=8, help="begin nothing that may take longer than that")
    add("--out", type=Path, help="folder for the record; default: the checkout's results")
    add("--join", type=Path, nargs="+", help="measure nothing; make one record of these")
    options = parser.parse_args(arguments)
    folder = options.out or checkout.results_folder()
    if options.join:
        first, _ = load(options.join[0])
        record = Record(folder / _name(first["gpu"]), first)
        for path in options.join:
            record.join(path)
        record.write()
        print(record.path.with_suffix(".md").read_text())
        return 0
    if not torch.cuda.is_available():
        print("end_to_end: needs a GPU", file=sys.stderr)
        return 1
    torch.set_float32_matmul_precision("high")
    run = _run()
    record = Record(folder / _name(run["gpu"]), run)
    bench = Bench(
        record, minutes=options.minutes, layers=options.layers, device="cuda", dtype=torch.bfloat16
    )
    points = tuple(starmap(Point, product(options.batches, options.contexts)))
    for job in jobs(_chosen(SHAPES, options.models), points, _chosen(WAYS, options.ways)):
        bench.measure(job)
    print(record.path.with_suffix(".md").read_text())
    return 0


def _numbers(text: str) -> tuple[int, ...]:
    """What argparse asks for, comma-separated; it says so where there are others."""
    return tuple(int(number) for number in text.split(","))


def _chosen(known: Sequence[Any], names: str) -> tuple[Any, ...]:
    by_name = {item.name: item for item in known}
    unknown = [name for name in names.split(",") if name not in by_name]
    if unknown:
        sys.exit(f"end_to_end: got {', '.join(unknown)}; allowed: {', '.join(by_name)}")
    return tuple(by_name[name] for name in names.split(","))


def _run() -> dict[str, str]:
    import transformers

    return provenance() | {"transformers": transformers.__version__, "commit": checkout.commit()}


def _name(gpu: str) -> str:
    return f"{gpu.lower().replace(' ', '-')}-end-to-end.json"


if __name__ == "__main__":
    sys.exit(status_of(main))
