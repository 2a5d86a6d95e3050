"""What the package finds on a machine, one line per thing that can be missing."""

from __future__ import annotations

from collections.abc import Callable

from gqa_cutlass import env
from gqa_cutlass.errors import GqaError


def findings() -> list[tuple[str, str]]:
    """Pairs of what was looked for and what was found; never raises for what is missing."""
    checks: list[tuple[str, Callable[[], str]]] = [
        ("compiler and headers", _compiler),
        ("torch", _torch),
        ("GPU", _gpu),
        ("store", lambda: str(env.cache_dir())),
        ("kernel folders", lambda: ", ".join(map(str, env.kernel_dirs())) or "none"),
        ("compiling at run time", lambda: "disabled" if env.jit_disabled() else "allowed"),
    ]
    return [(what, _try(check)) for what, check in checks]


def _try(check: Callable[[], str]) -> str:
    try:
        return check()
    except GqaError as error:
        return f"MISSING: {error}"


def _compiler() -> str:
    from gqa_cutlass.codegen.compile import compiler_version

    return compiler_version()


def _torch() -> str:
    import torch

    return f"{torch.__version__}, CUDA {torch.version.cuda or 'not built in'}"


def _gpu() -> str:
    import torch

    from gqa_cutlass.launcher import describe_device

    device = describe_device(0)
    name = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "not visible to torch"
    return f"{name}, {device.arch.name}, {device.num_sms} SMs"
