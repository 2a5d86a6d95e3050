"""Files written and read where a user says: all or nothing, and one error for whatever is odd."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from command_line import file_size_limit

from gqa_cutlass.codegen import files
from gqa_cutlass.codegen.files import is_vacant, read_json, unfit, update, writing
from gqa_cutlass.errors import InputError, OutputError

OLD = {"a": "old", "in/b": "old", "c": "same"}
NEW = {"a": "new", "in/b": "new", "c": "same", "in/deeper/d": "new", "e": b"\xff\0"}


def content(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def encoded(expected: dict[str, str | bytes]) -> dict[str, bytes]:
    return {n: text.encode() if isinstance(text, str) else text for n, text in expected.items()}


@contextmanager
def failing(function: str, call: int, error: BaseException) -> Iterator[None]:
    """A function of `files` does its work so many times, and then raises."""
    calls = 0
    target, name = (os, "replace") if function == "replace" else (files, function)
    original = getattr(target, name)

    def fail(*arguments: object) -> None:
        nonlocal calls
        calls += 1
        if calls > call:
            raise error
        original(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(target, name, fail)
        yield


def full() -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_what_differs_is_written(tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    assert update(out, OLD) == list(OLD)
    before = (out / "c").stat().st_mtime_ns
    assert update(out, NEW) == [name for name in NEW if name != "c"]
    assert content(out) == encoded(NEW)
    assert (out / "c").stat().st_mtime_ns == before
    assert update(out, NEW) == []


def test_files_have_the_rights_that_others_have(tmp_path: Path) -> None:
    (tmp_path / "other").touch()
    update(tmp_path, {"a": "text"})
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "other").stat().st_mode


@pytest.mark.parametrize("error", [full(), KeyboardInterrupt()], ids=["full", "interrupted"])
@pytest.mark.parametrize("written", range(4))
def test_a_full_disk_leaves_what_was_there(
    tmp_path: Path, written: int, error: BaseException
) -> None:
    update(tmp_path, OLD)
    before = sorted(tmp_path.rglob("*"))
    with failing("_write", written, error), pytest.raises(type(error)):
        update(tmp_path, NEW)
    assert content(tmp_path) == encoded(OLD)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("written", range(4))
def test_a_full_disk_leaves_no_new_folder(tmp_path: Path, written: int) -> None:
    with failing("_write", written, full()), pytest.raises(OSError):
        update(tmp_path / "new" / "out", NEW)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_cut_short_is_not_left(tmp_path: Path) -> None:
    """As the system does it: the first bytes are written, and then no more."""
    with file_size_limit(4096), pytest.raises(OutputError, match="File too large"):
        with writing("x", tmp_path):
            update(tmp_path, {"small": "text", "large": "text" * 4096})
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_the_way_is_seen_before_anything_is_replaced(tmp_path: Path) -> None:
    update(tmp_path, {"a": "old"})
    (tmp_path / "z" / "mine").mkdir(parents=True)
    with pytest.raises(IsADirectoryError):
        update(tmp_path, {"a": "new", "z": "new"})
    assert content(tmp_path) == {"a": b"old"}


def test_what_a_killed_process_left_makes_a_folder_no_others(tmp_path: Path) -> None:
    """A process that is killed cleans nothing up."""
    assert is_vacant(tmp_path)
    with pytest.MonkeyPatch.context() as patch, failing("replace", 0, full()):
        patch.setattr(Path, "unlink", lambda *_, **__: None)
        with pytest.raises(OSError):
            update(tmp_path, NEW)
    assert len(content(tmp_path)) == len(NEW) and is_vacant(tmp_path)
    update(tmp_path, NEW)
    assert not is_vacant(tmp_path)


@pytest.mark.parametrize("make", [Path.touch, os.mkfifo, lambda p: p.symlink_to("/")])
def test_whatever_is_no_folder_is_something(tmp_path: Path, make: Callable[[Path], None]) -> None:
    (tmp_path / "in").mkdir()
    make(tmp_path / "in" / "x")
    assert not is_vacant(tmp_path)


@pytest.mark.parametrize(
    "name", ["", "file", "file/x", "pipe", "loop", "x" * 5000, "a\0b", "\udcff" * 300]
)
def test_an_odd_folder_is_unfit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    os.mkfifo("pipe")
    Path("loop").symlink_to("loop")
    assert "; allowed: a folder" in unfit(name)
    if name:  # and no other way into it is found later
        with pytest.raises(OutputError), writing("x", Path(name)):
            update(Path(name), {"a": "text"})
    assert {path.name for path in tmp_path.iterdir()} == {"file", "pipe", "loop"}


@pytest.mark.parametrize("name", ["new", "new/er", "[red]", "\udcff", "a\nb", ".", ".."])
def test_other_folders_are_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    assert unfit(name) == ""
    assert update(Path(name), {"file of a test": "text"}) == ["file of a test"]


DEEP = b"[" * 100_000


@pytest.mark.parametrize(
    ("odd", "reason"),
    [
        (b"", "is no JSON"),
        (b"no JSON", "is no JSON"),
        (b"\xff\xfe\xfd", "is no JSON"),
        (DEEP, "is no JSON"),
        (DEEP + b"]" * len(DEEP), "is no JSON"),
        (b'{"a": ' * 50_000, "is no JSON"),
        (b"1" * 5000, "is no JSON"),
        (None, "No such file"),
        ("folder", "is no file"),
        ("pipe", "is no file"),
        ("huge", "has more than 16777216 bytes"),
        ("loop", "cannot be read"),
        ("/dev/zero", "is no file"),
        ("x" * 5000, "cannot be read"),
        ("file/x", "cannot be read"),
        ("a\0b", "is no JSON"),
    ],
)
def test_what_is_no_json_is_an_error_of_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, odd: bytes | str | None, reason: str
) -> None:
    monkeypatch.chdir(tmp_path)
    path = Path("x.json") if odd is None or isinstance(odd, bytes) else Path(odd)
    if isinstance(odd, bytes):
        path.write_bytes(odd)
    Path("folder").mkdir()
    os.mkfifo("pipe")
    Path("loop").symlink_to("loop")
    Path("file").touch()
    with Path("huge").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(InputError, match=rf"^asked: got .*{reason}.*; allowed: better\.$"):
        read_json("asked", path, "better")


def test_json_is_read(tmp_path: Path) -> None:
    (tmp_path / "x").write_text('{"a": [1, null, "\\u00e9"]}')
    assert read_json("asked", tmp_path / "x", "better") == {"a": [1, None, "é"]}
