"""What calls, `explain` and `warmup` make of tables of launches."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from executors import Notes
from helpers import call_tensors
from tuned import PROBLEM, X1, entry_of, forget, own_tables, saved, tuned_of

import gqa_cutlass
from gqa_cutlass import GQADecodeConfig, gqa_decode
from gqa_cutlass.codegen import DType
from gqa_cutlass.dispatch import Device, dispatch
from gqa_cutlass.errors import DeviceError, InputError
from gqa_cutlass.tuning.candidates import candidates
from gqa_cutlass.tuning.table import FOLDER, look_up

SHORT = replace(PROBLEM, batch_size=4096, max_seq_len=256)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    yield from own_tables(tmp_path, monkeypatch)


def test_calls_launch_what_the_table_says(folder: Path, notes: Notes) -> None:
    saved(folder, tuned_of(PROBLEM))
    notes.device = replace(notes.device, name="NVIDIA X1")
    tensors = call_tensors(batch=4, max_seq_len=4096)
    lengths = torch.zeros(4, dtype=torch.int32)
    gqa_decode(**tensors, cache_seqlens=lengths)
    gqa_decode(**tensors, cache_seqlens=lengths, num_splits=1)
    gqa_decode(**tensors, cache_seqlens=lengths, batch_invariant=True)
    first = tuned_of(PROBLEM).best
    assert [shape.grid[1] for shape in notes.shapes] == [
        first.splits + first.spare, 1, dispatch(PROBLEM, X1, invariant=True).num_splits,
    ]  # fmt: skip


@pytest.mark.parametrize("table", [False, True], ids=["model", "table"])
def test_explain_says_what_calls_launch(table: bool, folder: Path, notes: Notes) -> None:
    """Of lengths on the device, or of one int for all, which cannot differ."""
    if table:
        saved(folder, tuned_of(PROBLEM))
    notes.device = replace(notes.device, name="NVIDIA X1")
    sizes = {} if table else {"batch": 9, "q_heads": 8, "kv_heads": 8, "head_dim": 32}
    tensors = call_tensors(**{"batch": 4, "max_seq_len": 4096} | sizes)
    gqa_decode(**tensors, cache_seqlens=torch.zeros(len(tensors["q"]), dtype=torch.int32))
    gqa_decode(**tensors, cache_seqlens=0)
    said = [
        gqa_cutlass.explain(**tensors, gpu="NVIDIA X1" if table else None, ragged=ragged)
        for ragged in (True, False)
    ]
    assert [found.by_table for found in said] == [table, table]
    assert [found.dispatch.shape for found in said] == notes.shapes
    assert notes.shapes[0] != notes.shapes[1]


def _explained(changes: dict[str, Any], **options: Any) -> Any:
    tensors = call_tensors(**{"batch": 4, "max_seq_len": 4096, "device": "meta"} | changes)
    return gqa_cutlass.explain(**tensors, **options)


def test_explain_says_which_decided(folder: Path) -> None:
    saved(folder, tuned_of(PROBLEM))
    best, second = tuned_of(PROBLEM).times
    named: dict[str, Any] = {"gpu": "NVIDIA X1"}
    found = _explained({}, **named)
    assert (found.decided, found.by_table) == ("by the table of NVIDIA X1, 2026-01-02", True)
    assert found.device == X1 and found.dispatch.config == best.config
    assert found.dispatch.num_splits == best.splits
    equal = _explained({}, **named, ragged=False, max_seqlen=4096)
    assert equal.by_table and equal.dispatch.num_splits == second.splits
    of_bf16 = _explained({"dtype": torch.bfloat16}, **named, arch="sm_90a")
    assert of_bf16.by_table and of_bf16.dispatch.config.dtype is DType.BF16
    for changes, options, by in (
        ({"batch": 5}, named, "by the model: no table of NVIDIA X1 has this"),
        ({}, named | {"max_seqlen": 512}, "by the model: no table of NVIDIA X1 has this"),
        ({}, named | {"num_splits": 3}, "by the model, within what was asked for"),
        ({}, named | {"batch_invariant": True}, "by the model, within what was asked for"),
        ({}, {}, "by the model: no GPU is named, so no table is looked into"),
        ({}, {"arch": "sm_90a"}, "by the model: no GPU is named, so no table is looked into"),
    ):
        found = _explained(changes, **options)
        assert (found.decided, found.by_table) == (by, False)
        assert "by the table" not in str(found)


def test_explain_looks_into_tables_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that who decided and what runs are of one answer."""
    asked = []

    def noted(*given: Any, **options: Any) -> Any:
        asked.append(options)
        return look_up(*given, **options)

    monkeypatch.setattr("gqa_cutlass.call.layout.look_up", noted)
    saved(folder, tuned_of(PROBLEM))
    assert _explained({}, gpu="NVIDIA X1", dependent=True, max_seqlen=4000).by_table
    assert asked == [{"ragged": True, "longest": 4096, "dependent": True}]
    assert not _explained({"batch": 5}, gpu="NVIDIA X1").by_table
    assert len(asked) == 2
    _explained({}, gpu="NVIDIA X1", num_splits=3)
    assert len(asked) == 2


