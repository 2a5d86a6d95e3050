"""What the benchmark makes of a record: its file, the tables, and the CSV."""

from __future__ import annotations

import csv
import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from bench_fakes import full_record, prefill_of, row_of
from helpers import REPOSITORY

from bench import baselines, checkout, report, spreadsheet
from bench.features import CASES
from bench.merges import MERGES
from bench.points import GRID, PREFILL, RAGGED
from bench.record import Prefill, Record
from bench.serving_points import SERVING
from gqa_cutlass.errors import InputError

SHIPPED = REPOSITORY / "bench" / "results" / "nvidia-h200.json"


@pytest.fixture
def full() -> Record:
    return full_record()


def test_the_record_survives_its_file(full: Record, tmp_path: Path) -> None:
    full.save(tmp_path / "r.json")
    assert Record.load(tmp_path / "r.json") == full
    assert json.loads((tmp_path / "r.json").read_text())["recorded_scaled"] == baselines.SOURCE


@pytest.mark.parametrize("part", ["prefill", "features", "merges", "serving"])
def test_a_record_from_before_a_part_was_measured_is_read(
    part: str, full: Record, tmp_path: Path
) -> None:
    full.save(tmp_path / "r.json")
    content = json.loads((tmp_path / "r.json").read_text())
    del content[part]
    (tmp_path / "r.json").write_text(json.dumps(content))
    assert Record.load(tmp_path / "r.json") == replace(full, **{part: []})  # type: ignore[arg-type]


def test_the_shipped_record_is_read() -> None:
    record = Record.load(SHIPPED)
    assert {row.point for row in record.rows} == {str(point) for point in GRID}
    assert {row.point for row in record.ragged} == {str(point) for point in RAGGED}


@pytest.mark.parametrize("content", ["no JSON", "[]", "{}", '{"run": {}, "microseconds": [{}]}'])
def test_what_is_no_record_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(InputError, match=r"record: got .*x\.json"):
        Record.load(tmp_path / "x.json")


@pytest.mark.parametrize("name", ["bench/baselines.json", "generated/manifest.json"])
def test_other_files_of_ours_are_no_records(name: str) -> None:
    with pytest.raises(InputError, match="the record: lacks 'run'"):
        Record.load(REPOSITORY / name)


def _at(content: Any, path: str) -> tuple[Any, Any]:
    """What holds the value at a path, and its key."""
    *way, last = [int(word) if word.isdigit() else word for word in path.split("/")]
    for word in way:
        content = content[word]
    return content, last


VALUES = {
    "run": "a", "run/gpu": 1, "run/date": "a\nb", "run/clocks": None,
    "microseconds": {}, "ragged": None, "prefill": "x",
    "microseconds/0": [], "microseconds/0/point": "a point",
    "microseconds/1/point": "m 4/2/64 0x50", "ragged/0/point": f"m 4/2/64 1x{'1' * 5000}",
    "prefill/0/point": "\ud800",
    "microseconds/0/ours": 0, "microseconds/0/floor": -1.0,
    "microseconds/0/mib": 1e400, "microseconds/0/relative_error": float("nan"),
    "microseconds/0/num_splits": 1.5, "microseconds/0/balanced": "1",
    "microseconds/0/dependent": True, "microseconds/0/limit": 10**400,
    "microseconds/0/measured": [1.0], "microseconds/0/measured/FA3": 0.0,
    "microseconds/0/recorded_scaled/XQA": 1e300, "prefill/0/measured": {},
    "prefill/0/decode": [[]], "features/0/point": "a point",
    "features/0/limit": None, "merges/0/floor": 0, "host_microseconds/plan": None,
}  # fmt: skip


