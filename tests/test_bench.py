"""The benchmark, as far as it goes without a GPU: data, tables, the picture, and a run with the
timing replaced."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import types
import xml.etree.ElementTree as ET
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import REPOSITORY
from torch import Tensor

sys.path.insert(0, str(REPOSITORY / "bench"))  # its files import each other as scripts do

import data as bench_data
import peers
import plot
import report
from data import Data, check, num_sets, pool_bytes
from points import GRID, RAGGED, Point, Ragged
from record import Record, Row

import bench

POINTS = {str(point): point for point in (*GRID, *RAGGED)}
SMALL = Point("small", 4, 2, 64, 3, 48)
SMALL_RAGGED = Ragged(
    "small", 4, 2, 64, 3, 48, name="three lengths", cached=(47, 0, 20), limit=1.5
)  # fmt: skip


def _pool(point: Point) -> Tensor:
    return torch.randn(pool_bytes(point) // 2, dtype=torch.float16)


@pytest.fixture(autouse=True)
def _few_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_data, "MAX_SETS", 2)


# What was recorded of the peers.


@pytest.mark.parametrize("point", GRID, ids=str)
def test_peers_are_recorded_for_every_point(point: Point) -> None:
    found = peers.recorded(point)
    assert {"SDPA cuDNN", "FA3", "XQA"} <= found.keys()
    assert ("FlashInfer" in found) == (point.model != "phi3-mini")  # which faults there
    assert all(1 < micros < 1000 for micros in found.values())


def test_the_record_names_no_other_points() -> None:
    record = json.loads((REPOSITORY / "bench" / "peers.json").read_text())
    for run in record["runs"]:
        assert run["micros"].keys() <= {str(point) for point in GRID}
        assert set(run["peers"]) <= record["versions"].keys()
    assert record["runs"][0]["micros"].keys() == {str(point) for point in GRID}
    assert peers.NOT_SHIPPED <= record["versions"].keys()


@pytest.mark.parametrize(
    ("point", "peer", "micros"),
    [
        ("llama3-8b 32/8/128 1x128", "XQA", 4.91),
        ("llama3-8b 32/8/128 1x1024", "SDPA cuDNN", 7.68),
        ("llama3-8b 32/8/128 1x4096", "TileOPs best of 151", 9.2),
        ("llama3-8b 32/8/128 1x16384", "FlashInfer", 28.5),
        ("llama3-8b 32/8/128 1x131072", "TileOPs", 126.5),
        ("llama3-8b 32/8/128 8x1024", "XQA", 14.1),
        ("llama3-8b 32/8/128 8x8192", "SDPA flash", 74.0),
        ("llama3-8b 32/8/128 64x1024", "TileOPs", 69.8),
        ("llama3-8b 32/8/128 64x4096", "FA3", 250.7),
        ("llama3-8b 32/8/128 256x1024", "SDPA flash", 419),
        ("llama3-70b 64/8/128 1x16384", "FA3", 26.9),
        ("llama3-70b 64/8/128 8x8192", "XQA", 70.5),
        ("llama3-70b 64/8/128 256x1024", "FlashInfer", 308),
        ("qwen2.5-7b 28/4/128 1x1024", "TileOPs best of 151", 5.4),
        ("qwen2.5-7b 28/4/128 1x32768", "XQA", 27.5),
        ("qwen2.5-7b 28/4/128 32x4096", "SDPA cuDNN", 66.2),
        ("mha 32/32/128 1x1024", "XQA", 10.3),
        ("mha 32/32/128 16x2048", "FA3", 128.8),
        ("mqa 8/1/128 1x8192", "FlashInfer", 10.6),
        ("mqa 8/1/128 64x8192", "SDPA cuDNN", 70.5),
        ("phi3-mini 32/32/96 1x16384", "SDPA flash", 69.5),
        ("phi3-mini 32/32/96 16x4096", "XQA", 198),
        ("phi3-mini 32/32/96 64x2048", "SDPA cuDNN", 425),
        ("gemma2-9b 16/8/256 1x1024", "XQA", 16.4),
        ("gemma2-9b 16/8/256 16x4096", "SDPA flash", 130),
        ("gemma2-9b 16/8/256 64x2048", "FA3", 255),
        ("qwen2.5-0.5b 14/2/64 1x16384", "XQA", 13.6),
        ("qwen2.5-0.5b 14/2/64 16x4096", "SDPA cuDNN", 14.2),
        ("qwen2.5-0.5b 14/2/64 64x2048", "FlashInfer", 30),
        ("gpt-oss 64/8/64 1x1024", "FA3", 8.4),
        ("gpt-oss 64/8/64 16x4096", "XQA", 36.2),
        ("gpt-oss 64/8/64 64x2048", "SDPA cuDNN", 66.5),
    ],
)
def test_the_record_has_the_noted_figure(point: str, peer: str, micros: float) -> None:
    assert peers.recorded(POINTS[point])[peer] == micros


@pytest.mark.parametrize(
    ("point", "peer"),
    [
        ("llama3-8b 32/8/128 8x8192", "TileOPs"),  # fails inside a graph
        ("llama3-70b 64/8/128 1x1024", "SDPA flash"),
        ("phi3-mini 32/32/96 1x1024", "FlashInfer"),
        ("gpt-oss 64/8/64 1x1024", "TileOPs"),
    ],
)
def test_a_figure_that_was_not_noted_is_left_out(point: str, peer: str) -> None:
    assert peer not in peers.recorded(POINTS[point])


def test_records_are_scaled_by_the_floor_of_their_run() -> None:
    point = POINTS["llama3-8b 32/8/128 1x1024"]
    now = peers.scaled(point, floor=2 * 2.6)
    assert now["FA3"] == pytest.approx(2 * 9.24)
    assert now["TileOPs"] == pytest.approx(6.3 * 2 * 2.6 / 2.8)  # a run whose floor is not known


def test_records_without_a_floor_are_scaled_by_that_of_their_bytes() -> None:
    now = peers.scaled(POINTS["gemma2-9b 16/8/256 64x2048"], floor=120)
    assert now["SDPA flash"] == pytest.approx(244 / 2)


@pytest.mark.parametrize(
    ("mib", "micros"),
    [
        (1, 2.0), (4, 2.8), (64, 17.7), (1024, 240), (4096, 947),
        (math.sqrt(8 * 16), math.sqrt(3.9 * 6.0)), (math.sqrt(512 * 1024), math.sqrt(122 * 240)),
        (0.5, 2.0 * 2.0 / 2.3), (16384, 947 * 947 / 240),
    ],
)  # fmt: skip
def test_floors_between_sizes_follow_powers(mib: float, micros: float) -> None:
    assert peers.floor_by_bytes(round(mib * 2**20)) == pytest.approx(micros, rel=1e-6)


def test_ragged_points_have_no_records() -> None:
    assert all(peers.scaled(point, 1.0) == {} for point in RAGGED)


# Points and their data.


def test_the_ragged_lengths_are_those_of_the_prototype() -> None:
    uniform, first, last = RAGGED  # compared with what its C++ expressions give
    assert uniform.lengths[:5] == (0, 3827, 7654, 3290, 7117)
    assert first.lengths[:5] == (16383, 54, 11, 65, 22)
    assert last.lengths[:5] == (0, 54, 11, 65, 22) and last.lengths[-2:] == (68, 16383)
    assert [len(point.lengths) for point in RAGGED] == [64, 32, 32]
    assert [sum(point.lengths) for point in RAGGED] == [253060, 17753, 17728]
    assert [point.tokens for point in RAGGED] == [8192, 16384, 16384]
    assert [point.limit for point in RAGGED] == [1.03, 1.3, 1.3]


def test_what_is_read_counts_the_new_token_and_no_room() -> None:
    assert SMALL.read_bytes == SMALL.cache_bytes == 3 * 48 * 4 * 2 * 64
    assert SMALL_RAGGED.read_bytes == (48 + 1 + 21) * 4 * 2 * 64
    assert SMALL_RAGGED.cache_bytes == SMALL.cache_bytes


@pytest.mark.parametrize("point", [*GRID, *RAGGED], ids=str)
def test_buffer_sets_exceed_the_cache(point: Point, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_data, "MAX_SETS", 512)
    assert num_sets(point) >= 2
    assert num_sets(point) * point.read_bytes >= 256 << 20
    assert pool_bytes(point) <= 10 << 30


class FakePlan:
    """Appends and attends in float32, or with a fault."""

    def __init__(self, fault: str = "") -> None:
        self.fault = fault
        config = types.SimpleNamespace(name="fake")
        self.dispatch = types.SimpleNamespace(config=config, num_splits=1, shape="a shape")

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, new_k: Tensor, new_v: Tensor, lengths: Tensor
    ) -> Tensor:
        for b, n in enumerate(lengths.tolist()):
            if self.fault != "appends nothing":
                k[b, n], v[b, n] = new_k[b], new_v[b]
            if self.fault == "writes behind":
                v[b, n + 1 :] = 0
        extra = 1 if self.fault == "reads behind" else 0
        return _attend(q, k, v, (lengths + 1 + extra).tolist()).to(q.dtype)


def _attend(q: Tensor, k: Tensor, v: Tensor, attended: list[int]) -> Tensor:
    group = q.shape[1] // k.shape[2]
    outs = []
    for b, n in enumerate(attended):
        keys, values = (x[b, :n].float().repeat_interleave(group, 1) for x in (k, v))
        weights = torch.einsum("hd,nhd->hn", q[b].float(), keys) * q.shape[2] ** -0.5
        outs.append(torch.einsum("hn,nhd->hd", weights.softmax(-1), values))
    return torch.stack(outs)


@pytest.mark.parametrize("point", [SMALL, SMALL_RAGGED], ids=str)
def test_a_plan_is_checked_and_no_nan_remains(point: Point) -> None:
    data = Data(point, _pool(point))
    out, error = check(FakePlan(), data)
    assert error < 1e-3
    assert out.shape == data.q.shape
    assert not torch.stack(data.k + data.v).isnan().any()
    assert all(part.numel() * 2 == point.read_bytes for part in data.flat)


@pytest.mark.parametrize("fault", ["appends nothing", "writes behind"])
def test_a_plan_that_writes_wrongly_is_refused(fault: str) -> None:
    with pytest.raises(AssertionError):
        check(FakePlan(fault), Data(SMALL_RAGGED, _pool(SMALL_RAGGED)))


def test_a_plan_that_reads_behind_the_new_token_gives_nan() -> None:
    _, error = check(FakePlan("reads behind"), Data(SMALL_RAGGED, _pool(SMALL_RAGGED)))
    assert math.isnan(error)


# Peers that run here.


def test_absent_packages_are_no_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    assert list(peers.running(SMALL)) == ["SDPA flash", "SDPA cuDNN"]
    assert peers.running(SMALL_RAGGED) == {}


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
        return torch.cat([_attend(a[None], b[None], c[None], [n]) for a, b, c, n in parts])


def _with_kvcache(
    q: Tensor, k: Tensor, v: Tensor, *, cache_seqlens: Tensor, scheduler_metadata: str = ""
) -> Tensor:
    assert q.shape[1] == 1 and cache_seqlens.dtype == torch.int32
    return _attend(q[:, 0], k, v, cache_seqlens.tolist())[:, None]


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins for the packages that are installed nowhere here."""
    _install(monkeypatch, "flashinfer", BatchDecodeWithPagedKVCacheWrapper=FakeWrapper)
    _install(monkeypatch, "flash_attn", flash_attn_with_kvcache=_with_kvcache)
    _install(
        monkeypatch, "flash_attn_interface", flash_attn_with_kvcache=_with_kvcache,
        get_scheduler_metadata=lambda *sizes, qkv_dtype: "schedule",
    )  # fmt: skip


