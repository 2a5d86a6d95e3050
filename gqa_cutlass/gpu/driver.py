"""Loads cubins and launches them. The only user of the CUDA driver."""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

from cuda.bindings import driver

from gqa_cutlass.codegen.compile import nvrtc_version
from gqa_cutlass.codegen.merge import Kernel
from gqa_cutlass.codegen.schema.launch import LaunchShape
from gqa_cutlass.codegen.schema.params import TENSOR_MAP_ALIGN, TENSOR_MAP_BYTES
from gqa_cutlass.dispatch import Device, arch_of
from gqa_cutlass.errors import CompilerMissingError, DeviceError, InputError, LaunchError
from gqa_cutlass.kernels.store import Store
from gqa_cutlass.tensormap import TensorMap

_STREAM_OFFSET = 32  # of hStream in CUlaunchConfig, behind seven 32-bit words


class LoadedKernel:
    """A kernel on a device, ready to launch.

    Args:
        config: Which kernel.
        device: Where it was loaded.
        function: The driver's handle.
    """

    def __init__(self, config: Kernel, device: Device, function: Any) -> None:
        self.config = config
        self.device = device
        self.function = function

    def prepare(self, shape: LaunchShape, argument: ctypes.Structure) -> Launch:
        """Make a launch that can be repeated, with the argument as it is in memory each time."""
        return Launch(self, shape, argument)


class Launch:
    """A launch with everything settled but the stream and what is in the argument's memory.

    The driver is called through ctypes with what was converted beforehand: the bindings spend 3 us
    per call on making an enumeration of the result and an object of the stream.

    Args:
        kernel: The kernel.
        shape: Grid, block and shared memory.
        argument: The kernel's one argument.
    """

    def __init__(
        self, kernel: LoadedKernel, shape: LaunchShape, argument: ctypes.Structure
    ) -> None:
        self._kernel = kernel
        self._argument = argument  # kept alive, as are the configuration and the pointer
        self._config = _launch_config(shape)
        config = self._config.getPtr()
        self._stream = ctypes.c_void_p.from_address(config + _STREAM_OFFSET)
        pointer = (ctypes.c_void_p * 1)(ctypes.addressof(argument))
        function = ctypes.c_void_p(int(kernel.function))
        call = _library().cuLaunchKernelEx
        self._submit = partial(call, ctypes.c_void_p(config), function, pointer, None)

    def __call__(self, stream: int) -> None:
        """Launch on a stream; the argument is copied before this returns. One call at a time.

        Raises:
            LaunchError: The driver refused.
        """
        self._stream.value = stream
        status = self._submit()
        if status:
            self._retry(status)

    def _retry(self, status: int) -> None:
        if status == driver.CUresult.CUDA_ERROR_INVALID_CONTEXT:  # a thread new to CUDA
            context = _primary_context(self._kernel.device.index)
            _check(driver.cuCtxSetCurrent(context), "entering CUDA")
            status = self._submit()
        _check((driver.CUresult(status),), f"launching {self._kernel.config.name}")


def _launch_config(shape: LaunchShape) -> Any:
    """The driver's description of a launch."""
    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = shape.grid
    config.blockDimX, config.blockDimY, config.blockDimZ = shape.block, 1, 1
    config.sharedMemBytes = shape.shared_bytes
    attributes = _attributes(shape)
    config.attrs, config.numAttrs = attributes, len(attributes)  # copies them
    return config


def _attributes(shape: LaunchShape) -> list[Any]:
    """What a launch asks for beyond grid, block and shared memory."""
    attributes = []
    if shape.cluster > 1:
        cluster = driver.CUlaunchAttribute()
        cluster.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
        size = cluster.value.clusterDim
        size.x, size.y, size.z = 1, shape.cluster, 1
        attributes.append(cluster)
    if shape.pdl:
        pdl = driver.CUlaunchAttribute()
        pdl.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        pdl.value.programmaticStreamSerializationAllowed = 1
        attributes.append(pdl)
    return attributes


