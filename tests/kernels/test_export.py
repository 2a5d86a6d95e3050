"""`gqa-cutlass export`: what goes into a bundle, where it may be written, and its files."""

from __future__ import annotations

import errno
import glob
import importlib.metadata
import os
import re
import struct
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from c_build import build, dispatched
from c_library import Library
from command_line import file_size_limit
from helpers import REPOSITORY
from typer.testing import CliRunner, Result

from gqa_cutlass.cli import app, main
from gqa_cutlass.codegen import ARCHES, DType, KernelConfig, Math, Schedule, default_config, shipped
from gqa_cutlass.codegen import fatbin as fatbin_module
from gqa_cutlass.codegen import files as files_module
from gqa_cutlass.codegen.bundle import Image, bundle_files
from gqa_cutlass.codegen.compile import Compiled, compile_source, compiler_version
from gqa_cutlass.codegen.fatbin import pack
from gqa_cutlass.codegen.schema.policies import tagged
from gqa_cutlass.errors import (
    CompileError,
    CompilerMissingError,
    ConfigError,
    ExportError,
    OutputError,
)
from gqa_cutlass.kernels import export as export_module
from gqa_cutlass.kernels import store as store_module
from gqa_cutlass.kernels.export import Export, facts, plan_export, write_bundle

WIDE = default_config(Math.TENSOROP, DType.F16, 64, 4, 8)
TMA = default_config(Math.TENSOROP, DType.F16, 64, 4, 8, Schedule.TMA)
NEVER = default_config(Math.SIMT, DType.F16, 64, 4, 2)  # is what dispatch chooses
BUNDLE = REPOSITORY / "templates" / "bundle"
FATBIN_MAGIC = 0xBA55ED50


# -- What is exported


def test_everything_that_ships_and_is_dispatched_is_exported_by_default() -> None:
    found = plan_export(None, list(ARCHES))
    assert list(found.kernels) == dispatched(shipped())
    assert [arch.name for arch in found.archs] == list(ARCHES)


def test_each_kernel_is_wanted_for_each_architecture_of_its_schedule() -> None:
    found = plan_export("f16_f16_d64_g4_align8", ["sm_90a", "sm_80", "sm_80"])
    assert [arch.name for arch in found.archs] == ["sm_80", "sm_90a"]
    assert set(found.kernels) == {k for k in found.kernels if "d64_g4_align8" in k.name}
    assert sorted(found.wanted, key=str) == sorted(
        [(k, arch) for k in found.kernels for arch in ("sm_80", "sm_90a") if arch in k.archs],
        key=str,
    )
    assert (TMA, "sm_80") not in found.wanted and (TMA, "sm_90a") in found.wanted


def test_architectures_without_a_kernel_are_left_out() -> None:
    assert [arch.name for arch in plan_export(TMA.name, ["sm_80", "sm_90a"]).archs] == ["sm_90a"]


def test_kernels_that_dispatch_never_chooses_are_left_out() -> None:
    narrow = default_config(Math.SIMT, DType.F16, 64, 4, 1)
    other_tiles = replace(WIDE, num_warps=2)
    other_values = default_config(Math.TENSOROP, DType.F16, 64, 4, 8, head_dim_v=80)
    names = [WIDE, narrow, NEVER, other_tiles, other_values, replace(other_values, num_warps=2)]
    found = plan_export(",".join(kernel.name for kernel in names), ["sm_80"])
    assert set(found.kernels) == {WIDE, narrow, other_values}


def test_kernels_of_dependent_launches_are_exported_when_asked_for() -> None:
    """One for each, where there are any; or by name."""
    dependent = replace(WIDE, pdl=True)
    found = plan_export(WIDE.name, ["sm_80", "sm_90a"], dependent=True)
    assert found.kernels == (WIDE, dependent)
    assert found.wanted == [(WIDE, "sm_80"), (WIDE, "sm_90a"), (dependent, "sm_90a")]
    assert plan_export(WIDE.name, ["sm_80"], dependent=True).kernels == (WIDE,)
    assert plan_export(dependent.name, ["sm_90a"]).kernels == (dependent,)
    both = f"{dependent.name},{WIDE.name}"
    assert set(plan_export(both, ["sm_90a"], dependent=True).kernels) == {WIDE, dependent}