@pytest.mark.parametrize("point", [SMALL, SMALL_RAGGED], ids=str)
@pytest.mark.parametrize("name", peers.INSTALLABLE)
@pytest.mark.usefixtures("packages")
def test_an_installed_peer_attends_what_ours_does(name: str, point: Point) -> None:
    data = Data(point, _pool(point))
    out, _ = check(FakePlan(), data)
    attend = peers.running(point)[name](data)
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
    known = {"ours": 4.0, "floor 1": 3.0, "floor 2": 3.5}
    return {name: known.get(name, 6.0) for name in graphs}


@pytest.fixture
def without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces what needs a GPU, and the points by small ones."""
    about = {"gpu": "NVIDIA X1", "date": "2026-01-02"}
    for name, value in {
        "GRID": (SMALL,),
        "RAGGED": (SMALL_RAGGED,),
        "Graph": FakeGraph,
        "Floor": FakeFloor,
        "interleaved": _times,
        "random_pool": lambda points: _pool(max(points, key=pool_bytes)),
        "host_costs": lambda: {"plan": 7.0, "gqa_decode": 15.0},
        "provenance": lambda: about,
        "ask_gpu": lambda fields: "1 MHz",
        "source_digest": lambda config: "0" * 16,
    }.items():
        monkeypatch.setattr(bench, name, value)
    monkeypatch.setattr(bench.gqa_cutlass, "plan", lambda *args, **kwargs: FakePlan())
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1 << 40, 1 << 40))


@pytest.mark.usefixtures("without_gpu", "packages")
def test_a_run_writes_what_it_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.peers, "scaled", lambda point, floor: {"XQA": floor, "FA3": 1.0})
    record = bench.run("", tmp_path / "new" / "x.json")
    assert Record.load(tmp_path / "new" / "x.json") == record
    (row,), (ragged,) = record.rows, record.ragged
    assert (row.point, row.ours, row.floor) == ("small 4/2/64 3x48", 4.0, 3.0)
    assert row.measured.keys() >= {"FlashInfer", "FA3", "FA2"}
    assert row.recorded_scaled == {"XQA": 3.0, "FA3": 1.0}
    assert str(row.best_peer) == "XQA (recorded)"  # FA3 was measured, so its record is no peer
    assert ragged.point == "small 4/2/64 3x48 ragged three lengths" and ragged.limit == 1.5
    assert not any(name.startswith("SDPA") for name in ragged.measured)
    assert record.host == {"plan": 7.0, "gqa_decode": 15.0}
    assert record.run["clocks"] == "1 MHz"
    report.show(record)


@pytest.mark.usefixtures("without_gpu", "packages")
def test_a_failing_peer_says_why_and_is_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def broken(*args: Any, **kwargs: Any) -> Tensor:
        raise TypeError("no such argument\nand more")

    def wrong(q: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return torch.zeros_like(q)

    _install(monkeypatch, "flashinfer", BatchDecodeWithPagedKVCacheWrapper=broken)
    _install(monkeypatch, "flash_attn", flash_attn_with_kvcache=wrong)
    record = bench.run("ragged", tmp_path / "x.json")
    assert record.rows == [] and record.ragged[0].measured.keys() == {"FA3"}
    said = capsys.readouterr().err
    assert f"FlashInfer left out at {SMALL_RAGGED}: no such argument\n" in said
    assert f"FA2 left out at {SMALL_RAGGED}: relative error 1.0" in said
    report.show(record)


def test_points_that_do_not_fit_are_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.fitting(RAGGED, free=1) == []
    assert capsys.readouterr().err.count("left out: needs") == len(RAGGED)


# Tables and the picture.


def _row(point: Point, **changes: Any) -> Row:
    floor = peers.floor_by_bytes(point.read_bytes)
    row = Row(
        point=str(point), mib=point.read_bytes / 2**20, kernel="k", launch="l", source_digest="d",
        num_splits=1, relative_error=0.0, floor=floor, ours=1.25 * floor,
        measured={"SDPA flash": 3 * floor, "SDPA cuDNN": 2 * floor},
        recorded_scaled={"SDPA cuDNN": floor, "TileOPs": 1.75 * floor},
    )  # fmt: skip
    return dataclasses.replace(row, **changes)


@pytest.fixture
def full() -> Record:
    """A run over all points, with round ratios."""
    ragged = [
        _row(p, measured={}, recorded_scaled={}, limit=p.limit) for p in RAGGED
    ]  # fmt: skip
    run = {"gpu": "NVIDIA <X1>", "date": "2026-01-02"}
    host = {"plan": 7.04, "gqa_decode": 15.0, "SDPA, views made before": 20.0}
    return Record(run=run, rows=[_row(p) for p in GRID], ragged=ragged, host=host)


def test_the_record_survives_its_file(full: Record, tmp_path: Path) -> None:
    full.save(tmp_path / "r.json")
    assert Record.load(tmp_path / "r.json") == full
    assert json.loads((tmp_path / "r.json").read_text())["recorded_scaled"] == peers.SOURCE


def test_markdown_has_a_row_per_point(
    full: Record,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    full.save(tmp_path / "r.json")
    monkeypatch.setattr(sys, "argv", ["bench.py", "--markdown", str(tmp_path / "r.json")])
    bench.main()
    grid, ragged, host, sentences = capsys.readouterr().out.strip().split("\n\n")
    rows = [line for table in (grid, ragged, host) for line in table.splitlines()]
    assert len(rows) == 2 + len(GRID) + 2 + len(RAGGED) + 2 + 3
    assert {line.count("|") for line in grid.splitlines()} == {12}
    assert {line.count("|") for line in ragged.splitlines()} == {9}
    assert grid.splitlines()[3] == (
        "| llama3-8b 32/8/128 | 1 × 1024 | 4 | 2.8 | **3.5** | 8.4 | 5.6 | 1.60× | 80% "
        "| 1.40× | TileOPs (recorded) |"
    )
    assert ragged.splitlines()[3].endswith("| long first | 69 | 19.0 | **23.7** | 1.25× | 1.30× |")
    assert host.splitlines()[2:] == [
        "| plan | 7.0 | 8 |",
        "| gqa_decode | 15.0 | 14 |",
        "| SDPA, views made before | 20.0 | - |",
    ]
    assert "against the best SDPA backend: geometric mean 1.60x, worst 1.60x" in sentences
    assert "against the best of all peers: geometric mean 1.40x, worst 1.40x" in sentences
    assert "are 0.50 to 0.50 of what was measured" in sentences


def test_a_search_over_kernels_is_no_shipped_peer() -> None:
    row = _row(GRID[0], recorded_scaled={"TileOPs best of 151": 1.0, "XQA": 1.2})
    assert (str(row.best_peer), str(row.best_shipped_peer)) == (
        "TileOPs best of 151 (recorded)", "XQA (recorded)",
    )  # fmt: skip


def test_points_without_peers_are_shown_and_not_counted() -> None:
    rows = [_row(GRID[0]), _row(GRID[1], measured={}, recorded_scaled={}, ours=1e6)]
    assert "slower at 0 of 1 points" in "\n".join(report.summary(rows))
    table = report.markdown(Record(run={}, rows=rows)).splitlines()
    assert "| - | - | - |" in table[3] and table[3].endswith("| - | - |")


def test_a_slower_point_is_counted_and_named() -> None:
    rows = [_row(GRID[0]), _row(GRID[1], ours=5.6)]
    of_sdpa = report.summary(rows)[1]
    assert f"worst 1.00x ({GRID[1]}, SDPA cuDNN), slower at 0 of 2 points" in of_sdpa
    of_all = report.summary(rows)[2]
    assert f"worst 0.88x ({GRID[1]}, TileOPs (recorded)), slower at 1 of 2 points" in of_all


def test_the_picture_holds_every_point(full: Record) -> None:
    picture = plot.svg(full)
    assert picture == plot.svg(full)
    space = "{http://www.w3.org/2000/svg}"
    root = ET.fromstring(picture)
    marks = root.findall(f"{space}circle")
    titles = [mark.findtext(f"{space}title") or "" for mark in marks]
    for name in ("ours", "best SDPA backend"):
        assert sorted(t.split(":")[0] for t in titles if f": {name} " in t) == sorted(
            map(str, GRID)
        )
    for mark in marks:
        assert plot.LEFT < float(mark.attrib["cx"]) < plot.RIGHT
        assert plot.TOP < float(mark.attrib["cy"]) < plot.BOTTOM
    lines = root.findall(f"{space}polyline")
    assert len(lines[0].attrib["points"].split()) == len({point.read_bytes for point in GRID})
    texts = [text.text for text in root.findall(f"{space}text")]
    assert {"ours", "best SDPA backend", "floor", "MiB read", "µs per call", "1024"} <= set(texts)


def test_the_picture_is_written_beside_its_file(
    full: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full.save(tmp_path / "nvidia-x1.json")
    monkeypatch.setattr(sys, "argv", ["plot.py", str(tmp_path / "nvidia-x1.json")])
    plot.main()
    assert (tmp_path / "nvidia-x1.svg").read_text() == plot.svg(full)
