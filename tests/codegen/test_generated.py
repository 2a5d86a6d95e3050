"""generated/: deterministic, in step with the templates, short, and made without torch."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import REPOSITORY, by_name, run_python

from gqa_cutlass.codegen import (
    Kernel,
    KernelConfig,
    MergeConfig,
    carried,
    merges,
    shipped,
    source_digest,
)
from gqa_cutlass.codegen.config import ARCHES
from gqa_cutlass.codegen.manifest import MANIFEST, drift, generate, generated_files
from gqa_cutlass.codegen.render import render
from gqa_cutlass.errors import OutputError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that was just generated; tests that edit it generate it again."""
    out = tmp_path_factory.mktemp("generated")
    generate(out)
    return out


@pytest.fixture
def touched(folder: Path) -> Path:
    generate(folder)
    return folder / f"{shipped()[0].name}.cu"


def test_committed_files_are_in_step_with_the_templates() -> None:
    assert drift(REPOSITORY / "generated") == []


def test_rendering_is_the_same_in_every_process() -> None:
    code = (
        "import hashlib; from gqa_cutlass.codegen.manifest import generated_files\n"
        "print(hashlib.sha256(repr(generated_files()).encode()).hexdigest())"
    )
    digests = {run_python(code, PYTHONHASHSEED=seed) for seed in (1, 2)}
    assert len(digests) == 1


def test_generating_twice_changes_nothing(folder: Path) -> None:
    generate(folder)
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert generate(folder) == []
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    assert drift(folder) == []


def test_first_generation_writes_every_file(tmp_path: Path) -> None:
    out = tmp_path / "below" / "generated"
    assert sorted(generate(out)) == sorted(generated_files())
    assert {path.name for path in out.iterdir()} == set(generated_files())


def test_edited_file_is_drift_and_gets_repaired(touched: Path) -> None:
    touched.write_text(touched.read_text() + "// mine\n")
    assert drift(touched.parent) == [touched.name]
    assert generate(touched.parent) == [touched.name]
    assert drift(touched.parent) == []


def test_missing_file_is_drift_and_gets_written(touched: Path) -> None:
    touched.unlink()
    assert drift(touched.parent) == [touched.name]
    assert generate(touched.parent) == [touched.name]


@pytest.mark.parametrize("name", ["gqa_decode_no_longer.cu", "gqa_merge_no_longer.cu"])
def test_stale_kernel_is_drift_and_gets_removed(touched: Path, name: str) -> None:
    stale = touched.with_name(name)
    stale.write_text(touched.read_text())
    assert drift(touched.parent) == [stale.name]
    assert generate(touched.parent) == [stale.name]
    assert not stale.exists()


def test_edited_manifest_is_drift(touched: Path) -> None:
    (touched.parent / MANIFEST).write_text("{}\n")
    assert drift(touched.parent) == [MANIFEST]


@pytest.mark.parametrize("name", ["__init__.py", "mine.cu", "gqa_decode_mine.cu", "gqa_merge_x.cu"])
def test_files_of_others_are_left_alone(touched: Path, name: str) -> None:
    other = touched.with_name(name)
    other.write_text("# mine\n")
    assert drift(touched.parent) == [] == generate(touched.parent)
    assert other.read_text() == "# mine\n"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        (MANIFEST, b'{"name": "an app", "icons": []}\n'),
        (MANIFEST, b'{"kernels": []}\n'),
        (MANIFEST, b"\xff\xfe"),
        (f"{shipped()[0].name}.cu", b"// mine\n"),
    ],
    ids=["an app's", "another list", "no text", "a source"],
)
def test_a_folder_of_others_is_refused(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(OutputError, match=rf"whose {name} is not of the .*Nothing was written"):
        generate(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_bytes() == content


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo], ids=["a folder", "a pipe"])
def test_what_is_no_file_is_not_of_the_generator(
    tmp_path: Path, make: Callable[[Path], None]
) -> None:
    make(tmp_path / MANIFEST)
    make(tmp_path / f"{shipped()[0].name}.cu")
    with pytest.raises(OutputError, match="is not of the generator"):
        generate(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("space", [None, 2])
def test_a_manifest_alone_is_known_to_be_ours(folder: Path, tmp_path: Path, space: int) -> None:
    older = json.loads((folder / MANIFEST).read_text()) | {"more": 1}
    (tmp_path / MANIFEST).write_text(json.dumps(older, indent=space))
    assert MANIFEST in generate(tmp_path)


def test_an_edited_manifest_among_our_sources_is_repaired(touched: Path) -> None:
    (touched.parent / MANIFEST).write_text("{}\n")
    assert generate(touched.parent) == [MANIFEST]


@pytest.mark.parametrize("config", by_name(carried()))
def test_generated_source_is_a_short_specialisation(config: Kernel) -> None:
    text = render(config)
    first, second, *_ = lines = text.splitlines()
    assert first == f"// {config.name}"
    assert "gqa-cutlass generate" in second and "templates/" in second
    assert "do not edit" in second.lower()
    assert len(lines) < 60 and text.endswith("}\n")
    assert not re.search(r"\b20\d\d-|\d\d:\d\d", text)  # dates, times
    assert "{{" not in text and "{%" not in text


def test_manifest_describes_every_shipped_kernel() -> None:
    entries = json.loads(generated_files()[MANIFEST])["kernels"]
    assert [entry["name"] for entry in entries] == [config.name for config in shipped()]
    for entry, config in zip(entries, shipped(), strict=True):
        assert KernelConfig.from_name(entry["name"]) == config
        assert f" {entry['symbol']}(" in render(config)
        assert f"__launch_bounds__({entry['threads']}," in render(config)
        assert f"== {entry['shared_bytes']})" in render(config)
        assert entry["schedule"] == config.schedule and entry["archs"] == list(config.archs)
        limits = [ARCHES[arch].shared_per_block for arch in entry["archs"]]
        assert entry["shared_bytes"] <= min(limits)
        assert entry["source_digest"] == source_digest(config)


def test_manifest_describes_every_kernel_that_merges() -> None:
    entries = json.loads(generated_files()[MANIFEST])["merges"]
    assert [MergeConfig.from_name(entry["name"]) for entry in entries] == list(merges())
    for entry, config in zip(entries, merges(), strict=True):
        assert f" {entry['symbol']}(" in render(config)
        assert f"__launch_bounds__({entry['threads']}," in render(config)
        assert entry["archs"] == list(config.archs)
        assert f"_{entry['dtype']}_{entry['out_dtype']}_align{entry['vec_width']}" in config.name
        assert entry["source_digest"] == source_digest(config)


def test_digests_of_different_kernels_differ() -> None:
    assert len({source_digest(config) for config in carried()}) == len(carried())


@pytest.mark.parametrize("module", ["codegen", "codegen.compile", "codegen.manifest", "cli"])
def test_importing_does_not_import_torch(module: str) -> None:
    code = f"import sys, gqa_cutlass.{module}; print('torch' in sys.modules)"
    assert run_python(code) == "False\n"


@pytest.mark.parametrize("command", ["generate", "list", "check --help", "build --help"])
def test_generating_and_listing_work_without_torch(command: str, tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['torch'] = None  # importing it is an error\n"
        "from gqa_cutlass.cli import app\n"
        "app(sys.argv[1:])"
    )
    arguments = [*command.split(), *(["--out", tmp_path] if command == "generate" else [])]
    run_python(code, *arguments)
    assert (command != "generate") or drift(tmp_path) == []
