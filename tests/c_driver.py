"""The fake driver inside a library: what a test sets and reads of it, and what it was given."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import count, takewhile
from typing import Any

from c_build import ARGUMENT_BYTES

from gqa_cutlass.codegen import KernelConfig
from gqa_cutlass.codegen.schema.launch import LaunchShape
from gqa_cutlass.codegen.schema.params import Params, TmaParams
from gqa_cutlass.tensormap import UNIT_BYTES, TensorMap

_NAME_BYTES = 160
_SMS_OF_H200 = 132


class DriverLaunch(ctypes.Structure):
    """fake_launch."""

    _fields_ = [
        *((name, ctypes.c_uint32 * 3) for name in ("grid", "block", "cluster")),
        ("shared_bytes", ctypes.c_uint32),
        ("device", ctypes.c_int32),
        ("num_attributes", ctypes.c_uint32),
        ("dependent", ctypes.c_uint32),
        ("stream", ctypes.c_uint64),
        ("kernel", ctypes.c_char * _NAME_BYTES),
        ("padding", ctypes.c_ubyte * 32),  # the argument is aligned to 64 bytes
        ("argument", ctypes.c_ubyte * ARGUMENT_BYTES),
    ]


class DriverTensor(ctypes.Structure):
    """fake_tensor."""

    _fields_ = [
        ("address", ctypes.c_uint64),
        ("sizes", ctypes.c_uint64 * 5),
        ("strides", ctypes.c_uint64 * 4),
        ("box", ctypes.c_uint32 * 5),
        ("steps", ctypes.c_uint32 * 5),
        ("type", ctypes.c_int32),
        ("rank", ctypes.c_uint32),
        *((name, ctypes.c_int32) for name in ("interleave", "swizzle", "promotion", "fill")),
    ]


_OnLaunch = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(DriverLaunch))
_OnEncode = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(DriverTensor), ctypes.c_void_p)


class Driver:
    """The fake driver in a library: what a test sets and reads of it."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._c = library
        self._callbacks: dict[str, object] = {}

    def set_device(self, ordinal: int, capability: int, num_sms: int = _SMS_OF_H200) -> None:
        """Have a GPU of this kind."""
        self._c.fake_set_device(ordinal, capability, num_sms)

    def enter(self, ordinal: int) -> None:
        """Make a GPU's context current on this thread."""
        self._c.fake_enter(ordinal)

    @property
    def current(self) -> int:
        """The GPU whose context is current on this thread; -1 for none."""
        return int(self._c.fake_current())

    def fail(self, function: str, error: int, *, skip: int = 0, times: int = -1) -> None:
        """Have a function fail, after `skip` good calls, `times` times; for good by default."""
        self._c.fake_fail(function.encode(), error, skip, times)

    def remove(self) -> None:
        """Have no libcuda at all."""
        self._c.fake_remove()

    def hide(self, function: str) -> None:
        """Have a libcuda without this function."""
        self._c.fake_hide(function.encode())

    def functions(self) -> list[str]:
        """Everything that it has."""
        return names_of(self._c.fake_function)

    def calls(self, *functions: str) -> int:
        """How often functions were called."""
        return sum(int(self._c.fake_calls(name.encode())) for name in functions)

    def all_calls(self) -> dict[str, int]:
        """How often every function was called that was."""
        counts = {name: self.calls(name) for name in self.functions()}
        return {name: count for name, count in counts.items() if count}

    @property
    def launches(self) -> int:
        """How many launches were asked for."""
        return self.calls("cuLaunchKernelEx")

    def loads(self, kernel: str) -> int:
        """How often a kernel's image was loaded."""
        return int(self._c.fake_loads(kernel.encode()))

    def shared_bytes(self, kernel: str, ordinal: int) -> int:
        """The dynamic shared memory that a kernel may have on a GPU."""
        return int(self._c.fake_shared_bytes(kernel.encode(), ordinal))

    def set_load_microseconds(self, time: int) -> None:
        """Have loading take so long."""
        self._c.fake_set_load_microseconds(time)

    def set_capturing(self, active: bool) -> None:
        """Have a capture in progress on some thread."""
        self._c.fake_set_capturing(int(active))

    @property
    def capture_mode(self) -> int:
        """This thread's mode of capture."""
        return int(self._c.fake_capture_mode())

    @capture_mode.setter
    def capture_mode(self, mode: int) -> None:
        self._c.fake_set_capture_mode(mode)

    def last_launch(self) -> Launched:
        """What was launched last."""
        found = DriverLaunch()
        self._c.fake_last_launch(ctypes.byref(found))
        return Launched.by_driver(found)

    def on_launch(self, callback: Callable[[DriverLaunch], int]) -> None:
        """Call this for every launch; it returns what the driver answers."""
        kept = self._callbacks["launch"] = _OnLaunch(lambda launch: callback(launch.contents))
        self._c.fake_on_launch(kept)

    def on_encode(self, callback: Callable[[DriverTensor, int], int]) -> None:
        """Call this for every tensor map, with where to write it."""
        kept = self._callbacks["encode"] = _OnEncode(lambda t, map_: callback(t.contents, map_))
        self._c.fake_on_encode(kept)


