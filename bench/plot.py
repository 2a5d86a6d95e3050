"""A run as pictures, each as SVG and PNG; the only module that needs matplotlib.

With one version of matplotlib, one record always gives the same SVG, to the byte.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Sequence
from itertools import cycle
from typing import Any

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from bench.checkout import UNKNOWN
from bench.record import Record, Row

# Okabe and Ito's colours, which colour-blind readers tell apart, without the yellow. Models, of
# which there are more, differ in their marks as well.
OURS, SDPA, ROOFLINE = "#0072B2", "#D55E00", "#595959"
MODELS = (
    ("#000000", "o"), ("#E69F00", "s"), ("#56B4E9", "^"), ("#009E73", "D"), ("#CC79A7", "P"),
    ("#0072B2", "X"), ("#D55E00", "v"), ("#7F7F7F", "<"), ("#8C564B", "*"),
)  # fmt: skip
OURS_LABEL, SDPA_LABEL = "ours, append included", "best SDPA backend"
ROOFLINE_LABEL = "roofline: only reads the same bytes"
STYLE: dict[Any, object] = {
    "svg.hashsalt": "gqa_cutlass",
    "svg.fonttype": "none",  # text stays text
    "text.parse_math": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "grid.color": "#E5E5E5",
    "legend.frameon": False,
    "lines.markersize": 5,
}
SIZE, DPI = (8.4, 5.0), 100
MIB = tuple(2.0**power for power in range(-4, 16))
TOKENS = tuple(2.0**power for power in range(24))
MICROS = tuple(first * 10.0**power for power in range(-1, 5) for first in (1, 2, 5))

Points = Iterable[tuple[float, float]]


def draw(record: Record, base: str) -> dict[str, str | bytes]:
    """The pictures for which the record has points.

    Args:
        record: The run.
        base: Name of the first picture without its suffix; the names of the others go on from it.

    Returns:
        Files by name.
    """
    alone = [row for row in record.rows if row.label.batch == 1]
    files: dict[str, str | bytes] = {}
    for ending, title, picture, rows in (
        ("", "Decode step, cold cache", latency, record.rows),
        ("-context", "Decode step of one sequence, cold cache", context, alone),
        ("-bandwidth", "Reading the cache in a decode step", bandwidth, record.rows),
    ):
        if rows:
            about = f"float16, {record.run.get('gpu', UNKNOWN)}, {record.run.get('date', UNKNOWN)}"
            name = base + ending
            files[f"{name}.svg"], files[f"{name}.png"] = _drawn(f"{title}\n{about}", picture, rows)
    return files


def _drawn(
    title: str, picture: Callable[[Axes, Sequence[Row]], None], rows: Sequence[Row]
) -> tuple[str, bytes]:
    text, image = io.StringIO(), io.BytesIO()
    with matplotlib.style.context(["default", STYLE]):
        figure = Figure(figsize=SIZE, layout="constrained")
        axes = figure.subplots()
        picture(axes, rows)
        axes.set_title(title)
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
        figure.savefig(image, format="png", dpi=DPI, metadata={"Software": None})
    # Without the spaces at the ends of lines, which the repository has nowhere.
    lines = text.getvalue().splitlines()
    return "".join(f"{line.rstrip()}\n" for line in lines), image.getvalue()


def latency(axes: Axes, rows: Sequence[Row]) -> None:
    """Microseconds over bytes: the roofline as a line, ours and the best SDPA backend as marks."""
    sdpa = [(row.mib, baseline.micros) for row in rows if (baseline := row.best_sdpa) is not None]
    _over_bytes(axes, _floors(rows), sdpa, [(row.mib, row.ours) for row in rows])
    axes.set(ylabel="µs per call", yscale="log")
    _ticks(axes.yaxis, MICROS)


def bandwidth(axes: Axes, rows: Sequence[Row]) -> None:
    """GB/s of K and V read, over bytes; drawn as `latency` is."""
    floors = [(mib, mib * 2**20 / micros / 1e3) for mib, micros in _floors(rows)]
    sdpa = [
        (r.mib, r.bandwidth(baseline.micros)) for r in rows if (baseline := r.best_sdpa) is not None
    ]
    _over_bytes(axes, floors, sdpa, [(row.mib, row.bandwidth(row.ours)) for row in rows])
    axes.set(ylabel="GB/s of K and V read")
    axes.set_ylim(bottom=0)


def context(axes: Axes, rows: Sequence[Row]) -> None:
    """Microseconds over tokens: a line per model, solid for ours and dashed for SDPA."""
    models = dict.fromkeys(row.label.heads for row in rows)
    for model, (colour, mark) in zip(models, cycle(MODELS), strict=False):
        found = [row for row in rows if row.label.heads == model]
        ours = sorted((row.label.tokens, row.ours) for row in found)
        sdpa = sorted((r.label.tokens, baseline.micros) for r in found if (baseline := r.best_sdpa))
        axes.plot(*_xy(ours), color=colour, marker=mark, label=model)
        axes.plot(*_xy(sdpa), color=colour, marker=mark, linestyle="--", fillstyle="none")
    axes.set(xlabel="tokens attended", xscale="log", ylabel="µs per call", yscale="log")
    _ticks(axes.xaxis, TOKENS)
    _ticks(axes.yaxis, MICROS)
    axes.add_artist(axes.legend(title="model, heads (q/kv/dim)", loc="upper left"))
    solid = Line2D([], [], color="black", marker="o", label=OURS_LABEL)
    dashed = Line2D(
        [], [], color="black", marker="o", linestyle="--", fillstyle="none", label=SDPA_LABEL
    )
    axes.legend(handles=[solid, dashed], loc="lower right")


def _over_bytes(axes: Axes, floors: Points, sdpa: Points, ours: Points) -> None:
    axes.plot(*_xy(floors), color=ROOFLINE, label=ROOFLINE_LABEL)
    axes.plot(*_xy(sdpa), "s", color=SDPA, label=SDPA_LABEL)
    axes.plot(*_xy(ours), "o", color=OURS, label=OURS_LABEL)
    axes.set(xlabel="MiB of K and V read", xscale="log")
    _ticks(axes.xaxis, MIB)
    axes.legend(loc="upper left")


def _floors(rows: Sequence[Row]) -> list[tuple[float, float]]:
    """MiB, and the lowest floor of the points that read so many."""
    sizes = sorted({row.mib for row in rows})
    return [(mib, min(row.floor for row in rows if row.mib == mib)) for mib in sizes]


def _xy(points: Points) -> tuple[list[float], list[float]]:
    pairs = list(points)
    return [x for x, _ in pairs], [y for _, y in pairs]


def _ticks(axis: Axis, ticks: Sequence[float]) -> None:
    """Ticks as plain numbers, those within the axis' limits."""
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())
