"""What is emitted from the schema: the headers and sources that are committed, and if in step.

Pure: text out of rows.
"""

from __future__ import annotations

from itertools import zip_longest

from gqa_cutlass.codegen.schema.emit_library import (
    internal_header,
    layout_in_c,
    layout_in_rust,
    public_types,
    rust_types,
)
from gqa_cutlass.codegen.schema.launch import ENUMS
from gqa_cutlass.codegen.schema.merge import DIVISOR, MERGE_PARAMS
from gqa_cutlass.codegen.schema.params import (
    CACHE_STRIDES,
    PARAMS,
    ROW_STRIDES,
    TENSOR_MAP_ALIGN,
    TENSOR_MAP_BYTES,
    TMA_PARAMS,
)
from gqa_cutlass.codegen.schema.spell import MARK, c_struct, comment, cpp_enum, cpp_struct
from gqa_cutlass.errors import ConfigError

_STRIDES = (ROW_STRIDES, CACHE_STRIDES)


# Around what the schema gives of a file that is written by hand otherwise.
_BEGIN, _END = f"// {MARK}\n", "// End of what is generated.\n"


def emitted_files() -> dict[str, str]:
    """Every file that the schema gives: path below templates/, and text."""
    return {
        "include/gqa/params.cuh": cpp_header(),
        "include/gqa/merge/merge_params.cuh": merge_header(),
        "bundle/src/gqa_params.h": c_header(),
        "bundle/src/gqa_types.h": internal_header(),
        "bundle/rust/types.rs": rust_types(),
        "bundle/rust/tests/layout.c": layout_in_c(),
        "bundle/rust/tests/layout_facts.rs": layout_in_rust(),
    }


def emitted_parts() -> dict[str, str]:
    """What the schema gives of files that have more: path below templates/, and the part's text."""
    return {"bundle/include/gqa_attention_decode.h": public_types()}


def with_part(name: str, text: str, part: str) -> str:
    """A file with what the schema gives in its place.

    Args:
        name: The file's, for the error.
        text: The file.
        part: What belongs between the marks.

    Raises:
        ConfigError: The marks are not there.
    """
    before, begin, rest = text.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not begin or not end:
        raise ConfigError(
            f"{name}: got a file without the lines {_BEGIN.strip()!r} and {_END.strip()!r}; "
            "needed: both, around what is generated. Nothing was written. Restore the file."
        )
    return f"{before}{begin}\n{part}\n{end}{after}"


def cpp_header() -> str:
    """What kernels include."""
    return "\n".join(
        (
            "// What one launch is told: pointers, strides and lengths.",
            f"// {MARK}",
            "#pragma once",
            "",
            "#include <cuda/std/cstdint>",
            "",
            "namespace gqa {",
            "",
            *(line for struct in _STRIDES for line in cpp_struct(struct)),
            *(line for enum in ENUMS for line in cpp_enum(enum)),
            *cpp_struct(PARAMS),
            *comment(
                "CUtensorMap: a tensor in global memory, as the copy engine sees it and the "
                "driver encodes it."
            ),
            f"struct alignas({TENSOR_MAP_ALIGN}) TensorMap {{",
            f"  uint64_t opaque[{TENSOR_MAP_BYTES // 8}];",
            "};",
            "",
            *cpp_struct(TMA_PARAMS),
            "}  // namespace gqa",
            "",
        )
    )


def merge_header() -> str:
    """What kernels that merge include."""
    return "\n".join(
        (
            "// What one launch that merges is told: pointers, strides and sizes.",
            f"// {MARK}",
            "#pragma once",
            "",
            "#include <cuda/std/cstdint>",
            "",
            "namespace gqa {",
            "",
            *cpp_struct(DIVISOR),
            *cpp_struct(MERGE_PARAMS),
            "}  // namespace gqa",
            "",
        )
    )


def c_header() -> str:
    """What the C library includes; gqa_kernels.c asserts the offsets, as ctypes has them."""
    return "\n".join(
        (
            "// The kernels' argument, as params.cuh has it; gqa_kernels.c asserts the offsets.",
            f"// {MARK}",
            "#ifndef GQA_PARAMS_H_",
            "#define GQA_PARAMS_H_",
            "",
            "#include <stdint.h>",
            "",
            '#include "gqa_driver.h"',
            "",
            *(line for s in (*_STRIDES, PARAMS, TMA_PARAMS) for line in c_struct(s)),
            "#endif  // GQA_PARAMS_H_",
            "",
        )
    )


def check_emitted(name: str, header: str) -> None:
    """Compare a header that kernels include with the schema.

    Args:
        name: Its path below templates/.
        header: Its text.

    Raises:
        ConfigError: They differ; the message says where.
    """
    wanted_lines = emitted_files()[name].splitlines()
    pairs = zip_longest(header.splitlines(), wanted_lines, fillvalue="nothing")
    for number, (found, wanted) in enumerate(pairs, 1):
        if found != wanted:
            raise ConfigError(
                f"{name.rpartition('/')[2]}, line {number}: got {found.strip()!r}; the schema says "
                f"{wanted.strip()!r}. No kernel was generated. Run `gqa-cutlass generate`."
            )
