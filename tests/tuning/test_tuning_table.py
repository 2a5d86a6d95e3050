"""Tables of what was measured: what they hold, and for whom."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tuned import PROBLEM, X1, choice_for, entry_of, own_tables, saved, tuned_of

from gqa_cutlass.codegen import ARCHES, DType
from gqa_cutlass.codegen.variants import policies_for
from gqa_cutlass.dispatch import Choice, dispatch, model_device
from gqa_cutlass.errors import InputError
from gqa_cutlass.kernels.store import Store
from gqa_cutlass.tuning import table as table_module
from gqa_cutlass.tuning.candidates import candidates
from gqa_cutlass.tuning.table import FOLDER, Table, look_up


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    yield from own_tables(tmp_path, monkeypatch)


def test_a_table_survives_its_file(folder: Path) -> None:
    paged = replace(PROBLEM, page_size=64, policies=policies_for(["block_table"]))
    halved = replace(PROBLEM, policies=policies_for(["float8_e4m3fn"]))
    path = saved(
        folder, tuned_of(PROBLEM), tuned_of(paged), tuned_of(halved),
        tuned_of(replace(PROBLEM, head_dim_v=128)),
    )  # fmt: skip
    table = Table.load(path)
    assert path.name == "nvidia-x1.json" and len(table.found) == 4
    table.save(folder / "again.json")
    assert (folder / "again.json").read_text() == path.read_text()
    for tuned, problem in zip(table.found, (PROBLEM, paged, halved), strict=False):
        assert tuned == tuned_of(problem) and list(tuned.times) == list(tuned_of(problem).times)


def test_a_table_serves_both_types_and_rooms_that_are_nearly_as_large(folder: Path) -> None:
    saved(folder, tuned_of(PROBLEM))
    best = tuned_of(PROBLEM).best
    for changes in ({}, {"max_seq_len": 3277}, {"max_seq_len": 5120}, {"dtype": DType.BF16}):
        problem = replace(PROBLEM, **changes)  # type: ignore[arg-type]
        found = choice_for(problem, X1, ragged=True)
        assert found is not None and found.config.dtype is problem.dtype
        assert (found.splits, found.cluster, found.spare) == (best.splits, best.cluster, best.spare)
        assert dispatch(problem, X1, 0, found, True).num_splits == best.splits
    for changes in (
        {"max_seq_len": 3276}, {"max_seq_len": 5121}, {"batch_size": 5}, {"num_q_heads": 16},
        {"vec_width": 4}, {"num_tokens": 2}, {"window": 7}, {"head_dim_v": 128}, {"page_size": 64},
    ):  # fmt: skip
        assert choice_for(replace(PROBLEM, **changes), X1, ragged=True) is None  # type: ignore[arg-type]


def test_the_nearest_room_is_taken(folder: Path) -> None:
    near = replace(PROBLEM, max_seq_len=6000)
    saved(folder, tuned_of(PROBLEM, best=3), tuned_of(near, best=5))
    found = choice_for(replace(PROBLEM, max_seq_len=5600), X1, ragged=True)
    assert found is not None and found.splits == tuned_of(near, best=5).best.splits


def test_lengths_that_are_known_to_be_equal_count(folder: Path) -> None:
    saved(folder, tuned_of(PROBLEM))
    first, second = tuned_of(PROBLEM).times
    for ragged, expected in ((True, first), (False, second)):
        found = choice_for(PROBLEM, X1, ragged=ragged)
        assert found is not None and replace(found, why=expected.why) == expected


def test_a_bound_of_lengths_counts_as_a_room(folder: Path) -> None:
    bounded = replace(PROBLEM, max_seq_len=512)
    saved(folder, tuned_of(PROBLEM, best=3), tuned_of(bounded, best=5))
    best = tuned_of(bounded, best=5).best
    for longest in (512, 600):
        found = choice_for(PROBLEM, X1, ragged=True, longest=longest)
        assert found is not None and replace(found, why=best.why) == best
    assert choice_for(PROBLEM, X1, ragged=True, longest=8192) == choice_for(
        PROBLEM, X1, ragged=True
    )
    assert choice_for(PROBLEM, X1, ragged=True, longest=1024) is None


def test_another_gpus_table_is_not_used(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    saved(folder, tuned_of(PROBLEM), gpu="NVIDIA Y2")
    with caplog.at_level(logging.INFO, "gqa_cutlass"):
        assert choice_for(PROBLEM, X1, ragged=True) is None
    assert "a table of NVIDIA Y2 is not used on NVIDIA X1" in caplog.text
    assert choice_for(PROBLEM, replace(X1, name=""), ragged=True) is None


def test_the_users_table_comes_before_the_shipped_one(folder: Path) -> None:
    saved(folder, tuned_of(PROBLEM, best=3))
    (folder / FOLDER).rename(folder / "shipped")
    saved(folder, tuned_of(PROBLEM, best=5))
    found = choice_for(PROBLEM, X1, ragged=True)
    assert found is not None and found.splits == tuned_of(PROBLEM, best=5).best.splits


def test_tables_say_what_their_gpus_are_like(folder: Path) -> None:
    """The user's before the shipped ones; those that do not say it are of no GPU to be named."""
    saved(folder, num_sms="100"), saved(folder, gpu="NVIDIA Y2", arch="sm_80", num_sms="108")
    (folder / FOLDER).rename(folder / "shipped")
    saved(folder)
    Table(run={"gpu": "NVIDIA Z3"}).save(folder / FOLDER / "old.json")
    y2 = replace(model_device(ARCHES["sm_80"]), name="NVIDIA Y2", num_sms=108)
    assert table_module.gpus() == {"NVIDIA X1": X1, "NVIDIA Y2": y2}
    assert Table.load(folder / FOLDER / "old.json").device is None


