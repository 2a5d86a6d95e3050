"""The ranks' parts of a step, one after the other in one process, merged; and captured on a GPU."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import THOROUGH
from torch import Tensor

from gqa_cutlass import (
    CacheOverflowError,
    InputError,
    check_overflow,
    merge_states,
)
from gqa_cutlass.cache.scales import Scales, raw
from gqa_cutlass.call.stored import SCALES as NAMES
from gqa_cutlass.call.stored import of_tokens
from gqa_cutlass.distributed import agreement, decode_context_parallel
from gqa_cutlass.distributed.exchange import Part
from gqa_cutlass.distributed.groups import Ranks
from gqa_cutlass.distributed.local import attend, here_of
from gqa_cutlass.distributed.settle import key_of, settle, terms_of
from gqa_cutlass.proof.reference import attend as reference
from gqa_cutlass.proof.reference import errors, scale_of_row, stored

ASKED = {"interleave": 1, "q_heads": "whole", "exchange": None, "return_lse": True}
SIZE, LOCAL_MAX, BATCH, HEADS, KV_HEADS, DIM = 3, 8, 4, 12, 3, 64
CAPACITY = SIZE * LOCAL_MAX


@dataclass(frozen=True, kw_only=True)
class Case:
    """A step over shards.

    Args:
        queries: Of each sequence; 0 for q without a dimension of tokens.
        new: New tokens, likewise; None for none.
        interleave: Tokens that follow one another on a rank.
        features: Options, by name.
        length: Of all sequences, as an int; None for some on the device.
    """

    queries: int = 0
    new: int | None = 0
    interleave: int = 1
    features: dict[str, Any] = field(default_factory=dict)
    length: int | None = None

    @property
    def added(self) -> int:
        """New tokens of a sequence."""
        return 0 if self.new is None else max(self.new, 1)

    @property
    def lengths(self) -> list[list[int]]:
        """Those of sequences: empty, full after the step, inactive, and where ownership changes."""
        if self.length is not None:
            return [[self.length] * BATCH]
        full = CAPACITY - self.added
        if max(self.queries, self.added) > 1:
            return [[0, full, -1, 10]]
        return [[0, 1, 2, full], [9, -1, 10, 11]]


SLOPES = torch.linspace(0.01, 0.4, HEADS)
SINKS = torch.linspace(-1, 2, HEADS)
PADDING = torch.tensor([0, 1, 2, 3], dtype=torch.int32)
SCALES = {"k_scale": torch.tensor([0.5, 0.7, 0.02]), "v_scale": 0.4}
OF_TOKENS = {
    name: torch.rand(BATCH, CAPACITY, KV_HEADS, generator=torch.Generator().manual_seed(i)) + 0.1
    for i, name in enumerate(NAMES)
}
TREE = torch.rand(BATCH, 5, 5, generator=torch.Generator().manual_seed(1)) < 0.5
CASES = {
    "window-sinks": Case(features={"window_size": (7, -1), "sinks": SINKS}),
    "alibi": Case(features={"alibi_slopes": SLOPES}),
    "fp8": Case(features=SCALES),
    "five-interleave": Case(
        queries=5, new=5, interleave=2, features={"sinks": SINKS, "cache_leftpad": PADDING}
    ),
    "five-length": Case(queries=5, new=5, length=7),
    "five-attend": Case(queries=5, new=None, interleave=4),
    "not-causal": Case(queries=3, new=3, features={"causal": False}),
    "fewer-queries": Case(queries=0, new=4),
    "more-queries": Case(queries=4, new=0),
    "fp8-several": Case(queries=3, new=3, interleave=2, features=SCALES),
    "tree": Case(queries=5, new=5, interleave=2, features={"tree_mask": TREE}),
    "fp8-tokens": Case(features=OF_TOKENS | {"cache_leftpad": PADDING}),
    "fp8-tokens-several": Case(queries=3, new=3, interleave=2, features=OF_TOKENS),
    "fp8-tokens-fewer": Case(queries=2, new=5, features=OF_TOKENS | {"causal": False}),
    "fp8-tokens-tree": Case(queries=5, new=5, features=OF_TOKENS | {"tree_mask": TREE}),
}

# On a GPU all; of those that CI leaves out, it has another one of each feature and kernel.
LEFT_TO_GPUS = ("alibi", "fp8", "five-length", "fp8-tokens", "fp8-tokens-fewer", "fp8-tokens-tree")
NAMES_OF_CASES = [pytest.param(n, marks=THOROUGH if n in LEFT_TO_GPUS else ()) for n in CASES]


class Parts:
    """A step, and its ranks' shards of the caches."""

    def __init__(self, device: str, case: Case) -> None:
        def random(*shape: int) -> Tensor:
            return torch.randn(shape).half().to(device)

        torch.manual_seed(5)
        self.case = case
        self.features = {
            name: value.clone().to(device) if isinstance(value, Tensor) else value
            for name, value in case.features.items()
        }
        self.caches = random(2, BATCH, CAPACITY, KV_HEADS, DIM)
        if "k_scale" in self.features:
            self.caches = self.caches.to(torch.float8_e4m3fn)
        self.held = [
            [t for t in range(CAPACITY) if t // case.interleave % SIZE == rank]
            for rank in range(SIZE)
        ]
        self.shards = [raw(self.caches)[:, :, held].view(self.caches.dtype) for held in self.held]
        self.of_tokens = {
            name: scale
            for name in NAMES
            if isinstance(scale := self.features.get(name), Tensor) and of_tokens(scale.shape)
        }
        self.scales = [
            {name: scale[:, held].contiguous() for name, scale in self.of_tokens.items()}
            for held in self.held
        ]
        self.q = random(BATCH, *(case.queries,) * (case.queries > 0), HEADS, DIM)
        new = () if case.new is None else (case.new,) * (case.new > 0)
        self.new = random(2, BATCH, *new, KV_HEADS, DIM)
        self.lengths = torch.zeros(BATCH, dtype=torch.int32, device=device)
        asked = ASKED | {"interleave": case.interleave}
        self.settled = [
            settle(Ranks(group=None, rank=rank, size=SIZE), self.given(rank), self.asked, asked,  # type: ignore[arg-type]
                   self.features | self.scales[rank])
            for rank in range(SIZE)
        ]  # fmt: skip

    @property
    def of_heads(self) -> Scales:
        """Those that the call is given, where tokens have none."""
        return Scales(**{name: self.features.get(name) for name in NAMES})

    @property
    def asked(self) -> int | Tensor:
        """The lengths, as a call is given them."""
        return self.lengths if self.case.length is None else self.case.length

    def given(self, rank: int) -> tuple[Tensor | None, ...]:
        new = (None, None) if self.case.new is None else self.new
        return self.q, *self.shards[rank], *new

    def step(self) -> tuple[Tensor, Tensor]:
        """What every rank does, and the merge: [batch * tokens, heads, dim], and log-sum-exps."""
        parts = [Part.empty(tuple(self.q.shape), self.q.device) for _ in range(SIZE)]
        for rank, part in enumerate(parts):
            here = here_of(self.settled[rank], self.asked, self.features.get("cache_leftpad"))
            with self.settled[rank].flag.kept():
                features = self.features | self.scales[rank]
                attend(self.settled[rank], self.given(rank), here, features, part)
        outs, lses = [part.out for part in parts], [part.lse for part in parts]
        return merge_states(outs, lses, out_dtype=self.q.dtype)

    def check(self, out: Tensor, lse: Tensor) -> None:
        """Hold a step to the error rule, and shards to what was appended to them."""
        after = self.append()
        active = [b for b, length in enumerate(after) if length >= 0]
        idle = [b for b, length in enumerate(after) if length < 0]
        tokens = max(self.case.queries, 1)
        out = out.view(BATCH, tokens, HEADS, DIM)
        lse = lse.view(BATCH, tokens, HEADS)
        of_sequences = {"cache_leftpad", "tree_mask", *self.of_tokens}
        features = {
            name: value[active] if name in of_sequences else value
            for name, value in self.features.items()
        }
        k, v = (cache[active] for cache in self.caches)
        given = self.q[active], k, v, [after[b] for b in active], DIM**-0.5
        expected, sums = reference(*given, torch.float64, **features)
        in_torch, _ = reference(*given, torch.float16, **features)
        shape = expected.view(-1, tokens, HEADS, DIM).shape
        found = errors(out[active], expected.view(shape), in_torch.view(shape))
        assert found.share <= 1, found
        sums = sums.view(-1, HEADS, tokens).mT
        assert torch.allclose(lse[active].double(), sums, rtol=1e-3, atol=1e-3)
        if "sinks" not in features:
            assert not out[idle].any() and bool((lse[idle] == -math.inf).all())
        for held, shard, scales in zip(self.held, self.shards, self.scales, strict=True):
            assert torch.equal(raw(shard), raw(self.caches)[:, :, held])
            for name, scale in scales.items():
                assert torch.equal(scale, self.of_tokens[name][:, held])

    def append(self) -> list[int]:
        """Append the new tokens to the caches in one place; returns the lengths then."""
        lengths: list[int] = self.lengths.tolist()
        if self.case.new is None:
            return lengths
        for side, cache, new in zip("kv", self.caches, self.new, strict=True):
            rows, scale = new.view(BATCH, -1, KV_HEADS, DIM), self.of_tokens.get(f"{side}_scale")
            if scale is None:
                ((_, kept),) = self.of_heads.stored(cache, side, rows)
            else:
                own = scale_of_row(rows, cache.dtype)
                kept = raw(stored(rows, own.unsqueeze(-1), cache.dtype))
            for b, length in enumerate(lengths):
                if length >= 0:
                    raw(cache)[b, length : length + self.case.added] = kept[b]
                    if scale is not None:
                        scale[b, length : length + self.case.added] = own[b]
        return [length + self.case.added if length >= 0 else length for length in lengths]


@pytest.mark.parametrize("name", NAMES_OF_CASES)
def test_parts_make_the_step(device: str, name: str) -> None:
    parts = Parts(device, CASES[name])
    for lengths in parts.case.lengths:
        parts.lengths.copy_(torch.tensor(lengths))
        parts.check(*parts.step())


@pytest.mark.parametrize("new", [2, CAPACITY + 1])
def test_several_tokens_without_room_are_written_on_no_rank(device: str, new: int) -> None:
    parts = Parts(device, Case(queries=2, new=new))
    before = [shard.clone() for shard in parts.shards]
    parts.lengths.copy_(torch.tensor([CAPACITY - 1, CAPACITY, -1, 2**31 - 1]))
    out, lse = (t.view(BATCH, -1) for t in parts.step())
    for rows in out, lse:
        assert [bool(row.isnan().all()) for row in rows] == [True, True, False, True]
    assert all(map(torch.equal, before, parts.shards))
    with pytest.raises(CacheOverflowError):
        check_overflow(device)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["window-sinks", "five-interleave", "tree", "fp8-several"])
