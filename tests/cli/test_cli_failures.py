"""How the console script ends: what it says, its status, and never a traceback."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import typer
from command_line import LONGEST, console_script
from helpers import run_python

from gqa_cutlass.cli.failures import status_of
from gqa_cutlass.codegen import shipped
from gqa_cutlass.errors import CacheAllocationError, CompileError, InputError
from gqa_cutlass.proof.evidence import Evidence

SCRIPT = Path(sys.executable).with_name("gqa-cutlass")


def said(capsys: pytest.CaptureFixture[str], error: BaseException) -> tuple[int, str]:
    """Status and stderr of a command that raises."""

    def command() -> None:
        raise error

    status = status_of(command)
    out, err = capsys.readouterr()
    assert out == ""
    return status, err


@pytest.mark.parametrize("found", [None, 0, 1, 5])
def test_a_command_has_its_own_status(found: int | None) -> None:
    assert status_of(lambda: found) == (found or 0)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (InputError("batch: got 0; allowed: 1."), "batch: got 0; allowed: 1."),
        (InputError("path: got a\nb"), "path: got a b"),
        (InputError("path: got \udcff\x1b[31m\x07"), r"path: got \xff\x1b[31m\x07"),
        (CacheAllocationError("KVCache: memory"), "KVCache: memory"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (OSError(36, "File name too long", "a\nb"), r"'a\nb': File name too long"),
        (OSError("no number"), "no number"),
        (OSError(9, "Bad file descriptor", 5), "5: Bad file descriptor"),
        (MemoryError(), "memory: there is not enough for this"),
        (
            ImportError("libx.so: failed to\nmap"),
            "libx.so: failed to map; `gqa-cutlass doctor` says what is missing",
        ),
        (typer.BadParameter("got 'x'"), "Invalid value: got 'x'"),
    ],
    ids=repr,
)
def test_an_error_is_a_line_and_status_2(
    error: Exception, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said(capsys, error) == (2, f"gqa-cutlass: {line}\n")


def test_a_very_long_line_is_cut_in_its_middle(capsys: pytest.CaptureFixture[str]) -> None:
    status, line = said(capsys, InputError(f"got {'x' * 10**6}; allowed: less"))
    assert status == 2 and len(line) < LONGEST
    assert line.startswith("gqa-cutlass: got xxx") and line.endswith("xxx; allowed: less\n")


def test_the_compiler_may_have_more_to_say(capsys: pytest.CaptureFixture[str]) -> None:
    log = "\n".join(["NVRTC could not compile", *("line" for _ in range(1000))])
    assert said(capsys, CompileError(log)) == (2, f"gqa-cutlass: {log}\n")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), typer.Abort()], ids=repr)
def test_an_interrupt_is_status_130_and_says_nothing(
    error: BaseException, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said(capsys, error) == (130, "")


def test_a_reader_that_left_is_no_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert said(capsys, BrokenPipeError(32, "Broken pipe")) == (1, "")


def test_a_fault_of_the_program_stays_a_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        status_of(lambda: 1 // 0)


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [(KeyboardInterrupt(), 130, ""),
     (MemoryError(), 2, "gqa-cutlass: memory: there is not enough for this\n")],
    ids=["interrupt", "memory"],
)  # fmt: skip
def test_commands_are_run_so(
    error: BaseException, status: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def shipped(_: object) -> None:
        raise error

    monkeypatch.setattr(Evidence, "shipped", classmethod(shipped))
    outcome = console_script("list")
    assert (outcome.status, outcome.out, outcome.err) == (status, "", said)


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [(KeyboardInterrupt(), 130, ""),
     (ImportError("No module named 'rich'"), 2,
      "gqa-cutlass: No module named 'rich'; remedy: install gqa-cutlass again\n")],
    ids=["interrupt", "nothing to import"],
)  # fmt: skip
def test_so_is_what_they_need_imported(
    error: BaseException, status: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Finder:
        def find_spec(self, name: str, *_: object) -> None:
            if name == "gqa_cutlass.cli.application":
                raise error

    monkeypatch.delitem(sys.modules, "gqa_cutlass.cli.application")
    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    outcome = console_script("list")
    assert (outcome.status, outcome.out, outcome.err) == (status, "", said)


def test_without_a_command_the_commands_are_printed() -> None:
    outcome = console_script()
    assert outcome.status == 0 and "doctor" in outcome.out and outcome.err == ""


@pytest.mark.parametrize(
    ("redirected", "status", "errors"),
    [
        ("| head -1", "0 1", [""]),
        ("| true", "0 1", [""]),
        ("2>&-", "0", [""]),
        ("> /dev/full", "2", ["gqa-cutlass: No space left on device\n"]),
        ("> /dev/full 2> /dev/full", "2", [""]),
        (">&- 2>&-", "0", [""]),
    ],
)
def test_output_that_goes_nowhere(redirected: str, status: str, errors: list[str]) -> None:
    script = f'"$1" list {redirected}; echo ${{PIPESTATUS[0]}} >&3'
    done = subprocess.run(
        ["bash", "-c", f"exec 3>&1; {script}", "-", SCRIPT], capture_output=True, text=True
    )
    assert done.stderr in errors
    assert done.stdout.split()[-1] in status.split()


def test_a_terminal_that_knows_little_is_no_error() -> None:
    code = "from gqa_cutlass.cli import main; import sys; sys.argv[1:] = ['list']; main()"
    assert shipped()[0].name in run_python(code, PYTHONIOENCODING="ascii", NO_COLOR=1)


WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None  # importing it is an error
from gqa_cutlass.cli import main
for command in sys.argv[1:]:
    sys.argv[1:] = command.split()
    try:
        main()
    except SystemExit as stopped:
        print(stopped.code, flush=True)
"""


def test_without_torch_commands_say_what_is_missing() -> None:
    sizes = "--q-heads 1 --kv-heads 1 --head-dim 64"
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, "doctor", f"explain {sizes}", f"verify {sizes}",
         f"sim --cache-len 3 --kernel {shipped()[0].name}", "bench"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout.splitlines()[-5:] == ["1", "2", "2", "2", "2"]
    (torch,) = (line for line in done.stdout.splitlines() if line.startswith("torch "))
    assert "MISSING: " in torch
    assert done.stderr.count("\n") == 4 == done.stderr.count("gqa-cutlass: ")
    assert done.stderr.count("; `gqa-cutlass doctor` says what is missing\n") == 4
