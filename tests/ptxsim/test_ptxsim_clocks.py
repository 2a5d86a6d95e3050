"""What is a race in shared memory, by vector clocks: small scenarios."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from gqa_cutlass.ptxsim.order.clocks import WARP, Clocks
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
