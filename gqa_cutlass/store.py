"""Compiled kernels on disk: content-addressed, written atomically, healing itself.

An entry is two files, `<kernel>.<arch>.<source>.<compiler>.cubin` (or `.ptx`; digests of the source
with the options, and of the compiler's version) and the same name with `.json`, which holds the
code's checksum and what the compiler said. The JSON is written last; an entry without it, or
one whose checksum does not match, is a miss and gets replaced. Processes that want the same kernel
take turns on a lock file, so each kernel is compiled once.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import stat
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from filelock import FileLock

from gqa_cutlass import env
from gqa_cutlass.codegen.compile import (
    Compiled,
    compile_kernel,
    compiler_version,
    options_digest_text,
)
from gqa_cutlass.codegen.config import KernelConfig
from gqa_cutlass.codegen.render import source_digest
from gqa_cutlass.errors import CompileError, CompilerMissingError, KernelMissingError, StoreError
from gqa_cutlass.workers import map_in_order


@dataclass(frozen=True, kw_only=True)
class StoredKernel:
    """A compiled kernel and where it came from.

    Args:
        config: The kernel.
        arch: What it was compiled for.
        path: The file with its cubin or PTX.
        compiled: The code and the compiler's figures.
        was_built: Whether this call compiled it.
    """

    config: KernelConfig
    arch: str
    path: Path
    compiled: Compiled
    was_built: bool


@dataclass(frozen=True, kw_only=True)
class Store:
    """A folder of compiled kernels, behind read-only folders that are looked at first.

    Args:
        root: Where new entries go.
        read_only: Folders filled ahead of time; entries of any compiler version are taken.
    """

    root: Path
    read_only: tuple[Path, ...] = ()

    @classmethod
    def default(cls) -> Store:
        """The store that the environment asks for."""
        return cls(root=env.cache_dir(), read_only=env.kernel_dirs())

    def find(self, config: KernelConfig, arch: str) -> StoredKernel | None:
        """Look a kernel up without compiling it; a corrupt entry counts as absent."""
        for folder in (*self.read_only, self.root):
            _check_private(folder)
            for stem in _candidates(folder, config, arch, any_compiler=folder != self.root):
                compiled = _read(stem)
                if compiled is not None:
                    return StoredKernel(
                        config=config, arch=arch, path=_code(stem), compiled=compiled,
                        was_built=False,
                    )  # fmt: skip
        return None

    def get(self, config: KernelConfig, arch: str, *, jit: bool | None = None) -> StoredKernel:
        """Look a kernel up, or compile and keep it.

        Args:
            config: The kernel.
            arch: One of `codegen.ARCHES`, or a virtual architecture for PTX.
            jit: Whether compiling is allowed; None asks the environment.

        Raises:
            KernelMissingError: Absent, and compiling is not allowed.
            StoreError: The folder cannot be written.
            CompileError, CompilerMissingError: Compiling failed.
        """
        if found := self.find(config, arch):
            return found
        if jit is False or (jit is None and env.jit_disabled()):
            raise KernelMissingError(
                f"{config.name} for {arch}: not found in {self._places()}, and nothing is compiled "
                "during a CUDA-graph capture or with GQA_CUTLASS_DISABLE_JIT. Call "
                "gqa_cutlass.warmup() before the capture, or build the kernel ahead of time: "
                f"gqa-cutlass build --arch {arch} --kernels {config.name}"
            )
        with self._locked(f"{entry_stem(config, arch)}.lock"):
            return self.find(config, arch) or self._build(config, arch)

    def clean(self) -> int:
        """Remove every entry of the writable folder; returns how many files went."""
        patterns = ("*.cubin", "*.ptx", "*.json", "*.lock", "*.tmp")
        files = [path for pattern in patterns for path in self.root.glob(f"gqa_decode_{pattern}")]
        for path in files:
            path.unlink(missing_ok=True)
        return len(files)

    def _build(self, config: KernelConfig, arch: str) -> StoredKernel:
        compiled = compile_kernel(config, arch)
        stem = self.root / f"{entry_stem(config, arch)}.{_digest(compiler_version())}"
        meta = {
            "compiler": compiler_version(),
            "sha256": hashlib.sha256(compiled.code).hexdigest(),
            **{k: v for k, v in dataclasses.asdict(compiled).items() if k != "code"},
        }
        with self._writing():
            _write_atomically(_code(stem), compiled.code)
            _write_atomically(_meta(stem), json.dumps(meta, indent=1).encode())
        return StoredKernel(
            config=config, arch=arch, path=_code(stem), compiled=compiled, was_built=True
        )

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        with self._writing():
            self.root.mkdir(parents=True, exist_ok=True, mode=0o700)
            lock = FileLock(self.root / name)
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StoreError(
                f"cubin store: cannot write to {self.root} ({error.strerror or error}); needed: a "
                "folder that this user can write to. Set GQA_CUTLASS_CACHE_DIR to one."
            ) from error

    def _places(self) -> str:
        return ", ".join(str(folder) for folder in (*self.read_only, self.root))


def build_all(
    store: Store, wanted: Sequence[tuple[KernelConfig, str]], jobs: int = 0
) -> Iterator[StoredKernel]:
    """Bring kernels into a store, several at a time, and yield each as it is done, in order.

    Uses processes: within one, NVRTC compiles one program at a time.

    Args:
        store: Where to.
        wanted: Kernels, each with its architecture.
        jobs: Processes; 0 for one per CPU.

    Raises:
        StoreError, CompileError, CompilerMissingError: As `Store.get`.
    """
    jobs = min(jobs or len(os.sched_getaffinity(0)), len(wanted))
    build_one = partial(_build_one, store)
    if jobs <= 1:
        yield from map(build_one, wanted)
        return
    try:
        yield from map_in_order(build_one, wanted, jobs)
    except BrokenProcessPool as error:
        raise CompileError(
            f"build: one of {jobs} processes that compiled ended abruptly: it was killed, or there "
            "is too little memory; needed: 250 MB for each. What is done is kept: go on with fewer "
            "jobs."
        ) from error


def _build_one(store: Store, item: tuple[KernelConfig, str]) -> StoredKernel:
    return store.get(*item, jit=True)


def entry_stem(config: KernelConfig, arch: str) -> str:
    """First part of an entry's file name; changes with the source and the options."""
    return f"{config.name}.{arch}.{_digest(source_digest(config) + options_digest_text(arch))}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _candidates(folder: Path, config: KernelConfig, arch: str, *, any_compiler: bool) -> list[Path]:
    """Paths, without suffix, of entries that may serve: this compiler's, or if allowed anyone's."""
    stem = entry_stem(config, arch)
    compiler = _compiler()
    if compiler is not None and not any_compiler:
        return [folder / f"{stem}.{_digest(compiler)}"]
    return sorted(path.with_suffix("") for path in folder.glob(f"{stem}.*.json"))


def _check_private(folder: Path) -> None:
    """Refuse a folder that anybody may write to: whoever does runs code on the GPU."""
    if folder.is_dir() and folder.stat().st_mode & stat.S_IWOTH:
        raise StoreError(
            f"cubin store: {folder} is writable by every user; needed: a folder that only its "
            f"owner can write to. Run chmod o-w {folder}, or name another folder."
        )


def _code(stem: Path) -> Path:
    suffix = ".ptx" if ".compute_" in stem.name else ".cubin"
    return stem.with_name(stem.name + suffix)


def _meta(stem: Path) -> Path:
    return stem.with_name(stem.name + ".json")


def _read(stem: Path) -> Compiled | None:
    """Read an entry. Anything odd is a miss."""
    try:
        meta = json.loads(_meta(stem).read_bytes())
        code = _code(stem).read_bytes()
        if meta.pop("sha256") != hashlib.sha256(code).hexdigest():
            return None
        del meta["compiler"]
        return Compiled(code=code, **meta)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _compiler() -> str | None:
    """The present compiler; None where there is none, and what others made must do."""
    try:
        return compiler_version()
    except CompilerMissingError:
        return None


def _write_atomically(path: Path, content: bytes) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        Path(temporary).unlink(missing_ok=True)
        raise
