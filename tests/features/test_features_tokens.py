"""Several tokens of a sequence: as many as ask, as many as are new, and what each sees."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import pytest
import torch
from cases import Step, make_step, snapshot
from featured import KINDS, add_padding, add_window, every_schedule, policies_of
from helpers import THOROUGH, check_lse, diagonal, run, skip_unless_it_runs
from tokens import see_tree, take_tokens, take_unlike
from torch import Tensor

import gqa_cutlass
from gqa_cutlass import pack_tree_mask
from gqa_cutlass.codegen import KernelConfig, default_config
from gqa_cutlass.errors import CacheOverflowError
from gqa_cutlass.proof.sim import run_sim

PROCESS = "features"  # has all tests of this folder, for they have kernels in common
COUNTS, GROUPS = (2, 3, 4, 5, 8, 16, 17, 64), (1, 4, 8)
CHEAP = {(2, 4, "tma"), (5, 8, "tensorop"), (17, 1, "simt")}  # what CI takes of them


def config_of(
    kind: str, feature: str = "tokens", group_size: int = 4, count: int = 1
) -> KernelConfig:
    """A kernel for so many tokens; it works for others, too."""
    math_, dtype, width, schedule = KINDS[kind]
    policies = policies_of(feature)
    return default_config(
        math_, dtype, 64, group_size, width, schedule, policies, num_tokens=count
    )  # fmt: skip


def step_for(
    config: KernelConfig,
    lengths: list[int],
    queries: int,
    new: int | None = None,
    *,
    room: int = 0,
    device: str,
    kv_heads: int = 1,
    append: bool = True,
) -> Step:
    """Sequences of these lengths, and so many tokens."""
    count = (queries if new is None else new) if append else 0
    step = make_step(
        dtype=config.dtype, head_dim=config.head_dim, group_size=config.group_size,
        vec_width=config.vec_width, lengths=[length + max(count - 1, 0) for length in lengths],
        max_seq_len=max(lengths) + count + room, num_kv_heads=kv_heads, append=append,
        device=device,
    )  # fmt: skip
    take_tokens(step, queries, new)
    assert step.lengths == lengths
    return step


def call(step: Step, config: KernelConfig, splits: int = 2, **options: Any) -> Any:
    """Output and log-sum-exp of a step by a kernel."""
    asked = step.features() | options
    plan = gqa_cutlass.plan(
        *step.tensors(), cache_seqlens=step.seqlens, return_lse=True, num_splits=splits,
        out=step.out, kernel=config, **asked,
    )  # fmt: skip
    return plan(*step.tensors(), step.seqlens, step.out)


def hold(step: Step, config: KernelConfig, splits: int = 2, **options: Any) -> None:
    """The step is right, and so is what it writes."""
    snapshot(step)
    out, lse = call(step, config, splits, **options)
    gqa_cutlass.check_overflow(step.q.device)
    step.check_memory()
    check_lse(step, lse)
    assert step.errors(out).share <= 1


def spoiled(step: Step, config: KernelConfig, b: int, splits: int = 2, **options: Any) -> Tensor:
    """The output of a step one of whose sequences is refused: nothing of it is written."""
    snapshot(step)
    out, _ = call(step, config, splits, **options)
    with pytest.raises(CacheOverflowError, match=rf"cache_seqlens\[{b}\]"):
        gqa_cutlass.check_overflow(step.q.device)
    step.check_memory(rejected=(b,))
    return out  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("count", "group_size", "kind"),
    [
        pytest.param(*row, marks=() if row in CHEAP else THOROUGH)
        for row in product(COUNTS, GROUPS, KINDS)
    ],
)
def test_so_many_tokens_of_groups_of_every_size(
    count: int, group_size: int, kind: str, device: str
) -> None:
    """New tokens lie in one tile, across edges of tiles, and are all that there is."""
    config = config_of(kind, group_size=group_size, count=count)
    skip_unless_it_runs(config, device)
    tile, block = config.block_n, config.block_n * config.num_warps
    for lengths, splits, append in (
        ([0, tile - 1, 2 * tile - count // 2], 1, True), ([block + 7, 3], 4, True),
        ([block - 1, tile], 2, False),
    ):  # fmt: skip
        hold(step_for(config, lengths, count, device=device, append=append), config, splits)


@pytest.mark.sanitized
@pytest.mark.parametrize(
    ("counts", "kind"), diagonal([(1, 3), (40, 2), (2, 40), (3, 1)], ["tma", "tensorop", "simt"])
)
def test_more_new_tokens_than_queries_and_fewer(
    counts: tuple[int, int], kind: str, device: str
) -> None:
    """Queries are those of the last tokens, some of which may have been cached before."""
    config = config_of(kind)
    skip_unless_it_runs(config, device)
    hold(step_for(config, [50, 3, 31], *counts, device=device), config)


def test_queries_of_tokens_that_there_are_not_see_nothing(device: str) -> None:
    config = config_of("tensorop")
    step = step_for(config, [2, 0, 70], 5, device=device, append=False)
    out, lse = call(step, config)
    assert (out[0, :3] == 0).all() and (lse[0, :, :3] == -math.inf).all() and (out[1] == 0).all()
    hold(step, config)


@pytest.mark.parametrize(
    ("window", "kind"),
    diagonal([(-1, 2), (9, 3), (0, -1), (-1, -1), (9, 0)], ["tma", "tensorop"]),
)
def test_windows_of_queries_that_are_not_causal(
    window: tuple[int, int], kind: str, device: str
) -> None:
    config = config_of(kind, "tokens and window" if window[0] >= 0 else "tokens")
    skip_unless_it_runs(config, device)
    step = step_for(config, [40, 0, 14], 6, device=device)
    step.causal, step.window_size = False, window
    hold(step, config)


@every_schedule
def test_new_tokens_that_no_query_sees_are_written(kind: str, device: str) -> None:
    """They are before the window of the only query, or in padding that is longer than all."""
    window = config_of(kind, "tokens and window")
    skip_unless_it_runs(window, device)
    step = step_for(window, [20, 0, 90], 1, 70, device=device)
    add_window(step, 5)
    hold(step, window)
    padding = config_of(kind, "tokens and leftpad")
    step = step_for(padding, [20, 0, 90], 2, 70, device=device)
    add_padding(step, 1000, 69, 120)
    hold(step, padding)


@pytest.mark.sanitized
@pytest.mark.parametrize(("count", "kind"), diagonal([40, 5], ["tensorop", "tma"]))
def test_trees_of_drafts(count: int, kind: str, device: str) -> None:
    """Masks of one word a row and of two; drafts that see themselves, others, or none."""
    config = config_of(kind, "tree")
    skip_unless_it_runs(config, device)
    step = step_for(config, [60, 0], count, device=device)
    see_tree(step)
    hold(step, config)


def test_a_tree_may_be_packed_before(device: str) -> None:
    step = step_for(config_of("tensorop"), [20, 7], 4, device=device)
    see_tree(step)
    assert step.tree_mask is not None
    right = run(step)
    options = step.features() | {"tree_mask": step.tree_mask}
    same = gqa_cutlass.gqa_decode(*step.tensors(), cache_seqlens=step.seqlens, **options)
    assert torch.equal(same, right)


def test_packed_trees_have_a_bit_for_each_draft() -> None:
    mask = torch.zeros(1, 34, 34, dtype=torch.bool)
    mask[0, 0, 0] = mask[0, 1, 31] = mask[0, 1, 32] = mask[0, 33, 33] = True
    packed = pack_tree_mask(mask)
    assert packed.dtype == torch.uint32 and packed.shape == (1, 34, 2)
    words = packed.view(torch.int32)[0]
    assert words[0].tolist() == [1, 0] and words[1].tolist() == [-(2**31), 1]
    assert words[33].tolist() == [0, 2] and (words[2:33] == 0).all()


def test_plans_read_trees_that_are_written_over(device: str) -> None:
    step = step_for(config_of("tensorop"), [20, 7], 4, device=device)
    see_tree(step)
    asked = step.features()
    plan = gqa_cutlass.plan(*step.tensors(), cache_seqlens=step.seqlens, **asked)
    assert step.tree_mask is not None
    step.tree_mask = torch.ones_like(step.tree_mask)
    asked["tree_mask"].view(torch.int32).copy_(pack_tree_mask(step.tree_mask).view(torch.int32))
    assert step.errors(plan(*step.tensors(), step.seqlens)).share <= 1


def test_one_token_in_four_dimensions_is_the_same_call(device: str) -> None:
    step = make_step(lengths=[37], max_seq_len=64, head_dim=64, device=device)
    out, lse = run(step, return_lse=True)
    q, k_cache, v_cache, k, v = step.tensors()
    assert k is not None and v is not None
    tokens = q[:, None], k_cache, v_cache, k[:, None], v[:, None]
    wide, same = gqa_cutlass.gqa_decode(*tokens, cache_seqlens=step.seqlens, return_lse=True)
    assert torch.equal(wide[:, 0], out) and torch.equal(same, lse)


UNLIKE = {
    "queries": ([3, 0, 1, 9], None), "new": (None, [0, 4, 35, 1]),
    "both": ([3, 0, 1, 9], [3, 2, 0, 35]), "nothing of one": ([2, 0, 4, 1], [2, 0, 4, 1]),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "kind", "feature"),
    [
        ("both", "tma", "tokens and paged"), ("nothing of one", "tensorop", "tokens and paged"),
        pytest.param("both", "simt", "tokens and norm and rotary", marks=THOROUGH),
        *(
            pytest.param(name, kind, "tokens", marks=THOROUGH)
            for kind in ("tma", "tensorop")
            for name in UNLIKE
        ),
    ],
)  # fmt: skip
def test_sequences_of_unlike_many_tokens(name: str, kind: str, feature: str, device: str) -> None:
    """Some have no query, no new token, or neither."""
    config = config_of(kind, feature)
    skip_unless_it_runs(config, device)
    queries, new = UNLIKE[name]
    step = step_for(config, [30, 64, 7, 100], 2, room=40, device=device)
    take_unlike(step, queries, new)
    snapshot(step)
    if "paged" in feature:
        step.into_pages(16)
    if "norm" in feature:
        step.turning = step.turning.normed(step.q).rotated(step.q, step.room())
    hold(step, config, max_seqlen_q=max(queries) if queries else None)


@every_schedule
def test_an_index_that_is_out_of_order_spoils_its_sequence(kind: str, device: str) -> None:
    """No rows of the output are its own then, and none are written."""
    config = config_of(kind)
    skip_unless_it_runs(config, device)
    step = step_for(config, [30, 64, 7], 2, room=9, device=device)
    take_unlike(step, [3, 2, 4], [3, 2, 4])
    expected, index, own = step.reference()[0], step.cu_seqlens_q, step.cu_seqlens_k_new
    assert index is not None and own is not None
    for ends in ([0, 3, 2, 9], [0, 3, 2**31 - 1, 9], [0, 3, -1, 9]):
        given = index.new_tensor(ends)
        step.out.fill_(math.nan)
        snapshot(step)
        out, _ = call(step, config, cu_seqlens_q=given, max_seqlen_q=4)
        with pytest.raises(CacheOverflowError, match="cu_seqlens_q or cu_seqlens_k_new are out"):
            gqa_cutlass.check_overflow(device)
        assert out[3:5].isnan().all()
        assert (out[:3].double() - expected[:3]).abs().max() < 4e-2
        assert step.new(step.k, 0).equal(step.k_cache[0, 30:33])  # type: ignore[arg-type]
        for name in ("k_cache", "v_cache"):
            getattr(step, name).copy_(step.before[name])
    too_many = spoiled(step, config, 2, max_seqlen_q=3)
    assert too_many[5:].isnan().all()
    assert (too_many[:5].double() - expected[:5]).abs().max() < 4e-2
    step.cu_seqlens_k_new = own.new_tensor([0, 3, 3, 3])
    snapshot(step)
    out, _ = call(step, config, cu_seqlens_k_new=own.new_tensor([0, 3, 10, 3]))
    with pytest.raises(CacheOverflowError, match=r"cache_seqlens\[[12]\]"):
        gqa_cutlass.check_overflow(device)
    assert out[3:].isnan().all() and (out[:3].double() - expected[:3]).abs().max() < 4e-2
    step.check_memory()


@every_schedule
def test_a_part_that_does_not_fit_refuses_all_of_a_sequence(kind: str, device: str) -> None:
    config = config_of(kind)
    skip_unless_it_runs(config, device)
    step = step_for(config, [30, 40, 64], 4, device=device)
    expected = step.reference()[0]
    step.seqlens[2] = 65
    out = spoiled(step, config, 2)
    assert out[2].isnan().all()
    assert (out[:2].double() - expected[:2]).abs().max() < 4e-2


@every_schedule
def test_rows_that_are_inactive_have_no_tokens(kind: str, device: str) -> None:
    config = config_of(kind)
    skip_unless_it_runs(config, device)
    step = step_for(config, [30, 40], 4, device=device)
    expected = step.reference()[0]
    step.seqlens[1] = -1
    snapshot(step)
    out, lse = call(step, config)
    gqa_cutlass.check_overflow(device)
    step.check_memory(rejected=(1,))
    assert (out[1] == 0).all() and (lse[1] == -math.inf).all()
    assert (out[0].double() - expected[0]).abs().max() < 4e-2


@pytest.mark.sanitized
@pytest.mark.parametrize(("kind", "size"), [("tensorop", 1), ("tensorop", 3), ("tma", 16)])
def test_new_tokens_cross_pages(kind: str, size: int, device: str) -> None:
    config = config_of(kind, "tokens and paged")
    skip_unless_it_runs(config, device)
    step = step_for(config, [15, 47, 0, 62], 20, device=device)
    step.into_pages(size)
    hold(step, config)


@pytest.mark.parametrize(("token", "kind"), diagonal([0, 4, 5], ["tma", "tensorop", "simt"]))
def test_no_page_for_one_of_the_new_tokens_is_none_for_all(
    token: int, kind: str, device: str
) -> None:
    """The tokens before it, which have theirs, are not written either."""
    config = config_of(kind, "tokens and paged")
    skip_unless_it_runs(config, device)
    step = step_for(config, [30, 59, 12], 6, device=device)
    step.into_pages(16)
    assert step.block_table is not None
    expected = step.reference()[0]
    step.block_table[1, (59 + token) // 16] = -1
    snapshot(step)
    out, lse = call(step, config)
    with pytest.raises(CacheOverflowError, match=r"cache_seqlens\[1\] .*block_table"):
        gqa_cutlass.check_overflow(device)
    assert out[1].isnan().all() and lse[1].isnan().all()
    step.check_memory(rejected=(1,))
    for right in (0, 2):
        assert (out[right].double() - expected[right]).abs().max() < 4e-2


@every_schedule
def test_slots_of_all_new_tokens(kind: str, device: str) -> None:
    """Of which some are not written; one behind the pools is a fault of its sequence."""
    config = config_of(kind, "tokens and paged")
    skip_unless_it_runs(config, device)
    step = step_for(config, [30, 60], 3, device=device)
    step.into_pages(16)
    assert step.k is not None and step.v is not None
    expected, pages = step.reference()[0], step.k_cache.shape[0]
    assert step.block_table is not None
    held = {int(page) for page in step.block_table.flatten()}
    free = min(set(range(pages)) - held)
    slots = torch.tensor([[16 * free + 7, -1, 16 * free], [-1, 16 * free + 3, 16 * pages]])
    snapshot(step)
    out, _ = call(step, config, slot_mapping=slots.to(device))
    with pytest.raises(CacheOverflowError, match=r"cache_seqlens\[1\]"):
        gqa_cutlass.check_overflow(device)
    assert out[1].isnan().all() and (out[0].double() - expected[0]).abs().max() < 4e-2
    for name, new in (("k_cache", step.k), ("v_cache", step.v)):
        step.before[name][free, 7], step.before[name][free, 0] = new[0, 0], new[0, 2]
    step.check_memory(rejected=(0, 1))


@pytest.mark.parametrize("features", ["tokens", "tree and norm and rotary", "norm and rotary"])
def test_a_kernel_of_that_name_is_looked_at_in_ptxsim(features: str) -> None:
    """With several tokens where it takes them."""
    found = run_sim(config_of("tensorop", features), cache_len=29, batch=2)
    assert found.appended and found.error <= 2 * found.error_torch and found.lse_error < 1e-3
