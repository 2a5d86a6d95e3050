"""What is a race in global memory, by vector clocks: small scenarios."""

from __future__ import annotations

import numpy as np
from clocked_memory import Grid

from gqa_cutlass.ptxsim.order.clocks import WARP

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