def names_of(function: Callable[[int], bytes | None]) -> list[str]:
    """What a function calls 0, 1 and so on, up to null."""
    return [name.decode() for name in takewhile(bool, map(function, count()))]


@dataclass(frozen=True)
class Launched:
    """One launch, by the C library or by Python.

    Args:
        kernel: Its name.
        shape: Grid, block, cluster and shared memory.
        argument: The kernel's one argument, by field; tensor maps decoded.
        stream: Its handle.
        device: The GPU's ordinal.
    """

    kernel: str
    shape: LaunchShape
    argument: dict[str, Any]
    stream: int = 0
    device: int = 0

    @classmethod
    def by_driver(cls, launch: DriverLaunch) -> Launched:
        """What the fake driver was given."""
        x, y, z = launch.cluster if any(launch.cluster) else (1, 1, 1)
        assert (x, z) == (1, 1)
        assert launch.num_attributes == any(launch.cluster) + launch.dependent
        shape = LaunchShape(
            grid=tuple(launch.grid), block=launch.block[0], shared_bytes=launch.shared_bytes,
            cluster=y, pdl=bool(launch.dependent),
        )  # fmt: skip
        kernel = launch.kernel.decode()
        return cls(kernel, shape, fields_of(argument_of(launch)), launch.stream, launch.device)


def argument_of(launch: DriverLaunch) -> Params | TmaParams:
    """The very bytes that a kernel was given."""
    tma = KernelConfig.from_name(launch.kernel.decode()).tma
    return (TmaParams if tma else Params).from_buffer_copy(bytes(launch.argument))


def fields_of(argument: Params | TmaParams) -> dict[str, Any]:
    """The argument's fields by name, to be compared one by one."""
    if isinstance(argument, Params):
        return _values(argument)
    maps = {name: bytes(getattr(argument, name)) for name in ("keys", "values")}
    return _values(argument.decode) | {
        name: _comparable(TensorMap.from_bytes(data)) if any(data) else None
        for name, data in maps.items()
    }


def _comparable(description: TensorMap) -> TensorMap:
    """The same map, with one stride for all dimensions of which there is but one."""
    strides = zip(description.sizes[1:], description.strides, strict=True)
    return replace(description, strides=tuple(s if n > 1 else UNIT_BYTES for n, s in strides))


def _values(structure: ctypes.Structure) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, *_ in structure._fields_:
        value = getattr(structure, name)
        if isinstance(value, ctypes.Structure):
            found |= {f"{name}.{inner}": v for inner, v in _values(value).items()}
        else:
            found[name] = bytes(value) if isinstance(value, ctypes.Array) else value
    return found
