"""Caches that keep a window: what they attend to, beside caches that keep all."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from cache_model import DIM, F16, GROUP, HEADS, captured, nothing_written, on_device
from compiling import GROUP as COMPILING
from helpers import few
from torch import Tensor

from gqa_cutlass import CacheAllocationError, CacheOverflowError, InputError, KVCache
from gqa_cutlass.cache import allocation, ring, rows
from gqa_cutlass.cache.scales import raw
from gqa_cutlass.proof.reference import attend, errors

WINDOW, TOKENS, ROOM = 20, 4, 320
SLOTS = 48  # 19 + 2 * 4 + 15, in pages of 16


class Twins:
    """Caches with windows, and for each one that is told the same, and keeps all of it.

    Args:
        windows: Of the layers.
        batch: Sequences.
        device: Where.
        **options: Of the caches.
    """

    def __init__(
        self,
        windows: Sequence[int | None] = (WINDOW,),
        batch: int = 2,
        device: str = "cpu",
        **options: Any,
    ) -> None:
        sizes = len(windows), batch, ROOM, HEADS, DIM, options.pop("dtype", F16), device
        self.windows = windows
        self.caches = KVCache.for_layers(
            *sizes, window=list(windows), tokens_per_call=TOKENS, **options
        )
        self.whole = KVCache.for_layers(*sizes, **options)
        self.batch, self.device = batch, device

    @property
    def lengths(self) -> list[int]:
        found: list[int] = self.whole[0].seqlens.tolist()
        assert self.caches[0].seqlens.tolist() == found
        return found

    def tokens(self, count: int, batch: int | None = None) -> tuple[Tensor, Tensor]:
        shape = batch or self.batch, count, HEADS, DIM
        k, v = (torch.randn(shape).half().to(self.device) for _ in "kv")
        return k, v

    def prefill(self, counts: list[int], on_host: bool = True) -> None:
        given: Any = counts if on_host else on_device(self.whole[0], *counts)
        for pair in zip(self.caches, self.whole, strict=True):
            k, v = self.tokens(max(counts))
            for cache in pair:
                cache.prefill(k, v, given)

    def append(self) -> None:
        for pair in zip(self.caches, self.whole, strict=True):
            k, v = self.tokens(1)
            for cache in pair:
                cache.append(k, v)

    def decode(
        self, count: int = 1, some: list[int] | None = None, *, given: Any = None, new: bool = True
    ) -> None:
        """Every layer's output is right: what its window of all that was ever given comes to."""
        named = list(range(self.batch)) if some is None else some
        added = [count * (b in named) * new for b in range(self.batch)]
        held = [self.lengths[b] + added[b] for b in named]
        for ours, whole, size in zip(self.caches, self.whole, self.windows, strict=True):
            q = torch.randn(len(named), count, HEADS * GROUP, DIM).half().to(self.device)
            k, v = self.tokens(count)
            appended = (k[named], v[named]) if new else ()
            out = ours.decode(q, *appended, rows=given)
            whole.prefill(k, v, added)
            right = q, whole.k[named], whole.v[named], held, DIM**-0.5
            window = (size - 1, 0) if size else (-1, -1)
            exact, typed = (
                attend(*right, dtype, window_size=window)[0] for dtype in (torch.double, F16)
            )
            assert errors(out, exact, typed).share <= 1

    def accept(self, kept: list[int], on_host: bool = True) -> None:
        """Of the drafts that were decoded just now."""
        before = [n - TOKENS for n in self.lengths]
        self.caches[0].accept(kept if on_host else on_device(self.caches[0], *kept))
        self.whole[0].truncate([n + m for n, m in zip(before, kept, strict=True)])

    def both(self, method: str, *args: Any) -> None:
        """A method that concerns all layers at once."""
        for caches in (self.caches, self.whole):
            getattr(caches[0], method)(*args)

    def reorder(self, order: list[int], on_host: bool = True) -> None:
        for cache in (*self.caches, *self.whole):
            cache.reorder(order if on_host else on_device(cache, *order, dtype=torch.int64))


