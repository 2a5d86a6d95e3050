"""What the package finds on a machine, one finding per thing that can be missing."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from gqa_cutlass.errors import GqaError

_LEAST_FREE = 16 << 20  # bytes, for a few hundred kernels
_CONTROL = Path("/dev/nvidiactl")  # there where NVIDIA's driver is loaded
_COLUMN = 22
_TRIAL = 'extern "C" __global__ void doctor() {}'
_AGAIN = "`pip install .` in a checkout of gqa_cutlass"
_DRIVER = "install or upgrade the NVIDIA driver; `nvidia-smi` shows what it finds"
_NEEDED = re.compile(r"(?P<name>[A-Za-z0-9._-]+)\s*(?P<bounds>[^;]*)")
# What stands in place of dependencies where cuda-python is CUDA 12's; requirements-cuda12.txt.
CUDA_12 = {
    "cuda-python": "cuda-python>=12.9,<13",
    "nvidia-cuda-cccl": "nvidia-cuda-cccl-cu12>=12.9,<13",
    "nvidia-cuda-nvrtc": "nvidia-cuda-nvrtc-cu12>=12.6,<13",
    "nvidia-cuda-runtime": "nvidia-cuda-runtime-cu12>=12.6,<13",
    "nvidia-nvfatbin": "nvidia-nvfatbin-cu12>=12.9,<13",
}
_BOUND = re.compile(r"(>=|<)([0-9.]+)")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What came of looking for something.

    Args:
        what: It.
        found: What was found, or why it was not.
        missing: Whether something that the package needs is not there.
        remedy: What to do about it then.
    """

    what: str
    found: str
    missing: bool = False
    remedy: str = ""

    def __str__(self) -> str:
        line = f"{self.what:<{_COLUMN}} {'MISSING: ' * self.missing}{self.found}"
        told = not self.missing or not self.remedy or "remedy:" in self.found
        return line if told else f"{line}\n{'':<{_COLUMN}} remedy: {self.remedy}"


class _Fault(Exception):
    """Something is there, and not as it must be."""

    def __init__(self, *, found: str, remedy: str) -> None:
        super().__init__(found)
        self.remedy = remedy


def findings() -> list[Finding]:
    """Look for everything; never raises, whatever is missing or broken."""
    checks: dict[str, tuple[Callable[[], str], str]] = {
        "package": (_package, _AGAIN),
        "dependencies": (_dependencies, _AGAIN),
        "compiler and headers": (_compiler, _AGAIN),
        "disassembler": (_disassembler, "pip install nvidia-cuda-nvdisasm"),
        "torch": (_torch, "pip install torch, as https://pytorch.org says for this machine"),
        "driver": (_driver, _DRIVER),
        "GPU": (_gpu, _DRIVER),
        "store": (_store, "set GQA_CUTLASS_CACHE_DIR to a folder that this user can write to"),
        "kernel folders": (_kernel_folders, "`gqa-cutlass build --out` makes one"),
        "compiling at run time": (_compiling, "unset GQA_CUTLASS_DISABLE_JIT"),
    }
    return [_look(what, check, remedy) for what, (check, remedy) in checks.items()]


def _look(what: str, check: Callable[[], str], remedy: str) -> Finding:
    try:
        return Finding(what=what, found=check())
    except _Fault as fault:
        return Finding(what=what, found=str(fault), missing=True, remedy=fault.remedy)
    except Exception as error:  # anything may be broken here; to say so is what this is for
        text = " ".join(str(error).split()) or type(error).__name__
        told = isinstance(error, GqaError) and "needed:" in text  # and then what to do
        return Finding(what=what, found=text, missing=True, remedy="" if told else remedy)


def _package() -> str:
    from gqa_cutlass.version import __version__

    return f"gqa-cutlass {__version__}, Python {platform.python_version()}, {platform.machine()}"


def _dependencies() -> str:
    """Versions of what the package declares. Parts that are built on site have odd ones: only the
    numbers count.
    """
    found = []
    for text, name, bounds in _needed():
        version = _version(name)
        if version is None:
            raise _Fault(found=f"{name} is not there", remedy=f"pip install '{text}'")
        for sign, bound in _BOUND.findall(bounds):
            if (_numbers(version) >= _numbers(bound)) != (sign == ">="):
                raise _Fault(
                    found=f"{name} {version}, where {sign}{bound} is needed",
                    remedy=f"pip install '{text}'",
                )
        found.append(f"{name} {version}")
    return ", ".join(found)


