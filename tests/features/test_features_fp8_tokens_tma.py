"""Caches of 8 bits with a scale for every token and KV head, by kernels of the tma schedule."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from helpers import THOROUGH, diagonal, skip_unless_it_runs
from token_scales import (
    BF16,
    E4M3,
    F16,
    FEATURES,
    NO_NUMBERS,
    ODD_SCALES,
    STORED,
    Case,
    by_tma,
    case,
    check_no_number,
    in_pages,
    is_seen_alone,
    of_values_scaled,
    seen_alone,
    unlike_sizes,
)
from turnings import Turning

import gqa_cutlass
from gqa_cutlass.call.stored import FP8
from gqa_cutlass.codegen import DType, Math, Schedule, default_config
from gqa_cutlass.codegen.schema.policies import E4M3_OF_TOKENS
from gqa_cutlass.errors import CacheOverflowError
from gqa_cutlass.proof.reference import errors, same_bits, scale_of_row

PROCESS = "features"  # has all tests of this folder, for they have kernels in common


@pytest.fixture(autouse=True)
def on_hopper(device: str) -> None:
    """No other GPU has the schedule."""
    config = default_config(Math.TENSOROP, DType.F16, 64, 4, 8, Schedule.TMA, (E4M3_OF_TOKENS,))
    skip_unless_it_runs(config, device)


TYPES = [*zip(FP8, (F16, BF16), strict=True)]  # of caches, and of queries
SIZES = [(64, 4), (128, 1), (128, 8), (256, 4), (48, 3), (64, 16), (192, 16)]
# Lengths at edges of tiles, blocks and clusters, and splits: the last two in several clusters.
PLACES = [
    ((37, 300), 1), ((0, 32), 2), ((31, 33), 8), ((128, 129), 4), ((600, 127), 16), ((639, 257), 6),
]  # fmt: skip


@pytest.mark.sanitized
@pytest.mark.parametrize(("types", "sizes", "place"), diagonal(TYPES, SIZES, PLACES, count=3))
def test_every_split_counts_scales(
    types: tuple[torch.dtype, torch.dtype],
    sizes: tuple[int, int],
    place: tuple[tuple[int, int], int],
    device: str,
) -> None:
    """A block's warps have a tile each, several, or none."""
    (head_dim, group), (lengths, splits) = sizes, place
    made = by_tma(
        case(device, *types, lengths=lengths, capacity=640, head_dim=head_dim, group=group)
    )
    made.options["num_splits"] = splits
    made.check()


@pytest.mark.parametrize("splits", [1, 4])
@THOROUGH
def test_a_length_that_all_sequences_have(splits: int, device: str) -> None:
    """Tiles are asked for before queries are."""
    made = by_tma(case(device, lengths=(200, 200), capacity=208))
    given = made.q, made.k_cache, made.v_cache, made.k, made.v
    right = made.right()
    scales = {"k_scale": made.k_scale, "v_scale": made.v_scale}
    plan = gqa_cutlass.plan(
        *given, cache_seqlens=200, kernel=made.kernel, num_splits=splits, **scales
    )
    out = plan(*given, 200)
    assert all(same_bits(getattr(made, name), right[name]) for name in STORED)
    assert errors(out, *(made.reference(right, kind) for kind in (torch.float64, F16))).share <= 1


def turned(made: Case) -> None:
    """With pages: keys are normed and rotated before they have a scale."""
    turning = Turning().normed(made.q).rotated(made.q, made.k_cache.shape[1])
    made.options |= turning.options()
    in_pages(made)


OF_BOXES = {name: add for name, add in FEATURES.items() if name != "pages of 7"}


@pytest.mark.parametrize(
    ("name", "tokens", "splits"),
    diagonal(OF_BOXES, [None, (5, 5)], [1, 4], count=2),
)
def test_features_go_with_scales_of_tokens(
    name: str, tokens: tuple[int, int] | None, splits: int, device: str
) -> None:
    made = case(device, lengths=(37, 290), capacity=304, tokens=tokens)
    FEATURES[name](made)
    made.options["num_splits"] = splits
    by_tma(made).check()


