"""The identity of a kernel: a validated configuration with a procedural name."""

from __future__ import annotations

import re
from collections.abc import Container
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeVar

from gqa_cutlass.codegen.schema import storage
from gqa_cutlass.codegen.schema.kinds import DType, Math, Schedule
from gqa_cutlass.codegen.schema.policies import OF_TOKENS, Policy, packed, special, tagged
from gqa_cutlass.codegen.schema.rounding import ceil_div, round_up
from gqa_cutlass.codegen.schema.slots import ELEMENT, NORM, QUERIES, ROTARY
from gqa_cutlass.codegen.schema.storage import (
    BOX_DIMS,
    ELEMENT_BYTES,
    PAGE_TOKENS,
    box_tile_bytes,
)
from gqa_cutlass.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Arch:
    """A compilation target.

    Args:
        name: What NVRTC is asked for, for example "sm_90a".
        shared_per_block: Shared memory that one block may use, in bytes.
        shared_per_sm: Shared memory of a multiprocessor, in bytes.
        max_threads_per_sm: Threads resident on a multiprocessor.

    The figures are those of the CUDA C++ Programming Guide, "Compute Capabilities", and of 11.0
    those of CCCL's `arch_traits`.
    """

    name: str
    shared_per_block: int
    shared_per_sm: int
    max_threads_per_sm: int

    @property
    def capability(self) -> int:
        """Compute capability as one number: 90 for sm_90a."""
        return int(re.sub(r"\D", "", self.name))

    @property
    def exact(self) -> bool:
        """Whether its cubins run on that compute capability alone, as those of "sm_90a" do. Those
        of "sm_80" and of a family ("sm_100f") run on later ones of the same major version.
        """
        return self.name.endswith("a")

    @property
    def dependents(self) -> bool:
        """Whether it has programmatic dependent launches."""
        return self.capability >= _FIRST_WITH_DEPENDENTS


_FIRST_WITH_DEPENDENTS = 90
_E = TypeVar("_E", bound=StrEnum)
_KIB = 1024
ARCHES: dict[str, Arch] = {
    name: Arch(
        name=name,
        shared_per_block=block * _KIB,
        shared_per_sm=sm * _KIB,
        max_threads_per_sm=threads,
    )
    for name, block, sm, threads in (
        ("sm_80", 163, 164, 2048),
        ("sm_86", 99, 100, 1536),
        ("sm_89", 99, 100, 1536),
        ("sm_90a", 227, 228, 2048),
        ("sm_100f", 227, 228, 2048),  # and 10.3
        ("sm_110f", 227, 228, 1536),
        ("sm_120f", 99, 100, 1536),  # and 12.1
    )
}

HEAD_DIMS = range(32, 257, 8)
HEAD_DIM_RULE = f"multiples of 8 from {HEAD_DIMS[0]} to {HEAD_DIMS[-1]}"
MAX_GROUP_SIZE = 1024
WARP_SIZE = 32
_REGISTERS_PER_SM = 65536
_LARGEST_SHARED_PER_SM = max(arch.shared_per_sm for arch in ARCHES.values())
_INT = r"[1-9]\d{0,8}"  # Python refuses to read numbers of thousands of digits
_NAME = re.compile(
    r"gqa_decode_(?P<arch>sm\d+)_(?P<math>tensorop|simt)_(?P<dtype>f16|bf16)_(?P<stored>(?P=dtype)|[a-z]\d[a-z]\dt?)"
    rf"_d(?P<head_dim>{_INT})(?:v(?P<head_dim_v>{_INT}))?_g(?P<group_size>{_INT})_align(?P<vec_width>{_INT})"
    r"_(?P<schedule>multistage|tma)"
    rf"_h(?P<block_h>{_INT})n(?P<block_n>{_INT})w(?P<num_warps>{_INT})s(?P<num_stages>{_INT})"
    r"(?P<policies>(?:_(?!pdl)[a-z0-9]+)*)(?P<pdl>_pdl)?"
)

# Per schedule, and for dependent launches: the oldest architecture, as names say it; those that it
# is compiled for; and the virtual one for ptxsim.
_TARGETS = {
    (Schedule.MULTISTAGE, False): ("sm80", tuple(ARCHES), "compute_80"),
    (Schedule.MULTISTAGE, True): (
        "sm90", tuple(name for name, arch in ARCHES.items() if arch.dependents), "compute_90",
    ),
    (Schedule.TMA, False): ("sm90", ("sm_90a",), "compute_90"),
    (Schedule.TMA, True): ("sm90", ("sm_90a",), "compute_90"),
}  # fmt: skip

