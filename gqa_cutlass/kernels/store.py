"""Compiled kernels on disk: content-addressed, shared between processes, healing itself.

What an entry is, and who is trusted to have written it, `entries` says. Anything odd is a miss, and
in the writable folder gets replaced. Processes that want the same kernel take turns on a lock, so
each kernel is compiled once.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import groupby
from pathlib import Path
from typing import TypeVar

from gqa_cutlass import env
from gqa_cutlass.codegen.compile import (
    Compiled,
    compile_kernel,
    compiler_version,
    options_digest_text,
)
from gqa_cutlass.codegen.merge import Kernel
from gqa_cutlass.codegen.render import source_digest
from gqa_cutlass.errors import (
    CompileError,
    CompilerMissingError,
    GqaError,
    KernelMissingError,
    StoreError,
)
from gqa_cutlass.kernels import entries
from gqa_cutlass.kernels.entries import Folder, RefusedError
from gqa_cutlass.kernels.locks import locked, locked_if_free
from gqa_cutlass.kernels.workers import map_in_order

LOG = logging.getLogger("gqa_cutlass")
_OURS = re.compile(r"gqa_(?:decode|merge)_.*\.(json|cubin|ptx|lock|tmp)")
_LEFT = re.compile(r"gqa_(?:decode|merge)_.*\.(lock|tmp)")
_TRIES = 10  # at writing into a folder that somebody removes
Result = TypeVar("Result")


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

    config: Kernel
    arch: str
    path: Path
    compiled: Compiled
    was_built: bool


@dataclass(frozen=True, kw_only=True)
class FailedKernel:
    """A kernel that the compiler rejected.

    Args:
        config: The kernel.
        arch: What it was compiled for.
        error: What the compiler said.
    """

    config: Kernel
    arch: str
    error: CompileError


@dataclass(frozen=True, kw_only=True)
class Store:
    """A folder of compiled kernels, behind read-only folders that are looked at first.

    Args:
        root: Where new entries go; None where this user has no such folder, which only matters
            once an entry is to go there.
        read_only: Folders filled ahead of time; entries of any compiler are taken.
        private: Whether what is written is for this user alone; if not, the umask says for whom.
    """

    root: Path | None
    read_only: tuple[Path, ...] = ()
    private: bool = True

    @classmethod
    def default(cls) -> Store:
        """The store that the environment asks for.

        Raises:
            StoreError: A folder of kernels cannot be resolved.
        """
        try:
            root = env.cache_dir()
        except StoreError:
            root = None
        return cls(root=root, read_only=env.kernel_dirs())

    def find(self, config: Kernel, arch: str) -> StoredKernel | None:
        """Look a kernel up without compiling it; what cannot be used counts as absent.

        Raises:
            StoreError: Others could have written what is in a folder.
        """
        return self._search(config, arch)[0]

    def get(self, config: Kernel, arch: str, *, jit: bool | None = None) -> StoredKernel:
        """Look a kernel up, or compile and keep it.

        Args:
            config: The kernel.
            arch: One of `codegen.ARCHES`, or a virtual architecture for PTX.
            jit: Whether compiling is allowed; None asks the environment.

        Raises:
            KernelMissingError: Absent, and compiling is not allowed.
            StoreError: The folder cannot be written, others could have written what is in a
                folder, or another process builds the kernel for longer than anybody should.
            CompileError, CompilerMissingError: Compiling failed.
        """
        found, refused = self._search(config, arch)
        if found:
            return found
        if jit is False or (jit is None and env.jit_disabled()):
            refused += self._of_other_versions(config, arch)
            raise KernelMissingError(
                f"{config.name} for {arch}: not found in {self._places()}, and nothing is compiled "
                "during a CUDA-graph capture or with GQA_CUTLASS_DISABLE_JIT. Call "
                "gqa_cutlass.warmup() before the capture, or build the kernel ahead of time: "
                f"gqa-cutlass build --arch {arch} --kernels {config.name}{_because(refused)}"
            )
        try:
            return self._build(config, arch)
        except GqaError as error:
            if not refused:
                raise
            raise type(error)(f"{error}{_because(refused)}") from error

    def clean(self) -> int:
        """Remove what the writable folder holds, but for kernels that are being built just now.

        Returns:
            How many files went.

        Raises:
            StoreError: The folder cannot be read or written.
        """
        root, removed = self._root(), 0
        with self._writing(root), suppress(FileNotFoundError):  # no folder, or none any more
            ours = [name for name in os.listdir(root) if _OURS.fullmatch(name)]
            for stem, names in groupby(sorted(ours, key=_stem), key=_stem):
                with locked_if_free(root / f"{stem}.lock") as free:
                    for name in names:
                        if free and not name.endswith(".lock"):
                            removed += entries.remove(root / name)
        return removed

    def sweep(self) -> None:
        """Remove what processes left in the writable folder that were ended while they built."""
        root = self._root()
        with suppress(OSError):
            left = [name for name in os.listdir(root) if _LEFT.fullmatch(name)]
            for stem, names in groupby(sorted(left, key=_stem), key=_stem):
                with locked_if_free(root / f"{stem}.lock") as free:
                    for name in names:
                        if free and name.endswith(".tmp"):
                            entries.remove(root / name)

    def _search(self, config: Kernel, arch: str) -> tuple[StoredKernel | None, list[str]]:
        """A kernel that can be used, if any; and why others, that are there, cannot."""
        refused: list[str] = []
        stem = entry_stem(config, arch)
        for path in self._folders():
            with _noting(refused), entries.opened(path) as folder:
                for name in _candidates(folder, stem, any_compiler=path != self.root):
                    with _noting(refused):
                        return StoredKernel(
                            config=config, arch=arch, path=path / entries.code_name(name),
                            compiled=folder.read(name), was_built=False,
                        ), refused  # fmt: skip
        return None, refused

    def _of_other_versions(self, config: Kernel, arch: str) -> list[str]:
        """Folders that hold the kernel as another source or other options made it."""
        found = []
        for path in self._folders():
            with suppress(FileNotFoundError, RefusedError), entries.opened(path) as folder:
                others = folder.entries(f"{config.name}.{arch}.")
                if any(not name.startswith(f"{entry_stem(config, arch)}.") for name in others):
                    found.append(f"{path}: has it from another version of gqa-cutlass")
        return found

    def _build(self, config: Kernel, arch: str) -> StoredKernel:
        """Compile a kernel and keep it, unless another process does so first."""
        root, stem = self._root(), entry_stem(config, arch)
        with ExitStack() as stack:
            self._insist(root, lambda: stack.enter_context(locked(root / f"{stem}.lock")))
            if found := self.find(config, arch):
                return found
            with self._writing(root):
                for left in root.glob(f"{stem}.*.tmp"):  # by a process that was killed
                    entries.remove(left)
            LOG.info("compiling %s for %s, which takes a second or two, once", config.name, arch)
            compiled, compiler = compile_kernel(config, arch), compiler_version()
            name, mode = f"{stem}.{_digest(compiler)}", 0o600 if self.private else 0o644
            # A folder for others is the same to the byte whenever and wherever it is built.
            kept = compiled if self.private else replace(compiled, seconds=0.0)
            path = self._insist(root, lambda: entries.write(root, name, kept, compiler, mode))
        return StoredKernel(config=config, arch=arch, path=path, compiled=compiled, was_built=True)

    def _insist(self, root: Path, act: Callable[[], Result]) -> Result:
        """Do something in the writable folder, where others may remove or put things meanwhile."""
        with self._writing(root):
            for _ in range(_TRIES):
                with suppress(FileExistsError):
                    root.mkdir(parents=True, mode=0o700 if self.private else 0o755)
                if root.is_dir():  # or the lock would make what a link to nothing names
                    with suppress(FileNotFoundError, IsADirectoryError):
                        return act()
            if root.exists():
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(root))
            what = "a link to nothing" if root.is_symlink() else "removed again and again"
            raise FileNotFoundError(errno.ENOENT, what, str(root))

    def _folders(self) -> list[Path]:
        return [*self.read_only, *([self.root] if self.root else [])]

    def _root(self) -> Path:
        return self.root or env.cache_dir()

    @contextmanager
    def _writing(self, root: Path) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:  # a path with a null character
            where = getattr(error, "filename", None) or root
            raise StoreError(
                f"cubin store: cannot write to {root} ({getattr(error, 'strerror', None) or error}"
                f": {where}); needed: a folder that this user can write to. "
                + ("Set GQA_CUTLASS_CACHE_DIR to one." if self.private else "Name another one.")
            ) from error

    def _places(self) -> str:
        nowhere = (
            []
            if self.root
            else [f"this user's cache, for which there is no place (see {env.CACHE_DIR})"]
        )
        return ", ".join([*map(_place, self._folders()), *nowhere])


def build_all(
    store: Store, wanted: Sequence[tuple[Kernel, str]], jobs: int = 0
) -> Iterator[StoredKernel]:
    """As `build_each`, but that one which the compiler rejects is an error.

    Raises:
        StoreError, CompileError, CompilerMissingError: As `Store.get`.
    """
    for result in build_each(store, wanted, jobs):
        if isinstance(result, FailedKernel):
            raise result.error
        yield result


def build_each(
    store: Store, wanted: Sequence[tuple[Kernel, str]], jobs: int = 0
) -> Iterator[StoredKernel | FailedKernel]:
    """Bring kernels into a store, several at a time, and yield each as it is done, in order.

    Uses processes: within one, NVRTC compiles one program at a time. One that the compiler rejects
    does not keep the others from being built.

    Args:
        store: Where to.
        wanted: Kernels, each with its architecture.
        jobs: Processes; 0 for one per CPU.

    Raises:
        StoreError, CompilerMissingError: As `Store.get`.
        CompileError: A process ended abruptly.
    """
    jobs = min(jobs or len(os.sched_getaffinity(0)), len(wanted))
    build_one = partial(_build_one, store)
    try:
        yield from map(build_one, wanted) if jobs <= 1 else map_in_order(build_one, wanted, jobs)
    except BrokenProcessPool as error:
        raise CompileError(
            f"build: one of {jobs} processes that compiled ended abruptly: it was killed, or there "
            "is too little memory; needed: 250 MB for each. What is done is kept: go on with fewer "
            "jobs."
        ) from error
    finally:
        if not store.private:  # a folder for others has kernels in it, and nothing else
            store.sweep()


def _build_one(store: Store, item: tuple[Kernel, str]) -> StoredKernel | FailedKernel:
    config, arch = item
    try:
        return store.get(config, arch, jit=True)
    except CompileError as error:
        return FailedKernel(config=config, arch=arch, error=error)


def entry_stem(config: Kernel, arch: str) -> str:
    """First part of an entry's name; changes with the source and the options."""
    return f"{config.name}.{arch}.{_digest(source_digest(config) + options_digest_text(arch))}"