def test_a_kernel_that_is_not_shipped_is_exported_by_its_name() -> None:
    unusual = default_config(Math.TENSOROP, DType.BF16, 72, 3, 4)
    assert unusual not in shipped()
    assert plan_export(unusual.name, ["sm_80"]).kernels == (unusual,)


def test_kernels_with_features_are_exported_those_that_ship_and_others_by_name() -> None:
    shipped_ones = {k for k in shipped() if k.policies}
    assert shipped_ones and shipped_ones <= set(plan_export(None, ["sm_90a"]).kernels)
    for tags in ("idx_alibi", "e4m3t", "paged_e5m2t"):
        unusual = default_config(Math.TENSOROP, DType.BF16, 128, 4, 8, policies=tagged(tags))
        assert unusual not in shipped()
        assert plan_export(unusual.name, ["sm_80"]).kernels == (unusual,)


@pytest.mark.parametrize(
    ("kernels", "archs", "message"),
    [
        (None, ["sm_70"], "--arch: got 'sm_70'; allowed: all, or sm_80, "),
        (None, ["sm_80", "sm_99"], "--arch: got 'sm_99'; allowed: all, or sm_80, "),
        (None, ["compute_80"], "--arch: got 'compute_80'; allowed: all, or sm_80, "),
        (None, [], "--kernels: got None for "),
        ("fp8", ["sm_80"], "--kernels: got 'fp8', which matches none"),
        (NEVER.name, ["sm_80"], f"--kernels: got '{NEVER.name}' for sm_80; allowed: kernels for"),
        (TMA.name, ["sm_80", "sm_100f"], f"--kernels: got '{TMA.name}' for sm_80, sm_100f; allo"),
    ],
    ids=["arch", "second arch", "ptx", "no arch", "nothing", "not dispatched", "tma elsewhere"],
)
def test_nothing_to_export_is_an_error(kernels: str | None, archs: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        plan_export(kernels, archs)


# -- Fat binaries


@pytest.fixture(scope="module")
def cubins() -> dict[str, bytes]:
    """Small cubins."""
    return {
        arch: compile_source('extern "C" __global__ void f() {}', "f", arch).code
        for arch in ("sm_80", "sm_90a", "sm_120f")
    }


def test_an_image_says_that_it_is_one_and_how_long(cubins: dict[str, bytes]) -> None:
    image = pack("f", cubins)
    magic, _, header, rest = struct.unpack("<IHHQ", image[:16])
    assert magic == FATBIN_MAGIC
    assert header + rest == len(image)


def test_an_image_holds_every_cubin(cubins: dict[str, bytes]) -> None:
    sizes = [len(pack("f", dict(list(cubins.items())[:count]))) for count in (1, 2, 3)]
    assert sizes == sorted(set(sizes))
    images = {pack("f", {arch: cubin}) for arch, cubin in cubins.items()}
    assert len(images | {pack("f", cubins)}) == len(cubins) + 1


def test_other_code_gives_another_image(cubins: dict[str, bytes]) -> None:
    other = compile_source('extern "C" __global__ void f(int* p) { *p = 1; }', "f", "sm_80").code
    assert pack("f", {"sm_80": other}) != pack("f", {"sm_80": cubins["sm_80"]})


def test_images_are_the_same_every_time(cubins: dict[str, bytes]) -> None:
    assert pack("f", cubins) == pack("f", cubins)


@pytest.mark.parametrize("wrong", ["another architecture's", "no cubin", "empty"])
def test_what_is_no_cubin_is_refused(cubins: dict[str, bytes], wrong: str) -> None:
    code = {"another architecture's": cubins["sm_80"], "no cubin": b"garbage!", "empty": b""}[wrong]
    with pytest.raises(CompileError, match="nvFatbin could not pack f for sm_90a: "):
        pack("f", {"sm_90a": code})


def test_a_missing_nvfatbin_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> int:
        raise RuntimeError('Failure finding "nvFatbin":\n  no such file')

    monkeypatch.setattr(fatbin_module.nvfatbin, "create", missing)
    with pytest.raises(CompilerMissingError) as raised:
        pack("f", {})
    assert "nvFatbin: not found (Failure finding" in str(raised.value)
    assert str(raised.value).endswith("with CUDA 12")
    assert "\n" not in str(raised.value)


# -- Files


def words_of(text: str, index: int) -> bytes:
    """The bytes that a kernel's image has in gqa_kernels.c."""
    found = re.search(rf"image_{index}\[\] = \{{(.*?)\}};", text, re.S)
    assert found is not None
    words = [int(word, 16) for word in re.findall(r"0x([0-9a-f]+),", found.group(1))]
    return struct.pack(f"<{len(words)}Q", *words)


@pytest.mark.parametrize("length", [1, 7, 8, 9, 31, 32, 33, 1000])
def test_images_are_in_the_sources_byte_by_byte(length: int) -> None:
    codes = [bytes((i * 37 + k) % 256 for i in range(length)) for k in (1, 2)]
    images = [
        Image(config=config, code=code, archs=("sm_90a",))
        for config, code in zip((WIDE, TMA), codes, strict=True)
    ]
    text = bundle_files(images, [ARCHES["sm_90a"]], facts())["src/gqa_kernels.c"]
    for index, code in enumerate(codes):
        assert words_of(text, index) == code + bytes(-length % 8)


def test_sources_say_what_they_were_made_with() -> None:
    text = bundle_files([], [], facts())["src/gqa_kernels.c"]
    version = importlib.metadata.version("gqa-cutlass")
    assert text.startswith(f"// Generated by `gqa-cutlass export` {version}; do not edit.\n")
    assert compiler_version() in text.splitlines()[1]


def test_a_bundle_has_every_file_of_its_template() -> None:
    expected = {
        str(path.relative_to(BUNDLE)).removesuffix(".jinja")
        for path in BUNDLE.rglob("*")
        if path.is_file()
    }
    assert set(bundle_files([], [], facts())) == expected
    assert {"include/gqa_attention_decode.h", "README.md", "CMakeLists.txt"} <= expected


def test_every_file_of_the_template_is_packaged() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["gqa_cutlass.templates"]
    root = BUNDLE.parent
    matched = {
        path for pattern in patterns for path in glob.glob(pattern, root_dir=root, recursive=True)
    }
    files = {str(path.relative_to(root)) for path in BUNDLE.rglob("*") if path.is_file()}
    assert files and files - matched == set()


# -- Where it is written

EXPORT = Export(kernels=(WIDE, TMA), archs=(ARCHES["sm_80"], ARCHES["sm_90a"]))


@pytest.fixture
def named(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[KernelConfig, str, bytes]]]:
    """Cubins that are texts, and images that are these one after the other."""
    monkeypatch.setattr(export_module, "pack", lambda name, found: b"|".join(found.values()))
    yield [(k, arch, f"{k.name} {arch}".encode()) for k, arch in EXPORT.wanted]


