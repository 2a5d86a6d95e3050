"""Taking turns: who wants what others want too waits until they are done with it.

A lock is a `filelock` on a file that says who holds it. The kernel gives it back when its holder
ends, however it ends. The file is there only while somebody holds it: filelock tries again where it
has locked one that lost its name meanwhile. Where a filesystem has no locks, filelock makes do with
the existence of a file.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

from gqa_cutlass.errors import StoreError
from gqa_cutlass.kernels.entries import remove

LOG = logging.getLogger("gqa_cutlass")
QUIET_S, LIMIT_S = 1.0, 600.0  # how long to wait before saying so, and at all


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock, waiting for it if need be.

    Raises:
        StoreError: Somebody else holds it all the time.
        OSError: The lock file cannot be made.
    """
    lock = _lock(path)
    _wait(lock, path)
    with _held(lock, path):
        with suppress(OSError):  # nothing depends on what it says
            path.write_text(f"process {os.getpid()} on {os.uname().nodename}")
        yield


@contextmanager
def locked_if_free(path: Path) -> Iterator[bool]:
    """Hold a lock unless somebody else does; says whether.

    Raises:
        OSError: The lock file cannot be made.
    """
    lock = _lock(path)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        yield False
        return
    with _held(lock, path):
        yield True


def _lock(path: Path) -> BaseFileLock:
    if path.is_symlink() or (path.exists() and not path.is_file()):
        remove(path)
    return FileLock(path, mode=0o600)


def _wait(lock: BaseFileLock, path: Path) -> None:
    try:
        lock.acquire(timeout=QUIET_S)
        return
    except Timeout:
        LOG.warning(
            "waiting for %s, which holds %s, for up to %.0f s", _holder(path), path, LIMIT_S
        )
    try:
        lock.acquire(timeout=LIMIT_S)
    except Timeout:
        raise StoreError(
            f"cubin store: {path}: waited {LIMIT_S:.0f} s for {_holder(path)}, which holds this "
            "lock; needed: that it finishes what it compiles. End it, remove the file, or set "
            "GQA_CUTLASS_CACHE_DIR to another folder."
        ) from None


@contextmanager
def _held(lock: BaseFileLock, path: Path) -> Iterator[None]:
    """Give a lock back in the end, and take its file away unless it is another one by then."""
    own = os.lstat(path).st_ino if path.exists() else None
    try:
        yield
    finally:
        with suppress(OSError):
            if os.lstat(path).st_ino == own:
                path.unlink()
        lock.release()


def _holder(path: Path) -> str:
    """Who holds a lock, as it says itself."""
    with suppress(OSError):
        text = path.read_bytes()[:200].decode(errors="replace")
        if text and text.isprintable():
            return text
    return "a process that does not say who it is"
