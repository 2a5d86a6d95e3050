"""PagedBatch: tables that stay where they are, lengths that grow on the device, pages ahead."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cache_model import captured
from paged_model import DIM, F16, GROUP, HEADS, Told, appending, new_cache, nothing_changed
from torch import Tensor

from gqa_cutlass import InputError, OutOfPagesError
from gqa_cutlass.cache.paged import batch as batch_module
from gqa_cutlass.cache.paged import step as step_module
from gqa_cutlass.cache.paged import storage as storage_module
from gqa_cutlass.cache.paged.batch import PagedBatch


@pytest.fixture(autouse=True)
def instant_decode(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Appends, and attends to nothing; on a GPU it is the kernel that does both."""
    if not request.node.get_closest_marker("gpu"):
        monkeypatch.setattr(step_module, "gqa_decode", appending)


def forward(told: Told, batch: PagedBatch, tokens: list[int]) -> Callable[[], None]:
    """A step of all layers, of a token for each row."""

    def call() -> None:
        with batch.step() as step:
            for layer in told.layers:
                k, v = told.rows(tokens, layer)
                step.decode(layer, k.expand(-1, GROUP * HEADS, -1), k, v)

    return call


def stays(batch: PagedBatch) -> tuple[int, int]:
    return batch.block_table.data_ptr(), batch.seqlens.data_ptr()


def test_rows_without_a_sequence_are_inactive() -> None:
    told = Told(new_cache())
    batch = told.cache.batch(3, 10)
    assert (batch.batch_size, batch.max_seq_len, batch.steps_left) == (3, 12, 0)
    assert batch.block_table.tolist() == [[-1] * 3] * 3 and batch.seqlens.tolist() == [-1] * 3
    where, one, two = stays(batch), told.allocate(6), told.allocate()
    batch.assign([two, one], steps=3)
    assert batch.block_table.tolist() == [[2, -1, -1], [0, 1, 3], [-1] * 3]
    assert batch.seqlens.tolist() == [0, 6, -1]
    batch.assign([one])
    assert batch.block_table.tolist() == [[0, 1, 3], [-1] * 3, [-1] * 3]
    assert batch.seqlens.tolist() == [6, -1, -1] and stays(batch) == where
    assert (batch.sequences, batch.steps_left) == ((one,), 1)
    assert repr(batch) == "PagedBatch(batch_size=3, max_seq_len=12, sequences=[0], steps_left=1)"


def test_lengths_grow_on_the_device_and_pages_are_taken_ahead() -> None:
    told = Told(new_cache(layers=2))
    batch = told.cache.batch(3, 20)
    sequences = [told.allocate(6), told.allocate(3)]
    batch.assign(sequences, steps=2)
    for left in (1, 0):
        tokens = told.new(3)
        (batch.run if left else lambda call: call())(forward(told, batch, tokens))
        told.add(sequences, tokens[:2])
        assert batch.steps_left == left and batch.seqlens.tolist() == [8 - left, 5 - left, -1]
        told.check(), batch.check()
    with nothing_changed(told.cache), pytest.raises(InputError, match="got 1 with pages for 0 mor"):
        batch.run(forward(told, batch, [0, 0, 0]))
    batch.reserve(4)
    told.check(), batch.check()
    assert batch.steps_left == 4 and batch.block_table[0].tolist()[:3] == [0, 1, 4]


def test_a_batch_of_no_sequence_can_be_stepped() -> None:
    """To load the kernels before there is a request."""
    told = Told(new_cache())
    batch = told.cache.batch(2, 8)
    with nothing_changed(told.cache):
        forward(told, batch, [0, 0])()
        batch.run(forward(told, batch, [0, 0]), steps=1)
    assert batch.seqlens.tolist() == [-1, -1] and batch.steps_left == 0