# What each math allows of a field, and how to say it.
_Rules = tuple[tuple[str, Container[object], str], ...]
_TENSOROP_RULES: _Rules = (
    ("vec_width", (2, 4, 8), "one of (2, 4, 8) with tensorop"),
    ("block_h", (8, 16, 24, 32), "8, 16, 24 or 32 with tensorop (8 is the MMA's N)"),
    ("block_n", (16, 32, 64), "16, 32 or 64 with tensorop (16 is the MMA's M)"),
)
_TMA_RULES: _Rules = (
    ("math", (Math.TENSOROP,), "tensorop with tma"),
    ("vec_width", (8,), "8 with tma (a tensor copy wants 16 bytes)"),
    ("num_warps", (4, 8, 16), "4, 8 or 16 with tma"),
    ("num_stages", range(1, 5), "1 to 4 with tma"),
)
_SIMT_RULES: _Rules = (
    ("vec_width", (1, 2, 4, 8), "one of (1, 2, 4, 8) with simt"),
    ("block_h", range(1, 9), "1 to 8 with simt"),
    ("block_n", (16, 32), "16 or 32 with simt (lanes of a warp)"),
)


@dataclass(frozen=True, kw_only=True)
class KernelConfig:
    """One kernel. Two kernels with equal configurations are the same kernel.

    Args:
        math: Tensor cores or CUDA cores.
        dtype: Element type of all tensors, of caches unless a policy says another.
        head_dim: Dimension per head of queries and keys; a multiple of 8 from 32 to 256.
        group_size: Query heads per KV head, at least 1.
        vec_width: Elements per global memory access: 8, 4 or 2, and 1 for simt. Every address must
            be a multiple of it.
        block_h: Query heads that one block handles, or pairs of a head and a token; larger groups
            take several blocks.
        block_n: KV tokens per tile.
        num_warps: Warps per block.
        num_stages: K tiles (and V tiles) that a warp keeps in flight; with tma, up to so many.
        schedule: How it loads and merges.
        pdl: Whether it may start before the kernel before it is done (programmatic dependent
            launch), which costs others 2% at short contexts.
        head_dim_v: Dimension per head of values and outputs, likewise; None: as head_dim.
        policies: Features: what stands in the kernel's slots in place of their defaults.

    Raises:
        ConfigError: A rule is broken; the message names it.
    """

    math: Math
    dtype: DType
    head_dim: int
    group_size: int
    vec_width: int
    block_h: int
    block_n: int
    num_warps: int
    num_stages: int
    schedule: Schedule = Schedule.MULTISTAGE
    pdl: bool = False
    head_dim_v: int | None = None
    policies: tuple[Policy, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "schedule", _member(Schedule, "schedule", self.schedule))
        object.__setattr__(self, "math", _member(Math, "math", self.math))
        object.__setattr__(self, "dtype", _member(DType, "dtype", self.dtype))
        for field in ("head_dim", "group_size", "vec_width", "block_h", "block_n", "num_warps",
                      "num_stages"):  # fmt: skip
            _check(field, getattr(self, field), type(getattr(self, field)) is int, "an int")
        object.__setattr__(self, "policies", special(tuple(self.policies)))
        for policy in self.policies:
            _check(
                "schedule",
                self.schedule,
                self.schedule in policy.schedules,
                f"{', '.join(sorted(policy.schedules))} with {policy}",
            )
        _check("pdl", self.pdl, type(self.pdl) is bool, "a bool")
        check_head_dim(self.head_dim)
        if self.head_dim_v is not None:
            check_head_dim(self.head_dim_v, "head_dim_v")
        if self.head_dim_v == self.head_dim:
            object.__setattr__(self, "head_dim_v", None)
        for field, allowed, text in (
            ("group_size", range(1, MAX_GROUP_SIZE + 1), f"1 to {MAX_GROUP_SIZE}"),
            *(_TENSOROP_RULES if self.math is Math.TENSOROP else _SIMT_RULES),
            ("num_warps", range(1, 17), "1 to 16"),
            ("num_stages", range(1, 9), "1 to 8"),
            *(_TMA_RULES if self.tma else ()),
        ):
            _check(field, getattr(self, field), getattr(self, field) in allowed, text)
        rows = [dim // self.packed for dim in (self.head_dim, self.value_dim)]
        _check(
            "vec_width",
            self.vec_width,
            all(row % self.vec_width == 0 for row in rows),
            f"what divides rows of {rows[0]} and {rows[1]} times 16 bits",
        )
        _check(
            "block_n",
            self.block_n,
            self.block_n <= WARP_SIZE or not {*OF_TOKENS} & {*self.policies},
            f"at most {WARP_SIZE} with scales of tokens (a lane has those of one)",
        )
        limit = min(ARCHES[arch].shared_per_block for arch in self.archs)
        _check(
            "shared memory",
            self.shared_bytes,
            self.shared_bytes <= limit,
            f"at most {limit} bytes, so that it runs on {', '.join(self.archs)}; "
            "use fewer warps or stages",
        )
        if self.tma:
            _check(
                "block_n",
                self.block_n,
                self.block_h * self.value_dim * 4
                <= sum(box_tile_bytes(row, self.block_n) for row in rows),
                "with tma, tiles of K and V in which a warp's partial output has room",
            )
            _check(
                "block_n",
                self.block_n,
                self.box_tokens == self.block_n or max(rows) <= BOX_DIMS,
                f"{PAGE_TOKENS} with tma, pages and more than {BOX_DIMS * self.packed} dims",
            )

    @property
    def name(self) -> str:
        """The kernel's name: file, symbol, manifest key and log entry."""
        stored = [policy.tag for policy in self.policies if policy.slot is ELEMENT]
        return (
            f"gqa_decode_{self._target[0]}_{self.math}_{self.dtype}_{(*stored, self.dtype)[0]}"
            f"_d{self.head_dim}{f'v{self.head_dim_v}' if self.head_dim_v else ''}"
            f"_g{self.group_size}_align{self.vec_width}"
            f"_{self.schedule}_h{self.block_h}n{self.block_n}w{self.num_warps}s{self.num_stages}"
            f"{''.join(f'_{p.tag}' for p in self.policies if p.slot is not ELEMENT)}"
            f"{'_pdl' if self.pdl else ''}"
        )

    @classmethod
    def from_name(cls, name: str) -> KernelConfig:
        """Parse what `name` produced.

        Raises:
            ConfigError: Not the name of a kernel.
        """
        match = _NAME.fullmatch(name)
        if match is None:
            raise ConfigError(
                f"kernel name: got {name!r}; allowed: names as `gqa-cutlass list` prints them"
            )
        text = match.groupdict()
        words = ("arch", "math", "dtype", "stored", "schedule", "policies", "pdl")
        stored = "" if text["stored"] == text["dtype"] else text["stored"]
        found = cls(
            math=Math(text["math"]),
            dtype=DType(text["dtype"]),
            schedule=Schedule(text["schedule"]),
            policies=tagged(f"{text['policies']}_{stored}"),
            pdl=text["pdl"] is not None,
            **{k: int(v) for k, v in text.items() if k not in words and v is not None},
        )
        if found.name != name:
            raise ConfigError(f"kernel name: got {name!r}; allowed: {found.name!r}")
        return found

    @property
    def value_dim(self) -> int:
        """Dimension per head of values and outputs."""
        return self.head_dim_v or self.head_dim

    @property
    def packed(self) -> int:
        """Elements of a cache in 16 bits."""
        return packed(self.policies)

    @property
    def tma(self) -> bool:
        """Whether it loads by tensor copies, and its blocks form clusters."""
        return self.schedule is Schedule.TMA

    @property
    def archs(self) -> tuple[str, ...]:
        """Architectures that it is compiled for."""
        return self._target[1]

    @property
    def ptx_arch(self) -> str:
        """The virtual architecture that its PTX is for."""
        return self._target[2]

    @property
    def _target(self) -> tuple[str, tuple[str, ...], str]:
        return _TARGETS[self.schedule, self.pdl]

    @property
    def num_threads(self) -> int:
        """Threads per block."""
        return self.num_warps * WARP_SIZE

    @property
    def head_blocks(self) -> int:
        """Blocks that share one KV head, for one query token."""
        return self.row_blocks(1)

    def row_blocks(self, num_tokens: int) -> int:
        """Blocks that share one KV head, for so many query tokens of a sequence."""
        return ceil_div(self.group_size * num_tokens, self.block_h)

    @property
    def several_queries(self) -> bool:
        """Whether sequences may have several query tokens."""
        return any(policy.slot is QUERIES for policy in self.policies)

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a block, at most. Every kernel asserts it."""
        return self.shared_bytes_with(self.num_stages)

    def shared_bytes_with(self, num_stages: int) -> int:
        """The same for so many stages; kernels of the tma schedule can be launched with fewer."""
        shape = storage.Shape(
            head_dim=self.head_dim,
            value_dim=self.value_dim,
            block_h=self.block_h,
            block_n=self.block_n,
            num_warps=self.num_warps,
            num_stages=self.num_stages if self.tma else num_stages,
            simt=self.math is Math.SIMT,
            prepares_rows=any(policy.slot in (NORM, ROTARY) for policy in self.policies),
            packed=self.packed,
        )
        parts = storage.cluster(shape, num_stages) if self.tma else storage.multistage(shape)
        return storage.total(parts)

    @property
    def partial_floats(self) -> int:
        """Floats of a block's partial output in global memory, maxima and sums included."""
        return self.block_h * (self.value_dim + 2)

    @property
    def tile_bytes(self) -> int:
        """Bytes of a tile of K and one of V, as they lie in the cache."""
        return self.block_n * (self.head_dim + self.value_dim) * ELEMENT_BYTES // self.packed

    @property
    def box_tokens(self) -> int:
        """Tokens that a tensor copy brings: a tile, or of paged caches what all pages hold."""
        paged = any(policy.feature == "block_table" for policy in self.policies)
        return PAGE_TOKENS if paged else self.block_n

    @property
    def bytes_in_flight(self) -> int:
        """Bytes of K and V that one block can have under way, with all its stages."""
        return self.num_warps * self.num_stages * self.tile_bytes

    @property
    def min_blocks(self) -> int:
        """Blocks per multiprocessor that the compiler leaves registers for (launch bound)."""
        by_registers = _REGISTERS_PER_SM // (self.num_threads * self._register_estimate())
        fewest = self.shared_bytes_with(1 if self.tma else self.num_stages)
        return max(1, min(by_registers, _blocks_by_shared(_LARGEST_SHARED_PER_SM, fewest)))

    @property
    def max_registers(self) -> int:
        """Registers per thread with which so many blocks fit; they are allocated by eights."""
        return min(255, _REGISTERS_PER_SM // (self.num_threads * self.min_blocks) // 8 * 8)

    def blocks_per_sm(self, arch: Arch) -> int:
        """Blocks that one multiprocessor holds at a time, with all their stages."""
        by_threads = arch.max_threads_per_sm // self.num_threads
        by_shared = _blocks_by_shared(arch.shared_per_sm, self.shared_bytes)
        return max(1, min(self.min_blocks, by_shared, by_threads))

    def _register_estimate(self) -> int:
        """What a thread holds at its peak, rounded up to what keeps the compiler from spilling."""
        if self.math is Math.TENSOROP:
            accumulators = self.block_h // 8 * ceil_div(self.value_dim, 16) * 4
            queries = self.block_h // 8 * ceil_div(self.head_dim, 16) * 2
            masks = 16 if any(policy.feature == "tree_mask" for policy in self.policies) else 0
            of_tokens = bool({*OF_TOKENS} & {*self.policies})
            scales = 16 if of_tokens and not self.tma else 0
            slots = {policy.slot for policy in self.policies}
            if of_tokens and QUERIES in slots:
                scales += 3 * self.block_h + (8 if slots & {NORM, ROTARY} else 0)
            # With tma and 8 bits no more than that was needed, and two blocks have room.
            rest = 64 if self.tma and self.packed > 1 else 72
            held = accumulators + queries + self.block_n // 2 + masks + scales + rest
        else:
            held = ceil_div(self.value_dim, 64) * self.block_h * 2 + 104
        return min(255, round_up(held, 8))


def check_head_dim(head_dim: int, name: str = "head_dim") -> None:
    """Raise ConfigError unless a dimension is an int, a multiple of 8 from 32 to 256."""
    _check(name, head_dim, type(head_dim) is int and head_dim in HEAD_DIMS, HEAD_DIM_RULE)


def _blocks_by_shared(available: int, per_block: int) -> int:
    """Blocks for which shared memory suffices; the system takes 1 KiB from each."""
    return available // (per_block + _KIB)


def _member(enum: type[_E], field: str, value: object) -> _E:
    try:
        return enum(str(value))
    except ValueError:
        allowed = ", ".join(enum)
        raise ConfigError(f"KernelConfig: {field}: got {value!r}; allowed: {allowed}") from None


def _check(field: str, value: object, ok: bool, allowed: str) -> None:
    if not ok:
        raise ConfigError(f"KernelConfig: {field}: got {value!r}; allowed: {allowed}")