Named = list[tuple[KernelConfig, str, bytes]]


def test_a_bundle_goes_into_a_new_folder_with_its_images(tmp_path: Path, named: Named) -> None:
    out = tmp_path / "some" / "where"
    paths = write_bundle(out, EXPORT, named)
    assert {str(path.relative_to(out)) for path in paths} == set(bundle_files([], [], facts()))
    assert set(paths) == {path for path in out.rglob("*") if path.is_file()}
    text = (out / "src" / "gqa_kernels.c").read_text()
    both = f"{WIDE.name} sm_80|{WIDE.name} sm_90a".encode()
    assert words_of(text, 0).rstrip(b"\0") == both
    assert words_of(text, 1).rstrip(b"\0") == f"{TMA.name} sm_90a".encode()


def test_a_bundle_goes_into_an_empty_folder(tmp_path: Path, named: Named) -> None:
    write_bundle(tmp_path, EXPORT, named)
    assert (tmp_path / "src" / "gqa_kernels.c").is_file()


def test_an_earlier_bundle_is_replaced_where_it_differs(tmp_path: Path, named: Named) -> None:
    paths = write_bundle(tmp_path, EXPORT, named)
    own = tmp_path / "build" / "libgqa.so"
    own.parent.mkdir()
    own.write_text("mine")
    (tmp_path / "README.md").write_text("edited")
    before = {path: path.stat().st_mtime_ns for path in paths}
    later = Export(kernels=(WIDE,), archs=EXPORT.archs)
    assert write_bundle(tmp_path, later, named[:2]) == paths
    changed = {path for path in paths if path.stat().st_mtime_ns != before[path]}
    assert changed == {tmp_path / "README.md", tmp_path / "src" / "gqa_kernels.c"}
    assert TMA.name not in (tmp_path / "src" / "gqa_kernels.c").read_text()
    assert own.read_text() == "mine"