def test_a_captured_step_is_counted_when_it_is_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    told = Told(new_cache())
    batch = told.cache.batch(1, 8)
    sequence, other = told.allocate(2), told.allocate(2)
    batch.assign([sequence], 2)
    with captured(monkeypatch), monkeypatch.context() as patch:
        for module in (batch_module, storage_module):
            patch.setattr(module, "capturing", lambda device: True)
        tokens = told.new(1)
        forward(told, batch, tokens)()
        for call in (
            lambda: batch.assign([sequence]),
            lambda: batch.reserve(1),
            lambda: told.cache.append([other], *told.all_rows([0])),
            lambda: told.cache.step([other]).__enter__(),
            lambda: told.cache.batch(1, 1),
            lambda: told.cache.gather(0, sequence),
        ):
            with pytest.raises(InputError, match="in a CUDA-graph capture: got what no replay"):
                call()
    assert told.cache.length(sequence) == 2 and batch.steps_left == 2
    batch.run(lambda: None)  # what was called above did its work, unlike in a real capture
    told.add([sequence], tokens)
    told.check(), batch.check()


def test_replays_that_were_not_counted_are_found() -> None:
    told = Told(new_cache())
    batch = told.cache.batch(2, 8)
    batch.assign([told.allocate(3)], 2)
    batch.run(lambda: None)
    with pytest.raises(InputError, match=r"seqlens\[0\]: got 3 on the device; allowed: 4"):
        batch.check()


def test_an_error_in_a_step_counts_nothing() -> None:
    told = Told(new_cache(layers=2))
    batch = told.cache.batch(2, 8)
    batch.assign([told.allocate(3)], 2)
    k, v = told.rows([0, 0], 0)
    with pytest.raises(InputError, match=r"PagedBatch.step: layers: got no tokens for \[1\]"):
        with batch.step() as step:
            step.decode(0, k.expand(-1, GROUP * HEADS, -1), k, v)
    assert batch.steps_left == 2
    with pytest.raises(ZeroDivisionError):
        batch.run(lambda: 1 // 0)
    for call in (lambda: batch.run(lambda: None), lambda: batch.step().__enter__()):
        with pytest.raises(InputError, match="an error left in the middle of a step; allowed: on"):
            call()
    told.check(), batch.check()
    batch.reserve(1)
    batch.run(forward(told, batch, tokens := told.new(2)))
    told.add(batch.sequences, tokens[:1])
    told.check(), batch.check()


def test_what_a_batch_holds_is_free_when_it_holds_others_or_is_gone() -> None:
    told = Told(new_cache())
    batch, other = told.cache.batch(2, 8), told.cache.batch(2, 8)
    one, two = told.allocate(3), told.allocate(3)
    batch.assign([one, two])
    with pytest.raises(InputError, match=f"got {one}, which a batch holds"):
        other.assign([one])
    batch.assign([two])
    other.assign([one])
    del other
    told.cache.free(one)
    batch.assign([])
    told.cache.free(two)
    assert told.cache.free_pages == told.cache.num_pages


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda c, b, s: b.assign([s, s]), "sequences: got 0 more than once"),
        (lambda c, b, s: b.assign([7]), "sequence: got 7; allowed: what allocate"),
        (lambda c, b, s: b.assign(s), "sequences: got a int"),
        (lambda c, b, s: b.assign([s, c.fork(s), c.fork(s)]), "sequences: got 3; allowed: up to 2"),
        (lambda c, b, s: b.assign([s], 7), "got a sequence of 2 tokens and 7 steps; allowed: up t"),
        (lambda c, b, s: b.assign([s], -1), "steps: got -1"),
        (lambda c, b, s: b.assign([s], True), "steps: got True"),
        (lambda c, b, s: b.run(lambda: None, 0), "steps: got 0"),
        (lambda c, b, s: c.batch(0, 8), "batch_size: got 0; allowed: an int from 1 to 65535"),
        (lambda c, b, s: c.batch(1, 2**30 + 1), "max_seq_len: got 1073741825"),
    ],
)
def test_what_is_refused_leaves_the_batch_as_it_was(
    call: Callable[..., object], message: str
) -> None:
    told = Told(new_cache())
    batch, sequence = told.cache.batch(2, 8), told.allocate(2)
    with pytest.raises(InputError) as raised:
        call(told.cache, batch, sequence)
    assert message in str(raised.value) and "; allowed: " in str(raised.value)
    assert batch.sequences == () and batch.seqlens.tolist() == [-1, -1]
    assert told.cache.free_pages == told.cache.num_pages - 1


