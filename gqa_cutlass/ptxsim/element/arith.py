"""The element-wise instructions of PTX: which exist, and the function that runs each.

The tables of this package give the forms that ptxas 13.0 takes for sm_90 in PTX ISA 9.0, much as
the ISA writes its syntax: parts between dots, `a|b` for a choice, `{a|b}` for an optional one.
"""

from __future__ import annotations

import functools
import itertools

from gqa_cutlass.ptxsim.element import (
    approximate,
    compare,
    convert,
    floats,
    fp8,
    integers,
    logic,
)
from gqa_cutlass.ptxsim.element.approximate import APPROXIMATE
from gqa_cutlass.ptxsim.element.bits import Arithmetic, Bits, Builder, Opcode

__all__ = ["APPROXIMATE", "Arithmetic", "Bits", "forms", "lookup"]

_TABLES = (integers, logic, floats, approximate, compare, convert, fp8)


@functools.cache
def lookup(opcode: tuple[str, ...]) -> Arithmetic | None:
    """Return the element-wise instruction of an opcode.

    Args:
        opcode: The mnemonic split at its dots, for example ("cvt", "rn", "f16x2", "f32").

    Returns:
        The instruction; None for one that is not element-wise or a combination of modifiers and
        types that does not exist.
    """
    build = _builders().get(opcode)
    return None if build is None else build(Opcode.parse(opcode))


def forms() -> list[tuple[str, ...]]:
    """Return the opcode of every form that `lookup` knows, in the order of the tables."""
    return list(_builders())


@functools.cache
def _builders() -> dict[tuple[str, ...], Builder]:
    return {
        opcode: build
        for table in _TABLES
        for syntax, build in table.FAMILIES.items()
        for opcode in _expand(syntax)
    }


def _expand(syntax: str) -> list[tuple[str, ...]]:
    """Return every opcode that a line of syntax stands for."""
    choices = itertools.product(*(_choices(part) for part in syntax.split(".")))
    return [tuple(part for part in choice if part) for choice in choices]


def _choices(part: str) -> list[str]:
    """Return what may stand in one place, "" for nothing."""
    if part.startswith("{"):
        return ["", *part[1:-1].split("|")]
    return part.split("|")
