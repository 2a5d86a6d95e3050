"""Cases of decode attention over contexts that ranks share; `ranks.py` runs them.

Every rank makes the same whole step from the same seed, keeps its shard of the caches, and compares
what it gets with the reference for the whole, and with what the other ranks get.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import pytest
import sharded_caches  # noqa: F401 - which has cases
import sharded_pages  # noqa: F401 - which has cases
import torch
import torch.distributed as dist
from ranks import Group, case, case_for, serve
from torch import Tensor

from gqa_cutlass import CacheOverflowError, InputError, check_overflow
from gqa_cutlass.distributed import Sharding, decode_context_parallel
from gqa_cutlass.errors import CollectiveError
from gqa_cutlass.proof.reference import attend, errors

HEADS, KV_HEADS, DIM = 12, 3, 64
LOCAL_MAX = 8
EXCHANGES = "all_gather", "all_to_all", "reduce_scatter"


@dataclass(frozen=True, kw_only=True)
class Whole:
    """A step over a context that is in one place, and this rank's shard of its caches.

    Args:
        group: The ranks.
        sharding: Which tokens are here.
        q: [batch, HEADS, DIM].
        caches: Keys and values of all tokens, [2, batch, capacity, KV_HEADS, DIM].
        new: Those of the new token, [2, batch, KV_HEADS, DIM].
        shard: This rank's tokens, [2, batch, LOCAL_MAX, KV_HEADS, DIM]; NaN where there is none.
        lengths: Tokens before the step; negative for an inactive sequence.
    """

    group: Group
    sharding: Sharding
    q: Tensor
    caches: Tensor
    new: Tensor
    shard: Tensor
    lengths: list[int]

    @classmethod
    def make(cls, group: Group, lengths: list[int], interleave: int = 1, seed: int = 0) -> Whole:
        generator = torch.Generator().manual_seed(seed)
        sharding = Sharding(rank=group.rank, size=group.size, interleave=interleave)
        batch, capacity = len(lengths), sharding.capacity(LOCAL_MAX)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).half()

        whole = cls(
            group=group,
            sharding=sharding,
            q=random(batch, HEADS, DIM),
            caches=random(2, batch, capacity, KV_HEADS, DIM),
            new=random(2, batch, KV_HEADS, DIM),
            shard=torch.full((2, batch, LOCAL_MAX, KV_HEADS, DIM), math.nan).half(),
            lengths=lengths,
        )
        for b, length in enumerate(lengths):
            held = whole.held(max(length, 0))
            whole.shard[:, b, : len(held)] = whole.caches[:, b, held]
        return whole

    def held(self, tokens: int) -> list[int]:
        """Which of a sequence's first tokens are here."""
        each, size, rank = self.sharding.interleave, self.sharding.size, self.sharding.rank
        return [t for t in range(tokens) if t // each % size == rank]

    def decode(self, **options: Any) -> tuple[Tensor, Tensor]:
        """The step on all ranks: the output and the log-sum-exp."""
        given: dict[str, Any] = dict(
            q=self.q, k_cache=self.shard[0], v_cache=self.shard[1], k=self.new[0], v=self.new[1],
            cache_seqlens=torch.tensor(self.lengths, dtype=torch.int32), group=self.group.group,
            interleave=self.sharding.interleave, return_lse=True,
        )  # fmt: skip
        return decode_context_parallel(**(given | options))

    def check(self, out: Tensor, lse: Tensor, **features: Any) -> None:
        """Hold a result to the error rule, to those of the other ranks, and the shard to its new
        token."""
        for other in self.group.gathered((out, lse)):
            assert isinstance(other, tuple)
            assert torch.equal(other[0], out) and torch.equal(other[1], lse)
        active = [b for b, length in enumerate(self.lengths) if length >= 0]
        idle = [b for b, length in enumerate(self.lengths) if length < 0]
        assert not out[idle].any() and bool((lse[idle] == -math.inf).all())
        k, v = self.caches.clone()
        for b in active:
            k[b, self.lengths[b]], v[b, self.lengths[b]] = self.new[:, b]
        after = [self.lengths[b] + 1 for b in active]
        given = self.q[active], k[active], v[active], after, DIM**-0.5
        found = {n: t[active] if n == "cache_leftpad" else t for n, t in features.items()}
        expected, sums = attend(*given, torch.float64, **found)
        in_torch, _ = attend(*given, torch.float16, **found)
        assert errors(out[active], expected, in_torch).share <= 1
        assert torch.allclose(lse[active].double(), sums, atol=1e-3, rtol=1e-3)
        self.check_shard()

    def check_shard(self) -> None:
        """The new token is where it belongs, and nothing else was written."""
        wanted = Whole.shard_of(self)
        raw = self.shard.view(torch.int16)
        assert torch.equal(raw, wanted.view(torch.int16))

    def shard_of(self) -> Tensor:
        """This rank's shard after the step."""
        wanted = torch.full_like(self.shard, math.nan)
        for b, length in enumerate(self.lengths):
            held = self.held(max(length, 0))
            wanted[:, b, : len(held)] = self.caches[:, b, held]
            if length >= 0 and len(self.held(length + 1)) > len(held):
                wanted[:, b, len(held)] = self.new[:, b]
        return wanted


def ragged(group: Group, interleave: int = 1) -> list[int]:
    """Nothing yet, all but full, inactive, and where ownership changes."""
    stripe = group.size * interleave
    capacity = stripe * (LOCAL_MAX // interleave)
    return [0, capacity - 1, -1, stripe, stripe - 1, interleave]


@case
def lengths_on_the_device(group: Group) -> None:
    """The sequence that is full but for one token, empty shards, and all of the exchanges."""
    results = []
    for how in EXCHANGES:
        whole = Whole.make(group, ragged(group))
        results.append(whole.decode(exchange=how))
        whole.check(*results[-1])
    for out, lse in results[1:]:
        assert torch.allclose(out, results[0][0], atol=2e-3, rtol=2e-3)
        assert torch.allclose(lse, results[0][1], rtol=1e-5)


@case
def a_length_of_all_sequences(group: Group) -> None:
    for length in (0, 2 * group.size + 1, LOCAL_MAX * group.size - 1):
        whole = Whole.make(group, [length] * 3, seed=length)
        whole.check(*whole.decode(cache_seqlens=length))


@case
def tokens_that_follow_one_another_on_a_rank(group: Group) -> None:
    """Of a window, one rank may have all, several, or none."""
    for interleave, window in ((4, 2), (2, 2 * group.size - 1)):
        whole = Whole.make(group, ragged(group, interleave), interleave)
        features: dict[str, Any] = {"window_size": (window, -1)}
        whole.check(*whole.decode(**features), **features)
        length = whole.sharding.capacity(LOCAL_MAX) - 2
        whole = Whole.make(group, [length] * 2, interleave)
        whole.check(*whole.decode(cache_seqlens=length, **features), **features)


@case
def several_steps(group: Group) -> None:
    """Tokens go from rank to rank, and every step sees those before it."""
    whole = Whole.make(group, [0, 3])
    for step in range(group.size + 1):
        other = Whole.make(group, whole.lengths, seed=9 + step)
        whole = replace(whole, q=other.q, new=other.new)
        whole.check(*whole.decode())
        for b, length in enumerate(whole.lengths):
            whole.caches[:, b, length] = whole.new[:, b]
        whole = replace(whole, lengths=[length + 1 for length in whole.lengths])


@case
def softcap_sinks_window_and_padding(group: Group) -> None:
    """Sinks count once; padding and a window hide other numbers of tokens on every rank."""
    lengths = ragged(group)
    features: dict[str, Any] = {
        "softcap": 1.5,
        "sinks": torch.linspace(-2, 3, HEADS),
        "window_size": (2 * group.size + 1, -1),
        "cache_leftpad": torch.tensor([0, 5, 1, 2, 1, 0], dtype=torch.int32),
    }
    whole = Whole.make(group, lengths)
    out, lse = whole.decode(**features)
    assert torch.allclose(lse[2], features["sinks"])  # the inactive sequence's
    lse[2] = -math.inf
    whole.check(out, lse, **features)


@case
def alibi(group: Group) -> None:
    """Distances are those in the sequence, not those in the shard."""
    features = {"alibi_slopes": torch.linspace(0.01, 0.5, HEADS)}
    for lengths, options in ((ragged(group), {}), ([7] * 3, {"cache_seqlens": 7})):
        whole = Whole.make(group, lengths)
        whole.check(*whole.decode(**features, **options), **features)


@case
def heads_that_are_spread_over_the_ranks(group: Group) -> None:
    """As tensor parallelism leaves them: every rank gets what it gets of the whole output."""
    own = HEADS // group.size
    part = slice(group.rank * own, (group.rank + 1) * own)
    for how in (None, EXCHANGES[group.size - 2]):
        whole = Whole.make(group, ragged(group))
        q = whole.q[:, part].contiguous()
        out, lse = whole.decode(q=q[:, None], q_heads="sharded", exchange=how)
        assert out.shape == (6, 1, own, DIM) and lse.shape == (6, own)
        outs, lses = zip(*group.gathered((out[:, 0], lse)), strict=True)
        whole.check(torch.cat(outs, 1), torch.cat(lses, 1))


@case_for(2, 3)
def several_tokens(group: Group) -> None:
    """By every exchange, and with heads that are spread over the ranks."""
    whole = Whole.make(group, [2 * group.size, 0])
    generator = torch.Generator().manual_seed(7)
    q, k, v = (
        torch.randn(2, 3, heads, DIM, generator=generator).half()
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    )
    for b, length in enumerate(whole.lengths):
        whole.caches[:, b, length : length + 3] = torch.stack((k, v))[:, b]
    given = q, *whole.caches, [length + 3 for length in whole.lengths], DIM**-0.5
    (expected, sums), (in_torch, _) = (attend(*given, d) for d in (torch.float64, torch.float16))
    own = HEADS // group.size
    part = slice(group.rank * own, (group.rank + 1) * own)
    for heads, how in ((part, None), *((slice(None), how) for how in EXCHANGES)):
        spread: dict[str, Any] = {"q_heads": "sharded" if how is None else "whole", "exchange": how}
        out, lse = whole.decode(q=q[:, :, heads].contiguous(), k=k, v=v, **spread)
        assert errors(out, expected[:, :, heads], in_torch[:, :, heads]).share <= 1
        assert lse.is_contiguous()
        assert torch.allclose(lse.double(), sums[:, heads], atol=1e-3, rtol=1e-3)
        for b, length in enumerate(whole.lengths):
            held = whole.held(length + 3)
            assert torch.equal(whole.shard[:, b, : len(held)], whole.caches[:, b, held])


@case
def pages_and_rows(group: Group) -> None:
    """Every rank has pools and a table of its own; garbage where a sequence has no tokens."""
    lengths = ragged(group)
    whole = Whole.make(group, lengths)
    size, pages = 4, LOCAL_MAX // 4
    order = torch.randperm(6 * pages, generator=torch.Generator().manual_seed(group.rank))
    table = order.view(6, pages).int()
    pools = torch.full((2, 6 * pages + group.rank, size, KV_HEADS, DIM), math.nan).half()
    pools[:, order] = whole.shard.reshape(2, 6 * pages, size, KV_HEADS, DIM)
    table[2] = -7
    out, lse = whole.decode(k_cache=pools[0], v_cache=pools[1], page_table=table)
    whole.shard.copy_(pools[:, order].view_as(whole.shard))
    whole.check(out, lse)
    rows = torch.tensor([3, 1, 99, 0, 5, 4], dtype=torch.int32)
    whole = Whole.make(group, lengths)
    caches = torch.full_like(whole.shard, math.nan)
    there = [b for b in range(6) if b != 2]
    caches[:, rows[there].long()] = whole.shard[:, there]
    out, lse = whole.decode(k_cache=caches[0], v_cache=caches[1], cache_batch_idx=rows)
    whole.shard[:, there] = caches[:, rows[there].long()]
    whole.check(out, lse)


@case
def results_repeat_to_the_bit(group: Group) -> None:
    how = EXCHANGES[group.size - 2]
    first, second = (Whole.make(group, ragged(group)).decode(exchange=how) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


@case
def tokens_without_room(group: Group) -> None:
    """NaN and a report on all ranks, also those whose own shard has room; others are right."""
    capacity = LOCAL_MAX * group.size
    whole = Whole.make(group, [capacity, 4])
    how = EXCHANGES[group.size - 2]
    out, lse = whole.decode(exchange=how)
    assert bool(out[0].isnan().all()) and bool(lse[0].isnan().all())
    again, _ = whole.decode(cache_seqlens=_tensor(2**31 - 1, 4), exchange=how)
    assert torch.equal(again[1], out[1]), "a step after one that did not fit was not done"
    with pytest.raises(CacheOverflowError, match="sequence 0 of its batch"):
        check_overflow("cpu")
    check_overflow("cpu")
    fits = replace(
        whole, q=whole.q[1:], caches=whole.caches[:, 1:], new=whole.new[:, 1:],
        shard=whole.shard[:, 1:], lengths=[4],
    )  # fmt: skip
    fits.check(out[1:], lse[1:])
    with pytest.raises(CacheOverflowError, match=f"{capacity} tokens and 1 new are more than"):
        whole.decode(cache_seqlens=capacity)
    with pytest.raises(InputError, match="cache_seqlens: got -1; allowed: an int from 0"):
        whole.decode(cache_seqlens=-1)


def _refused(whole: Whole, message: str, **options: Any) -> None:
    """Every rank raises the same, and has written nothing."""
    before = whole.shard.clone()
    with pytest.raises(InputError) as raised:
        whole.decode(**options)
    assert message in str(raised.value), str(raised.value)
    told = whole.group.gathered(str(raised.value))
    assert told == [told[0]] * whole.group.size
    assert torch.equal(whole.shard.view(torch.int16), before.view(torch.int16))


@case
def ranks_that_disagree(group: Group) -> None:
    whole, last = Whole.make(group, [3, 5, 1, 0, 2]), group.rank == group.size - 1
    _refused(whole, "softcap: got ", softcap=1.5 if last else 2.5)
    _refused(whole, "sinks: got None on rank 0", sinks=torch.zeros(HEADS) if last else None)
    _refused(whole, "exchange: got all_to_all", exchange=EXCHANGES[1 - last])
    shards = whole.shard[:, :, : LOCAL_MAX - last]
    _refused(
        whole, f"k_cache: got torch.float16 [5, {LOCAL_MAX}, ", k_cache=shards[0],
        v_cache=shards[1],
    )  # fmt: skip
    _refused(whole, "interleave: got 1 on rank 0 and 2 on rank", interleave=1 + last)
    _refused(
        whole, "cache_seqlens: got an int on", cache_seqlens=_tensor(3, 5, 1, 0, 2) if last else 3
    )


@case
def ranks_of_which_one_refuses(group: Group) -> None:
    whole, last = Whole.make(group, [3, 5, 1, 0]), group.rank == group.size - 1
    who = f"rank {group.size - 1} of {group.size} refuses the call: "
    _refused(whole, who + "gqa_decode: k: got ", k=whole.new[0, :, 1:] if last else whole.new[0])
    _refused(whole, who + "gqa_decode: q: got ", q=None if last else whole.q)
    _refused(whole, who + "decode_context_parallel: interleave", interleave=0 if last else 1)
    whole.decode()
    if last:
        with pytest.raises(InputError, match="k: "):
            whole.decode(k=whole.shard[0, :, 5])  # which the layout does not show
    else:
        out, _ = whole.decode()
        assert bool(out.isnan().all())


@case
def what_is_not_exact_over_shards(group: Group) -> None:
    whole = Whole.make(group, [3, 5])
    slopes, sinks = torch.ones(HEADS), torch.ones(HEADS)
    _refused(whole, "allowed: interleave=1", alibi_slopes=slopes, interleave=2)
    _refused(whole, "use gqa_decode on one device", alibi_slopes=slopes, sinks=sinks)
    _refused(whole, "slot_mapping: got one; allowed: none", slot_mapping=torch.zeros(2).long())
    _refused(whole, "out: got one; allowed: none", out=torch.empty_like(whole.q))
    _refused(whole, "out_dtype: got torch.int8", out_dtype=torch.int8)
    two: dict[str, Any] = {"q": torch.zeros(2, 2, HEADS, DIM).half()}
    _refused(whole, "window_size: got (9, 0); allowed: (-1, -1) with", **two, window_size=(9, 0))
    _refused(whole, "alibi_slopes: got some; allowed: none with", **two, alibi_slopes=slopes)
    allowed = f"v: got shape [2, 1, 3, {DIM}]; allowed: [2, 2, "
    _refused(whole, allowed, k=whole.shard[0, :, :2], v=whole.shard[0, :, :1])
    _refused(whole, "tree_mask: got one with 2 queries and 1 new", **two, tree_mask=sinks)
    _refused(whole, "tree_mask: got ", **two, k=None, v=None, tree_mask=sinks)
    most = 2**22 // (4 * (2 * 2 + 1) * group.size)
    allowed = f"interleave: got 999999 with 2 queries and 1 new tokens; allowed: up to {most}"
    _refused(whole, allowed, **two, interleave=999999)
    many = torch.zeros(2, 257, KV_HEADS, DIM).half()
    _refused(whole, "tokens of q and k: got 1 and 257; allowed: up to 256", k=many, v=many)
    _refused(whole, "q_heads: got 'some'", q_heads="some")
    _refused(whole, "exchange: got 'ring'", exchange="ring")
    with pytest.raises(TypeError, match="unexpected keyword argument 'windows'"):
        whole.decode(windows=3)
    _refused(whole, "gqa_decode: cache_seqlens: got a bool", cache_seqlens=True)


@case
def groups(group: Group) -> None:
    """A dimension of a mesh is a group; what is none is an error."""
    whole = Whole.make(group, [3, 5])
    with pytest.raises(InputError, match="group: got 'all'; allowed: a ProcessGroup"):
        whole.decode(group="all")
    if group.size != dist.get_world_size():
        return
    only = dist.new_group([0])
    if group.rank:
        with pytest.raises(InputError, match="group: got one without this rank"):
            whole.decode(group=only)
    else:
        alone = Whole.make(Group(group=only, rank=0, size=1), [0, LOCAL_MAX - 1, -1])
        alone.check(*alone.decode())
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "context"))
    with pytest.raises(InputError, match=r"a DeviceMesh of 2 dimensions; .* mesh\['context'\]"):
        whole.decode(group=mesh)
    context = mesh["context"]
    half = Group(group=context.get_group(), rank=context.get_local_rank(), size=2)
    of_mesh = Whole.make(half, [3, 5], seed=mesh["data"].get_local_rank())
    of_mesh.check(*of_mesh.decode(group=context))


def a_rank_that_is_late_or_gone(group: Group) -> None:
    """What failed is named. In the group of all ranks, at the very end."""
    whole = Whole.make(group, [3, 5])
    whole.decode()
    dist.barrier()
    pair = dist.new_group([0, 1], timeout=timedelta(seconds=5))
    if group.rank < 2:
        whole.decode(group=pair)
    if group.rank == 0:
        with pytest.raises(CollectiveError, match=r"all_gather of \d+ bytes among 2 ranks failed"):
            whole.decode(group=pair)
    dist.barrier()
    if group.rank == group.size - 1:
        return
    group.group.get_group_store().set_timeout(timedelta(seconds=2))
    with pytest.raises(CollectiveError, match="agreement among 4 ranks failed"):
        whole.decode(softcap=3.0)
    with pytest.raises(CollectiveError, match=r"all_gather of \d+ bytes among 4 ranks failed"):
        whole.decode()


def _tensor(*lengths: int) -> Tensor:
    return torch.tensor(lengths, dtype=torch.int32)


if __name__ == "__main__":
    serve(a_rank_that_is_late_or_gone)