@pytest.mark.parametrize("path", VALUES)
def test_a_value_that_makes_no_sense_is_refused(full: Record, tmp_path: Path, path: str) -> None:
    full.save(tmp_path / "x.json")
    content = json.loads((tmp_path / "x.json").read_text())
    inside, key = _at(content, path)
    inside[key] = VALUES[path]
    (tmp_path / "x.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"^bench: record: got .*x\.json, which is none \(.*\);"):
        Record.load(tmp_path / "x.json")


@pytest.mark.parametrize("path", ["run", "microseconds", "microseconds/0/ours", "prefill/0/decode"])
def test_what_is_absent_and_what_is_new_are_named(full: Record, tmp_path: Path, path: str) -> None:
    full.save(tmp_path / "x.json")
    content = json.loads((tmp_path / "x.json").read_text())
    inside, key = _at(content, path)
    inside["other"] = inside.pop(key)
    (tmp_path / "x.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=f"lacks '{key}'"):
        Record.load(tmp_path / "x.json")
    inside[key] = inside["other"]
    (tmp_path / "x.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="has 'other', which is not known"):
        Record.load(tmp_path / "x.json")


def test_rates_count_new_tokens_and_bytes_read() -> None:
    (point,) = (p for p in GRID if str(p) == "llama3-8b 32/8/128 8x1024")
    row = row_of(point, ours=16.0)
    assert row.num_bytes == 32 << 20
    assert row.per_token == 2.0
    assert row.bandwidth(row.ours) == pytest.approx((32 << 20) / 16e-6 / 1e9)


def test_prompts_are_compared_by_the_faster_backend() -> None:
    row = Prefill(point="m 4/2/64 2x50", decode=8.0, measured={"SDPA flash": 40, "SDPA cuDNN": 30})
    assert str(row.best) == "SDPA cuDNN"
    assert (row.ratio, row.per_prompt_token, row.per_token) == (3.75, 0.3, 4.0)


# Tables.


def test_markdown_has_a_row_per_point(full: Record) -> None:
    tables = report.markdown(full).split("\n\n")
    grid, ragged, prefill, features, pages, fp8, merges, serving, host, sentences = tables
    for table, rows, columns in (
        (grid, len(GRID), 14), (ragged, len(RAGGED), 8), (prefill, len(PREFILL), 8),
        (features, len(CASES), 8), (pages, 6, 10), (fp8, len(GRID), 7), (merges, len(MERGES), 7),
        (serving, len(SERVING), 12), (host, 4, 3),
    ):  # fmt: skip
        lines = table.splitlines()
        assert len(lines) == 2 + rows
        assert {line.count("|") for line in lines} == {columns + 1}
    assert grid.splitlines()[3] == (
        "| llama3-8b 32/8/128 | 1 × 1024 | 4 | 2.8 | **3.5** | 2.8 | 3.5 | 1198 | 8.4 | 5.6 "
        "| 1.60× | 80% | 1.40× | TileOPs (recorded) |"
    )
    assert "| 64 × 1024 | 256 | 62.0 | **77.5** | - | 1.2 | 3464 | 186.0 |" in grid
    assert ragged.splitlines()[3].endswith("| long first | 69 | 19.0 | **23.7** | 1.25× | 1.30× |")
    assert prefill.splitlines()[5] == (
        "| llama3-8b 32/8/128 | 8 × 1024 | **12.5** | 1.6 | 500.0 | 400.0 | 0.049 | 32.0× |"
    )
    assert features.splitlines()[2] == (
        "| llama3-8b 32/8/128 | 1 × 16384 | softcap | 64 | 22.1 | **24.3** | 1.10× | 22.8 |"
    )
    assert fp8.splitlines()[7] == (
        "| llama3-8b 32/8/128 | 8 × 1024 | 12.5 | **13.8** | 0.91× | 11.6 | 0.85× |"
    )
    assert merges.splitlines()[4] == (
        "| 2 parts of 4096x32x128 in float32 | 161.5 | 39.9 | **43.9** | 1.10× | 1.2× | 159.8 |"
    )
    assert serving.splitlines()[2] == (
        "| llama3-8b 32/8/128 | 4 × 8192 | lognormal 500/1.0 | 11.7 | 4.9 | **6.2** | 1.25× | 7.4 "
        "| 7.4 | - | - | 2.70× |"
    )
    assert host.splitlines()[2:] == [
        "| plan | 7.0 | 8 |",
        "| gqa_decode | 15.0 | 14 |",
        "| SDPA, views made before | 20.0 | - |",
        "| check | 0.05 | - |",
    ]
    assert "against the best SDPA backend: geometric mean 1.60x, worst 1.60x" in sentences
    assert "against the best of all baselines: geometric mean 1.40x, worst 1.40x" in sentences
    assert "\nagainst the best of all baselines as shipped: geometric mean 1.40x" in sentences
    assert (
        "as dependents, against the best of all baselines as shipped: geometric mean 1.5"
        in sentences
    )
    assert "are 0.50 to 0.50 of what was measured" in sentences


def test_a_terminal_shows_every_part(full: Record, capsys: pytest.CaptureFixture[str]) -> None:
    report.show(full)
    said = capsys.readouterr().out
    for point in (*GRID, *RAGGED):
        assert f"\n{point} " in said
    for title in (
        "window of 1024",
        "per token",
        "GB/s",
        "prefill over decode",
        "us of host time per call",
        "8 parts of 64x32x128 in bfloat16",
    ):
        assert title in said
    assert f"\n{SERVING[0]} " in said and "serving, room: 1.25x the floor" in said
    rows = [line for line in said.splitlines() if " 8x1024  " in line]
    of_step, of_prompts, of_8_bits = (re.split("  +", row) for row in rows)
    assert of_step[1:8] == ["32.0", "10.00", "12.50", "-", "10.00", "1.56", "2684"]
    assert of_prompts[1:] == ["12.50", "1.56", "500.00", "400.00", "0.0488", "32.0x"]
    assert of_8_bits[1:] == ["float8_e4m3fn", "32.0", "12.50", "13.75", "1.10x", "12.50", "no"]


@pytest.mark.parametrize("width", [80, 120])
def test_tables_fit_the_terminal(
    width: int, full: Record, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    report.show(full)
    lines = capsys.readouterr().out.splitlines()
    tables = [line for line in lines if "  " in line]
    assert len(tables) > len(GRID) and max(map(len, tables)) <= width
    (head,) = {line for line in tables if "of roofline" in line}
    assert {"point", "ours"} <= set(head.split()) and ("to flash" in head) == (width > 80)


def test_a_search_over_kernels_is_no_shipped_baseline() -> None:
    row = row_of(GRID[0], recorded_scaled={"TileOPs best of 151": 1.0, "XQA": 1.2})
    assert (str(row.best_baseline), str(row.best_shipped_baseline)) == (
        "TileOPs best of 151 (recorded)", "XQA (recorded)",
    )  # fmt: skip


def test_points_without_baselines_are_shown_and_not_counted() -> None:
    rows = [row_of(GRID[0]), row_of(GRID[1], measured={}, recorded_scaled={}, ours=1e6)]
    assert "slower at 0 of 1 points" in "\n".join(report.summary(rows))
    table = report.markdown(Record(run={}, rows=rows)).splitlines()
    assert "| - | - | - |" in table[3] and table[3].endswith("| - | - |")


def test_what_else_was_measured_has_a_column_and_what_was_recorded_has_none() -> None:
    measured = {"SDPA flash": 9.0, "SDPA cuDNN": 8.0, "FA3": 7.0}
    recorded = {"FA3": 6.0, "XQA": 7.5}
    rows = [row_of(GRID[0]), row_of(GRID[1], measured=measured, recorded_scaled=recorded)]
    uneven = [row_of(RAGGED[0], measured={"FA3": 5.0}, limit=1.5)]
    grid, ragged, *_ = report.markdown(Record(run={}, rows=rows, ragged=uneven)).split("\n\n")
    head, _, without, with_it = grid.splitlines()
    assert "| SDPA flash | SDPA cuDNN | FA3 | against" in head and "XQA" not in head
    assert "| - |" in without and "| 9.0 | 8.0 | 7.0 |" in with_it and with_it.endswith("| FA3 |")
    assert "| ours | FA3 | over the roofline |" in ragged and "** | 5.0 | " in ragged


def test_a_slower_point_is_counted_and_named() -> None:
    rows = [row_of(GRID[0]), row_of(GRID[1], ours=5.6)]
    of_sdpa = report.summary(rows)[1]
    assert f"worst 1.00x ({GRID[1]}, SDPA cuDNN), slower at 0 of 2 points" in of_sdpa
    of_all = report.summary(rows)[2]
    assert f"worst 0.88x ({GRID[1]}, TileOPs (recorded)), slower at 1 of 2 points" in of_all


# CSV.


def _read(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_csv_has_a_row_per_point(full: Record) -> None:
    rows = _read(spreadsheet.decode_csv(full))
    keys = ("model", "q_heads", "kv_heads", "head_dim", "batch", "tokens", "lengths")
    sizes = [
        (p.model, p.num_q_heads, p.num_kv_heads, p.head_dim, p.batch, p.tokens)
        for p in (*GRID, *RAGGED)
    ]
    lengths = [*("equal" for _ in GRID), *(point.name for point in RAGGED)]
    assert [tuple(row[key] for key in keys) for row in rows] == [
        (*map(str, size), label) for size, label in zip(sizes, lengths, strict=True)
    ]


def test_csv_has_what_was_measured(full: Record) -> None:
    (row,) = (
        row
        for row in _read(spreadsheet.decode_csv(full))
        if (row["model"], row["batch"], row["tokens"]) == ("llama3-8b", "8", "1024")
    )
    numbers = {
        key: float(row[key])
        for key in row
        if key.endswith(("us", "token", "per_s", "ours")) and row[key]
    }
    assert row["ours_balanced_us"] == ""
    assert numbers == {
        "ours_us": 12.5, "ours_dependent_us": 10.0, "ours_us_per_token": 1.5625,
        "ours_gb_per_s": 2684.4,
        "roofline_us": 10.0, "roofline_gb_per_s": 3355.4,
        "sdpa_flash_us": 30.0, "sdpa_cudnn_us": 20.0, "best_sdpa_over_ours": 1.6,
        "sdpa_cudnn_recorded_scaled_us": 10.0, "tileops_recorded_scaled_us": 17.5,
        "best_baseline_over_ours": 1.4,
    }  # fmt: skip
    assert (row["kv_bytes"], row["share_of_roofline"]) == (str(32 << 20), "0.8")
    assert (row["best_baseline"], row["target_over_roofline"]) == ("TileOPs (recorded)", "")
    assert (row["kernel"], row["num_splits"], row["relative_error"]) == ("k", "1", "0.000125")


def test_csv_says_in_every_row_where_it_was_measured(full: Record) -> None:
    dirty = replace(full, run={**full.run, "commit": "c0ffee-dirty"})
    for rows in map(_read, (spreadsheet.decode_csv(dirty), spreadsheet.prefill_csv(dirty))):
        assert {row["gpu"] for row in rows} == {"NVIDIA <X1>"}
        assert {row["clocks"] for row in rows} == {"1 MHz, 2 MHz"}
        assert {row["commit"] for row in rows} == {"c0ffee-dirty"}
        assert {row["driver"] for row in rows} == {"unknown"}  # the record does not say


def test_csv_leaves_empty_what_was_not_measured() -> None:
    rows = [row_of(GRID[0]), row_of(GRID[1], measured={"FA3": 5.0}, recorded_scaled={})]
    first, second = _read(spreadsheet.decode_csv(Record(run={}, rows=rows)))
    assert (first["fa3_us"], second["fa3_us"]) == ("", "5.0")
    assert second["sdpa_flash_us"] == second["tileops_recorded_scaled_us"] == ""
    assert (second["best_baseline"], second["best_sdpa_over_ours"]) == ("FA3", "")


def test_merges_have_a_csv_of_their_own(full: Record) -> None:
    rows = _read(spreadsheet.merges_csv(full))
    assert [row["merge"] for row in rows] == [str(merge) for merge in MERGES]
    assert [int(row["bytes"]) for row in rows] == [merge.num_bytes for merge in MERGES]
    assert {row["ours_over_floor"] for row in rows} == {"1.1"}
    assert {row["target_over_floor"] for row in rows} == {"1.2"}


def test_prompts_have_a_csv_of_their_own(full: Record) -> None:
    rows = _read(spreadsheet.prefill_csv(full))
    assert [(row["batch"], row["tokens"]) for row in rows] == [
        ("1", "1024"), ("1", "4096"), ("1", "16384"), ("8", "1024"),
    ]  # fmt: skip
    last = rows[-1]
    assert (last["decode_us"], last["decode_us_per_token"]) == ("12.5", "1.5625")
    assert (last["prefill_sdpa_flash_us"], last["prefill_sdpa_cudnn_us"]) == ("500.0", "400.0")
    assert (last["prefill_best"], last["prefill_best_us"]) == ("SDPA cuDNN", "400.0")
    assert (last["prefill_us_per_token"], last["prefill_over_decode"]) == ("0.0488", "32.0")


def test_what_was_not_measured_has_no_csv() -> None:
    record = Record(run={}, rows=[], prefill=[prefill_of(PREFILL[0])])
    assert spreadsheet.decode_csv(record) == ""
    assert spreadsheet.prefill_csv(replace(record, prefill=[])) == ""


@pytest.mark.parametrize("ending", ["", "-prefill"])
def test_the_shipped_csv_is_that_of_the_shipped_record(ending: str) -> None:
    record = Record.load(SHIPPED)
    text = {"": spreadsheet.decode_csv, "-prefill": spreadsheet.prefill_csv}[ending](record)
    path = checkout.RESULTS / f"nvidia-h200{ending}.csv"
    assert (path.read_text() if path.exists() else "") == text
