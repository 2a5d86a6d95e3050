"""Source text to cubin or PTX, by NVRTC. The only user of cuda.core's Program."""

from __future__ import annotations

import importlib.metadata
import io
import re
import time
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from cuda.pathfinder import locate_nvidia_header_directory

from gqa_cutlass.codegen.config import ARCHES, KernelConfig
from gqa_cutlass.codegen.render import include_dir, render
from gqa_cutlass.errors import CompileError, CompilerMissingError, ConfigError

_REMEDY = "pip install nvidia-cuda-nvrtc nvidia-cuda-runtime 'nvidia-cuda-cccl<13.2' nvidia-cutlass"
# CCCL expands its type lists up to this length by macros that NVRTC takes 0.5 s to read, in every
# kernel; none of ours is that long, and longer ones still work.
_OPTIONS = {
    "std": "c++17",
    "device_as_default_execution_space": True,
    "define_macro": ("_CCCL_META_UNROLL_LIMIT", "2"),
}


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """What NVRTC made of one kernel.

    Args:
        code: The cubin, or the PTX as text in UTF-8.
        registers: Registers per thread; 0 for PTX.
        spill_bytes: Bytes of spill stores per thread; 0 for PTX.
        stack_bytes: Bytes of stack frame per thread; 0 for PTX.
        seconds: Compile time.
    """

    code: bytes
    registers: int
    spill_bytes: int
    stack_bytes: int
    seconds: float


def compile_kernel(
    config: KernelConfig, arch: str, target: Literal["cubin", "ptx"] = "cubin"
) -> Compiled:
    """Compile one kernel. Needs no GPU; arguments and errors as for `compile_source`."""
    return compile_source(render(config), config.name, arch, target)


def compile_source(
    source: str, name: str, arch: str, target: Literal["cubin", "ptx"] = "cubin"
) -> Compiled:
    """Compile CUDA C++. Needs no GPU.

    Args:
        source: The text; may include `gqa/*.cuh`.
        name: What the compiler's messages call it.
        arch: One of `ARCHES` for a cubin; for PTX also "compute_80" or "compute_90".
        target: "cubin" or "ptx" (which carries line information).

    Raises:
        ConfigError: The architecture is unknown.
        CompilerMissingError: NVRTC or a header is not installed.
        CompileError: NVRTC rejected the source.
    """
    if arch not in ARCHES and not (target == "ptx" and arch in ("compute_80", "compute_90")):
        raise ConfigError(f"arch: got {arch!r}; allowed: {', '.join(ARCHES)}")
    program_type, options_type = _nvrtc()
    options = options_type(
        arch=arch,
        lineinfo=target == "ptx",
        include_path=[str(path) for path in _include_paths()],
        ptxas_options=["-v"] if target == "cubin" else None,
        name=f"{name}.cu",
        **_OPTIONS,
    )
    log = io.StringIO()
    start = time.perf_counter()
    try:
        code = program_type(source, "c++", options).compile(target, logs=log).code
    except Exception as error:  # cuda.core keeps the class it raises private
        raise CompileError(
            f"NVRTC could not compile {name} for {arch}; compiler: {compiler_version()}; "
            f"log:\n{str(error).rstrip(chr(0))}"
        ) from error
    seconds = time.perf_counter() - start
    text = log.getvalue()
    return Compiled(
        code=code.encode() if isinstance(code, str) else bytes(code),
        registers=_figure(r"Used (\d+) registers", text),
        spill_bytes=_figure(r"(\d+) bytes spill stores", text),
        stack_bytes=_figure(r"(\d+) bytes stack frame", text),
        seconds=seconds,
    )


@cache
def compiler_version() -> str:
    """NVRTC and the third-party headers, as part of a cubin's identity.

    Raises:
        CompilerMissingError: NVRTC or a header is not installed.
    """
    return (
        f"nvrtc-{_nvrtc_version()} cccl-{_cccl_version()} cutlass-{_distribution('nvidia-cutlass')}"
    )


def options_digest_text(arch: str) -> str:
    """The compiler options that a cubin depends on, as text."""
    return f"{arch} {sorted(_OPTIONS.items())}"


def _nvrtc() -> tuple[type, type]:
    try:
        from cuda.core import Program, ProgramOptions

        _nvrtc_version()
    except (ImportError, RuntimeError) as error:
        raise CompilerMissingError(
            f"NVRTC: not found ({error}); needed: NVRTC 13.0 or newer; remedy: {_REMEDY}"
        ) from error
    return Program, ProgramOptions


@cache
def _nvrtc_version() -> str:
    from cuda.bindings import nvrtc

    status, major, minor = nvrtc.nvrtcVersion()
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise RuntimeError(f"nvrtcVersion: {status}")
    return _distribution("nvidia-cuda-nvrtc") or f"{major}.{minor}"


def _distribution(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


@cache
def _cccl_version() -> str:
    header = _include_paths()[-1] / "cuda" / "std" / "__cccl" / "version.h"
    match = re.search(r"define CCCL_VERSION (\d+)", header.read_text())
    return match.group(1) if match else "unknown"


@cache
def _include_paths() -> tuple[Path, ...]:
    """Our headers, CuTe's, CUDA's and CCCL's (the last one), in the order they are searched.

    CUTLASS writes `cccl/cuda/std/...` with CUDA 13, where CCCL's own headers write `cuda/std/...`.
    """
    library = find_spec("cutlass_library")
    if library is None or library.origin is None:
        raise CompilerMissingError(f"headers of CuTe: not found; remedy: {_REMEDY}")
    cute = Path(library.origin).parent / "source" / "include"
    cccl = _nvidia_headers("cccl")
    return Path(str(include_dir())), cute, _nvidia_headers("cudart"), cccl.parent, cccl


def _nvidia_headers(name: str) -> Path:
    """Headers from an installed package, or else from a CUDA toolkit."""
    found = locate_nvidia_header_directory(name)
    if found is None or found.abs_path is None:
        raise CompilerMissingError(f"headers of {name}: not found; remedy: {_REMEDY}")
    return Path(found.abs_path)


def _figure(pattern: str, log: str) -> int:
    match = re.search(pattern, log)
    return int(match.group(1)) if match else 0