@pytest.mark.parametrize("tokens", [None, (3, 3)], ids=["one", "several"])
@THOROUGH
def test_keys_are_normed_and_rotated_before_they_have_a_scale(
    tokens: tuple[int, int] | None, device: str
) -> None:
    """As the multistage schedule has it, to the bit."""
    made = case(device, lengths=(20, 47), capacity=64, tokens=tokens)
    turned(made)
    other = replace(made, **made.held(), options=made.options.copy())
    out, expected = by_tma(made).run(), other.run()
    for name in STORED:
        assert same_bits(getattr(made, name), getattr(other, name)), name
    assert not same_bits(made.k_scale, case(device, lengths=(20, 47), capacity=64).k_scale)
    torch.testing.assert_close(out, expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(("splits", "tokens"), [(1, None), (2, None), (8, None), (2, (20, 20))])
@THOROUGH
def test_values_of_any_size_count(splits: int, tokens: tuple[int, int] | None, device: str) -> None:
    """Outputs are those of the largest; a warp has several tiles, or one."""
    made = by_tma(unlike_sizes(device, tokens))
    made.options["num_splits"] = splits
    made.check()


@pytest.mark.parametrize(("odd", "tokens"), diagonal(ODD_SCALES, [None, (3, 3)]))
def test_scales_of_values_may_be_zero_tiny_or_negative(
    odd: tuple[float, int], tokens: tuple[int, int] | None, device: str
) -> None:
    by_tma(of_values_scaled(device, *odd, tokens)).check()


@pytest.mark.parametrize(
    ("length", "splits", "tokens"),
    [(64, 1, None), (600, 1, None), (600, 4, None), (64, 1, (3, 3)), (600, 1, (3, 3))],
)
def test_a_token_that_has_all_weight_is_its_value(
    length: int, splits: int, tokens: tuple[int, int] | None, device: str
) -> None:
    """In the tile of one warp, which all multiply, and among several; in one block of four."""
    made = by_tma(seen_alone(device, length, tokens))
    made.options["num_splits"] = splits
    assert is_seen_alone(made)


@pytest.mark.parametrize("splits", [1, 2])
def test_scores_that_are_far_apart(splits: int, device: str) -> None:
    """In pools of 64 heads, where some have a token with almost all weight."""
    made = case(device, lengths=(2, 8, 20, 33, 64, 100, 130, 200), capacity=208)
    made.q *= 10
    made.options["num_splits"] = splits
    by_tma(made).check()


@pytest.mark.parametrize(("bits", "length"), diagonal(NO_NUMBERS, [100, 600]))
def test_scales_that_are_no_number_leave_none(bits: int, length: int, device: str) -> None:
    made = by_tma(case(device, lengths=(length,), capacity=640))
    made.options["num_splits"] = 1
    check_no_number(made, bits)


@pytest.mark.parametrize(("length", "splits"), [(64, 1), (600, 1), (600, 4)])
def test_values_that_are_small_count_beside_larger_ones_that_are_not_seen(
    length: int, splits: int, device: str
) -> None:
    """Of 2^28 in size, which no score chooses: in the same block, and in the same warp."""
    made = by_tma(case(device, queries=BF16, lengths=(length,), capacity=640))
    made.options["num_splits"] = splits
    made.q[:] = 1
    made.k_cache.view(torch.uint8)[:] = 0x38  # 1
    made.k_scale[:] = -8.0
    made.v_scale[:] = 2.0**-28
    for seen in (40, length - 1):
        made.k_scale[:, seen] = 1.0
    made.v_scale[:, 3] = 1.0
    made.v_scale[:, 43] = 1.0  # in the tile of one that is seen
    made.k[:] = -8 * 448
    made.check()


@pytest.mark.parametrize("tokens", [None, (3, 3)], ids=["one", "several"])
@THOROUGH
def test_rows_of_zeros_and_of_what_is_no_number(
    tokens: tuple[int, int] | None, device: str
) -> None:
    """Zeros have a scale of 1; the largest number counts beside NaN, which stays; infinity leaves
    none beside it, and no number to its KV head."""
    made = by_tma(case(device, lengths=(20, 20), capacity=64, tokens=tokens))
    k, v = (getattr(made, side).view(2, -1, 2, 64) for side in "kv")
    k[0, 0, 0] = 0
    v[0, 0, 0], v[0, 0, 1, 3] = 0, torch.nan
    v[1, 0, 0, 5] = torch.inf
    out = made.run()
    assert made.k_scale[0, 20, 0] == made.v_scale[0, 20, 0] == 1
    assert not made.k_cache[0, 20, 0].float().any() and not made.v_cache[0, 20, 0].float().any()
    assert made.v_scale[0, 20, 1] == scale_of_row(v[0, 0, 1], E4M3)
    assert made.v_cache[0, 20, 1].float().isnan().nonzero().tolist() == [[3]]
    out = out.view(2, -1, 8, 64)
    assert out[0, :, 4:].isnan().any(0).any(0).nonzero().tolist() == [[3]]
    assert made.v_scale[1, 20, 0] == torch.inf and out[1, :, :4].isnan().all()
    assert not out[0, :, :4].isnan().any() and not out[1, :, 4:].isnan().any()


@pytest.mark.parametrize("tokens", [None, (4, 4)], ids=["one", "several"])
@THOROUGH
def test_attending_without_a_token(tokens: tuple[int, int] | None, device: str) -> None:
    made = by_tma(case(device, lengths=(300, 301), tokens=tokens))
    if tokens:
        made.k = made.v = made.k[:, :0]
        expected = [made.reference(made.held(), kind) for kind in (torch.float64, F16)]
    else:
        bare = replace(made, k=made.k[:, None][:, :0], v=made.v[:, None][:, :0])
        expected = [bare.reference(made.held(), kind) for kind in (torch.float64, F16)]
    before = made.held()
    for splits in (1, 3, 4):
        assert errors(made.attend_only(splits), *expected).share <= 1
    assert all(same_bits(getattr(made, name), before[name]) for name in STORED)


@pytest.fixture
def overflows(device: str) -> Iterator[None]:
    """A sequence that has no room or no page is told of."""
    yield
    with pytest.raises(CacheOverflowError, match=r"cache_seqlens\[1\]"):
        gqa_cutlass.check_overflow(device)


@pytest.mark.usefixtures("overflows")
@pytest.mark.parametrize("tokens", [None, (3, 3)], ids=["one", "several"])
@THOROUGH
def test_a_token_that_does_not_fit_writes_no_scale(
    tokens: tuple[int, int] | None, device: str
) -> None:
    made = by_tma(case(device, lengths=(20, 64), capacity=64, tokens=tokens))
    assert made.check(left_out={1})[1].isnan().all()


@pytest.mark.usefixtures("overflows")
@pytest.mark.parametrize(
    ("page", "tokens"), [(0, None), (1, (3, 3)), (1, None), (2, None), (2, (3, 3))]
)
def test_pages_that_are_missing(page: int, tokens: tuple[int, int] | None, device: str) -> None:
    """Of what is read, or of the new tokens, of which none is written then where they are
    several."""
    made = case(device, lengths=(20, 32 if tokens is None else 30), capacity=64, tokens=tokens)
    in_pages(made)
    made.options["block_table"][1, page] = -1
    by_tma(made)
    lost = page == 2 or tokens is not None
    right = made.right({1} if lost else ())
    out = made.run()
    assert all(same_bits(getattr(made, name), right[name]) for name in STORED)
    assert out[1].isnan().all() and not out[0].isnan().any()


@THOROUGH
def test_rows_that_are_inactive_write_no_scale(device: str) -> None:
    made = by_tma(case(device, lengths=(20, -1), capacity=64))
    assert (made.check(left_out={1})[1] == 0).all()
    gqa_cutlass.check_overflow(device)


def see_tree(made: Case) -> None:
    batch, count = made.q.shape[:2]
    mask = torch.rand(batch, count, count, generator=torch.Generator().manual_seed(count)) < 0.5
    mask[:, 0] = False
    made.options["tree_mask"] = mask.to(made.q.device)


MANY: dict[str, Callable[[Case], None]] = {
    "as they come": lambda _: None, "tree": see_tree, "pages": in_pages,
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "lengths", "count", "splits"),
    diagonal(MANY, [(60, 0), (31, 32), (250, 127)], [4, 40, 17], [1, 2, 4, 16], count=3),
)
def test_every_new_token_has_a_scale_of_its_own(
    name: str, lengths: tuple[int, int], count: int, splits: int, device: str
) -> None:
    """In one tile, across edges of tiles, of blocks and of clusters."""
    made = case(device, lengths=lengths, capacity=304, tokens=(count, count))
    MANY[name](made)
    made.options["num_splits"] = splits
    by_tma(made).check()


