"""Control flow of a kernel, and what follows: which registers are dead, or may be unwritten.

Sets of registers are bits of integers, and whole blocks are gone through at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from gqa_cutlass.errors import PtxError
from gqa_cutlass.ptxsim import limits
from gqa_cutlass.ptxsim.program import branch_target, read, written
from gqa_cutlass.ptxsim.text.syntax import Kernel

_LEAVES = ("ret", "exit", "trap")


@dataclass(frozen=True, kw_only=True)
class _Block:
    """Instructions from `start` to before `end`, all or none of which a thread executes.

    Args:
        start: Position of the first.
        end: Position behind the last.
        follows: Starts of the blocks that may come next.
        reads: Registers read before they are written here.
        writes: Registers that every thread that comes here writes.
    """

    start: int
    end: int
    follows: tuple[int, ...]
    reads: int
    writes: int


class Flow:
    """Control flow, liveness and definite assignment of a kernel.

    Args:
        kernel: As parsed.

    Attributes:
        touched: Names of what every instruction reads, and of what it writes.
        names: The registers that are used.
        leaders: Where blocks start.

    Raises:
        PtxError: A branch goes nowhere, or the code is larger than can be followed.
    """

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel.name
        self._code = kernel.instructions
        self._labels = kernel.labels
        self.touched = [(read(i), written(i)) for i in self._code]
        used = dict.fromkeys(name for r, w in self.touched for name in (*r, *w))
        self.names = [name for name in used if name in kernel.registers]
        if len(self.names) * len(self._code) > limits.FLOW:
            raise PtxError(
                f"{kernel.name}: got {len(self._code)} instructions on {len(self.names)} "
                f"registers; allowed: a product of up to {limits.FLOW}. Split the kernel."
            )
        bits = {name: 1 << i for i, name in enumerate(self.names)}
        self._reads = [_union(bits.get(name, 0) for name in r) for r, _ in self.touched]
        self._writes = [_union(bits.get(name, 0) for name in w) for _, w in self.touched]
        self.leaders = self._leaders()
        ends = [*self.leaders[1:], len(self._code)]
        self._blocks = {s: self._block(s, e) for s, e in zip(self.leaders, ends, strict=True)}
        self._order = self._postorder()

    def _leaders(self) -> list[int]:
        """Where blocks start."""
        ending = ("bra", *_LEAVES)
        after = (i + 1 for i, ins in enumerate(self._code) if ins.opcode[0] in ending)
        starts = {0, *self._labels.values(), *after}
        return sorted(i for i in starts if i < len(self._code))

    def _block(self, start: int, end: int) -> _Block:
        reads = writes = 0
        for i in range(end - 1, start - 1, -1):
            reads = self._before(i, reads)
            if self._code[i].guard is None:
                writes |= self._writes[i]
        return _Block(
            start=start, end=end, follows=self._successors(end), reads=reads, writes=writes
        )

    def _successors(self, end: int) -> tuple[int, ...]:
        last = self._code[end - 1]
        follows = (end,) if end < len(self._code) else ()
        if last.opcode[0] == "bra":
            return branch_target(last, self._labels), *(follows if last.guard else ())
        return () if last.opcode[0] in _LEAVES and last.guard is None else follows

    def _postorder(self) -> list[_Block]:
        """The blocks that can be reached, each behind those that follow it, loops aside."""
        order: list[_Block] = []
        seen = {0}
        path = [(self._blocks[0], iter(self._blocks[0].follows))]
        while path:
            block, follows = path[-1]
            new = next((f for f in follows if f not in seen), None)
            if new is None:
                order.append(block)
                path.pop()
            else:
                seen.add(new)
                path.append((self._blocks[new], iter(self._blocks[new].follows)))
        return order

    def _before(self, i: int, live: int) -> int:
        """Registers live before an instruction, given those live after it."""
        if self._code[i].guard is None:
            live &= ~self._writes[i]
        return live | self._reads[i]

    def dead_after(self) -> list[list[str]]:
        """For every instruction the registers that are read, or could have been, for the last time.

        Backward liveness over the blocks, then within each.
        """
        live_in = {block.start: 0 for block in self._order}

        def widen(block: _Block) -> bool:
            before = live_in[block.start]
            live = _union(live_in[f] for f in block.follows) & ~block.writes | block.reads
            live_in[block.start] = live
            return live != before

        self._settle(widen, self._order)
        dead: list[list[str]] = [[] for _ in self._code]
        for block in self._order:
            live = _union(live_in[f] for f in block.follows)
            for i in range(block.end - 1, block.start - 1, -1):
                dead[i] = self._named((self._reads[i] | self._writes[i]) & ~live)
                live = self._before(i, live)
        return dead

    def maybe_unassigned(self) -> set[str]:
        """Registers that some path reads without having written them.

        Forward definite assignment; a guarded write does not count.
        """
        assigned = {block.start: (1 << len(self.names)) - 1 for block in self._order}
        assigned[0] = 0

        def narrow(block: _Block) -> bool:
            have = assigned[block.start] | block.writes
            changed = False
            for follower in block.follows:
                before = assigned[follower]
                assigned[follower] = before & have
                changed |= assigned[follower] != before
            return changed

        self._settle(narrow, self._order[::-1])
        missing = _union(block.reads & ~assigned[block.start] for block in self._order)
        return set(self._named(missing))

    def _settle(self, change: Callable[[_Block], bool], order: list[_Block]) -> None:
        """Go through the blocks until nothing changes any more.

        Raises:
            PtxError: That takes too long.
        """
        for _ in range(limits.LOOPS + 2):  # once, once per loop that others are in, and once more
            if not any([change(block) for block in order]):
                return
        raise PtxError(
            f"{self._kernel}: got control flow that loops within loops within loops; allowed: up "
            f"to {limits.LOOPS} of them. Split the kernel."
        )

    def _named(self, bits: int) -> list[str]:
        names = []
        while bits:
            low = bits & -bits
            names.append(self.names[low.bit_length() - 1])
            bits ^= low
        return names


def _union(sets: Iterable[int]) -> int:
    union = 0
    for bits in sets:
        union |= bits
    return union