@pytest.mark.parametrize(
    "run", [{"arch": "sm_70"}, {"num_sms": "0"}, {"num_sms": "many"}, {"num_sms": "9" * 5000},
     {"num_sms": "1025"}],
    ids=lambda run: ",".join(f"{key} {value[:5]}" for key, value in run.items()),
)  # fmt: skip
def test_a_gpu_that_there_cannot_be_is_refused(run: dict[str, str], folder: Path) -> None:
    path = saved(folder, tuned_of(PROBLEM), **run)
    with pytest.raises(InputError, match=r"tune: table: got .*nvidia-x1\.json"):
        Table.load(path)
    assert table_module.gpus() == {}


BAD: dict[str, Any] = {
    "no object": [],
    "no problems": {"run": {}},
    "a run that is none": {"run": 3, "problems": []},
    "problems that are none": {"run": {}, "problems": [3]},
    "no size": ("problem", "batch_size", "4"),
    "a size of nothing": ("problem", "head_dim", 0),
    "no feature": ("problem", "policies", ["nonsense"]),
    "no lengths": ("lengths", None, {}),
    "lengths that are none": ("lengths", None, {"a": "b"}),
    "lengths of nobody": ("lengths", "4095 each", []),
    "a length that is none": ("lengths", "4095 each", [-1]),
    "a length without end": ("lengths", "4095 each", [float("inf")]),
    "more heads than numbers": ("problem", "num_kv_heads", 10**400),
    "a size beyond numbers": ("problem", "batch_size", 10**400),
    "no launches": ("launches", None, []),
    "a launch with too little": ("launches", None, [[1]]),
}


@pytest.mark.parametrize("name", BAD)
def test_a_file_that_is_no_table_is_refused_and_by_calls_left_out(
    name: str, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = saved(folder, tuned_of(PROBLEM))
    content = BAD[name]
    if isinstance(content, tuple):
        part, key, value = content
        content = json.loads(path.read_text())
        entry = content["problems"][0]
        (entry if key is None else entry[part])[part if key is None else key] = value
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"tune: table: got .*nvidia-x1\.json"):
        Table.load(path)
    with caplog.at_level(logging.WARNING, "gqa_cutlass"):
        assert choice_for(PROBLEM, X1, ragged=True) is None
    assert "It is not used." in caplog.text


@pytest.mark.parametrize("column", [1, 2, 3])  # tokens, warps and stages
def test_a_size_that_equals_a_whole_number_is_none(column: int, folder: Path) -> None:
    path = saved(folder, tuned_of(PROBLEM))
    Table.load(path)  # whose kernels are known from now on
    content = json.loads(path.read_text())
    launch = content["problems"][0]["launches"][0]
    launch[column] = float(launch[column])
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match="tune: table"):
        Table.load(path)


@pytest.mark.parametrize("column", range(10))
def test_odd_launches_are_refused(column: int, folder: Path) -> None:
    path = saved(folder, tuned_of(PROBLEM))
    for odd in (None, -1, "x", [], 10**30, 10**400, 1.5):
        content = json.loads(path.read_text())
        content["problems"][0]["launches"][0][column] = odd
        path.write_text(json.dumps(content))
        if column == 8 and odd is None:  # the early first tile, which the model may decide
            continue
        with pytest.raises(InputError, match="tune: table"):
            Table.load(path)
        saved(folder, tuned_of(PROBLEM))


# What cannot be launched is left out.


CLUSTERS = next(c for c in candidates(PROBLEM, X1) if c.config.tma)
A1 = replace(model_device(ARCHES["sm_80"]), name="NVIDIA X1")


