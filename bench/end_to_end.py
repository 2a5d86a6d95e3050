"""`python -m bench.end_to_end`: tokens per second of whole models in transformers.

Every row is written as soon as it is measured, to a JSON file that a later run on the same GPU
completes, and to a table beside it. A row that fails, does not fit or is not reached says why.
What needs no compiler comes first, of all models, and takes a second or two a row.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import sys
import time
from collections.abc import Sequence
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
from bench.e2e_record import Record, Row, load, replaced, table
from gqa_cutlass.cli.failures import status_of
from gqa_cutlass.codegen.files import update, writing
from gqa_cutlass.proof.evidence import provenance

_COMPILE_SECONDS, _OTHER_SECONDS = 45, 5  # what a row may take


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

    def has(self, job: Job) -> bool:
        """Whether the record has numbers for it."""
        return self._record.has(Row(**self._place(job)).key)

    def measure(self, job: Job) -> Row:
        """Measure a job, or note why not, and print it."""
        start = time.monotonic()
        why = self._left_out(job)
        found = {"missing": why} if why else self._tried(job)
        run = self._record.run
        row = Row(**self._place(job), date=run["date"], commit=run.get("commit", ""), **found)
        self._record.add(row)
        self._record.write()
        said = row.missing or f"{row.ms_per_step:.3f} ms, differs by {row.logits_difference}"
        took = time.monotonic() - start
        print(
            f"{row.model} {row.batch} × {row.context} {row.way}: {said} ({took:.1f} s)", flush=True
        )
        return row

    def _place(self, job: Job) -> dict[str, Any]:
        return {
            "model": job.shape.name, "layers": self._layers or job.shape.layers,
            "batch": job.point.batch, "context": job.point.context, "way": job.way.name,
        }  # fmt: skip

    def _left_out(self, job: Job) -> str | None:
        """Why a job is not even tried."""
        needed = _COMPILE_SECONDS if job.way.run is Run.COMPILED else _OTHER_SECONDS
        if job.shape.no_sdpa and job.way.attention == "sdpa":
            return job.shape.no_sdpa
        if time.monotonic() + needed > self._deadline:
            return "no time was left"
        if job.way.run is Run.CAPTURED and self._device == "cpu":
            return "CUDA graphs need a GPU"
        return None

    def _tried(self, job: Job) -> dict[str, Any]:
        try:
            found = self._measured(job)
        except torch.OutOfMemoryError:
            found = {"missing": "out of memory"}
        except Exception as error:  # one row that fails must not lose the others
            found = {"missing": f"{type(error).__name__}: {error}"[:300]}
        if job.way.run is Run.COMPILED:
            torch._dynamo.reset()
        _free()
        return found

    def _measured(self, job: Job) -> dict[str, Any]:
        from bench import e2e_steps

        if self._shape != job.shape:
            self._model = None
            _free()
            self._model = e2e_steps.build(job.shape, self._layers, self._device, self._dtype)
            self._shape = job.shape
        for refused in (e2e_steps.too_large, e2e_steps.no_capture):
            if why := refused(self._model, job.point, job.way):
                return {"missing": why}
        step, logits = e2e_steps.make_step(self._model, job.point, job.way)
        seconds = e2e_steps.seconds_per_step(step)
        return {
            "ms_per_step": round(1e3 * seconds, 4),
            "tokens_per_second": round(job.point.batch / seconds, 1),
            "logits_difference": self._difference(job, logits),
        }

    def _difference(self, job: Job, logits: torch.Tensor) -> float | None:
        """From the reference's logits after the same tokens, by norm."""
        key = job.shape.name, job.point
        if job.way.name == job.shape.reference:
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
    add("--missing", action="store_true", help="measure only what the record has no numbers of")
    add("--out", type=Path, help="folder for the record; default: the checkout's results")
    add("--join", type=Path, nargs="+", help="measure nothing; make one record of these and a "
        "picture, and bring docs/benchmark.md up to date unless there is --out")  # fmt: skip
    options = parser.parse_args(arguments)
    folder = options.out or checkout.results_folder()
    if options.join:
        return _join(options.join, folder, docs=not options.out)
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
    gc.freeze()  # what was imported stays, and need not be looked at after every row
    for job in jobs(_chosen(SHAPES, options.models), points, _chosen(WAYS, options.ways)):
        if not (options.missing and bench.has(job)):
            bench.measure(job)
    print(table(list(record.rows.values()), record.run))
    return 0


def _join(paths: Sequence[Path], folder: Path, *, docs: bool) -> int:
    first, _ = load(paths[0])
    record = Record(folder / _name(first["gpu"]), first)
    for path in paths:
        record.join(path)
    record.write()
    rows = list(record.rows.values())
    if importlib.util.find_spec("matplotlib") is None:
        print(
            "end_to_end: no plot, which needs `pip install 'gqa-cutlass[plots]'`", file=sys.stderr
        )
    else:
        from bench import plot

        with writing("end_to_end: --out", folder):
            update(folder, plot.draw_models(rows, record.run, record.path.stem))
    if docs and checkout.DOCUMENT.exists():
        text = replaced(checkout.DOCUMENT.read_text(), table(rows, record.run))
        checkout.DOCUMENT.write_text(text)
    print(table(rows, record.run))
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
