"""Structures that C++, C and ctypes have in common, as rows of fields."""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from gqa_cutlass.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Type:
    """A field's type.

    Args:
        cpp: In the kernels.
        c: In the C library.
        ctype: In Python.
        rust: In the Rust crate; "" where it has none.
        dims: What follows a field's name in C: the lengths of an array.
    """

    cpp: str
    c: str
    ctype: type[Any]
    rust: str = ""
    dims: str = ""


@dataclass(frozen=True, kw_only=True)
class Field:
    """A field of a structure.

    Args:
        name: In every language.
        type: In each.
        doc: What it holds; shapes of what it points to.
        feature: The policy that it belongs to; other kernels ignore it.
    """

    name: str
    type: Type
    doc: str = ""
    feature: str | None = None


@dataclass(frozen=True, kw_only=True)
class Struct:
    """A structure.

    Args:
        cpp: Its name in the kernels and in Python.
        c: Its name in the C library.
        doc: What it is.
        fields: In the order of their offsets.
        bytes: Its size, up to which it is filled; None for what the fields take.

    Raises:
        ConfigError: Two fields of one name, or more of them than have room.
    """

    cpp: str
    c: str
    doc: str
    fields: tuple[Field, ...]
    bytes: int | None = None

    def __post_init__(self) -> None:
        check_distinct(self.cpp, "fields", (field.name for field in self.fields))
        if self.reserved < 0:
            raise ConfigError(
                f"schema: {self.cpp}: got fields of {self._taken} bytes; allowed: {self.bytes}. No "
                "kernel was generated. Make room for more where its size is said."
            )

    @property
    def reserved(self) -> int:
        """Bytes behind the fields."""
        return (self._taken if self.bytes is None else self.bytes) - self._taken

    def ctypes_fields(self) -> list[tuple[str, type[Any]]]:
        """The fields as a ctypes.Structure takes them."""
        fields: list[tuple[str, type[Any]]] = [(f.name, f.type.ctype) for f in self.fields]
        return fields + [(RESERVED, ctypes.c_ubyte * self.reserved)] * bool(self.reserved)

    @property
    def _taken(self) -> int:
        fields = [(f.name, f.type.ctype) for f in self.fields]
        return ctypes.sizeof(type(self.cpp, (ctypes.Structure,), {"_fields_": fields}))


@dataclass(frozen=True, kw_only=True)
class Constant:
    """A member of an enumeration.

    Args:
        name: In C and Rust.
        value: Its number, which never changes.
        doc: What it means.
    """

    name: str
    value: int
    doc: str = ""


@dataclass(frozen=True, kw_only=True)
class Enumeration:
    """Named numbers of the C library.

    Args:
        c: Its name in C and Rust; "" for numbers that have no type of their own.
        doc: What it is.
        members: In the order of their values.
        rust: The integer that it is in Rust; "" where it has none.

    Raises:
        ConfigError: Two members of one name, or of one value.
    """

    c: str
    doc: str = ""
    members: tuple[Constant, ...]
    rust: str = ""

    def __post_init__(self) -> None:
        check_distinct(self.c, "members", (member.name for member in self.members))
        if self.c:
            check_distinct(self.c, "values", (str(member.value) for member in self.members))

    def __getitem__(self, name: str) -> int:
        """A member's value."""
        return next(member.value for member in self.members if member.name == name)


RESERVED = "reserved"
INT32 = Type(cpp="int32_t", c="int32_t", ctype=ctypes.c_int32, rust="i32")
INT64 = Type(cpp="int64_t", c="int64_t", ctype=ctypes.c_int64)
UINT32 = Type(cpp="uint32_t", c="uint32_t", ctype=ctypes.c_uint32, rust="u32")
SIZE = Type(cpp="size_t", c="size_t", ctype=ctypes.c_size_t, rust="usize")
FLOAT = Type(cpp="float", c="float", ctype=ctypes.c_float, rust="f32")
DOUBLE = Type(cpp="double", c="double", ctype=ctypes.c_double)
TEXT = Type(cpp="char const*", c="char const*", ctype=ctypes.c_char_p, rust="*const c_char")
MEMORY = Type(cpp="void*", c="void*", ctype=ctypes.c_void_p, rust="*mut c_void")


def pointer(to: str, *, const: bool = False) -> Type:
    """The type of an address on the device."""
    text = f"{to} const*" if const else f"{to}*"
    return Type(cpp=text, c=text, ctype=ctypes.c_void_p)


def array(of: Type, length: int, name: str = "") -> Type:
    """The type of several in a row.

    Args:
        of: Each.
        length: How many.
        name: What C calls that number, if it has a name.
    """
    rust = of.rust and f"[{of.rust}; {length}]"
    dims = f"[{name or length}]"
    return Type(cpp=of.cpp, c=of.c, ctype=of.ctype * length, rust=rust, dims=dims)


def check_distinct(table: str, what: str, names: Iterable[str]) -> None:
    """Raise ConfigError, naming it, when a name stands in a table twice."""
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ConfigError(
            f"schema: {table}: got {', '.join(twice)} twice; allowed: {what} of different names. "
            "No kernel was generated."
        )
