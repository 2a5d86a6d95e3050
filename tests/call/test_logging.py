"""The log: one line per launch at DEBUG, with every parameter; above it, just a question."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import pytest
import torch
from cases import Step, make_step
from helpers import skip_unless_it_runs

import gqa_cutlass
from gqa_cutlass import GQADecodeConfig, Plan, gqa_attention_decode, gqa_decode
from gqa_cutlass.call.record import LOG, LaunchRecord, parse
from gqa_cutlass.codegen import DType, Math, Schedule, default_config
from gqa_cutlass.cpu.executor import CpuExecutor

KEYS = [
    "kernel", "grid", "cluster", "block", "shared_bytes", "num_splits", "num_stages", "dependent",
    "batch_size", "num_q_heads", "num_kv_heads", "group_size", "head_dim", "head_dim_v",
    "max_seq_len", "num_tokens", "num_new_tokens", "dtype", "out_dtype", "append", "cache_seqlens",
    "softmax_scale", "return_lse", "softcap", "sinks", "window_size", "alibi", "leftpad",
    "batch_idx", "page_size", "workspace_bytes", "device", "stream",
]  # fmt: skip
TMA = default_config(Math.TENSOROP, DType.F16, 128, 4, 8, Schedule.TMA)


def step_on(device: str, **sizes: Any) -> Step:
    """A step of two sequences with 10 tokens each."""
    return make_step(**{"lengths": [10, 10], "max_seq_len": 64} | sizes, device=device)


def by_decode(step: Step) -> None:
    gqa_decode(*step.tensors(), cache_seqlens=10)


def by_plan(step: Step) -> None:
    gqa_cutlass.plan(*step.tensors(), cache_seqlens=10)(*step.tensors(), 10)


def by_the_storys_call(step: Step) -> None:
    q, k_cache, v_cache, k, v = step.tensors()
    assert k is not None and v is not None
    config = GQADecodeConfig(
        batch_size=2, cache_len=10, num_q_heads=8, num_kv_heads=2, head_dim=128, scale=step.scale,
        max_seq_len=64,
    )  # fmt: skip
    tokens = (t.unsqueeze(1) for t in (q, k, v))
    gqa_attention_decode(step.out.view(2, 1, 1024), *tokens, k_cache, v_cache, config)


def launches(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The lines of launches, all of which the package wrote at DEBUG."""
    found = [r for r in caplog.records if r.getMessage().startswith("launch")]
    assert all((r.name, r.levelno) == ("gqa_cutlass", logging.DEBUG) for r in found)
    return [r.getMessage() for r in found]


@pytest.mark.parametrize("call", [by_decode, by_plan, by_the_storys_call])
def test_every_call_logs_one_line(
    call: Callable[[Step], None], caplog: pytest.LogCaptureFixture, device: str
) -> None:
    step = step_on(device)
    with caplog.at_level(logging.DEBUG, logger="gqa_cutlass"):
        for count in (1, 2, 3):
            call(step)
            assert len(launches(caplog)) == count
    assert len(set(launches(caplog))) == 1


@pytest.mark.parametrize("call", [by_decode, by_plan, by_the_storys_call])
def test_a_line_comes_apart_into_every_key(
    call: Callable[[Step], None], caplog: pytest.LogCaptureFixture, device: str
) -> None:
    with caplog.at_level(logging.DEBUG, logger="gqa_cutlass"):
        call(step_on(device))
    (message,) = launches(caplog)
    found = dict(part.split("=", 1) for part in message.split()[1:])
    assert message.split()[0] == "launch"
    assert list(found) == KEYS == [field.name for field in fields(LaunchRecord)]
    assert all(found.values())
    assert parse(message) == found


