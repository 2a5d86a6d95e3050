"""The schema as the C library and the Rust crate have it.

Pure: text out of rows.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator

from gqa_cutlass.codegen.schema.internal import FEATURE_BITS, FEATURE_FIELDS, MAXIMA, NUMBERS, PDL
from gqa_cutlass.codegen.schema.internal import STRUCTS as INTERNAL
from gqa_cutlass.codegen.schema.public import ENUMERATIONS, SIZES
from gqa_cutlass.codegen.schema.public import STRUCTS as PUBLIC
from gqa_cutlass.codegen.schema.spell import MARK, WIDTH, c_enum, c_struct
from gqa_cutlass.codegen.schema.structs import Enumeration, Struct

_OTHER_TYPES = ("gqa_stream_t", "gqa_log_callback")  # of the header, whose size Rust must know
_SIZE_DOC = "bytes that the caller's structure has, by which the library knows its fields"


def public_types() -> str:
    """What callers share with the library, as a part of its header."""
    return _text(
        *(line for enumeration in ENUMERATIONS for line in c_enum(enumeration)),
        *(line for struct in PUBLIC for line in (*c_struct(struct), *_initial(struct))),
    )


def internal_header() -> str:
    """What the library's files share among themselves."""
    return _text(
        "// The tables of kernels, and what is chosen from them.",
        f"// {MARK}",
        "#ifndef GQA_TYPES_H_",
        "#define GQA_TYPES_H_",
        "",
        "#include <stdint.h>",
        "",
        *c_enum(MAXIMA),
        "// What the callers' structures may measure.",
        *c_enum(SIZES),
        "// Features: bits of what kernels have and configurations ask for.",
        *c_enum(FEATURE_BITS),
        "// Each, and the field of GQADecodeConfig that asks for it when it is not zero.",
        *_x_macro("GQA_FEATURES", FEATURE_FIELDS.items()),
        "",
        "// What the kernels call types of numbers.",
        *c_enum(NUMBERS),
        "// When the next kernel of the stream may start: when this one is done, or its tiles are,",
        "// or as soon as it may read.",
        *c_enum(PDL),
        *(line for struct in INTERNAL for line in c_struct(struct)),
        "#endif  // GQA_TYPES_H_",
    )


def rust_types() -> str:
    """The public part of the C header in Rust."""
    return _text(
        "//! What callers share with the C library, as its header has it.",
        f"//! {MARK}",
        "",
        "#![allow(non_camel_case_types)]",
        "",
        "use std::ffi::c_void;",
        "use std::mem::size_of;",
        "use std::os::raw::{c_char, c_int};",
        "use std::ptr::{null, null_mut};",
        *(line for enumeration in ENUMERATIONS for line in _rust_enum(enumeration)),
        *(line for struct in PUBLIC for line in _rust_struct(struct)),
    )


def layout_in_c() -> str:
    """What C has to say to the crate's test of layouts."""
    return _text(
        "// What layout.rs compares with the crate's bindings.",
        f"// {MARK}",
        "#include <stddef.h>",
        "",
        '#include "gqa_attention_decode.h"',
        "",
        "typedef struct gqa_fact {",
        "  char const* name;",
        "  long long value;",
        "} gqa_fact;",
        "",
        '#define SIZE(type) {#type " size", sizeof(type)}',
        '#define ALIGNMENT(type) {#type " alignment", _Alignof(type)}',
        '#define FIELD(type, field) {#type "." #field, offsetof(type, field)}',
        "#define CONSTANT(constant) {#constant, constant}",
        "",
        "gqa_fact const gqa_facts[] = {",
        *(f"    {row}," for struct in PUBLIC for row in _rows(struct)),
        *(f"    {row}," for name in (*_enums(), *_OTHER_TYPES) for row in _size_rows(name)),
        *(f"    CONSTANT({member.name})," for e in ENUMERATIONS for member in e.members),
        "};",
        "size_t const gqa_num_facts = sizeof gqa_facts / sizeof gqa_facts[0];",
    )


