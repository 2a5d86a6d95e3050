"""Torch's private parts that calls go through: trusted only as far as they were tried out."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import make_step
from helpers import check, run
from torch import Tensor

from gqa_cutlass import api
from gqa_cutlass.call.plans import Plans
from gqa_cutlass.gpu import torch_private
from gqa_cutlass.gpu.driver import describe_device
from gqa_cutlass.gpu.executor import GpuExecutor

GUARDS = torch._C._dynamo


@pytest.fixture(autouse=True)
def nothing_tried() -> Iterator[None]:
    """As in a new process, before and after."""
    tried = torch_private._guards_work, torch_private._allocation
    for function in tried:
        function.cache_clear()
    yield
    for function in tried:
        function.cache_clear()


def test_torch_has_what_calls_go_through() -> None:
    """Not needed, but what makes calls cheap: a torch without it should be noticed."""
    one = torch.ones(2, 3)
    assert torch_private.comparison([one])(one.clone())
    assert torch_private._allocation("cpu") is not None
    assert torch_private.frame_callback is GUARDS.eval_frame.get_eval_frame_callback
    assert torch_private.frame_callback() is None


def test_torch_that_does_not_say_whether_it_takes_up_frames_may(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "torch._dynamo", torch)
    assert torch_private._loaded_dynamo() is torch
    monkeypatch.delitem(sys.modules, "torch._dynamo")
    assert torch_private._loaded_dynamo() is None


def test_comparisons_keep_no_tensors() -> None:
    import weakref

    one = torch.ones(2, 3)
    known = weakref.ref(one)
    equal = torch_private.comparison([one])
    del one
    assert known() is None and equal(torch.ones(2, 3))


class _Guards:
    """Guards that answer as they are told to."""

    def __init__(self, answer: Any) -> None:
        self._answer = answer

    def __call__(self, *tensors: Tensor, **_: object) -> Any:
        return self

    def check(self, *tensors: Tensor) -> Any:
        if isinstance(self._answer, Exception):
            raise self._answer
        return self._answer


@pytest.mark.parametrize("answer", [True, False, 1, TypeError("wrong length")], ids=repr)
def test_guards_that_cannot_tell_tensors_apart_are_not_asked(
    monkeypatch: pytest.MonkeyPatch, answer: Any
) -> None:
    monkeypatch.setattr(GUARDS.guards, "TensorGuards", _Guards(answer))
    one = torch.ones(2, 3)
    assert torch_private.comparison([one]) is torch_private.unequal
    assert torch_private.unequal(one) is False


def test_torch_without_these_parts_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GUARDS, "guards", SimpleNamespace())
    assert torch_private.comparison([torch.ones(2, 3)]) is torch_private.unequal
    made = torch_private.allocator((2, 3), torch.float16, torch.device("cpu"))()
    assert made.shape == (2, 3) and made.dtype == torch.float16


def test_torch_without_its_private_device_and_stream_will_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The choice is made on import; this makes it once more, with and without them."""
    ways = {
        "_cuda_getDevice": torch.cuda.current_device,
        "_cuda_getCurrentRawStream": torch_private._handle_of_current_stream,
    }
    for name, public in ways.items():
        monkeypatch.setattr(torch._C, name, len, raising=False)
        assert torch_private._private(name, public) is len
        monkeypatch.delattr(torch._C, name)
        assert torch_private._private(name, public) is public
    stream = SimpleNamespace(cuda_stream=7)
    monkeypatch.setattr(torch.cuda, "current_stream", {3: stream}.get)
    assert torch_private._handle_of_current_stream(3) == 7


@pytest.mark.gpu
def test_private_and_public_ways_to_device_and_stream_agree() -> None:
    assert torch_private.current_device is torch._C._cuda_getDevice
    assert torch_private.current_device() == torch.cuda.current_device()
    for stream in (torch.cuda.default_stream(), torch.cuda.Stream()):
        with torch.cuda.stream(stream):
            handle = torch_private.current_stream(stream.device_index)
            assert handle == torch_private._handle_of_current_stream(stream.device_index)
            assert handle == stream.cuda_stream


@pytest.mark.gpu
def test_calls_run_by_public_ways_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_private, "current_device", torch.cuda.current_device)
    monkeypatch.setattr(torch_private, "current_stream", torch_private._handle_of_current_stream)
    monkeypatch.setattr(GUARDS, "guards", SimpleNamespace())
    monkeypatch.setattr(
        api, "_PLANS", Plans(lambda device: GpuExecutor(describe_device(device.index)))
    )
    step = make_step(lengths=[3000, 10], max_seq_len=4096)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        for _ in range(2):
            out = run(step)
        torch.cuda.current_stream().synchronize()
    check(step, out)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda *_: torch.empty(2, 4, dtype=torch.float16),
        lambda *_: torch.empty(2, 3),
        lambda *_: torch.empty(3, 2, dtype=torch.float16).T,
        lambda *_: torch.empty(2, 3, dtype=torch.float16, device="meta"),
        lambda shape, strides: None,
    ],
    ids=["shape", "dtype", "strides", "device", "arguments"],
)
def test_allocations_that_went_wrong_are_not_repeated(
    monkeypatch: pytest.MonkeyPatch, wrong: Any
) -> None:
    monkeypatch.setattr(GUARDS.guards, "_empty_strided_cpu", wrong)
    made = torch_private.allocator((2, 3), torch.float16, torch.device("cpu"))()
    assert made.shape == (2, 3) and made.dtype == torch.float16 and made.is_contiguous()


@pytest.mark.parametrize("shape", [(2, 8, 64), (2, 1, 8, 64), (1,)])
def test_allocated_tensors_are_contiguous(shape: tuple[int, ...]) -> None:
    made = torch_private.allocator(shape, torch.bfloat16, torch.device("cpu"))()
    assert made.shape == shape and made.is_contiguous() and made.dtype == torch.bfloat16
