"""The C library and the Rust crate: templates/bundle with what was exported filled in.

Pure: what is exported comes as data, so that nothing here imports the runtime.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from importlib.resources.abc import Traversable

from gqa_cutlass.codegen.config import Arch, KernelConfig
from gqa_cutlass.codegen.render import environment
from gqa_cutlass.codegen.schema.kinds import DType

_KERNELS = "src/gqa_kernels.c"
_MAX_STAGES = 8  # kGqaMaxStages in gqa_kernels.h
_WORDS_PER_LINE = 4
_DTYPES = {DType.F16: 0, DType.BF16: 1}  # gqa_dtype
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
        model: The dispatch model's constants, in the order of gqa_model.
        limits: What configurations may hold, in the order of gqa_limits.
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
    """
    files = dict(_static_files(_folder()))
    files[_KERNELS] = (
        environment()
        .get_template(f"bundle/{_KERNELS}.jinja")
        .render(
            version=facts.version,
            compiler=facts.compiler,
            model=facts.model,
            limits=facts.limits,
            params_layout=facts.params_layout,
            params_bytes=facts.params_bytes,
            tma_params_bytes=facts.tma_params_bytes,
            archs=[_arch(arch) for arch in archs],
            kernels=[_kernel(image, archs) for image in images],
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


def _arch(arch: Arch) -> dict[str, object]:
    return {
        "name": arch.name,
        "capability": arch.capability,
        "exact": arch.exact,
    }


def _kernel(image: Image, archs: Sequence[Arch]) -> dict[str, object]:
    """One row of the table, in the order of gqa_kernel."""
    c = image.config
    stages = range(1, _MAX_STAGES + 1)
    return {
        "config": c,
        "image": _words(image.code),
        "numbers": (
            _DTYPES[c.dtype], c.head_dim, c.group_size, c.vec_width, int(c.tma), c.block_n,
            c.num_warps, c.num_stages, c.head_blocks, c.partial_floats, c.tile_bytes,
            c.bytes_in_flight,
        ),
        "shared_bytes": [c.shared_bytes_with(min(n, c.num_stages)) for n in stages],
        "blocks_per_sm": [c.blocks_per_sm(a) if a.name in image.archs else 0 for a in archs],
    }  # fmt: skip


def _words(code: bytes) -> str:
    """C initialisers of an array of uint64_t that holds these bytes on a little-endian machine."""
    padded = code + bytes(-len(code) % 8)
    words = [f"0x{word:x}," for word in struct.unpack(f"<{len(padded) // 8}Q", padded)]
    lines = (words[i : i + _WORDS_PER_LINE] for i in range(0, len(words), _WORDS_PER_LINE))
    return "\n".join("    " + " ".join(line) for line in lines)
