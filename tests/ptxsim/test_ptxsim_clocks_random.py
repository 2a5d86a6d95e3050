"""What is a race: random scenarios against an oracle that forgets nothing."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import pytest
from clocked_memory import Block, Grid

from gqa_cutlass.ptxsim.order.clocks import WARP, Clocks
from gqa_cutlass.ptxsim.order.ledger import Foreign
from gqa_cutlass.ptxsim.order.shadow import ShadowError

WARPS = 4
KINDS = {  # whether it writes, whether it is strong
    "read": (False, False), "write": (True, False), "update": (True, True),
    "read_strong": (False, True),
}  # fmt: skip


class Oracle:
    """Happens-before by its definition: each lane's set of the accesses that it knows of."""

    def __init__(self) -> None:
        self.knows: list[set[int]] = [set() for _ in range(WARPS * WARP)]
        self.log: list[tuple[int, bool, bool]] = []  # cell, write, strong

    def races(self, lane: int, cell: int, kind: str) -> bool:
        write, strong = KINDS[kind]
        return any(
            other == cell and (write or wrote) and not (strong and was_strong)
            for i, (other, wrote, was_strong) in enumerate(self.log)
            if i not in self.knows[lane]
        )

    def note(self, lane: int, cell: int, kind: str) -> None:
        self.knows[lane].add(len(self.log))
        self.log.append((cell, *KINDS[kind]))

    def meet(self, lanes: Iterable[int]) -> None:
        self.tell(set().union(*(self.knows[lane] for lane in lanes)), lanes)

    def tell(self, known: set[int], lanes: Iterable[int]) -> None:
        for lane in lanes:
            self.knows[lane] |= known


def lanes_of(*warps: int) -> list[int]:
    return [warp * WARP + lane for warp in warps for lane in range(WARP)]


@dataclass
class Scenario:
    """Random events, the same ones for who is tested and for the oracle."""

    rng: np.random.Generator
    clocks: Clocks
    oracle: Oracle = field(default_factory=Oracle)

    def lane(self) -> int:
        return int(self.rng.integers(WARPS)) * WARP + int(self.rng.choice([0, 1, 9]))

    def order(self) -> None:
        """A warp or a block synchronises."""
        warp = int(self.rng.integers(WARPS))
        if self.rng.random() < 0.7:
            self.clocks.warp_sync(np.array([warp]))
            self.oracle.meet(lanes_of(warp))
        else:
            block = [warp // 2 * 2, warp // 2 * 2 + 1]
            self.clocks.barrier(np.array([block]))
            self.oracle.meet(lanes_of(*block))

    def targets(self) -> list[int]:
        lane = self.lane()
        return lanes_of(lane // WARP) if self.rng.random() < 0.2 else [lane]


@pytest.mark.parametrize("seed", range(30))
def test_shared_memory_agrees_with_the_oracle(seed: int) -> None:
    rng = np.random.default_rng(seed)
    block = Block(warps=2, cluster=2)
    scenario = Scenario(rng, block.clocks)
    oracle = scenario.oracle
    for cell in range(3):
        block.write(0, cell=cell, strong=True)
        oracle.note(0, cell, "update")
    for _ in range(400):
        what = rng.random()
        if what < 0.2:
            scenario.order()
        elif what < 0.5:
            source, targets = scenario.lane(), scenario.targets()
            block.hand_over(source, *targets)
            oracle.tell(set(oracle.knows[source]), targets)
        else:
            kind = str(rng.choice(list(KINDS), p=[0.5, 0.2, 0.2, 0.1]))
            lanes = {scenario.lane() for _ in range(1 if kind == "write" else 3)}
            cell = int(rng.integers(3))
            if any(oracle.races(lane, cell, kind) for lane in lanes):
                with pytest.raises(ShadowError, match="race"):
                    getattr(block, kind)(*lanes, cell=cell)
            else:
                getattr(block, kind)(*lanes, cell=cell)
                for lane in lanes:
                    oracle.note(lane, cell, kind)


@pytest.mark.parametrize("cluster", [1, 2])
@pytest.mark.parametrize("seed", range(30))
def test_global_memory_agrees_with_the_oracle(seed: int, cluster: int) -> None:
    rng = np.random.default_rng(seed)
    grid = Grid(blocks=2, cluster=cluster)
    scenario = Scenario(rng, grid.clocks)
    oracle = scenario.oracle
    published: list[tuple[Foreign, set[int]]] = []
    racing: set[int] = set()
    for step in range(500):
        what = rng.random()
        if what < 0.2:
            scenario.order()
        elif what < 0.4:
            source = scenario.lane()
            published.append((grid.release(source), set(oracle.knows[source])))
        elif what < 0.6 and published:
            seen, known = published[rng.integers(len(published))]
            targets = scenario.targets()
            grid.ledger.acquire(np.array(targets), seen)
            oracle.tell(known, targets)
        else:
            kind = str(rng.choice(list(KINDS), p=[0.5, 0.1, 0.3, 0.1]))
            lane, cell = scenario.lane(), int(rng.integers(3))
            if oracle.races(lane, cell, kind):
                if step < 300:
                    continue
                racing = {lane}
            oracle.note(lane, cell, kind)
            write, strong = KINDS[kind]
            grid.note(lane, write=write, strong=strong, at=4 * cell)
            if racing:
                break
    assert {later for _, later in grid.races()} == racing
