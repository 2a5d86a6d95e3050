"""`gqa-cutlass bench`: what it prints and writes, and what it refuses."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_fakes import full_record
from command_line import console_script, file_size_limit
from helpers import REPOSITORY
from typer.testing import CliRunner, Result

from bench import checkout, command, measure, report
from bench.record import Record
from gqa_cutlass.cli import app, main

ENDINGS = "", "-context", "-bandwidth", "-ratios"
PICTURES = {f"x{end}.{kind}" for end in ENDINGS for kind in ("svg", "png")}
SHEETS = {"x.csv", "x-prefill.csv", "x-features.csv", "x-merges.csv", "x-serving.csv"}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory is not the repository, and nothing is written into the repository."""
    (tmp_path / "results").mkdir()
    monkeypatch.setattr(checkout, "RESULTS", tmp_path / "results")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    full_record().save(tmp_path / "x.json")
    return tmp_path / "x.json"


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """A GPU on which everything is measured at once; returns what was asked for."""
    asked = []

    def run(*arguments: Any) -> tuple[Record, Path]:
        asked.append(arguments)
        path = arguments[1] / "x.json"
        full_record().save(path)
        return full_record(), path

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(measure, "run", run)
    monkeypatch.setattr(checkout, "commit", lambda: "c0ffee")
    return asked


def _bench(*options: object) -> Result:
    result = CliRunner().invoke(app, ["bench", *map(str, options)])
    assert result.exit_code == 0, result.output
    return result


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_run_is_shown_and_written(measured: list[tuple[Any, ...]], tmp_path: Path) -> None:
    result = _bench()
    assert measured == [("", tmp_path / "results", "c0ffee", list(measure.PARTS))]
    assert "us per call on the grid" in result.stdout
    assert _names(tmp_path / "results") == PICTURES | SHEETS | {"x.json"}
    assert f"wrote {tmp_path}/results/x.csv, " in result.stderr


def test_a_run_outside_a_checkout_is_written_here(
    measured: list[tuple[Any, ...]], tmp_path: Path, elsewhere: Path
) -> None:
    (tmp_path / "results").rmdir()
    _bench()
    assert _names(elsewhere) == PICTURES | SHEETS | {"x.json"}


def test_a_part_is_written_where_it_is_told(
    measured: list[tuple[Any, ...]], tmp_path: Path
) -> None:
    _bench("--points", "llama", "--out", tmp_path / "new", "--commit", "beef")
    assert measured == [("llama", tmp_path / "new", "beef", list(measure.PARTS))]
    assert _names(tmp_path / "new") == PICTURES | SHEETS | {"x.json"}
    assert _names(tmp_path / "results") == set()


def test_a_record_is_shown_and_nothing_written(
    saved: Path, tmp_path: Path, elsewhere: Path
) -> None:
    result = _bench("--from", saved)
    assert "us per call on the grid" in result.stdout and "prefill over decode" in result.stdout
    assert _names(elsewhere) == _names(tmp_path / "results") == set()
    assert _names(tmp_path) == {"x.json", "results", "work"}


def test_a_record_is_written_anew_where_it_is_told(saved: Path, tmp_path: Path) -> None:
    _bench("--from", saved, "--out", tmp_path / "a" / "b")
    assert _names(tmp_path / "a" / "b") == PICTURES | SHEETS


def test_markdown_is_the_readmes(saved: Path) -> None:
    result = _bench("--from", saved, "--markdown")
    assert result.stdout == report.markdown(full_record()) + "\n"


def test_without_matplotlib_there_are_no_plots(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "matplotlib" else found(name)
    )
    result = _bench("--from", saved, "--out", tmp_path / "new")
    assert _names(tmp_path / "new") == SHEETS
    assert "bench: no plots, which need `pip install 'gqa-cutlass[plots]'`\n" in result.stderr


def _refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *options: object
) -> str:
    """What the console script says, in one line, when it exits with 2."""
    monkeypatch.setattr(sys, "argv", ["gqa-cutlass", "bench", *map(str, options)])
    with pytest.raises(SystemExit) as stopped:
        main()
    said = capsys.readouterr()
    assert (stopped.value.code, said.out, said.err.count("\n")) == (2, "", 1)
    return said.err


