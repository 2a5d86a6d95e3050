"""The benchmark of the host's part of a call: what it times, on CPU tensors."""

from __future__ import annotations

import logging

import pytest
import torch
from executors import Notes, running_on
from helpers import call_tensors
from torch import Tensor

from bench import host


def _small_call() -> tuple[host.Arguments, Tensor]:
    tensors = call_tensors(batch=1)
    return tuple(t for name, t in tensors.items() if name != "out"), torch.tensor([5]).int()


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of one call, and nothing to wait for."""
    monkeypatch.setattr(host, "CALLS", 1)
    monkeypatch.setattr(host, "BATCHES", 2)
    monkeypatch.setattr(host, "WARM_UP", 1)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)


@pytest.mark.usefixtures("timed")
def test_host_costs_are_those_of_every_way_to_call() -> None:
    costs = host.medians(host.contenders(*_small_call()))
    assert list(costs) == [
        "plan, out given", "plan", "gqa_decode", host.LOG_CHECK, "SDPA, views made before",
    ]  # fmt: skip
    assert all(micros > 0 for micros in costs.values())
    assert costs[host.LOG_CHECK] < costs["plan"] / 10


def test_the_log_check_is_what_a_launch_asks(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "gqa_cutlass"):
        assert host.log_check() is False
    with caplog.at_level(logging.DEBUG, "gqa_cutlass"):
        assert host.log_check() is True


@pytest.mark.usefixtures("timed")
def test_parts_of_a_call_can_be_timed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    with running_on(Notes()):
        parts = host.parts(*_small_call())
    times = host.medians(parts)
    assert times["  DEBUG log check (off)"] < times["launch"]


def test_the_arguments_of_a_call_are_those_of_the_point() -> None:
    (q, k_cache, *_, v), lengths = host.arguments("cpu")
    assert (q.shape, k_cache.shape, v.shape) == ((1, 32, 128), (1, 1024, 8, 128), (1, 8, 128))
    assert lengths.tolist() == [1023] and lengths.dtype == torch.int32
