"""Writes the C library and the Rust crate for engines without Python."""

from __future__ import annotations

import ctypes
import importlib.metadata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from gqa_cutlass import dispatch, inputs
from gqa_cutlass.codegen import ARCHES, KernelConfig, default_config, select
from gqa_cutlass.codegen.bundle import Facts, Image, bundle_files
from gqa_cutlass.codegen.compile import compiler_version, compiles_for
from gqa_cutlass.codegen.config import (
    BOX_DIMS,
    HEAD_DIMS,
    MAX_CLUSTER,
    MAX_GROUP_SIZE,
    Arch,
    Math,
)
from gqa_cutlass.codegen.fatbin import pack
from gqa_cutlass.errors import ConfigError, ExportError
from gqa_cutlass.launcher import MIN_CAPABILITY, Params, TmaParams
from gqa_cutlass.store import Store, build_all

Cubin = tuple[KernelConfig, str, bytes]  # a kernel, an architecture, and the code for it
_MARK = "gqa_attention_decode.h"  # what tells a bundle from another folder


@dataclass(frozen=True, kw_only=True)
class Export:
    """A bundle to be written.

    Args:
        kernels: What the C library can launch.
        archs: What it can launch them on.
    """

    kernels: tuple[KernelConfig, ...]
    archs: tuple[Arch, ...]

    @property
    def wanted(self) -> list[tuple[KernelConfig, str]]:
        """Every kernel with every architecture that its schedule allows."""
        return [(k, a.name) for k in self.kernels for a in self.archs if compiles_for(k, a.name)]


def plan_export(kernels: str | None, archs: Sequence[str]) -> Export:
    """Settle what to export.

    Args:
        kernels: A filter as `select` takes it; None for all that are shipped. Kernels that dispatch
            never chooses are left out.
        archs: Names from `codegen.ARCHES`.

    Raises:
        ConfigError: Nothing to export, or an architecture is unknown.
    """
    for arch in archs:
        if arch not in ARCHES:
            raise ConfigError(f"--arch: got {arch!r}; allowed: all, or {', '.join(ARCHES)}")
    found = [k for k in select(kernels) if _is_dispatched(k) and set(k.archs) & set(archs)]
    if not found:
        raise ConfigError(
            f"--kernels: got {kernels!r} for {', '.join(archs)}; allowed: kernels for these "
            "architectures that dispatch chooses: tensorop, or simt with align1, in the tile shape "
            "that `codegen.variants` gives them"
        )
    used = [ARCHES[a] for a in ARCHES if a in archs and any(a in k.archs for k in found)]
    return Export(kernels=tuple(found), archs=tuple(used))


def _is_dispatched(kernel: KernelConfig) -> bool:
    k = kernel
    usual = default_config(k.math, k.dtype, k.head_dim, k.group_size, k.vec_width, k.schedule)
    return kernel == usual and (kernel.math is Math.TENSOROP or kernel.vec_width == 1)


def compiled(
    export: Export, store: Store, jobs: int = 0
) -> Iterator[tuple[KernelConfig, str, bytes]]:
    """Compile, or find compiled, what an export needs: kernel, architecture and cubin, in order.

    Raises:
        StoreError, CompileError, CompilerMissingError: As `Store.get`.
    """
    for stored in build_all(store, export.wanted, jobs):
        yield stored.config, stored.arch, stored.compiled.code


def write_bundle(out: Path, export: Export, cubins: Iterable[Cubin]) -> list[Path]:
    """Write a bundle; files of an earlier one are replaced where they differ.

    Args:
        out: A folder that is new, empty, or holds a bundle.
        export: What is in it.
        cubins: As `compiled` gives them.

    Returns:
        The bundle's files.

    Raises:
        ExportError: The folder holds something else.
        CompileError, CompilerMissingError: As `codegen.fatbin.pack`.
    """
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not _is_bundle(out))):
        raise ExportError(
            f"export: --out: got {out}, which holds something else; allowed: a folder that is new, "
            "empty, or holds an earlier export. Nothing was written."
        )
    by_kernel: dict[KernelConfig, dict[str, bytes]] = {}
    for config, arch, cubin in cubins:
        by_kernel.setdefault(config, {})[arch] = cubin
    images = [
        Image(config=config, code=pack(config.name, found), archs=tuple(found))
        for config, found in by_kernel.items()
    ]
    files = bundle_files(images, export.archs, facts())
    for name, text in files.items():
        path = out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.is_file() or path.read_text(encoding="utf-8") != text:  # or builds start anew
            path.write_text(text, encoding="utf-8")
    return [out / name for name in files]


def _is_bundle(folder: Path) -> bool:
    return (folder / "include" / _MARK).is_file()


def facts() -> Facts:
    """What the C sources must agree about with this package.

    Raises:
        CompilerMissingError: NVRTC or a header is not installed.
    """
    return Facts(
        version=importlib.metadata.version("gqa-cutlass"),
        compiler=compiler_version(),
        model={
            "bytes_per_sm_and_microsecond": dispatch.BYTES_PER_SM_AND_MICROSECOND,
            "microseconds_per_split": dispatch.MICROSECONDS_PER_SPLIT,
            "bytes_in_flight": dispatch.BYTES_IN_FLIGHT,
            "tma_mib": dispatch.TMA_MIB,
            "tma_mib_partial_boxes": dispatch.TMA_MIB_PARTIAL_BOXES,
            "tma_heads": dispatch.TMA_HEADS,
            "tma_blocks": dispatch.TMA_BLOCKS,
            "box_dims": BOX_DIMS,
            "max_cluster": MAX_CLUSTER,
            "early_mib": dispatch.EARLY_MIB,
            "balanced_batch": dispatch.BALANCED_BATCH,
            "balanced_tokens": dispatch.BALANCED_TOKENS,
            "balanced_rounds": dispatch.BALANCED_ROUNDS,
            "most_tiles": dispatch.MOST_TILES,
        },
        limits={
            "min_head_dim": HEAD_DIMS[0],
            "max_head_dim": HEAD_DIMS[-1],
            "head_dim_step": HEAD_DIMS.step,
            "max_batch": inputs.MAX_BATCH,
            "max_seq_len": inputs.MAX_SEQ_LEN,
            "max_group_size": MAX_GROUP_SIZE,
            "min_capability": MIN_CAPABILITY,
            "max_scale": inputs.MAX_SCALE,
        },
        params_layout=[(field[0], getattr(Params, field[0]).offset) for field in Params._fields_],
        params_bytes=ctypes.sizeof(Params),
        tma_params_bytes=ctypes.sizeof(TmaParams),
    )
