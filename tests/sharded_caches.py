"""Cases of caches whose tokens ranks share, against caches that are whole; `ranks.py` runs them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from ranks import Group, case, case_for
from torch import Tensor

from gqa_cutlass import CacheAllocationError, CacheOverflowError, InputError, KVCache
from gqa_cutlass.cache.scales import raw
from gqa_cutlass.distributed import ShardedKVCache

BATCH, DIM = 3, 64


@dataclass(frozen=True, kw_only=True)
class Both:
    """The caches of two layers, as this rank's shards and whole, through the same operations.

    Args:
        group: The ranks.
        interleave: Tokens that follow one another on a rank.
        shards: Of the layers.
        wholes: Of the layers.
        generator: The same on all ranks.
    """

    group: Group
    interleave: int
    shards: list[ShardedKVCache]
    wholes: list[KVCache]
    generator: torch.Generator

    @classmethod
    def make(
        cls, group: Group, interleave: int, dtype: torch.dtype = torch.float16, **scales: Any
    ) -> Both:
        room = 5 * group.size * interleave
        sizes = BATCH, room - 1, 1, DIM, dtype, "cpu"
        ranks: dict[str, Any] = {"group": group.group, "interleave": interleave}
        shards = ShardedKVCache.for_layers(2, *sizes, **ranks, **scales)
        assert shards[0].max_seq_len == room and shards[0].k.shape[1] == 5 * interleave
        return cls(
            group=group,
            interleave=interleave,
            shards=shards,
            wholes=KVCache.for_layers(2, BATCH, room, *sizes[2:], **scales),
            generator=torch.Generator().manual_seed(3),
        )

    def random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, DIM, generator=self.generator).half()

    def run(self, method: str, *shapes: tuple[int, ...], **options: Any) -> None:
        """Call a method of every layer, and compare results and what caches hold."""
        for shard, whole in zip(self.shards, self.wholes, strict=True):
            given = [self.random(BATCH, *shape) for shape in shapes]
            got = getattr(shard, method)(*given, **options)
            wanted = getattr(whole, method)(*given, **options)
            assert got is None or torch.allclose(got, wanted, atol=2e-3, rtol=2e-3)
        self.compare()

    def compare(self) -> None:
        one, other = self.shards[0], self.wholes[0]
        assert (one.lengths, one.bound) == (other.lengths, other.bound)
        assert torch.equal(one.seqlens, other.seqlens)
        for shard, whole in zip(self.shards, self.wholes, strict=True):
            for b, length in enumerate(whole.seqlens.tolist()):
                turns = [t // self.interleave % self.group.size for t in range(length)]
                held = [t for t, rank in enumerate(turns) if rank == self.group.rank]
                for mine, all_of_it in zip(shard._held(), whole._held(), strict=True):
                    assert torch.equal(raw(mine)[b, : len(held)], raw(all_of_it)[b, held])


@case
def caches_that_keep_their_lengths(group: Group) -> None:
    """Prompts at any place, in pieces as well, and what sequences are put through after them."""
    for interleave, memory in ((1, 2**26), (3, 1)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("gqa_cutlass.distributed.cache._TEMPORARY_BYTES", memory)
            _work(Both.make(group, interleave))


def _work(both: Both) -> None:
    caches = both.shards[0], both.wholes[0]
    room = caches[0].max_seq_len
    token, prompt = (1,), (2 * room // 3, 1)
    both.run("prefill", prompt, prompt, lengths=[prompt[0], 0, 4])
    both.run("decode", (4,), token, token)
    both.run("prefill", (3, 1), (3, 1), lengths=_int32(2, 0, 3))
    both.run("append", token, token)
    for cache in caches:
        cache.truncate(_int32(9, 2, 1))
        assert cache.refresh() == [9, 2, 1]
    both.run("reorder", indices=[1, 0, 0])
    both.run("decode", (4,), token, token)
    with pytest.raises(CacheOverflowError, match="KVCache.prefill: cache overflow: sequence 1 "):
        caches[0].prefill(*both.random(2, BATCH, room - 9, 1))
    both.run("prefill", (room, 1), (room, 1), lengths=_int32(1, room, 0))
    for cache in caches:
        with pytest.raises(CacheOverflowError, match=r"sequences \[1\] have no room"):
            cache.check()
    with pytest.raises(InputError, match="ShardedKVCache.decode: rows: got .0.; allowed: None, "):
        caches[0].decode(both.random(1, 4), rows=[0])
    with pytest.raises(InputError, match="cache_batch_idx: got an index; allowed: None"):
        caches[0].decode(both.random(1, 4), cache_batch_idx=_int32(0))


@case_for(2, 3)
def drafts_of_which_the_first_stay(group: Group) -> None:
    both = Both.make(group, 2)
    prompt, drafts = (7, 1), (3, 1)
    both.run("prefill", prompt, prompt, lengths=[7, 0, 4])
    for accepted in ([2, 3, 0], _int32(3, 0, 1)):
        both.run("decode", (3, 4), drafts, drafts)
        for cache in both.shards[1], both.wholes[1]:
            cache.accept(accepted)
        both.compare()
    with pytest.raises(InputError, match="no decode of several tokens"):
        both.shards[0].accept(1)
    many = [both.random(BATCH, both.shards[0].max_seq_len + 1, heads) for heads in (4, 1, 1)]
    with pytest.raises(CacheOverflowError, match="ShardedKVCache.decode: cache overflow: sequence"):
        both.shards[0].decode(*many)


@case_for(2)
def caches_of_8_bits(group: Group) -> None:
    """Prompts and tokens are stored as one cache stores them, by the owner's kernel or before."""
    scales = {"k_scale": [0.25, torch.tensor([0.5])], "v_scale": 2.0}
    both = Both.make(group, 2, torch.float8_e4m3fn, **scales)
    prompt, token = (7, 1), (1,)
    both.run("prefill", prompt, prompt, lengths=[7, 0, 4])
    both.run("append", token, token)
    both.run("decode", (4,), token, token)
    with pytest.raises(InputError, match="ShardedKVCache.decode: k_scale: got an option"):
        both.shards[0].decode(both.random(BATCH, 4), k_scale=1.0)


