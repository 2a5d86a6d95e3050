"""Every environment variable the package reads, and the only place that reads them."""

from __future__ import annotations

import os
import pwd
import re
from dataclasses import dataclass
from pathlib import Path

from gqa_cutlass.errors import StoreError

CACHE_DIR, KERNEL_DIR = "GQA_CUTLASS_CACHE_DIR", "GQA_CUTLASS_KERNEL_DIR"
DISABLE_JIT = "GQA_CUTLASS_DISABLE_JIT"
XDG_CACHE_HOME, HOME, COLUMNS = "XDG_CACHE_HOME", "HOME", "COLUMNS"


@dataclass(frozen=True, kw_only=True)
class Variable:
    """What the documentation says of an environment variable.

    Args:
        name: Its name.
        value: What it may be.
        unset: What holds where it is not set, or empty.
    """

    name: str
    value: str
    unset: str


VARIABLES = (
    Variable(
        name=CACHE_DIR,
        value="the folder where compiled kernels are kept",
        unset="`gqa_cutlass` in `$XDG_CACHE_HOME`, or else in `~/.cache`",
    ),
    Variable(
        name=KERNEL_DIR,
        value="folders that `gqa-cutlass build --out` wrote, separated by `:` like `PATH`",
        unset="none",
    ),
    Variable(
        name=DISABLE_JIT,
        value="anything but empty or `0`: never compile at run time",
        unset="compiling is allowed",
    ),
    Variable(
        name=XDG_CACHE_HOME,
        value="the folder of the user's caches; ignored unless it is an absolute path",
        unset="`~/.cache`",
    ),
    Variable(
        name=HOME,
        value="what `~` stands for; ignored unless it is an absolute path",
        unset="the account's home directory",
    ),
    Variable(
        name=COLUMNS,
        value="how many characters wide the command line's tables may be, at least 20",
        unset="the terminal's width",
    ),
)


def cache_dir() -> Path:
    """Where compiled kernels are kept; an absolute path.

    Raises:
        StoreError: It is below a home directory, and there is none.
    """
    if given := os.environ.get(CACHE_DIR):
        return _place(CACHE_DIR, given)
    shared = os.environ.get(XDG_CACHE_HOME, "")
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
    return os.environ.get(DISABLE_JIT, "0") not in ("", "0")


def columns() -> int | None:
    """Characters of a line, if the user says so; at least 20."""
    given = os.environ.get(COLUMNS, "")
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
    home = os.environ.get(HOME, "") if not user else ""
    if not os.path.isabs(home):
        home = (pwd.getpwnam(user) if user else pwd.getpwuid(os.getuid())).pw_dir
    if not os.path.isabs(home):
        raise KeyError(f"the home directory is {home!r}")
    return home