EDGES = sorted(
    {0, 1, *(n + d for n in (16, WINDOW, SLOTS, 2 * SLOTS, 96 + WINDOW) for d in (-1, 0, 1)), 300}
)


@pytest.mark.parametrize(
    ("pieces", "on_host"), [([1.0], True), ([0.4, 0.9, 1.0], False)], ids=["whole", "in pieces"]
)
def test_the_window_is_right_at_every_edge(
    pieces: list[float], on_host: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "_TEMPORARY_BYTES", 2**16)  # several pieces to every prompt
    twins = Twins(batch=len(EDGES), device=device)
    given = [0] * len(EDGES)
    for share in pieces:
        until = [int(share * n) for n in EDGES]
        twins.prefill([n - m for n, m in zip(until, given, strict=True)], on_host)
        given = until
    assert twins.lengths == EDGES
    twins.decode(TOKENS if on_host else 1)
    twins.decode(TOKENS, new=False)


@pytest.mark.parametrize("length", [7, SLOTS, 2 * SLOTS + 5, 300])
def test_prompts_of_one_length_are_one_copy(length: int) -> None:
    twins = Twins()
    for part in (length // 3, length - length // 3):
        twins.prefill([part] * 2)
    assert twins.caches[0].lengths == [length] * 2
    held = range(max(0, length - SLOTS), length)
    slots = [t % SLOTS for t in held]
    for ours, whole in ((c.k, w.k) for c, w in zip(twins.caches, twins.whole, strict=True)):
        assert torch.equal(ours[:, slots], whole[:, list(held)])
    twins.decode()


def test_a_token_may_be_appended_many_times_round() -> None:
    twins = Twins(batch=1)
    for _ in range(4 * SLOTS + 3):
        twins.append()
    twins.decode()


@pytest.mark.parametrize("seed", few(range(2)))
def test_a_window_keeps_what_is_seen_whatever_is_done(seed: int) -> None:
    """A random walk; layers share their lengths, one of them keeps all."""
    draw, windows = random.Random(seed), [(WINDOW, None), (5, 50)][seed]
    torch.manual_seed(seed)
    twins = Twins(windows, 3)
    for turn in range(24):
        lengths = twins.lengths
        match draw.choice(["prefill", "append", "draft", "draft", "truncate", "reset", "reorder"]):
            case "prefill":
                most = draw.choice([3, TOKENS, 40, 110])
                counts = [min(draw.randint(0, most), ROOM - n) for n in lengths]
                twins.prefill(counts, draw.random() < 0.8)
            case "append" if max(lengths) < ROOM:
                twins.append()
            case "draft" if max(lengths) <= ROOM - TOKENS:
                twins.decode(TOKENS)
                twins.accept([draw.randint(0, TOKENS) for _ in lengths], draw.random() < 0.7)
            case "truncate":
                to = [max(0, n - draw.randint(0, 9)) for n in lengths]
                try:
                    twins.caches[-1].truncate(to)
                except InputError as error:
                    assert "older tokens" in str(error)
                else:
                    twins.whole[0].truncate(to)
            case "reset":
                twins.both("reset", [draw.randrange(3)])
            case "reorder":
                twins.reorder([draw.randint(-1, 2) for _ in lengths], draw.random() < 0.7)
        if draw.random() < 0.3:
            twins.both("refresh")
        some = draw.sample(range(3), draw.randint(1, 3))
        if turn % 3 == 0 and max(twins.lengths) < ROOM:
            host = draw.random() < 0.7
            twins.decode(1, some, given=some if host else on_device(twins.whole[0], *some))
    twins.decode(1, new=False)


def test_what_decode_appended_can_be_taken_back_and_no_more() -> None:
    twins = Twins()
    twins.prefill([100, 20])
    cache = twins.caches[0]
    with nothing_written(cache), pytest.raises(InputError, match="0, or 96 and more there"):
        cache.truncate([95, 20])
    twins.both("truncate", [96, 18])
    twins.decode(TOKENS)
    twins.both("truncate", [96, 3])
    twins.decode()
    with pytest.raises(InputError, match="95 for sequence 0, which has had 100 tokens"):
        cache.truncate([95, 3])
    twins.both("truncate", [0, 3])
    twins.prefill([25, 1])  # nothing of this one is gone
    twins.both("truncate", 5)
    twins.decode(TOKENS, new=False)


def test_a_moved_row_lacks_what_it_lacked() -> None:
    cache = Twins().caches[0]
    k, v = (torch.zeros(2, 100, HEADS, DIM).half() for _ in "kv")
    cache.prefill(k, v, [100, 10])
    cache.truncate([97, 10])
    cache.reorder([1, 0])
    with pytest.raises(InputError, match="95 for sequence 1, which has had 100"):
        cache.truncate([10, 95])
    cache.truncate([2, 96])
    cache.reorder([0, -1])
    cache.prefill(k[:, :5], v[:, :5])
    cache.truncate(1)
    assert cache.lengths == [1, 1]


def test_a_ring_with_room_for_all_loses_nothing() -> None:
    cache = KVCache(2, 64, HEADS, DIM, F16, "cpu", window=50)
    k = torch.zeros(2, 64, HEADS, DIM).half()
    cache.prefill(k, k)
    cache.truncate(on_device(cache, 60, 7))
    cache.forget()
    cache.truncate(3)
    assert cache.seqlens.tolist() == [3, 3]


@pytest.mark.parametrize("how", ["on the device", "unknown", "captured"])
def test_lengths_that_cannot_be_checked_are_refused(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    twins = Twins()
    twins.prefill([20, 9])
    (cache,) = twins.caches
    if how == "on the device":
        twins.both("truncate", on_device(cache, 19, 9))  # nothing was overwritten yet
    twins.prefill([80, 9])
    to: Any = 90
    if how == "on the device":
        to = on_device(cache, 98, 18)
    elif how == "unknown":
        cache.forget()
    else:
        with captured(monkeypatch):
            cache.append(*twins.tokens(1))
    held = cache.seqlens.clone()
    with pytest.raises(InputError, match="windows have lost older tokens"):
        cache.truncate(to)
    assert torch.equal(cache.seqlens, held)
    if how == "unknown":
        cache.refresh()
        cache.truncate([100, 18])
        with pytest.raises(InputError, match="windows have lost"):
            cache.truncate([99, 18])  # for it may have had more
    cache.truncate(0)
    assert cache.lengths == [0, 0]


def test_calls_that_need_what_is_gone_are_refused() -> None:
    twins = Twins()
    twins.prefill([60, 9])
    (cache,) = twins.caches
    q, (k, v) = torch.zeros(2, HEADS * GROUP, DIM).half(), twins.tokens(1)
    for asked in ((-1, -1), (WINDOW, 0), (-1, 0), "all"):
        with nothing_written(cache), pytest.raises(InputError, match="window_size"):
            cache.decode(q, k, v, window_size=asked)  # type: ignore[arg-type]
    with nothing_written(cache), pytest.raises(InputError, match="5 tokens; allowed: up to 4, as"):
        cache.decode(torch.zeros(2, 5, HEADS * GROUP, DIM).half(), *twins.tokens(5))
    with nothing_written(cache), pytest.raises(InputError, match="q: got 5 tokens"):
        cache.decode(torch.zeros(1, 5, HEADS * GROUP, DIM).half(), rows=[0])
    with nothing_written(cache), pytest.raises(InputError, match="block_table"):
        cache.decode(q, k, v, block_table=cache._ring.table)  # type: ignore[call-arg,union-attr]
    with pytest.raises(CacheOverflowError, match="max_seq_len is 320"):
        cache.prefill(*twins.tokens(261))


def test_a_smaller_window_may_be_asked_for(device: str) -> None:
    twins = Twins(device=device)
    twins.prefill([61, 5])
    q = torch.randn(2, HEADS * GROUP, DIM).half().to(device)
    out = twins.caches[0].decode(q, window_size=(6, 0))
    whole = twins.whole[0]
    exact, typed = (
        attend(q, whole.k, whole.v, [61, 5], DIM**-0.5, dtype, window_size=(6, 0))[0]
        for dtype in (torch.double, F16)
    )
    assert errors(out, exact, typed).share <= 1


def test_rows_that_are_not_there_are_found_by_the_device(device: str) -> None:
    twins = Twins(device=device)
    twins.prefill([320, 9])
    (cache,) = twins.caches
    q = torch.randn(2, HEADS * GROUP, DIM).half().to(device)
    k, v = (t[:, 0] for t in twins.tokens(1))
    out = cache.decode(q, k, v, rows=on_device(cache, 2, 0))
    assert out.isnan().all() and cache.seqlens.tolist() == [320, 9]
    with pytest.raises(CacheOverflowError):
        cache.check()


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn])
def test_windows_of_8_bits(dtype: torch.dtype, device: str) -> None:
    options = {"k_scale": 0.01, "v_scale": torch.tensor([0.02], device=device)}
    twins = Twins(device=device, dtype=dtype, **options)
    twins.prefill([70, 33])
    q = torch.randn(2, HEADS * GROUP, DIM).half().to(device)
    k, v = (t[:, 0] for t in twins.tokens(1))
    ours, whole = (cache.decode(q, k, v, **asked) for cache, asked in (
        (twins.caches[0], {}), (twins.whole[0], {"window_size": (WINDOW - 1, 0)})
    ))  # fmt: skip
    for cache, theirs in ((twins.caches[0].k, twins.whole[0].k),
                          (twins.caches[0].v, twins.whole[0].v)):  # fmt: skip
        for b, length in enumerate((71, 34)):
            held = list(range(max(0, length - SLOTS), length))
            slots = [t % SLOTS for t in held]
            assert torch.equal(raw(cache)[b, slots], raw(theirs)[b, held])
    assert torch.allclose(ours.float(), whole.float(), atol=2e-3, rtol=2e-3)


