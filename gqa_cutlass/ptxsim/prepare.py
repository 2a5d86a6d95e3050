"""A kernel, prepared to be run: its code as actions, its memory laid out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gqa_cutlass.errors import KernelFault, PtxError
from gqa_cutlass.ptxsim import limits
from gqa_cutlass.ptxsim.decode import build
from gqa_cutlass.ptxsim.element.bits import Bits
from gqa_cutlass.ptxsim.flow import Flow
from gqa_cutlass.ptxsim.order.pdl import WAIT
from gqa_cutlass.ptxsim.program import UNSIGNED, Action, Code, Slots
from gqa_cutlass.ptxsim.text.syntax import Instruction, Kernel, Reg

_SHARED_BASE = 1024  # as on sm_90, where the system has the first KiB: null is no valid address
_NARROWEST = 16
_AGENTS = 128  # mbarriers of a block that are told apart; all columns of the clocks cost time


@dataclass(frozen=True, kw_only=True)
class Launch:
    """Shape of a launch.

    Args:
        grid: Blocks in x, y and z.
        block: Threads per block, a multiple of 32.
        cluster: Blocks per cluster, in x, y and z.
        shared_bytes: Dynamic shared memory per block.
    """

    grid: tuple[int, int, int]
    block: int
    cluster: tuple[int, int, int] = (1, 1, 1)
    shared_bytes: int = 0

    @property
    def cluster_size(self) -> int:
        """Blocks per cluster."""
        return self.cluster[0] * self.cluster[1] * self.cluster[2]

    @property
    def num_blocks(self) -> int:
        """Blocks of the grid."""
        return self.grid[0] * self.grid[1] * self.grid[2]

    def block_ids(self, first: int, count: int) -> NDArray[np.int64]:
        """Blocks from `first` on as [count, (x, y, z)]: cluster by cluster, x running fastest."""
        outer, inner = np.divmod(np.arange(first, first + count), self.cluster_size)
        ids = np.empty((count, 3), dtype=np.int64)
        for i, (blocks, wide) in enumerate(zip(self.grid, self.cluster, strict=True)):
            outer, place = np.divmod(outer, blocks // wide)
            inner, rank = np.divmod(inner, wide)
            ids[:, i] = place * wide + rank
        return ids


class Program:
    """A kernel, ready to run any number of times.

    Args:
        kernel: As parsed.

    Raises:
        PtxError: It has an instruction that is not known, or more of something than there is.
    """

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self._place_variables()
        self._check_names()
        self._slots = Slots(kernel, self._addresses, {n: _blank(n) for n in _SPECIALS})
        flow = Flow(kernel)
        widths = [kernel.registers[name] for name in flow.names]
        self.bytes_per_thread = self.local_bytes + sum(max(8, width) // 8 for width in widths)
        self.leaders = frozenset(flow.leaders)
        watched = flow.maybe_unassigned()
        self.watched = [self._slots.named(name) for name in sorted(watched)]
        dead = flow.dead_after()
        self.code = [
            self._code(instruction, *touched, dead[i])
            for i, (instruction, touched) in enumerate(
                zip(kernel.instructions, flow.touched, strict=True)
            )
        ]
        inits = any(i.opcode[:2] == ("mbarrier", "init") for i in kernel.instructions)
        self.agents = _AGENTS if inits else 0  # of `Clocks`
        self.awaits_predecessor = any(i.opcode == WAIT for i in kernel.instructions)
        widths = [c.action.shared_width for c in self.code if c.action.shared_width]
        self.granule = min([_NARROWEST, *widths])

    def _check_names(self) -> None:
        """Refuse what has the name of something else, and more memory than there is."""
        special = next((n for n in self.kernel.registers if n in _SPECIALS), None)
        for wrong, got, allowed in (
            (special, f"a register {special}", "names that are not those of special registers"),
            (self.local_bytes > limits.LOCAL, f"{self.local_bytes} bytes of local memory",
             f"up to {limits.LOCAL} bytes per thread"),
            (self.param_bytes > limits.PARAMS, f"{self.param_bytes} bytes of parameters",
             f"up to {limits.PARAMS}"),
        ):  # fmt: skip
            if wrong:
                raise PtxError(f"{self.kernel.name}: got {got}; allowed: {allowed}.")

    def _place_variables(self) -> None:
        """Give every variable an address."""
        self._addresses: dict[str, int] = {}
        shared, local, params = _SHARED_BASE, 0, 0
        dynamic = []
        for name, v in self.kernel.variables.items():
            if v.space == "shared" and v.size:
                shared = _aligned(shared, v.align)
                self._addresses[name] = shared
                shared += v.size
            elif v.space == "shared":
                dynamic.append((name, v.align))
            elif v.space == "local":
                local = _aligned(local, v.align)
                self._addresses[name] = local
                local += v.size
            elif v.space == "param":
                params = _aligned(params, v.align)
                self._addresses[name] = params
                params += v.size
        for name, align in dynamic:
            shared = _aligned(shared, align)
            self._addresses[name] = shared
        self.static_shared = shared - _SHARED_BASE
        self.local_bytes = _aligned(local, 16)
        self.param_bytes = params
        self.shared_base = _SHARED_BASE

    def _code(
        self, instruction: Instruction, reads: list[str], writes: list[str], dead: list[str]
    ) -> Code:
        slots = self._slots
        guard = None
        if instruction.guard is not None:
            guard = slots.source(instruction.guard, 1, instruction)
        action: Action = build(instruction, slots)
        return Code(
            instruction=instruction,
            action=action,
            guard=guard,
            dead=tuple(slots.named(name) for name in dead),
            reads=tuple(
                slots.register(Reg(name), instruction) for name in reads if name not in _SPECIALS
            ),
            writes=tuple(slots.register(Reg(name), instruction) for name in writes),
        )

    def registers(self, launch: Launch, block_ids: NDArray[np.int64]) -> list[Bits | None]:
        """The register file before the first instruction: constants and special registers."""
        values = list(self._slots.values)
        for name, value in _special_values(launch, block_ids, self.shared_size(launch)).items():
            values[self._slots.named(name)] = value
        return values

    def shared_size(self, launch: Launch) -> int:
        """Bytes of shared memory of a block."""
        return self.static_shared + launch.shared_bytes

    def dtype(self, slot: int) -> type[np.generic]:
        """NumPy's type of a slot."""
        return UNSIGNED[self._slots.width(slot)]

    def slot_name(self, slot: int) -> str:
        """A slot's register."""
        return next(n for n in self.kernel.registers if self._slots.named(n) == slot)

    def fault(self, what: str, who: str, pc: int, address: int | None) -> KernelFault:
        """The error for what a kernel did."""
        instruction = self.code[pc].instruction
        at = "" if address is None else f"; address {address % 2**64:#x}"
        return KernelFault(
            f"{self.kernel.name}: {what}{at}; by {who}; in `{instruction.name}` at "
            f"{instruction.where}"
        )


