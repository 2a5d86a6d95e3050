"""How commands talk: to people, to programs, to a terminal and to none."""

from __future__ import annotations

import io
import json
import logging
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from command_line import console_script

from gqa_cutlass.cli import output
from gqa_cutlass.codegen import DType, Math, default_config, shipped
from gqa_cutlass.codegen.compile import Compiled
from gqa_cutlass.kernels import store as store_module
from gqa_cutlass.kernels.store import Store

KERNEL = default_config(Math.TENSOROP, DType.F16, 64, 4, 8)
SCRIPT = Path(sys.executable).with_name("gqa-cutlass")


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory and a store of its own."""
    monkeypatch.setenv("GQA_CUTLASS_CACHE_DIR", str(tmp_path / "store"))
    monkeypatch.delenv("GQA_CUTLASS_KERNEL_DIR", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is compiled."""
    code = Compiled(code=b"code", registers=1, spill_bytes=0, stack_bytes=0, seconds=0.1)
    monkeypatch.setattr(store_module, "compile_kernel", lambda config, arch: code)


@pytest.mark.parametrize("command", [[SCRIPT], [sys.executable, "-m", "gqa_cutlass"]])
def test_the_version_is_the_packages(command: list[str]) -> None:
    done = subprocess.run([*command, "--version"], capture_output=True, text=True)
    assert done.stdout == f"gqa-cutlass {version('gqa-cutlass')}\n"
    assert (done.returncode, done.stderr) == (0, "")


def test_the_help_says_what_statuses_mean() -> None:
    said = " ".join(console_script("--help").out.split())
    assert "Status: 0 done; 1 done, and something is wrong" in said and "130 interrupted" in said


@pytest.mark.parametrize(
    ("typed", "found"),
    [("bui", "build"), ("build --mod", "--model"), ("build --model gpt-oss-1", "gpt-oss-120b"),
     (f"inspect {shipped()[0].name[:-1]}", shipped()[0].name)],
)  # fmt: skip
def test_a_shell_completes_commands_options_and_names(typed: str, found: str) -> None:
    words = f"gqa-cutlass {typed}"
    done = subprocess.run(
        [SCRIPT], capture_output=True, text=True,
        env={"_GQA_CUTLASS_COMPLETE": "complete_bash", "COMP_WORDS": words,
             "COMP_CWORD": str(len(words.split()) - 1), "PATH": ""},
    )  # fmt: skip
    assert found in done.stdout.split(), done.stderr


JSON: dict[str, tuple[tuple[str, ...], str]] = {
    "list": (("--kernels", "d64_g4"), "kernels"),
    "models": ((), "models"),
    "generate": (("--kernels", KERNEL.name, "--out", "out"), "files"),
    "build": (("--kernels", KERNEL.name, "--jobs", "1"), "kernels"),
    "warmup": (("--kernels", KERNEL.name, "--arch", "sm_80", "--jobs", "1"), "kernels"),
    "check": ((), "drifted"),
    "clean": ((), "removed"),
    "explain": (("--model", "phi4"), "explanations"),
    "doctor": ((), "findings"),
    "sim": (("--kernel", KERNEL.name, "--cache-len", "3"), "instructions"),
    "verify": (("--device", "cpu", "--q-heads", "4", "--kv-heads", "1", "--head-dim", "64",
                "--batch", "1"), "steps"),
}  # fmt: skip


@pytest.mark.parametrize("command", JSON)
def test_facts_are_json_for_programs(command: str, request: pytest.FixtureRequest) -> None:
    if command in ("build", "warmup"):
        request.getfixturevalue("fake")
    options, key = JSON[command]
    outcome = console_script(command, *options, "--json")
    found: dict[str, Any] = json.loads(outcome.out)
    # `check` fails where a kernel has no current evidence from a GPU.
    assert key in found and (outcome.status == 0 or command == "check")


@pytest.mark.usefixtures("fake")
def test_without_a_terminal_progress_is_a_line_for_each_kernel() -> None:
    outcome = console_script("build", "--kernels", "d64_g4_align8*tma", "--jobs", "1")
    names = [line.split()[0] for line in outcome.out.splitlines() if line.startswith("gqa_decode")]
    assert outcome.err.splitlines() == [
        f"[{i}/{len(names)}] {name} sm_90a: compiled" for i, name in enumerate(names, 1)
    ]
    assert "\x1b" not in outcome.err + outcome.out


def test_on_a_terminal_progress_is_a_bar_with_count_name_and_time_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    with output.progress(2) as step:
        step("first [kernel]", "compiled")
        step(f"{KERNEL.name} sm_90a", "compiled")
    said = sys.stderr.getvalue()  # type: ignore[attr-defined]
    lines = [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line) for line in re.split(r"[\r\n]", said)]
    last = next(line for line in reversed(lines) if "2/2" in line)
    assert "0:00:00" in last and "sm80_tensorop_f16_f16_d64_g4" in last
    assert max(map(len, lines)) <= 80


def test_a_first_call_that_compiles_says_so(fake: None, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "gqa_cutlass")
    Store.default().get(KERNEL, "sm_90a")
    Store.default().get(KERNEL, "sm_90a")
    (record,) = caplog.records
    assert record.levelno == logging.INFO
    assert record.getMessage().startswith(f"compiling {KERNEL.name} for sm_90a")


@pytest.mark.parametrize(("columns", "least"), [("80", 80), ("5", 20), ("no number", None)])
def test_the_width_is_what_columns_says(
    columns: str, least: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert output.width() == least


def test_list_fits_and_keeps_whole_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lines = console_script("list").out.splitlines()
    assert max(map(len, lines)) <= 80
    assert {config.name for config in shipped()} <= {line.split()[0] for line in lines}
