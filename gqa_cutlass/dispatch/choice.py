"""A kernel and how it is launched: what can be measured, kept in a table and asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gqa_cutlass.codegen.config import KernelConfig
from gqa_cutlass.codegen.schema.problem import MAX_SPLITS
from gqa_cutlass.codegen.schema.storage import MAX_CLUSTER
from gqa_cutlass.dispatch.splits import counted
from gqa_cutlass.errors import InputError, shown

_MOST_SPARE = 3


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A kernel, and how the blocks of a launch share sequences.

    Args:
        config: The kernel.
        splits: Parts that a sequence is cut into, at most.
        num_stages: Stages of every warp; with the multistage schedule all that the kernel has.
        cluster: Blocks of a cluster, a power of two that divides `splits`; 1 without tma.
        spare: Rows of blocks beyond the splits, with which the multistage schedule balances
            lengths that only the device knows; none where the host knows them, or of one sequence.
        prefetch: Whether warps ask for their first tile before they know the length, where they
            may; None: where the model says so.
        why: What speaks for it, as the end of a sentence: "this kernel and launch, as asked".

    Raises:
        InputError: No launch is like that.
    """

    config: KernelConfig
    splits: int
    num_stages: int
    cluster: int = 1
    spare: int = 0
    prefetch: bool | None = None
    why: str = "as asked"

    def __post_init__(self) -> None:
        if not isinstance(self.config, KernelConfig):
            raise InputError(f"Choice: config: got {shown(self.config)}; allowed: a KernelConfig.")
        tma, most = self.config.tma, self.config.num_stages
        self._check("splits", range(1, MAX_SPLITS + 1))
        clusters = [1 << log for log in range(MAX_CLUSTER.bit_length())] if tma else [1]
        self._check("cluster", [c for c in clusters if self.splits % c == 0])
        self._check("num_stages", range(1 if tma else most, most + 1))
        self._check("spare", range(1 if tma else _MOST_SPARE + 1))
        self._check("prefetch", (None, True, False), bool, type(None))
        self._check("why", (self.why,), str)

    def _check(self, name: str, allowed: Sequence[object], *kinds: type) -> None:
        """Raise InputError unless a field is of these kinds, an int by default, and allowed."""
        value = getattr(self, name)
        if type(value) not in (kinds or (int,)) or value not in allowed:
            few = ", ".join(map(str, allowed)) if len(allowed) < 9 else f"1 to {MAX_SPLITS}"
            raise InputError(
                f"Choice: {name}: got {shown(value)}; allowed: {few}, of {self.config.name}."
            )

    def __str__(self) -> str:
        c = self.config
        spare = f", {self.spare} spare" if self.spare else ""
        early = "" if self.prefetch is None else f", {'' if self.prefetch else 'no '}early tile"
        return (
            f"{c.schedule} n{c.block_n}w{c.num_warps}, {self.shared}, "
            f"{counted(self.num_stages, 'stage')}{spare}{early}"
        )

    @property
    def shared(self) -> str:
        """How blocks share a sequence, in words."""
        clusters = f" in clusters of {self.cluster}" if self.cluster > 1 else ""
        return f"{counted(self.splits, 'split')}{clusters}"
