"""The C library and the Rust crate: templates/bundle with what was exported filled in.

Pure: what is exported comes as data, so that nothing here imports the runtime.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from importlib.resources.abc import Traversable
from typing import Any

from gqa_cutlass.codegen.config import Arch, KernelConfig
from gqa_cutlass.codegen.render import environment
from gqa_cutlass.codegen.schema.internal import (
    ARCH,
    KERNEL,
    LIMITS,
    MAX_STAGES,
    MODEL,
    feature_bits,
)
from gqa_cutlass.codegen.schema.public import DTYPE_CODES
from gqa_cutlass.codegen.schema.structs import Struct
from gqa_cutlass.errors import ConfigError

_KERNELS = "src/gqa_kernels.c"
_WORDS_PER_LINE = 4
_SKIPPED = ("__pycache__",)


@dataclass(frozen=True, kw_only=True)
class Image:
    """One kernel to export.

    Args:
        config: Which.
        code: Its fat binary.
        archs: Names of the architectures that are in it.
    """

    config: KernelConfig
    code: bytes
    archs: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What the C sources must agree about with the Python package.

    Args:
        version: Of the package.
        compiler: What compiled the kernels.
        model: The dispatch model's constants, by the fields of gqa_model.
        limits: What configurations may hold, by the fields of gqa_limits.
        params_layout: Fields of the kernels' argument, each with its offset in bytes.
        params_bytes: Its size.
        tma_params_bytes: The size with tensor maps.
    """

    version: str
    compiler: str
    model: Mapping[str, float]
    limits: Mapping[str, float]
    params_layout: Sequence[tuple[str, int]]
    params_bytes: int
    tma_params_bytes: int


def bundle_files(images: Sequence[Image], archs: Sequence[Arch], facts: Facts) -> dict[str, str]:
    """Path and content of every file of a bundle.

    Args:
        images: The kernels.
        archs: What they were compiled for.
        facts: What C and Python share.

    Raises:
        ConfigError: Facts that the C library does not take, or lacks.
    """
    files = dict(_static_files(_folder()))
    files[_KERNELS] = (
        environment()
        .get_template(f"bundle/{_KERNELS}.jinja")
        .render(
            version=facts.version,
            compiler=facts.compiler,
            model=_in_order(MODEL, facts.model),
            limits=_in_order(LIMITS, facts.limits),
            params_layout=facts.params_layout,
            params_bytes=facts.params_bytes,
            tma_params_bytes=facts.tma_params_bytes,
            archs=[_arch(arch) for arch in archs],
            kernels=[_kernel(index, image, archs) for index, image in enumerate(images)],
        )
    )
    return files


def _folder() -> Traversable:
    return resources.files("gqa_cutlass.templates") / "bundle"


def _static_files(folder: Traversable, prefix: str = "") -> Iterator[tuple[str, str]]:
    for entry in folder.iterdir():
        if entry.is_dir() and entry.name not in _SKIPPED:
            yield from _static_files(entry, f"{prefix}{entry.name}/")
        elif entry.is_file() and not entry.name.endswith(".jinja"):
            yield prefix + entry.name, entry.read_text(encoding="utf-8")


def _in_order(struct: Struct, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a structure's fields, as C initialises it."""
    names = [field.name for field in struct.fields]
    if set(names) != set(values):
        wrong = sorted(set(names) ^ set(values))
        raise ConfigError(
            f"{struct.c}: got values that differ from its fields in {', '.join(wrong)}; allowed: "
            "one for each. Nothing was exported."
        )
    return {name: values[name] for name in names}


def _row(struct: Struct, values: Mapping[str, Any]) -> str:
    """A structure as a C initialiser; texts and numbers as they are, sequences in braces."""
    row = ", ".join(
        value if isinstance(value, str) else f"{{{', '.join(map(str, value))}}}"
        if isinstance(value, Sequence) else str(value)
        for value in _in_order(struct, values).values()
    )  # fmt: skip
    return f"{{{row}}}"


def _arch(arch: Arch) -> str:
    values = {
        "name": f'"{arch.name}"', "capability": arch.capability, "exact": int(arch.exact),
        "dependents": int(arch.dependents), "shared_per_block": arch.shared_per_block,
        "shared_per_sm": arch.shared_per_sm,
    }  # fmt: skip
    return _row(ARCH, values)


def _kernel(index: int, image: Image, archs: Sequence[Arch]) -> dict[str, str]:
    """One row of the table, and the words of its image."""
    c = image.config
    copied = (
        "head_dim", "group_size", "vec_width", "block_n", "num_warps", "num_stages", "block_h",
        "partial_floats", "tile_bytes", "bytes_in_flight",
    )  # fmt: skip
    values = {name: getattr(c, name) for name in copied} | {
        "name": f'"{c.name}"',
        "image": f"image_{index}",
        "dtype": DTYPE_CODES[c.dtype],
        "head_dim_v": c.value_dim,
        "tma": int(c.tma),
        "pdl": int(c.pdl),
        "features": feature_bits(c.policies),
        "shared_bytes": [
            c.shared_bytes_with(min(stages, c.num_stages)) for stages in range(1, MAX_STAGES + 1)
        ],
        "blocks_per_sm": [c.blocks_per_sm(a) if a.name in image.archs else 0 for a in archs],
    }
    return {"row": _row(KERNEL, values), "image": _words(image.code)}


def _words(code: bytes) -> str:
    """C initialisers of an array of uint64_t that holds these bytes on a little-endian machine."""
    padded = code + bytes(-len(code) % 8)
    words = [f"0x{word:x}," for word in struct.unpack(f"<{len(padded) // 8}Q", padded)]
    lines = (words[i : i + _WORDS_PER_LINE] for i in range(0, len(words), _WORDS_PER_LINE))
    return "\n".join("    " + " ".join(line) for line in lines)