@pytest.mark.parametrize("head_dim", [128, 256])
@THOROUGH
def test_several_tokens_of_wide_heads(head_dim: int, device: str) -> None:
    made = case(device, queries=BF16, lengths=(37, 300), head_dim=head_dim, tokens=(4, 4))
    by_tma(made).check()


@pytest.mark.parametrize("tokens", [None, (4, 4)], ids=["one", "several"])
@THOROUGH
def test_values_of_another_head_dim(tokens: tuple[int, int] | None, device: str) -> None:
    made = case(device, lengths=(37, 300), head_dim=128, tokens=tokens)
    made.v, made.v_cache = made.v[..., :64], made.v_cache[..., :64]
    kernel = by_tma(made).kernel
    assert kernel is not None
    made.kernel = replace(kernel, head_dim_v=64)
    made.options["num_splits"] = 2
    made.check()


@THOROUGH
def test_several_blocks_of_heads_share_a_kv_head(device: str) -> None:
    """And one of them appends."""
    by_tma(case(device, lengths=(37, 260), head_dim=128, group=32)).check()


@pytest.mark.parametrize("tokens", [None, (4, 4)], ids=["one", "several"])
@THOROUGH
def test_kernels_that_start_before_the_one_before_is_done(
    tokens: tuple[int, int] | None, device: str
) -> None:
    made = by_tma(case(device, lengths=(37, 300), tokens=tokens))
    assert made.kernel is not None
    made.kernel = replace(made.kernel, pdl=True)
    made.check()