@case_for(2, 3)
def caches_of_8_bits_with_scales_of_tokens(group: Group) -> None:
    """Which are where their tokens are, by whomever they are computed."""
    by_token: dict[str, Any] = {"k_scale": "token", "v_scale": "token"}
    both = Both.make(group, 2, torch.float8_e4m3fn, **by_token)
    prompt, token = (7, 1), (1,)
    both.run("prefill", prompt, prompt, lengths=[7, 0, 4])
    both.run("append", token, token)
    both.run("decode", (4,), token, token)
    both.run("reorder", indices=[1, 0, 0])
    both.run("decode", (4,), token, token)
    tree = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 0, 1]]).bool().expand(BATCH, 3, 3)
    drafts: dict[str, Any]
    for accepted, drafts in (([2, 3, 0], {}), (_int32(3, 0, 1), {"tree_mask": tree})):
        both.run("decode", (3, 4), (3, 1), (3, 1), **drafts)
        for cache in both.shards[1], both.wholes[1]:
            cache.accept(accepted)
        both.compare()
    for cache in both.shards[1], both.wholes[1]:
        cache.truncate(5)
    both.run("prefill", (4, 1), (4, 1))
    sizes = BATCH, both.shards[0].max_seq_len, 1, DIM, torch.float8_e4m3fn
    ranks = {"size": group.size, "interleave": 2}
    told = ShardedKVCache.bytes_needed(*sizes, num_layers=2, **ranks, **by_token)
    held = sum(t.nbytes for shard in both.shards for t in shard._held())
    assert told == held + 3 * BATCH * 4
    with pytest.raises(InputError, match="ShardedKVCache: v_scale: got None; allowed: 'token', as"):
        ShardedKVCache(*sizes, "cpu", group=group.group, k_scale="token")


@case
def memory_that_is_told_before(group: Group) -> None:
    sizes = 8, 1024 * group.size, 2, DIM
    state = 3 * 8 * 4
    of_8_bits = ShardedKVCache.bytes_needed(*sizes, torch.float8_e5m2, size=group.size)
    assert of_8_bits - state == 8 * 1024 * 2 * DIM * 2
    whole = KVCache.bytes_needed(*sizes, num_layers=2) - state
    told = ShardedKVCache.bytes_needed(*sizes, num_layers=2, size=group.size) - state
    assert told == whole // group.size
    with pytest.raises(CacheAllocationError, match="ShardedKVCache: memory: .* max_seq_len up to"):
        ShardedKVCache(60000, 2**24, 8, 128, device="cpu", group=group.group)
    allowed = "ShardedKVCache: interleave: got 0; allowed: an int from 1"
    with pytest.raises(InputError, match=allowed):
        ShardedKVCache(1, 64, 1, DIM, device="cpu", group=group.group, interleave=0)


def _int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)
