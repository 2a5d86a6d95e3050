"""Steps over pages beside what others took for them, as recorded elsewhere.

The record has our own dense step of its run, and this one has that of ours: times are scaled by how
the two go together. Pages are compared with pages of the same size; of those of 128, which ours
were not measured with, by the slower of the next sizes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from bench.baselines import pages_recorded
from bench.record import Featured

HEADER = (
    "model, heads (q/kv/dim)", "sequences × tokens", "ours, pages of 1, 16, 64, 256",
    "FA3, pages of 16", "FA3, pages of 128", "XQA", "FlashInfer, pages of 16",
    "pages of 16, against the best", "larger pages, against the best", "pages of 1, against XQA",
)  # fmt: skip
_OURS = "dense step of ours"


def cells(features: Iterable[Featured]) -> list[list[str]]:
    """The table's rows: a point each, microseconds per call, and how many times as fast ours is.

    Args:
        features: Of a record; those of other features, and points without a record, are left out.
    """
    points: dict[str, dict[int, Featured]] = {}
    for row in features:
        if row.feature.startswith("pages of "):
            size = int(row.feature.removeprefix("pages of "))
            points.setdefault(row.point, {})[size] = row
    return [_row(rows, found) for point, rows in points.items() if (found := pages_recorded(point))]


def _row(rows: Mapping[int, Featured], recorded: dict[str, float]) -> list[str]:
    ours = {size: row.ours for size, row in rows.items()}
    scale = rows[16].plain / recorded[_OURS]
    others = {name: micros * scale for name, micros in recorded.items() if name != _OURS}
    ratios = (
        min(others[name] for name in others if name != "FA3, pages of 128") / ours[16],
        min(others["FA3, pages of 128"], others["XQA"]) / max(ours[64], ours[256]),
        others["XQA"] / ours[1],
    )
    label = rows[16].label
    return [
        label.heads, f"{label.batch} × {label.tokens}",
        ", ".join(f"**{ours[size]:.1f}**" for size in (1, 16, 64, 256)),
        *(f"{micros:.1f}" for micros in others.values()), *(f"{r:.2f}×" for r in ratios),
    ]  # fmt: skip
