"""The kernel generator: configurations in, CUDA source and cubins out. No GPU, no torch."""

from gqa_cutlass.codegen.config import ARCHES, Arch, KernelConfig
from gqa_cutlass.codegen.render import render, source_digest
from gqa_cutlass.codegen.schema.kinds import DType, Math, Schedule
from gqa_cutlass.codegen.variants import default_config, select, shipped

__all__ = [
    "ARCHES",
    "Arch",
    "DType",
    "KernelConfig",
    "Math",
    "Schedule",
    "default_config",
    "render",
    "select",
    "shipped",
    "source_digest",
]
