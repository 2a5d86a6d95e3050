"""Loads cubins and launches them. The only user of the CUDA driver."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

from cuda.bindings import driver

from gqa_cutlass.codegen.compile import nvrtc_version
from gqa_cutlass.codegen.config import ARCHES, Arch, KernelConfig
from gqa_cutlass.errors import CompilerMissingError, DeviceError, LaunchError
from gqa_cutlass.store import Store

MIN_CAPABILITY = 80


class _Strides(ctypes.Structure):
    _fields_ = [("batch", ctypes.c_int64), ("token", ctypes.c_int64), ("head", ctypes.c_int64)]


class Params(ctypes.Structure):
    """The kernel's one argument; mirrors templates/include/gqa/params.cuh."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("q", "k_new", "v_new", "k_cache", "v_cache", "out")),
        *((name, ctypes.c_void_p) for name in ("lse", "seqlens", "partials", "tickets", "status")),
        ("q_stride", _Strides),
        ("k_new_stride", _Strides),
        ("v_new_stride", _Strides),
        ("k_cache_stride", _Strides),
        ("v_cache_stride", _Strides),
        ("out_stride", _Strides),
        ("seqlen", ctypes.c_int32),
        ("max_seq_len", ctypes.c_int32),
        ("num_kv_heads", ctypes.c_int32),
        ("num_splits", ctypes.c_int32),
        ("scale_log2", ctypes.c_float),
    ]


@dataclass(frozen=True, kw_only=True)
class Device:
    """What dispatch and launch need to know of a GPU.

    Args:
        index: CUDA ordinal.
        arch: Its compilation target.
        num_sms: Multiprocessors.
    """

    index: int
    arch: Arch
    num_sms: int


@dataclass(frozen=True, kw_only=True)
class LaunchShape:
    """Grid, block and shared memory of one launch.

    Args:
        grid: Blocks in x (KV heads times head blocks), y (splits) and z (sequences).
        block: Threads per block.
        shared_bytes: Dynamic shared memory per block.
    """

    grid: tuple[int, int, int]
    block: int
    shared_bytes: int


class LoadedKernel:
    """A kernel on a device, ready to launch.

    Args:
        config: Which kernel.
        device: Where it was loaded.
        function: The driver's handle.
    """

    def __init__(self, config: KernelConfig, device: Device, function: Any) -> None:
        self.config = config
        self.device = device
        self._function = function

    def prepare(self, shape: LaunchShape) -> Any:
        """Build the driver's launch description, which `launch` takes with a stream."""
        launch = driver.CUlaunchConfig()
        launch.gridDimX, launch.gridDimY, launch.gridDimZ = shape.grid
        launch.blockDimX, launch.blockDimY, launch.blockDimZ = shape.block, 1, 1
        launch.sharedMemBytes = shape.shared_bytes
        launch.numAttrs = 0
        return launch

    def launch(self, prepared: Any, stream: int, params: Params) -> None:
        """Launch on a stream. The arguments are copied before this returns.

        Raises:
            LaunchError: The driver refused.
        """
        prepared.hStream = stream
        pointer = ctypes.c_void_p(ctypes.addressof(params))
        result = driver.cuLaunchKernelEx(prepared, self._function, ctypes.addressof(pointer), 0)
        if result[0] == driver.CUresult.CUDA_ERROR_INVALID_CONTEXT:  # a thread new to CUDA
            _check(driver.cuCtxSetCurrent(_primary_context(self.device.index)), "entering CUDA")
            result = driver.cuLaunchKernelEx(prepared, self._function, ctypes.addressof(pointer), 0)
        _check(result, f"launching {self.config.name}")


_loaded: dict[tuple[KernelConfig, int], LoadedKernel] = {}
_loading = threading.Lock()


def load(config: KernelConfig, device: Device, *, jit: bool | None = None) -> LoadedKernel:
    """Load a kernel on a device, compiling it if need be; the second time it is at hand.

    Args:
        config: The kernel.
        device: Where.
        jit: Whether compiling is allowed; None asks the environment.

    Raises:
        LaunchError: The driver refused the cubin.
        KernelMissingError, StoreError, CompileError, CompilerMissingError: As `Store.get`.
    """
    key = config, device.index
    kernel = _loaded.get(key)
    if kernel is None:
        with _loading:
            kernel = _loaded.get(key) or _load(config, device, jit)
            _loaded[key] = kernel
    return kernel


def _load(config: KernelConfig, device: Device, jit: bool | None) -> LoadedKernel:
    stored = Store.default().get(config, device.arch.name, jit=jit)
    with _context(device.index):
        # Loading allocates, which a capture on another thread of the process would forbid.
        with relaxed_capture():
            module = _check(driver.cuModuleLoadData(stored.compiled.code), f"loading {stored.path}")
        name = config.name.encode()
        function = _check(driver.cuModuleGetFunction(module, name), f"finding {config.name}")
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _check(
            driver.cuFuncSetAttribute(function, attribute, config.shared_bytes),
            f"giving {config.name} {config.shared_bytes} bytes of shared memory",
        )
    return LoadedKernel(config, device, function)


@contextmanager
def relaxed_capture() -> Iterator[None]:
    """Allow calls that a CUDA-graph capture in progress would make fail, on this thread."""
    relaxed = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
    previous = _check(driver.cuThreadExchangeStreamCaptureMode(relaxed), "relaxing capture")
    try:
        yield
    finally:
        _check(driver.cuThreadExchangeStreamCaptureMode(previous), "restoring capture mode")