def test_a_window_takes_what_it_keeps() -> None:
    sizes = 3, 2, 4096, HEADS, DIM, F16
    needed = KVCache.bytes_needed(*sizes[1:], num_layers=3, window=[WINDOW, None, 128],
                                  tokens_per_call=TOKENS)  # fmt: skip
    caches = KVCache.for_layers(*sizes, "cpu", window=[WINDOW, None, 128], tokens_per_call=TOKENS)
    assert [cache.k.shape[1] for cache in caches] == [SLOTS, 4096, 160]
    assert [cache.window for cache in caches] == [WINDOW, None, 128]
    tables = {cache._ring.table for cache in caches if cache._ring}
    held = [*tables, *(t for cache in caches for t in (cache.k, cache.v))]
    assert needed == sum(t.nbytes for t in held) + 3 * 2 * 4
    assert KVCache(1, 999, HEADS, DIM, F16, "cpu", window=WINDOW).max_seq_len == 1008
    assert KVCache(1, 9999, HEADS, DIM, F16, "cpu", window=1024).k.shape[1] == 1152
    assert KVCache(1, 40, HEADS, DIM, F16, "cpu", window=1000).k.shape[1] == 48
    assert "window=20, " in repr(caches[0]) and "window" not in repr(caches[1])


@pytest.mark.parametrize("windows", [[20, None], [20, 20_000]])
def test_a_cache_that_does_not_fit_says_what_would(
    windows: list[int | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(allocation, "available_bytes", lambda *_, **__: 100 * 2**20)
    sizes = 4, 10**6, 8, 128
    with pytest.raises(CacheAllocationError, match=r"max_seq_len up to \d+ fits") as failed:
        KVCache.for_layers(2, *sizes, F16, "cpu", window=windows)
    most = int(str(failed.value).split("max_seq_len up to ")[1].split()[0])
    assert KVCache.bytes_needed(4, most, 8, 128, num_layers=2, window=windows) < 100 * 2**20
    KVCache.for_layers(2, 4, most, 8, 128, F16, "cpu", window=windows)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"window": 0}, "window: got 0"), ({"window": True}, "window: got True"),
     ({"window": 2.5}, "window: got 2.5"), ({"window": [5]}, "1 windows; allowed: one for all"),
     ({"window": [5, "x"]}, "window: got 'x'"), ({"window": 5, "tokens_per_call": 0}, "got 0"),
     ({"window": 5, "tokens_per_call": 257}, "tokens_per_call: got 257; allowed: an int from 1")],
)  # fmt: skip
def test_windows_that_are_none_are_refused(options: dict[str, Any], message: str) -> None:
    for made in (
        lambda: KVCache.for_layers(2, 1, 64, HEADS, DIM, F16, "cpu", **options),
        lambda: KVCache.bytes_needed(1, 64, HEADS, DIM, num_layers=2, **options),
    ):
        with pytest.raises(InputError, match=message):
            made()


