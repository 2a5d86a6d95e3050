"""Points of the benchmark, their data, and what was recorded of the baselines."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from bench_fakes import SMALL, SMALL_RAGGED, FakePlan, pool
from helpers import REPOSITORY, every

from bench import baselines, recorded_features, report
from bench import data as bench_data
from bench.data import Data, check, num_sets, pool_bytes
from bench.features import CASES
from bench.points import GRID, PREFILL, RAGGED, Label, Point, Ragged
from bench.record import Featured, Record
from bench.unusual import SCALE, Fp8Data, check_unusual
from gqa_cutlass.errors import InputError

POINTS = {str(point): point for point in (*GRID, *RAGGED)}


@pytest.fixture(autouse=True)
def _few_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_data, "MAX_SETS", 2)


# What was recorded of the baselines.


@pytest.mark.parametrize("point", GRID, ids=str)
def test_baselines_are_recorded_for_every_point(point: Point) -> None:
    found = baselines.recorded(point)
    assert {"SDPA cuDNN", "FA3", "XQA"} <= found.keys()
    assert ("FlashInfer" in found) == (point.model != "phi3-mini")  # which faults there
    assert all(1 < micros < 1000 for micros in found.values())


def test_the_record_names_no_other_points() -> None:
    record = json.loads((REPOSITORY / "bench" / "baselines.json").read_text())
    for run in record["runs"]:
        assert run["micros"].keys() <= {str(point) for point in GRID}
        assert set(run["baselines"]) <= record["versions"].keys()
    assert record["runs"][0]["micros"].keys() == {str(point) for point in GRID}
    assert baselines.NOT_SHIPPED <= record["versions"].keys()


@pytest.mark.parametrize(
    ("section", "feature"), [("pages", "pages of 16"), ("fp8", "float8_e4m3fn")]
)
def test_features_are_recorded_of_points_that_are_measured(section: str, feature: str) -> None:
    known = json.loads((REPOSITORY / "bench" / "baselines.json").read_text())[section]["micros"]
    assert list(known) == [str(case.point) for case in CASES if case.feature == feature]


def test_the_page_has_the_tables_beside_recorded_features() -> None:
    """As `gqa-cutlass bench --from bench/results/nvidia-h200.json --markdown` prints them."""
    record = Record.load(REPOSITORY / "bench" / "results" / "nvidia-h200.json")
    tables = report.markdown(record).split("\n\n")
    beside = [table for table in tables if "| XQA" in table.splitlines()[0]]
    assert [len(table.splitlines()) for table in beside] == [
        2 + sum(row.feature == feature for row in record.features)
        for feature in ("pages of 16", "float8_e4m3fn")
    ]
    page = (REPOSITORY / "docs" / "benchmark.md").read_text()
    assert all(f"\n\n{table}\n\n" in page for table in beside)


def _featured(feature: str, ours: float) -> Featured:
    """A step over a cache of 8 x 8192 tokens, on a GPU that is half as fast as the record's."""
    return Featured(
        point="llama3-8b 32/8/128 8x8192", feature=feature, kernel="", mib=256.0,
        relative_error=0.0, ours=ours, plain=2 * 65.3, limit=1.0,
    )  # fmt: skip


def test_recorded_times_over_pages_are_scaled_by_our_dense_step() -> None:
    rows = [_featured(f"pages of {size}", size + 70.0) for size in (1, 16, 64, 256)]
    (found,) = recorded_features.pages_cells([*rows, replace(rows[0], feature="sinks")])
    assert found[3:7] == ["141.4", "138.6", "137.8", "148.0"]
    assert found[7:] == ["1.60×", "0.42×", "1.94×"]  # 137.8 / 86, 137.8 / 326, 137.8 / 71
    elsewhere = [replace(row, point="mqa 8/1/128 1x8192") for row in rows]
    assert not recorded_features.pages_cells([*elsewhere, *rows[1:]])  # nor without pages of one


def test_recorded_times_over_8_bits_are_scaled_by_our_dense_step() -> None:
    row = _featured("float8_e4m3fn", 80.0)
    elsewhere = replace(row, point="llama3-8b 32/8/128 8x8193")
    (found,) = recorded_features.fp8_cells([replace(row, feature="sinks"), row, elsewhere])
    assert found == [
        "llama3-8b 32/8/128", "8 × 8192", "130.6", "**80.0**", "1.63×", "100.2", "1.25×",
    ]  # fmt: skip


def test_caches_of_8_bits_are_measured_over_the_grid() -> None:
    cases = [case for case in CASES if case.is_fp8]
    assert [case.point for case in cases] == list(GRID)
    large = {str(case.point) for case in cases if case.most < 1}
    assert large == {
        "llama3-8b 32/8/128 1x131072", "llama3-8b 32/8/128 64x4096", "llama3-8b 32/8/128 256x1024",
        "llama3-70b 64/8/128 256x1024", "mha 32/32/128 16x2048", "phi3-mini 32/32/96 16x4096",
        "phi3-mini 32/32/96 64x2048", "gemma2-9b 16/8/256 16x4096", "gemma2-9b 16/8/256 64x2048",
    }  # fmt: skip
    assert {case.most for case in cases} == {1.0, 1 / 1.8}