def test_a_captured_step_follows_the_lengths(name: str) -> None:
    parts = Parts("cuda", CASES[name])
    parts.check(*parts.step())  # which appends the token to the caches in one place, too
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = parts.step()
    for lengths in parts.case.lengths:
        parts.lengths.copy_(torch.tensor(lengths))
        graph.replay()
        parts.check(out, lse)


@pytest.fixture
def alone() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
def test_a_layout_is_agreed_on_once_and_not_in_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    agreed = []
    agree = agreement.agree
    monkeypatch.setattr(agreement, "agree", lambda *given: agreed.append(given) or agree(*given))
    caches = torch.zeros(2, 1, 8, 1, DIM).half()
    q, k = torch.zeros(1, 4, DIM).half(), torch.zeros(1, 1, DIM).half()
    lengths = torch.zeros(1, dtype=torch.int32)
    mesh = dist.init_device_mesh("cpu", (1,))
    for group in (None, None, dist.group.WORLD, mesh):
        decode_context_parallel(q, *caches, k, k, cache_seqlens=lengths, group=group)
    assert len(agreed) == 1
    monkeypatch.setattr(agreement, "capturing", lambda device: True)
    decode_context_parallel(q, *caches, k, k, cache_seqlens=lengths)
    with pytest.raises(InputError, match="in a CUDA-graph capture; .* once before the capture"):
        decode_context_parallel(q, *caches, k, k, cache_seqlens=lengths, softcap=2.0)


def test_ranks_may_have_other_numbers_of_pages_with_scales_of_tokens() -> None:
    """Nothing that they compare says how many, nor what a rank takes for a layout that it knows."""
    found = []
    for pages in (4, 9):
        pools = torch.zeros(2, pages, 8, 1, DIM).to(torch.float8_e4m3fn)
        scale = torch.ones(pages, 8, 1)
        given = torch.zeros(2, 4, DIM).half(), *pools, None, None
        table = torch.zeros(2, 3, dtype=torch.int32)
        options = {"block_table": table, "k_scale": scale, "v_scale": scale.clone()}
        lengths = torch.zeros(2, dtype=torch.int32)
        found.append([make(given, lengths, ASKED, options) for make in (key_of, terms_of)])
    assert found[0] == found[1] and found[0][0] is not None
    assert "pages of [8, 1], torch.float32 on cpu" in str(found[0][1])
