"""Steps of several tokens that are decoded, and `accept`, which keeps some of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cache_model import captured
from compiling import GROUP as GROUP_OF_COMPILING
from paged_model import DIM, F16, GROUP, HEADS, Told, appending, new_cache, nothing_changed
from torch import Tensor

from gqa_cutlass import CacheOverflowError, InputError, OutOfPagesError, gqa_decode
from gqa_cutlass.cache.paged import batch as batch_module
from gqa_cutlass.cache.paged import step as step_module
from gqa_cutlass.cache.paged import storage as storage_module
from gqa_cutlass.cache.paged.batch import PagedBatch
from gqa_cutlass.cache.paged.step import DecodeStep


@pytest.fixture
def instant_decode(monkeypatch: pytest.MonkeyPatch) -> None:
    """Appends, and attends to nothing."""
    monkeypatch.setattr(step_module, "gqa_decode", appending)


def new_rows(told: Told, tokens: list[int], layer: int, count: int) -> tuple[Tensor, Tensor]:
    """Keys and values of so many tokens of each, [batch, count, heads, dim]."""
    k, v = (t.unflatten(0, (-1, count)) for t in told.rows(tokens, layer))
    return k, v


def drafted(told: Told, sequences: list[int], count: int, **options: Any) -> None:
    """Decode so many tokens of each."""
    tokens = told.new(count * len(sequences))
    with told.cache.step(sequences, count) as step:
        for layer in told.layers:
            k, v = new_rows(told, tokens, layer, count)
            step.decode(layer, k.expand(-1, -1, GROUP, -1), k, v, **options)
    told.draft(sequences, tokens)


# What is decoded


class Random(Told):
    """Keys and values that differ in all of their numbers."""

    def rows(self, tokens: Any, layer: int) -> tuple[Tensor, Tensor]:
        torch.manual_seed(layer)
        k, v = torch.randn(2, 99, HEADS, DIM).to(self.cache.k[0])[:, list(tokens)]
        return k, v


def test_every_layer_attends_as_it_does_without_pages(device: str) -> None:
    """Tokens that cross the edge of a page, of sequences of any length, one of them shared."""
    told = Random(new_cache(16, 4, layers=2, device=device))
    parent = told.allocate(6)
    sequences = [told.fork(parent), told.allocate(3), told.allocate()]
    for count, kept in ((5, [2, 5, 0]), (3, [3, 0, 1])):
        tokens = told.new(3 * count)
        before = [told.cache.length(s) for s in sequences]
        q = torch.randn(3, count, HEADS * GROUP, DIM).to(told.cache.k[0])
        with told.cache.step(sequences, count) as step:
            outs = [
                step.decode(layer, q, *new_rows(told, tokens, layer, count)) for layer in (0, 1)
            ]
            again = [step.decode(layer, q) for layer in (0, 1)]
        told.draft(sequences, tokens)
        told.check()
        for layer in told.layers:
            assert torch.equal(outs[layer], again[layer])
            for b, sequence in enumerate(sequences):
                k, v = (t[None] for t in told.rows(told.held[sequence], layer))
                held = before[b] + count
                expected = gqa_decode(q[b : b + 1], k, v, cache_seqlens=held)
                assert torch.allclose(outs[layer][b : b + 1], expected, atol=2e-3)
        told.cache.accept(sequences, kept)
        told.keep(sequences, kept)
        told.check()
    assert [told.cache.length(s) for s in sequences] == [11, 8, 1]
    told.cache.check()


def test_a_cache_of_one_layer_decodes_several_in_one_call(device: str) -> None:
    told = Random(new_cache(16, 4, device=device))
    sequences, tokens = [told.allocate(6), told.allocate()], told.new(6)
    k, v = new_rows(told, tokens, 0, 3)
    out = told.cache.decode(sequences, k.expand(-1, -1, GROUP, -1).contiguous(), k, v)
    told.draft(sequences, tokens)
    assert out.shape == (2, 3, GROUP * HEADS, DIM) and out.isfinite().all()
    told.cache.decode(sequences, k[:, 0].expand(-1, GROUP, -1).contiguous())  # adds nothing
    told.cache.accept(sequences, [1, 3])
    told.keep(sequences, [1, 3])
    told.check()


@pytest.mark.xdist_group(GROUP_OF_COMPILING)
def test_compiled_code_decodes_several(device: str) -> None:
    told, other = (Random(new_cache(16, 4, layers=2, device=device)) for _ in range(2))

    def forward(step: DecodeStep, q: Tensor, k: list[Tensor], v: list[Tensor]) -> Tensor:
        for layer in range(2):
            q = step.decode(layer, q, k[layer], v[layer]) * 2
        return q

    torch._dynamo.reset()
    compiled = torch.compile(forward, backend="eager", fullgraph=True)
    sequences, tokens = [told.allocate(6), told.allocate(3)], [0, 1, 2, 3]
    beside = [other.allocate(6), other.allocate(3)]
    k, v = zip(*(new_rows(told, tokens, layer, 2) for layer in (0, 1)), strict=True)
    q = torch.randn(2, 2, GROUP * HEADS, DIM).to(told.cache.k[0])
    with told.cache.step(sequences, 2) as step, other.cache.step(beside, 2) as eager:
        assert torch.equal(compiled(step, q, [*k], [*v]), forward(eager, q, [*k], [*v]))
    for cache, held in ((told.cache, sequences), (other.cache, beside)):
        cache.accept(held, 1)
        assert [cache.length(s) for s in held] == [7, 4]
    torch._dynamo.reset()


# Pages


def test_pages_are_taken_for_all_tokens_or_none(instant_decode: None) -> None:
    told = Told(new_cache(5, 4, layers=2))
    sequences = [told.allocate(4), told.allocate(7)]
    with nothing_changed(told.cache), pytest.raises(OutOfPagesError, match="got 3 to .* 1 missing"):
        drafted(told, sequences, 5)
    drafted(told, sequences, 4)
    assert told.cache.free_pages == 0
    told.cache.accept(sequences, [0, 1])
    told.keep(sequences, [0, 1])
    told.check()
    assert told.cache.free_pages == 2 and [len(told.cache.pages(s)) for s in sequences] == [1, 2]


def test_pages_that_were_reserved_stay(instant_decode: None) -> None:
    told = Told(new_cache())
    sequence = told.allocate(2)
    told.cache.reserve([sequence], 7)
    drafted(told, [sequence], 8)
    told.cache.accept([sequence], 0)
    told.keep([sequence], [0])
    assert len(told.cache.pages(sequence)) == 3
    drafted(told, [sequence], 8)
    told.cache.reserve([sequence], 9)
    told.cache.accept([sequence], 1)
    told.keep([sequence], [1])
    assert len(told.cache.pages(sequence)) == 5
    told.check()


def test_the_window_goes_on_with_what_is_accepted(instant_decode: None) -> None:
    """Until then it keeps what the next step needs, if none is."""
    told = Told(new_cache(12, 1, layers=2, window=4))
    cache, sequence = told.cache, told.allocate(6)
    assert cache.freed(sequence) == 2
    drafted(told, [sequence], 3, window_size=(3, 0))
    assert cache.freed(sequence) == 2
    cache.accept([sequence], 1)
    told.keep([sequence], [1])
    assert cache.freed(sequence) == 3 and cache.length(sequence) == 7
    told.check()
    drafted(told, [sequence], 3, window_size=(3, 0))
    child = told.fork(sequence)  # has no drafts, and so leaves what is before its window
    assert (cache.freed(sequence), cache.freed(child)) == (3, 6)
    told.append(sequence)  # all are accepted
    assert cache.freed(sequence) == 7
    told.check()


def test_several_queries_see_no_further_back_than_the_window(instant_decode: None) -> None:
    told = Told(new_cache(12, 1, window=4))
    sequence = told.allocate(9)
    q = told.rows([0] * 3, 0)[0].expand(-1, GROUP, -1)[None]
    with (
        nothing_changed(told.cache),
        pytest.raises(InputError, match=r"allowed: \(1, 0\) and less"),
    ):
        told.cache.decode([sequence], q, window_size=(2, 0))
    told.cache.decode([sequence], q, window_size=(1, 0))


# What is refused


BAD: dict[str, tuple[Callable[[Told, int], object], str]] = {
    "more than there are": (lambda t, s: t.cache.accept([s], 4), "tokens: got 4; allowed: an int"),
    "negative": (lambda t, s: t.cache.accept([s], [-1]), "tokens: got -1"),
    "too many": (lambda t, s: t.cache.accept([s], [1, 1]), "tokens: got 2 ints; allowed: 1"),
    "another": (lambda t, s: t.cache.accept([s, s + 1], 1), "sequence: got a sequence without dra"),
    "twice": (lambda t, s: t.cache.accept([s, s], 1), "sequences: got 0 more than once"),
}


@pytest.mark.parametrize("kind", BAD)
def test_numbers_that_are_not_allowed_change_nothing(kind: str, instant_decode: None) -> None:
    call, message = BAD[kind]
    told = Told(new_cache())
    sequence, _ = told.allocate(2), told.allocate(2)
    drafted(told, [sequence], 3)
    with nothing_changed(told.cache), pytest.raises(InputError, match=message):
        call(told, sequence)
    told.cache.accept([sequence], 3)
    told.keep([sequence], [3])
    told.check()


BETWEEN: dict[str, Callable[[Told, int], object]] = {
    "accept": lambda t, s: t.cache.accept([s], 2),
    "append": lambda t, s: t.append(s),
    "prefill": lambda t, s: t.cache.prefill(s, *t.all_rows([1, 2])),
    "truncate": lambda t, s: t.cache.truncate(s, 9),
    "reorder": lambda t, s: t.cache.reorder([s, s + 1], [1, 0]),
}


@pytest.mark.parametrize("kind", BETWEEN)
def test_drafts_are_accepted_once_and_before_anything_else(kind: str, instant_decode: None) -> None:
    told = Told(new_cache())
    sequence, _ = told.allocate(2), told.allocate(2)
    drafted(told, [sequence], 3)
    BETWEEN[kind](told, sequence)
    with nothing_changed(told.cache), pytest.raises(InputError, match="without drafts to accept"):
        told.cache.accept([sequence], 0)


def test_a_step_and_its_keys_have_as_many_tokens(instant_decode: None) -> None:
    told = Told(new_cache())
    sequences = [told.allocate(2), told.allocate(2)]
    k, v = new_rows(told, [0] * 6, 0, 3)
    for tokens, text in ((2, r"\[2, 2\]"), ([3, 2], r"\[3, 2\]"), (1, r"\[1, 1\]")):
        match = f"k: got 3 tokens of each sequence in a step of {text} tokens"
        with nothing_changed(told.cache), pytest.raises(InputError, match=match):
            with told.cache.step(sequences, tokens) as step:
                step.decode(0, k.expand(-1, -1, GROUP, -1), k, v)


def test_tokens_without_a_position_are_refused(instant_decode: None) -> None:
    told = Told(new_cache())
    batch, sequence = told.cache.batch(1, 16, tokens=3), told.allocate(4)
    k, v = new_rows(told, [0] * 3, 0, 3)
    given = 0, k.expand(-1, -1, GROUP, -1), k, v
    turns = torch.zeros(6, DIM // 2)
    batch.assign([other := told.allocate(4)], 1)
    for step in (told.cache.step([sequence], 3), batch.step()):
        with (
            nothing_changed(told.cache),
            pytest.raises(
                CacheOverflowError,
                match="rotary_cos: got 6 positions, where a sequence holds 4 tok",
            ),
            step as opened,
        ):
            opened.decode(*given, rotary_cos=turns, rotary_sin=turns)
    assert told.cache.length(other) == 4


# Batches


def forward(told: Told, batch: PagedBatch, tokens: list[int]) -> Callable[[], None]:
    def call() -> None:
        with batch.step() as step:
            for layer in told.layers:
                k, v = new_rows(told, tokens, layer, batch.tokens)
                step.decode(layer, k.expand(-1, -1, GROUP * HEADS, -1), k, v)

    return call


def test_steps_of_a_batch_add_several_tokens(instant_decode: None) -> None:
    told = Told(new_cache(16, 4, layers=2))
    cache, batch = told.cache, told.cache.batch(3, 24, tokens=4)
    sequences = [told.allocate(6), told.allocate(3)]
    batch.assign(sequences, steps=2)
    assert batch.steps_left == 2 and [len(cache.pages(s)) for s in sequences] == [4, 3]
    where = batch.block_table.data_ptr(), batch.seqlens.data_ptr()
    for kept, left in (([1, 0], 2), ([4, 2], 1)):
        tokens = told.new(12)
        batch.run(forward(told, batch, tokens))
        told.draft(sequences, tokens[:8])
        told.check(), batch.check()
        batch.accept(kept)
        told.keep(sequences, kept)
        told.check(), batch.check()
        assert batch.steps_left == left
    assert batch.seqlens.tolist() == [11, 5, -1]
    assert where == (batch.block_table.data_ptr(), batch.seqlens.data_ptr())
    for bad, match in (
        (lambda: batch.accept(1), "without drafts to accept"),
        (lambda: cache.accept(sequences, 1), "which a batch holds"),
        (lambda: batch.reserve(4), "a sequence of 11 tokens and 4 steps of 4; allowed: up to 24"),
        (lambda: cache.batch(1, 8, tokens=0), "tokens: got 0; allowed: an int from 1 to 256"),
    ):
        with nothing_changed(cache), pytest.raises(InputError, match=match):
            bad()
        assert batch.seqlens.tolist() == [11, 5, -1]


def test_replays_of_several_steps_leave_the_drafts_of_the_last(instant_decode: None) -> None:
    told = Told(new_cache())
    batch = told.cache.batch(1, 16, tokens=3)
    batch.assign([sequence := told.allocate(2)], steps=2)
    first, second = told.new(3), told.new(3)

    def twice() -> None:
        for tokens in (first, second):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(batch_module, "capturing", lambda where: True)
                forward(told, batch, tokens)()

    batch.run(twice, steps=2)
    told.draft([sequence], first), told.draft([sequence], second)
    with pytest.raises(InputError, match="tokens: got 4; allowed: an int from 0 to 3"):
        batch.accept(4)
    batch.accept(1)
    told.keep([sequence], [1])
    told.check(), batch.check()


def test_a_graph_cannot_hold_accept(monkeypatch: pytest.MonkeyPatch, instant_decode: None) -> None:
    """The host must know what is kept, for it gives out the pages."""
    told = Told(new_cache())
    batch = told.cache.batch(1, 8, tokens=2)
    batch.assign([told.allocate(2)])
    forward(told, batch, told.new(2))()
    with captured(monkeypatch), monkeypatch.context() as patch:
        patch.setattr(storage_module, "capturing", lambda device: True)
        with pytest.raises(InputError, match="PagedBatch.accept: in a CUDA-graph capture"):
            batch.accept(1)
    batch.accept(1)
    assert batch.seqlens.tolist() == [3]


@pytest.mark.gpu
def test_a_graph_of_drafts_is_replayed_and_some_are_accepted() -> None:
    told = Told(new_cache(40, 4, layers=2, device="cuda"))
    batch = told.cache.batch(3, 64, tokens=4)
    q = torch.zeros(3, 4, HEADS * GROUP, DIM, dtype=F16, device="cuda")
    new = [new_rows(told, [0] * 12, layer, 4) for layer in told.layers]

    def step() -> None:
        with batch.step() as step:
            for layer, (k, v) in enumerate(new):
                step.decode(layer, q, k, v)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    sequences = [told.allocate(5), told.allocate(8)]
    batch.assign(sequences, 2)
    for kept in ([1, 4], [0, 2], [3, 3]):
        tokens = told.new(12)
        for layer, pair in enumerate(new):
            for tensor, rows in zip(pair, new_rows(told, tokens, layer, 4), strict=True):
                tensor.copy_(rows)
        batch.run(graph.replay)
        told.draft(sequences, tokens[:8])
        batch.accept(kept)
        told.keep(sequences, kept)
        batch.check()
        told.check()
        batch.reserve(2)
    told.cache.check()