def test_pages_of_a_ring_are_never_read_before_the_window() -> None:
    """Memory has room for a page before it, whose tokens a kernel may read while others are new."""
    for size in (1, 15, 16, 17, 128, 1023, 1024, 4096):
        for tokens in (1, 32, 256):
            window = ring.Window(size=size, tokens=tokens)
            slots = window.slots(2**20)
            assert slots % window.page == 0
            assert 0 <= slots - (size - 1 + 2 * tokens + window.page - 1) < window.page


@pytest.mark.xdist_group(COMPILING)
def test_compiled_code_goes_round() -> None:
    twins = Twins(batch=2)
    twins.prefill([SLOTS - 2, 3])
    decode = torch.compile(twins.caches[0].decode, backend="aot_eager", fullgraph=True)
    (whole,) = twins.whole
    for _ in range(4):
        q = torch.randn(2, HEADS * GROUP, DIM).half()
        k, v = (t[:, 0] for t in twins.tokens(1))
        out = decode(q, k, v)
        assert torch.allclose(out, whole.decode(q, k, v, window_size=(WINDOW - 1, 0)), atol=2e-3)
    assert twins.lengths == [SLOTS + 2, 7] and twins.caches[0].lengths is None


@pytest.mark.gpu
@pytest.mark.parametrize("window", [WINDOW, 128, 4096])
def test_a_captured_step_goes_round_several_times(window: int) -> None:
    """One capture, replayed until the ring has been written three times over."""
    batch, heads, dim = 3, 2, 64
    ours = KVCache(batch, 16384, heads, dim, F16, "cuda", window=window)
    whole = KVCache(batch, 16384, heads, dim, F16, "cuda")
    slots = ours.k.shape[1]
    k, v = torch.randn(2, batch, slots, heads, dim, device="cuda").half()
    for cache in (ours, whole):
        cache.prefill(k, v, [slots, 5, slots - 1])
    q = torch.randn(batch, 4 * heads, dim, device="cuda").half()
    k, v = torch.randn(2, batch, heads, dim, device="cuda").half()
    asked = {"window_size": (window - 1, 0)}
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        ours.decode(q, k, v), whole.decode(q, k, v, **asked)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = ours.decode(q, k, v), whole.decode(q, k, v, **asked)
    for step in range(min(2 * slots + 3, 9000)):
        for tensor in (q, k, v):
            tensor.normal_()
        graph.replay()
        if step % 97 == 0 or step < 20:
            held = whole.seqlens.tolist()
            right = q.cpu(), whole.k.cpu(), whole.v.cpu(), held, dim**-0.5
            exact, typed = (attend(*right, t, **asked)[0] for t in (torch.double, F16))
            assert all(errors(out.cpu(), exact, typed).share <= 1 for out in outs)
    assert ours.refresh() == whole.refresh()
    ours.check()
