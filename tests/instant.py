"""A compiler that takes no time, for tests of what surrounds one."""

from __future__ import annotations

from gqa_cutlass.codegen import DType, KernelConfig, Math, default_config
from gqa_cutlass.codegen.compile import Compiled

CONFIG = default_config(Math.TENSOROP, DType.F16, 128, 4, 8)
OTHER = default_config(Math.TENSOROP, DType.BF16, 128, 4, 8)
ARCH = "sm_90a"


class InstantCompiler:
    """Stands in for NVRTC: instant, and counts."""

    def __init__(self) -> None:
        self.compiled: list[tuple[str, str]] = []

    def __call__(self, config: KernelConfig, arch: str) -> Compiled:
        self.compiled.append((config.name, arch))
        code = f"cubin of {config.name} for {arch}".encode()
        return Compiled(code=code, registers=99, spill_bytes=0, stack_bytes=0, seconds=0.5)