def test_pages_that_are_missing_leave_the_batch_as_it_was() -> None:
    told = Told(new_cache(3, 4))
    batch = told.cache.batch(2, 16)
    one, two = told.allocate(4), told.allocate(3)
    batch.assign([one], 1)
    before: list[Tensor] = [batch.block_table.clone(), batch.seqlens.clone()]
    for call in (lambda: batch.reserve(9), lambda: batch.assign([two, one], 5)):
        with nothing_changed(told.cache), pytest.raises(OutOfPagesError, match="PagedBatch"):
            call()
        assert (batch.sequences, batch.steps_left) == ((one,), 1)
        assert batch.block_table.equal(before[0]) and batch.seqlens.equal(before[1])


# What only a GPU has


@pytest.mark.gpu
def test_a_graph_is_replayed_while_sequences_come_and_go() -> None:
    told = Told(new_cache(40, 4, layers=2, device="cuda"))
    cache = told.cache
    batch = cache.batch(3, 64)
    q = torch.zeros(3, HEADS * GROUP, DIM, dtype=F16, device="cuda")
    new = [told.rows([0, 0, 0], layer) for layer in told.layers]

    def step() -> None:
        with batch.step() as step:
            for layer, (k, v) in enumerate(new):
                step.decode(layer, q, k, v)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    assert batch.seqlens.tolist() == [-1] * 3
    running = [told.allocate(n) for n in (5, 11, 8)]
    for turn in range(12):
        if turn % 4 == 3:
            batch.assign([])
            cache.free(running[0])
            del told.held[running.pop(0)]
            running.append(told.fork(running[0]))
        batch.assign(running, 2)
        for _ in range(2):
            tokens = told.new(3)
            for layer, (k, v) in enumerate(new):
                for tensor, rows in zip((k, v), told.rows(tokens, layer), strict=True):
                    tensor.copy_(rows)
            batch.run(graph.replay)
            told.add(running, tokens)
        batch.check()
        told.check()
    cache.check()


@pytest.mark.gpu
def test_nothing_waits_for_the_gpu() -> None:
    told = Told(new_cache(40, 4, layers=2, device="cuda"))
    cache, batch = told.cache, told.cache.batch(2, 64)
    k, v = told.all_rows(told.new(5))
    q = torch.zeros(2, HEADS * GROUP, DIM, dtype=F16, device="cuda")

    def everything() -> None:
        one, two = cache.allocate(), cache.allocate(9)
        cache.prefill(one, k, v)
        cache.prefill(two, k, v)
        three = cache.fork(one)
        cache.append([one, two, three], k[:, :3], v[:, :3])
        with cache.step([two, three]) as step:
            for layer in range(2):
                step.decode(layer, q, k[layer, :2], v[layer, :2])
        cache.reorder([one, two], [1, 0])
        cache.truncate(one, 3)
        cache.gather(0, one), cache.table([one, two])
        batch.assign([three, one], 3)
        with batch.step() as captured:
            for layer in range(2):
                captured.decode(layer, q, k[layer, :2], v[layer, :2])
        batch.reserve(9)
        batch.assign([])
        cache.free([one, two, three])

    everything()  # kernels are loaded
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(100_000_000)
        everything()
        waited = torch.cuda.current_stream().query()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not waited, "the calls waited for the stream"
    cache.check()
