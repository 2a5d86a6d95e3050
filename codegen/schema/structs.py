"""Structures that C++, C and ctypes have in common, as rows of fields."""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
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
        dims: What follows a field's name in C: the lengths of an array, for instance.
        initial: What C initialises it with.
        rust_default: Its default in Rust.
    """

    cpp: str
    c: str
    ctype: type[Any]
    rust: str = ""
    dims: str = ""
    initial: str = "0"
    rust_default: str = "0"


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
class Growth:
    """How callers' structures of other versions are told apart: by the size that they say.

    Structures grow at their end alone. A caller's is read as far as both sides know it.

    Args:
        required: The last field that the callers of every version have.
        least: What the C library calls the size up to there.
        initial: The macro with which C initialises one.
    """

    required: str
    least: str
    initial: str


@dataclass(frozen=True, kw_only=True)
class Struct:
    """A structure.

    Args:
        cpp: Its name in the kernels and in Python.
        c: Its name in the C library.
        doc: What it is.
        fields: In the order of their offsets.
        multiple: What its size is a multiple of: it is filled up, and grows with its fields.
        growth: How it may grow for callers of older versions; None where both sides are built
            together.

    Raises:
        ConfigError: Two fields of one name; or it can grow, and has bytes between fields or behind
            them, in which callers leave anything.
    """

    cpp: str
    c: str
    doc: str
    fields: tuple[Field, ...]
    multiple: int = 1
    growth: Growth | None = None

    def __post_init__(self) -> None:
        check_distinct(self.cpp, "fields", (field.name for field in self.fields))
        if self.growth is not None:
            self._check_growth()

    @property
    def reserved(self) -> int:
        """Bytes behind the fields."""
        return -self._taken % self.multiple

    def ctypes_fields(self) -> list[tuple[str, type[Any]]]:
        """The fields as a ctypes.Structure takes them."""
        fields: list[tuple[str, type[Any]]] = [(f.name, f.type.ctype) for f in self.fields]
        return fields + [(RESERVED, ctypes.c_ubyte * self.reserved)] * bool(self.reserved)

    @property
    def least_bytes(self) -> int:
        """The size of the smallest that callers may have: up to the last required field."""
        assert self.growth is not None
        names = [field.name for field in self.fields]
        known = self.fields[: names.index(self.growth.required) + 1]
        return sum(ctypes.sizeof(field.type.ctype) for field in known)

    def _check_growth(self) -> None:
        """Raise ConfigError when a smaller version could say more than it has."""
        filled = sum(ctypes.sizeof(field.type.ctype) for field in self.fields)
        first, step = self.fields[0], ctypes.sizeof(SIZE.ctype)
        if (first.name, first.type.ctype) != (STRUCT_SIZE, SIZE.ctype):
            raise ConfigError(
                f"schema: {self.cpp}: got {first.name} as its first field; needed: {STRUCT_SIZE}, "
                "by which versions are told apart. Nothing was generated."
            )
        if filled != self._taken or self.least_bytes % step:
            raise ConfigError(
                f"schema: {self.cpp}: got {filled} bytes of fields in {self._taken}, of which the "
                f"first {self.least_bytes} are required; needed: no gaps, and steps of {step}: "
                "callers leave anything there, where a later version has a field. Nothing was "
                "generated. Put a reserved field into the gap."
            )

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
STRUCT_SIZE = "struct_size"
INT32 = Type(cpp="int32_t", c="int32_t", ctype=ctypes.c_int32, rust="i32")
INT64 = Type(cpp="int64_t", c="int64_t", ctype=ctypes.c_int64, rust="i64")
UINT32 = Type(cpp="uint32_t", c="uint32_t", ctype=ctypes.c_uint32, rust="u32")
SIZE = Type(cpp="size_t", c="size_t", ctype=ctypes.c_size_t, rust="usize")
FLOAT = Type(
    cpp="float", c="float", ctype=ctypes.c_float, rust="f32", initial="0.0f", rust_default="0.0"
)
DOUBLE = Type(cpp="double", c="double", ctype=ctypes.c_double)
TEXT = Type(
    cpp="char const*", c="char const*", ctype=ctypes.c_char_p, rust="*const c_char",
    initial="NULL", rust_default="null()",
)  # fmt: skip
MEMORY = Type(
    cpp="void*", c="void*", ctype=ctypes.c_void_p, rust="*mut c_void",
    initial="NULL", rust_default="null_mut()",
)  # fmt: skip


def pointer(to: str, *, const: bool = False, rust: str = "") -> Type:
    """The type of an address on the device.

    Args:
        to: What is there, in C.
        const: Whether it is only read.
        rust: What is there, in Rust; "" for an address that Rust does not see.
    """
    text = f"{to} const*" if const else f"{to}*"
    rust_text = f"*{'const' if const else 'mut'} {rust}" if rust else ""
    return Type(
        cpp=text, c=text, ctype=ctypes.c_void_p, rust=rust_text, initial="NULL",
        rust_default="null()" if const else "null_mut()",
    )  # fmt: skip


def array(of: Type, length: int, name: str = "") -> Type:
    """The type of several in a row.

    Args:
        of: Each.
        length: How many.
        name: What C calls that number, if it has a name.
    """
    return Type(
        cpp=of.cpp, c=of.c, ctype=of.ctype * length, rust=of.rust and f"[{of.rust}; {length}]",
        dims=f"[{name or length}]", initial=f"{{{', '.join([of.initial] * length)}}}",
        rust_default=f"[{of.rust_default}; {length}]",
    )  # fmt: skip


def own_size(name: str) -> Field:
    """The first field of a structure that can grow: the caller's size of it.

    Args:
        name: The structure's.
    """
    kind = replace(
        SIZE, dims=f" GQA_OWN_SIZE({name})", initial=f"sizeof({name})",
        rust_default=f"size_of::<{name}>()",
    )  # fmt: skip
    return Field(name=STRUCT_SIZE, type=kind)


def zeroed(kind: Type) -> Type:
    """The type of a field that C++ sets to zero: programs may be of before it was added."""
    return replace(kind, dims=" GQA_ZERO")


def check_distinct(table: str, what: str, names: Iterable[str]) -> None:
    """Raise ConfigError, naming it, when a name stands in a table twice."""
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ConfigError(
            f"schema: {table}: got {', '.join(twice)} twice; allowed: {what} of different names. "
            "No kernel was generated."
        )
