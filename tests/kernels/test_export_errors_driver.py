"""What the C library says of a driver or GPU that is missing or fails, and whose error it is."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from threading import Thread

import pytest
import torch
from c_library import STATUSES, Library, config_of, fresh_library, workspace_of
from c_refusals import CLUSTERS, STEP, nothing_happened
from cases import Step, make_step
from helpers import REPOSITORY

import gqa_cutlass

DRIVER_C = REPOSITORY / "templates" / "bundle" / "src" / "gqa_driver.c"
LOOKED_UP = re.findall(r'find\(library, "(cu\w+)"', DRIVER_C.read_text())


@pytest.fixture
def library() -> Library:
    """As in a new process."""
    return fresh_library()


@pytest.fixture
def step() -> Step:
    """A step of two sequences of which the library has the kernel, and which needs no workspace."""
    return make_step(**STEP)


def every_call(library: Library, step: Step) -> list[str]:
    """The statuses of all functions that need a GPU."""
    config = config_of(step)
    overflow = torch.zeros(1, dtype=torch.int32)
    return [
        library.decode(step),
        library.decode_ragged(step, overflow),
        STATUSES[library.c.gqa_workspace_size(config, ctypes.c_size_t())],
        STATUSES[library.c.gqa_prepare(config)],
    ]


def test_no_driver_is_said(library: Library, step: Step) -> None:
    library.driver.remove()
    assert every_call(library, step) == ["GQA_ERROR_NO_DRIVER"] * 4
    assert nothing_happened(
        library, "no usable GPU: ", "libcuda.so.1: cannot open shared object file",
        "needed: an NVIDIA GPU and its driver.",
    )  # fmt: skip


def test_the_fake_driver_has_what_is_looked_up_and_no_more(library: Library) -> None:
    assert sorted(library.driver.functions()) == sorted(LOOKED_UP)


@pytest.mark.parametrize("function", LOOKED_UP)
def test_a_driver_that_lacks_a_function_is_too_old(
    library: Library, step: Step, function: str
) -> None:
    library.driver.hide(function)
    assert every_call(library, step) == ["GQA_ERROR_NO_DRIVER"] * 4
    assert nothing_happened(
        library, f"libcuda.so.1 has no {function}; needed: a driver for CUDA 12"
    )
    assert library.driver.calls("cuInit") == 0


def test_a_machine_without_a_gpu_is_said(library: Library, step: Step) -> None:
    library.driver.fail("cuInit", 100)
    assert every_call(library, step) == ["GQA_ERROR_NO_DRIVER"] * 4
    assert nothing_happened(library, "no usable GPU: cuInit: CUDA_ERROR_NO_DEVICE; needed: ")
    assert library.driver.calls("cuInit") == 1


@pytest.mark.parametrize(
    ("capability", "message"),
    [
        (75, "capability 7.5: too old; allowed: 8.0 and newer."),
        (70, "capability 7.0: too old; allowed: 8.0 and newer."),
        (100, "capability 10.0: this library was exported without kernels for it."),
        (103, "capability 10.3: this library was exported without kernels for it."),
        (121, "capability 12.1: this library was exported without kernels for it."),
    ],
)
def test_a_gpu_without_kernels_is_refused(
    library: Library, step: Step, capability: int, message: str
) -> None:
    library.driver.set_device(0, capability)
    for _ in range(2):
        assert every_call(library, step) == ["GQA_ERROR_DEVICE"] * 4
        assert nothing_happened(library, f"GPU of compute {message}")
    assert ("--arch" in library.error) == (capability >= 80)


# Functions that fail once, after so many calls that do not: the status, and what was being done.
FAILURES: dict[str, tuple[str, int, str, str]] = {
    "context": ("cuCtxGetCurrent", 0, "GQA_ERROR_NO_DRIVER", "entering the GPU"),
    "device": ("cuDeviceGet", 0, "GQA_ERROR_NO_DRIVER", "entering the GPU"),
    "opening": ("cuDevicePrimaryCtxRetain", 0, "GQA_ERROR_NO_DRIVER", "entering the GPU"),
    "entering": ("cuCtxSetCurrent", 0, "GQA_ERROR_NO_DRIVER", "entering the GPU"),
    "current device": ("cuCtxGetDevice", 0, "GQA_ERROR_NO_DRIVER", "entering the GPU"),
    "major": ("cuDeviceGetAttribute", 0, "GQA_ERROR_NO_DRIVER", "asking for the GPU's kind"),
    "minor": ("cuDeviceGetAttribute", 1, "GQA_ERROR_NO_DRIVER", "asking for the GPU's kind"),
    "SMs": ("cuDeviceGetAttribute", 2, "GQA_ERROR_NO_DRIVER", "asking for the GPU's kind"),
    "capture": ("cuThreadExchangeStreamCaptureMode", 0, "GQA_ERROR_LAUNCH", "loading {kernel}"),
    "image": ("cuLibraryLoadData", 0, "GQA_ERROR_LAUNCH", "loading {kernel}"),
    "kernel": ("cuLibraryGetKernel", 0, "GQA_ERROR_LAUNCH", "loading {kernel}"),
    "shared memory": ("cuKernelSetAttribute", 0, "GQA_ERROR_LAUNCH", "loading {kernel}"),
    "function": ("cuKernelGetFunction", 0, "GQA_ERROR_LAUNCH", "loading {kernel}"),
    "launch": ("cuLaunchKernelEx", 0, "GQA_ERROR_LAUNCH", "launching {kernel}"),
    "keys": ("cuTensorMapEncodeTiled", 0, "GQA_ERROR_LAUNCH", "describing the caches"),
    "values": ("cuTensorMapEncodeTiled", 1, "GQA_ERROR_LAUNCH", "describing the caches"),
}


@pytest.mark.parametrize(("function", "skip", "status", "doing"), FAILURES.values(), ids=FAILURES)
@pytest.mark.parametrize(
    ("error", "text"),
    [(2, "CUDA_ERROR_OUT_OF_MEMORY (out of memory)"), (99999, "unknown error (no description)")],
    ids=["known", "unknown"],
)
def test_what_the_driver_refuses_is_said_and_can_be_repeated(
    library: Library, function: str, skip: int, status: str, doing: str, error: int, text: str
) -> None:
    step = make_step(**CLUSTERS)
    chosen = gqa_cutlass.plan(*step.tensors(), cache_seqlens=3, out=step.out).dispatch
    workspace = workspace_of(chosen)
    config = config_of(step, workspace)
    library.driver.fail(function, error, skip=skip, times=1)
    asked = int(function == "cuLaunchKernelEx")
    assert library.decode(step, config) == status
    doing = doing.format(kernel=chosen.config.name)
    assert nothing_happened(library, f"{doing}: {text}. Nothing", launches=asked)
    assert library.driver.capture_mode == 0
    assert library.decode(step, config) == "GQA_SUCCESS", library.error
    assert library.driver.launches == asked + 1
    assert library.driver.loads(chosen.config.name) == 1


def test_an_image_without_its_kernel_is_unloaded(library: Library, step: Step) -> None:
    library.driver.fail("cuLibraryGetKernel", 500)
    for count in (1, 2, 3):
        assert library.decode(step) == "GQA_ERROR_LAUNCH"
        assert nothing_happened(library, "CUDA_ERROR_NOT_FOUND (named symbol not found)")
        assert library.driver.calls("cuLibraryUnload") == count
        assert library.driver.calls("cuLibraryLoadData") == count


def in_a_thread(call: Callable[[], None]) -> None:
    """Run it in a new thread to its end."""
    thread = Thread(target=call)
    thread.start()
    thread.join()


def test_the_last_error_is_its_threads(library: Library, step: Step) -> None:
    seen: list[str] = []

    def fail_elsewhere() -> None:
        seen.append(library.error)
        library.decode(step, q=None)
        seen.append(library.error)

    library.decode(step, k=None)
    in_a_thread(fail_elsewhere)
    assert seen[0] == "" and seen[1].startswith("q: got null")
    assert library.error.startswith("k: got null")


def test_success_leaves_the_last_error(library: Library, step: Step) -> None:
    library.decode(step, k=None)
    assert library.decode(step) == "GQA_SUCCESS"
    assert library.error.startswith("k: got null")


def test_statuses_have_names(library: Library) -> None:
    names = [library.c.gqa_status_name(status).decode() for status in range(len(STATUSES))]
    assert tuple(names) == STATUSES
    for status in (-1, len(STATUSES), 2**31 - 1, -(2**31)):
        assert library.c.gqa_status_name(status) == b"unknown status"
