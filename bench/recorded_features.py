"""Steps over pages and over caches of 8 bits beside what others took, as recorded elsewhere.

The record has our own dense step of its run, and this one has that of ours: times are scaled by how
the two go together. Pages are compared with pages of the same size; of those of 128, which ours
were not measured with, by the slower of the next sizes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from bench.baselines import feature_recorded
from bench.record import Featured

_POINT = "model, heads (q/kv/dim)", "sequences × tokens"
PAGES_HEADER = (
    *_POINT, "ours, pages of 1, 16, 64, 256",
    "FA3, pages of 16", "FA3, pages of 128", "XQA", "FlashInfer, pages of 16",
    "pages of 16, against the best", "larger pages, against the best", "pages of 1, against XQA",
)  # fmt: skip
FP8_HEADER = (
    *_POINT, "ours, 16 bits", "ours, 8 bits", "8 bits, against 16", "XQA, 8 bits",
    "8 bits, against XQA",
)  # fmt: skip
_SIZES = {f"pages of {size}": size for size in (1, 16, 64, 256)}
_FP8 = "float8_e4m3fn"
_OURS = "dense step of ours"


def pages_cells(features: Iterable[Featured]) -> list[list[str]]:
    """Rows over pages: a point each, microseconds per call, and how many times as fast ours is.

    Args:
        features: Of a record; those of other features are left out, and so are points without a
            record, or without one of our sizes.
    """
    points: dict[str, dict[int, Featured]] = {}
    for row in features:
        if row.feature in _SIZES:
            points.setdefault(row.point, {})[_SIZES[row.feature]] = row
    return [
        _pages_row(rows, others)
        for rows in points.values()
        if len(rows) == len(_SIZES) and (others := _scaled("pages", rows[16]))
    ]


def fp8_cells(features: Iterable[Featured]) -> list[list[str]]:
    """Rows over caches of 8 bits: as `pages_cells`, beside our step of 16 bits as well.

    Args:
        features: Of a record; those of other features, and points without a record, are left out.
    """
    return [
        _fp8_row(row, others["XQA"])
        for row in features
        if row.feature == _FP8 and (others := _scaled("fp8", row))
    ]


def _scaled(feature: str, row: Featured) -> dict[str, float] | None:
    """What others took by name, scaled to this run's plain step; None without a record."""
    recorded = feature_recorded(feature, row.point)
    if recorded is None:
        return None
    scale = row.plain / recorded.pop(_OURS)
    return {name: micros * scale for name, micros in recorded.items()}


def _pages_row(rows: Mapping[int, Featured], others: Mapping[str, float]) -> list[str]:
    ours = {size: row.ours for size, row in rows.items()}
    ratios = (
        min(others[name] for name in others if name != "FA3, pages of 128") / ours[16],
        min(others["FA3, pages of 128"], others["XQA"]) / max(ours[64], ours[256]),
        others["XQA"] / ours[1],
    )
    return [
        *rows[16].label.cells, ", ".join(f"**{ours[size]:.1f}**" for size in _SIZES.values()),
        *(f"{micros:.1f}" for micros in others.values()), *(f"{r:.2f}×" for r in ratios),
    ]  # fmt: skip


def _fp8_row(row: Featured, xqa: float) -> list[str]:
    return [
        *row.label.cells, f"{row.plain:.1f}", f"**{row.ours:.1f}**",
        f"{row.plain / row.ours:.2f}×", f"{xqa:.1f}", f"{xqa / row.ours:.2f}×",
    ]  # fmt: skip