def expected_of(plan: Plan, device: str) -> dict[str, str]:
    """What a line must say of a plan, but for what is the call's."""
    chosen, shape, problem = plan.dispatch, plan.dispatch.shape, plan.problem
    x, y, z = shape.grid
    return {
        "kernel": chosen.config.name,
        "grid": f"{x},{y},{z}",
        "cluster": f"1,{shape.cluster},1",
        "block": str(shape.block),
        "shared_bytes": str(shape.shared_bytes),
        "num_splits": str(chosen.num_splits),
        "num_stages": str(chosen.num_stages),
        "batch_size": str(problem.batch_size),
        "num_q_heads": str(problem.num_q_heads),
        "num_kv_heads": str(problem.num_kv_heads),
        "group_size": str(problem.num_q_heads // problem.num_kv_heads),
        "head_dim": str(problem.head_dim),
        "head_dim_v": str(problem.value_dim),
        "max_seq_len": str(problem.max_seq_len),
        "num_tokens": "1",
        "num_new_tokens": "1",
        "dtype": str(chosen.config.dtype),
        "out_dtype": str(chosen.config.dtype),
        "workspace_bytes": str(4 * (chosen.partial_floats + chosen.num_merge_counters)),
        "device": "cpu" if device == "cpu" else str(torch.cuda.current_device()),
    }


# Sizes of the step, options of the plan, and what only they decide of the line.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, str]]] = {
    "plain": ({}, {}, {}),
    "bfloat16": ({"dtype": DType.BF16, "head_dim": 64}, {}, {"dtype": "bf16", "head_dim": "64"}),
    "groups": ({"num_kv_heads": 1, "group_size": 6}, {}, {"num_q_heads": "6", "group_size": "6"}),
    "attend only": ({"append": False}, {}, {"append": "False", "num_new_tokens": "0"}),
    "splits": ({"max_seq_len": 300}, {"num_splits": 3}, {"num_splits": "3"}),
    "clusters": ({"max_seq_len": 600}, {"num_splits": 4, "kernel": TMA}, {"cluster": "1,4,1"}),
    "scale": ({}, {"softmax_scale": 0.3}, {"softmax_scale": "0.3"}),
    "integral scale": ({}, {"softmax_scale": 1}, {"softmax_scale": "1.0"}),
    "lse": ({}, {"return_lse": True}, {"return_lse": "True"}),
    "softcap": ({}, {"softcap": 30}, {"softcap": "30.0"}),
    "sinks": ({}, {"sinks": "per head"}, {"sinks": "True"}),
    "float32": ({}, {"out_dtype": torch.float32}, {"out_dtype": "f32"}),
    "a window": ({}, {"window_size": (5, 3)}, {"window_size": "5,-1"}),
    "dependent": ({}, {"dependent": True}, {"dependent": "True"}),
    "lengths on the device": ({"lengths": [10, 3]}, {}, {"cache_seqlens": "device"}),
}


@pytest.mark.parametrize(("sizes", "options", "decided"), CASES.values(), ids=CASES)
def test_the_line_says_what_the_plan_does(
    sizes: dict[str, Any], options: dict[str, Any], decided: dict[str, str],
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, device: str,
) -> None:  # fmt: skip
    if "kernel" in options:
        skip_unless_it_runs(options["kernel"], device)
    if device == "cpu":  # the line is the plan's, whatever its kernel does
        monkeypatch.setattr(CpuExecutor, "prepare", lambda *_: lambda stream: None)
    step = step_on(device, **sizes)
    lengths = step.seqlens if "lengths" in sizes else 10
    if "sinks" in options:
        options = {"sinks": step.q.new_zeros(step.q.shape[1])}
    plan = gqa_cutlass.plan(*step.tensors(), cache_seqlens=lengths, **options)
    with caplog.at_level(logging.DEBUG, logger="gqa_cutlass"):
        plan(*step.tensors(), lengths)
    (message,) = launches(caplog)
    usual = {
        "dependent": "False", "append": "True", "cache_seqlens": "10", "return_lse": "False",
        "softmax_scale": str(step.scale), "softcap": "0.0", "sinks": "False",
        "window_size": "-1,-1", "alibi": "False", "leftpad": "False",
        "batch_idx": "False",
        "page_size": "0",
    }  # fmt: skip
    found = parse(message)
    stream = found.pop("stream")
    assert stream == "0x0" if device == "cpu" else int(stream, 16) >= 0
    assert found == expected_of(plan, device) | usual | decided


