"""What is a race: small scenarios, and random ones against an oracle that forgets nothing.

Lanes are numbered through all blocks; the first warp holds lanes 0 to 31, the second 32 to 63.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from gqa_cutlass.ptxsim.order.clocks import WARP, Clocks
from gqa_cutlass.ptxsim.order.ledger import Foreign, GlobalLedger
from gqa_cutlass.ptxsim.order.shadow import Shadow, ShadowError

GRANULE = 4
EVERYBODY = tuple(range(WARP))


class Block:
    """Shared memory of a cluster whose blocks have `warps` warps each."""

    def __init__(self, warps: int = 2, cluster: int = 1, races: bool = True) -> None:
        self.clocks = Clocks(cluster, warps * WARP, cluster)
        self.shadow = Shadow(16 * GRANULE, GRANULE, self.clocks, races)
        self.threads = warps * WARP

    def read(self, *lanes: int, cell: int = 0, granules: int = 1) -> None:
        self.shadow.read(np.array(lanes), self._at(lanes, cell), granules * GRANULE)

    def write(self, *lanes: int, cell: int = 0, strong: bool = False) -> None:
        self.shadow.write(np.array(lanes), self._at(lanes, cell), GRANULE, strong)

    def read_strong(self, *lanes: int, cell: int = 0) -> None:
        self.shadow.read_strong(np.array(lanes), self._at(lanes, cell), GRANULE)

    def update(self, *lanes: int, cell: int = 0) -> None:
        self.shadow.update(np.array(lanes), self._at(lanes, cell), GRANULE)

    def copy(self, *lanes: int, cell: int = 0) -> Any:
        return self.shadow.begin_copy(np.array(lanes), self._at(lanes, cell), GRANULE)

    def _at(self, lanes: tuple[int, ...], cell: int) -> Any:
        return np.full(len(lanes), cell * GRANULE)

    def warp_sync(self, *warps: int) -> None:
        self.clocks.warp_sync(np.array(warps))

    def barrier(self) -> None:
        self.clocks.barrier(np.arange(self.clocks.warps)[None])

    def hand_over(self, source: int | tuple[int, ...], *targets: int) -> None:
        """What `source` knows and did is known to `targets`, lanes of one warp."""
        lanes = (source,) if isinstance(source, int) else source
        self.clocks.acquire(np.array(targets), self.clocks.release(np.array(lanes)))


def race(what: str) -> Any:
    return pytest.raises(ShadowError, match=f"race: {what}")


# Writes and reads


def test_what_was_never_written_cannot_be_read() -> None:
    with pytest.raises(ShadowError, match="reads shared memory that was never written"):
        Block().read(0)


def test_a_lane_knows_its_own_writes_and_no_one_elses() -> None:
    block = Block()
    block.write(3)
    block.read(3)
    with race("reads what another thread wrote") as raised:
        block.read(4)
    assert raised.value.other == 3


def test_a_warp_that_synchronises_knows_what_its_lanes_wrote() -> None:
    block = Block()
    block.write(3)
    block.warp_sync(0)
    block.read(*EVERYBODY)
    with race("reads what another thread wrote"):
        block.read(WARP)


def test_what_is_written_behind_the_sync_is_not_known() -> None:
    block = Block()
    block.warp_sync(0)
    block.write(3)
    with race("reads what another thread wrote"):
        block.read(4)


def test_a_barrier_orders_warps() -> None:
    block = Block()
    block.write(3)
    block.read(3)
    block.barrier()
    block.read(WARP, 40)
    block.barrier()
    block.write(4)


def test_lanes_that_write_the_same_at_once_race() -> None:
    with race("writes with another thread"):
        Block().write(1, 2)


def test_a_write_over_what_another_lane_wrote() -> None:
    block = Block()
    block.write(3)
    with race("writes over what another thread wrote"):
        block.write(WARP)


@pytest.mark.parametrize("readers", [(5,), (5, 6), EVERYBODY])
@pytest.mark.parametrize("writer", [4, WARP])
def test_a_write_under_readers(readers: tuple[int, ...], writer: int) -> None:
    block = Block()
    block.write(0)
    block.barrier()
    block.read(*readers)
    with race("writes what another thread reads") as raised:
        block.write(writer)
    assert raised.value.other in readers


def test_readers_of_several_warps_count_all() -> None:
    block = Block(warps=3)
    block.write(0)
    block.barrier()
    block.read(0, WARP, 2 * WARP)  # with one instruction
    block.hand_over(2 * WARP, 0)
    with race("writes what another thread reads") as raised:
        block.write(0)
    assert raised.value.other == WARP


def test_every_granule_of_an_access_counts() -> None:
    block = Block()
    for cell in range(4):
        block.write(0, cell=cell)
    block.write(1, cell=2 + 2)
    block.warp_sync(0)
    block.write(1, cell=3)
    with race("reads what another thread wrote") as raised:
        block.read(0, cell=0, granules=4)
    assert (raised.value.row, raised.value.column) == (0, 3)


def test_more_warps_than_a_word_has_bits() -> None:
    block = Block(warps=32, cluster=4)
    block.write(0)
    block.barrier()
    block.read(100 * WARP + 7)
    with race("writes what another thread reads") as raised:
        block.write(36 * WARP)
    assert raised.value.other == 100 * WARP + 7
    block.barrier()
    block.write(36 * WARP)


# What single lanes release and acquire


def test_an_acquisition_is_the_lanes_own_until_its_warp_synchronises() -> None:
    block = Block()
    block.write(WARP)
    block.hand_over(WARP, 3)
    block.read(3)
    with race("reads what another thread wrote"):
        block.read(4)
    block.warp_sync(0)
    block.read(4)


def test_lanes_of_a_warp_acquire_independently() -> None:
    block = Block()
    block.write(WARP, cell=0)
    block.write(40, cell=1)
    block.hand_over(WARP, 3)
    block.hand_over(40, 4)
    block.read(3, cell=0)
    block.read(4, cell=1)
    with race("reads what another thread wrote"):
        block.read(3, cell=1)


def test_what_was_acquired_is_passed_on() -> None:
    block = Block(warps=3)
    block.write(0)
    block.hand_over(0, WARP)
    block.hand_over(WARP, 2 * WARP + 5)
    block.read(2 * WARP + 5)


def test_a_release_covers_what_came_before_it() -> None:
    block = Block()
    block.hand_over(0, WARP)
    block.write(0)
    with race("reads what another thread wrote"):
        block.read(WARP)


def test_a_release_does_not_cover_other_lanes_of_the_warp() -> None:
    block = Block()
    block.write(0)
    block.warp_sync(0)
    block.read(*EVERYBODY)
    block.hand_over(0, *range(WARP, 2 * WARP))  # without a sync of the readers
    with race("writes what another thread reads"):
        block.write(WARP)


def test_a_release_covers_what_the_warp_synchronised() -> None:
    block = Block()
    block.write(0)
    block.warp_sync(0)
    block.read(*EVERYBODY)
    block.warp_sync(0)
    block.hand_over(0, WARP)
    block.write(WARP)


def test_a_whole_warp_learns_from_one_of_its_own_lanes() -> None:
    block = Block()
    block.write(5)
    block.hand_over(5, *EVERYBODY)
    block.read(*EVERYBODY)
    block.write(6, cell=1)
    with race("reads what another thread wrote"):
        block.read(7, cell=1)


def test_a_later_read_by_one_lane_does_not_hide_an_earlier_one_by_another() -> None:
    block = Block()
    block.write(0)
    block.barrier()
    block.read(3)
    block.hand_over(5, WARP + 1)  # time goes on in the readers' warp
    block.read(5)
    block.hand_over(5, WARP)
    with race("writes what another thread reads") as raised:
        block.write(WARP)
    assert raised.value.other == 3


def test_nor_from_a_write_by_the_later_reader() -> None:
    block = Block()
    block.write(0)
    block.barrier()
    block.read(3)
    block.hand_over(5, WARP)
    block.read(5)
    with race("writes what another thread reads"):
        block.write(5)


def test_readers_that_release_one_by_one_are_all_known() -> None:
    block = Block()
    block.write(0)
    block.barrier()
    for reader in (3, 5):
        block.read(reader)
        block.hand_over(reader, WARP)
    block.write(WARP)


def test_a_subset_of_a_warp_that_read_needs_no_release_by_the_rest() -> None:
    block = Block()
    block.write(0)
    block.barrier()
    block.read(3, 5)
    block.hand_over(3, WARP)
    block.hand_over(5, WARP)
    block.write(WARP)


# Asynchronous copies


def test_nobody_may_touch_a_copy_under_way() -> None:
    for use in (Block.read, Block.read_strong, Block.update):
        block = Block()
        block.copy(0)
        with pytest.raises(
            ShadowError, match="what an asynchronous copy has not finished"
        ) as raised:
            use(block, 1)
        assert raised.value.other == 0
    block = Block()
    block.copy(0)
    for use in (Block.write, Block.copy):
        with pytest.raises(ShadowError, match="writes where an asynchronous copy is under way"):
            use(block, 0)


def test_a_copy_that_was_waited_for_is_a_write_of_its_lane() -> None:
    block = Block()
    cells = block.copy(0)
    block.shadow.end_copy(np.array([0]), cells)
    block.read(0)
    with race("reads what another thread wrote"):
        block.read(1)
    block.warp_sync(0)
    block.read(1)


def test_a_copy_under_readers() -> None:
    block = Block()
    block.write(0)
    block.warp_sync(0)
    block.read(1)
    with race("writes what another thread reads"):
        block.copy(0)


def test_copies_to_the_same_place_at_once() -> None:
    with race("writes with another thread"):
        Block().copy(1, 2)


def test_without_races_only_what_is_not_there_is_found() -> None:
    block = Block(races=False)
    block.write(0, 1)
    block.read(40)
    block.update(1)
    block.write(2, strong=True)
    block.copy(3)
    with pytest.raises(ShadowError, match="has not finished"):
        block.read(3)


# Strong accesses


def test_strong_accesses_do_not_race_among_themselves() -> None:
    block = Block()
    block.write(0)
    block.barrier()
    block.update(*EVERYBODY)
    block.update(40)
    block.read_strong(41)
    block.write(42, strong=True)
    block.read_strong(1)


def test_a_strong_write_may_be_the_first() -> None:
    block = Block()
    block.write(0, strong=True)
    block.read_strong(WARP)
    with race("reads what another thread writes"):
        block.read(WARP)


@pytest.mark.parametrize("strong", [False, True])
def test_a_plain_read_of_what_others_update(strong: bool) -> None:
    block = Block()
    block.write(0)
    block.barrier()
    if strong:
        block.write(1, strong=True)
    else:
        block.update(1)
    block.read(1)
    with race("reads what another thread writes"):
        block.read(WARP)
    block.barrier()
    block.read(WARP)


def test_a_strong_read_of_what_was_written_plainly_before_a_strong_write() -> None:
    block = Block()
    block.write(0)
    block.write(0, strong=True)
    with race("reads what another thread wrote"):
        block.read_strong(WARP)


def test_an_update_of_what_others_read_plainly() -> None:
    block = Block()
    block.write(0)
    block.barrier()
    block.read(WARP)
    with race("atomic on what another thread reads"):
        block.update(0)
    with race("writes what another thread reads"):
        block.write(0, strong=True)


def test_an_update_of_what_another_lane_wrote_plainly() -> None:
    block = Block()
    block.write(0)
    with race("atomic on what another thread wrote"):
        block.update(WARP)
    with race("writes over what another thread wrote"):
        block.write(WARP, strong=True)


def test_a_plain_write_over_strong_accesses() -> None:
    for use in (Block.read_strong, Block.update):
        block = Block()
        block.write(0)
        block.barrier()
        use(block, WARP)
        with race("writes what another thread (reads|writes)"):
            block.write(0)
        block.barrier()
        block.write(0)


def test_a_block_may_not_end_while_another_uses_its_memory() -> None:
    block = Block(cluster=2)
    block.write(0)
    block.barrier()
    block.read(block.threads)
    first, second = np.arange(8), np.arange(8, 16)
    with race("exits while another thread reads"):
        block.shadow.leave(0, first)
    block.shadow.leave(0, second)
    block.barrier()
    block.shadow.leave(0, first)


# Global memory


class Grid:
    """Global memory of a launch of blocks of two warps."""

    def __init__(self, blocks: int = 2, cluster: int = 1) -> None:
        self.threads = 2 * WARP
        self.clocks = Clocks(blocks, self.threads, cluster)
        self.ledger = GlobalLedger(self.threads * cluster)
        self.ledger.begin(0, self.clocks)

    def note(
        self, *lanes: int, write: bool, strong: bool = False, at: int = 0, size: int = 4
    ) -> None:
        addresses = np.full(len(lanes), 4096 + at)
        self.ledger.note(np.array(lanes), addresses, size, write=write, strong=strong, pc=0)

    def write(self, *lanes: int, at: int = 0, size: int = 4) -> None:
        self.note(*lanes, write=True, at=at, size=size)

    def read(self, *lanes: int, at: int = 0, size: int = 4) -> None:
        self.note(*lanes, write=False, at=at, size=size)

    def release(self, lane: int) -> Foreign:
        return self.ledger.publish(lane, self.clocks.release(np.array([lane])))

    def hand_over(self, source: int, *targets: int) -> None:
        self.ledger.acquire(np.array(targets), self.release(source))

    def races(self) -> list[tuple[int, int]]:
        """Lanes of every race, the earlier one first."""
        return [(r.other_lane, r.lane) for r in self.ledger.races(limit=100)]


OTHER = 2 * WARP  # the first lane of the second block


def test_blocks_race_in_global_memory() -> None:
    grid = Grid()
    grid.write(0)
    grid.read(OTHER)
    assert grid.races() == [(0, OTHER)]


def test_reads_alone_do_not_race() -> None:
    grid = Grid()
    grid.read(0, 1, OTHER)
    assert not grid.races()


def test_a_release_and_an_acquisition_order_blocks() -> None:
    grid = Grid()
    grid.write(0)
    grid.hand_over(0, OTHER)
    grid.read(OTHER)
    assert not grid.races()
    grid.read(OTHER + 1)
    assert grid.races() == [(0, OTHER + 1)]


def test_a_read_before_a_write_races_as_well() -> None:
    grid = Grid()
    grid.read(3)
    grid.write(OTHER)
    assert grid.races() == [(3, OTHER)]


def test_wide_and_narrow_accesses_meet() -> None:
    grid = Grid()
    grid.write(0, at=12)
    grid.read(OTHER, size=16)
    grid.read(OTHER, at=16, size=16)
    assert grid.races() == [(0, OTHER)]


def test_what_a_barrier_gathered_is_released_together() -> None:
    grid = Grid()
    grid.write(40)
    grid.clocks.barrier(np.array([[0, 1]]))
    grid.hand_over(0, OTHER)
    grid.clocks.barrier(np.array([[2, 3]]))
    grid.read(OTHER + 50)
    assert not grid.races()


def test_without_the_barrier_it_is_not() -> None:
    grid = Grid()
    grid.write(40)
    grid.hand_over(0, OTHER)
    grid.read(OTHER)
    assert grid.races() == [(40, OTHER)]


def test_order_passes_through_a_third_block() -> None:
    grid = Grid(blocks=3)
    grid.write(0)
    grid.hand_over(0, OTHER)
    grid.hand_over(OTHER, 2 * OTHER)
    grid.read(2 * OTHER)
    assert not grid.races()


def test_a_lane_does_not_know_what_another_lane_of_its_block_acquired() -> None:
    grid = Grid(blocks=3)
    grid.write(0)
    grid.write(OTHER, at=4)
    mine, neighbour = 2 * OTHER, 2 * OTHER + 1
    grid.hand_over(0, mine)
    grid.hand_over(OTHER, neighbour)
    grid.read(neighbour)
    assert grid.races() == [(0, neighbour)]


def test_a_warp_knows_what_its_lanes_released_to_one_another() -> None:
    grid = Grid()
    grid.write(0)
    grid.hand_over(0, 1)
    grid.read(1)
    assert not grid.races()


def test_atomics_do_not_race_but_with_plain_accesses() -> None:
    grid = Grid(blocks=3)
    grid.note(0, write=True, strong=True)
    grid.note(OTHER, write=True, strong=True)
    grid.note(2 * OTHER, write=False, strong=True)
    assert not grid.races()
    grid.hand_over(OTHER, 2 * OTHER)
    grid.read(2 * OTHER)
    assert grid.races() == [(0, 2 * OTHER)]


def test_lanes_that_write_the_same_word_at_once_race() -> None:
    grid = Grid()
    grid.write(1, 2)
    assert grid.races() == [(1, 2)]


def test_the_race_that_came_first_is_reported_first() -> None:
    grid = Grid()
    grid.write(0, at=64)
    grid.write(1, at=0)
    grid.read(OTHER, at=64)
    grid.read(OTHER, at=0)
    assert grid.races() == [(0, OTHER), (1, OTHER)]


# Random scenarios

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
