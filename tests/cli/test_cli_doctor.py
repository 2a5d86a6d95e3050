"""What `gqa-cutlass doctor` looks at, and the remedies that it names."""

from __future__ import annotations

import importlib.metadata
import json
import re
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import REPOSITORY
from typer.testing import CliRunner, Result

from gqa_cutlass.cli import app
from gqa_cutlass.doctor import CUDA_12, findings
from gqa_cutlass.errors import CompilerMissingError, DeviceError


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that is not there yet."""
    monkeypatch.setenv("GQA_CUTLASS_CACHE_DIR", str(tmp_path / "store"))
    monkeypatch.delenv("GQA_CUTLASS_KERNEL_DIR", raising=False)
    monkeypatch.delenv("GQA_CUTLASS_DISABLE_JIT", raising=False)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


@pytest.mark.parametrize(
    ("setting", "value", "said", "remedy"),
    [
        ("CACHE_DIR", "file", "store +MISSING: .*file", "set GQA_CUTLASS_CACHE_DIR"),
        ("CACHE_DIR", "open", "store +MISSING: .*writable by every user", "chmod go-w"),
        ("KERNEL_DIR", "none", "kernel folders +MISSING: .*none, which is not there", "--out"),
        ("KERNEL_DIR", "open", "kernel folders +MISSING: .*writable by every user", "chmod go-w"),
    ],
)
def test_doctor_looks_at_folders_and_their_permissions(
    setting: str, value: str, said: str, remedy: str, monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:  # fmt: skip
    (tmp_path / "file").write_text("")
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    monkeypatch.setenv(f"GQA_CUTLASS_{setting}", str(tmp_path / value))
    result = run("doctor")
    assert result.exit_code == 1 and re.search(f"^{said}", result.output, re.M)
    assert remedy in result.output


def test_doctor_finds_a_full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    full = SimpleNamespace(f_bavail=1, f_frsize=4096)
    monkeypatch.setattr("os.statvfs", lambda path: full)
    result = run("doctor")
    assert result.exit_code == 1 and "on a disk with 4 KiB free" in result.output
    assert "remedy: make room" in result.output


@pytest.mark.parametrize(
    ("needed", "said"),
    [("typer>=99", "typer .*, where >=99 is needed"),
     ("typer<0.1", "typer .*, where <0.1 is needed"),
     ("no-such-package>=1", "no-such-package is not there")],
)  # fmt: skip
def test_doctor_compares_versions(needed: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    declared = ["rich>=1", needed, "x; extra == 'y'"]
    monkeypatch.setattr("importlib.metadata.requires", lambda _: declared)
    result = run("doctor")
    assert result.exit_code == 1 and re.search(f"dependencies +MISSING: {said}", result.output)
    assert f"remedy: pip install '{needed}'" in result.output


def test_doctor_asks_for_cuda_12s_packages_where_the_bindings_are_12s(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    versions = {"cuda-bindings": "12.9.1", "cuda-python": "12.9.1", "rich": "15.0"}

    def version(name: str) -> str:
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    declared = ["cuda-python>=13.3", "nvidia-cuda-nvrtc>=13.0", "rich>=13.8"]
    monkeypatch.setattr("importlib.metadata.requires", lambda _: declared)
    monkeypatch.setattr("importlib.metadata.version", version)
    found = {f.what: f for f in findings()}["dependencies"]
    assert (found.found, found.missing) == ("nvidia-cuda-nvrtc-cu12 is not there", True)
    assert found.remedy == "pip install 'nvidia-cuda-nvrtc-cu12>=12.6,<13'"
    versions["nvidia-cuda-nvrtc-cu12"] = "12.8.93"
    found = {f.what: f for f in findings()}["dependencies"]
    assert found.found == "cuda-python 12.9.1, nvidia-cuda-nvrtc-cu12 12.8.93, rich 15.0"
    versions["nvidia-cuda-nvrtc-cu12"] = "12.4.99"
    assert "where >=12.6 is needed" in {f.what: f for f in findings()}["dependencies"].found


def test_the_list_for_cuda_12_is_the_declared_one_with_other_cuda_packages() -> None:
    declared = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["dependencies"]
    lines = (REPOSITORY / "requirements-cuda12.txt").read_text().splitlines()
    listed = [line for line in lines if not line.startswith("#")]
    name = re.compile(r"[\w-]+")
    assert listed == [CUDA_12.get(name.match(text)[0], text) for text in declared]


def test_without_a_compiler_all_is_well_where_nothing_is_compiled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def missing() -> None:
        raise CompilerMissingError("NVRTC: not found; needed: it; remedy: get it")

    monkeypatch.setattr("gqa_cutlass.codegen.compile.compiler_version", missing)
    assert re.search("compiler and headers +MISSING: NVRTC", run("doctor").output)
    monkeypatch.setenv("GQA_CUTLASS_DISABLE_JIT", "1")
    output = run("doctor").output
    assert re.search("compiler and headers +none, and none is needed", output)
    assert re.search("compiling at run time +disabled", output)


def test_doctor_tells_a_driver_that_is_broken_from_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken() -> str:
        raise DeviceError("no usable GPU: CUDA_ERROR_UNKNOWN; needed: one.")

    monkeypatch.setattr("gqa_cutlass.gpu.driver.driver_version", broken)
    assert re.search(r"^driver +none$", run("doctor").output, re.M)
    monkeypatch.setattr("gqa_cutlass.doctor._CONTROL", tmp_path)
    result = run("doctor")
    assert result.exit_code == 1 and "loaded, but of no use (no usable GPU" in result.output
    assert "remedy: install or upgrade the NVIDIA driver" in result.output


def test_doctor_finds_a_driver_older_than_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gqa_cutlass.gpu.driver._driver_version", lambda: 12080)
    monkeypatch.setattr("gqa_cutlass.gpu.driver._compiler_major", lambda: 13)
    found = {f.what: f for f in findings()}
    assert (found["driver"].found, found["driver"].missing) == ("supports CUDA 12.8", False)
    assert found["GPU"].missing and "needed: CUDA 13.0 or newer" in found["GPU"].found
    assert "requirements-cuda12.txt" in found["GPU"].found


def test_doctor_reports_for_programs_on_a_narrow_terminal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = json.loads(run("doctor", "--json").stdout)["findings"]
    assert {"what", "found", "missing", "remedy"} == set(found[0])
    monkeypatch.setenv("COLUMNS", "80")
    lines = run("doctor").stdout.splitlines()
    assert all(len(line) <= 80 or " " not in line.strip() for line in lines)


def test_doctor_tries_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: str) -> None:
        raise OSError("libnvrtc-builtins.so: cannot open")

    monkeypatch.setattr("gqa_cutlass.codegen.compile.compile_source", broken)
    result = run("doctor")
    assert result.exit_code == 1
    assert re.search("compiler and headers +MISSING: libnvrtc-builtins", result.output)
    assert "remedy: `pip install .` in a checkout" in result.output