def test_a_folder_with_something_else_is_refused(tmp_path: Path, named: Named) -> None:
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(ExportError, match="which holds something else; .*Nothing was written"):
        write_bundle(tmp_path, EXPORT, named)
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]
    assert (tmp_path / "README.md").read_text() == "mine"


def test_a_project_with_the_header_in_it_is_no_bundle(tmp_path: Path, named: Named) -> None:
    header = tmp_path / "include" / "gqa_attention_decode.h"
    header.parent.mkdir()
    header.write_text("vendored")
    with pytest.raises(ExportError, match="which holds something else"):
        write_bundle(tmp_path, EXPORT, named)
    assert header.read_text() == "vendored"


def test_a_file_is_refused(tmp_path: Path, named: Named) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(ExportError, match="which holds something else"):
        write_bundle(tmp_path / "out", EXPORT, named)
    assert (tmp_path / "out").read_text() == "mine"


def test_nothing_is_written_or_compiled_before_the_folder_is_known_to_do(tmp_path: Path) -> None:
    def compiled() -> Iterator[tuple[KernelConfig, str, bytes]]:
        raise AssertionError("compiled in vain")
        yield

    (tmp_path / "mine").touch()
    with pytest.raises(ExportError):
        write_bundle(tmp_path, EXPORT, compiled())


@pytest.mark.parametrize("written", [0, 1, 5])
def test_an_export_on_a_full_disk_leaves_a_folder_for_the_next(
    tmp_path: Path, named: Named, written: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = [written]

    def write(path: Path, content: bytes) -> None:
        left[0] -= 1
        with path.open("xb") as file:
            file.write(content if left[0] >= 0 else content[:100])
            if left[0] < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(files_module, "_write", write)
        with pytest.raises(OutputError, match="export: --out: got .*No space left on device"):
            write_bundle(out, EXPORT, named)
    assert not out.exists()
    paths = write_bundle(out, EXPORT, named)
    assert all(path.is_file() for path in paths)


def test_an_export_on_a_full_disk_leaves_an_earlier_one_as_it_was(
    tmp_path: Path, named: Named
) -> None:
    paths = write_bundle(tmp_path, EXPORT, named)
    (tmp_path / "README.md").unlink()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    later = Export(kernels=(WIDE,), archs=EXPORT.archs)
    for limit in (0, 100, 1000):
        with file_size_limit(limit), pytest.raises(OutputError, match="File too large"):
            write_bundle(tmp_path, later, named[:2])
        assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    assert write_bundle(tmp_path, later, named[:2]) == paths


def test_an_image_that_cannot_be_packed_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(CompileError):
        write_bundle(tmp_path / "out", EXPORT, [(WIDE, "sm_80", b"no cubin")])
    assert not (tmp_path / "out").exists()


# -- The command


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["export", *map(str, arguments)])