def _needed() -> Iterator[tuple[str, str, str]]:
    """Dependencies, each as it is declared, its name, and its bounds."""
    bindings = _version("cuda-bindings")
    instead = CUDA_12 if bindings is not None and _numbers(bindings)[0] == 12 else {}
    for declared in importlib.metadata.requires("gqa-cutlass") or []:
        needed = _NEEDED.match(declared)
        if needed is None or "extra ==" in declared:
            continue
        text = instead.get(needed["name"], declared)
        needed = _NEEDED.match(text) or needed
        yield text, needed["name"], needed["bounds"]


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> list[int]:
    leading = re.match(r"[0-9]+(\.[0-9]+)*", version)
    numbers = [int(part) for part in leading[0].split(".")] if leading else [0]
    return (numbers + [0, 0, 0])[:3]


def _compiler() -> str:
    """Their versions, once the compiler has shown that it compiles. Without one, kernels that were
    built elsewhere run: no fault where compiling is disabled.
    """
    from gqa_cutlass import env
    from gqa_cutlass.codegen.compile import compile_source, compiler_version
    from gqa_cutlass.errors import CompilerMissingError

    try:
        found = compiler_version()
    except CompilerMissingError:
        if env.jit_disabled():
            return "none, and none is needed: GQA_CUTLASS_DISABLE_JIT"
        raise
    compile_source(_TRIAL, "doctor", "sm_90a")
    return found


def _disassembler() -> str:
    """What `inspect` needs. To have none is no fault."""
    from gqa_cutlass.codegen.sass import disassembler

    found = disassembler()
    return str(found) if found else "none, for `inspect`; pip install nvidia-cuda-nvdisasm"


def _torch() -> str:
    import torch

    return f"{torch.__version__}, CUDA {torch.version.cuda or 'not built in'}"


def _driver() -> str:
    """The driver's version. To have none is no fault; to have one that does not work is."""
    from gqa_cutlass.errors import DeviceError
    from gqa_cutlass.gpu.driver import driver_version

    try:
        return f"supports CUDA {driver_version()}"
    except DeviceError as error:
        if not _CONTROL.exists():
            return "none"
        raise _Fault(
            found=f"loaded, but of no use ({str(error).split(';')[0]})",
            remedy=f"{_DRIVER}; CUDA_VISIBLE_DEVICES may hide every GPU",
        ) from error


def _gpu() -> str:
    """The GPU. To have none is no fault: kernels run without one, slowly."""
    from gqa_cutlass.errors import DeviceError
    from gqa_cutlass.gpu.driver import describe_device, driver_version

    try:
        driver_version()
    except DeviceError as error:
        return f"none, so that kernels run in ptxsim ({str(error).split(';')[0]})"
    device = describe_device(0)
    return f"{_name_in_torch()}, {device.arch.name}, {device.num_sms} SMs"


def _name_in_torch() -> str:
    import torch

    from gqa_cutlass.errors import DeviceError

    if not torch.cuda.is_available():
        raise DeviceError("torch does not see the GPU; remedy: a torch that is built with CUDA")
    return torch.cuda.get_device_name(0)


def _store() -> str:
    """Where kernels are kept: whether they can be, and whether what is there is trusted."""
    from gqa_cutlass import env
    from gqa_cutlass.kernels import entries

    root = env.cache_dir()
    if root.exists():
        with entries.opened(root):
            pass
    if env.jit_disabled():
        return str(root)
    there = next(path for path in (root, *root.parents) if path.exists())
    remedy = "set GQA_CUTLASS_CACHE_DIR to a folder that this user can write to, or chmod this one"
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise _Fault(found=f"{root}, where {there} cannot be written to", remedy=remedy)
    space = os.statvfs(there)
    free = space.f_bavail * space.f_frsize
    if free < _LEAST_FREE:
        raise _Fault(
            found=f"{root}, on a disk with {free >> 10} KiB free",
            remedy="make room, `gqa-cutlass clean` for instance, or set GQA_CUTLASS_CACHE_DIR",
        )
    return str(root)


def _kernel_folders() -> str:
    from gqa_cutlass import env
    from gqa_cutlass.kernels import entries

    folders = env.kernel_dirs()
    for path in folders:
        try:
            with entries.opened(path):
                pass
        except FileNotFoundError:
            raise _Fault(
                found=f"{path}, which is not there",
                remedy=f"`gqa-cutlass build --out {path}`, or set GQA_CUTLASS_KERNEL_DIR aright",
            ) from None
    return ", ".join(map(str, folders)) or "none"


def _compiling() -> str:
    from gqa_cutlass import env

    return "disabled" if env.jit_disabled() else "allowed"
