"""The serving part of the benchmark: its points, and the data of caches with room for more."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from bench_fakes import FakePlan, served_of

from bench import data as bench_data
from bench.points import Label
from bench.serving import RoomData, bytes_needed, checked, with_limits
from bench.serving_points import LENGTHS, ROOM, SERVING, SET, Serving

ROOMS = [point for point in SERVING if point.kind == ROOM]
SMALL_ROOM = Serving(
    "small", 4, 2, 64, 3, 64, name="16 held", cached=(15,) * 3, limit=1.0, kind=ROOM, held=16,
    factor=4,
)  # fmt: skip


def test_the_points_are_those_of_the_table_the_set_and_the_rooms() -> None:
    assert Counter(point.kind for point in SERVING)[LENGTHS] == 18
    assert [point.name for point in SERVING if point.kind == SET] == [
        "64x512", "64x4096", "32x128 + 32x4096", "1x16384 + 15x64", "1x65536 + 7x4096",
        "1x65536 + 15x4096", "1x65536 + 31x4096", "1x131072 + 31x4096", "2x32768 + 30x4096",
    ]  # fmt: skip
    assert {point.factor for point in ROOMS} == {1, 8, 128}
    assert len({str(point) for point in SERVING}) == len(SERVING)
    for point in SERVING:
        assert Label.of(str(point)).lengths == point.name
        assert len(point.lengths) == point.batch and max(point.lengths) < point.tokens


def test_lengths_are_drawn_as_large_as_those_that_were_recorded() -> None:
    mib = {str(point): round(point.read_bytes / 2**20, 1) for point in SERVING}
    assert mib["llama3-8b 32/8/128 4x8192 ragged lognormal 500/1.0"] == 11.7
    assert mib["llama3-8b 32/8/128 64x8192 ragged lognormal 2000/1.0"] == 405.9
    assert mib["llama3-8b 32/8/128 32x32768 ragged one long"] == 149.3
    assert all(point.recorded and len(point.recorded.micros) == 3 for point in SERVING[:18])


def test_targets_are_microseconds_below_64_mib_and_a_share_from_there() -> None:
    few, many = SERVING[0], SERVING[7]
    assert few.target(5.0) == 7.5 and many.target(100.0) == pytest.approx(110.0)


def test_a_room_may_cost_little_over_the_room_for_what_is_held() -> None:
    points = [p for p in ROOMS if p.name in ("1024 held", "131072 held") and p.batch == 1]
    rows = [replace(served_of(point), limit=None) for point in points]
    least = {row.label.lengths: row.ours for row in rows[::3]}
    found = with_limits(rows, points)
    assert [row.limit for row in found] == pytest.approx(
        [least["1024 held"] + 0.3] * 3 + [least["131072 held"] * 1.03] * 3
    )


def test_sets_of_a_room_share_it_and_hold_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_data, "MAX_SETS", 2)
    pool = torch.randn(bytes_needed(SMALL_ROOM) // 2, dtype=torch.float16)
    data = RoomData(SMALL_ROOM, pool)
    first, second = data.k
    assert first.shape == second.shape == (3, 64, 2, 64)
    assert torch.equal(first[:, 16:32], second[:, :16])
    assert first.storage_offset() + 16 * 128 == second.storage_offset()
    for i in range(2):
        data.num_sets = 1
        assert data.flat[i].numel() * 2 == SMALL_ROOM.read_bytes
    _, error = checked(FakePlan(), data)  # type: ignore[arg-type]
    assert error < 1e-3 and not pool.isnan().any()
    with pytest.raises(AssertionError, match="a row behind the new token was written"):
        checked(FakePlan("writes behind"), data)  # type: ignore[arg-type]