def test_explain_names_the_table_once(folder: Path) -> None:
    saved(folder, tuned_of(PROBLEM))
    for options, lengths in (({}, "all"), ({"ragged": False}, "equal")):
        found = _explained({}, gpu="NVIDIA X1", **options)
        first = f"this kernel and launch, which measured best over {lengths} lengths"
        assert found.dispatch.reasons[0] == first
        assert str(found).count("table") == str(found).count("2026-01-02") == 1


LEFT_OUT = {
    "another architecture": "it says sm_80, and the GPU is sm_90a. Tune it again.",
    "not built": "nothing is compiled during a CUDA-graph capture or with GQA_CUTLASS_DISABLE_JIT",
    "too much memory": "1024 splits, .* parts take .*, more than the caches; allowed: 536870912.",
}


@pytest.mark.parametrize("case", LEFT_OUT)
def test_explain_says_why_a_tables_launch_was_left_out(
    case: str, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing is logged for that, which calls do once."""
    plain = next(c for c in candidates(SHORT, X1) if not c.config.tma and not c.spare)
    if case == "another architecture":
        monkeypatch.setattr("gqa_cutlass.devices.at_hand", lambda: [X1])
        saved(folder, entry_of(plain, problem=SHORT), arch="sm_80")
    elif case == "not built":
        monkeypatch.setenv("GQA_CUTLASS_DISABLE_JIT", "1")
        saved(folder, entry_of(plain, problem=SHORT))
    else:
        saved(folder, entry_of(replace(plain, splits=1024), problem=SHORT))
    sizes = {"batch": SHORT.batch_size, "max_seq_len": SHORT.max_seq_len}
    found = _explained(sizes, gpu="NVIDIA X1")
    (why,) = found.facts()["left_out"]
    assert re.fullmatch(f"the table of NVIDIA X1, 2026-01-02: .*{LEFT_OUT[case]}.*", why)
    assert found.left_out == (why,) and f"\nleft out   {why}\n" in str(found)
    by = "by the model: what a table of NVIDIA X1 has cannot be launched"
    assert (found.decided, found.by_table) == (by, False)
    assert found.dispatch == dispatch(SHORT, X1, ragged=True)
    assert not caplog.records
    other = _explained(sizes | {"batch": 5}, gpu="NVIDIA X1")
    assert other.facts()["left_out"] == [] and "left out" not in str(other)


def test_explain_says_what_was_left_out_before_another_table_decided(folder: Path) -> None:
    plain = next(c for c in candidates(SHORT, X1) if not c.config.tma and not c.spare)
    saved(folder, entry_of(plain, problem=SHORT), date="2026-02-03")
    (folder / FOLDER).rename(folder / "shipped")
    saved(folder, entry_of(replace(plain, splits=1024), problem=SHORT))
    sizes = {"batch": SHORT.batch_size, "max_seq_len": SHORT.max_seq_len}
    found = _explained(sizes, gpu="NVIDIA X1")
    assert found.decided == "by the table of NVIDIA X1, 2026-02-03"
    (why,) = found.left_out
    assert why.startswith("the table of NVIDIA X1, 2026-01-02: it says")


def test_explain_refuses_gpus_that_nothing_is_known_of(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gqa_cutlass.devices.at_hand", list)
    saved(folder), saved(folder, gpu="NVIDIA Y2", arch="sm_80")
    for name in ("NVIDIA Z3", "", 3, ["NVIDIA X1"]):
        with pytest.raises(InputError, match="gpu: got .* of launches: 'NVIDIA X1', 'NVIDIA Y2'"):
            _explained({}, gpu=name)
    with pytest.raises(InputError, match="arch: got sm_90a for NVIDIA Y2; allowed: sm_80"):
        _explained({}, gpu="NVIDIA Y2", arch="sm_90a")


def test_explain_takes_the_gpu_at_hand_by_name(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it is, whatever a table says of it; those that cannot be used are none."""

    def described(device: torch.device) -> Device:
        if device.index == 1:
            raise DeviceError("too old")
        return replace(X1, index=device.index, num_sms=100 + device.index)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr("gqa_cutlass.devices.gpu", described)
    assert _explained({}, gpu="NVIDIA X1").decided.endswith("no table of NVIDIA X1 has this")
    saved(folder, tuned_of(PROBLEM))
    forget()
    found = _explained({}, gpu="NVIDIA X1")
    assert found.by_table and found.device.num_sms == 100


def test_warmup_loads_what_the_tables_take(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A capture may compile nothing, other tiles included."""
    monkeypatch.setattr("gqa_cutlass.ahead.gpu", lambda device: X1)
    monkeypatch.setattr("gqa_cutlass.ahead.device_of", lambda device: torch.device("cuda", 0))
    monkeypatch.setattr("gqa_cutlass.ahead.load", lambda config, device: None)
    tuned = tuned_of(PROBLEM)
    half = {c: replace(c.config, num_warps=c.config.num_warps // 2) for c in tuned.times}
    tiled = {replace(c, config=half[c]): times for c, times in tuned.times.items()}
    saved(folder, replace(tuned, times=tiled))
    step = GQADecodeConfig(
        batch_size=4, cache_len=0, num_q_heads=8, num_kv_heads=2, head_dim=64, scale=0.125,
        max_seq_len=4096,
    )  # fmt: skip
    loaded = gqa_cutlass.warmup([step])
    assert {choice.config for choice in tiled} <= {*loaded}
    assert dispatch(PROBLEM, X1).config in loaded