def test_a_table_of_kernels_for_another_architecture_is_refused(folder: Path) -> None:
    path = saved(folder, entry_of(CLUSTERS), arch="sm_80")
    with pytest.raises(InputError, match=r"tune: table: got .*_tma_.* on sm_80"):
        Table.load(path)
    assert choice_for(PROBLEM, A1, ragged=True) is None


def test_a_table_that_says_another_architecture_is_left_out(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saved(folder, entry_of(CLUSTERS))
    assert choice_for(PROBLEM, A1, ragged=True) is None
    why = "the table of NVIDIA X1, 2026-01-02: it says sm_90a, and the GPU is sm_80. Tune it again."
    assert f"tune: a launch is not used: {why}" in caplog.text
    assert look_up(PROBLEM, A1, ragged=True).left_out == (why,)
    assert look_up(replace(PROBLEM, batch_size=5), A1, ragged=True).left_out == ()


def test_kernels_for_another_architecture_are_left_out_of_tables_that_say_none(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Table(run={"gpu": "NVIDIA X1"}, found=(entry_of(CLUSTERS),)).save(folder / FOLDER / "old.json")
    assert choice_for(PROBLEM, X1, ragged=True) is not None
    assert not caplog.records
    for _ in range(2):
        assert choice_for(PROBLEM, A1, ragged=True) is None
    assert [record.message.count("_tma_") for record in caplog.records] == [1]


def test_the_next_table_is_asked_where_one_cannot_be_followed(folder: Path) -> None:
    plain = next(c for c in candidates(PROBLEM, X1) if not c.config.tma)
    saved(folder, entry_of(plain), arch="sm_80")
    (folder / FOLDER).rename(folder / "shipped")
    Table(run={"gpu": "NVIDIA X1"}, found=(entry_of(CLUSTERS),)).save(folder / FOLDER / "old.json")
    for device, expected in ((X1, CLUSTERS), (A1, plain)):
        found = choice_for(PROBLEM, device, ragged=True)
        assert found is not None and found.config == expected.config


def test_parts_that_take_more_memory_than_caches_are_left_out(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    short = replace(PROBLEM, batch_size=4096, max_seq_len=256)
    plain = next(c for c in candidates(short, X1) if not c.config.tma and not c.spare)
    saved(folder, entry_of(replace(plain, splits=1024), problem=short))
    assert choice_for(short, X1, ragged=True) is None
    assert "1024 splits" in caplog.text and "more than the caches" in caplog.text


def test_a_folder_that_cannot_be_looked_into_has_no_tables(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("GQA_CUTLASS_CACHE_DIR", str(folder / ("x" * 300)))
    assert choice_for(PROBLEM, X1, ragged=True) is None
    assert "File name too long" in caplog.text


def test_kernels_that_may_not_be_compiled_are_left_to_the_model(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Those of a table that were not built: the model's may have been."""
    best = tuned_of(PROBLEM).best
    tiled = replace(best, config=replace(best.config, num_warps=best.config.num_warps // 2))
    saved(folder, entry_of(tiled))
    assert choice_for(PROBLEM, X1, ragged=True) is not None
    monkeypatch.setenv("GQA_CUTLASS_DISABLE_JIT", "1")
    assert choice_for(PROBLEM, X1, ragged=True) is None
    assert f"gqa-cutlass build --arch sm_90a --kernels {tiled.config.name}" in caplog.text
    monkeypatch.delenv("GQA_CUTLASS_DISABLE_JIT")
    Store.default().get(tiled.config, "sm_90a")
    monkeypatch.setenv("GQA_CUTLASS_DISABLE_JIT", "1")
    assert choice_for(PROBLEM, X1, ragged=True) is not None
    for dependent in (False, True):  # of which the kernel is another one
        found = choice_for(PROBLEM, X1, ragged=True, dependent=dependent)
        assert (found is None) is dependent


@pytest.mark.parametrize(("changes", "found"), [
    ({"splits": 0}, "splits: got 0"), ({"splits": True}, "splits: got True"),
    ({"cluster": 2}, "cluster: got 2; allowed: 1"), ({"num_stages": 2}, "num_stages: got 2"),
    ({"spare": 4}, "spare: got 4; allowed: 0, 1, 2, 3"), ({"config": "x"}, "config"),
    ({"prefetch": 3}, "prefetch"), ({"why": 3}, "why"),
], ids=str)  # fmt: skip
def test_a_choice_that_no_launch_is_like_is_refused(changes: dict[str, Any], found: str) -> None:
    config = dispatch(replace(PROBLEM, max_seq_len=16), X1).config
    given: dict[str, Any] = {"config": config, "splits": 3, "num_stages": 1} | changes
    with pytest.raises(InputError, match=found):
        Choice(**given)
