"""Kernels written as PTX: a body of statements, run on NumPy arrays.

What a body finds declared:
    %p<16> (predicates), %h<16> (b16), %r<32>, %rd<32>, %f<16>, %fd<8>, and already written
    %t (thread), %lane, %warp, %b (block), %g (thread of the launch; all in x);
    for every array `name` a parameter [name], its address in %name and the address of the
    element that belongs to %g in %name_g; for every number `name` a .u32 parameter and %name;
    for every tensor map (or other bytes) `name` a parameter [name], its generic address in %name.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from gqa_cutlass.errors import KernelFault, PtxError
from gqa_cutlass.ptxsim.memory.spaces import Region
from gqa_cutlass.ptxsim.prepare import Launch, Program
from gqa_cutlass.ptxsim.simulate import Checks, simulate
from gqa_cutlass.ptxsim.text.ptx import parse

Array = NDArray[Any]
MAP_ALIGN = 64
Extent = int | tuple[int, int, int]

_HEADER = ".version 9.0\n.target sm_90a\n.address_size 64\n"
_REGISTERS = """
    .reg .pred %p<16>; .reg .b16 %h<16>; .reg .b32 %r<32>; .reg .b64 %rd<32>;
    .reg .f32 %f<16>; .reg .f64 %fd<8>; .reg .b32 %t, %b, %g, %lane, %warp; .reg .b64 %wide;
    mov.u32 %t, %tid.x; mov.u32 %b, %ctaid.x; mov.u32 %g, %ntid.x;
    mad.lo.u32 %g, %b, %g, %t; and.b32 %lane, %t, 31; shr.u32 %warp, %t, 5;
"""


@dataclass(frozen=True)
class Tensor:
    """An array that a kernel may use otherwise than by reading and writing it."""

    array: Array
    readable: bool = True
    writable: bool = True
    fresh: bool = False

    def region(self, name: str) -> Region:
        return Region(
            name=name,
            address=self.array.ctypes.data,
            shape=self.array.shape,
            strides=self.array.strides,
            itemsize=self.array.itemsize,
            readable=self.readable,
            writable=self.writable,
            fresh=self.fresh,
        )


Argument = Array | Tensor | bytes | int


def module(body: str, declare: str = "", **arguments: Argument) -> str:
    """A module with the kernel `k`.

    Args:
        body: Statements; a `ret` is appended.
        declare: Further variables and registers of the kernel.
        **arguments: Its parameters.
    """
    params, loads = [], []
    for name, value in arguments.items():
        if isinstance(value, int):
            params.append(f".param .u32 {name}")
            loads.append(f".reg .b32 %{name}; ld.param.u32 %{name}, [{name}];")
            continue
        if isinstance(value, bytes):
            params.append(f".param .align {MAP_ALIGN} .b8 {name}[{len(value)}]")
            loads.append(
                f".reg .b64 %{name}; mov.b64 %{name}, {name}; cvta.param.u64 %{name}, %{name};"
            )
            continue
        item = (value.array if isinstance(value, Tensor) else value).itemsize
        params.append(f".param .u64 {name}")
        loads.append(
            f".reg .b64 %{name}, %{name}_g; ld.param.u64 %{name}, [{name}]; "
            f"mul.wide.u32 %wide, %g, {item}; add.u64 %{name}_g, %{name}, %wide;"
        )
    lines = "\n".join(loads)
    return (
        f"{_HEADER}.visible .entry k({', '.join(params)})\n"
        f"{{{declare}{_REGISTERS}{lines}\n{body}\nret;\n}}\n"
    )


def run_ptx(
    body: str,
    *,
    grid: Extent = 1,
    block: int = 32,
    cluster: Extent = 1,
    shared: int = 0,
    declare: str = "",
    races: bool = True,
    max_steps: int = 200_000,
    **arguments: Argument,
) -> None:
    """Run a body of PTX. Arrays are read and written in place.

    Args:
        body: Statements, see above.
        grid: Blocks.
        block: Threads per block.
        cluster: Blocks per cluster.
        shared: Bytes of dynamic shared memory.
        declare: Further variables and registers.
        races: Whether races are looked for.
        max_steps: When a launch is taken to hang.
        **arguments: Arrays, unsigned numbers and bytes that the kernel gets.
    """
    text = module(body, declare, **arguments)
    simulate_text(
        text, grid=grid, block=block, cluster=cluster, shared=shared, races=races,
        max_steps=max_steps, **arguments,
    )  # fmt: skip


def simulate_text(
    text: str,
    *,
    grid: Extent = 1,
    block: int = 32,
    cluster: Extent = 1,
    shared: int = 0,
    races: bool = True,
    max_steps: int = 200_000,
    **arguments: Argument,
) -> None:
    """Run the kernel `k` of a whole module, with parameters in the order of the arguments."""
    params, regions = parameters(**arguments)
    launch = Launch(grid=_extent(grid), block=block, cluster=_extent(cluster), shared_bytes=shared)
    checks = Checks(races=races, max_steps=max_steps)
    simulate(Program(parse(text, "k")), launch, params, regions, checks)


def parameters(**arguments: Argument) -> tuple[bytes, list[Region]]:
    """Arguments as they lie in memory, and the memory that they allow a kernel to use."""
    params, regions = b"", []
    for name, value in arguments.items():
        if isinstance(value, int):
            params += struct.pack("<I", value)
            continue
        if isinstance(value, bytes):
            params += b"\0" * (-len(params) % MAP_ALIGN) + value
            continue
        tensor = value if isinstance(value, Tensor) else Tensor(value)
        params += b"\0" * (-len(params) % 8) + struct.pack("<Q", tensor.array.ctypes.data)
        regions.append(tensor.region(name))
    return params, regions


def _extent(value: Extent) -> tuple[int, int, int]:
    return (value, 1, 1) if isinstance(value, int) else value


@contextmanager
def faults(*essentials: str) -> Iterator[None]:
    """Expect a fault whose message has all of these, each a regular expression."""
    with pytest.raises(KernelFault) as caught:
        yield
    _has(str(caught.value), essentials)


@contextmanager
def refuses(*essentials: str) -> Iterator[None]:
    """Expect that nothing runs, with a message that has all of these."""
    with pytest.raises(PtxError) as caught:
        yield
    _has(str(caught.value), essentials)


def _has(message: str, essentials: tuple[str, ...]) -> None:
    for text in essentials:
        assert re.search(text, message), f"no {text!r} in {message!r}"


def result(body: str, *, lanes: int = 32, **more: Any) -> list[int]:
    """What every thread leaves in %r1, which starts as 0."""
    out = np.full(lanes, 0xDEAD, np.uint32)
    run_ptx(f"mov.u32 %r1, 0; {body} st.global.u32 [%out_g], %r1;", out=out, **more)
    values: list[int] = out.tolist()
    return values


def values(dtype: str, n: int) -> NDArray[Any]:
    """Numbers of both signs that differ in all their bytes."""
    bits = np.random.default_rng(0).integers(0, 256, n * np.dtype(dtype).itemsize, dtype=np.uint8)
    return np.nan_to_num(bits.view(dtype)) if dtype[0] == "f" else bits.view(dtype)
