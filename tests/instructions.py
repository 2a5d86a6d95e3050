"""Every instruction that ptxsim knows, as a kernel of its own in CUDA C++ with inline PTX.

Each thread reads raw bits from the input arrays, executes the instruction once and stores raw
bits. Predicates are bytes as sources and 32-bit words as results; a result of 8 bits is stored as
the whole 32-bit register, so that its extension shows.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gqa_cutlass.codegen.compile import compile_source
from gqa_cutlass.ptxsim.element.arith import forms, lookup

Array = NDArray[Any]
Opcode = tuple[str, ...]
BLOCK = 128
# Compiling costs 4 ms a kernel and 50 ms a program.
_KERNELS_PER_PROGRAM = 96

# Width in bits: C++ type of an array's elements, its NumPy dtype, constraint of a register.
MEMORY: dict[int, tuple[str, type[np.generic], str]] = {
    1: ("unsigned char", np.uint8, "r"),
    8: ("unsigned char", np.uint8, "r"),
    16: ("unsigned short", np.uint16, "h"),
    32: ("unsigned", np.uint32, "r"),
    64: ("unsigned long long", np.uint64, "l"),
}


@dataclass(frozen=True, kw_only=True)
class Form:
    """An instruction, the kernel that executes it, and what ptxsim says of it.

    Args:
        opcode: The mnemonic, split at its dots.
        symbol: The kernel's name.
        source: The kernel's text.
        outputs: Type of an element, one per thread, of each result.
        run: Takes the input arrays, gives the results as the kernel stores them.
        constants: Width and value of operands that PTX wants as immediates, by their place.
    """

    opcode: Opcode
    symbol: str
    source: str
    outputs: tuple[np.dtype[Any], ...]
    run: Callable[..., list[Array]]
    constants: dict[int, int]

    @property
    def name(self) -> str:
        """The mnemonic as written, with immediates."""
        return " ".join([".".join(self.opcode), *map(hex, self.constants.values())])


@cache
def element_wise() -> tuple[Form, ...]:
    """Return every form of `arith`; lop3 with all its tables."""
    made: list[Form] = []
    for opcode in forms():
        if opcode[0] != "lop3":
            made.append(_form(opcode))
        elif len(opcode) == 2:
            made += [_form(opcode, {3: table}) for table in range(256)]
        else:
            made += [_form(opcode, {3: table}) for table in (0x00, 0x1B, 0x80, 0x96, 0xCA, 0xFF)]
    return tuple(made)


def _form(opcode: Opcode, constants: dict[int, int] | None = None) -> Form:
    constants = constants or {}
    found = lookup(opcode)
    assert found is not None
    results = found.results
    if opcode[0] == "setp" and opcode[-1] in ("f16", "bf16"):
        results = (1,)  # these have no second predicate
    symbol = "_".join([*opcode, *(f"{value:02x}" for value in constants.values())])
    return Form(
        opcode=opcode,
        symbol=symbol,
        source=_source(opcode, symbol, results, found.sources, constants),
        outputs=tuple(np.dtype(_stored(width)) for width in results),
        run=partial(_run, opcode, constants),
        constants=constants,
    )


def _stored(width: int) -> type[np.generic]:
    return np.uint32 if width < 16 else MEMORY[width][1]


def _run(opcode: Opcode, constants: dict[int, int], *arrays: Array) -> list[Array]:
    """Execute by `arith`, and extend as a register is."""
    found = lookup(opcode)
    assert found is not None
    left = iter(arrays)
    sources = [
        np.array([constants[place]], np.uint32)
        if place in constants
        else next(left).astype(np.bool_)
        if width == 1
        else next(left)
        for place, width in enumerate(found.sources)
    ]
    with np.errstate(all="ignore"):
        results = found.run(*sources)
    results = results if isinstance(results, tuple) else (results,)
    extended = np.int8 if found.signed else np.uint8
    return [
        value.view(extended).astype(np.int32).view(np.uint32)
        if width == 8
        else value.astype(np.uint32)
        if width == 1
        else value
        for value, width in zip(results, found.results, strict=True)
    ]


def _source(
    opcode: Opcode,
    symbol: str,
    results: Sequence[int],
    sources: Sequence[int],
    constants: dict[int, int],
) -> str:
    """Write the kernel of an element-wise instruction."""
    inputs = {place: width for place, width in enumerate(sources) if place not in constants}
    number = {place: len(results) + i for i, place in enumerate(inputs)}
    before = [f"setp.ne.u32 s{i}, %{number[i]}, 0;" for i, width in inputs.items() if width == 1]
    after = [f"selp.u32 %{i}, 1, 0, d{i};" for i, width in enumerate(results) if width == 1]
    targets = [f"d{i}" if width == 1 else f"%{i}" for i, width in enumerate(results)]
    operands = [
        hex(constants[i]) if i in constants else f"s{i}" if width == 1 else f"%{number[i]}"
        for i, width in enumerate(sources)
    ]
    predicates = [target for target in targets if target[0] == "d"]
    predicates += [operand for operand in operands if operand[0] == "s"]
    text = [f".reg .pred {', '.join(predicates)};"] if predicates else []
    text += [*before, f"{'.'.join(opcode)} {'|'.join(targets)}, {', '.join(operands)};", *after]
    return kernel(
        symbol,
        [(f"s{i}", MEMORY[width][0]) for i, width in inputs.items()],
        [(f"r{i}", _register_type(width)) for i, width in enumerate(results)],
        asm(
            " ".join(text),
            [(MEMORY[width][2], f"t{i}") for i, width in enumerate(results)],
            [(MEMORY[width][2], _value(i, width)) for i, width in inputs.items()],
        ),
    )


def _register_type(width: int) -> str:
    return "unsigned" if width < 16 else MEMORY[width][0]


def _value(place: int, width: int) -> str:
    return f"(unsigned)s{place}[i]" if width < 16 else f"s{place}[i]"


def asm(text: str, outputs: Iterable[tuple[str, str]], inputs: Iterable[tuple[str, str]]) -> str:
    """Write an asm statement, braces around it; operands are (constraint, expression)."""
    left = ", ".join(f'"={constraint}"({name})' for constraint, name in outputs)
    right = ", ".join(f'"{constraint}"({name})' for constraint, name in inputs)
    return f'asm volatile("{{ {text} }}" : {left} : {right} : "memory");'


def kernel(
    symbol: str,
    inputs: Sequence[tuple[str, str]],
    outputs: Sequence[tuple[str, str]],
    body: str,
    *,
    stored: bool = True,
) -> str:
    """Write a kernel that reads arrays at [i] and stores its variables t0, t1, ... there.

    Args:
        symbol: Its name.
        inputs: Name and type of the input arrays.
        outputs: Name and type of the output arrays.
        body: Statements that set t0, t1, ...
        stored: Whether t0, t1, ... exist and are stored; else the body writes the arrays itself.
    """
    arrays = [f"{kind} const* {name}" for name, kind in inputs]
    arrays += [f"{kind}* {name}" for name, kind in outputs]
    variables = "".join(f"  {kind} t{j} = 0;\n" for j, (_, kind) in enumerate(outputs))
    stores = "".join(f"  {name}[i] = t{j};\n" for j, (name, _) in enumerate(outputs))
    if not stored:
        variables = stores = ""
    return (
        f'extern "C" __global__ void {symbol}({", ".join(arrays)}) {{\n'
        "  unsigned const i = blockIdx.x * blockDim.x + threadIdx.x;\n"
        f"{variables}  {body}\n{stores}}}\n"
    )


def compiled(
    wanted: Sequence[Form], arch: str, jobs: int = 0
) -> Iterator[tuple[list[Form], bytes]]:
    """Compile kernels, many to a program, and yield each program's kernels and code.

    Uses processes: within one, NVRTC compiles one program at a time.

    Args:
        wanted: The kernels.
        arch: As for `compile_source`.
        jobs: Processes; 0 for one per CPU.
    """
    starts = range(0, len(wanted), _KERNELS_PER_PROGRAM)
    programs = [list(wanted[start : start + _KERNELS_PER_PROGRAM]) for start in starts]
    sources = ["\n".join(form.source for form in program) for program in programs]
    names = [program[0].symbol for program in programs]
    jobs = min(jobs or len(os.sched_getaffinity(0)), len(programs))
    if jobs <= 1:
        done = (compile_source(*job, arch) for job in zip(sources, names, strict=True))
        yield from ((program, each.code) for program, each in zip(programs, done, strict=True))
        return
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=spawn) as pool:
        done = pool.map(compile_source, sources, names, [arch] * len(names))
        yield from ((program, each.code) for program, each in zip(programs, done, strict=True))