@pytest.mark.parametrize("inside", [True, False], ids=["checkout", "elsewhere"])
def test_without_a_gpu_it_says_how_to_see_the_shipped_record(
    inside: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    if inside:
        (tmp_path / "results" / command.SHIPPED).touch()
    where = "../results" if inside else "<repository>/bench/results"
    said = _refused(monkeypatch, capsys)
    assert "measures on a GPU, and torch finds none" in said
    assert f"`gqa-cutlass bench --from {where}/nvidia-h200.json`" in said


@pytest.mark.parametrize(("option", "given"), [("--points", "llama"), ("--only", "host")])
def test_a_part_must_not_replace_the_record(
    option: str, given: str, measured: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    said = _refused(monkeypatch, capsys, option, given)
    assert f"{option}: got {given!r}" in said and "--out" in said
    assert measured == []


def test_a_part_that_there_is_not_is_refused(
    measured: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    said = _refused(monkeypatch, capsys, "--only", "serving,all", "--out", "new")
    assert "--only: got 'all'; allowed: grid, ragged," in said and measured == []


def test_parts_are_measured_alone(measured: list[tuple[Any, ...]], tmp_path: Path) -> None:
    _bench("--only", "serving, host", "--out", tmp_path / "new")
    assert measured == [("", tmp_path / "new", "c0ffee", ["serving", "host"])]


@pytest.mark.parametrize("option", ["--points", "--commit", "--only"])
def test_options_of_a_measurement_are_refused_without_one(
    option: str, saved: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "--from: got --points or" in _refused(monkeypatch, capsys, "--from", saved, option, "x")


def test_without_the_benchmark_it_says_where_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], saved: Path
) -> None:
    monkeypatch.setattr("gqa_cutlass.checkout.ROOT", Path("/usr/lib/python3/site-packages"))
    error = _refused(monkeypatch, capsys, "--from", saved)
    assert "bench: got the installed package in /usr/lib/python3/site-packages; needed: " in error


def test_names_of_a_record_are_no_markup(saved: Path) -> None:
    odd = {"gpu": "[red]GPU[/x]", "date": ":warning:"}
    record = full_record()
    row = replace(record.rows[0], kernel="[/]", measured={"[red]": 1.0, "[/y]": 2.0})
    replace(record, run=odd, rows=[row], host={"[/z]": 1.0}).save(saved)
    output = _bench("--from", saved).output
    for name in ("gpu: [red]GPU[/x], date: :warning:", "[/y]", "\n[/z] "):
        assert name in output


def test_files_that_cannot_be_written_are_one_line_below_the_tables(
    saved: Path, elsewhere: Path
) -> None:
    with file_size_limit(100):
        outcome = console_script("bench", "--from", saved, "--out", "new", "--markdown")
    assert (outcome.status, outcome.out) == (2, report.markdown(full_record()) + "\n")
    assert "bench: --out: got new, where files cannot be written (File too large)" in outcome.err
    assert outcome.err.count("\n") == 1 and _names(elsewhere) == set()


@pytest.mark.parametrize("content", [None, "{}"], ids=["absent", "no record"])
def test_a_record_that_cannot_be_read_is_one_line(
    content: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    if content is not None:
        (tmp_path / "y.json").write_text(content)
    assert "y.json" in _refused(monkeypatch, capsys, "--from", tmp_path / "y.json")


def test_the_package_runs_as_the_command(saved: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bench", "--from", saved, "--markdown"],
        cwd=REPOSITORY, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, report.markdown(full_record()) + "\n"), done.stderr


# The commit.


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with one commit, as the checkout."""
    if shutil.which("git") is None:
        pytest.skip("needs git")
    root = tmp_path / "checkout"
    (root / "bench" / "results").mkdir(parents=True)
    (root / "a.py").touch()
    settings = ("user.name=n", "user.email=e@example.org", "commit.gpgsign=false")
    options = [word for setting in settings for word in ("-c", setting)]
    for arguments in (("init",), ("add", "."), (*options, "commit", "-m", "first")):
        subprocess.run(["git", *arguments], cwd=root, check=True, capture_output=True)
    monkeypatch.setattr(checkout, "_ROOT", root)
    return root


def test_the_commit_is_the_checkouts(repository: Path) -> None:
    commit = checkout.commit()
    assert len(commit) == 40 and set(commit) <= set("0123456789abcdef")


@pytest.mark.parametrize("name", ["a.py", "b.py"], ids=["changed", "new"])
def test_a_commit_with_other_files_is_dirty(repository: Path, name: str) -> None:
    clean = checkout.commit()
    (repository / name).write_text("1\n")
    assert checkout.commit() == f"{clean}-dirty"


def test_results_make_no_commit_dirty(repository: Path) -> None:
    clean = checkout.commit()
    (repository / "bench" / "results" / "x.json").write_text("{}\n")
    assert checkout.commit() == clean


@pytest.mark.usefixtures("repository")
def test_without_git_the_commit_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert checkout.commit() == "unknown"


def test_outside_a_checkout_the_commit_is_unknown(
    tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (repository / "inside").mkdir()  # installed into a folder of somebody's repository
    monkeypatch.setattr(checkout, "_ROOT", repository / "inside")
    assert checkout.commit() == "unknown"
