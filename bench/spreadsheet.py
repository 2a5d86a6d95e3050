"""A run as CSV, for spreadsheets: a row per point, with what it was measured on in every row.

Names of columns end in their unit if they have one: us (microseconds per call), us_per_token,
gb_per_s (10⁹ bytes of K and V read per second). An empty cell is what was not measured.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence

from bench.checkout import UNKNOWN
from bench.points import Label
from bench.record import Featured, Merged, Prefill, Record, Row, Served

PROVENANCE = ("gpu", "driver", "clocks", "torch", "compiler", "date", "commit")
EQUAL = "equal"

Cells = dict[str, object]


def decode_csv(record: Record) -> str:
    """The grid and the ragged points."""
    rows = [*record.rows, *record.ragged]
    measured = dict.fromkeys(name for row in rows for name in row.measured)
    recorded = dict.fromkeys(name for row in rows for name in row.recorded_scaled)
    run = _provenance(record.run)
    return _csv([_decode(row, measured, recorded) | run for row in rows])


def prefill_csv(record: Record) -> str:
    """Whole prompts beside the decode step."""
    run = _provenance(record.run)
    names = dict.fromkeys(name for row in record.prefill for name in row.measured)
    return _csv([_prefill(row, names) | run for row in record.prefill])


def features_csv(record: Record) -> str:
    """Steps with features beside plain ones."""
    run = _provenance(record.run)
    return _csv([_featured(row) | run for row in record.features])


def merges_csv(record: Record) -> str:
    """Parts merged."""
    run = _provenance(record.run)
    return _csv([_merged(row) | run for row in record.merges])


def serving_csv(record: Record) -> str:
    """Steps as servers run them."""
    told = dict.fromkeys(name for row in record.serving for name in row.told)
    measured = dict.fromkeys(name for row in record.serving for name in row.measured)
    recorded = dict.fromkeys(name for row in record.serving for name in row.recorded)
    run = _provenance(record.run)
    return _csv([_served(row, told, measured, recorded) | run for row in record.serving])


def _decode(row: Row, measured: Iterable[str], recorded: Iterable[str]) -> Cells:
    best, sdpa = row.best_baseline, row.best_sdpa
    return {
        **_point(row.label),
        "kv_bytes": row.num_bytes,
        "ours_us": _micros(row.ours),
        "ours_balanced_us": _micros(row.balanced),
        "ours_dependent_us": _micros(row.dependent),
        "ours_us_per_token": _micros(row.per_token),
        "ours_gb_per_s": round(row.bandwidth(row.ours), 1),
        "roofline_us": _micros(row.floor),
        "roofline_gb_per_s": round(row.bandwidth(row.floor), 1),
        "share_of_roofline": round(row.floor / row.ours, 4),
        "target_over_roofline": row.limit,
        **{f"{_column(name)}_us": _micros(row.measured.get(name)) for name in measured},
        "best_sdpa_over_ours": None if sdpa is None else round(sdpa.micros / row.ours, 4),
        **{
            f"{_column(name)}_recorded_scaled_us": _micros(row.recorded_scaled.get(name))
            for name in recorded
        },
        "best_baseline": None if best is None else str(best),
        "best_baseline_over_ours": None if best is None else round(best.micros / row.ours, 4),
        "kernel": row.kernel,
        "num_splits": row.num_splits,
        "relative_error": f"{row.relative_error:.3g}",
        "source_digest": row.source_digest,
    }


def _prefill(row: Prefill, names: Iterable[str]) -> Cells:
    return {
        **_point(row.label),
        "decode_us": _micros(row.decode),
        "decode_us_per_token": _micros(row.per_token),
        **{f"prefill_{_column(name)}_us": _micros(row.measured.get(name)) for name in names},
        "prefill_best": row.best.name,
        "prefill_best_us": _micros(row.best.micros),
        "prefill_us_per_token": _micros(row.per_prompt_token),
        "prefill_over_decode": round(row.ratio, 3),
    }


def _featured(row: Featured) -> Cells:
    return {
        **_point(row.label),
        "feature": row.feature,
        "kv_mib": row.mib,
        "ours_us": _micros(row.ours),
        "plain_us": _micros(row.plain),
        "target_us": _micros(row.limit),
        "kernel": row.kernel,
        "relative_error": f"{row.relative_error:.3g}",
    }


def _merged(row: Merged) -> Cells:
    return {
        "merge": row.merge,
        "bytes": round(row.mib * 2**20),
        "ours_us": _micros(row.ours),
        "floor_us": _micros(row.floor),
        "ours_over_floor": round(row.over_floor, 4),
        "target_over_floor": row.limit,
        "operators_us": _micros(row.operators),
        "relative_error": f"{row.relative_error:.3g}",
    }


def _served(
    row: Served, told: Iterable[str], measured: Iterable[str], recorded: Iterable[str]
) -> Cells:
    return {
        **_point(row.label),
        "part": row.kind,
        "kv_mib": round(row.mib, 3),
        "ours_us": _micros(row.ours),
        **{f"ours_told_{_column(name)}_us": _micros(row.told.get(name)) for name in told},
        "floor_us": _micros(row.floor),
        "ours_over_floor": round(row.over_floor, 4),
        "target_us": _micros(row.limit),
        **{f"{_column(name)}_us": _micros(row.measured.get(name)) for name in measured},
        **{f"{_column(n)}_recorded_us": _micros(row.recorded.get(n)) for n in recorded},
        "floor_of_recorded_us": _micros(row.recorded_floor),
        "kernel": row.kernel,
        "relative_error": f"{row.relative_error:.3g}",
    }


def _point(label: Label) -> Cells:
    return {
        "model": label.model,
        "q_heads": label.num_q_heads,
        "kv_heads": label.num_kv_heads,
        "head_dim": label.head_dim,
        "batch": label.batch,
        "tokens": label.tokens,
        "lengths": label.lengths or EQUAL,
    }


def _provenance(run: Mapping[str, str]) -> Cells:
    return {key: run.get(key, UNKNOWN) for key in PROVENANCE}


def _micros(time: float | None) -> float | None:
    return None if time is None else round(time, 4)


def _column(name: str) -> str:
    return name.lower().replace(" ", "_")


def _csv(rows: Sequence[Cells]) -> str:
    """Columns are those of the first row, which all rows have; empty without rows."""
    if not rows:
        return ""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
