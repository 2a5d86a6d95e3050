"""The benchmark's pictures, read back from their SVG and from matplotlib's own objects."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from dataclasses import replace

import matplotlib
import pytest
from bench_fakes import full_record, row_of
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench import plot
from bench.checkout import RESULTS
from bench.e2e_record import Row as Step
from bench.points import GRID
from bench.record import Record, Row

pytestmark = pytest.mark.xdist_group("pictures")  # drawn once

SVG = "{http://www.w3.org/2000/svg}"
ENDINGS = ("", "-context", "-bandwidth", "-ratios")
MOST_BYTES = 250_000  # in the repository, and in every clone of it


@pytest.fixture(scope="module")
def full() -> Record:
    return full_record()


@pytest.fixture(scope="module")
def drawn(full: Record) -> dict[str, str | bytes]:
    """The pictures of a record, called x."""
    return plot.draw(full, "x")


@pytest.fixture(scope="module")
def drawn_again(full: Record) -> dict[str, str | bytes]:
    """The same, drawn by a user with other settings."""
    with matplotlib.rc_context({"font.size": 20, "svg.fonttype": "path"}):
        return plot.draw(full, "x")


@pytest.fixture
def axes() -> Axes:
    return Figure().subplots()


def _points(axes: Axes) -> dict[str, list[tuple[float, float]]]:
    """What is drawn, by label."""
    return {str(line.get_label()): [tuple(xy) for xy in line.get_xydata()] for line in axes.lines}


def _row(name: str, rows: list[Row]) -> Row:
    (found,) = (row for row in rows if row.point == name)
    return found


def _texts(picture: str | bytes) -> list[str | None]:
    """What is written in a picture."""
    return [text.text for text in ET.fromstring(picture).iter(f"{SVG}text")]


def test_pictures_are_svg_and_png(drawn: dict[str, str | bytes]) -> None:
    assert list(drawn) == [f"x{ending}.{kind}" for ending in ENDINGS for kind in ("svg", "png")]
    for name, content in drawn.items():
        start = "<?xml" if name.endswith(".svg") else b"\x89PNG"
        assert content[: len(start)] == start and len(content) < MOST_BYTES


@pytest.mark.parametrize("ending", ENDINGS)
def test_pictures_repeat_and_carry_no_date(
    drawn: dict[str, str | bytes], drawn_again: dict[str, str | bytes], ending: str
) -> None:
    first = str(drawn[f"x{ending}.svg"])
    assert first == drawn_again[f"x{ending}.svg"]
    assert "dc:date" not in first and "Matplotlib" not in first
    assert not any(line.endswith(" ") for line in first.splitlines())


@pytest.mark.parametrize("ending", ENDINGS)
def test_pictures_name_gpu_and_date(drawn: dict[str, str | bytes], ending: str) -> None:
    texts = _texts(drawn[f"x{ending}.svg"])
    assert "float16, NVIDIA <X1>, 2026-01-02" in texts
    others = {"SDPA flash", "SDPA cuDNN"} if ending == "-ratios" else {"best SDPA backend"}
    assert {"ours, append included"} | others <= set(texts)


@pytest.mark.parametrize("ending", ENDINGS)
def test_the_shipped_pictures_are_those_of_the_shipped_record(ending: str) -> None:
    run = Record.load(RESULTS / "nvidia-h200.json").run
    texts = [t.text for t in ET.parse(RESULTS / f"nvidia-h200{ending}.svg").iter(f"{SVG}text")]
    assert f"float16, {run['gpu']}, {run['date']}" in texts
    assert (RESULTS / f"nvidia-h200{ending}.png").stat().st_size < MOST_BYTES


def test_latency_is_drawn_over_bytes(full: Record, axes: Axes) -> None:
    plot.latency(axes, full.rows)
    drawn = _points(axes)
    assert sorted(drawn[plot.OURS_LABEL]) == sorted((r.mib, r.ours) for r in full.rows)
    assert sorted(drawn[plot.SDPA_LABEL]) == sorted(
        (r.mib, r.measured["SDPA cuDNN"]) for r in full.rows
    )
    sizes = sorted({point.read_bytes / 2**20 for point in GRID})
    assert [mib for mib, _ in drawn[plot.ROOFLINE_LABEL]] == sizes
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("MiB of K and V read", "µs per call")


def test_of_the_floors_of_a_size_the_lowest_is_drawn(full: Record, axes: Axes) -> None:
    lower = [replace(row, floor=row.floor / 2) for row in full.rows[:1]]
    plot.latency(axes, full.rows + lower)
    assert _points(axes)[plot.ROOFLINE_LABEL][0] == (lower[0].mib, lower[0].floor)


def test_bandwidth_is_drawn_over_bytes(full: Record, axes: Axes) -> None:
    plot.bandwidth(axes, full.rows)
    drawn = _points(axes)
    row = _row("llama3-8b 32/8/128 8x1024", full.rows)  # 32 MiB; floor 10, ours 12.5, SDPA 20 us
    for label, micros in (
        (plot.ROOFLINE_LABEL, 10),
        (plot.OURS_LABEL, 12.5),
        (plot.SDPA_LABEL, 20),
    ):
        of_size = [rate for mib, rate in drawn[label] if mib == row.mib]
        assert of_size == pytest.approx([(32 << 20) / micros / 1e3] * len(of_size)) and of_size
    assert (axes.get_xscale(), axes.get_yscale(), axes.get_ylim()[0]) == ("log", "linear", 0)


def test_context_is_drawn_per_model(full: Record, axes: Axes) -> None:
    alone = [row for row in full.rows if row.label.batch == 1]
    plot.context(axes, alone)
    models = list(dict.fromkeys(row.label.heads for row in alone))
    ours, sdpa = axes.lines[::2], axes.lines[1::2]
    assert [line.get_label() for line in ours] == models
    assert {line.get_linestyle() for line in ours} == {"-"}
    assert {line.get_linestyle() for line in sdpa} == {"--"}
    assert len({(line.get_color(), line.get_marker()) for line in ours}) == len(models)
    assert ours[0].get_xdata().tolist() == [128, 1024, 4096, 16384, 131072]
    assert ours[0].get_ydata().tolist() == [
        _row(f"llama3-8b 32/8/128 1x{tokens}", full.rows).ours
        for tokens in (128, 1024, 4096, 16384, 131072)
    ]
    for solid, dashed in zip(ours, sdpa, strict=True):
        assert solid.get_color() == dashed.get_color()
        assert (dashed.get_ydata() / solid.get_ydata()).tolist() == pytest.approx(
            [1.6] * len(solid.get_xdata())
        )


def test_every_baseline_is_drawn_over_ours(full: Record, axes: Axes) -> None:
    """Of a point measured in 12.5 us: 20 and 30 by SDPA, 17.5 as recorded of TileOPs."""
    plot.ratios(axes, full.rows)
    drawn = _points(axes)
    expected = {"SDPA cuDNN": 1.6, "SDPA flash": 2.4, "TileOPs (recorded)": 1.4}
    for label, ratio in (expected | {plot.OURS_LABEL: 1.0}).items():
        assert [at for _, at in drawn.pop(label)] == list(range(len(full.rows)))
        (line,) = (line for line in axes.lines if line.get_label() == label)
        assert line.get_xdata() == pytest.approx(ratio)
        assert line.get_fillstyle() == ("none" if label.endswith("(recorded)") else "full")
    assert not [label for label in drawn if not label.startswith("_")]
    assert axes.get_xscale() == "linear"


def test_shares_of_the_roofline_are_drawn_point_by_point(full: Record, axes: Axes) -> None:
    rows = [*full.rows[:-1], row_of(GRID[-1], measured={}, recorded_scaled={})]
    plot.shares(axes, rows)
    drawn = _points(axes)
    assert drawn[plot.OURS_LABEL] == [(pytest.approx(80), at) for at in range(len(rows))]
    best = [(pytest.approx(100 / 1.75), at) for at in range(len(rows) - 1)]
    assert drawn[plot.BEST_LABEL] == best
    assert [text.get_text() for text in axes.get_yticklabels()] == [row.point for row in rows]
    assert axes.yaxis_inverted()


def test_only_single_sequences_are_drawn_over_context(full: Record) -> None:
    batches = [row for row in full.rows if row.label.batch > 1]
    assert set(plot.draw(replace(full, rows=batches), "x")) == {
        "x.svg", "x.png", "x-bandwidth.svg", "x-bandwidth.png", "x-ratios.svg", "x-ratios.png",
    }  # fmt: skip


def test_points_without_sdpa_are_drawn(full: Record) -> None:
    rows = [row_of(GRID[0], measured={}), row_of(GRID[1], measured={"FA3": 3.0})]
    assert len(plot.draw(replace(full, rows=rows), "x")) == 2 * len(ENDINGS)


def test_a_record_without_a_grid_has_no_pictures(full: Record) -> None:
    assert plot.draw(replace(full, rows=[]), "x") == {}


def test_a_gpus_name_is_no_formula(full: Record) -> None:
    run = {"gpu": r"$\frac{$", "date": "2026-01-02"}
    assert r"float16, $\frac{$, 2026-01-02" in _texts(
        plot.draw(replace(full, run=run), "x")["x.svg"]
    )
    unknown = plot.draw(replace(full, run={}), "x")["x.svg"]
    assert "float16, unknown, unknown" in _texts(unknown)


def _step(model: str, way: str, batch: int, context: int, ms: float | None) -> Step:
    return Step(
        model=model, layers=1, batch=batch, context=context, way=way, ms_per_step=ms,
        missing=None if ms else "no time was left",
    )  # fmt: skip


STEPS = [
    *(_step("llama3-8b", way, 8, context, ms * context) for context in (1024, 8192)
      for way, ms in (("ours-graph", 0.001), ("sdpa-graph", 0.004), ("sdpa", 0.1))),
    _step("llama3-8b", "ours-graph", 32, 1024, None),
    _step("gpt-oss-20b", "ours-graph", 1, 1024, 3.0),
    _step("gpt-oss-20b", "eager-graph", 1, 1024, None),
    _step("gpt-oss-20b", "eager", 1, 1024, 30.0),
]  # fmt: skip


def test_whole_models_have_a_panel_each() -> None:
    files = plot.draw_models(STEPS, {"gpu": "NVIDIA H200", "date": "today"}, "models")
    assert files.keys() == {"models.svg", "models.png"}
    texts = _texts(files["models.svg"])
    assert "llama3-8b" in texts and "gpt-oss-20b" in texts and "ours, 32 at once" not in texts
    assert files == plot.draw_models(STEPS, {"gpu": "NVIDIA H200", "date": "today"}, "models")
    assert plot.draw_models(STEPS[-1:], {}, "models") == {}


def test_a_model_is_drawn_beside_its_reference(axes: Axes) -> None:
    numbers: plot.Numbers = {(step.key[:4], step.way): step.ms_per_step for step in STEPS}
    plot.one_model(axes, [STEPS[0], STEPS[3]], numbers)
    ours, other = (line.get_xydata().tolist() for line in axes.lines)
    assert ours == [[1024, 1.024], [8192, 8.192]] and other == [[1024, 4.096], [8192, 32.768]]
    plot.one_model(axes, [STEPS[-3]], numbers)  # eager attention, which no graph could hold
    assert axes.lines[-1].get_xydata().tolist() == [[1024, 30.0]]
