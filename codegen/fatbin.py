"""Cubins of one kernel for several architectures in one compressed image, by nvFatbin.

The driver takes from it what suits the GPU. CuTe leaves so many symbols in a cubin that a
compressed image has an eighth of its size.
"""

from __future__ import annotations

from collections.abc import Mapping

from cuda.bindings import nvfatbin

from gqa_cutlass.errors import CompileError, CompilerMissingError

_OPTIONS = ["-64", "-compress=true", "-compress-mode=size"]


def pack(name: str, cubins: Mapping[str, bytes]) -> bytes:
    """Join cubins. Needs no GPU.

    Args:
        name: The kernel's name, which messages mention.
        cubins: By architecture, one of `codegen.ARCHES`.

    Raises:
        CompilerMissingError: nvFatbin is not installed.
        CompileError: It refused a cubin.
    """
    try:
        handle = nvfatbin.create(_OPTIONS, len(_OPTIONS))
    except RuntimeError as error:  # the library is loaded on first use
        raise CompilerMissingError(
            f"nvFatbin: not found ({' '.join(str(error).split())}); needed: nvFatbin 12.9 or "
            "newer; remedy: pip install nvidia-nvfatbin, or nvidia-nvfatbin-cu12 with CUDA 12"
        ) from error
    try:
        for arch, cubin in cubins.items():
            nvfatbin.add_cubin(handle, cubin, len(cubin), arch.removeprefix("sm_"), name)
        image = bytearray(nvfatbin.size(handle))
        nvfatbin.get(handle, image)
    except nvfatbin.nvFatbinError as error:
        raise CompileError(
            f"nvFatbin could not pack {name} for {', '.join(cubins)}: {error}"
        ) from error
    finally:
        nvfatbin.destroy(handle)
    return bytes(image)
