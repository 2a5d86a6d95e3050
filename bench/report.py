"""A run's tables, for a terminal and for docs/benchmark.md."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Collection, Iterable, Mapping

from bench.baselines import SDPA
from bench.record import Baseline, Featured, Merged, Prefill, Record, Row, Served
from bench.recorded_features import FP8_HEADER, PAGES_HEADER, fp8_cells, pages_cells
from gqa_cutlass.cli.output import print_table, say, say_labelled
from gqa_cutlass.cli.table import Column

HOST_TARGETS = {"plan, out given": 8.0, "plan": 8.0, "gqa_decode": 14.0}
ABSENT = "-"
_NAMES = ("point", "feature", "parts", "call", "met", "which is")  # heads of columns

_GRID_HEADER = (
    "model, heads (q/kv/dim)", "sequences × tokens", "KV MiB", "roofline", "ours", "as dependents",
    "per token", "GB/s",
)  # fmt: skip
_GRID_RATIOS = (
    "against the better SDPA", "share of the roofline's bandwidth",
    "against the best of all baselines", "baseline",
)  # fmt: skip
_RAGGED_HEADER = (
    "model, heads (q/kv/dim)", "sequences × room", "lengths", "MiB read", "roofline", "ours",
)  # fmt: skip
_PREFILL_HEADER = (
    "model, heads (q/kv/dim)", "sequences × tokens", "decode step", "per new token",
    *(f"prefill, {name}" for name in SDPA), "per prompt token", "prefill over decode",
)  # fmt: skip

_FEATURES_HEADER = (
    "model, heads (q/kv/dim)", "sequences × tokens", "feature", "MiB read", "plain step",
    "with the feature", "over the plain step", "target",
)  # fmt: skip
_MERGES_HEADER = (
    "parts", "MiB read and written", "floor", "ours", "over the floor", "target",
    "PyTorch's operators",
)  # fmt: skip
_SERVING_HEADER = (
    "model, heads (q/kv/dim)", "sequences × room", "held", "MiB read", "floor", "ours",
    "over the floor", "target", "told that lengths are equal", "told the longest",
    "batch-invariant", "best recorded, over its floor",
)  # fmt: skip
_TOLD = "equal", "longest", "invariant"


def show(record: Record) -> None:
    """Print everything, as wide as the terminal."""
    say_labelled(", ".join(f"{key}: {value}" for key, value in record.run.items()), 0)
    if record.rows:
        _show_grid(record.rows)
        say("")
    say_labelled("\n".join(summary(record.rows)), 0)
    if record.ragged:
        _show_ragged(record.ragged)
    if record.prefill:
        _show_prefill(record.prefill)
    if record.features:
        _show_features(record.features)
    if record.merges:
        _show_merges(record.merges)
    if record.serving:
        _show_serving(record.serving)
    if record.host:
        _show_host(record.host)


def _columns(
    *heads: str, first_to_go: Collection[str] = (), then: Collection[str] = ()
) -> list[Column]:
    """Columns of numbers, but for those that have names in them."""
    return [
        Column(
            head=head,
            number=head not in _NAMES,
            keep=0 if head in first_to_go else 1 if head in then else None,
        )
        for head in heads
    ]


def _show_grid(rows: list[Row]) -> None:
    names = _measured_in(rows)
    columns = _columns(
        "point", "MiB", "roofline", "ours", "balanced", "dependent", "per token", "GB/s", *names,
        "of roofline", "to flash", "to best SDPA", "to best of all", "which is",
        first_to_go=("which is", "balanced", "per token", *names),
        then=("MiB", "dependent", "to flash", "to best of all"),
    )  # fmt: skip
    cells = [
        [
            row.point, f"{row.mib:.1f}", f"{row.floor:.2f}", f"{row.ours:.2f}",
            _micro(row.balanced), _micro(row.dependent), f"{row.per_token:.2f}", _bandwidth(row),
            *_micros(row.measured, names), _share(row), _times(row, _baseline(row, "SDPA flash")),
            _times(row, row.best_sdpa), _times(row, row.best_baseline),
            str(row.best_baseline or ABSENT),
        ]
        for row in rows
    ]  # fmt: skip
    print_table(columns, cells, "us per call on the grid; GB/s of K and V read")


def _measured_in(rows: Iterable[Row], first: Iterable[str] = SDPA) -> list[str]:
    """Baselines that have a column: some always, and what else was measured."""
    return list(dict.fromkeys((*first, *(name for row in rows for name in row.measured))))


def _show_ragged(rows: list[Row]) -> None:
    names = _measured_in(rows, ())
    columns = _columns(
        "point", "MiB read", "roofline", "ours", "per token", "GB/s", *names, "over roofline",
        "target", "met", first_to_go=("MiB read", "per token", *names), then=("GB/s", "roofline"),
    )  # fmt: skip
    cells = [
        [
            row.point, f"{row.mib:.1f}", f"{row.floor:.2f}", f"{row.ours:.2f}",
            f"{row.per_token:.2f}", _bandwidth(row), *_micros(row.measured, names),
            f"{row.ours / row.floor:.2f}x", _limit(row),
            _met(row.limit is None or row.ours <= row.limit * row.floor),
        ]
        for row in rows
    ]  # fmt: skip
    print_table(columns, cells, "us per call, sequences of different lengths")


def _show_prefill(rows: list[Prefill]) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row.measured))
    columns = _columns(
        "point", "decode", "per new token", *(f"prefill, {name}" for name in names),
        "per prompt token", "prefill over decode", first_to_go=("per new token",),
        then=("per prompt token",),
    )  # fmt: skip
    cells = [
        [
            row.point, f"{row.decode:.2f}", f"{row.per_token:.2f}", *_micros(row.measured, names),
            f"{row.per_prompt_token:.4f}", f"{row.ratio:.1f}x",
        ]
        for row in rows
    ]  # fmt: skip
    print_table(columns, cells, "us per call of a decode step, and of attending whole prompts")


def _show_features(rows: list[Featured]) -> None:
    columns = _columns(
        "point", "feature", "MiB read", "plain", "with it", "over plain", "target", "met",
        first_to_go=("MiB read",), then=("plain", "target"),
    )  # fmt: skip
    cells = [
        [
            row.point, row.feature, f"{row.mib:.1f}", f"{row.plain:.2f}", f"{row.ours:.2f}",
            f"{row.ours / row.plain:.2f}x", f"{row.limit:.2f}", _met(row.ours <= row.limit),
        ]
        for row in rows
    ]  # fmt: skip
    title = "us per call of steps with features, and of the plain step over what they see"
    print_table(columns, cells, title)


def _show_merges(rows: list[Merged]) -> None:
    columns = _columns(
        "parts", "MiB", "floor", "ours", "over floor", "target", "met", "PyTorch's operators",
        first_to_go=("MiB",), then=("PyTorch's operators",),
    )  # fmt: skip
    cells = [
        [
            row.merge, f"{row.mib:.1f}", f"{row.floor:.2f}", f"{row.ours:.2f}",
            f"{row.over_floor:.2f}x", f"{row.limit:.2f}x", _met(row.over_floor <= row.limit),
            f"{row.operators:.2f}",
        ]
        for row in rows
    ]  # fmt: skip
    title = "us per call of merge_states, and of reading as many bytes as it reads and writes"
    print_table(columns, cells, title)


def _show_serving(rows: list[Served]) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row.measured))
    columns = _columns(
        "point", "MiB read", "floor", "ours", *_TOLD, *names, "over floor", "target", "met",
        "best recorded", first_to_go=("MiB read", "best recorded", *_TOLD, *names),
        then=("floor",),
    )  # fmt: skip
    cells = [
        [
            row.point, f"{row.mib:.1f}", f"{row.floor:.2f}", f"{row.ours:.2f}",
            *_micros(row.told, _TOLD), *_micros(row.measured, names), f"{row.over_floor:.2f}x",
            _micro(row.limit), _met(row.met), _over(row.best_recorded),
        ]
        for row in rows
    ]  # fmt: skip
    print_table(columns, cells, "us per call as servers run it: lengths differ, and room for more")
    say_labelled("\n".join(serving_summary(rows)), 0)


def _over(ratio: float | None, sign: str = "x") -> str:
    return ABSENT if ratio is None else f"{ratio:.2f}{sign}"


def serving_summary(rows: list[Served]) -> list[str]:
    """Per kind of points, geometric mean and worst of ours over the floor, and targets met."""
    lines = []
    for kind in dict.fromkeys(row.kind for row in rows):
        of_kind = [row for row in rows if row.kind == kind]
        worst = max(of_kind, key=lambda row: row.over_floor)
        lines.append(
            f"serving, {kind}: {_mean(row.over_floor for row in of_kind):.2f}x the floor, at worst "
            f"{worst.over_floor:.2f}x ({worst.point}); {sum(row.met for row in of_kind)} of "
            f"{len(of_kind)} points meet their target"
        )
        for name in _TOLD:
            told = [row.ours / row.told[name] for row in of_kind if name in row.told]
            if told:
                lines.append(
                    f"serving, {kind}: ours over the same told {name}: {_mean(told):.2f}x, "
                    f"{min(told):.2f}x to {max(told):.2f}x, at {len(told)} points"
                )
    return lines


def _show_host(costs: dict[str, float]) -> None:
    cells = [
        [
            name, f"{micros:.2f}", _host_target(name),
            ABSENT if name not in HOST_TARGETS else _met(micros <= HOST_TARGETS[name]),
        ]
        for name, micros in costs.items()
    ]  # fmt: skip
    print_table(_columns("call", "us", "target", "met"), cells, "us of host time per call")


def _host_target(name: str) -> str:
    return f"{HOST_TARGETS[name]:g}" if name in HOST_TARGETS else ABSENT


def _met(target_met: bool) -> str:
    return "yes" if target_met else "no"


def summary(rows: list[Row]) -> list[str]:
    """Geometric means and worst points, and how well scaled records agree with measurements."""
    against = {
        "SDPA flash": [(row, _baseline(row, "SDPA flash")) for row in rows],
        "the best SDPA backend": [(row, row.best_sdpa) for row in rows],
        "the best of all baselines": [(row, row.best_baseline) for row in rows],
        "the best of all baselines as shipped": [(row, row.best_shipped_baseline) for row in rows],
    }
    launched: dict[str, Callable[[Row], float]] = {"": lambda row: row.ours}
    if any(row.dependent is not None for row in rows):
        launched["as dependents, "] = lambda row: row.in_a_chain
    lines = [
        f"{how}against {name}: {_summed(found, micros)}"
        for how, micros in launched.items()
        for name, pairs in against.items()
        if (found := [(row, baseline) for row, baseline in pairs if baseline is not None])
    ]
    drifts = [
        row.recorded_scaled[name] / micros
        for row in rows
        for name, micros in row.measured.items()
        if name in row.recorded_scaled
    ]
    if drifts:
        lines.append(
            f"records of baselines that were measured too, scaled, are {min(drifts):.2f} to "
            f"{max(drifts):.2f} of what was measured, geometric mean {_mean(drifts):.2f}"
        )
    return lines


def _summed(pairs: list[tuple[Row, Baseline]], micros: Callable[[Row], float]) -> str:
    ratios = [(baseline.micros / micros(row), row.point, str(baseline)) for row, baseline in pairs]
    worst, point, baseline = min(ratios)
    slower = sum(ratio < 1 for ratio, *_ in ratios)
    return (
        f"geometric mean {_mean(r for r, *_ in ratios):.2f}x, worst {worst:.2f}x "
        f"({point}, {baseline}), slower at {slower} of {len(ratios)} points"
    )


def markdown(record: Record) -> str:
    """The tables of docs/benchmark.md, and the figures of its sentences."""
    names = _measured_in(record.rows)
    header = (*_GRID_HEADER, *names, *_GRID_RATIOS)
    tables = [_markdown_table(header, [_grid_cells(row, names) for row in record.rows])]
    if record.ragged:
        names = _measured_in(record.ragged, ())
        header = (*_RAGGED_HEADER, *names, "over the roofline", "target")
        cells = [_ragged_cells(row, names) for row in record.ragged]
        tables.append(_markdown_table(header, cells))
    if record.prefill:
        tables.append(_markdown_table(_PREFILL_HEADER, map(_prefill_cells, record.prefill)))
    if record.features:
        tables.append(_markdown_table(_FEATURES_HEADER, map(_features_cells, record.features)))
    for header, beside in ((PAGES_HEADER, pages_cells), (FP8_HEADER, fp8_cells)):
        if cells := beside(record.features):
            tables.append(_markdown_table(header, cells))
    if record.merges:
        tables.append(_markdown_table(_MERGES_HEADER, map(_merges_cells, record.merges)))
    if record.serving:
        tables.append(_markdown_table(_SERVING_HEADER, map(_serving_cells, record.serving)))
    if record.host:
        cells = [[n, _short(t), _host_target(n)] for n, t in record.host.items()]
        tables.append(_markdown_table(("call", "µs of host time", "target"), cells))
    sentences = [*summary(record.rows), *serving_summary(record.serving)]
    return "\n\n".join([*tables, "\n".join(sentences)])


def _markdown_table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    titles = list(header)
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _grid_cells(row: Row, names: Iterable[str]) -> list[str]:
    return [
        *row.label.cells, f"{row.mib:g}", f"{row.floor:.1f}", f"**{row.ours:.1f}**",
        _micro(row.dependent, digits=1), _short(row.per_token), _bandwidth(row),
        *_micros(row.measured, names, digits=1), _times(row, row.best_sdpa, "×"), _share(row),
        _times(row, row.best_baseline, "×"), str(row.best_baseline or ABSENT),
    ]  # fmt: skip


def _ragged_cells(row: Row, names: Iterable[str]) -> list[str]:
    return [
        *row.label.cells, row.label.lengths or ABSENT, f"{row.mib:.0f}", f"{row.floor:.1f}",
        f"**{row.ours:.1f}**", *_micros(row.measured, names, digits=1),
        f"{row.ours / row.floor:.2f}×", _limit(row, "×"),
    ]  # fmt: skip


def _prefill_cells(row: Prefill) -> list[str]:
    return [
        *row.label.cells, f"**{row.decode:.1f}**", _short(row.per_token),
        *_micros(row.measured, SDPA, digits=1), f"{row.per_prompt_token:.3f}", f"{row.ratio:.1f}×",
    ]  # fmt: skip


def _features_cells(row: Featured) -> list[str]:
    return [
        *row.label.cells, row.feature, f"{row.mib:g}", f"{row.plain:.1f}", f"**{row.ours:.1f}**",
        f"{row.ours / row.plain:.2f}×", f"{row.limit:.1f}",
    ]  # fmt: skip


def _merges_cells(row: Merged) -> list[str]:
    return [
        row.merge, f"{row.mib:.1f}", f"{row.floor:.1f}", f"**{row.ours:.1f}**",
        f"{row.over_floor:.2f}×", f"{row.limit:.1f}×", f"{row.operators:.1f}",
    ]  # fmt: skip


def _serving_cells(row: Served) -> list[str]:
    return [
        *row.label.cells, row.label.lengths or ABSENT, f"{row.mib:.1f}", f"{row.floor:.1f}",
        f"**{row.ours:.1f}**", f"{row.over_floor:.2f}×", _micro(row.limit, 1),
        *_micros(row.told, _TOLD, 1), _over(row.best_recorded, "×"),
    ]  # fmt: skip


def _bandwidth(row: Row) -> str:
    return f"{row.bandwidth(row.ours):.0f}"


def _micros(measured: Mapping[str, float], names: Iterable[str], digits: int = 2) -> list[str]:
    return [_micro(measured.get(name), digits) for name in names]


def _micro(micros: float | None, digits: int = 2) -> str:
    return ABSENT if micros is None else f"{micros:.{digits}f}"


def _short(micros: float) -> str:
    return f"{micros:.1f}" if micros >= 1 else f"{micros:.2f}"


def _baseline(row: Row, name: str) -> Baseline | None:
    if name not in row.measured:
        return None
    return Baseline(name=name, micros=row.measured[name], measured=True)


def _times(row: Row, baseline: Baseline | None, sign: str = "x") -> str:
    return ABSENT if baseline is None else f"{baseline.micros / row.ours:.2f}{sign}"


def _share(row: Row) -> str:
    return f"{row.floor / row.ours:.0%}"


def _limit(row: Row, sign: str = "x") -> str:
    return ABSENT if row.limit is None else f"{row.limit:.2f}{sign}"


def _mean(ratios: Iterable[float]) -> float:
    return statistics.geometric_mean(ratios)