def layout_in_rust() -> str:
    """The same facts, in the same order, as the crate has them."""
    constants = [member.name for e in ENUMERATIONS for member in e.members]
    return _text(
        "// What layout.c says, of the crate's bindings; a part of layout.rs.",
        f"// {MARK}",
        "fn rust_facts() -> Vec<Fact> {",
        "    let mut facts = Vec::new();",
        *(line for struct in PUBLIC for line in _call("layout", struct.c, *_names(struct))),
        *(line for name in (*_enums(), *_OTHER_TYPES) for line in _call("layout", name)),
        *_call("constants", *constants),
        "    facts",
        "}",
    )


def _text(*lines: str) -> str:
    return "\n".join(lines).rstrip("\n") + "\n"


def _x_macro(name: str, rows: Iterable[tuple[str, ...]]) -> list[str]:
    """A macro that applies another one to every row."""
    return _continued(f"#define {name}(X)", *(f"  X({', '.join(row)})" for row in rows))


def _continued(*lines: str) -> list[str]:
    """The lines of one macro, as clang-format has them."""
    width = max(map(len, lines[:-1]))
    return [f"{line:<{width}} \\" for line in lines[:-1]] + [lines[-1]]


def _names(struct: Struct) -> list[str]:
    return [field.name for field in struct.fields]


def _enums() -> list[str]:
    return [enumeration.c for enumeration in ENUMERATIONS]


def _initial(struct: Struct) -> Iterator[str]:
    """The macro that initialises a structure, in C and in C++."""
    if struct.growth is not None:
        values = [field.type.initial for field in struct.fields]
        line = f"#define {struct.growth.initial} {{{', '.join(values)}}}"
        if len(line) <= WIDTH:
            yield line
        else:
            first, *others = values
            yield from _continued(
                f"#define {struct.growth.initial}", f"  {{{first},",
                *(f"   {value}," for value in others[:-1]), f"   {others[-1]}}}",
            )  # fmt: skip
        yield ""


def _rust_enum(enumeration: Enumeration) -> Iterator[str]:
    yield ""
    yield from _rust_doc(f"{enumeration.doc} An integer, since C may return others.")
    yield f"pub type {enumeration.c} = {enumeration.rust};"
    for member in enumeration.members:
        yield from _rust_doc(member.doc)
        yield f"pub const {member.name}: {enumeration.c} = {member.value};"


def _rust_struct(struct: Struct) -> Iterator[str]:
    yield ""
    yield from _rust_doc(struct.doc)
    yield "#[repr(C)]"
    yield "#[derive(Clone, Copy, Debug)]"
    yield f"pub struct {struct.c} {{"
    for field in struct.fields:
        yield from _rust_doc(field.doc or _SIZE_DOC, indent="    ")
        yield f"    pub {field.name}: {field.type.rust},"
    yield "}"
    yield ""
    yield f"impl Default for {struct.c} {{"
    yield "    /// Of this crate's size, and zero otherwise."
    yield "    fn default() -> Self {"
    yield "        Self {"
    yield from (f"            {f.name}: {f.type.rust_default}," for f in struct.fields)
    yield "        }"
    yield "    }"
    yield "}"


def _rust_doc(text: str, indent: str = "") -> list[str]:
    start = f"{indent}/// "
    sentence = text[0].upper() + text[1:].removesuffix(".") + "."
    return textwrap.wrap(sentence, WIDTH, initial_indent=start, subsequent_indent=start)


def _rows(struct: Struct) -> Iterator[str]:
    yield from _size_rows(struct.c)
    yield from (f"FIELD({struct.c}, {name})" for name in _names(struct))


def _size_rows(name: str) -> Iterator[str]:
    yield f"SIZE({name})"
    yield f"ALIGNMENT({name})"


def _call(macro: str, *words: str) -> Iterable[str]:
    """A call of a macro of layout.rs, on as many lines as rustfmt gives it."""
    line = f"    {macro}!(facts, {', '.join(words)});"
    if len(line) <= WIDTH:
        return [line]
    return [f"    {macro}!(", *(f"        {word}," for word in ("facts", *words[:-1])),
            f"        {words[-1]}", "    );"]  # fmt: skip
