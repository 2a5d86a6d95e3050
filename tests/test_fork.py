"""Child processes that are forked while other threads are inside the package."""

from __future__ import annotations

import os
import signal
import threading
import traceback
import warnings
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from helpers import call_tensors

import gqa_cutlass
from gqa_cutlass import api
from gqa_cutlass.call import plan as planning
from gqa_cutlass.codegen import ARCHES
from gqa_cutlass.cpu import executor as simulation
from gqa_cutlass.dispatch import model_device
from gqa_cutlass.errors import DeviceError
from gqa_cutlass.gpu import driver as launcher
from gqa_cutlass.gpu import workspace
from gqa_cutlass.gpu.driver import LoadedKernel
from gqa_cutlass.gpu.workspace import OverflowFlag

SECONDS = 120  # after which a child that hangs is ended


def ended_well_in_a_child(work: Callable[[], object]) -> bool:
    """Fork, and do some work in the child; whether it did without an error and without hanging."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of threads that the child has not: they are the subject
        child = os.fork()
    if child == 0:
        signal.alarm(SECONDS)
        try:
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return os.waitpid(child, 0)[1] == 0


class Elsewhere:
    """A thread that is inside something for as long as this lasts."""

    def __init__(self, enter: Callable[[Callable[[], object]], object]) -> None:
        self._inside, self._leave = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=enter, args=(self._stay,))

    def _stay(self, *_: object) -> None:
        self._inside.set()
        self._leave.wait()

    def __enter__(self) -> None:
        self._thread.start()
        self._inside.wait()

    def __exit__(self, *_: object) -> None:
        self._leave.set()
        self._thread.join()


@pytest.fixture(autouse=True)
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans for the CPU that run nothing."""
    monkeypatch.setattr(simulation, "program_of", lambda config: None)
    monkeypatch.setattr(simulation, "run", lambda *_: None)


def test_a_plan_can_be_called_in_a_child_while_a_thread_is_in_its_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tensors = call_tensors()
    plan = gqa_cutlass.plan(**tensors, cache_seqlens=3)

    def call_slowly(stay: Callable[[], object]) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(simulation, "run", stay)
            plan(**tensors, cache_seqlens=3)

    with Elsewhere(call_slowly):
        monkeypatch.setattr(simulation, "run", lambda *_: None)
        assert ended_well_in_a_child(lambda: plan(**tensors, cache_seqlens=4))
    plan(**tensors, cache_seqlens=5)


@pytest.mark.parametrize(
    ("module", "name"), [(workspace, "_lock"), (launcher, "_loading")], ids=["memory", "loading"]
)
def test_what_threads_share_is_free_in_a_child(module: object, name: str) -> None:
    def hold(stay: Callable[[], object]) -> None:
        with getattr(module, name):
            stay()

    def take() -> None:
        assert getattr(module, name).acquire(blocking=False)

    with Elsewhere(hold):
        assert ended_well_in_a_child(take)


def test_a_gpu_does_not_outlive_a_fork(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan for one says so, before it asks CUDA anything."""
    gpu = replace(model_device(ARCHES["sm_90a"]), index=0)
    flag = OverflowFlag(torch.zeros(1, dtype=torch.int32))
    monkeypatch.setattr(api, "_plans", {})
    monkeypatch.setattr(api, "_device_of", lambda tensor: gpu)
    monkeypatch.setattr(api, "load", lambda config, device, jit: LoadedKernel(config, device, 0))
    monkeypatch.setattr(LoadedKernel, "prepare", lambda *_: None)
    monkeypatch.setattr(workspace, "overflow_flag", lambda device: flag)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    tensors = call_tensors()
    plan = gqa_cutlass.plan(**tensors, cache_seqlens=3)
    assert isinstance(plan, planning.GpuPlan)
    monkeypatch.setattr(api, "plan", lambda *_, **__: plan)

    def refused() -> None:
        for call in (plan, gqa_cutlass.gqa_decode):
            with pytest.raises(DeviceError, match=r"forked.*does not outlive.*Use the `spawn`"):
                call(**tensors, cache_seqlens=3)

    assert ended_well_in_a_child(refused)
