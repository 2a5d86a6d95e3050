"""The cubin store: content-addressed, atomic, healing itself, shared between processes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest
from instant import ARCH, CONFIG, OTHER, InstantCompiler

from gqa_cutlass.codegen import KernelConfig
from gqa_cutlass.codegen.compile import Compiled
from gqa_cutlass.errors import CompileError, CompilerMissingError, KernelMissingError, StoreError
from gqa_cutlass.kernels import entries, locks
from gqa_cutlass.kernels import store as module
from gqa_cutlass.kernels.store import Store, entry_stem


def _files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_miss_compiles_and_hit_does_not(store: Store, compiler: InstantCompiler) -> None:
    assert store.find(CONFIG, ARCH) is None
    first, second = store.get(CONFIG, ARCH), store.get(CONFIG, ARCH)
    assert (first.was_built, second.was_built) == (True, False)
    assert first.compiled == second.compiled and first.path == second.path
    assert first.path.read_bytes() == first.compiled.code
    assert compiler.compiled == [(CONFIG.name, ARCH)]


def test_find_never_compiles(store: Store, compiler: InstantCompiler) -> None:
    assert store.find(CONFIG, ARCH) is None
    store.get(CONFIG, ARCH)
    found = store.find(CONFIG, ARCH)
    assert found is not None and not found.was_built
    assert len(compiler.compiled) == 1


def test_kernels_and_architectures_have_entries_of_their_own(store: Store) -> None:
    wanted = [(CONFIG, ARCH), (CONFIG, "sm_80"), (OTHER, ARCH)]
    codes = {store.get(*item).compiled.code for item in wanted}
    assert len(codes) == len({entry_stem(*item) for item in wanted}) == 3


def test_entry_of_another_compiler_is_a_miss(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.get(CONFIG, ARCH)
    monkeypatch.setattr(module, "compiler_version", lambda: "nvrtc-99")
    assert store.find(CONFIG, ARCH) is None
    assert store.get(CONFIG, ARCH).was_built


def test_without_a_compiler_what_others_made_is_taken(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> str:
        raise CompilerMissingError("NVRTC: not found")

    store.get(CONFIG, ARCH)
    monkeypatch.setattr(module, "compiler_version", missing)
    assert store.find(CONFIG, ARCH) is not None


def test_nothing_temporary_stays_behind(store: Store) -> None:
    path = store.get(CONFIG, ARCH).path
    assert _files(store.root) == {path.name, path.with_suffix(".json").name}


def test_failed_write_leaves_no_entry_and_no_temporary_file(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StoreError, match=f"{store.root}.*No space left"):
            store.get(CONFIG, ARCH)
    assert _files(store.root) == set()
    assert store.get(CONFIG, ARCH).was_built


def test_crash_between_the_two_files_is_a_miss(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(*_: object, **__: object) -> str:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(entries.json, "dumps", crash)
        with pytest.raises(KeyboardInterrupt):
            store.get(CONFIG, ARCH)
    assert [Path(name).suffix for name in _files(store.root)] == [".cubin"]
    assert store.find(CONFIG, ARCH) is None
    assert store.get(CONFIG, ARCH).was_built


_RACER = """
import sys, time
from pathlib import Path
from gqa_cutlass.kernels import store
from gqa_cutlass.codegen import KernelConfig
from gqa_cutlass.codegen.compile import Compiled

def compile_kernel(config, arch):
    with open(sys.argv[2], "a") as log:
        print("compiled", file=log)
    time.sleep(0.5)
    return Compiled(code=b"cubin", registers=1, spill_bytes=0, stack_bytes=0, seconds=0.5)

