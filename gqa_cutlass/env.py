"""Every environment variable the package reads, and the only place that reads them.

GQA_CUTLASS_CACHE_DIR     where compiled kernels are kept (default: the user's cache directory)
GQA_CUTLASS_KERNEL_DIR    folders with kernels that `gqa-cutlass build --out` wrote, read before the
                          cache and never written; separated like PATH
GQA_CUTLASS_DISABLE_JIT   1: never compile at run time; a missing kernel is an error
HOME, XDG_CACHE_HOME      where the user's cache directory is, and what `~` stands for
COLUMNS                   how wide the command line's tables may be, where no terminal says so
"""

from __future__ import annotations

import os
import pwd
import re
from pathlib import Path

from gqa_cutlass.errors import StoreError

CACHE_DIR, KERNEL_DIR = "GQA_CUTLASS_CACHE_DIR", "GQA_CUTLASS_KERNEL_DIR"


def cache_dir() -> Path:
    """Where compiled kernels are kept; an absolute path.

    Raises:
        StoreError: It is below a home directory, and there is none.
    """
    if given := os.environ.get(CACHE_DIR):
        return _place(CACHE_DIR, given)
    shared = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG Base Directory Specification has relative paths ignored.
    base = shared if os.path.isabs(shared) else "~/.cache"
    return _place(CACHE_DIR, os.path.join(base, "gqa_cutlass"))


def kernel_dirs() -> tuple[Path, ...]:
    """Read-only folders of kernels built ahead of time; absolute paths.

    Raises:
        StoreError: One is below a home directory, and there is none.
    """
    given = os.environ.get(KERNEL_DIR, "")
    return tuple(_place(KERNEL_DIR, entry) for entry in given.split(os.pathsep) if entry)


def jit_disabled() -> bool:
    """Whether compiling at run time is forbidden."""
    return os.environ.get("GQA_CUTLASS_DISABLE_JIT", "0") not in ("", "0")


def columns() -> int | None:
    """Characters of a line, if the user says so; at least 20."""
    given = os.environ.get("COLUMNS", "")
    return max(int(given), 20) if re.fullmatch("[1-9][0-9]{0,5}", given) else None


def _place(variable: str, given: str) -> Path:
    """A path as a variable gives it, with `~` and `~user` expanded."""
    head, _, tail = given.partition("/")
    try:
        if head.startswith("~"):
            return Path(_home(head[1:]), tail.lstrip("/"))
        return Path(given).absolute()
    except (KeyError, OSError) as error:  # no such user; no such working directory
        raise StoreError(
            f"cubin store: no folder for kernels: got {given!r}, which cannot be resolved "
            f"({error.args[-1]}); needed: a path that does not depend on a home directory that "
            f"is not there. Set {variable} to an absolute path."
        ) from error


def _home(user: str) -> str:
    """A user's home directory; this user's for "".

    Raises:
        KeyError: There is none.
    """
    home = os.environ.get("HOME", "") if not user else ""
    if not os.path.isabs(home):
        home = (pwd.getpwnam(user) if user else pwd.getpwuid(os.getuid())).pw_dir
    if not os.path.isabs(home):
        raise KeyError(f"the home directory is {home!r}")
    return home
