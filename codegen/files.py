"""Reads and writes files where a user says; what is odd there is an error of ours, in one line.

Files that belong together are replaced all or not at all: a full disk leaves what was there.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from gqa_cutlass.errors import GqaError, InputError, OutputError

_UNFINISHED = ".gqa-cutlass-"  # how the names of files begin that are not finished yet
_MOST_JSON_BYTES = 16 << 20


def unfit(name: str | Path) -> str:
    """Why files cannot go where a user says, as errors go on from the option; "" where they can."""
    reason = "" if str(name) else ", no name"
    try:
        if str(name) and not stat.S_ISDIR(os.stat(name).st_mode):
            reason = ", which is no folder"
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:  # too long, say
        reason = f" ({why(error)})"
    return reason and f"got {str(name)!r}{reason}; allowed: a folder, or the name of a new one."


def unreadable(path: Path) -> bool:
    """Whether a path is such that not even its absence can be told: too long, say."""
    try:
        path.exists()
        path.is_dir()
    except (OSError, ValueError):
        return True
    return False


@contextmanager
def writing(what: str, out: Path) -> Iterator[None]:
    """Turn what the file system refuses meanwhile into an error of ours.

    Args:
        what: The command and its option that named the folder.
        out: The folder.

    Raises:
        OutputError: The file system refused.
    """
    try:
        yield
    except GqaError:
        raise
    except (OSError, ValueError) as error:
        raise OutputError(
            f"{what}: got {out}, where files cannot be written ({why(error)}); needed: a "
            "folder that this user can write to, with room enough."
        ) from error


def why(error: OSError | ValueError) -> str:
    """What the system says of a file, without the number and the file's name."""
    return (isinstance(error, OSError) and error.strerror) or str(error)


def update(out: Path, files: Mapping[str, str | bytes]) -> list[str]:
    """Bring files of a folder up to date: all of them or, where that fails, none.

    Args:
        out: The folder; made where there is none.
        files: Content by name, which may have folders in it.

    Returns:
        Names of those that differed.

    Raises:
        OSError: One of them cannot be written; what was there is as it was.
    """
    contents = {n: text.encode() if isinstance(text, str) else text for n, text in files.items()}
    changed = [name for name, content in contents.items() if not _holds(out / name, content)]
    staged: dict[Path, Path] = {}
    made: list[Path] = []
    try:
        for name in changed:
            target = out / name
            _make_folder(target.parent, made)
            _refuse_folder(target)
            temporary = target.with_name(f"{_UNFINISHED}{secrets.token_hex(8)}")
            staged[temporary] = target
            _write(temporary, contents[name])
        for temporary, target in staged.items():
            os.replace(temporary, target)
    except BaseException:
        for temporary in staged:
            temporary.unlink(missing_ok=True)
        for folder in reversed(made):
            with suppress(OSError):  # somebody else put something into it
                folder.rmdir()
        raise
    return changed


def is_vacant(folder: Path) -> bool:
    """Whether a folder has no files, or only what a process left that was killed while it wrote."""
    return all(
        path.name.startswith(_UNFINISHED) or (path.is_dir() and not path.is_symlink())
        for path in folder.rglob("*")
    )


def read_json(what: str, path: Path, allowed: str) -> object:
    """Read JSON from a file that may be anything.

    Args:
        what: What asked for it, as errors begin.
        path: The file.
        allowed: What it should be.

    Raises:
        InputError: There is no such file, or no JSON in it.
    """
    try:
        reason = "is no file" if not path.is_file() and path.exists() else ""
        if not reason:
            with path.open("rb") as file:
                content = file.read(_MOST_JSON_BYTES + 1)
            if len(content) <= _MOST_JSON_BYTES:
                return json.loads(content)
            reason = f"has more than {_MOST_JSON_BYTES} bytes"
    except OSError as error:
        reason = f"cannot be read ({why(error)})"
    except (ValueError, RecursionError) as error:
        reason = f"is no JSON ({error})"
    raise InputError(f"{what}: got {path}, which {reason}; allowed: {allowed}.")


def _holds(path: Path, content: bytes) -> bool:
    """Whether a file is there with this content. What is no file, a pipe say, is not read."""
    return path.is_file() and path.stat().st_size == len(content) and path.read_bytes() == content


def _make_folder(folder: Path, made: list[Path]) -> None:
    """Make a folder and those around it, and note which."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    for path in reversed(missing):
        path.mkdir(exist_ok=True)  # somebody else may have been faster
        made.append(path)


def _refuse_folder(path: Path) -> None:
    """Raise for a folder where a file should go, before other files are replaced."""
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))


def _write(path: Path, content: bytes) -> None:
    """Write a file that is not there yet, with the rights that the user's umask leaves."""
    with path.open("xb") as file:
        file.write(content)
