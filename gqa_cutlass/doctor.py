"""What the package finds on a machine, one finding per thing that can be missing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What came of looking for something.

    Args:
        what: It.
        found: What was found, or why it was not.
        missing: Whether something that the package needs is not there.
    """

    what: str
    found: str
    missing: bool = False

    def __str__(self) -> str:
        return f"{self.what:<22} {'MISSING: ' * self.missing}{self.found}"


def findings() -> list[Finding]:
    """Look for everything; never raises, whatever is missing or broken."""
    checks: dict[str, Callable[[], str]] = {
        "compiler and headers": _compiler,
        "torch": _torch,
        "GPU": _gpu,
        "store": _store,
        "kernel folders": _kernel_folders,
        "compiling at run time": _compiling,
    }
    return [_look(what, check) for what, check in checks.items()]


def _look(what: str, check: Callable[[], str]) -> Finding:
    try:
        return Finding(what=what, found=check())
    except Exception as error:  # anything may be broken here; to say so is what this is for
        text = " ".join(str(error).split()) or type(error).__name__
        return Finding(what=what, found=text, missing=True)


def _compiler() -> str:
    from gqa_cutlass.codegen.compile import compiler_version

    return compiler_version()


def _torch() -> str:
    import torch

    return f"{torch.__version__}, CUDA {torch.version.cuda or 'not built in'}"


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
    from gqa_cutlass import env

    return str(env.cache_dir())


def _kernel_folders() -> str:
    from gqa_cutlass import env

    return ", ".join(map(str, env.kernel_dirs())) or "none"


def _compiling() -> str:
    from gqa_cutlass import env

    return "disabled" if env.jit_disabled() else "allowed"
