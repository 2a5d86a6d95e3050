"""A run as pictures, each as SVG and PNG; the only module that needs matplotlib.

With one version of matplotlib, one record always gives the same SVG, to the byte.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import cycle, zip_longest
from typing import Any

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from bench.checkout import UNKNOWN
from bench.e2e_record import Row as Step
from bench.e2e_record import same_form
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
BEST_LABEL = "best of all baselines"
# Baselines in the order of their labels; those that were recorded elsewhere are hollow.
BASELINES = (
    ("#D55E00", "s"), ("#E69F00", "D"), ("#009E73", "^"), ("#CC79A7", "v"), ("#56B4E9", "P"),
    ("#8C564B", "X"), ("#000000", "<"), ("#7F7F7F", "*"),
)  # fmt: skip
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
SIZE, TALL, DPI = (8.4, 5.0), (10.0, 8.5), 100
PANELS, PANEL_SIZE = 3, (2.8, 2.7)  # of whole models: in a row, and of each
BATCHES = ("#009E73", "#E69F00", "#CC79A7", "#56B4E9")
MIB = tuple(2.0**power for power in range(-4, 16))
TOKENS = tuple(2.0**power for power in range(24))
MILLIS = tuple(first * 10.0**power for power in range(4) for first in (1, 2, 5))
MICROS = tuple(first * 10.0**power for power in range(-1, 5) for first in (1, 2, 5))

Points = Iterable[tuple[float, float]]
Numbers = Mapping[tuple[tuple[object, ...], str], float | None]  # ms by place and way
Picture = Callable[[Axes, Sequence[Row]], None]


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
    for ending, title, pictures, rows in (
        ("", "Decode step, cold cache", [latency], record.rows),
        ("-context", "Decode step of one sequence, cold cache", [context], alone),
        ("-bandwidth", "Reading the cache in a decode step", [bandwidth], record.rows),
        ("-ratios", "Decode step, cold cache, point by point", [ratios, shares], record.rows),
    ):
        if rows:
            about = f"float16, {record.run.get('gpu', UNKNOWN)}, {record.run.get('date', UNKNOWN)}"
            name, title = base + ending, f"{title}\n{about}"
            files[f"{name}.svg"], files[f"{name}.png"] = _drawn(title, pictures, rows)
    return files


def draw_models(rows: Sequence[Step], run: Mapping[str, str], base: str) -> dict[str, str | bytes]:
    """Steps of whole models that are captured into CUDA graphs, a panel for each model.

    Args:
        rows: What `end_to_end` measured.
        run: What they depend on.
        base: Name of the picture without its suffix.

    Returns:
        Files by name; none if there is nothing to draw.
    """
    ours = [row for row in rows if row.way == "ours-graph" and row.ms_per_step]
    models = list(dict.fromkeys(row.model for row in ours))
    if not models:
        return {}
    numbers: Numbers = {(row.key[:4], row.way): row.ms_per_step for row in rows}

    def paint(figure: Figure) -> None:
        down = -(-len(models) // PANELS)
        figure.set_size_inches(PANEL_SIZE[0] * PANELS, PANEL_SIZE[1] * down + 0.8)
        panels = figure.subplots(down, PANELS, squeeze=False, sharex=True, sharey=True).flat
        for axes, model in zip_longest(panels, models):
            if model is None:
                axes.axis("off")
            else:
                one_model(axes, [row for row in ours if row.model == model], numbers)
        axes = figure.axes[0]
        dashed = Line2D([], [], color="black", marker="o", linestyle="--", fillstyle="none")
        handles, labels = axes.get_legend_handles_labels()
        labels += ["SDPA (eager where it cannot be SDPA), called where it cannot be captured"]
        figure.legend([*handles, dashed], labels, loc="outside lower center", ncols=2)
        about = f"bfloat16, {run.get('gpu', UNKNOWN)}, {run.get('date', UNKNOWN)}"
        figure.suptitle(f"Whole models, steps captured into a CUDA graph\n{about}")

    text, image = _saved(paint)
    return {f"{base}.svg": text, f"{base}.png": image}


def one_model(axes: Axes, ours: Sequence[Step], numbers: Numbers) -> None:
    """Milliseconds over tokens: a line per batch, solid for ours and dashed for the other."""
    for batch, colour in zip(sorted({row.batch for row in ours}), cycle(BATCHES), strict=False):
        found = sorted((r for r in ours if r.batch == batch), key=lambda row: row.context)
        points = [(float(row.context), float(row.ms_per_step or 0)) for row in found]
        other = [
            (float(row.context), ms) for row in found if (ms := _other(row, numbers)) is not None
        ]
        axes.plot(*_xy(points), color=colour, marker="o", label=f"ours, {batch} at once")
        axes.plot(*_xy(other), color=colour, marker="o", linestyle="--", fillstyle="none")
    axes.set(title=ours[0].model, xscale="log", yscale="log")
    axes.set(xlabel="tokens held", ylabel="ms per step")
    axes.label_outer()
    _ticks(axes.xaxis, TOKENS[10::2])
    _ticks(axes.yaxis, MILLIS)


def _other(row: Step, numbers: Numbers) -> float | None:
    """What the reference takes, captured as well if it can be."""
    way = same_form(row)
    captured, called = (numbers.get((row.key[:4], w)) for w in (way, way.removesuffix("-graph")))
    return captured or called


def _drawn(title: str, pictures: Sequence[Picture], rows: Sequence[Row]) -> tuple[str, bytes]:
    """One picture, or several beside one another that share their points."""

    def paint(figure: Figure) -> None:
        panels = figure.subplots(1, len(pictures), sharey=True, squeeze=False)[0]
        for axes, picture in zip(panels, pictures, strict=True):
            picture(axes, rows)
        panels[0].set_title(title)
        if len(panels) > 1:
            figure.set_size_inches(TALL)
            marks = {
                str(mark.get_label()): mark
                for axes in panels
                for mark in axes.get_legend_handles_labels()[0]
            }
            figure.legend(handles=marks.values(), loc="outside lower center", ncols=4)

    return _saved(paint)


def _saved(paint: Callable[[Figure], None]) -> tuple[str, bytes]:
    text, image = io.StringIO(), io.BytesIO()
    with matplotlib.style.context(["default", STYLE]):
        figure = Figure(figsize=SIZE, layout="constrained")
        paint(figure)
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


def ratios(axes: Axes, rows: Sequence[Row]) -> None:
    """A line of marks per point: every baseline's time over ours, which is 1."""
    labels = dict.fromkeys(str(baseline) for row in rows for baseline in row.all_baselines)
    hollow = {str(b) for row in rows for b in row.all_baselines if not b.measured}
    axes.axvline(1, color=OURS)
    axes.plot(*_xy((1, at) for at, _ in enumerate(rows)), "o", color=OURS, label=OURS_LABEL)
    for label, (colour, mark) in zip(sorted(labels), cycle(BASELINES), strict=False):
        found = [
            (baseline.micros / row.ours, at)
            for at, row in enumerate(rows)
            for baseline in row.all_baselines
            if str(baseline) == label
        ]
        fill = "none" if label in hollow else "full"
        axes.plot(*_xy(found), mark, color=colour, fillstyle=fill, label=label)
    axes.set(xlabel="time over ours")
    _by_point(axes, rows)


def shares(axes: Axes, rows: Sequence[Row]) -> None:
    """Beside `ratios`: the share of the roofline's bandwidth, ours and the best baseline's."""
    ours = [(100 * row.floor / row.ours, at) for at, row in enumerate(rows)]
    best = [
        (100 * row.floor / baseline.micros, at)
        for at, row in enumerate(rows)
        if (baseline := row.best_baseline) is not None
    ]
    axes.axvline(100, color=ROOFLINE, label=ROOFLINE_LABEL)
    axes.plot(*_xy(best), "|", color=ROOFLINE, markersize=9, label=BEST_LABEL)
    axes.plot(*_xy(ours), "o", color=OURS, label=OURS_LABEL)
    axes.set(xlabel="% of the roofline's bandwidth")
    axes.set_xlim(left=0)
    _by_point(axes, rows)


def _by_point(axes: Axes, rows: Sequence[Row]) -> None:
    """Points from the top, by their names."""
    axes.set_yticks(range(len(rows)), [row.point for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)


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
