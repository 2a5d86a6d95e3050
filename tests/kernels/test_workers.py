"""Worker processes: results in order, and an end with the process that started them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest
from instant import ARCH, CONFIG, OTHER
from late import touch_late

from gqa_cutlass.kernels.store import Store
from gqa_cutlass.kernels.workers import map_in_order

PATIENCE_S = 120  # for what takes a second on an idle machine

_SLEEPERS = """
import signal, threading, time
from gqa_cutlass.kernels.workers import map_in_order

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs lack it
    threading.Thread(target=time.sleep, args=(3600,), daemon=True).start()  # like a progress bar
    list(map_in_order(time.sleep, [3600] * 4, 2))
"""
_BUILD = """
import signal
from gqa_cutlass.cli import main

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    main()
"""


def _wait_for(what: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not what():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def _running(session: int) -> dict[int, str]:
    """Command lines of the processes of a session that have not ended, by number."""
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            after_name = (entry / "stat").read_text().rpartition(")")[2].split()
            if after_name[0] != "Z" and int(after_name[3]) == session:
                found[int(entry.name)] = (entry / "cmdline").read_text()
        except (OSError, ValueError):  # no process, or one that ended meanwhile
            continue
    return found


def _workers(session: int) -> list[int]:
    return [number for number, line in _running(session).items() if "spawn_main" in line]


def _start(folder: Path, program: str, *arguments: object) -> subprocess.Popen[str]:
    script = folder / "script.py"
    script.write_text(program)
    command = [sys.executable, script, *map(str, arguments)]
    return subprocess.Popen(
        command, start_new_session=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def test_results_come_in_order(tmp_path: Path) -> None:
    items = [(0.02 * (9 - i), tmp_path / str(i)) for i in range(9)]
    assert list(map_in_order(touch_late, items, 2)) == [path for _, path in items]


def test_left_early_the_processes_end_at_once(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    results = map_in_order(touch_late, [(0, first), (20, second), (20, second)], 2)
    assert next(results) == first
    results.close()  # type: ignore[attr-defined]
    assert not second.exists()


def test_an_error_reaches_the_caller_and_ends_the_processes(tmp_path: Path) -> None:
    late = tmp_path / "late"
    with pytest.raises(TypeError):
        list(map_in_order(touch_late, [("soon", late), (20, late)], 2))  # type: ignore[list-item]
    assert not late.exists()


def test_a_process_that_ends_abruptly_is_noticed() -> None:
    with pytest.raises(BrokenProcessPool):
        list(map_in_order(os._exit, [1, 1], 2))


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_processes_end_with_the_one_that_started_them(tmp_path: Path, how: signal.Signals) -> None:
    parent = _start(tmp_path, _SLEEPERS)
    _wait_for(lambda: len(_workers(parent.pid)) == 2)
    parent.send_signal(how)
    parent.communicate()
    assert parent.returncode == -how
    _wait_for(lambda: not _running(parent.pid))


@pytest.mark.parametrize("started", [1, 2])
def test_ctrl_c_at_a_terminal_is_one_traceback(tmp_path: Path, started: int) -> None:
    parent = _start(tmp_path, _SLEEPERS)
    _wait_for(lambda: len(_workers(parent.pid)) >= started)
    os.killpg(parent.pid, signal.SIGINT)
    assert parent.communicate()[1].count("Traceback") == 1
    _wait_for(lambda: not _running(parent.pid))


@pytest.mark.usefixtures("compiler")
def test_a_killed_build_leaves_no_process_and_holds_up_no_other(tmp_path: Path) -> None:
    out, kernels = tmp_path / "built", f"{CONFIG.name},{OTHER.name}"
    parent = _start(tmp_path, _BUILD, "build", "--jobs", 2, "--out", out, "--kernels", kernels)
    _wait_for(lambda: out.is_dir() and len(list(out.glob("*.lock"))) == 2)  # both compile
    assert len(_workers(parent.pid)) == 2
    parent.kill()
    parent.communicate()
    _wait_for(lambda: not _running(parent.pid))
    assert len(list(out.glob("*.lock"))) == 2
    for config in (CONFIG, OTHER):
        assert Store(root=out).get(config, ARCH).was_built
    assert {file.suffix for file in out.iterdir()} == {".cubin", ".json"}


@pytest.mark.usefixtures("compiler")
def test_an_interrupted_build_leaves_whole_kernels_and_nothing_else(tmp_path: Path) -> None:
    out, kernels = tmp_path / "built", f"{CONFIG.name},{OTHER.name}"
    parent = _start(tmp_path, _BUILD, "build", "--jobs", 2, "--out", out, "--kernels", kernels)
    _wait_for(lambda: out.is_dir() and len(list(out.glob("*.lock"))) == 2)  # both compile
    os.killpg(parent.pid, signal.SIGINT)
    said = parent.communicate()
    assert parent.returncode == 130 and "Traceback" not in "".join(said)
    _wait_for(lambda: not _running(parent.pid))
    assert {file.suffix for file in out.iterdir()} <= {".cubin", ".json"}
