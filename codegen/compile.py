"""Source text to cubin or PTX, by NVRTC; the only user of NVRTC.

Through cuda.bindings, for cuda.core's Program asks the driver before it gives PTX.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from cuda.bindings import nvrtc
from cuda.pathfinder import load_nvidia_dynamic_lib, locate_nvidia_header_directory

from gqa_cutlass.codegen.config import ARCHES
from gqa_cutlass.codegen.headers import Headers, include_dir
from gqa_cutlass.codegen.merge import Kernel
from gqa_cutlass.codegen.render import render, source_digest
from gqa_cutlass.errors import CompileError, CompilerMissingError, ConfigError

Target = Literal["cubin", "ptx"]
PTX_ARCHES = ("compute_80", "compute_90")  # virtual architectures
_REMEDY = (
    "pip install nvidia-cuda-nvrtc nvidia-cuda-runtime 'nvidia-cuda-cccl<13.2'; for a driver of "
    "CUDA 12 what requirements-cuda12.txt lists"
)
# CCCL expands its type lists up to this length by macros that NVRTC takes 0.5 s to read, in every
# kernel; none of ours is that long, and longer ones still work.
_OPTIONS = ("-std=c++17", "-default-device", "-D_CCCL_META_UNROLL_LIMIT=2")
# From here on NVRTC keeps what it has compiled, where there is a driver, and says nothing of
# registers and spills when it finds that again. NVRTC, section "Caching (CUDA 12.9+)".
_CACHING = 12, 9
# For kernels that spill without: ptxas then prefers fewer registers to a better schedule; or
# allocates them as for a single block, and may happen to need no more.
_FRUGAL = "--ptxas-options=--register-usage-level=0"
# What tells releases of headers apart: a header and its macros.
_RELEASES = (
    ("cccl", "cuda/std/__cccl/version.h", "CCCL_VERSION"),
    ("cudart", "cuda_runtime_api.h", "CUDART_VERSION"),
    ("cutlass", "cutlass/version.h", "CUTLASS_MAJOR|CUTLASS_MINOR|CUTLASS_PATCH"),
)
_HEADER_HEAD, _ELF_HEAD = 1 << 15, 1 << 12  # enough for them, and for the note:
_BUILD_ID = re.compile(rb"\x04\0\0\0\x14\0\0\0\x03\0\0\0GNU\0(.{20})", re.DOTALL)
_BOUND, _ALONE = re.compile(r"(__launch_bounds__\(\d+), \d+\)"), r"\1, 1)"
_OTHERS = re.compile(r"^#include <(?:cuda|cute|cutlass)/[^>]+>$", re.MULTILINE)
_SCHEDULE = "#include <gqa/schedule/"  # which has most of them
_SHARING: ContextVar[tuple[str, ...]] = ContextVar("options for precompiled headers", default=())


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


def compile_kernel(config: Kernel, arch: str) -> Compiled:
    """Compile one kernel. Needs no GPU; arguments and errors as for `compile_source`.

    Raises:
        ConfigError: Also where the kernel's schedule needs another architecture.
        CompileError: Also where what is compiled is not what the kernel's digest is of.
    """
    if not compiles_for(config, arch):
        raise ConfigError(
            f"arch: got {arch!r} for {config.name}; allowed: {', '.join(config.archs)}, and for "
            f"PTX {config.ptx_arch}"
        )
    source = render(config)
    best = compile_source(source, config.name, arch)
    alone = _BOUND.sub(_ALONE, source)
    for text, options in ((source, (_FRUGAL,)), (alone, ())):
        if not best.spill_bytes:
            break
        other = compile_source(text, config.name, arch, *options)
        if other.registers <= config.max_registers:
            best = min(best, other, key=lambda c: c.spill_bytes)
    if Headers(include_dir()).digest(source) != source_digest(config):
        raise CompileError(
            f"{config.name} for {arch}: headers are not those that this process has read: the "
            "package was upgraded or edited meanwhile. Nothing was kept. Start the process again."
        )
    return best


def compiles_for(config: Kernel, arch: str) -> bool:
    """Whether a kernel's schedule allows an architecture, real or virtual.

    Raises:
        ConfigError: The architecture is unknown.
    """
    _check_arch(arch)
    if arch in PTX_ARCHES:  # which are in the order of their age
        return PTX_ARCHES.index(arch) >= PTX_ARCHES.index(config.ptx_arch)
    return arch in config.archs


def compile_source(source: str, name: str, arch: str, *extra: str) -> Compiled:
    """Compile CUDA C++. Needs no GPU.

    Args:
        source: The text; may include `gqa/*.cuh`.
        name: What the compiler's messages call it.
        arch: One of `ARCHES` for a cubin; one of `PTX_ARCHES` for PTX with line information.
        extra: More options.

    Raises:
        ConfigError: The architecture is unknown.
        CompilerMissingError: NVRTC or a header is not installed.
        CompileError: NVRTC rejected the source.
    """
    _check_arch(arch)
    target: Target = "ptx" if arch in PTX_ARCHES else "cubin"
    options = [*_OPTIONS, *extra, f"-arch={arch}", *(f"-I{path}" for path in _include_paths())]
    options.append("-lineinfo" if target == "ptx" else "--ptxas-options=-v")
    if nvrtc_version() >= _CACHING:
        options.append("--no-cache")
    start = time.perf_counter()
    if _SCHEDULE in source:
        source = f'{_others()}#line 1 "{name}.cu"\n{source}'
    with _program(source, name) as program:
        ok, log = _compile(program, [*options, *_SHARING.get()])
        if not ok and _SHARING.get():
            ok, log = _compile(program, options)
            if ok:  # it failed for want of space
                _SHARING.set(())
        if not ok:
            raise CompileError(
                f"NVRTC could not compile {name} for {arch}; compiler: {compiler_version()}; "
                f"log:\n{log}"
            )
        code = _result(program, target)
    return Compiled(
        code=code,
        registers=_figure(r"Used (\d+) registers", log),
        spill_bytes=_figure(r"(\d+) bytes spill stores", log),
        stack_bytes=_figure(r"(\d+) bytes stack frame", log),
        seconds=time.perf_counter() - start,
    )


@contextmanager
def shared_headers() -> Iterator[Path]:
    """Within, kernels that this thread compiles share the work of reading their headers.

    That is more than half of the work, and the code is the same to the byte. The first kernel of
    an architecture takes a quarter longer, and 110 MB of temporary files until the end; once they
    cannot be written, each kernel reads its headers.

    Yields:
        The folder with those files.
    """
    with tempfile.TemporaryDirectory(prefix="gqa_cutlass_", ignore_cleanup_errors=True) as folder:
        sharing = "--pch", f"--pch-dir={folder}", "--pch-messages=false", "--diag-suppress=629"
        token = _SHARING.set(sharing)
        try:
            yield Path(folder)
        finally:
            _SHARING.reset(token)


@cache
def _others() -> str:
    """Includes of all headers of others that ours include, which go before a kernel's.

    So kernels can share them whatever policies they have. Only what is read before the pragma is
    shared, and by kernels that begin alike.
    """
    texts = (path.read_text(encoding="utf-8") for path in Path(str(include_dir())).rglob("*.cuh"))
    lines = sorted({line for text in texts for line in _OTHERS.findall(text)})
    return "\n".join((*lines, "#pragma nv_hdrstop", ""))


def _check_arch(arch: str) -> None:
    if arch not in ARCHES and arch not in PTX_ARCHES:
        raise ConfigError(f"arch: got {arch!r}; allowed: {', '.join((*ARCHES, *PTX_ARCHES))}")


@cache
def nvrtc_version() -> tuple[int, int]:
    """Major and minor version of NVRTC.

    Raises:
        CompilerMissingError: It is not installed.
    """
    try:
        _, major, minor = nvrtc.nvrtcVersion()
    except RuntimeError as error:  # the library is loaded on first use
        raise CompilerMissingError(
            f"NVRTC: not found ({' '.join(str(error).split())}); needed: NVRTC 13, "
            f"or 12.6 or newer for a driver of CUDA 12; remedy: {_REMEDY}"
        ) from error
    return major, minor


@cache
def compiler_version() -> str:
    """What compiles here, as part of a cubin's identity: NVRTC as loaded, headers as found.

    Of the headers it names the releases; who edits them in place is not noticed.

    Raises:
        CompilerMissingError: NVRTC or a header is not installed.
    """
    major, minor = nvrtc_version()
    headers = " ".join(f"{name}-{_release(*where)}" for name, *where in _RELEASES)
    return f"nvrtc-{major}.{minor}+{_nvrtc_build()} {headers}"


def options_digest_text(arch: str) -> str:
    """The compiler options that a cubin depends on, as text."""
    return " ".join((arch, *_OPTIONS, _FRUGAL, _ALONE))


@contextmanager
def _program(source: str, name: str) -> Iterator[Any]:
    nvrtc_version()  # is there a compiler at all?
    program = _check(nvrtc.nvrtcCreateProgram(source.encode(), f"{name}.cu".encode(), 0, [], []))
    try:
        yield program
    finally:
        _check(nvrtc.nvrtcDestroyProgram(program))


def _compile(program: Any, options: list[str]) -> tuple[bool, str]:
    """Compile; returns whether it worked, and the log."""
    (status,) = nvrtc.nvrtcCompileProgram(program, len(options), [o.encode() for o in options])
    log = bytearray(_check(nvrtc.nvrtcGetProgramLogSize(program)))
    _check(nvrtc.nvrtcGetProgramLog(program, log))
    return status == nvrtc.nvrtcResult.NVRTC_SUCCESS, log.decode(errors="replace").rstrip("\0")


def _result(program: Any, target: Target) -> bytes:
    ptx = target == "ptx"
    size = nvrtc.nvrtcGetPTXSize(program) if ptx else nvrtc.nvrtcGetCUBINSize(program)
    code = bytearray(_check(size))
    _check(nvrtc.nvrtcGetPTX(program, code) if ptx else nvrtc.nvrtcGetCUBIN(program, code))
    return bytes(code).rstrip(b"\0") if ptx else bytes(code)


def _check(result: tuple[Any, ...]) -> Any:
    status, *values = result
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise CompileError(f"NVRTC: {nvrtc.nvrtcGetErrorString(status)[1].decode()}")
    return values[0] if values else None


def _nvrtc_build() -> str:
    """What tells builds of one version of NVRTC apart: the linker's note in it, or its size."""
    path = load_nvidia_dynamic_lib("nvrtc").abs_path  # as cuda.bindings does, so it is the same
    try:
        with open(path, "rb") as library:
            found = _BUILD_ID.search(library.read(_ELF_HEAD))
            return found[1].hex()[:12] if found else str(os.fstat(library.fileno()).st_size)
    except OSError as error:
        raise CompilerMissingError(
            f"NVRTC: {path} is loaded but cannot be read ({error.strerror}); needed: the library "
            f"that is in use; remedy: start again, or {_REMEDY}"
        ) from error


