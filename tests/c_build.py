"""The exported C library in tests: built around images that hold no code, with the driver of
fake_cuda.c inside."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from gqa_cutlass.codegen import ARCHES, KernelConfig, Math, select
from gqa_cutlass.codegen.bundle import Image, bundle_files
from gqa_cutlass.codegen.schema.params import Params, TmaParams
from gqa_cutlass.kernels.export import facts

FAKE_CUDA = Path(__file__).with_name("fake_cuda.c")
WARNINGS = ("-Wall", "-Wextra", "-Wpedantic", "-Werror")
ARGUMENT_BYTES = ctypes.sizeof(TmaParams)
_SIZES = (f"-DARGUMENT_BYTES={ctypes.sizeof(Params)}", f"-DTMA_ARGUMENT_BYTES={ARGUMENT_BYTES}")
# Few kernels, of each kind: (head_dim, group size). Of groups of 4 there are narrow ones too.
FAMILIES = ((64, 4), (64, 7), (96, 4), (128, 4), (128, 7))
UNLIKE = "d64v80_g4_"  # and where values are not as keys


def write_dummies(
    folder: Path, kernels: Iterable[KernelConfig], archs: Sequence[str] = tuple(ARCHES)
) -> Path:
    """Write a bundle whose images are their kernels' names, which is what the fake driver loads."""
    images = [
        Image(config=k, code=k.name.encode() + b"\0", archs=tuple(set(k.archs) & set(archs)))
        for k in kernels
    ]
    for name, text in bundle_files(images, [ARCHES[arch] for arch in archs], facts()).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return folder


def compile_with(compiler: str, *arguments: object) -> None:
    """Run a compiler, which must be content; the test is skipped where there is none."""
    if shutil.which(compiler) is None:
        pytest.skip(f"needs {compiler}")
    command = [compiler, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"


def sources(bundle: Path) -> list[Path]:
    """What is to be compiled of a bundle."""
    return sorted((bundle / "src").glob("*.c"))


def includes(bundle: Path) -> tuple[str, str]:
    """Where a bundle's headers are."""
    return f"-I{bundle / 'include'}", f"-I{bundle / 'src'}"


def build(bundle: Path, out: Path, *flags: str) -> Path:
    """Build the library with the fake driver inside; what it keeps to itself can be called too."""
    compile_with(
        "gcc", "-std=c11", "-O1", "-shared", "-fPIC", "-ffp-contract=off", *WARNINGS,
        "-DGQA_INTERNAL=", "-DFAKE_CUDA_INSIDE", *_SIZES, "-Wl,--wrap=dlopen,--wrap=dlsym",
        *includes(bundle), *flags,
        *sources(bundle), FAKE_CUDA, "-o", out, "-pthread", "-ldl", "-lm",
    )  # fmt: skip
    return out


def build_fake_cuda(folder: Path, *flags: str) -> Path:
    """Build the fake driver as the file that the dynamic linker knows as libcuda.so.1."""
    folder.mkdir(parents=True, exist_ok=True)
    out = folder / "libcuda.so.1"
    compile_with("gcc", "-std=c11", "-shared", "-fPIC", *WARNINGS, *_SIZES, *flags,
                 "-Wl,-soname,libcuda.so.1", FAKE_CUDA, "-o", out, "-pthread", "-ldl")  # fmt: skip
    return out


def kernels() -> list[KernelConfig]:
    """What `fresh_library` has; of the last family no kernels of dependent launches."""
    filters = ",".join(f"d{head_dim}_g{group_size}_" for head_dim, group_size in FAMILIES)
    found = dispatched(select(f"{filters},{UNLIKE}"))
    return found + as_dependents(k for k in found if (k.head_dim, k.group_size) != FAMILIES[-1])


def as_dependents(kernels: Iterable[KernelConfig]) -> list[KernelConfig]:
    """The same kernels for dependent launches."""
    return [replace(kernel, pdl=True) for kernel in kernels]


def dispatched(kernels: Iterable[KernelConfig]) -> list[KernelConfig]:
    """Those that dispatch may choose."""
    return [k for k in kernels if k.math is Math.TENSOROP or k.vec_width == 1]
