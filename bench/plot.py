"""A run as a picture: microseconds over KV bytes, both logarithmic, as SVG."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

from record import Record, Row

WIDTH, HEIGHT = 760, 480
LEFT, RIGHT, TOP, BOTTOM = 64, 744, 40, 428
MIB = tuple(4.0**power for power in range(-2, 9))
MICROS = (0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000)
COLOURS = {"ours": "#0a7d3c", "best SDPA backend": "#c2410c", "floor": "#64748b"}
TEXT, GRID = "#0f172a", "#e2e8f0"


@dataclass(frozen=True, kw_only=True)
class Axis:
    """A logarithmic axis: its ticks, rising, and where the first and the last of them are drawn."""

    ticks: Sequence[float]
    first: float
    last: float

    def at(self, value: float) -> float:
        """Where a value is drawn."""
        low, high = math.log(self.ticks[0]), math.log(self.ticks[-1])
        return self.first + (math.log(value) - low) / (high - low) * (self.last - self.first)


def svg(record: Record) -> str:
    """The grid of a run: the floor as a line, ours and the best SDPA backend as marks."""
    rows = sorted(record.rows, key=lambda row: (row.mib, row.point))
    sdpa = [(row, peer.micros) for row in rows if (peer := row.best_sdpa) is not None]
    times = [time for row in rows for time in (row.floor, row.ours)] + [time for _, time in sdpa]
    x = Axis(ticks=_covering(MIB, [row.mib for row in rows]), first=LEFT, last=RIGHT)
    y = Axis(ticks=_covering(MICROS, times), first=BOTTOM, last=TOP)
    title = f"µs per decode step, float16, cold cache: {record.run['gpu']}, {record.run['date']}"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" '
        f'height="{HEIGHT}" font-family="sans-serif" font-size="12" fill="{TEXT}">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
        _text(LEFT, 22, title),
        *_axes(x, y),
        _floor(rows, x, y),
        *(_mark(row, "best SDPA backend", time, x, y) for row, time in sdpa),
        *(_mark(row, "ours", row.ours, x, y) for row in rows),
        *_legend(),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _covering(ticks: Sequence[float], values: Sequence[float]) -> Sequence[float]:
    """The ticks from the last one below all values to the first one above them."""
    first = max(i for i, tick in enumerate(ticks) if tick < min(values))
    last = min(i for i, tick in enumerate(ticks) if tick > max(values))
    return ticks[first : last + 1]


def _axes(x: Axis, y: Axis) -> list[str]:
    parts = []
    for tick in x.ticks:
        parts.append(_line(x.at(tick), BOTTOM, x.at(tick), TOP))
        parts.append(_text(x.at(tick), BOTTOM + 18, f"{tick:g}", 'text-anchor="middle"'))
    for tick in y.ticks:
        parts.append(_line(LEFT, y.at(tick), RIGHT, y.at(tick)))
        parts.append(_text(LEFT - 8, y.at(tick) + 4, f"{tick:g}", 'text-anchor="end"'))
    middle = (TOP + BOTTOM) / 2
    turned = f'text-anchor="middle" transform="rotate(-90 18 {middle:g})"'
    parts.append(_text((LEFT + RIGHT) / 2, HEIGHT - 12, "MiB read", 'text-anchor="middle"'))
    return [*parts, _text(18, middle, "µs per call", turned)]


def _floor(rows: Sequence[Row], x: Axis, y: Axis) -> str:
    lowest = {mib: min(r.floor for r in rows if r.mib == mib) for mib in [r.mib for r in rows]}
    points = " ".join(f"{x.at(mib):.1f},{y.at(micros):.1f}" for mib, micros in lowest.items())
    return f'<polyline points="{points}" fill="none" stroke="{COLOURS["floor"]}" stroke-width="2"/>'


def _mark(row: Row, name: str, micros: float, x: Axis, y: Axis) -> str:
    place = f'cx="{x.at(row.mib):.1f}" cy="{y.at(micros):.1f}" r="4"'
    title = escape(f"{row.point}: {name} {micros:.1f} µs")
    return f'<circle {place} fill="{COLOURS[name]}"><title>{title}</title></circle>'


def _legend() -> list[str]:
    parts = []
    for top, (name, colour) in zip(range(TOP + 12, HEIGHT, 20), COLOURS.items(), strict=False):
        parts.append(f'<rect x="{LEFT + 14}" y="{top}" width="12" height="12" fill="{colour}"/>')
        parts.append(_text(LEFT + 32, top + 11, name))
    return parts


def _line(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{GRID}"/>'


def _text(x: float, y: float, text: str, more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" {more}>{escape(text)}</text>'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, nargs="+", help="JSON files that bench.py wrote")
    for path in parser.parse_args().results:
        path.with_suffix(".svg").write_text(svg(Record.load(path)))


if __name__ == "__main__":
    main()
