"""What is decoded from pages, by one kernel: in ptxsim, and on a GPU."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from compiling import GROUP as GROUP_OF_COMPILING
from paged_model import DIM, F16, GROUP, HEADS, Told, new_cache, nothing_changed
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from gqa_cutlass import CacheOverflowError, PagedKVCache
from gqa_cutlass.cache.paged import batch as batch_module
from gqa_cutlass.cache.paged.batch import PagedBatch
from gqa_cutlass.cache.paged.step import DecodeStep
from gqa_cutlass.proof.reference import attend, errors

ROOM = 24  # no sequence gets longer


class Attended(Told):
    """Random keys and values, and what was decoded from them.

    Attributes:
        asked: Queries, and the lengths, keys and values of the sequences that they were of.
        outs: What the kernel made of them.
    """

    def __init__(self, cache: PagedKVCache) -> None:
        super().__init__(cache)
        torch.manual_seed(0)
        self.random = torch.randn(2, cache.num_layers, 99, HEADS, DIM).to(cache.k[0])
        self.asked: list[tuple[Tensor, int, Tensor, Tensor]] = []
        self.outs: list[Tensor] = []

    def rows(self, tokens: Sequence[int], layer: int) -> tuple[Tensor, Tensor]:
        k, v = self.random[:, layer, list(tokens)]
        return k, v

    def decode(self, step: DecodeStep, sequences: Sequence[int], tokens: list[int]) -> Tensor:
        """A token for each row, of which there may be more than sequences; returns the last lse."""
        q = torch.randn(len(tokens), HEADS * GROUP, DIM).to(self.random)
        for layer in self.layers:
            out, lse = step.decode(layer, q, *self.rows(tokens, layer), return_lse=True)
            for b, sequence in enumerate(sequences):
                held = [*self.held[sequence], tokens[b]]
                k, v = self.rows(held + [0] * (ROOM - len(held)), layer)
                self.asked.append((q[b], len(held), k, v))
                self.outs.append(out[b])
            assert not out[len(sequences) :].any()
        return lse

    def check_outs(self) -> None:
        """All that was decoded so far is right."""
        q, lengths, k, v = zip(*self.asked, strict=True)
        given = torch.stack(q), torch.stack(k), torch.stack(v), list(lengths), DIM**-0.5
        exact, in_f16 = (attend(*given, dtype)[0] for dtype in (torch.double, F16))
        assert errors(torch.stack(self.outs), exact, in_f16).share <= 1


def step_of(told: Attended, sequences: list[int]) -> None:
    tokens = told.new(len(sequences))
    with told.cache.step(sequences) as step:
        told.decode(step, sequences, tokens)
    told.add(sequences, tokens)


def step_in(told: Attended, batch: PagedBatch) -> Tensor:
    tokens = told.new(batch.batch_size)
    with batch.step() as step:
        lse = told.decode(step, batch.sequences, tokens)
    told.add(batch.sequences, tokens[: len(batch.sequences)])
    return lse


def test_every_layer_attends_to_what_its_sequences_hold(device: str) -> None:
    """As they fork inside of a page, open pages, are put in another order, and go."""
    told = Attended(new_cache(16, 4, layers=2, device=device))
    parent, short = told.allocate(6), told.allocate(3)
    child = told.fork(parent)
    step_of(told, [child, parent, short])
    told.cache.reorder([parent, child], [1, 0])
    told.held[parent], told.held[child] = told.held[child], told.held[parent]
    step_of(told, [short, child, parent])
    told.cache.free(short)
    del told.held[short]
    told.cache.truncate(child, 5)
    del told.held[child][5:]
    step_of(told, [told.allocate(), child, parent])
    told.check()
    told.check_outs()
    told.cache.check()


def test_a_batch_decodes_its_rows_and_leaves_the_others(device: str) -> None:
    told = Attended(new_cache(16, 4, device=device))
    batch = told.cache.batch(3, ROOM)
    with nothing_changed(told.cache):
        lse = step_in(told, batch)
    assert lse.eq(-torch.inf).all()
    prefix = told.allocate(6)
    batch.assign([told.fork(prefix), told.fork(prefix)], steps=3)
    for _ in range(3):
        lse = step_in(told, batch)
        assert lse[:2].isfinite().all() and lse[2].eq(-torch.inf).all()
    told.check(), batch.check()
    told.check_outs()


@pytest.mark.xdist_group(GROUP_OF_COMPILING)
def test_compiled_code_decodes_the_same(device: str) -> None:
    """In one graph, which serves later steps as well."""
    told, other = (Attended(new_cache(16, 4, layers=2, device=device)) for _ in range(2))
    counter = CompileCounter()

    def forward(step: DecodeStep, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        for layer in range(2):
            q = step.decode(layer, q, k[layer], v[layer]) * 2
        return q

    torch._dynamo.reset()
    compiled = torch.compile(forward, backend=counter, fullgraph=True)
    sequences = [told.allocate(9), told.allocate(10)]
    beside = [other.allocate(9), other.allocate(10)]
    for _ in range(2):
        tokens = told.new(2)
        q = torch.randn(2, HEADS * GROUP, DIM).to(told.random)
        with told.cache.step(sequences) as step, other.cache.step(beside) as eager:
            given = q, *told.all_rows(tokens)
            assert torch.equal(compiled(step, *given), forward(eager, *given))
        told.add(sequences, tokens)
    told.check()
    assert counter.frame_count == 1


def test_replays_beyond_what_was_reserved_write_to_no_page(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replays that nobody counts, here steps that are not: the device finds out."""
    told = Attended(new_cache(16, 4, device=device))
    batch = told.cache.batch(3, ROOM)
    batch.assign([told.allocate(2)], steps=1)
    told.allocate(5)
    monkeypatch.setattr(batch_module, "capturing", lambda where: True)
    (k, v), q = told.rows([1, 2, 3], 0), torch.ones(3, HEADS * GROUP, DIM).to(told.random)

    def step() -> Tensor:
        with batch.step() as step:
            return step.decode(0, q, k, v)

    assert step().isfinite().all() and step().isfinite().all()  # its page has 4 rows
    with nothing_changed(told.cache):
        out = step()
    assert out[0].isnan().all() and not out[1:].any()
    with pytest.raises(CacheOverflowError, match="block_table"):
        told.cache.check()
    told.check(1)
