"""The cubin store: content-addressed, atomic, healing itself, private, shared between processes."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from gqa_cutlass import store as module
from gqa_cutlass.codegen import DType, KernelConfig, Math, default_config
from gqa_cutlass.codegen.compile import Compiled
from gqa_cutlass.errors import CompilerMissingError, KernelMissingError, StoreError
from gqa_cutlass.store import Store, entry_stem

CONFIG = default_config(Math.TENSOROP, DType.F16, 128, 4, 8)
OTHER = default_config(Math.TENSOROP, DType.BF16, 128, 4, 8)
ARCH = "sm_90a"


class Compiler:
    """Stands in for NVRTC: instant, and counts."""

    def __init__(self) -> None:
        self.compiled: list[tuple[str, str]] = []

    def __call__(self, config: KernelConfig, arch: str) -> Compiled:
        self.compiled.append((config.name, arch))
        code = f"cubin of {config.name} for {arch}".encode()
        return Compiled(code=code, registers=99, spill_bytes=0, stack_bytes=0, seconds=0.5)


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Compiler:
    monkeypatch.delenv("GQA_CUTLASS_DISABLE_JIT", raising=False)
    fake = Compiler()
    monkeypatch.setattr(module, "compile_kernel", fake)
    return fake


@pytest.fixture
def store(tmp_path: Path, compiler: Compiler) -> Store:
    return Store(root=tmp_path / "store")


def _files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.suffix != ".lock"}


def test_miss_compiles_and_hit_does_not(store: Store, compiler: Compiler) -> None:
    assert store.find(CONFIG, ARCH) is None
    first, second = store.get(CONFIG, ARCH), store.get(CONFIG, ARCH)
    assert (first.was_built, second.was_built) == (True, False)
    assert first.compiled == second.compiled and first.path == second.path
    assert first.path.read_bytes() == first.compiled.code
    assert compiler.compiled == [(CONFIG.name, ARCH)]


def test_find_never_compiles(store: Store, compiler: Compiler) -> None:
    assert store.find(CONFIG, ARCH) is None
    store.get(CONFIG, ARCH)
    found = store.find(CONFIG, ARCH)
    assert found is not None and not found.was_built
    assert len(compiler.compiled) == 1


def test_kernels_and_architectures_have_entries_of_their_own(store: Store) -> None:
    wanted = [(CONFIG, ARCH), (CONFIG, "sm_80"), (OTHER, ARCH)]
    codes = {store.get(*item).compiled.code for item in wanted}
    assert len(codes) == len({entry_stem(*item) for item in wanted}) == 3


@pytest.mark.parametrize("suffix", [".cubin", ".json"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.unlink(),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:-7]),
        lambda path: path.write_bytes(b"\xff" + path.read_bytes()[1:]),
        lambda path: path.write_bytes(b"[]"),
        lambda path: path.write_bytes(b"null"),
        lambda path: path.write_bytes(b"{}"),
    ],
    ids=["missing", "empty", "truncated", "bit-flip", "list", "null", "no-fields"],
)
def test_corrupt_entry_is_a_miss_and_gets_replaced(
    store: Store, compiler: Compiler, suffix: str, damage: object
) -> None:
    built = store.get(CONFIG, ARCH)
    damage(built.path.with_suffix(suffix))  # type: ignore[operator]
    assert store.find(CONFIG, ARCH) is None
    healed = store.get(CONFIG, ARCH)
    assert healed.was_built and healed.compiled == built.compiled
    assert not store.get(CONFIG, ARCH).was_built
    assert len(compiler.compiled) == 2


def test_metadata_with_unknown_fields_is_a_miss(store: Store) -> None:
    path = store.get(CONFIG, ARCH).path.with_suffix(".json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"from_the_future": 1}))
    assert store.find(CONFIG, ARCH) is None


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
        patch.setattr(module.json, "dumps", crash)
        with pytest.raises(KeyboardInterrupt):
            store.get(CONFIG, ARCH)
    assert [Path(name).suffix for name in _files(store.root)] == [".cubin"]
    assert store.find(CONFIG, ARCH) is None
    assert store.get(CONFIG, ARCH).was_built


_RACER = """
import sys, time
from pathlib import Path
from gqa_cutlass import store
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
    tmp_path: Path, compiler: Compiler
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
    tmp_path: Path, compiler: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = Store(root=tmp_path / "built").get(CONFIG, ARCH)
    monkeypatch.setattr(module, "compiler_version", lambda: "nvrtc-99")
    behind = Store(root=tmp_path / "root", read_only=(built.path.parent,))
    assert behind.get(CONFIG, ARCH, jit=False).path == built.path


@pytest.mark.parametrize("by", ["argument", "environment"])
def test_absent_kernel_without_jit_names_the_command_that_builds_it(
    store: Store, compiler: Compiler, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    if by == "environment":
        monkeypatch.setenv("GQA_CUTLASS_DISABLE_JIT", "1")
    with pytest.raises(KernelMissingError) as raised:
        store.get(CONFIG, ARCH, jit=False if by == "argument" else None)
    message = str(raised.value)
    assert f"gqa-cutlass build --arch {ARCH} --kernels {CONFIG.name}" in message
    assert str(store.root) in message and "GQA_CUTLASS_DISABLE_JIT" in message
    assert compiler.compiled == [] and not store.root.exists()


def test_present_kernel_needs_no_jit(store: Store) -> None:
    store.get(CONFIG, ARCH)
    assert not store.get(CONFIG, ARCH, jit=False).was_built


def test_folder_that_cannot_be_written_names_the_remedy(tmp_path: Path, compiler: Compiler) -> None:
    (tmp_path / "file").write_text("")  # root may write anywhere, but not below a file
    root = tmp_path / "file" / "store"
    with pytest.raises(StoreError, match=f"cannot write to {root} .*; needed: .*CACHE_DIR"):
        Store(root=root).get(CONFIG, ARCH)
    assert compiler.compiled == []


def test_folder_that_everybody_may_write_is_refused(store: Store) -> None:
    store.get(CONFIG, ARCH)
    store.root.chmod(0o777)
    for call in (store.get, store.find):
        with pytest.raises(StoreError, match=f"{store.root} is writable by every user.*chmod"):
            call(CONFIG, ARCH)


def test_read_only_folder_that_everybody_may_write_is_refused(tmp_path: Path, store: Store) -> None:
    store.get(CONFIG, ARCH)
    store.root.chmod(0o777)
    with pytest.raises(StoreError, match=f"{store.root} is writable by every user"):
        Store(root=tmp_path / "root", read_only=(store.root,)).get(CONFIG, ARCH)


def test_new_folder_is_private_to_the_user(store: Store) -> None:
    store.get(CONFIG, ARCH)
    assert stat.S_IMODE(store.root.stat().st_mode) == 0o700


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


def test_environment_says_where_the_store_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GQA_CUTLASS_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("GQA_CUTLASS_KERNEL_DIR", os.pathsep.join(["/a", "", "/b"]))
    assert Store.default() == Store(root=tmp_path, read_only=(Path("/a"), Path("/b")))
    monkeypatch.delenv("GQA_CUTLASS_CACHE_DIR")
    monkeypatch.delenv("GQA_CUTLASS_KERNEL_DIR")
    assert Store.default().root.name == "gqa_cutlass" and Store.default().read_only == ()
