"""What is read from a store: entries that are whole, and that nobody else could have written."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from instant import ARCH, CONFIG, OTHER, InstantCompiler

from gqa_cutlass.codegen.compile import Compiled
from gqa_cutlass.errors import CompilerMissingError, KernelMissingError, StoreError
from gqa_cutlass.kernels import entries
from gqa_cutlass.kernels import store as module
from gqa_cutlass.kernels.store import Store, entry_stem

OTHER_USER = 54321  # whom no machine knows
_FIGURES = {"registers": 99, "spill_bytes": 0, "stack_bytes": 16, "seconds": 0.5}
_WHAT = {"entry": "kernel", "compiler": "", "sha256": hashlib.sha256(b"code").hexdigest()}
_METADATA = json.dumps(_WHAT | _FIGURES).encode()


def _give_away(path: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """Make a file another user's, or this process another user; returns whose the file is then."""
    if os.geteuid() == 0:
        os.chown(path, OTHER_USER, -1)
        return OTHER_USER
    monkeypatch.setattr(os, "geteuid", lambda: OTHER_USER)
    return os.getuid()


def without_privileges(ask: Callable[[], str]) -> str:
    """What a function returns in a child that is not root."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            if os.geteuid() == 0:
                os.setgroups([])
                os.setresgid(OTHER_USER, OTHER_USER, OTHER_USER)
                os.setresuid(OTHER_USER, OTHER_USER, OTHER_USER)
            answer = ask()
        except BaseException as error:
            answer = repr(error)
        os.write(writer, answer.encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        answer = pipe.read()
    os.waitpid(child, 0)
    return answer


@pytest.mark.parametrize("suffix", [".cubin", ".json"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.unlink(),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:-7]),
        lambda path: path.write_bytes(b"\xff" + path.read_bytes()[1:]),
        lambda path: path.write_bytes(b"[]"),
        lambda path: path.write_bytes(b"null"),
        lambda path: path.write_bytes(b"{}"),
    ],
    ids=["missing", "empty", "truncated", "bit-flip", "list", "null", "no-fields"],
)
def test_corrupt_entry_is_a_miss_and_gets_replaced(
    store: Store, compiler: InstantCompiler, suffix: str, damage: object
) -> None:
    built = store.get(CONFIG, ARCH)
    damage(built.path.with_suffix(suffix))  # type: ignore[operator]
    assert store.find(CONFIG, ARCH) is None
    healed = store.get(CONFIG, ARCH)
    assert healed.was_built and healed.compiled == built.compiled
    assert not store.get(CONFIG, ARCH).was_built
    assert len(compiler.compiled) == 2


@pytest.mark.parametrize(
    "change",
    [
        {"from_the_future": 1},
        {"seconds": "x"},
        {"seconds": None},
        {"seconds": 10**400},
        {"seconds": float("nan")},
        {"seconds": float("inf")},
        {"seconds": -1.0},
        {"registers": 99.0},
        {"registers": True},
        {"registers": -99},
        {"spill_bytes": [0]},
        {"stack_bytes": {}},
        {"sha256": 7},
        {"compiler": None},
        {"entry": "gqa_decode_of_another"},
        {"entry": None},
    ],
    ids=str,
)
def test_metadata_that_is_not_as_written_is_a_miss(store: Store, change: dict[str, object]) -> None:
    path = store.get(CONFIG, ARCH).path.with_suffix(".json")
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert store.find(CONFIG, ARCH) is None
    assert store.get(CONFIG, ARCH).was_built and not store.get(CONFIG, ARCH).was_built


@pytest.mark.parametrize(
    "content",
    [
        b"[" * 10**5,
        b'{"a":' * 10**5,
        b"9" * 10**5,
        b" " * 10**6 + b"{}",
        b"\xff\xfe{}",
        b"\0" * 100,
        b'{"seconds": 1e999, "seconds": -0}',
        b"NaN",
        b'"\\ud800"',
    ],
    ids=lambda content: repr(content[:12]),
)
def test_no_metadata_whatever_is_more_than_a_miss(store: Store, content: bytes) -> None:
    path = store.get(CONFIG, ARCH).path.with_suffix(".json")
    path.write_bytes(content)
    assert store.find(CONFIG, ARCH) is None
    assert store.get(CONFIG, ARCH).was_built


@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_metadata_with_changed_bytes_is_a_miss_or_says_the_same(data: st.DataObject) -> None:
    content = bytearray(_METADATA)
    start = data.draw(st.integers(0, len(content)))
    end = data.draw(st.integers(start, min(start + 8, len(content))))
    content[start:end] = data.draw(st.binary(max_size=8))
    with suppress(ValueError, RecursionError):  # which `read` refuses
        found = entries._parse("kernel", bytes(content), b"code")
        assert all(type(value) is type(getattr(found, key)) for key, value in _FIGURES.items())


def _replaced_by(kind: str, path: Path) -> None:
    """Put something that is no file in a file's place."""
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        os.mknod(path, stat.S_IFSOCK | 0o600)
    elif kind == "folder":
        path.mkdir()
    elif kind == "full folder":
        (path / "a" / "b").mkdir(parents=True)
    else:
        path.symlink_to({"dangling": "absent", "loop": path.name, "device": "/dev/zero"}[kind])