@pytest.fixture
def compiled_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[str, str]]:
    """What is compiled, into a store of its own, without compiling anything."""
    seen: list[tuple[str, str]] = []

    def compile_kernel(config: KernelConfig, arch: str) -> Compiled:
        seen.append((config.name, arch))
        return Compiled(code=b"code", registers=1, spill_bytes=0, stack_bytes=0, seconds=0.1)

    monkeypatch.setenv("GQA_CUTLASS_CACHE_DIR", str(tmp_path / "store"))
    monkeypatch.setattr(store_module, "compile_kernel", compile_kernel)
    monkeypatch.setattr(export_module, "pack", lambda name, found: name.encode())
    return seen


def test_the_command_compiles_what_is_missing_and_says_what_it_wrote(
    tmp_path: Path, compiled_once: list[tuple[str, str]]
) -> None:
    arguments = ("--out", tmp_path / "out", "--kernels", f"{WIDE.name},{TMA.name}", "--jobs", "1",
                 "--arch", "sm_80,sm_90a")  # fmt: skip
    first, second = run(*arguments), run(*arguments)
    assert (first.exit_code, second.exit_code) == (0, 0), first.output
    assert sorted(compiled_once) == sorted((k.name, arch) for k, arch in EXPORT.wanted)
    count = len(bundle_files([], [], facts()))
    words = " ".join(first.output.split())
    assert f"{count} files in {tmp_path / 'out'}: 2 kernels for sm_80, sm_90a" in words


def test_the_command_exports_for_hopper_by_default(
    tmp_path: Path, compiled_once: list[tuple[str, str]]
) -> None:
    assert run("--out", tmp_path / "out", "--kernels", WIDE.name, "--jobs", "1").exit_code == 0
    assert compiled_once == [(WIDE.name, "sm_90a")]


def test_an_export_for_all_architectures_is_one_library_for_all(
    tmp_path: Path, compiled_once: list[tuple[str, str]]
) -> None:
    out = tmp_path / "out"
    names = f"{WIDE.name},{TMA.name}"
    assert run("--out", out, "--kernels", names, "--jobs", "1", "--arch", "all").exit_code == 0
    library = Library(build(out, tmp_path / "libgqa.so"))
    assert library.kernels == [WIDE.name, TMA.name]
    for index, arch in enumerate(ARCHES.values()):
        assert library.c.gqa_find_arch(arch.capability) == index


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--out", "out", "--arch", "sm_70"), "--arch: got 'sm_70'; allowed: all, or sm_80"),
        (("--out", "out", "--kernels", "fp8"), "--kernels: got 'fp8', which matches none"),
        (("--out", "taken"), "export: --out: got taken, which holds something else"),
    ],
    ids=["arch", "kernels", "out"],
)
def test_an_error_is_one_line_and_status_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path,
    arguments: tuple[str, ...], message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine").touch()
    monkeypatch.setattr("sys.argv", ["gqa-cutlass", "export", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"gqa-cutlass: {message}") and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_an_export_of_real_kernels_builds(tmp_path: Path) -> None:
    """The images are fat binaries with the cubins that the store has."""
    out = tmp_path / "out"
    kernels = f"{WIDE.name},{TMA.name}"
    done = run("--out", out, "--kernels", kernels, "--arch", "sm_80,sm_90a", "--jobs", "1")
    assert done.exit_code == 0, done.output
    text = (out / "src" / "gqa_kernels.c").read_text()
    for index, least in ((0, 20_000), (1, 10_000)):
        image = words_of(text, index)
        magic, _, header, rest = struct.unpack("<IHHQ", image[:16])
        assert magic == FATBIN_MAGIC and len(image) - 8 < header + rest <= len(image)
        assert len(image) > least
    library = Library(build(out, tmp_path / "libgqa.so"))
    assert library.kernels == [WIDE.name, TMA.name]