def capture_id(stream: int) -> int:
    """Identity of the CUDA-graph capture that a stream is part of; 0 when there is none."""
    values = _check(driver.cuStreamGetCaptureInfo(stream), "asking for the stream's capture")
    active = driver.CUstreamCaptureStatus.CU_STREAM_CAPTURE_STATUS_ACTIVE
    return int(values[1]) if values[0] == active else 0


def allocate_zeroed(index: int, num_bytes: int) -> int:
    """Allocate zeroed memory on a GPU, for good. Possible during a capture, and not part of it."""
    with _context(index), relaxed_capture():
        address = int(_check(driver.cuMemAlloc(num_bytes), f"allocating {num_bytes} bytes"))
        # The default stream would join captures on other streams; a private one does not.
        flags = driver.CUstream_flags.CU_STREAM_NON_BLOCKING
        stream = _check(driver.cuStreamCreate(flags), "creating a stream")
        _check(driver.cuMemsetD8Async(address, 0, num_bytes, stream), "zeroing memory")
        _check(driver.cuStreamSynchronize(stream), "zeroing memory")
        _check(driver.cuStreamDestroy(stream), "zeroing memory")
    return address


@cache
def describe_device(index: int) -> Device:
    """Look a GPU up.

    Raises:
        DeviceError: No GPU, no driver, a GPU older than compute capability 8.0, or a driver older
            than the compiler's major version.
    """
    check_driver(_driver_version(), _compiler_major())
    handle = _check(driver.cuDeviceGet(index), f"asking for GPU {index}", DeviceError)
    attributes = driver.CUdevice_attribute
    major = _attribute(handle, attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)
    minor = _attribute(handle, attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)
    num_sms = _attribute(handle, attributes.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)
    return Device(index=index, arch=arch_of(10 * major + minor), num_sms=num_sms)


def arch_of(capability: int) -> Arch:
    """The compilation target for a compute capability (90 for 9.0).

    A GPU between two targets of one major version takes the lower one: cubins run on later minor
    versions (except those of architecture-specific targets, which run on theirs alone).

    Raises:
        DeviceError: Older than 8.0, or not known.
    """
    if capability < MIN_CAPABILITY:
        raise DeviceError(
            f"GPU of compute capability {capability / 10:.1f}: too old; allowed: 8.0 (Ampere) and "
            "newer, for mma.sync m16n8k16 and cp.async. Nothing was launched."
        )
    fits = [arch for arch in ARCHES.values() if _runs_on(arch, capability)]
    if not fits:
        raise DeviceError(
            f"GPU of compute capability {capability / 10:.1f}: not known to this version; known: "
            f"{', '.join(ARCHES)}. Upgrade gqa-cutlass."
        )
    return max(fits, key=lambda arch: arch.capability)


def check_driver(version: int, compiler_major: int) -> None:
    """Raise DeviceError when a driver (13000 for CUDA 13.0) cannot load what NVRTC writes."""
    if version // 1000 < compiler_major:
        raise DeviceError(
            f"CUDA driver: supports CUDA {version // 1000}.{version % 1000 // 10}; needed: "
            f"CUDA {compiler_major}.0 or newer, the version of the compiler (NVRTC). Upgrade the "
            "NVIDIA driver, or install an older NVRTC: "
            f"pip install 'nvidia-cuda-nvrtc<{compiler_major}'"
        )


def _runs_on(arch: Arch, capability: int) -> bool:
    if arch.name.endswith("a"):
        return arch.capability == capability
    return arch.capability <= capability < (arch.capability // 10 + 1) * 10


def driver_version() -> str:
    """The CUDA version that the driver supports, "13.0", or its absence."""
    version = _driver_version()
    return f"{version // 1000}.{version % 1000 // 10}"


def _driver_version() -> int:
    try:
        _check(driver.cuInit(0), "cuInit", DeviceError)
        return int(_check(driver.cuDriverGetVersion(), "asking for the driver's version"))
    except RuntimeError as error:
        raise DeviceError(
            f"no usable GPU: {error}; needed: an NVIDIA GPU of compute capability 8.0 or newer and "
            "its driver. Run `gqa-cutlass doctor` to see what was found."
        ) from error


def _compiler_major() -> int:
    """Major version of NVRTC; 0 without it, when kernels come from elsewhere."""
    try:
        return nvrtc_version()[0]
    except CompilerMissingError:
        return 0


def _attribute(handle: Any, attribute: Any) -> int:
    return int(_check(driver.cuDeviceGetAttribute(attribute, handle), f"asking for {attribute}"))


@cache
def _primary_context(index: int) -> Any:
    """The context that torch uses, retained for good."""
    handle = _check(driver.cuDeviceGet(index), f"asking for GPU {index}")
    return _check(driver.cuDevicePrimaryCtxRetain(handle), f"opening GPU {index}")


@contextmanager
def _context(index: int) -> Iterator[None]:
    """Make the device's primary context current on this thread for a while."""
    _check(driver.cuCtxPushCurrent(_primary_context(index)), "entering the GPU's context")
    try:
        yield
    finally:
        _check(driver.cuCtxPopCurrent(), "leaving the GPU's context")


def _check(result: tuple[Any, ...], doing: str, error: type[Exception] = LaunchError) -> Any:
    """Unpack what a driver call returned, or raise what it says."""
    status, *values = result
    if status != driver.CUresult.CUDA_SUCCESS:
        _, text = driver.cuGetErrorString(status)
        raise error(f"{doing}: {status.name} ({text.decode() if text else 'unknown error'})")
    return values[0] if len(values) == 1 else values
