"""The wheel and the sdist: complete, tidy, and enough to generate from, outside the repository."""

from __future__ import annotations

import email
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path, PurePosixPath

import pytest
from helpers import REPOSITORY

from gqa_cutlass.codegen.manifest import generated_files

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("packaging")]  # what is built is shared

OURS = "gqa_cutlass", "__editable__", "__pycache__"
OF_CUTLASS = "cutlass", "nvidia_cutlass", "pycute", "pydot", "scipy", "treelib"
IGNORED = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "*.egg-info")


def _run(*command: object, cwd: Path) -> str:
    """Run a command without what would let the repository in; fails where it fails."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel made from it."""
    folder = tmp_path_factory.mktemp("packaging")
    shutil.copytree(REPOSITORY, folder / "source", ignore=IGNORED)
    build = ("-m", "build", "--no-isolation", "--outdir", folder / "dist")
    _run(sys.executable, *build, folder / "source", cwd=folder)
    return folder / "dist"


@pytest.fixture(scope="module")
def wheel(built: Path) -> set[PurePosixPath]:
    """Files in the wheel."""
    with zipfile.ZipFile(next(built.glob("*.whl"))) as archive:
        return {PurePosixPath(name) for name in archive.namelist()}


@pytest.fixture(scope="module")
def sdist(built: Path) -> set[PurePosixPath]:
    """Files in the sdist, below its top folder."""
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        names = [PurePosixPath(member.name) for member in archive if member.isfile()]
    return {name.relative_to(name.parts[0]) for name in names}


