"""The kernel generator: configurations in, CUDA source and cubins out. No GPU, no torch."""

from gqa_cutlass.codegen.config import ARCHES, Arch, KernelConfig
from gqa_cutlass.codegen.merge import Kernel, MergeConfig
from gqa_cutlass.codegen.render import render, source_digest
from gqa_cutlass.codegen.schema.kinds import DType, Math, Schedule
from gqa_cutlass.codegen.schema.launch import NumberType
from gqa_cutlass.codegen.selection import select, select_any
from gqa_cutlass.codegen.variants import carried, default_config, merges, shipped

__all__ = [
    "ARCHES",
    "Arch",
    "DType",
    "Kernel",
    "KernelConfig",
    "Math",
    "MergeConfig",
    "NumberType",
    "Schedule",
    "carried",
    "default_config",
    "merges",
    "render",
    "select",
    "select_any",
    "shipped",
    "source_digest",
]
