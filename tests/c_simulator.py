"""What the C library launches, run in ptxsim; and what Python launches, to compare."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from c_driver import DriverLaunch, DriverTensor, Launched, argument_of, fields_of
from c_library import NUM_MERGE_COUNTERS, POINTERS, Library, config_of, scale_tensors
from cases import Step
from torch import Tensor

from gqa_cutlass.codegen import KernelConfig
from gqa_cutlass.codegen.schema.launch import LaunchShape
from gqa_cutlass.codegen.schema.params import TENSOR_MAP_BYTES
from gqa_cutlass.cpu import executor as cpu
from gqa_cutlass.cpu.executor import program_of, regions_of
from gqa_cutlass.errors import InputError
from gqa_cutlass.ptxsim.simulate import Checks
from gqa_cutlass.tensormap import TensorMap

_SWIZZLE_128, _UINT16 = 3, 1


def encode(tensor: DriverTensor, map_: int) -> int:
    """Encode a tensor map for ptxsim, where the driver would; refused as the driver does."""
    usual = (tensor.type, tensor.interleave, tensor.swizzle, tensor.promotion, tensor.fill)
    rank = tensor.rank
    if usual != (_UINT16, 0, _SWIZZLE_128, 0, 0) or list(tensor.steps[:rank]) != [1] * rank:
        return 1
    try:
        description = TensorMap(
            address=tensor.address, element_bytes=2, sizes=tuple(tensor.sizes[:rank]),
            strides=tuple(tensor.strides[: rank - 1]), box=tuple(tensor.box[:rank]), swizzle=128,
        )  # fmt: skip
    except InputError:
        return 1
    ctypes.memmove(map_, description.to_bytes(), TENSOR_MAP_BYTES)
    return 0


@dataclass
class Simulator:
    """Runs in ptxsim what a library launches.

    Args:
        library: Whose launches.
        tensors: What they may touch, by the fields of `Params`.
        launches: What was launched.
        fault: What went wrong in a launch, for the test to raise: a callback from C cannot.
    """

    library: Library
    tensors: dict[str, Tensor] = field(default_factory=dict)
    launches: list[Launched] = field(default_factory=list)
    fault: BaseException | None = None

    def __post_init__(self) -> None:
        self.library.driver.on_launch(self.launch)
        self.library.driver.on_encode(encode)

    def decode(
        self, step: Step, workspace: Tensor | None = None, lse: Tensor | None = None
    ) -> Launched:
        """Decode a step in ptxsim, and say what was launched."""
        self.bind(step, workspace, lse)
        return self.launched(self.library.decode(step, config_of(step, workspace, lse)))

    def decode_ragged(
        self,
        step: Step,
        flag: Tensor,
        workspace: Tensor | None = None,
        lse: Tensor | None = None,
        **options: int,
    ) -> Launched:
        """The same, with lengths on the device, and with other fields where given."""
        self.bind(step, workspace, lse)
        self.tensors |= {"seqlens": step.seqlens, "overflow_flag": flag}
        config = config_of(step, workspace, lse, **options)
        config.cache_len = -1  # ignored
        return self.launched(self.library.decode_ragged(step, flag, config))

    def bind(self, step: Step, workspace: Tensor | None = None, lse: Tensor | None = None) -> None:
        """Let launches touch a step's tensors, a workspace and an lse, and nothing else."""
        assert step.k is not None and step.v is not None
        self.tensors = {
            "q": step.q, "k_cache": step.k_cache, "v_cache": step.v_cache, "k_new": step.k,
            "v_new": step.v, "out": step.out,
        }  # fmt: skip
        features = {name: getattr(step, name) for name in POINTERS}
        self.tensors |= {name: t for name, t in features.items() if t is not None}
        self.tensors |= scale_tensors(step.k_scale, step.v_scale)
        if lse is not None:
            self.tensors["lse"] = lse
        if workspace is not None:
            partials = workspace[NUM_MERGE_COUNTERS:].view(torch.float32)
            self.tensors |= {
                "merge_counters": workspace[:NUM_MERGE_COUNTERS],
                "split_workspace": partials,
            }

    def launched(self, status: str) -> Launched:
        """What was launched last, by a call that returned this."""
        if self.fault is not None:
            raise self.fault
        assert status == "GQA_SUCCESS", self.library.error
        return self.launches[-1]

    def launch(self, launch: DriverLaunch) -> int:
        """Run a launch; returns what the driver answers."""
        try:
            launched = Launched.by_driver(launch)
            self.launches.append(launched)
            config = KernelConfig.from_name(launched.kernel)
            program = program_of(config)
            shared = config.tma or config.head_blocks > 1 or config.several_queries
            regions = regions_of(self.tensors, append=True, overread=shared)
            cpu.run(program, launched.shape, argument_of(launch), regions, Checks())
        except BaseException as fault:
            self.fault = fault
            return 1
        return 0


@contextmanager
def recorded() -> Iterator[list[Launched]]:
    """What Python launches meanwhile on CPU tensors."""
    found: list[Launched] = []
    run = cpu.run

    def record(program: Any, shape: LaunchShape, argument: Any, *rest: Any) -> None:
        found.append(Launched(program.kernel.name, shape, fields_of(argument)))
        run(program, shape, argument, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "run", record)
        yield found