@pytest.fixture(scope="module")
def installed(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the commands of a fresh environment that holds the wheel.

    Dependencies are those of the present environment: nothing is downloaded. What only
    nvidia-cutlass brings is left out.
    """
    folder = tmp_path_factory.mktemp("installed")
    python = _environment(folder, (*OURS, *OF_CUTLASS))
    options = ("--no-deps", "--no-index", "--disable-pip-version-check", "--quiet")
    pip = (sys.executable, "-m", "pip", "--python", python, "install")
    _run(*pip, *options, next(built.glob("*.whl")), cwd=folder)
    return python.parent


def _environment(folder: Path, without: tuple[str, ...]) -> Path:
    """Make an environment with the packages of the present one, but some; returns its Python."""
    _run(sys.executable, "-m", "venv", "--without-pip", folder / "venv", cwd=folder)
    python = folder / "venv" / "bin" / "python"
    where = "import site; print(site.getsitepackages()[0])"
    library = Path(_run(python, "-c", where, cwd=folder).strip())
    for package in Path(sysconfig.get_path("purelib")).iterdir():
        if not package.name.startswith(without):
            (library / package.name).symlink_to(package)
    return python


def _repository_files(folder: str, *patterns: str) -> set[str]:
    paths = [path for pattern in patterns for path in (REPOSITORY / folder).rglob(pattern)]
    return {str(path.relative_to(REPOSITORY)) for path in paths}


def test_wheel_holds_every_module_template_and_header(wheel: set[PurePosixPath]) -> None:
    expected = _repository_files("gqa_cutlass", "*.py", "*.json")
    for folder, patterns in (
        ("codegen", ("*.py",)),
        ("templates", ("*.py", "*.jinja", "*.cuh")),
    ):
        expected |= {f"gqa_cutlass/{name}" for name in _repository_files(folder, *patterns)}
    assert expected - {str(name) for name in wheel} == set()


def test_wheel_holds_the_headers_of_cute_and_their_license(
    built: Path, wheel: set[PurePosixPath]
) -> None:
    folder = PurePosixPath("gqa_cutlass/templates/cutlass")
    include = folder / "include"
    assert {include / "cute/layout.hpp", include / "cutlass/version.h"} <= wheel
    held = [name for name in wheel if name.is_relative_to(include)]
    with zipfile.ZipFile(next(built.glob("*.whl"))) as archive:
        assert "NVIDIA CORPORATION" in archive.read(str(folder / "LICENSE.txt")).decode()
        assert sum(archive.getinfo(str(name)).compress_size for name in held) < 300_000
        info = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(archive.read(info))
    needed = [text for text in metadata.get_all("Requires-Dist") if "extra ==" not in text]
    assert not any("cutlass" in text or "scipy" in text for text in needed)


def test_wheel_holds_nothing_that_is_of_use_in_a_checkout_alone(wheel: set[PurePosixPath]) -> None:
    folders = {"bench", "generated", "tests", "examples", "docs"}
    assert [name for name in wheel if folders & set(name.parts[:2])] == []


def test_wheel_has_one_top_level_package(wheel: set[PurePosixPath]) -> None:
    tops = {name.parts[0] for name in wheel}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"gqa_cutlass"}


def test_wheel_declares_its_command(built: Path) -> None:
    with zipfile.ZipFile(next(built.glob("*.whl"))) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".dist-info/entry_points.txt"))
        assert "gqa-cutlass = gqa_cutlass.cli:main" in archive.read(name).decode()


def test_sdist_holds_what_the_wheel_is_made_from(sdist: set[PurePosixPath]) -> None:
    expected = _repository_files("gqa_cutlass", "*.py", "*.json")
    expected |= _repository_files("codegen", "*.py")
    expected |= _repository_files("templates", "*.py", "*.jinja", "*.cuh")
    expected |= {"pyproject.toml", "README.md", "LICENSE", "templates/bundle/LICENSE"}
    expected |= {"CHANGELOG.md", "CITATION.cff", "SECURITY.md", "setup.py"}
    expected |= {"requirements-cuda12.txt"}
    assert expected - {str(name) for name in sdist} == set()


def test_wheel_has_its_license_and_says_what_it_is(built: Path) -> None:
    with zipfile.ZipFile(next(built.glob("*.whl"))) as archive:
        names = archive.namelist()
        info = next(name for name in names if name.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(archive.read(info))
        text = archive.read(info.replace("METADATA", "licenses/LICENSE")).decode()
    assert {"gqa_cutlass/py.typed", "gqa_cutlass/templates/bundle/LICENSE"} <= set(names)
    assert "BSD 3-Clause License" in text and "The gqa_cutlass authors" in text
    assert (metadata["License-Expression"], metadata["Author"]) == (
        "BSD-3-Clause", "The gqa_cutlass authors",
    )  # fmt: skip
    assert "Typing :: Typed" in metadata.get_all("Classifier")
    assert metadata["Requires-Python"] == ">=3.11" and metadata["Project-URL"] is None


def test_what_is_written_of_the_release_agrees() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    version = project["version"]
    cited = (REPOSITORY / "CITATION.cff").read_text()
    assert f"\nversion: {version}\n" in cited and "\nlicense: BSD-3-Clause\n" in cited
    assert f"\n## [{version}] - " in (REPOSITORY / "CHANGELOG.md").read_text()
    build = (REPOSITORY / "templates" / "bundle" / "CMakeLists.txt").read_text()
    assert f"project(gqa_attention_decode VERSION {version} LANGUAGES C)" in build
    bundled = REPOSITORY / "templates" / "bundle" / "LICENSE"
    assert bundled.read_text() == (REPOSITORY / "LICENSE").read_text()


_TYPED = """
from torch import Tensor
from gqa_cutlass import GqaError, StoreError, __version__, gqa_decode, plan

def step(q: Tensor, cache: Tensor, token: Tensor) -> Tensor:
    try:
        out: Tensor = plan(q, cache, cache, token, token, cache_seqlens=3)(
            q, cache, cache, token, token, 3
        )
    except StoreError as error:
        raise GqaError(__version__) from error
    return out + gqa_decode(q, cache, cache, cache_seqlens=3)

reveal_type(gqa_decode(step, 1, 2, cache_seqlens=3))
"""


@pytest.mark.thorough
def test_a_users_program_is_checked_by_the_packages_types(installed: Path, tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    (tmp_path / "program.py").write_text(_TYPED)
    mypy = (sys.executable, "-m", "mypy", "--strict", "--python-executable", installed / "python")
    done = subprocess.run([*mypy, "program.py"], cwd=tmp_path, capture_output=True, text=True)
    wrong = [line for line in done.stdout.splitlines() if ": error: " in line]
    assert wrong and all(line.startswith("program.py:14: ") for line in wrong), done.stdout


def test_installed_package_is_the_wheels(installed: Path, tmp_path: Path) -> None:
    code = "import gqa_cutlass.codegen as c, gqa_cutlass as g; print(g.__file__); print(c.__file__)"
    for line in _run(installed / "python", "-c", code, cwd=tmp_path).splitlines():
        assert Path(line).is_relative_to(installed.parent)


def test_installed_package_generates_what_is_committed(installed: Path, tmp_path: Path) -> None:
    _run(installed / "gqa-cutlass", "generate", "--out", "out", cwd=tmp_path)
    written = {path.name: path.read_text() for path in (tmp_path / "out").iterdir()}
    assert written == {
        name: (REPOSITORY / "generated" / name).read_text() for name in generated_files()
    }


def test_installed_package_lists_its_kernels(installed: Path, tmp_path: Path) -> None:
    output = _run(installed / "gqa-cutlass", "list", cwd=tmp_path)
    names = {name.removesuffix(".cu") for name in generated_files() if name.endswith(".cu")}
    assert all(name in output for name in names)


@pytest.mark.parametrize("command", ["bench", "check"])
def test_what_works_in_a_checkout_says_so(installed: Path, tmp_path: Path, command: str) -> None:
    done = subprocess.run(
        [installed / "gqa-cutlass", command], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert f"{command}: got the installed package in " in done.stderr
    assert f"`.venv/bin/gqa-cutlass {command}`" in done.stderr and done.stderr.count("\n") == 1


def test_installed_package_compiles(installed: Path, tmp_path: Path) -> None:
    build = ("build", "--kernels", "tensorop*_f16*d64_g4_*align8", "--out", "built")
    output = _run(installed / "gqa-cutlass", *build, cwd=tmp_path)
    assert "2 of 2 compiled" in output  # one per schedule


@pytest.mark.thorough
def test_cuda_12s_compiler_serves(built: Path, tmp_path: Path) -> None:
    """In an environment with its packages and none of CUDA 13's; 100 MB are downloaded."""
    python = _environment(tmp_path, (*OURS, *OF_CUTLASS, "cuda", "nvidia"))
    lines = (REPOSITORY / "requirements-cuda12.txt").read_text().splitlines()
    cuda = [line for line in lines if line.startswith(("cuda", "nvidia"))]
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-compile")
    done = subprocess.run([*pip, *cuda], capture_output=True, text=True)
    if done.returncode:
        pytest.skip("no package index can be reached")
    _run(*pip, "--no-deps", "--no-index", next(built.glob("*.whl")), cwd=tmp_path)
    command = python.parent / "gqa-cutlass"
    found = json.loads(_run(command, "doctor", "--json", cwd=tmp_path))["findings"]
    told = {finding["what"]: finding["found"] for finding in found}
    assert told["compiler and headers"].startswith("nvrtc-12.")
    assert "nvidia-cuda-nvrtc-cu12 12." in told["dependencies"]
    _run(command, "sim", "--kernel", "tensorop_f16_f16_d64_g4_align8_multistage_h8n32w8s1",
         "--cache-len", "20", cwd=tmp_path)  # fmt: skip
    built_for = ("--arch", "sm_80,sm_90a,sm_100f,sm_120f", "--kernels", "f16_f16_d64_g4_align8")
    _run(command, "build", *built_for, "--out", "built", cwd=tmp_path)
    bundle = ("export", "--out", "bundle", "--kernels", "f16_f16_d64_g4_align8")
    _run(command, *bundle, "--arch", "sm_90a", cwd=tmp_path)


# Of the dependencies those that are small, and not of CI's pinned CUDA and torch.
_SMALL = ("cuda-python", "cuda-core", "filelock", "jinja2", "numpy", "rich", "typer")
_USE = """
import sys
from importlib.metadata import version
from pathlib import Path

import cuda.core
import typer
from gqa_cutlass.cli import app
from gqa_cutlass.codegen import render, shipped
from gqa_cutlass.codegen.fatbin import pack
from gqa_cutlass.kernels.store import Store

repository, *names = sys.argv[1:]
kernel = shipped()[0]
assert render(kernel) == Path(repository, "generated", f"{kernel.name}.cu").read_text()
cubin = Store.default().get(kernel, "sm_90a", jit=True)
assert not Store.default().get(kernel, "sm_90a", jit=False).was_built
assert pack(kernel.name, {"sm_90a": cubin.compiled.code})
for command in (
    ["--help"],
    ["build", "--kernels", kernel.name],
    ["list", "--kernels", kernel.name],
    ["sim", "--kernel", kernel.name, "--cache-len", "3"],
):
    app(command, standalone_mode=False)
try:
    app(["sim"], standalone_mode=False)
except typer.BadParameter as missing:
    assert "--kernel" in missing.format_message()
else:
    raise AssertionError("an option that is needed was not asked for")
print(*(version(name) for name in names))
"""


@pytest.mark.skipif(sys.version_info >= (3, 13), reason="newer Pythons need newer versions anyway")
def test_the_lowest_versions_that_are_declared_work(tmp_path: Path) -> None:
    declared = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["dependencies"]
    bounds = dict(re.fullmatch(r"([\w-]+)>=([\d.]+).*", text).groups() for text in declared)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")
    lowest = [f"{name}=={bounds[name]}" for name in _SMALL]
    target = ("install", "--no-compile", "--only-binary", ":all:", "--target", tmp_path / "lowest")
    done = subprocess.run([*pip, *target, *lowest], capture_output=True, text=True)
    if done.returncode:
        reached = subprocess.run([*pip, "index", "versions", "typer"], capture_output=True)
        assert reached.returncode, done.stderr
        pytest.skip("no package index can be reached")
    used = subprocess.run(
        [sys.executable, "-c", _USE, REPOSITORY, *_SMALL],
        env=os.environ | {"PYTHONPATH": str(tmp_path / "lowest")},
        capture_output=True,
        text=True,
    )
    assert used.returncode == 0, used.stdout + used.stderr
    versions = used.stdout.splitlines()[-1].split()
    for version, name in zip(versions, _SMALL, strict=True):
        assert f"{version}.0".startswith(bounds[name]), name