@pytest.mark.parametrize(
    ("point", "baseline", "micros"),
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
def test_the_record_has_the_noted_figure(point: str, baseline: str, micros: float) -> None:
    assert baselines.recorded(POINTS[point])[baseline] == micros


@pytest.mark.parametrize(
    ("point", "baseline"),
    [
        ("llama3-8b 32/8/128 8x8192", "TileOPs"),  # fails inside a graph
        ("llama3-70b 64/8/128 1x1024", "SDPA flash"),
        ("phi3-mini 32/32/96 1x1024", "FlashInfer"),
        ("gpt-oss 64/8/64 1x1024", "TileOPs"),
    ],
)
def test_a_figure_that_was_not_noted_is_left_out(point: str, baseline: str) -> None:
    assert baseline not in baselines.recorded(POINTS[point])


def test_records_are_scaled_by_the_floor_of_their_run() -> None:
    point = POINTS["llama3-8b 32/8/128 1x1024"]
    now = baselines.scaled(point, floor=2 * 2.6)
    assert now["FA3"] == pytest.approx(2 * 9.24)
    assert now["TileOPs"] == pytest.approx(6.3 * 2 * 2.6 / 2.8)  # a run whose floor is not known


def test_records_without_a_floor_are_scaled_by_that_of_their_bytes() -> None:
    now = baselines.scaled(POINTS["gemma2-9b 16/8/256 64x2048"], floor=120)
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
    assert baselines.floor_by_bytes(round(mib * 2**20)) == pytest.approx(micros, rel=1e-6)


def test_ragged_points_have_no_records() -> None:
    assert all(baselines.scaled(point, 1.0) == {} for point in RAGGED)


# Points and their data.


@pytest.mark.parametrize("point", [*GRID, *RAGGED], ids=str)
def test_a_points_name_says_what_it_is(point: Point) -> None:
    label = Label.of(str(point))
    lengths = point.name if isinstance(point, Ragged) else None
    assert label == Label(
        model=point.model, num_q_heads=point.num_q_heads, num_kv_heads=point.num_kv_heads,
        head_dim=point.head_dim, batch=point.batch, tokens=point.tokens, lengths=lengths,
    )  # fmt: skip
    assert str(point).startswith(f"{label.heads} {point.batch}x")


@pytest.mark.parametrize("name", ["", "small 4/2 3x48", "small 4/2/64 3x48 and more"])
def test_what_names_no_point_is_refused(name: str) -> None:
    with pytest.raises(InputError, match="point: got"):
        Label.of(name)


def test_prompts_are_those_of_llama3_8b() -> None:
    assert [str(point) for point in PREFILL] == [
        f"llama3-8b 32/8/128 {size}" for size in ("1x1024", "1x4096", "1x16384", "8x1024")
    ]


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
    assert num_sets(point.read_bytes) >= 2
    assert num_sets(point.read_bytes) * point.read_bytes >= 256 << 20
    assert pool_bytes(point) <= 10 << 30


@pytest.mark.parametrize("point", [SMALL, SMALL_RAGGED], ids=str)
def test_a_plan_is_checked_and_no_nan_remains(point: Point) -> None:
    data = Data(point, pool(point))
    out, error = check(FakePlan(), data)
    assert error < 1e-3
    assert out.shape == data.q.shape
    assert not torch.stack(data.k + data.v).isnan().any()
    assert all(part.numel() * 2 == point.read_bytes for part in data.flat)


@pytest.mark.parametrize(
    ("fault", "found"),
    [
        ("appends nothing", "the new token was not appended"),
        ("writes behind", "a row behind the new token was written"),
        ("reads behind", "relative error nan"),
        ("is no attention", "relative error"),
    ],
)
def test_a_wrong_plan_is_refused(fault: str, found: str) -> None:
    with pytest.raises(AssertionError, match=found):
        check(FakePlan(fault), Data(SMALL_RAGGED, pool(SMALL_RAGGED)))


HEADS = sorted({(point.num_q_heads // point.num_kv_heads, point.head_dim) for point in GRID})


@pytest.mark.parametrize(("group", "head_dim"), every(4, HEADS))
def test_caches_of_8_bits_are_checked_whatever_the_heads(group: int, head_dim: int) -> None:
    point = Point("small", group, 1, head_dim, 2, 40)
    data = Fp8Data(point, pool(point))
    right = {"k_scale": SCALE, "v_scale": SCALE}
    assert check_unusual(data.plan(**right), data, **right) < 1e-3
    wrong = {"k_scale": SCALE, "v_scale": 1.02 * SCALE}
    with pytest.raises(AssertionError, match="relative error 0.0"):
        check_unusual(data.plan(**wrong), data, **wrong)