_AXES = "xyz"
_SPECIALS = dict.fromkeys([
    *(f"%{name}.{axis}" for axis in _AXES for name in (
        "tid", "ntid", "ctaid", "nctaid", "clusterid", "nclusterid", "cluster_ctaid",
        "cluster_nctaid",
    )),
    "%laneid", "%warpid", "%nwarpid", "%smid", "%nsmid", "%gridid", "%cluster_ctarank",
    "%cluster_nctarank", "%lanemask_eq", "%lanemask_lt", "%lanemask_le", "%lanemask_gt",
    "%lanemask_ge", "%dynamic_smem_size", "%total_smem_size", "%is_explicit_cluster",
])  # fmt: skip


def _blank(name: str) -> Bits:
    kind = {"%gridid": np.uint64, "%is_explicit_cluster": np.bool_}.get(name, np.uint32)
    return np.zeros(1, dtype=kind)


def _special_values(
    launch: Launch, block_ids: NDArray[np.int64], total_shared: int
) -> dict[str, Bits]:
    """Special registers (PTX ISA 10): one value per lane, or one for all."""
    blocks, threads = len(block_ids), launch.block
    thread = np.tile(np.arange(threads), blocks)
    lane = thread % 32
    one = np.uint64(1)
    bit = one << lane.astype(np.uint64)
    size = launch.cluster_size
    values: dict[str, Any] = {
        "%laneid": lane, "%warpid": thread // 32, "%nwarpid": [threads // 32],
        "%nsmid": [1], "%smid": [0], "%gridid": [0],
        "%cluster_ctarank": np.repeat(np.arange(blocks) % size, threads),
        "%cluster_nctarank": [size],
        "%lanemask_eq": bit, "%lanemask_lt": bit - one, "%lanemask_le": bit * 2 - one,
        "%lanemask_gt": (1 << 32) - bit * 2, "%lanemask_ge": (1 << 32) - bit,
        "%dynamic_smem_size": [launch.shared_bytes], "%total_smem_size": [total_shared],
        "%is_explicit_cluster": [size > 1],
    }  # fmt: skip
    for i, axis in enumerate(_AXES):
        of_block = np.repeat(block_ids[:, i], threads)
        values |= {
            f"%tid.{axis}": thread if i == 0 else [0],
            f"%ntid.{axis}": [threads if i == 0 else 1],
            f"%ctaid.{axis}": of_block,
            f"%nctaid.{axis}": [launch.grid[i]],
            f"%clusterid.{axis}": of_block // launch.cluster[i],
            f"%nclusterid.{axis}": [launch.grid[i] // launch.cluster[i]],
            f"%cluster_ctaid.{axis}": of_block % launch.cluster[i],
            f"%cluster_nctaid.{axis}": [launch.cluster[i]],
        }
    return {name: np.asarray(v).astype(_blank(name).dtype) for name, v in values.items()}


def _aligned(value: int, alignment: int) -> int:
    return -(-value // alignment) * alignment
