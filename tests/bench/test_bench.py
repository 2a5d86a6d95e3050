"""The benchmark, as far as it goes without a GPU: baselines that run here, and a run with the
timing replaced."""

from __future__ import annotations

import math
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_fakes import SMALL, SMALL_RAGGED, FakePlan, attend, pool
from torch import Tensor
from torch.nn.attention import SDPBackend

import gqa_cutlass
from bench import baselines, features, measure, merges, prefill, report, timing
from bench import data as bench_data
from bench.data import Data, check
from bench.features import Case
from bench.merges import Merge
from bench.points import RAGGED, Point
from bench.record import Record
from bench.serving_points import LENGTHS, ROOM, Recorded, Serving
from gqa_cutlass.errors import InputError


@pytest.fixture(autouse=True)
def _few_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_data, "MAX_SETS", 2)


# Baselines that run here.


def test_absent_packages_are_no_baselines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines.importlib.util, "find_spec", lambda name: None)
    assert list(baselines.running(SMALL)) == ["SDPA flash", "SDPA cuDNN"]
    assert baselines.running(SMALL_RAGGED) == {}
    assert baselines.missing()["FA3"] == "flash_attn_interface"
    assert set(baselines.missing()) == set(baselines.INSTALLABLE)


def _install(monkeypatch: pytest.MonkeyPatch, name: str, **contents: object) -> None:
    module = types.ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    vars(module).update(contents)
    monkeypatch.setitem(sys.modules, name, module)


class FakeWrapper:
    """What the adapter uses of FlashInfer: attends pages by their tables."""

    def __init__(self, workspace: Tensor, layout: str, *, use_tensor_cores: bool) -> None:
        assert layout == "NHD" and use_tensor_cores

    def plan(
        self, indptr: Tensor, indices: Tensor, last: Tensor, *heads: int, **kind: torch.dtype
    ) -> None:
        assert heads == (4, 2, 64, 16) and set(kind.values()) == {torch.float16}
        assert {t.dtype for t in (indptr, indices, last)} == {torch.int32}
        starts, ends = indptr[:-1].tolist(), indptr[1:].tolist()
        self.pages = [indices[a:b] for a, b in zip(starts, ends, strict=True)]
        self.attended = [16 * (b - a - 1) for a, b in zip(starts, ends, strict=True)]
        self.attended = [n + m for n, m in zip(self.attended, last.tolist(), strict=True)]

    def run(self, q: Tensor, cache: tuple[Tensor, Tensor]) -> Tensor:
        k, v = ([x[pages].flatten(0, 1) for pages in self.pages] for x in cache)
        parts = zip(q, k, v, self.attended, strict=True)
        return torch.cat([attend(a[None], b[None], c[None], [n]) for a, b, c, n in parts])


def _with_kvcache(
    q: Tensor, k: Tensor, v: Tensor, *, cache_seqlens: Tensor, scheduler_metadata: str = ""
) -> Tensor:
    assert q.shape[1] == 1 and cache_seqlens.dtype == torch.int32
    return attend(q[:, 0], k, v, cache_seqlens.tolist())[:, None]


