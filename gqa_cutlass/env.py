"""Every environment variable the package reads, and the only place that reads them.

GQA_CUTLASS_CACHE_DIR     where compiled kernels are kept (default: the user's cache directory)
GQA_CUTLASS_KERNEL_DIR    folders with kernels that `gqa-cutlass build --out` wrote, read before the
                          cache and never written; separated like PATH
GQA_CUTLASS_DISABLE_JIT   1: never compile at run time; a missing kernel is an error
"""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs


def cache_dir() -> Path:
    """Where compiled kernels are kept."""
    given = os.environ.get("GQA_CUTLASS_CACHE_DIR")
    return Path(given) if given else Path(platformdirs.user_cache_dir("gqa_cutlass"))


def kernel_dirs() -> tuple[Path, ...]:
    """Read-only folders of kernels built ahead of time."""
    given = os.environ.get("GQA_CUTLASS_KERNEL_DIR", "")
    return tuple(Path(entry) for entry in given.split(os.pathsep) if entry)


def jit_disabled() -> bool:
    """Whether compiling at run time is forbidden."""
    return os.environ.get("GQA_CUTLASS_DISABLE_JIT", "0") not in ("", "0")
