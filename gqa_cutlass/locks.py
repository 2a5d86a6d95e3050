"""Taking turns: who wants what others want too waits until they are done with it.

A lock is `flock` on a file, which the kernel gives back when its holder ends, however it ends. The
file says who holds the lock, and is there only while somebody does; whoever has locked a file that
is no longer the one of that name tries again. Where a filesystem has no locks nobody waits: two
may then do the same work, and either result serves.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from gqa_cutlass.entries import remove
from gqa_cutlass.errors import StoreError

LOG = logging.getLogger("gqa_cutlass")
QUIET_S, LIMIT_S = 1.0, 600.0  # how long to wait before saying so, and at all
_POLL_S = 0.05
_FLAGS = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_NOT_A_FILE = (errno.EISDIR, errno.ELOOP, errno.ENXIO)  # a folder, a link, a socket: no lock


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock, waiting for it if need be.

    Raises:
        StoreError: Somebody else holds it all the time.
        OSError: The lock file cannot be made.
    """
    descriptor = _wait(path)
    try:
        yield
    finally:
        _release(path, descriptor)


@contextmanager
def locked_if_free(path: Path) -> Iterator[bool]:
    """Hold a lock unless somebody else does; says whether.

    Raises:
        OSError: The lock file cannot be made.
    """
    descriptor = _try(path)
    try:
        yield descriptor is not None
    finally:
        if descriptor is not None:
            _release(path, descriptor)


def _wait(path: Path) -> int:
    start, quiet = time.monotonic(), True
    while (descriptor := _try(path)) is None:
        waited = time.monotonic() - start
        if waited >= LIMIT_S:
            raise StoreError(
                f"cubin store: {path}: waited {waited:.0f} s for {_holder(path)}, which holds this "
                "lock; needed: that it finishes what it compiles. End it, remove the file, or set "
                "GQA_CUTLASS_CACHE_DIR to another folder."
            )
        if quiet and waited >= QUIET_S:
            quiet = False
            LOG.warning(
                "waiting for %s, which holds %s, for up to %.0f s", _holder(path), path, LIMIT_S
            )
        time.sleep(_POLL_S)
    return descriptor


def _try(path: Path) -> int | None:
    """Take a lock if it is free; returns the open file."""
    descriptor = _open(path)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        os.close(descriptor)
        return None
    except OSError as error:
        LOG.debug("no locks at %s: %s", path, error.strerror)
    if not _is_named(path, descriptor):  # its holder removed it after it was opened here
        os.close(descriptor)
        return None
    with suppress(OSError):  # nothing depends on what it says
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {os.uname().nodename}".encode(), 0)
    return descriptor


def _open(path: Path) -> int:
    try:
        return os.open(path, _FLAGS, 0o600)
    except OSError as error:
        if error.errno not in _NOT_A_FILE:
            raise
        remove(path)
        return os.open(path, _FLAGS, 0o600)


def _is_named(path: Path, descriptor: int) -> bool:
    """Whether an open file is still what its name stands for."""
    try:
        return os.path.samestat(os.lstat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _release(path: Path, descriptor: int) -> None:
    with suppress(OSError):
        if _is_named(path, descriptor):
            os.unlink(path)
    with suppress(OSError):
        # Closing would do, were it not for copies that a child may have got by a fork.
        fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)


def _holder(path: Path) -> str:
    """Who holds a lock, as it says itself."""
    with suppress(OSError):
        text = path.read_bytes()[:200].decode(errors="replace")
        if text and text.isprintable():
            return text
    return "a process that does not say who it is"