def _varlen(
    q: Tensor, k: Tensor, v: Tensor, queries: Tensor, rows: Tensor, *most: int, enable_gqa: bool,
    seqused_k: Tensor | None = None,
) -> Tensor:  # fmt: skip
    assert enable_gqa and most == (1, 48) and queries.tolist() == list(range(len(q) + 1))
    caches = (x.view(len(q), 48, *x.shape[1:]) for x in (k, v))
    used = rows.diff() if seqused_k is None else seqused_k
    assert rows.dtype == used.dtype == torch.int32
    return attend(q, *caches, used.tolist())


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins for the packages that are installed nowhere here."""
    _install(monkeypatch, "flashinfer", BatchDecodeWithPagedKVCacheWrapper=FakeWrapper)
    _install(monkeypatch, "torch.nn.attention.varlen", varlen_attn=_varlen)
    _install(monkeypatch, "flash_attn", flash_attn_with_kvcache=_with_kvcache)
    _install(
        monkeypatch, "flash_attn_interface", flash_attn_with_kvcache=_with_kvcache,
        get_scheduler_metadata=lambda *sizes, qkv_dtype: "schedule",
    )  # fmt: skip


@pytest.mark.parametrize("point", [SMALL, SMALL_RAGGED], ids=str)
@pytest.mark.parametrize("name", baselines.INSTALLABLE)
@pytest.mark.usefixtures("packages")
def test_an_installed_baseline_attends_what_ours_does(name: str, point: Point) -> None:
    data = Data(point, pool(point))
    out, _ = check(FakePlan(), data)
    attend = baselines.running(point)[name](data)
    assert bench_data.relative_error(attend(0), out) < 1e-2
    assert bench_data.relative_error(attend(1), out) > 0.1  # another set


# A run whose timing is replaced.


class FakeGraph:
    """Calls everything once."""

    def __init__(self, call: Callable[[int], object], count: int) -> None:
        for i in range(count):
            call(i)


class FakeFloor:
    GRIDS = (1, 2)

    def read(self, part: Tensor, grid: int) -> None:
        assert part.is_contiguous()


def _times(graphs: dict[str, FakeGraph]) -> dict[str, float]:
    known = {
        "ours": 4.0,
        "ours, balanced": 4.5,
        "ours, dependent": 3.25,
        "floor 1": 3.0,
        "floor 2": 3.5,
        "decode": 5.0,
        "with": 4.5,
        "operators": 12.0,
        "plain": 4.0,
        "SDPA flash": 7.0,
    }
    return {name: known.get(name, 6.0) for name in graphs}


def _plan(
    *tensors: Tensor, cache_seqlens: Tensor, ragged: bool, dependent: bool, **features: object
) -> FakePlan:
    if "block_table" in features:
        return FakePagedPlan(features["block_table"])
    told = "".join(name for name in ("max_seqlen", "batch_invariant") if name in features)
    return FakePlan(shape=f"{'spare splits, ' * ragged}{'early' * dependent}{told}")


_SIZES = ("small", 4, 2, 64, 3)
SMALL_SERVING = (
    Serving(
        *_SIZES, 48, name="three lengths", cached=(47, 0, 20), limit=1.0, kind=LENGTHS,
        recorded=Recorded(floor=2.0, micros={"XQA": 5.0}),
    ),
    *(
        Serving(
            *_SIZES, 16 * factor, name=f"16 held{pages}", cached=(15,) * 3, limit=1.0, kind=ROOM,
            held=16, factor=factor, page_size=8 if pages else None,
        )
        for pages in ("", ", pages of 8")
        for factor in (1, 4)
    ),
)  # fmt: skip


class FakePagedPlan(FakePlan):
    """Appends and attends by a table."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = table

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, new_k: Tensor, new_v: Tensor, lengths: Tensor
    ) -> Tensor:
        rows = range(len(lengths))
        for cache, new in ((k, new_k), (v, new_v)):
            for b, n in zip(rows, lengths.tolist(), strict=True):
                cache[self.table[b, n // 8], n % 8] = new[b]
        held = [cache[self.table.long()].flatten(1, 2) for cache in (k, v)]
        return attend(q, *held, (lengths + 1).tolist()).to(q.dtype)


SMALL_MERGE = Merge(parts=2, batch=2, dtype=torch.float32)


def test_a_merge_reads_its_parts_and_writes_its_result_once() -> None:
    """2 x 32 heads of 128 in float32, twice, and once in bfloat16, and three log-sum-exps each."""
    assert SMALL_MERGE.num_bytes == 64 * (2 * 128 * 4 + 128 * 2 + 3 * 4)


@pytest.fixture
def without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces what needs a GPU, and the points by small ones."""
    about = {"gpu": "NVIDIA X1", "date": "2026-01-02"}
    for name, value in {
        "GRID": (SMALL,),
        "PREFILL": (SMALL,),
        "CASES": (Case(feature="none", point=SMALL, options=lambda data: {}, most=1.5),),
        "MERGES": (SMALL_MERGE,),
        "RAGGED": (SMALL_RAGGED,),
        "Floor": FakeFloor,
        "random_pool": lambda num_bytes: torch.randn(num_bytes // 2, dtype=torch.float16),
        "SERVING": SMALL_SERVING,
        "host_costs": lambda: {"plan": 7.0, "gqa_decode": 15.0},
        "provenance": lambda: about,
        "ask_gpu": lambda fields: "1 MHz",
        "source_digest": lambda config: "0" * 16,
    }.items():
        monkeypatch.setattr(measure, name, value)
    for module in (prefill, features, merges, timing):
        monkeypatch.setattr(module, "interleaved", _times)
    monkeypatch.setattr(merges, "_DEVICE", "cpu")
    for module in (prefill, features, merges, timing):
        monkeypatch.setattr(module, "Graph", FakeGraph)
    monkeypatch.setattr(prefill, "SDPA", dict.fromkeys(baselines.SDPA, SDPBackend.MATH))
    monkeypatch.setattr(gqa_cutlass, "plan", _plan)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1 << 40, 1 << 40))


@pytest.mark.usefixtures("without_gpu", "packages")
def test_a_run_writes_what_it_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines, "scaled", lambda point, floor: {"XQA": floor, "FA3": 1.0})
    record, path = measure.run("", tmp_path / "new", "c0ffee")
    assert path == tmp_path / "new" / "nvidia-x1.json"
    assert Record.load(path) == record
    (row,), (ragged,) = record.rows, record.ragged
    assert (row.point, row.ours, row.floor) == ("small 4/2/64 3x48", 4.0, 3.0)
    assert (row.balanced, row.dependent, row.in_a_chain) == (4.5, 3.25, 3.25)
    assert (ragged.ours, ragged.balanced, ragged.dependent) == (4.0, None, 3.25)
    assert row.measured.keys() >= {"FlashInfer", "FA3", "FA2"}
    assert row.recorded_scaled == {"XQA": 3.0, "FA3": 1.0}
    assert (
        str(row.best_baseline) == "XQA (recorded)"
    )  # FA3 was measured, so its record is no baseline
    assert ragged.point == "small 4/2/64 3x48 ragged three lengths" and ragged.limit == 1.5
    assert not any(name.startswith("SDPA") for name in ragged.measured)
    assert record.host == {"plan": 7.0, "gqa_decode": 15.0}
    (featured,) = record.features
    assert (featured.feature, featured.ours, featured.plain, featured.limit) == ("none", 4.5, 4, 6)
    (merged,) = record.merges
    assert (merged.merge, merged.ours, merged.floor) == (str(SMALL_MERGE), 4.0, 3.0)
    assert (merged.operators, merged.limit, round(merged.over_floor, 2)) == (12.0, 1.2, 1.33)
    assert 0 < merged.relative_error < 1e-2
    first, *rooms = record.serving
    assert (first.point, first.ours, first.floor) == (str(SMALL_SERVING[0]), 4.0, 3.0)
    assert (first.limit, first.best_recorded, first.met) == (5.5, 2.5, True)
    assert first.told == {"equal": 6.0, "longest": 6.0, "invariant": 6.0}
    assert first.measured.keys() == set(baselines.INSTALLABLE)
    assert [row.point for row in rooms] == [str(point) for point in SMALL_SERVING[1:]]
    assert [row.limit for row in rooms] == [4.3] * 4
    (prompts,) = record.prefill
    assert (prompts.point, prompts.decode) == ("small 4/2/64 3x48", 5.0)
    assert prompts.measured == {"SDPA flash": 7.0, "SDPA cuDNN": 6.0}
    assert (record.run["clocks"], record.run["commit"]) == ("1 MHz", "c0ffee")
    report.show(record)


@pytest.mark.parametrize(
    ("part", "prompts"), [("measure_prefill", 0), ("host_costs", 1)], ids=["prompts", "host"]
)
@pytest.mark.usefixtures("without_gpu")
def test_a_run_cut_short_leaves_what_it_had(
    part: str, prompts: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut_short(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(measure, part, cut_short)
    with pytest.raises(KeyboardInterrupt):
        measure.run("", tmp_path, "c0ffee")
    record = Record.load(tmp_path / "nvidia-x1.json")
    assert (len(record.rows), len(record.ragged), len(record.prefill)) == (1, 1, prompts)


@pytest.mark.usefixtures("without_gpu")
def test_only_chosen_points_have_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "PREFILL", ())
    record, _ = measure.run("", tmp_path, "c0ffee")
    assert len(record.rows) == 1 and record.prefill == []


@pytest.mark.usefixtures("without_gpu")
def test_a_part_is_measured_alone(tmp_path: Path) -> None:
    record, _ = measure.run("", tmp_path, "c0ffee", ["serving"])
    assert len(record.serving) == len(SMALL_SERVING)
    assert replace(record, serving=[]) == Record(run=record.run, rows=[])


@pytest.mark.usefixtures("without_gpu")
def test_a_run_of_no_point_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--points: got 'large'"):
        measure.run("large", tmp_path, "c0ffee")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("without_gpu", "packages")
def test_a_failing_baseline_says_why_and_is_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def broken(*args: Any, **kwargs: Any) -> Tensor:
        raise TypeError("no such argument\nand more")

    def wrong(q: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return torch.zeros_like(q)

    _install(monkeypatch, "flashinfer", BatchDecodeWithPagedKVCacheWrapper=broken)
    _install(monkeypatch, "torch.nn.attention.varlen", varlen_attn=_varlen)
    _install(monkeypatch, "flash_attn", flash_attn_with_kvcache=wrong)
    record, _ = measure.run("ragged", tmp_path, "c0ffee")
    assert record.prefill == [] and record.rows == []
    assert record.ragged[0].measured.keys() == {"FA3", "torch varlen"}
    said = capsys.readouterr().err
    assert f"FlashInfer left out at {SMALL_RAGGED}: no such argument\n" in said
    assert f"FA2 left out at {SMALL_RAGGED}: relative error 1.0" in said
    report.show(record)


@pytest.mark.usefixtures("without_gpu")
def test_a_baseline_that_is_not_installed_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(baselines, "missing", lambda: {"FA3": "flash_attn_interface"})
    record, _ = measure.run("ragged", tmp_path, "c0ffee")
    assert "FA3" not in record.ragged[0].measured
    said = capsys.readouterr().err
    assert said.count("bench: FA3 left out: no module flash_attn_interface here\n") == 1


@pytest.mark.parametrize("error", [0.5, math.nan])
def test_a_contender_that_is_wrong_is_left_out(
    error: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(timing, "Graph", FakeGraph)
    contenders = {name: lambda: lambda i: torch.tensor(i) for name in ("right", "wrong")}
    errors = iter((0.001, error))
    graphs = timing.agreeing(SMALL, contenders, lambda out: next(errors), num_sets=1)
    assert list(graphs) == ["right"]
    assert f"wrong left out at {SMALL}: relative error {error}\n" in capsys.readouterr().err


def test_points_that_do_not_fit_are_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    assert measure.fitting(RAGGED, free=1) == []
    assert capsys.readouterr().err.count("left out: needs") == len(RAGGED)


def test_contenders_take_turns_over_an_evicted_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []

    class Contender:
        def __init__(self, name: str, times: list[float]) -> None:
            self.name, self.times = name, iter(times)

        def micros_per_call(self) -> float:
            events.append(self.name)
            return next(self.times)

    turns = timing.WARM_UP + timing.ROUNDS
    slow_start = [100.0] * timing.WARM_UP + [3.0] * (timing.ROUNDS - 1) + [50.0]
    monkeypatch.setattr(timing, "evict", lambda: events.append("evict"))
    graphs: Any = {"a": Contender("a", slow_start), "b": Contender("b", [7.0] * turns)}
    assert timing.interleaved(graphs) == {"a": 3.0, "b": 7.0}
    assert events == ["evict", "a", "evict", "b"] * turns
