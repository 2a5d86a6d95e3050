"""The Rust crate in an export: builds without warnings, passes its own tests, is complete."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from helpers import REPOSITORY

from gqa_cutlass.kernels.export import compiled, plan_export, write_bundle
from gqa_cutlass.kernels.store import Store

KERNELS = "d64_g7,f16_f16_d128_g4_align8_multistage"
BY_TOKEN = "gqa_decode_sm80_tensorop_f16_e4m3t_d128_g4_align8_multistage_h8n16w4s1"
NO_GPU = 77
USAGE = 2

needs_cargo = [
    pytest.mark.slow,
    pytest.mark.xdist_group("cargo"),  # one process: they share what is built
    pytest.mark.skipif(shutil.which("cargo") is None, reason="needs cargo"),
    pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler"),
]


# A third of the time: what is compiled here runs for milliseconds, and nobody debugs it.
QUICKLY = {
    "CARGO_INCREMENTAL": "0", "CARGO_PROFILE_DEV_DEBUG": "0", "CARGO_PROFILE_DEV_OPT_LEVEL": "0"
}  # fmt: skip


@dataclass(frozen=True)
class Crate:
    """An exported crate.

    Args:
        folder: The bundle.
        files: What is in it, relative to it.
        target: Where cargo builds.
    """

    folder: Path
    files: set[str]
    target: Path

    def run(self, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a command in the crate. Warnings of both compilers are errors."""
        strict = {"RUSTFLAGS": "-Dwarnings", "RUSTDOCFLAGS": "-Dwarnings", "CFLAGS": "-Werror"}
        variables = (
            os.environ | QUICKLY | strict | {"CARGO_TARGET_DIR": str(self.target)} | environment
        )
        return subprocess.run(
            command, cwd=self.folder, env=variables, capture_output=True, text=True
        )

    def check(self, *command: str) -> str:
        """Run a command that must succeed, and say what it printed."""
        done = self.run(*command)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def example(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        """Run the example."""
        self.check("cargo", "build", "--offline", "--examples")
        return self.run(str(self.target / "debug" / "examples" / "decode"), *map(str, arguments))


@pytest.fixture(scope="module")
def crate(tmp_path_factory: pytest.TempPathFactory) -> Crate:
    return exported(tmp_path_factory.mktemp("rust"), KERNELS)


def exported(folder: Path, kernels: str) -> Crate:
    """A crate with these kernels."""
    export = plan_export(kernels, ["sm_90a"])
    paths = write_bundle(folder / "bundle", export, compiled(export, Store.default(), jobs=1))
    files = {str(path.relative_to(folder / "bundle")) for path in paths}
    return Crate(folder / "bundle", files, folder / "target")


def needs(tool: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(shutil.which(tool) is None, reason=f"needs {tool}")


class TestCrate:
    pytestmark = needs_cargo

    def test_the_crate_builds_and_its_tests_pass(self, crate: Crate) -> None:
        printed = crate.check("cargo", "test", "--offline")
        results = [line for line in printed.splitlines() if line.startswith("test result: ")]
        assert len(results) == 5  # unit tests, three files, examples in the documentation
        assert all(line.startswith("test result: ok. ") for line in results)
        assert not any(line.startswith("test result: ok. 0 passed") for line in results)

    def test_its_tests_pass_without_plain_kernels(self, tmp_path: Path) -> None:
        """As of an export of one kernel with scales of tokens."""
        exported(tmp_path, BY_TOKEN).check("cargo", "test", "--offline", "--tests")

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
    def test_the_example_says_that_it_needs_a_gpu(self, crate: Crate) -> None:
        done = crate.example(1, 14, 2, 64, 10, 100, "f16")
        assert (done.returncode, done.stdout) == (NO_GPU, "")
        assert done.stderr.startswith("no usable GPU: ") and len(done.stderr.splitlines()) == 1

    @pytest.mark.parametrize(
        "arguments",
        [
            (),
            (1, 14, 2, 64, 10, "f16"),
            (1, 14, 2, 64, 10, 100, "f32"),
            (1, 14, 2, 64, -1, 9, "f16"),
        ],
        ids=["none", "too few", "type", "negative"],
    )
    def test_the_example_says_how_it_is_called(
        self, crate: Crate, arguments: tuple[object, ...]
    ) -> None:
        done = crate.example(*arguments)
        assert (done.returncode, done.stdout) == (USAGE, "")
        assert done.stderr.startswith("usage: decode BATCH ")

    def test_a_machine_without_a_compiler_is_told_what_to_install(self, crate: Crate) -> None:
        done = crate.run("cargo", "build", "--offline", CC="no-such-cc")
        assert done.returncode != 0
        assert "gqa-attention-decode: no-such-cc: " in done.stderr
        assert "or name one in $CC" in done.stderr

    def test_its_documentation_builds(self, crate: Crate) -> None:
        crate.check("cargo", "doc", "--offline")

    @needs("cargo-clippy")
    def test_clippy_finds_nothing(self, crate: Crate) -> None:
        crate.check("cargo", "clippy", "--offline", "--all-targets", "--", "-Dwarnings")

    @needs("cargo-fmt")
    def test_it_is_formatted(self, crate: Crate) -> None:
        crate.check("cargo", "fmt", "--check")

    def test_a_package_holds_all_that_was_exported(self, crate: Crate) -> None:
        listed = crate.check("cargo", "package", "--offline", "--allow-dirty", "--list")
        assert crate.files - set(listed.split()) == set()


def test_the_crate_has_the_packages_version() -> None:
    manifest = tomllib.loads((REPOSITORY / "templates" / "bundle" / "Cargo.toml").read_text())
    assert manifest["package"]["version"] == importlib.metadata.version("gqa-cutlass")
    assert manifest["package"]["license"] == "BSD-3-Clause"
    assert "dependencies" not in manifest
