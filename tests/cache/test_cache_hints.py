"""Caches say how long sequences are at most, where the host knows and no graph goes beyond."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cache_model import filled, new_cache, queries, token
from executors import Notes
from paged_model import new_cache as new_paged_cache
from torch import Tensor

from gqa_cutlass import api
from gqa_cutlass.cache import kv_cache as cache_module
from gqa_cutlass.cache.lengths import Lengths
from gqa_cutlass.cache.paged import step as step_module

ROOM = 4096


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[int | None]:
    """What calls say of the longest sequence."""
    found: list[int | None] = []

    def decode(q: Tensor, *tensors: Tensor, **options: Any) -> Tensor:
        found.append(options.get("max_seqlen"))
        return torch.zeros_like(q)

    for module in (cache_module, step_module):
        monkeypatch.setattr(module, "gqa_decode", decode)
    return found


def test_a_cache_says_what_the_host_knows(said: list[int | None]) -> None:
    cache = new_cache(3, ROOM)
    filled(cache, [5, 100, 0])
    cache.decode(queries(cache), *token(cache))
    cache.decode(queries(cache))
    cache.decode(queries(cache), max_seqlen=7)
    assert said == [101, 101, 7]


def test_a_cache_says_nothing_where_lengths_are_not_known(said: list[int | None]) -> None:
    cache = new_cache(3, ROOM)
    cache.forget()
    cache.decode(queries(cache), *token(cache))
    assert said == [None]


def test_an_empty_cache_is_about_to_hold_one(said: list[int | None]) -> None:
    cache = new_cache(1, ROOM)
    cache.decode(queries(cache))
    cache.decode(queries(cache), *token(cache))
    assert said == [1, 1]


def test_graphs_are_captured_for_all_the_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """And after one nobody knows how often it has been replayed."""
    lengths = Lengths(torch.zeros(3, 2, dtype=torch.int32), ROOM)
    assert lengths.longest(1) == 1
    lengths._captured = True
    assert lengths.longest(1) is None
    lengths._captured = False
    lengths.device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert lengths.longest(1) is None


def test_a_paged_cache_says_what_the_host_knows(said: list[int | None]) -> None:
    cache = new_paged_cache()
    (sequence,) = (cache.allocate(),)
    heads, dim = cache.k[0].shape[2:]
    for _ in range(3):
        with cache.step([sequence]) as step:
            new = torch.zeros(1, heads, dim, dtype=cache.k[0].dtype)
            for layer in range(cache.num_layers):
                step.decode(layer, torch.zeros(1, 2 * heads, dim, dtype=new.dtype), new, new)
    assert said == [n for n in (1, 2, 3) for _ in range(cache.num_layers)]


def test_growing_sequences_make_a_plan_per_power_of_two(notes: Notes) -> None:
    cache = new_cache(1, ROOM)
    filled(cache, [250])
    for _ in range(20):
        cache.decode(queries(cache), *token(cache))
    assert len(notes.launches) == 20 and len(notes.shapes) == 2  # up to 256, and up to 512
    (known,) = {len(plans) for plans in api._PLANS.latest.values()}
    assert known == 1