def encode_tensor_map(description: TensorMap, index: int) -> bytes:
    """Have the driver encode a tensor map, for kernels on a GPU.

    Args:
        description: What the map says; of 2-byte elements, swizzled by 128 bytes.
        index: The GPU.

    Returns:
        The 128 bytes that a kernel's argument holds.

    Raises:
        InputError: The driver cannot describe such a tensor.
        LaunchError: The driver failed for another reason.
    """
    rank = description.rank
    # Aligned by hand: what the bindings would encode into is not.
    memory = ctypes.create_string_buffer(TENSOR_MAP_BYTES + TENSOR_MAP_ALIGN)
    address = -(-ctypes.addressof(memory) // TENSOR_MAP_ALIGN) * TENSOR_MAP_ALIGN
    with _context(index):
        status = _library().cuTensorMapEncodeTiled(
            ctypes.c_void_p(address),
            int(driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_UINT16),
            rank,
            ctypes.c_void_p(description.address),
            (ctypes.c_uint64 * rank)(*description.sizes),
            (ctypes.c_uint64 * (rank - 1))(*description.strides),
            (ctypes.c_uint32 * rank)(*description.box),
            (ctypes.c_uint32 * rank)(*[1] * rank),
            int(driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE),
            int(driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B),
            int(driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_NONE),
            int(driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE),
        )
    if status == driver.CUresult.CUDA_ERROR_INVALID_VALUE:
        raise InputError(
            f"gqa_decode: a cache: got {description}, which the CUDA driver refuses; allowed: what "
            "it can describe to the TMA unit. Nothing was launched. Copy the caches with "
            ".contiguous(), or make a plan with another kernel."
        )
    _check((driver.CUresult(status),), "encoding a tensor map")
    return ctypes.string_at(address, TENSOR_MAP_BYTES)


@cache
def _library() -> ctypes.CDLL:
    """The driver, for what the bindings do too slowly or without care for alignment."""
    return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")


_loaded: dict[tuple[Kernel, int], LoadedKernel] = {}
_loading = threading.Lock()


def _enter_child() -> None:
    """Begin anew in a child process: a thread that held the lock in the parent is not there."""
    global _loading
    _loading = threading.Lock()


if sys.platform != "win32":
    os.register_at_fork(after_in_child=_enter_child)


def load(config: Kernel, device: Device, *, jit: bool | None = None) -> LoadedKernel:
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


def _load(config: Kernel, device: Device, jit: bool | None) -> LoadedKernel:
    stored = Store.default().get(config, device.arch.name, jit=jit)
    with _context(device.index):
        # Loading allocates, which a capture on another thread of the process would forbid.
        with relaxed_capture():
            module = _check(driver.cuModuleLoadData(stored.compiled.code), f"loading {stored.path}")
        name = config.name.encode()
        function = _check(driver.cuModuleGetFunction(module, name), f"finding {config.name}")
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        most = device.arch.shared_per_block if config.pdl else config.shared_bytes
        _check(
            driver.cuFuncSetAttribute(function, attribute, most),
            f"giving {config.name} {most} bytes of shared memory",
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
    name = _check(driver.cuDeviceGetName(128, handle), f"asking for the name of GPU {index}")
    name = bytes(name).split(b"\0")[0].decode(errors="replace")
    return Device(index=index, arch=arch_of(10 * major + minor), num_sms=num_sms, name=name)


def check_driver(version: int, compiler_major: int) -> None:
    """Raise DeviceError when a driver (13000 for CUDA 13.0) cannot load what NVRTC writes."""
    if version // 1000 < compiler_major:
        raise DeviceError(
            f"CUDA driver: supports CUDA {version // 1000}.{version % 1000 // 10}; needed: "
            f"CUDA {compiler_major}.0 or newer, the version of the compiler (NVRTC). Upgrade the "
            "NVIDIA driver; with one of CUDA 12, install what requirements-cuda12.txt lists, where "
            "no packages of CUDA 13 are."
        )


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