KINDS = ["pipe", "socket", "folder", "full folder", "dangling", "loop", "device"]


@pytest.mark.parametrize("suffix", [".cubin", ".json", ".lock"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_file_is_a_miss_and_gets_replaced(store: Store, kind: str, suffix: str) -> None:
    path = store.get(CONFIG, ARCH).path
    files = {path, path.with_suffix(".json")}
    if suffix == ".lock":
        path.unlink()
        _replaced_by(kind, store.root / f"{entry_stem(CONFIG, ARCH)}.lock")
    else:
        _replaced_by(kind, path.with_suffix(suffix))
    assert store.find(CONFIG, ARCH) is None
    assert store.get(CONFIG, ARCH).was_built and not store.get(CONFIG, ARCH).was_built
    assert set(store.root.iterdir()) == files and all(file.is_file() for file in files)


def test_a_folder_that_cannot_be_replaced_is_named(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def busy(path: Path) -> None:
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(path))

    path = store.get(CONFIG, ARCH).path
    path.unlink()
    path.mkdir()
    monkeypatch.setattr(shutil, "rmtree", busy)  # as for a mount point
    with pytest.raises(StoreError, match=f"cannot write to {store.root} .*busy: {path}"):
        store.get(CONFIG, ARCH)


@pytest.mark.parametrize("suffix", [".cubin", ".json"])
def test_a_file_beyond_all_size_is_a_miss(store: Store, suffix: str) -> None:
    path = store.get(CONFIG, ARCH).path.with_suffix(suffix)
    os.truncate(path, 1 << 40)
    assert store.find(CONFIG, ARCH) is None
    assert store.get(CONFIG, ARCH).was_built


def test_entries_that_changed_places_are_misses(store: Store) -> None:
    files = [
        [path, path.with_suffix(".json")]
        for path in (store.get(config, ARCH).path for config in (CONFIG, OTHER))
    ]
    for one, other in zip(*files, strict=True):
        spare = one.with_suffix(".spare")
        one.rename(spare)
        other.rename(one)
        spare.rename(other)
    for config in (CONFIG, OTHER):
        assert store.find(config, ARCH) is None
        assert config.name.encode() in store.get(config, ARCH).compiled.code


def test_an_entry_renamed_for_another_architecture_is_a_miss(store: Store) -> None:
    for path in (built := store.get(CONFIG, "sm_80").path, built.with_suffix(".json")):
        suffix = path.name.rpartition("sm_80")[2].split(".", 2)[2]
        path.rename(path.with_name(f"{entry_stem(CONFIG, ARCH)}.{suffix}"))
    assert store.find(CONFIG, ARCH) is None


def test_ptx_that_is_no_text_is_a_miss(store: Store) -> None:
    built = store.get(CONFIG, "compute_80")
    meta = built.path.with_suffix(".json")
    code = b"\xff" + built.compiled.code
    checksum = hashlib.sha256(code).hexdigest()
    built.path.write_bytes(code)
    meta.write_text(json.dumps(json.loads(meta.read_text()) | {"sha256": checksum}))
    assert store.find(CONFIG, "compute_80") is None
    assert store.get(CONFIG, "compute_80").was_built


@pytest.mark.parametrize("writable", [True, False], ids=["cache", "read-only"])
@pytest.mark.parametrize(
    ("mode", "who"),
    [
        (0o777, "every user"),
        (0o1777, "every user"),
        (0o703, "every user"),
        (0o775, "group"),
        (0o730, "group"),
    ],
)
def test_folder_that_others_may_write_is_refused(
    tmp_path: Path, store: Store, writable: bool, mode: int, who: str
) -> None:
    folder = store.get(CONFIG, ARCH).path.parent
    folder.chmod(mode)
    used = store if writable else Store(root=tmp_path / "root", read_only=(folder,))
    for call in (used.get, used.find):
        with pytest.raises(StoreError, match=f"{folder} is writable by {who}.*needed.*chmod go-w"):
            call(CONFIG, ARCH)


@pytest.mark.parametrize("writable", [True, False], ids=["cache", "read-only"])
def test_folder_of_another_user_is_refused(
    tmp_path: Path, store: Store, writable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = store.get(CONFIG, ARCH).path.parent
    other = _give_away(folder, monkeypatch)
    used = store if writable else Store(root=tmp_path / "root", read_only=(folder,))
    for call in (used.get, used.find):
        with pytest.raises(StoreError, match=f"{folder} belongs to user {other}.*needed: .*root"):
            call(CONFIG, ARCH)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make what belongs to root")
def test_what_root_built_serves_everybody(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.get(CONFIG, ARCH)
    monkeypatch.setattr(os, "geteuid", lambda: OTHER_USER)
    assert store.find(CONFIG, ARCH) is not None


@pytest.mark.parametrize("suffix", [".cubin", ".json"])
@pytest.mark.parametrize("damage", [0o666, 0o664, 0o602, "owner", "link"], ids=str)
def test_file_that_others_may_have_written_is_replaced_and_said_once(
    store: Store,
    suffix: str,
    damage: int | str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    file = store.get(CONFIG, ARCH).path.with_suffix(suffix)
    why = "is writable by"
    if damage == "owner":
        why = f"belongs to user {_give_away(file, monkeypatch)}"
    elif damage == "link":  # to a file that anybody may change
        target = store.root.parent / "target"
        target.write_bytes(file.read_bytes())
        target.chmod(0o666)
        file.unlink()
        file.symlink_to(target)
    else:
        file.chmod(damage)
    for _ in range(2):
        assert store.find(CONFIG, ARCH) is None
    (line,) = caplog.messages
    assert str(file) in line and why in line
    monkeypatch.setattr(os, "geteuid", os.getuid)
    assert store.get(CONFIG, ARCH).was_built and not store.get(CONFIG, ARCH).was_built
    assert stat.S_IMODE(file.lstat().st_mode) == 0o600


def test_links_to_what_is_trusted_are_followed(tmp_path: Path, store: Store) -> None:
    built = store.get(CONFIG, ARCH)
    folder = tmp_path / "links"
    folder.mkdir(0o755)
    for file in built.path.parent.iterdir():
        (folder / file.name).symlink_to(file)
    (tmp_path / "link").symlink_to(folder)
    found = Store(root=None, read_only=(tmp_path / "link",)).get(CONFIG, ARCH, jit=False)
    assert found.compiled == built.compiled


@pytest.mark.parametrize("suffix", [".cubin", ".json"])
def test_what_was_found_and_not_used_is_in_the_error(
    tmp_path: Path, store: Store, suffix: str
) -> None:
    file = store.get(CONFIG, ARCH).path.with_suffix(suffix)
    file.chmod(0o666)
    behind = Store(root=tmp_path / "root", read_only=(store.root,))
    with pytest.raises(KernelMissingError, match=f"not used: {file}: is writable by every user"):
        behind.get(CONFIG, ARCH, jit=False)


def test_what_was_found_and_not_used_is_in_the_compilers_error_too(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*_: object) -> Compiled:
        raise CompilerMissingError("NVRTC: not found")

    file = store.get(CONFIG, ARCH).path
    file.chmod(0o666)
    monkeypatch.setattr(module, "compile_kernel", missing)
    behind = Store(root=tmp_path / "root", read_only=(store.root,))
    with pytest.raises(CompilerMissingError, match=f"NVRTC: not found.*not used: {file}"):
        behind.get(CONFIG, ARCH)


@pytest.mark.parametrize("part", ["folder", ".cubin", ".json"])
def test_what_cannot_be_read_is_said(part: str, compiler: InstantCompiler) -> None:
    with TemporaryDirectory() as name:
        place = Path(name)
        place.chmod(0o755)
        built = Store(root=place / "built", private=False).get(CONFIG, ARCH)
        hidden = built.path.parent if part == "folder" else built.path.with_suffix(part)
        behind = Store(root=None, read_only=(built.path.parent,))

        def ask() -> str:
            try:
                return str(behind.get(CONFIG, ARCH, jit=False).path)
            except KernelMissingError as error:
                return str(error)

        assert without_privileges(ask) == str(built.path)
        hidden.chmod(0)
        assert f"{hidden}: found, but not readable (Permission denied)" in without_privileges(ask)


@pytest.mark.parametrize(
    ("private", "umask", "folder_mode", "file_mode"),
    [
        (True, 0o000, 0o700, 0o600),
        (True, 0o022, 0o700, 0o600),
        (False, 0o022, 0o755, 0o644),
        (False, 0o027, 0o750, 0o640),
        (False, 0o077, 0o700, 0o600),
        (False, 0o002, 0o755, 0o644),  # what its group may write is trusted by nobody
        (False, 0o000, 0o755, 0o644),
    ],
)
def test_the_cache_is_private_and_the_umask_says_who_reads_what_is_deployed(
    tmp_path: Path,
    compiler: InstantCompiler,
    private: bool,
    umask: int,
    folder_mode: int,
    file_mode: int,
) -> None:
    before = os.umask(umask)
    try:
        store = Store(root=tmp_path / "store", private=private)
        path = store.get(CONFIG, ARCH).path
    finally:
        os.umask(before)
    files = (path, path.with_suffix(".json"))
    assert stat.S_IMODE(path.parent.stat().st_mode) == folder_mode
    assert [stat.S_IMODE(file.stat().st_mode) for file in files] == [file_mode] * 2
    assert store.find(CONFIG, ARCH) is not None