def test_the_length_is_that_of_the_call(caplog: pytest.LogCaptureFixture, device: str) -> None:
    step = step_on(device)
    plan = gqa_cutlass.plan(*step.tensors(), cache_seqlens=10)
    with caplog.at_level(logging.DEBUG, logger="gqa_cutlass"):
        for length in (0, 7, 63):
            plan(*step.tensors(), length)
    assert [parse(line)["cache_seqlens"] for line in launches(caplog)] == ["0", "7", "63"]


def test_workspace_is_counted_where_there_is_some(
    caplog: pytest.LogCaptureFixture, device: str
) -> None:
    with caplog.at_level(logging.DEBUG, logger="gqa_cutlass"):
        for splits in (1, 2):
            step = step_on(device)
            gqa_decode(*step.tensors(), cache_seqlens=10, num_splits=splits)
    without, some = (int(parse(line)["workspace_bytes"]) for line in launches(caplog))
    assert without == 0
    # 2 splits of 2 sequences and 2 KV heads: O, m and l of each row of a block's 8; a counter each.
    assert some == 4 * (2 * 2 * 2 * 8 * (128 + 2) + 2 * 2)


def test_a_launch_on_a_gpu_names_it_and_its_stream(caplog: pytest.LogCaptureFixture) -> None:
    step = step_on("cpu")
    plan = gqa_cutlass.plan(*step.tensors(), cache_seqlens=10)
    with caplog.at_level(logging.DEBUG, logger="gqa_cutlass"):
        plan.log(10, 3, 0x7F3A_0000_1C40)
    (message,) = launches(caplog)
    assert message.endswith(" device=3 stream=0x7f3a00001c40")


def test_an_int_length_that_is_refused_logs_nothing(
    caplog: pytest.LogCaptureFixture, device: str
) -> None:
    step = step_on(device)
    with (
        caplog.at_level(logging.DEBUG, logger="gqa_cutlass"),
        pytest.raises(gqa_cutlass.CacheOverflowError),
    ):
        gqa_decode(*step.tensors(), cache_seqlens=64)
    assert launches(caplog) == []


def _fail(*_: object) -> Any:
    raise AssertionError("something was made for the log")


@pytest.fixture
def nothing_for_the_log(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is made for the log's line fails the test."""
    monkeypatch.setattr(Plan, "log", _fail)
    monkeypatch.setattr(LaunchRecord, "of", _fail)
    monkeypatch.setattr(LaunchRecord, "__str__", _fail)


@pytest.mark.usefixtures("nothing_for_the_log")
@pytest.mark.parametrize("level", [logging.INFO, logging.WARNING, logging.CRITICAL])
@pytest.mark.parametrize("call", [by_decode, by_plan, by_the_storys_call])
def test_above_debug_nothing_is_made_for_the_log(
    call: Callable[[Step], None], level: int, caplog: pytest.LogCaptureFixture, device: str
) -> None:
    with caplog.at_level(level, logger="gqa_cutlass"):
        call(step_on(device))
    assert launches(caplog) == []


def test_above_debug_a_call_asks_once(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    step = step_on(device)
    plan = gqa_cutlass.plan(*step.tensors(), cache_seqlens=10)
    asked: list[int] = []
    monkeypatch.setattr(LOG, "isEnabledFor", lambda level: asked.append(level))
    plan(*step.tensors(), 10)
    assert asked == [logging.DEBUG]


@contextmanager
def deaf() -> Iterator[None]:
    """The package logs at DEBUG, and its only handler takes warnings."""
    handler, level = logging.StreamHandler(), LOG.level
    handler.setLevel(logging.WARNING)
    LOG.addHandler(handler)
    LOG.setLevel(logging.DEBUG)
    LOG.propagate = False
    try:
        yield
    finally:
        LOG.propagate = True
        LOG.setLevel(level)
        LOG.removeHandler(handler)


def test_the_text_is_made_for_who_wants_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LaunchRecord, "__str__", _fail)
    with deaf():
        by_decode(step_on("cpu"))