def _release(header: str, macros: str) -> str:
    """The release of the headers that the compiler would find, as one of them says."""
    for folder in _include_paths():
        try:
            with open(folder / header, encoding="utf-8", errors="replace") as file:
                text = file.read(_HEADER_HEAD)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise CompilerMissingError(
                f"header {folder / header}: cannot be read ({error.strerror}); remedy: {_REMEDY}"
            ) from error
        numbers = re.findall(rf"^#define (?:{macros})\s+(\d+)", text, re.MULTILINE)
        return ".".join(numbers) or hashlib.sha256(text.encode()).hexdigest()[:12]
    raise CompilerMissingError(f"header {header}: not found; remedy: {_REMEDY}")


@cache
def _include_paths() -> tuple[Path, ...]:
    """Our headers, CuTe's, CUDA's and CCCL's (the last one), in the order they are searched.

    CUTLASS writes `cccl/cuda/std/...` with CUDA 13, where CCCL's own headers write `cuda/std/...`.
    """
    ours = Path(str(include_dir()))
    cccl = _nvidia_headers("cccl")
    return ours, _cute_headers(ours), _nvidia_headers("cudart"), cccl.parent, cccl


def _cute_headers(ours: Path) -> Path:
    """CuTe's headers: those beside ours in a wheel, or else where nvidia-cutlass has them."""
    if (within := ours.parent / "cutlass" / "include").is_dir():
        return within
    library = find_spec("cutlass_library")
    if library is None or library.origin is None:
        raise CompilerMissingError(
            "headers of CuTe: not found; remedy: pip install --no-deps nvidia-cutlass"
        )
    return Path(library.origin).parent / "source" / "include"


def _nvidia_headers(name: str) -> Path:
    """Headers from an installed package, or else from a CUDA toolkit."""
    found = locate_nvidia_header_directory(name)
    if found is None or found.abs_path is None:
        raise CompilerMissingError(f"headers of {name}: not found; remedy: {_REMEDY}")
    return Path(found.abs_path)


def _figure(pattern: str, log: str) -> int:
    match = re.search(pattern, log)
    return int(match.group(1)) if match else 0
