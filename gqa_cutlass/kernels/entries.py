"""Compiled kernels as files: written atomically, read only if whole and from whom this user trusts.

An entry is two files, `<kernel>.<arch>.<source>.<compiler>.cubin` (or `.ptx`; digests of the source
with the options, and of the compiler) and the same name with `.json`, which holds that name, the
code's checksum and what the compiler said. The JSON is written last; an entry without it is none.

Whoever can write an entry runs code on the GPU. So a folder or file counts only if it belongs to
this user or to root and nobody else may write to it, which is asked of what was opened and not of
a name that may mean something else by then. Folders above, and links on the way, need no look:
whoever can change those leads at most to other files of the same owners, and entries say which
kernel they are.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from gqa_cutlass.codegen.compile import Compiled
from gqa_cutlass.errors import StoreError

_FIGURES = {"registers": int, "spill_bytes": int, "stack_bytes": int, "seconds": float}
_FIELDS = {"entry": str, "compiler": str, "sha256": str, **_FIGURES}
_MOST_JSON, _MOST_CODE = 1 << 16, 1 << 26  # bytes: 100 times what is usual
# A pipe must not hold the reader up until somebody writes.
_READ = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC


class RefusedError(StoreError):
    """Something is there but cannot be used; the message says what and why."""


@dataclass(frozen=True, kw_only=True)
class Folder:
    """A folder of entries, open for reading.

    Args:
        path: Where it is.
        descriptor: The open folder, which stays the same whatever happens to the path.
    """

    path: Path
    descriptor: int

    def entries(self, prefix: str) -> list[str]:
        """Names, without suffix, of the entries that start so."""
        with _refusing(self.path):
            names = os.listdir(self.descriptor)
        return sorted(n[:-5] for n in names if n.startswith(prefix) and n.endswith(".json"))

    def read(self, name: str) -> Compiled:
        """Read an entry.

        Raises:
            FileNotFoundError: There is none.
            RefusedError: It is damaged, no file, not readable, or others could have written it.
        """
        meta = self._content(f"{name}.json", _MOST_JSON)
        code = self._content(code_name(name), _MOST_CODE)
        try:
            return _parse(name, meta, code)
        except (ValueError, RecursionError) as error:
            raise RefusedError(f"{self.path / name}.json: damaged ({error})") from error

    def _content(self, name: str, most: int) -> bytes:
        path = self.path / name
        with _refusing(path), open(os.open(name, _READ, dir_fd=self.descriptor), "rb") as file:
            info = os.fstat(file.fileno())
            if not stat.S_ISREG(info.st_mode):
                raise RefusedError(f"{path}: not a file")
            if wrong := _distrust(info):
                raise RefusedError(f"{path}: {wrong}")
            content = file.read(most + 1)
            if not 0 < len(content) <= most:
                raise RefusedError(f"{path}: damaged (empty, or more than {most} bytes)")
            return content


@contextmanager
def opened(path: Path) -> Iterator[Folder]:
    """Open a folder of entries.

    Raises:
        FileNotFoundError: There is none.
        RefusedError: It is no folder, or not readable.
        StoreError: Others than this user and root could have written what is in it.
    """
    with _refusing(path):
        descriptor = os.open(path, _READ | os.O_DIRECTORY)
    try:
        if wrong := _distrust(os.fstat(descriptor)):
            raise StoreError(
                f"cubin store: {path} {wrong}; needed: a folder that belongs to this user or to "
                "root, and that nobody else can write to, for whoever writes there runs code on "
                f"the GPU. Run chmod go-w {path}, or chown, or name another folder."
            )
        yield Folder(path=path, descriptor=descriptor)
    finally:
        os.close(descriptor)


def write(folder: Path, name: str, compiled: Compiled, compiler: str, mode: int) -> Path:
    """Write an entry, in place of whatever has its name; returns the path of its code.

    Args:
        folder: Where.
        name: The entry's name, without suffix.
        compiled: What to write.
        compiler: What it was compiled with.
        mode: Permissions of the files, less what the umask denies.

    Raises:
        OSError: The folder cannot be written. Nothing temporary is left there.
    """
    path = folder / code_name(name)
    _replace(path, compiled.code, mode)
    meta = {"entry": name, "compiler": compiler, "sha256": _sha256(compiled.code)}
    figures = {key: kind(getattr(compiled, key)) for key, kind in _FIGURES.items()}
    _replace(folder / f"{name}.json", json.dumps(meta | figures, indent=1).encode(), mode)
    return path


def code_name(name: str) -> str:
    """The name of the file with an entry's code."""
    return name + (".ptx" if ".compute_" in name else ".cubin")


def remove(path: Path) -> bool:
    """Remove whatever has a name, a directory with all that it holds; returns whether it was there.

    Raises:
        OSError: It cannot be removed.
    """
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    except FileNotFoundError:
        return False
    return True


def _parse(name: str, meta: bytes, code: bytes) -> Compiled:
    """Make an entry of its two files.

    Raises:
        ValueError, RecursionError: They are not what `write` writes.
    """
    said = json.loads(meta)
    if not isinstance(said, dict) or {key: type(said[key]) for key in said} != _FIELDS:
        raise ValueError("its fields are not those of this version")
    if said["entry"] != name:
        raise ValueError("it belongs to another kernel")
    if said["sha256"] != _sha256(code):
        raise ValueError("the code's checksum is another")
    figures = {key: said[key] for key in _FIGURES}
    if not all(0 <= figure < math.inf for figure in figures.values()):
        raise ValueError("a figure is out of range")
    if code_name(name).endswith(".ptx"):
        code.decode()
    return Compiled(code=code, **figures)


def _replace(path: Path, content: bytes, mode: int) -> None:
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        with open(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if path.is_dir() and not path.is_symlink():
            remove(path)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def _refusing(path: Path) -> Iterator[None]:
    """Say of what is there and cannot be opened or read which it is and why."""
    try:
        yield
    except FileNotFoundError:
        raise
    except PermissionError as error:
        raise RefusedError(f"{path}: found, but not readable ({error.strerror})") from error
    except (OSError, ValueError) as error:  # a path with a null character
        raise RefusedError(f"{path}: {getattr(error, 'strerror', None) or error}") from error


def _distrust(info: os.stat_result) -> str | None:
    """Why what is in a file or folder may come from others than this user and root."""
    if info.st_uid not in (0, os.geteuid()):
        return f"belongs to user {info.st_uid}, neither this one ({os.geteuid()}) nor root"
    for bit, who in ((stat.S_IWOTH, "every user"), (stat.S_IWGRP, f"group {info.st_gid}")):
        if info.st_mode & bit:
            return f"is writable by {who} (mode {stat.S_IMODE(info.st_mode):04o})"
    return None


def _sha256(code: bytes) -> str:
    return hashlib.sha256(code).hexdigest()
