"""Runs kernels of `instructions` on arrays: through their PTX in ptxsim, or on a GPU."""

from __future__ import annotations

import ctypes
import re
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from cuda.bindings import driver
from instructions import BLOCK, Array, Form

from gqa_cutlass.ptxsim.memory.spaces import Region
from gqa_cutlass.ptxsim.prepare import Launch, Program
from gqa_cutlass.ptxsim.simulate import simulate
from gqa_cutlass.ptxsim.text.ptx import parse


class Interpreted:
    """The kernels of a PTX module, run by ptxsim.

    Args:
        ptx: The module.
    """

    def __init__(self, ptx: str) -> None:
        self._header, *entries = re.split(r"^(?=\.visible \.entry)", ptx, flags=re.M)
        names = [re.match(r"\.visible \.entry (\w+)", entry) for entry in entries]
        self._entries = {found[1]: entry for found, entry in zip(names, entries, strict=True)}  # type: ignore[index]

    def run(self, form: Form, inputs: Sequence[Array]) -> list[Array]:
        """Run a kernel, one thread per element, and return its results."""
        program = Program(parse(self._header + self._entries[form.symbol], form.symbol))
        outputs = [np.zeros(len(inputs[0]), dtype) for dtype in form.outputs]
        arrays = [np.ascontiguousarray(each) for each in inputs] + outputs
        regions = [
            Region(
                name=f"array {place}",
                address=array.ctypes.data,
                shape=array.shape,
                strides=array.strides,
                itemsize=array.itemsize,
                readable=True,
                writable=place >= len(inputs),
            )
            for place, array in enumerate(arrays)
        ]
        params = b"".join(struct.pack("<Q", array.ctypes.data) for array in arrays)
        simulate(program, Launch(grid=(_blocks(inputs), 1, 1), block=BLOCK), params, regions)
        return outputs


class Loaded:
    """The kernels of a cubin, loaded on torch's current GPU.

    Args:
        cubin: The code.
    """

    def __init__(self, cubin: bytes) -> None:
        torch.cuda.init()
        torch.zeros(1, device="cuda")  # enters the context that torch uses
        self._module = _check(driver.cuModuleLoadData(cubin))

    def run(self, form: Form, inputs: Sequence[Array]) -> list[Array]:
        """Run a kernel, one thread per element, and return its results."""
        function = _check(driver.cuModuleGetFunction(self._module, form.symbol.encode()))
        # As bytes: torch has not all unsigned types, and a kernel takes addresses only.
        sources = [torch.from_numpy(_bytes(each)).cuda() for each in inputs]
        sizes = [len(inputs[0]) * dtype.itemsize for dtype in form.outputs]
        results = [torch.zeros(size, dtype=torch.uint8, device="cuda") for size in sizes]
        addresses = [tensor.data_ptr() for tensor in (*sources, *results)]
        values = (ctypes.c_uint64 * len(addresses))(*addresses)
        first = ctypes.addressof(values)
        pointers = (ctypes.c_void_p * len(addresses))(*(first + 8 * k for k in range(len(values))))
        stream = driver.CUstream(torch.cuda.current_stream().cuda_stream)
        shape = _blocks(inputs), 1, 1, BLOCK, 1, 1, 0
        _check(driver.cuLaunchKernel(function, *shape, stream, ctypes.addressof(pointers), 0))
        raw = [result.cpu().numpy() for result in results]
        return [
            each.view(dtype.base).reshape(-1, *dtype.shape)
            for each, dtype in zip(raw, form.outputs, strict=True)
        ]


def _blocks(inputs: Sequence[Array]) -> int:
    """Count the blocks of one launch: an element is one thread's."""
    threads = len(inputs[0])
    assert threads % BLOCK == 0 and all(len(each) == threads for each in inputs)
    return threads // BLOCK


def _bytes(array: Array) -> Array:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _check(result: tuple[Any, ...]) -> Any:
    status, *values = result
    assert status == driver.CUresult.CUDA_SUCCESS, driver.cuGetErrorString(status)[1].decode()
    return values[0] if values else None
