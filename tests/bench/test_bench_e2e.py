"""The end-to-end benchmark: what it measures, in which order, and that no row is lost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from compiling import GROUP
from helpers import few

pytest.importorskip("transformers")

from bench import e2e_steps, end_to_end  # noqa: E402
from bench.checkout import DOCUMENT, RESULTS  # noqa: E402
from bench.e2e_points import SHAPES, WAYS, Job, Point, Run, Shape, Way, jobs  # noqa: E402
from bench.e2e_record import Record, Row, load, replaced, table  # noqa: E402
from bench.end_to_end import Bench  # noqa: E402
from gqa_cutlass.errors import InputError  # noqa: E402

pytestmark = pytest.mark.xdist_group(GROUP)

TOY = Shape(
    name="toy", config="LlamaConfig", layers=1,
    sizes={"hidden_size": 256, "intermediate_size": 64, "num_attention_heads": 4,
           "num_key_value_heads": 1, "vocab_size": 64},
)  # fmt: skip
WINDOWED = (
    Shape(
        name="toy-oss", config="GptOssConfig", layers=2, no_sdpa="SDPA has no sinks",
        sizes={"hidden_size": 64, "intermediate_size": 32, "num_attention_heads": 4,
               "num_key_value_heads": 1, "head_dim": 64, "vocab_size": 64, "sliding_window": 8,
               "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    Shape(
        name="toy-gemma", config="Gemma2Config", layers=2, no_sdpa="SDPA has no softcap",
        sizes={"hidden_size": 64, "intermediate_size": 32, "num_attention_heads": 4,
               "num_key_value_heads": 1, "head_dim": 64, "vocab_size": 64, "sliding_window": 8,
               "query_pre_attn_scalar": 64},
    ),
)  # fmt: skip
BROKEN = Way(name="broken", attention="nonesuch", cache="dynamic", run=Run.CALLED)
RUN = {"gpu": "NVIDIA H200", "date": "today", "torch": "2", "transformers": "5"}


def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WARM", "WARM_COMPILED", "BATCHES", "STEPS"):
        monkeypatch.setattr(e2e_steps, name, 1)


def test_every_way_is_measured_and_one_that_fails_loses_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    few_steps(monkeypatch)
    record = Record(tmp_path / "record.json", RUN)
    bench = Bench(record, minutes=60, layers=None, device="cpu", dtype=torch.float16)
    ways = [way for way in WAYS if way.name != "sdpa-compiled"]  # compiled like ours
    for job in jobs((TOY,), (Point(2, 8),), (BROKEN, *ways)):
        bench.measure(job)
    rows = {row.way: row for row in record.rows.values()}
    missing = {way: row.missing for way, row in rows.items() if row.missing}
    assert missing.keys() == {"broken", "sdpa-graph", "ours-graph"}
    assert "nonesuch" in missing["broken"] and missing["ours-graph"] == "CUDA graphs need a GPU"
    for way in ("eager", "sdpa", "ours", "ours-compiled"):
        row = rows[way]
        assert row.ms_per_step > 0
        assert row.tokens_per_second == pytest.approx(2e3 / row.ms_per_step, rel=1e-2)
        assert row.logits_difference < 5e-3
    written = json.loads(record.path.read_text())
    assert len(written["rows"]) == len(rows) and written["run"] == RUN
    assert "| toy, 1 | 2 × 8 |" in record.path.with_suffix(".md").read_text()
    assert "toy 2 × 8 broken: " in capsys.readouterr().out


@pytest.mark.parametrize("shape", few(WINDOWED), ids=lambda shape: shape.name)
def test_models_with_windows_are_compared_with_eager_attention(
    shape: Shape, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few_steps(monkeypatch)
    record = Record(tmp_path / "record.json", RUN)
    bench = Bench(record, minutes=60, layers=None, device="cpu", dtype=torch.float16)
    compiled = ["eager-compiled"] if shape == WINDOWED[0] else []
    names = ["sdpa", "eager", "ours", "sdpa-graph", "sdpa-compiled", *compiled]
    for job in jobs((shape,), (Point(1, 10),), tuple(way for way in WAYS if way.name in names)):
        bench.measure(job)
    rows = {row.way: row for row in record.rows.values()}
    numbers = {way: row for way, row in rows.items() if not row.missing}
    assert numbers.keys() == {"eager", "ours", *compiled}
    assert {rows[way].missing for way in ("sdpa", "sdpa-graph", "sdpa-compiled")} == {shape.no_sdpa}
    assert rows["eager"].logits_difference == 0
    assert all(row.logits_difference < 5e-3 for row in numbers.values())
    assert f"- {shape.name} sdpa, {shape.name} sdpa-graph" in table([*rows.values()], RUN)


def test_a_step_that_takes_long_is_repeated_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    steps: list[float] = []

    def step(seconds: float) -> torch.Tensor:
        nonlocal now
        now += seconds
        steps.append(seconds)
        return torch.empty(0)

    monkeypatch.setattr(e2e_steps.time, "perf_counter", lambda: now)
    for seconds, repeated in ((0.01, 1 + 3 * 5), (0.1, 1 + 3 * 2), (2.0, 1 + 3)):
        steps.clear()
        assert e2e_steps.seconds_per_step(lambda: step(seconds)) == pytest.approx(seconds)  # noqa: B023
        assert len(steps) == repeated


def test_nothing_is_begun_that_may_not_end_in_time(tmp_path: Path) -> None:
    record = Record(tmp_path / "record.json", RUN)
    bench = Bench(record, minutes=0, layers=None, device="cpu", dtype=torch.float16)
    row = bench.measure(Job(shape=TOY, point=Point(1, 8), way=WAYS[0]))
    assert row.missing == "no time was left"


def row(way: str, ms: float | None = None, missing: str | None = None) -> Row:
    return Row(
        model="toy", layers=1, batch=8, context=1024, way=way, ms_per_step=ms, missing=missing,
        tokens_per_second=8e3 / ms if ms else None,
    )  # fmt: skip


def test_records_of_the_same_gpu_are_joined(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = Record(tmp_path / "a.json", RUN), Record(tmp_path / "b.json", RUN)
    other = Record(tmp_path / "c.json", RUN | {"gpu": "another"})
    first.add(row("sdpa-graph", 4.0))
    first.add(row("ours-graph", missing="out of memory"))
    second.add(row("ours-graph", 2.0))
    second.add(row("sdpa-graph", missing="no time was left"))  # replaces no numbers
    other.add(row("ours-graph", 1.0))
    for record in (first, second, other):
        record.write()
    paths = [str(record.path) for record in (first, second, other)]
    assert end_to_end.main(["--join", *paths, "--out", str(tmp_path)]) == 0
    joined = Record(tmp_path / "nvidia-h200-end-to-end.json", RUN)
    assert {r.way: r.ms_per_step for r in joined.rows.values()} == {
        "sdpa-graph": 4.0, "ours-graph": 2.0
    }  # fmt: skip
    assert "| toy, 1 | 8 × 1024 | 4.00 | **2.00** | 4000 | 2.00× |" in capsys.readouterr().out


@pytest.mark.parametrize(
    "content",
    ["", "[" * 100_000, "[]", "{}", '{"run": {"gpu": "x"}, "rows": []}',
     json.dumps({"run": RUN, "rows": [{"model": "toy"}]}), json.dumps({"run": RUN, "rows": [1]})],
    ids=["empty", "deep", "a list", "nothing", "a run unknown", "a row cut short", "a number"],
)  # fmt: skip
def test_what_is_no_record_is_not_joined(tmp_path: Path, content: str) -> None:
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(InputError, match=r"end_to_end: record: got .*x\.json, which is n"):
        end_to_end.main(["--join", str(tmp_path / "x.json"), "--out", str(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_what_needs_no_compiler_is_measured_first() -> None:
    points = Point(1, 1024), Point(8, 8192)
    order = [(j.shape.name, j.way.run is Run.COMPILED, j.point) for j in jobs(SHAPES, points, WAYS)]
    assert sum(compiled for _, compiled, _ in order) * 5 < len(order) * 2
    assert [compiled for _, compiled, _ in order] == sorted(compiled for _, compiled, _ in order)
    last = list(dict.fromkeys(order))[-2 * len(SHAPES) :]
    assert last == [(shape.name, True, point) for point in points[::-1] for shape in SHAPES]


def test_eager_attention_is_captured_and_compiled_where_there_is_no_sdpa() -> None:
    found = {(job.shape.name, job.way.name) for job in jobs(SHAPES, (Point(1, 1024),), WAYS)}
    for way in ("eager-graph", "eager-compiled"):
        assert {shape for shape, name in found if name == way} == {"gpt-oss-20b", "gemma2-9b"}
    assert ("gpt-oss-20b", "sdpa-graph") in found  # whose row says why it is missing


def test_what_the_record_has_is_not_measured_again(tmp_path: Path) -> None:
    record = Record(tmp_path / "record.json", RUN)
    bench = Bench(record, minutes=0, layers=None, device="cpu", dtype=torch.float16)
    job = Job(shape=TOY, point=Point(8, 1024), way=WAYS[0])
    record.add(row(WAYS[0].name, missing="no time was left"))
    assert not bench.has(job)
    record.add(row(WAYS[0].name, 4.0))
    assert bench.has(job)


def test_rows_keep_the_date_of_their_run(tmp_path: Path) -> None:
    """Those of older records, which do not say it, have that of their record."""
    path = tmp_path / "a.json"
    fields = {"model": "toy", "layers": 1, "batch": 8, "context": 1024, "way": "ours"}
    path.write_text(json.dumps({"run": RUN | {"commit": "c0ffee"}, "rows": [fields]}))
    for date in ("tomorrow", "later"):
        record = Record(path, RUN | {"date": date, "commit": date})
        (kept,) = record.rows.values()
        assert (kept.date, kept.commit) == ("today", "c0ffee")
        record.write()


def test_the_document_shows_the_record() -> None:
    (path,) = RESULTS.glob("*-end-to-end.json")
    run, rows = load(path)
    document = DOCUMENT.read_text()
    assert table(rows, run) in document
    assert replaced(document, table(rows, run)) == document


def test_caches_that_cannot_fit_are_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.device("meta"):
        model = e2e_steps.build(SHAPES[0], 2, "meta", torch.bfloat16)

    class Properties:
        total_memory = 80 * 2**30

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    monkeypatch.setattr(type(model), "device", torch.device("cuda"))
    model.config.num_hidden_layers = 32
    ours = WAYS[2]
    assert e2e_steps.too_large(model, Point(8, 32768), ours) is None
    assert "needs 138 GiB of 80" in str(e2e_steps.too_large(model, Point(32, 32768), ours))


def test_unknown_names_are_refused() -> None:
    with pytest.raises(SystemExit, match="allowed: llama3-8b, "):
        end_to_end._chosen(SHAPES, "gpt")


def test_full_windows_of_transformers_are_not_captured() -> None:
    with torch.device("meta"):
        model = e2e_steps.build(WINDOWED[0], None, "meta", torch.float16)
        plain = e2e_steps.build(TOY, None, "meta", torch.float16)
    ways = {way.name: way for way in WAYS}
    assert "window" in str(e2e_steps.no_capture(model, Point(1, 8), ways["eager-graph"]))
    assert e2e_steps.no_capture(model, Point(1, 7), ways["eager-graph"]) is None
    assert e2e_steps.no_capture(plain, Point(1, 8), ways["eager-graph"]) is None
    for way in ("ours-graph", "eager-compiled"):
        assert e2e_steps.no_capture(model, Point(1, 8), ways[way]) is None
