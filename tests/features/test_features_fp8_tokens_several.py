"""Caches of 8 bits with a scale for every token and KV head, and several tokens of a sequence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from helpers import diagonal, few, remodelled
from token_scales import BF16, E4M3, F16, STORED, Case, case, in_pages, unlike_sizes
from token_scales import FEATURES as OF_ONE
from turnings import Turning

import gqa_cutlass
from gqa_cutlass import gqa_decode
from gqa_cutlass.call.stored import FP8
from gqa_cutlass.errors import CacheOverflowError, InputError
from gqa_cutlass.proof.reference import errors, same_bits, scale_of_row

PROCESS = "features"  # has all tests of this folder, for they have kernels in common


TYPES = [*zip(FP8, (F16, BF16), strict=True)]  # of caches, and of queries
SIZES = [*product((64, 128, 256), (1, 4, 8)), (40, 3)]  # head_dim and group


@pytest.mark.parametrize(
    ("types", "sizes", "lengths"),
    diagonal(TYPES, SIZES, [(37, 300), (0, 13), (255, 126), (16, 30)], count=2),
)
def test_every_new_token_has_a_scale_of_its_own(
    types: tuple[torch.dtype, torch.dtype],
    sizes: tuple[int, int],
    lengths: tuple[int, ...],
    device: str,
) -> None:
    """New tokens lie in one tile, across edges of tiles, and are all that there is."""
    head_dim, group = sizes
    case(device, *types, lengths=lengths, head_dim=head_dim, group=group, tokens=(4, 4)).check()


@pytest.mark.parametrize(
    ("counts", "dtype"), diagonal([(1, 3), (40, 2), (2, 40), (3, 1)], FP8, count=2)
)
def test_more_new_tokens_than_queries_and_fewer(
    counts: tuple[int, int], dtype: torch.dtype, device: str
) -> None:
    case(device, dtype, lengths=(50, 3), capacity=96, tokens=counts).check()


def see_tree(made: Case) -> None:
    """Drafts see some of the others, the first none of them."""
    batch, count = made.q.shape[:2]
    mask = torch.rand(batch, count, count, generator=torch.Generator().manual_seed(count)) < 0.5
    mask[:, 0] = False
    made.options["tree_mask"] = mask.to(made.q.device)


def tree_in_pages(made: Case) -> None:
    see_tree(made)
    in_pages(made, 7)


def turned(made: Case) -> None:
    """With pages: keys are normed and rotated before they have a scale."""
    turning = Turning().normed(made.q).rotated(made.q, made.k_cache.shape[1])
    made.options |= turning.options()
    in_pages(made)


FEATURES: dict[str, Callable[[Case], None]] = OF_ONE | {
    "tree": see_tree, "tree in pages": tree_in_pages,
    "not causal": lambda made: made.options.update(causal=False, window_size=(60, 2)),
}  # fmt: skip


@pytest.mark.parametrize("name", few(FEATURES, 3))
def test_features_go_with_scales_of_several_tokens(name: str, device: str) -> None:
    made = case(device, lengths=(37, 297), capacity=304, tokens=(5, 5))
    FEATURES[name](made)
    made.check()


@pytest.mark.parametrize(("count", "queries"), diagonal([40, 17], [BF16, F16], count=1))
def test_trees_of_more_drafts_than_a_tile_holds(
    count: int, queries: torch.dtype, device: str
) -> None:
    made = case(device, queries=queries, lengths=(60, 0), capacity=104, tokens=(count, count))
    see_tree(made)
    made.check()


@pytest.mark.parametrize("paged", [False, True], ids=["rows", "pages"])
def test_sequences_of_unlike_many_tokens(paged: bool, device: str) -> None:
    """Some have no query, no new token, or neither."""
    made = case(device, lengths=(30, 64, 7, 63), capacity=112, tokens=(1, 1))
    if paged:
        in_pages(made, 7)
    for names, index, counts in (
        ("q", "cu_seqlens_q", [3, 0, 1, 9]), ("kv", "cu_seqlens_k_new", [3, 2, 0, 35]),
    ):  # fmt: skip
        ends = torch.tensor([0, *counts]).cumsum(0).int()
        made.options[index] = ends.to(device)
        generator = torch.Generator().manual_seed(sum(counts))
        for name in names:
            rows = torch.randn(sum(counts), *getattr(made, name).shape[-2:], generator=generator)
            setattr(made, name, rows.to(F16).to(device))
    made.check()


@pytest.mark.sanitized
@pytest.mark.parametrize(("name", "types"), diagonal(["rows", "pages", "norm and rotation"], TYPES))
def test_tokens_are_stored_as_one_step_after_another_stores_them(
    name: str, types: tuple[torch.dtype, torch.dtype], device: str
) -> None:
    made = case(device, *types, lengths=(29, 64), capacity=80, tokens=(5, 5))
    {"rows": lambda _: None, "pages": in_pages, "norm and rotation": turned}[name](made)
    single = replace(made, **made.held(), options=made.options.copy())
    outs = []
    for i in range(5):
        step = replace(
            single, q=made.q[:, i], k=made.k[:, i], v=made.v[:, i],
            lengths=[length + i for length in made.lengths],
        )  # fmt: skip
        outs.append(step.run())
    out = made.run()
    for held in STORED:
        assert same_bits(getattr(made, held), getattr(single, held)), held
    largest = made.v.abs().max().item()
    torch.testing.assert_close(out, torch.stack(outs, 1), rtol=0, atol=2**-7 * largest)


@pytest.mark.parametrize("group", few([8, 32]))
def test_one_block_of_rows_appends(group: int, device: str) -> None:
    """Several share a KV head, and some of its heads or of its tokens have one of their own."""
    made = case(device, lengths=(37,), capacity=64, head_dim=128, group=group, tokens=(9, 9))
    made.check()


def test_values_of_another_head_dim(device: str) -> None:
    made = case(device, lengths=(37, 64), capacity=80, head_dim=96, tokens=(4, 4))
    made.v, made.v_cache = made.v[..., :64], made.v_cache[..., :64]
    made.check()


def test_ragged_batches_that_are_dealt_out_by_length(device: str) -> None:
    made = case(device, lengths=(300, 3, 0, 17), capacity=512, tokens=(3, 3))
    right = made.right()
    lengths = torch.tensor(made.lengths, dtype=torch.int32, device=device)
    tensors = made.q, made.k_cache, made.v_cache, made.k, made.v
    with remodelled(balanced_tokens=1, tma_heads=0):
        plan = gqa_cutlass.plan(
            *tensors, cache_seqlens=lengths, k_scale=made.k_scale, v_scale=made.v_scale
        )
    assert plan.dispatch.balanced
    out = plan(*tensors, lengths)
    assert all(same_bits(getattr(made, name), right[name]) for name in STORED)
    assert errors(out, *(made.reference(right, kind) for kind in (torch.float64, F16))).share <= 1


def test_values_of_any_size_count(device: str) -> None:
    """Outputs are those of the largest."""
    unlike_sizes(device, tokens=(20, 20)).check()


def test_drafts_of_zeros_and_of_what_is_no_number(device: str) -> None:
    """Zeros have a scale of 1; NaN does not count and stays; infinity leaves none beside it, and
    no number to its KV head, whether its token is seen or not."""
    made = case(device, lengths=(20, 20), capacity=64, tokens=(3, 3))
    made.k[0, 1, 0] = 0
    made.v[0, 1, 0], made.v[0, 2, 1, 3] = 0, torch.nan
    made.v[1, 2, 0, 5] = torch.inf
    out = made.run()
    assert made.k_scale[0, 21, 0] == made.v_scale[0, 21, 0] == 1
    assert not made.k_cache[0, 21, 0].float().any() and not made.v_cache[0, 21, 0].float().any()
    assert made.v_scale[0, 22, 1] == scale_of_row(made.v[0, 2, 1], E4M3)
    assert made.v_cache[0, 22, 1].float().isnan().nonzero().tolist() == [[3]]
    assert out[0, 2, 4:].isnan().any(0).nonzero().tolist() == [[3]]
    assert made.v_scale[1, 22, 0] == torch.inf and out[1, :, :4].isnan().all()
    assert not out[0, :, :4].isnan().any() and not out[1, :, 4:].isnan().any()


def test_splits_and_attending_without_tokens(device: str) -> None:
    made = case(device, lengths=(300, 301), tokens=(4, 4))
    made.k = made.v = made.k[:, :0]
    expected = [made.reference(made.held(), kind) for kind in (torch.float64, F16)]
    before = made.held()
    for splits in (1, 3):
        out = made.attend_only(splits)
        assert errors(out, *expected).share <= 1
    assert all(same_bits(getattr(made, name), before[name]) for name in STORED)


@pytest.mark.parametrize("paged", [False, True], ids=["rows", "pages"])
def test_tokens_that_do_not_fit_write_no_scale(paged: bool, device: str) -> None:
    """Not those before the last either, which have room."""
    made = case(device, lengths=(20, 62), capacity=64, tokens=(3, 3))
    if paged:
        in_pages(made)
    out = made.check(left_out={1})
    assert out[1].isnan().all()
    with pytest.raises(CacheOverflowError, match=r"cache_seqlens\[1\]"):
        gqa_cutlass.check_overflow(device)


def test_rows_that_are_inactive_write_no_scale(device: str) -> None:
    made = case(device, lengths=(20, -1), capacity=64, tokens=(3, 3))
    assert (made.check(left_out={1})[1] == 0).all()
    gqa_cutlass.check_overflow(device)


@pytest.mark.parametrize("token", [0, 2])
def test_no_page_for_one_of_the_new_tokens_is_none_for_all(token: int, device: str) -> None:
    made = case(device, lengths=(20, 30), capacity=64, tokens=(3, 3))
    in_pages(made)
    made.options["block_table"][1, (30 + token) // 16] = -1
    out = made.check(left_out={1})
    assert out[1].isnan().all()
    with pytest.raises(CacheOverflowError, match=r"cache_seqlens\[1\] .*block_table"):
        gqa_cutlass.check_overflow(device)


def test_slots_say_where_rows_and_scales_go(device: str) -> None:
    """A token that has none is attended to and not written."""
    made = case(device, lengths=(20, 30), capacity=64, tokens=(3, 3))
    in_pages(made)
    before = made.held()
    same = replace(made, **made.held(), options=made.options.copy())
    places = [[made.place(b, n + i) for i in range(3)] for b, n in enumerate(made.lengths)]
    slots = torch.tensor([[16 * page + at for page, at in row] for row in places], device=device)
    slots[1, 1] = -1
    made.options["slot_mapping"] = slots
    assert torch.equal(made.run(), same.check())
    for name in STORED:
        right = getattr(same, name)
        raw = right.view(torch.uint8) if right.dtype in FP8 else right
        held = before[name].view(raw.dtype) if right.dtype in FP8 else before[name]
        raw[places[1][1]] = held[places[1][1]]
        assert same_bits(getattr(made, name), right), name


BAD: dict[str, tuple[Callable[[Case], dict[str, Any]], str]] = {
    "one alone": (lambda c: {"k_scale": None}, "k_scale: got none of tokens; allowed: as v_scale"),
    "of new tokens": (
        lambda c: {"k_scale": c.k_scale[:, :3]},
        r"k_scale: got shape \[1, 3, 2\]; allowed: \[1, 64, 2\], those of the cache without head",
    ),
    "where new tokens are": (
        lambda c: {"v": c.v_scale.view(F16).view(1, 2, 2, 64)[:, :1].expand(1, 3, 2, 64)},
        "v: got memory of v_scale, to which this call writes the new token; allowed: memory of its",
    ),
    "narrow rows": (
        lambda c: {"k": torch.zeros(385, dtype=F16, device=c.q.device)[1:].view(1, 3, 2, 64)},
        "k_scale: got scales of tokens with narrow rows; allowed: rows of q, k, v and caches at",
    ),
    "a tree of others": (
        lambda c: {"tree_mask": torch.ones(1, 2, 2, dtype=torch.bool, device=c.q.device)},
        r"tree_mask: got .*; allowed: bool \[1, 3, 3\]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_is_not_allowed_is_refused_and_nothing_written(name: str, device: str) -> None:
    made = case(device, lengths=(20,), capacity=64, tokens=(3, 3))
    before = made.held()
    changes, message = BAD[name]
    given: dict[str, Any] = {n: getattr(made, n) for n in ("q", "k", "v", *STORED)}
    with pytest.raises(InputError, match=message):
        gqa_decode(**given | changes(made), cache_seqlens=20)
    assert all(same_bits(getattr(made, held), before[held]) for held in STORED)
