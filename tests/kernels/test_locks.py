"""Locks: one holder at a time, which says who it is; what a killed one leaves does not block."""

from __future__ import annotations

import fcntl
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from gqa_cutlass.errors import StoreError
from gqa_cutlass.kernels import locks
from gqa_cutlass.kernels.locks import locked, locked_if_free


@contextmanager
def child(act: Callable[[], None]) -> Iterator[int]:
    """A process that has done something and then waits; killed in the end. Gives its number."""
    reader, writer = os.pipe()
    number = os.fork()
    if number == 0:
        act()
        os.write(writer, b"done")
        signal.pause()
        os._exit(1)
    try:
        os.read(reader, 4)
        yield number
    finally:
        os.kill(number, signal.SIGKILL)
        os.waitpid(number, 0)
        os.close(reader)
        os.close(writer)


def _is_free(path: Path) -> bool:
    with locked_if_free(path) as free:
        return free


def test_one_holds_it_at_a_time(tmp_path: Path) -> None:
    holders, most = [0], [0]

    def work() -> None:
        for _ in range(10):
            with locked(tmp_path / "lock"):
                holders[0] += 1
                most[0] = max(most[0], holders[0])
                os.sched_yield()
                holders[0] -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (holders, most) == ([0], [1])
    assert list(tmp_path.iterdir()) == []


def test_who_waits_says_so_once_and_for_whom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "lock"
    monkeypatch.setattr(locks, "QUIET_S", 0)
    with ExitStack() as held:
        held.enter_context(locked(path))

        def told(*arguments: object) -> None:
            warn(*arguments)
            held.close()

        warn = locks.LOG.warning
        monkeypatch.setattr(locks.LOG, "warning", told)
        with locked(path):
            pass
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("gqa_cutlass", logging.WARNING)
    assert f"process {os.getpid()} on {socket.gethostname()}" in record.getMessage()
    assert str(path) in record.getMessage()


def test_a_free_lock_is_taken_in_silence(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        with locked(tmp_path / "lock"):
            pass
    assert caplog.records == []


def test_a_wait_has_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "lock"
    monkeypatch.setattr(locks, "QUIET_S", 0)
    monkeypatch.setattr(locks, "LIMIT_S", 0)
    with (
        locked(path),
        pytest.raises(StoreError, match=f"{path}: waited .* for process {os.getpid()} on .*needed"),
        locked(path),
    ):
        pass


def test_a_holder_that_is_killed_holds_nothing(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    held = ExitStack()
    with child(lambda: held.enter_context(locked(path))) as number:
        assert not _is_free(path)
        assert f"process {number} on" in path.read_text()
    assert path.exists() and _is_free(path) and not path.exists()


def test_a_lock_is_free_after_its_release_whoever_forked_meanwhile(tmp_path: Path) -> None:
    with ExitStack() as held:
        held.enter_context(locked(tmp_path / "lock"))
        with child(lambda: None):
            held.close()
            assert _is_free(tmp_path / "lock")


def test_a_lock_file_that_is_removed_under_its_holder_holds_up_nobody(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with ExitStack() as held:
        with locked(path):
            path.unlink()
            held.enter_context(locked(path))
        assert path.exists() and not _is_free(path)


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to("nowhere")])
def test_what_is_no_file_is_no_lock(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "lock")
    with locked(tmp_path / "lock"):
        assert not _is_free(tmp_path / "lock")


def test_without_locks_a_file_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", missing)
    with pytest.warns(UserWarning, match="flock not supported"), locked(tmp_path / "lock"):
        pass


@pytest.mark.parametrize("content", [b"", b"\xff\0", b"x" * 10**6, b"a\nb"], ids=len)
def test_holders_that_say_nonsense_are_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    path = tmp_path / "lock"
    monkeypatch.setattr(locks, "QUIET_S", 0)
    monkeypatch.setattr(locks, "LIMIT_S", 0)
    with locked(path):
        path.write_bytes(content)
        with pytest.raises(StoreError) as raised, locked(path):
            pass
    assert len(str(raised.value)) < 1000 and str(raised.value).isprintable()
