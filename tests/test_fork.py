"""Child processes that are forked while other threads are inside the package."""

from __future__ import annotations

import os
import signal
import threading
import traceback
import warnings
from collections.abc import Callable

import pytest
from executors import Notes, running_on
from helpers import call_tensors

import gqa_cutlass
from gqa_cutlass.cpu import executor as cpu
from gqa_cutlass.errors import DeviceError
from gqa_cutlass.gpu import driver, workspace

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
    monkeypatch.setattr(cpu, "program_of", lambda config: None)
    monkeypatch.setattr(cpu, "run", lambda *_: None)


def test_a_plan_can_be_called_in_a_child_while_a_thread_is_in_its_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tensors = call_tensors()
    plan = gqa_cutlass.plan(**tensors, cache_seqlens=3)

    def call_slowly(stay: Callable[[], object]) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(cpu, "run", stay)
            plan(**tensors, cache_seqlens=3)

    with Elsewhere(call_slowly):
        monkeypatch.setattr(cpu, "run", lambda *_: None)
        assert ended_well_in_a_child(lambda: plan(**tensors, cache_seqlens=4))
    plan(**tensors, cache_seqlens=5)


@pytest.mark.parametrize(
    ("module", "name"), [(workspace, "_lock"), (driver, "_loading")], ids=["memory", "loading"]
)
def test_what_threads_share_is_free_in_a_child(module: object, name: str) -> None:
    def hold(stay: Callable[[], object]) -> None:
        with getattr(module, name):
            stay()

    def take() -> None:
        assert getattr(module, name).acquire(blocking=False)

    with Elsewhere(hold):
        assert ended_well_in_a_child(take)


def test_a_gpu_does_not_outlive_a_fork() -> None:
    """A plan for one says so, before it asks CUDA anything."""
    with running_on(Notes()):
        tensors = call_tensors()
        plan = gqa_cutlass.plan(**tensors, cache_seqlens=3)
        gqa_cutlass.gqa_decode(**tensors, cache_seqlens=3)  # whose plan the child finds

        def refused() -> None:
            for call in (plan, gqa_cutlass.gqa_decode):
                with pytest.raises(DeviceError, match=r"forked.*does not outlive.*Use the `spawn`"):
                    call(**tensors, cache_seqlens=3)

        assert ended_well_in_a_child(refused)