store.compile_kernel = compile_kernel
config = KernelConfig.from_name(sys.argv[3])
print("ready", flush=True)
sys.stdin.readline()
print(store.Store(root=Path(sys.argv[1])).get(config, "sm_90a", jit=True).was_built)
"""


def test_processes_that_want_the_same_kernel_compile_it_once(tmp_path: Path) -> None:
    log = tmp_path / "log"
    command = [sys.executable, "-c", _RACER, tmp_path / "store", log, CONFIG.name]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    racers = [subprocess.Popen(command, **pipes) for _ in range(2)]  # type: ignore[call-overload]
    assert [racer.stdout.readline() for racer in racers] == ["ready\n"] * 2
    for racer in racers:
        racer.stdin.write("go\n")
        racer.stdin.flush()
    assert sorted(racer.communicate()[0] for racer in racers) == ["False\n", "True\n"]
    assert log.read_text() == "compiled\n"


def test_read_only_folders_come_first_and_are_never_written(
    tmp_path: Path, compiler: InstantCompiler
) -> None:
    built = Store(root=tmp_path / "built").get(CONFIG, ARCH)
    before = sorted((path, path.stat().st_mtime_ns) for path in built.path.parent.iterdir())
    behind = Store(root=tmp_path / "root", read_only=(tmp_path / "absent", built.path.parent))
    behind.get(OTHER, ARCH)
    Store(root=behind.root).get(CONFIG, ARCH)
    found = behind.get(CONFIG, ARCH)
    assert found.path == built.path and not found.was_built
    assert sorted((p, p.stat().st_mtime_ns) for p in built.path.parent.iterdir()) == before


def test_kernels_built_ahead_of_time_need_not_come_from_the_present_compiler(
    tmp_path: Path, compiler: InstantCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = Store(root=tmp_path / "built").get(CONFIG, ARCH)
    monkeypatch.setattr(module, "compiler_version", lambda: "nvrtc-99")
    behind = Store(root=tmp_path / "root", read_only=(built.path.parent,))
    assert behind.get(CONFIG, ARCH, jit=False).path == built.path


@pytest.mark.parametrize("by", ["argument", "environment"])
def test_absent_kernel_without_jit_names_the_command_that_builds_it(
    store: Store, compiler: InstantCompiler, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    if by == "environment":
        monkeypatch.setenv("GQA_CUTLASS_DISABLE_JIT", "1")
    with pytest.raises(KernelMissingError) as raised:
        store.get(CONFIG, ARCH, jit=False if by == "argument" else None)
    message = str(raised.value)
    assert f"gqa-cutlass build --arch {ARCH} --kernels {CONFIG.name}" in message
    assert str(store.root) in message and "GQA_CUTLASS_DISABLE_JIT" in message
    assert compiler.compiled == [] and not store.root.exists()


def test_kernel_of_another_version_is_not_used_and_named(
    store: Store, compiler: InstantCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.get(CONFIG, ARCH)
    monkeypatch.setattr(module, "source_digest", lambda config: "of another version")
    with pytest.raises(KernelMissingError) as raised:
        store.get(CONFIG, ARCH, jit=False)
    expected = f"Found, but not used: {store.root}: has it from another version of gqa-cutlass"
    assert str(raised.value).endswith(expected)
    assert store.get(CONFIG, ARCH).was_built


def test_present_kernel_needs_no_jit(store: Store) -> None:
    store.get(CONFIG, ARCH)
    assert not store.get(CONFIG, ARCH, jit=False).was_built


def test_folder_that_cannot_be_written_names_the_remedy(
    tmp_path: Path, compiler: InstantCompiler
) -> None:
    (tmp_path / "file").write_text("")  # root may write anywhere, but not below a file
    root = tmp_path / "file" / "store"
    with pytest.raises(StoreError, match=f"cannot write to {root} .*; needed: .*CACHE_DIR"):
        Store(root=root).get(CONFIG, ARCH)
    assert compiler.compiled == []


@pytest.mark.parametrize("part", ["source_digest", "options_digest_text"])
def test_entry_changes_with_source_and_options(monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    before = entry_stem(CONFIG, ARCH)
    monkeypatch.setattr(module, part, lambda _: "changed")
    after = entry_stem(CONFIG, ARCH)
    assert after != before and after.startswith(f"{CONFIG.name}.{ARCH}.")


def test_clean_removes_every_entry_and_nothing_else(store: Store) -> None:
    for config in (CONFIG, OTHER):
        store.get(config, ARCH)
    other = store.root / "notes.json"
    other.write_text("mine")
    assert store.clean() >= 4
    assert list(store.root.iterdir()) == [other]
    assert store.find(CONFIG, ARCH) is None
    assert store.clean() == 0


def test_clean_leaves_what_is_being_built_and_takes_what_was_left_behind(store: Store) -> None:
    for config in (CONFIG, OTHER):
        store.get(config, ARCH)
    leftovers = [
        store.root / f"{entry_stem(config, ARCH)}.x.cubin.0.tmp" for config in (CONFIG, OTHER)
    ]
    for leftover in leftovers:
        leftover.touch()
    stem = entry_stem(CONFIG, ARCH)
    (store.root / f"{entry_stem(OTHER, ARCH)}.lock").touch()  # whose holder was killed
    with locks.locked(store.root / f"{stem}.lock"):
        kept = {name for name in _files(store.root) if name.startswith(stem)}
        assert len(kept) == 4
        assert store.clean() == 3
        assert _files(store.root) == kept
    assert store.clean() == 3
    assert _files(store.root) == set()


@pytest.mark.parametrize("by", ["clean", "force"])
def test_a_store_that_is_removed_while_a_kernel_is_compiled_gets_it_nevertheless(
    store: Store, by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = InstantCompiler()

    def compile_kernel(config: KernelConfig, arch: str) -> Compiled:
        store.clean() if by == "clean" else shutil.rmtree(store.root)
        return compiler(config, arch)

    monkeypatch.setattr(module, "compile_kernel", compile_kernel)
    assert store.get(CONFIG, ARCH).was_built
    assert store.find(CONFIG, ARCH) is not None


def test_clean_removes_folders_in_the_place_of_entries(store: Store) -> None:
    path = store.get(CONFIG, ARCH).path
    path.unlink()
    (path / "a").mkdir(parents=True)
    assert store.clean() == 2
    assert _files(store.root) == set()


def test_clean_says_where_it_cannot(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match=f"{tmp_path / 'file'} .Not a directory"):
        Store(root=tmp_path / "file").clean()


def test_what_killed_processes_left_of_a_kernel_goes_when_it_is_built(store: Store) -> None:
    store.root.mkdir(0o700)
    stem = entry_stem(CONFIG, ARCH)
    (store.root / f"{stem}.0123.cubin.4567.tmp").touch()
    (store.root / f"{stem}.lock").write_text("process 1 on another machine")
    path = store.get(CONFIG, ARCH).path
    assert _files(store.root) == {path.name, path.with_suffix(".json").name}


@pytest.mark.parametrize(
    ("kind", "why"), [("file", "Not a directory"), ("link", "a link to nothing")]
)
def test_what_lies_in_the_folders_place_is_said(
    tmp_path: Path, compiler: InstantCompiler, kind: str, why: str
) -> None:
    root = tmp_path / "store"
    if kind == "file":
        root.touch()
    else:
        root.symlink_to("nowhere")
    with pytest.raises(StoreError, match=f"cannot write to {root} .{why}: {root}.*needed"):
        Store(root=root).get(CONFIG, ARCH)
    assert compiler.compiled == []


@pytest.mark.parametrize("name", ["a" * 300, "nul\0nul", "[red]"])
def test_odd_names_of_folders_are_errors_of_ours_or_work(
    tmp_path: Path, compiler: InstantCompiler, name: str
) -> None:
    store = Store(root=tmp_path / name)
    if name == "[red]":
        assert store.get(CONFIG, ARCH).was_built and store.find(CONFIG, ARCH) is not None
        return
    assert store.find(CONFIG, ARCH) is None
    for call in (lambda: store.get(CONFIG, ARCH), store.clean):
        with pytest.raises(StoreError, match="cannot write to .*; needed: "):
            call()
    with pytest.raises(KernelMissingError):
        store.get(CONFIG, ARCH, jit=False)


def test_a_process_that_ends_abruptly_while_it_compiles_is_an_error_of_ours(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> Iterator[None]:
        raise BrokenProcessPool
        yield

    monkeypatch.setattr(module, "map_in_order", broken)
    with pytest.raises(CompileError, match="ended abruptly.*memory.*fewer jobs"):
        list(module.build_all(store, [(CONFIG, ARCH), (OTHER, ARCH)], jobs=2))


def test_kernel_folders_that_are_none_are_passed_by(
    tmp_path: Path, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    folders = (tmp_path / "absent", tmp_path / "file", tmp_path / ("a" * 300))
    behind = Store(root=store.root, read_only=folders)
    assert behind.get(CONFIG, ARCH).was_built
    assert [str(folders[1]) in line or str(folders[2]) in line for line in caplog.messages] == [
        True, True,
    ]  # fmt: skip
    with pytest.raises(KernelMissingError) as raised:
        behind.get(OTHER, ARCH, jit=False)
    assert f"{folders[0]} (does not exist)" in str(raised.value)
    assert f"{folders[1]}: Not a directory" in str(raised.value)