def _place(folder: Path) -> str:
    """A folder that was looked at, as an error names it."""
    try:
        folder.stat()
    except FileNotFoundError:
        return f"{folder} (does not exist)"
    except (OSError, ValueError):  # which the error says anyway
        pass
    return str(folder)


def _stem(name: str) -> str:
    """The same of a file's name."""
    return ".".join(name.split(".")[:3])


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _candidates(folder: Folder, stem: str, *, any_compiler: bool) -> list[str]:
    """Names of entries that may serve: this compiler's, or if allowed or without one anybody's."""
    compiler = None if any_compiler else _compiler()
    return folder.entries(f"{stem}.") if compiler is None else [f"{stem}.{_digest(compiler)}"]


def _compiler() -> str | None:
    """The present compiler; None where there is none, and what others made must do."""
    try:
        return compiler_version()
    except CompilerMissingError:
        return None


@contextmanager
def _noting(refused: list[str]) -> Iterator[None]:
    """Note what cannot be used and go on, as where there is nothing."""
    try:
        yield
    except FileNotFoundError:
        pass
    except RefusedError as error:
        refused.append(str(error))
        _warn(refused[-1])


@cache
def _warn(refused: str) -> None:
    """Say once that something was there and is not used."""
    LOG.warning("cubin store: not used: %s", refused)


def _because(refused: list[str]) -> str:
    return f". Found, but not used: {'; '.join(refused)}" if refused else ""
