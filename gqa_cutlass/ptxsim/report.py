"""What a launch did, in figures that a kernel's author reads before spending GPU time."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from gqa_cutlass.ptxsim.prepare import Program
from gqa_cutlass.ptxsim.stats import AccessStats, Stats

_PLACES = 3


@dataclass(frozen=True, kw_only=True)
class Accesses:
    """Accesses of one source line by one kind of instruction.

    Args:
        instruction: Its name.
        source: "file:line".
        stats: Their sum.
    """

    instruction: str
    source: str
    stats: AccessStats

    @property
    def excess(self) -> float:
        """Passes or sectors over the least possible."""
        return self.stats.passes / self.stats.ideal if self.stats.ideal else 1.0


def instruction_mix(program: Program, stats: Stats) -> Counter[str]:
    """Instructions executed, once per warp, by their name without cache hints and the like."""
    mix: Counter[str] = Counter()
    for code, count in zip(program.code, stats.executed, strict=True):
        if count:
            words = [w for w in code.instruction.opcode if "::" not in w]
            mix[".".join(words)] += count
    return mix


def shared_accesses(program: Program, stats: Stats) -> list[Accesses]:
    """Accesses to shared memory, those with the most passes over the banks first."""
    return _by_line(program, stats.shared_memory)


def global_accesses(program: Program, stats: Stats) -> list[Accesses]:
    """Accesses to global memory, those that touch the most sectors first."""
    return _by_line(program, stats.global_memory)


def global_bytes(stats: Stats) -> tuple[int, int]:
    """Bytes that were read from and written to global memory."""
    totals = [0, 0]
    for access in stats.global_memory.values():
        totals[access.write] += access.bytes
    return totals[0], totals[1]


def _by_line(program: Program, accesses: dict[int, AccessStats]) -> list[Accesses]:
    lines: dict[tuple[str, str], AccessStats] = {}
    for pc, access in accesses.items():
        instruction = program.code[pc].instruction
        key = instruction.name, _short(instruction.source)
        lines[key] = access if key not in lines else lines[key].plus(access)
    found = [Accesses(instruction=i, source=s, stats=a) for (i, s), a in lines.items()]
    return sorted(found, key=lambda a: -a.stats.passes)


def _short(source: str) -> str:
    """The innermost places of a chain of inlined ones, without folders."""
    places = [Path(place).name for place in source.split(", inlined at ")]
    return " < ".join(places[:_PLACES])
