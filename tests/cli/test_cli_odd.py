"""The command line, whatever is given: a line on stderr and status 2, or a sensible result.

Commands and options are asked of the application, so that a new one is walked as well.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from bench_fakes import full_record
from command_line import Outcome, console_script
from helpers import compiled

from gqa_cutlass.cli import app
from gqa_cutlass.codegen import KernelConfig, manifest, select
from gqa_cutlass.codegen.compile import Compiled
from gqa_cutlass.kernels import export as export_module
from gqa_cutlass.kernels import store as store_module
from gqa_cutlass.kernels.store import Store, StoredKernel

COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
KERNEL = next(c for c in select("tensorop_f16*d64_g4_*align8") if not c.tma)
SIZES = {"--q-heads": "1", "--kv-heads": "1", "--head-dim": "64"}
# With which every command runs, and is cheap. A new command that needs options needs them here.
PLAIN: dict[str, dict[str, str]] = {
    "build": {"--kernels": KERNEL.name},
    "warmup": {"--kernels": KERNEL.name},
    "export": {"--kernels": KERNEL.name, "--out": "exported"},
    "explain": SIZES,
    "verify": {**SIZES, "--batch": "1", "--device": "cpu"},
    "sim": {"--kernel": KERNEL.name, "--cache-len": "3"},
    "bench": {"--from": "record.json"},
    "tune": {"--heads": "32/8/128"},
}
ARGUMENTS = {"inspect": (KERNEL.name,), "tune": ("--dry-run",)}
ODD = {
    "minus one": "-1",
    "zero": "0",
    "2^63": str(2**63),
    "10^20": str(10**20),
    "10^5000": f"1{'0' * 5000}",
    "a fraction": "1.5",
    "no number": "nan",
    "text": "text",
    "nothing": "",
    "a space": " ",
    "markup": "[red]x[/blue]",
    "no UTF-8": os.fsdecode(b"\xff\xfe"),
    "two lines": "a\nb",
    "a terminal's command": "\x1b[31m",
    "very long": "x" * 5000,
    "a folder": "folder",
    "a file": "file",
    "a file in a file": "file/file",
    "what is not there": "no/such/file",
    "a pipe": "pipe",
    "a link to itself": "loop",
}


def _options(command: str) -> Iterator[tuple[str, bool]]:
    """Options of a command, and whether they take no value."""
    for parameter in COMMANDS[command].params:
        if parameter.param_type_name == "argument":
            continue
        for name in (*parameter.opts, *parameter.secondary_opts):
            yield name, parameter.is_flag


WALK = [
    pytest.param(command, option, is_flag, id=f"{command} {option}")
    for command in COMMANDS
    for option, is_flag in _options(command)
]


def _build_all(
    store: Store, wanted: list[tuple[KernelConfig, str]], jobs: int = 0
) -> Iterator[StoredKernel]:
    """Compiles nothing."""
    code = Compiled(code=b"code", registers=1, spill_bytes=0, stack_bytes=0, seconds=0.1)
    for config, arch in wanted:
        yield StoredKernel(config=config, arch=arch, path=store.root, compiled=code, was_built=True)


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with odd things in it, a store, and nothing that takes long."""
    compiled(KERNEL, KERNEL.ptx_arch)
    monkeypatch.setenv("GQA_CUTLASS_KERNEL_DIR", str(Store.default().root))
    monkeypatch.setenv("GQA_CUTLASS_CACHE_DIR", str(tmp_path / "store"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(store_module, "build_each", _build_all)
    monkeypatch.setattr(export_module, "build_all", _build_all)
    monkeypatch.setattr(export_module, "pack", lambda name, found: name.encode())
    monkeypatch.setattr(manifest, "shipped", lambda: [KERNEL])
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "matplotlib" else found(name)
    )
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    Path("folder").mkdir()
    Path("file").write_text("text")
    os.mkfifo("pipe")
    Path("loop").symlink_to("loop")
    record = full_record()
    replace(record, rows=record.rows[:1], ragged=[], prefill=[]).save(Path("record.json"))
    return tmp_path / "work"


def run(command: str, changes: dict[str, str], *more: str) -> Outcome:
    """Run a command, plainly but for some options."""
    given = PLAIN.get(command, {}) | changes
    words = [word for pair in given.items() for word in pair]
    return console_script(command, *ARGUMENTS.get(command, ()), *words, *more)


def _wrong(outcomes: dict[str, Outcome]) -> dict[str, Outcome]:
    return {n: o for n, o in outcomes.items() if not (o.is_refusal or o.status == 0)}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_runs_plainly(command: str) -> None:
    outcome = run(command, {})
    assert outcome.status in ((0, 1) if command in ("check", "doctor") else (0,)), outcome


@pytest.mark.parametrize(("command", "option", "is_flag"), WALK)
def test_odd_values_are_refused_in_one_line_or_have_a_sensible_result(
    command: str, option: str, is_flag: bool
) -> None:
    if is_flag:
        outcomes = {name: run(command, {}, f"{option}={value}") for name, value in ODD.items()}
        assert [name for name, outcome in outcomes.items() if not outcome.is_refusal] == []
    else:
        outcomes = {name: run(command, {option: value}) for name, value in ODD.items()}
        assert _wrong(outcomes) == {}


@pytest.mark.parametrize(("command", "option", "is_flag"), WALK)
def test_an_option_without_its_value_is_refused(command: str, option: str, is_flag: bool) -> None:
    if not is_flag:
        assert run(command, {}, option).is_refusal


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("word", ["--odd", "odd", "--\udcff", "a\nb", "-1", "\x1b[31m"])
def test_what_no_command_takes_is_refused(command: str, word: str) -> None:
    assert run(command, {}, word).is_refusal


@pytest.mark.parametrize("command", ["export", "explain", "sim", "inspect"])
def test_what_a_command_needs_is_asked_for(command: str) -> None:
    outcome = console_script(command)
    assert outcome.is_refusal and re.search("Missing (option|argument)", outcome.err)


@pytest.mark.parametrize("name", ODD.values(), ids=ODD)
def test_no_such_kernel(name: str) -> None:
    """What looks like an option is behind `--`."""
    assert console_script("inspect", "--", name).is_refusal


@pytest.mark.parametrize("word", ODD.values(), ids=ODD)
def test_no_such_command(word: str) -> None:
    assert console_script(word).is_refusal
