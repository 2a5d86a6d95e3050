"""Pages: of any size, in any order and layout, wherever a table says; and those that are none."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from cases import Layout, Step, make_step, snapshot
from featured import KINDS, add_index, add_window, every_schedule, kernel_of
from helpers import check, diagonal, on_devices, run, skip_unless_it_runs

import gqa_cutlass
from gqa_cutlass import gqa_decode
from gqa_cutlass.codegen import Schedule
from gqa_cutlass.errors import CacheOverflowError, InputError

PROCESS = "features"  # has all tests of this folder, for they have kernels in common


@dataclass(frozen=True)
class Pages:
    """How caches lie in pages."""

    kind: str
    size: int
    layout: Layout = "NHD"
    packed: bool = True

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.size}-{self.layout}-{'packed' if self.packed else 'apart'}"

    def of(self, step: Step) -> Step:
        step.into_pages(self.size, self.layout, self.packed)
        return step


SOME = [
    Pages("tensorop", 1, packed=False), Pages("tensorop", 3), Pages("tensorop", 64, "HND"),
    Pages("simt", 3, "HND", packed=False),
    Pages("tma", 16, "HND"), Pages("tma", 48), Pages("tma", 64, packed=False),
]  # fmt: skip
MORE = [
    Pages(kind, size, layout, packed)
    for kind in KINDS
    for size in (1, 2, 3, 5, 16, 31, 32, 48, 64, 100, 128, 256, 1024)
    for layout in ("NHD", "HND")
    for packed in (True, False)
    if kind != "tma" or size % 16 == 0
]


def plan_for(step: Step, kind: str, splits: int = 2) -> Any:
    return gqa_cutlass.plan(
        *step.tensors(), cache_seqlens=step.seqlens, return_lse=True, num_splits=splits,
        kernel=kernel_of(kind, "paged"), **step.features(),
    )  # fmt: skip


@pytest.mark.parametrize(("device", "pages"), on_devices(SOME, MORE))
def test_pages_of_every_size_and_layout(device: str, pages: Pages) -> None:
    """A new token opens a page, fills one, and is the first of all."""
    config = kernel_of(pages.kind, "paged")
    skip_unless_it_runs(config, device)
    block = config.block_n * config.num_warps
    whole = pages.size * (1 + 2 * config.block_n // pages.size)
    for lengths, append, splits in (
        ([whole, whole - 1, whole + 1, 0], True, 1), ([3 * block + 5, 37], True, 2),
        ([whole, 1, 0], False, 3),
    ):  # fmt: skip
        step = make_step(
            dtype=config.dtype, lengths=lengths, max_seq_len=max(lengths) + 1, head_dim=64,
            num_kv_heads=1, vec_width=config.vec_width, append=append, device=device,
        )  # fmt: skip
        out, lse = plan_for(pages.of(step), pages.kind, splits)(*step.tensors(), step.seqlens)
        check(step, out)
        torch.testing.assert_close(lse.double(), step.reference()[1], atol=2e-5, rtol=2e-6)


@every_schedule
def test_a_window_reads_no_page_before_it(kind: str, device: str) -> None:
    """What the table says of those may be anything, too."""
    config = kernel_of(kind, "window and paged")
    skip_unless_it_runs(config, device)
    step = make_step(
        dtype=config.dtype, lengths=[300, 7], max_seq_len=320, head_dim=64, num_kv_heads=1,
        vec_width=config.vec_width, device=device,
    )  # fmt: skip
    step.into_pages(16)
    add_window(step, 90)
    assert step.block_table is not None
    snapshot(step)
    given = step.block_table.clone()
    given[0, : (301 - 90) // 16] = -1
    features = step.features() | {"block_table": given}
    plan = gqa_cutlass.plan(
        *step.tensors(), cache_seqlens=step.seqlens, kernel=config, num_splits=2, **features
    )
    check(step, plan(*step.tensors(), step.seqlens))
    gqa_cutlass.check_overflow(device)


def test_keys_and_values_may_be_pages_of_one_tensor(device: str) -> None:
    """As in transformers: the table names a page of keys, and the one behind it has the values."""
    step = make_step(
        lengths=[37, 16, -1], max_seq_len=64, head_dim=64, num_kv_heads=1, device=device
    )
    step.into_pages(16, "NHD", packed=False)
    assert step.block_table is not None
    pages = torch.stack([step.k_cache, step.v_cache], dim=1).flatten(0, 1)
    expected = gqa_decode(*step.tensors(), cache_seqlens=step.seqlens, **step.features())
    out = gqa_decode(
        step.q, pages[:-1], pages[1:], step.k, step.v, cache_seqlens=step.seqlens,
        block_table=2 * step.block_table,
    )  # fmt: skip
    assert torch.equal(out, expected)
    written = torch.stack([step.k_cache, step.v_cache], dim=1).flatten(0, 1)
    assert torch.equal(pages.isnan(), written.isnan())
    assert torch.equal(pages.nan_to_num(), written.nan_to_num())


@pytest.mark.sanitized
@pytest.mark.parametrize("where", ["read", "first", "appended", "behind"])
@every_schedule
def test_an_entry_of_no_page_spoils_only_its_sequence(kind: str, where: str, device: str) -> None:
    """Nothing is read or written through it; behind the end, and of an inactive row, it is none."""
    config = kernel_of(kind, "paged")
    skip_unless_it_runs(config, device)
    step = make_step(
        dtype=config.dtype, lengths=[30, 160, 64], max_seq_len=200, head_dim=64, num_kv_heads=1,
        vec_width=config.vec_width, device=device,
    )  # fmt: skip
    step.into_pages(16)
    assert step.block_table is not None
    plan = plan_for(step, kind)
    expected = step.reference()[0]
    entry = step.block_table[1, {"read": 5, "first": 0, "appended": 10, "behind": 11}[where]]
    before = entry.clone()
    none = (-1, step.k_cache.shape[0], 2**31 - 1, -(2**31))
    for bad in none if device == "cuda" else none[:2]:
        step.k_cache.copy_(step.before["k_cache"])
        step.v_cache.copy_(step.before["v_cache"])
        entry.fill_(bad)
        out, lse = plan(*step.tensors(), step.seqlens)
        entry.copy_(before)
        if where == "behind":
            gqa_cutlass.check_overflow(device)
            check(step, out)
            continue
        with pytest.raises(CacheOverflowError, match=r"cache_seqlens\[1\] .*block_table"):
            gqa_cutlass.check_overflow(device)
        assert out[1].isnan().all() and lse[1].isnan().all()
        step.check_memory(rejected=(1,) if where == "appended" else ())
        for right in (0, 2):
            assert (out[right].double() - expected[right]).abs().max() < 4e-2
    step.seqlens[1] = -1
    entry.fill_(-1)
    out, lse = plan(*step.tensors(), step.seqlens)
    gqa_cutlass.check_overflow(device)
    assert (out[1] == 0).all() and (lse[1] == -math.inf).all()


@pytest.mark.parametrize("kind", KINDS)
def test_sequences_may_share_pages_that_they_only_read(kind: str, device: str) -> None:
    config = kernel_of(kind, "paged")
    skip_unless_it_runs(config, device)
    step = make_step(
        dtype=config.dtype, lengths=[70, 70, 70], max_seq_len=80, head_dim=64, num_kv_heads=1,
        vec_width=config.vec_width, device=device,
    )  # fmt: skip
    step.into_pages(16)
    assert step.block_table is not None
    step.block_table[1:, :4] = step.block_table[0, :4]  # the last of each is its own
    check(step, plan_for(step, kind)(*step.tensors(), step.seqlens)[0])


def test_tables_whose_rows_an_index_names(device: str) -> None:
    step = make_step(lengths=[37, 60], max_seq_len=64, head_dim=64, device=device)
    step.into_pages(3)
    add_index(step, spare=1)
    check(step, run(step))


@pytest.mark.parametrize(("size", "schedule"), diagonal([16, 48, 24], [Schedule.TMA]))
def test_dispatch_takes_the_copy_engine_for_pages_of_whole_boxes(
    size: int, schedule: Schedule
) -> None:
    step = make_step(lengths=[900], max_seq_len=1152, head_dim=64, num_kv_heads=1, device="cpu")
    step.into_pages(size)
    found = gqa_cutlass.explain(*step.tensors(), **step.features())
    assert found.problem.max_seq_len == 1152 and found.problem.page_size == size
    assert found.dispatch.config.schedule is (schedule if size % 16 == 0 else Schedule.MULTISTAGE)
    assert f"pages of {size} tokens" in str(found)
    if size % 16:
        with pytest.raises(InputError, match="tma.* for pages of 24 tokens; allowed: pages of mul"):
            kernel = kernel_of("tma", "paged")
            gqa_cutlass.plan(
                *(t.bfloat16() for t in step.tensors() if t is not None), cache_seqlens=900,
                kernel=kernel, block_table=step.block_table,
            )  # fmt: skip


def test_launches_are_as_large_as_the_table_and_not_as_the_pool() -> None:
    q = torch.empty(2, 32, 128, dtype=torch.float16, device="meta")
    pool = torch.empty(10**6, 16, 8, 128, dtype=q.dtype, device="meta")
    table = torch.empty(2, 64, dtype=torch.int32, device="meta")
    dense = torch.empty(2, 1024, 8, 128, dtype=q.dtype, device="meta")
    paged = gqa_cutlass.explain(q, pool, pool, block_table=table)
    same = gqa_cutlass.explain(q, dense, dense)
    assert paged.kv_bytes == same.kv_bytes
    assert paged.dispatch.shape.grid == same.dispatch.shape.grid
    assert paged.dispatch.config.schedule is same.dispatch.config.schedule


def test_a_table_by_its_other_name(device: str) -> None:
    step = make_step(lengths=[37], max_seq_len=64, head_dim=64, append=False, device=device)
    step.into_pages(3)
    table, step.block_table = step.block_table, None
    right = gqa_cutlass.gqa_decode(*step.tensors(), cache_seqlens=37, block_table=table)
    named = gqa_cutlass.gqa_decode(*step.tensors(), cache_seqlens=37, page_table=table)
    assert torch.equal(named, right)
    for call in (gqa_cutlass.gqa_decode, gqa_cutlass.plan):
        with pytest.raises(InputError, match="block_table and page_table: got both; allowed: one"):
            call(*step.tensors(), cache_seqlens=37, page_table=table, block_table=table)


@every_schedule
def test_slots_say_where_new_tokens_go(kind: str, device: str) -> None:
    """Elsewhere than the table does, which need not know the page; nowhere; or where nothing is."""
    config = kernel_of(kind, "paged")
    skip_unless_it_runs(config, device)
    step = make_step(
        dtype=config.dtype, lengths=[37, 64, 20, 30], max_seq_len=80, head_dim=64, num_kv_heads=2,
        vec_width=config.vec_width, device=device,
    )  # fmt: skip
    step.into_pages(16)
    assert step.block_table is not None and step.k is not None and step.v is not None
    expected, expected_lse = step.reference()
    num_pages = step.k_cache.shape[0]
    used = {int(page) for page in step.block_table.flatten() if 0 <= page < num_pages}
    free = min(set(range(num_pages)) - used)
    slots = torch.tensor([free * 16 + 3, free * 16 + 15, -1, num_pages * 16], device=device)
    step.block_table[1, 4] = -1  # the page that its new token opens
    right = {name: step.before[name].clone() for name in ("k_cache", "v_cache")}
    for row, place in ((0, 3), (1, 15)):
        right["k_cache"][free, place] = step.k[row]
        right["v_cache"][free, place] = step.v[row]
    plan = gqa_cutlass.plan(
        *step.tensors(), cache_seqlens=step.seqlens, return_lse=True, num_splits=2, kernel=config,
        block_table=step.block_table, slot_mapping=slots,
    )  # fmt: skip
    out, lse = plan(*step.tensors(), step.seqlens)
    with pytest.raises(CacheOverflowError, match=r"cache_seqlens\[3\]"):
        gqa_cutlass.check_overflow(device)
    assert out[3].isnan().all() and lse[3].isnan().all()
    assert (out[:3].double() - expected[:3]).abs().max() < 4e-2
    torch.testing.assert_close(lse[:3].double(), expected_lse[:3], atol=2e-5, rtol=2e-6)
    step.before |= right
    step.check_memory(rejected=(0, 1, 2, 3))


@pytest.mark.gpu
@every_schedule
def test_pools_of_more_elements_than_32_bits_count(kind: str) -> None:
    config = kernel_of(kind, "paged")
    skip_unless_it_runs(config, "cuda")
    step = make_step(
        dtype=config.dtype, lengths=[300, 37], max_seq_len=320, head_dim=64, num_kv_heads=1,
        vec_width=8, device="cuda",
    )  # fmt: skip
    step.into_pages(16)
    assert step.block_table is not None and step.k is not None and step.v is not None
    expected, _ = step.reference()
    held = step.k_cache.shape[0]
    first = 2**31 // (16 * 128) + 1
    pool = torch.empty(first + held, 16, 1, 128, dtype=step.q.dtype, device="cuda")
    pool[first:, ..., :64], pool[first:, ..., 64:] = step.k_cache, step.v_cache
    step.k_cache, step.v_cache = pool.split(64, -1)
    used = (step.block_table >= 0) & (step.block_table < held)
    step.block_table = torch.where(used, step.block_table + first, step.block_table)
    out, _ = plan_for(step, kind)(*step.tensors(), step.seqlens)
    gqa_cutlass.check_overflow("cuda")
    assert (out.double() - expected).abs().max() < 4e-2
    for b, length in enumerate(step.lengths):
        assert torch.equal(step.k_cache[step.place(b, length)], step.k[b])
        assert torch.equal(step.v_cache[step.place(b, length)], step.v[b])
