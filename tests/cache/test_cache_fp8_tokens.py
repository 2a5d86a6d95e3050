"""Caches of 8 bits that keep a scale for every token and KV head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from compiling import GROUP as GROUP_OF_COMPILING
from helpers import diagonal
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from gqa_cutlass import (
    CacheAllocationError,
    CacheOverflowError,
    InputError,
    KVCache,
    PagedKVCache,
    gqa_decode,
)
from gqa_cutlass.cache import allocation
from gqa_cutlass.cache.scales import raw
from gqa_cutlass.proof.reference import attend, same_bits, scale_of_row, stored

BATCH, ROOM, HEADS, GROUP, DIM = 2, 48, 2, 2, 64
F16, BF16 = torch.float16, torch.bfloat16
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
BY_TOKEN: dict[str, Any] = {"k_scale": "token", "v_scale": "token"}


def new_cache(device: str, batch: int = BATCH, dtype: torch.dtype = E4M3) -> KVCache:
    return KVCache(batch, ROOM, HEADS, DIM, dtype, device, **BY_TOKEN)


def random(*shape: int, device: str, seed: int = 0, dtype: torch.dtype = F16) -> Tensor:
    """Rows of unlike sizes, [..., dim]."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randn(*shape[:-1], 1, generator=generator).exp()
    return (torch.randn(shape, generator=generator) * sizes).to(dtype).to(device)


def tokens(count: int, device: str, batch: int = BATCH, **options: Any) -> tuple[Tensor, Tensor]:
    """Keys and values, [batch, count, heads, dim]."""
    k, v = (random(batch, count, HEADS, DIM, device=device, seed=i, **options) for i in range(2))
    return k, v


def queries(
    device: str, batch: int = BATCH, dtype: torch.dtype = F16, count: int | None = None
) -> Tensor:
    """One of each sequence, or with a dimension of so many."""
    several = () if count is None else (count,)
    return random(batch, *several, HEADS * GROUP, DIM, device=device, seed=9, dtype=dtype)


def int32(device: str, *values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def parts(cache: KVCache) -> list[Tensor]:
    """What it has of tokens."""
    found = cache.k, cache.v, cache.k_scale, cache.v_scale
    return [t for t in found if isinstance(t, Tensor)]


def copies(cache: KVCache) -> dict[str, Tensor]:
    names = "k_cache", "v_cache", "k_scale", "v_scale"
    return {name: t.clone() for name, t in zip(names, parts(cache), strict=True)}


def holds(cache: KVCache, row: int, k: Tensor, v: Tensor) -> bool:
    """Whether a row begins with these tokens, [tokens, heads, dim], as an append stores them."""
    right = []
    for held, scales, new in zip(parts(cache)[:2], parts(cache)[2:], (k, v), strict=True):
        scale = scale_of_row(new, held.dtype)
        kept = stored(new, scale.unsqueeze(-1), held.dtype)
        right += [same_bits(scales[row, : len(new)], scale)]
        right += [same_bits(raw(held)[row, : len(new)], raw(kept))]
    return all(right)


def one_nan(held: Tensor) -> Tensor:
    """In float32, every NaN alike: its sign is the machine's."""
    return torch.where(held.isnan(), torch.nan, held.float())


@pytest.mark.parametrize(("dtype", "given"), [(E4M3, F16), (E4M3, BF16), (E5M2, BF16)], ids=str)
def test_prompts_are_stored_as_if_appended_one_by_one(
    dtype: torch.dtype, given: torch.dtype, device: str
) -> None:
    """To the bit: zeros, NaN, infinity, and numbers as small as there are included."""
    count = 7
    k, v = tokens(count, device, dtype=given)
    smallest = torch.finfo(given).smallest_normal
    k[0, 0], k[0, 1, 0, 3], v[0, 2, 1, 5] = 0, torch.nan, -torch.inf
    k[1, 0], v[1, 1] = smallest * torch.finfo(given).eps, k[1, 1] * smallest
    v[1, 2], k[1, 3, 0] = torch.finfo(given).max, torch.nan
    q = queries(device, dtype=given)
    whole, mixed, single = (new_cache(device, dtype=dtype) for _ in range(3))
    whole.prefill(k, v)
    mixed.prefill(k[:, :3], v[:, :3], int32(device, 3, 3))
    mixed.append(k[:, 3], v[:, 3])
    mixed.prefill(k[:, 4:], v[:, 4:])
    for i in range(count):
        single.decode(q, k[:, i], v[:, i])
    for cache in (mixed, single):
        assert cache.refresh() == [count] * BATCH
        for held, right in zip(parts(cache), parts(whole), strict=True):
            assert same_bits(*(one_nan(t[:, :count]) for t in (held, right)))
    assert all(holds(whole, b, k[b], v[b]) for b in range(BATCH))
    new = k[:, -1], v[:, -1]
    outs = [cache.decode(q, *new) for cache in (whole, mixed, single)]
    assert same_bits(outs[0], outs[1]) and same_bits(outs[0], outs[2])


@pytest.mark.parametrize(("rows", "count"), diagonal([None, [1], [2, 0]], [3, 1]))
def test_steps_are_those_of_gqa_decode_with_the_same_scales(
    rows: list[int] | None, count: int, device: str
) -> None:
    cache = new_cache(device, 3)
    k, v = tokens(20, device, 3)
    cache.prefill(k, v, [20, 5, 11])
    chosen = [0, 1, 2] if rows is None else rows
    q = queries(device, len(chosen), count=count if count > 1 else None)
    new = tokens(count, device, len(chosen))
    before = copies(cache)
    lengths = cache.seqlens[chosen]
    index = {} if rows is None else {"cache_batch_idx": int32(device, *rows)}
    asked: dict[str, Any] = {"return_lse": True, "softcap": 3.0}
    out, lse = cache.decode(q, *new, rows=rows, **asked)
    by_hand: dict[str, Any] = {**before, **index, "k": new[0], "v": new[1]}
    right, right_lse = gqa_decode(q, cache_seqlens=lengths, **by_hand, **asked)
    assert same_bits(out, right) and same_bits(lse, right_lse)
    for held, expected in zip(parts(cache), before.values(), strict=True):
        assert same_bits(raw(held), raw(expected))
    assert cache.lengths == [n + count * (b in chosen) for b, n in enumerate([20, 5, 11])]
    attended = cache.decode(q, rows=rows)
    assert torch.equal(attended, gqa_decode(q, cache_seqlens=lengths + count, **before, **index))


@pytest.mark.parametrize("window", [None, 20], ids=["all", "a ring"])
def test_drafts_are_stored_as_one_step_after_another_stores_them(
    window: int | None, device: str
) -> None:
    """To the bit, and so are those behind what was accepted."""
    asked: dict[str, Any] = {} if window is None else {"window_size": (window - 1, 0)}
    kind = BATCH, 160, HEADS, DIM, E4M3, device
    rings: dict[str, Any] = {"window": window, "tokens_per_call": 4}
    several, single = (KVCache(*kind, **rings, **BY_TOKEN) for _ in range(2))
    prompt, q = tokens(30, device), queries(device, count=4)
    for cache in (several, single):
        for held in (cache.k, cache.v):
            raw(held).zero_()
        cache.prefill(*prompt, [30, 3])
    for seed, accepted in ((20, [2, 4]), (30, int32(device, 0, 3)), (40, 1)):
        k, v = (random(BATCH, 4, HEADS, DIM, device=device, seed=seed + i) for i in range(2))
        outs = [single.decode(q[:, i], k[:, i], v[:, i], **asked) for i in range(4)]
        out = several.decode(q, k, v, **asked)
        largest = max(t.abs().max().item() for t in (v, prompt[1]))
        torch.testing.assert_close(out, torch.stack(outs, 1), rtol=0, atol=2**-7 * largest)
        for held, right in zip(parts(several), parts(single), strict=True):
            assert same_bits(raw(held), raw(right))
        several.accept(accepted)
        single.truncate(several.seqlens.tolist())
    assert several.refresh() == single.refresh() == [30 + 2 + 0 + 1, 3 + 4 + 3 + 1]


def test_drafts_without_room_have_no_scales(device: str) -> None:
    """Not those that would fit either; a sequence beside them has its own."""
    cache = new_cache(device)
    k, v = tokens(ROOM - 2, device)
    cache.prefill(k, v, int32(device, ROOM - 2, 3))
    before = copies(cache)
    more = random(BATCH, 4, HEADS, DIM, device=device, seed=5)
    out = cache.decode(queries(device, count=4), more, more)
    assert out[0].isnan().all() and not out[1].isnan().any()
    for held, right in zip(parts(cache), before.values(), strict=True):
        assert same_bits(raw(held)[0], raw(right)[0])
    assert holds(cache, 1, *(torch.cat([t[1, :3], more[1]]) for t in (k, v)))
    with pytest.raises(CacheOverflowError):
        cache.check()
    assert cache.refresh() == [ROOM - 2, 3 + 4]
    with pytest.raises(CacheOverflowError, match="KVCache.decode: cache overflow: sequence 0"):
        cache.decode(queries(device, count=4), more, more)


@pytest.mark.parametrize("on_device", [False, True])
def test_scales_go_where_their_tokens_go(on_device: bool, device: str) -> None:
    def given(*values: int) -> Any:
        return int32(device, *values) if on_device else list(values)

    cache = new_cache(device, 3)
    k, v = tokens(9, device, 3)
    cache.prefill(k[:, :5], v[:, :5], given(5, 2, 4))
    cache.reorder(given(2, 0, 0))
    assert cache.seqlens.tolist() == [4, 5, 5]
    assert all(holds(cache, b, k[s, :n], v[s, :n]) for b, (s, n) in enumerate([(2, 4), (0, 5)]))
    cache.truncate(given(4, 1, 5))
    new = k[:, 5:], v[:, 5:]
    cache.prefill(*new, given(2, 4, 0))
    for b, (row, kept, more) in enumerate([(2, 4, 2), (0, 1, 4), (0, 5, 0)]):
        held = (
            torch.cat([old[row, :kept], t[b, :more]]) for old, t in zip((k, v), new, strict=True)
        )
        assert holds(cache, b, *held)
    cache.reset()
    cache.decode(queries(device, 3), k[:, 8], v[:, 8])
    assert all(holds(cache, b, k[b, 8:], v[b, 8:]) for b in range(3))


def test_a_sequence_without_room_keeps_its_scales(device: str) -> None:
    cache = new_cache(device)
    k, v = tokens(ROOM - 2, device)
    cache.prefill(k, v, [ROOM - 2, 3])
    more = tokens(4, device)
    cache.prefill(*more, int32(device, 4, 4))
    assert cache.refresh() == [ROOM - 2, 7] and holds(cache, 0, k[0], v[0])
    held = (torch.cat([old[1, :3], t[1]]) for old, t in zip((k, v), more, strict=True))
    assert holds(cache, 1, *held)
    with pytest.raises(CacheOverflowError):
        cache.check()


def test_windows_keep_the_scales_of_what_they_keep(device: str) -> None:
    """In a ring that prompts and steps have gone round; beside a cache without."""
    window, room = 20, 160
    sizes = 2, BATCH, room, HEADS, DIM, E4M3, device
    caches = KVCache.for_layers(*sizes, window=[window, None], tokens_per_call=1, **BY_TOKEN)
    slots = caches[0].k.shape[1]
    assert slots < room
    k, v = tokens(slots + 8, device)
    for first, count in ((0, 9), (9, slots - 3)):
        piece = slice(first, first + count)
        for cache in caches:
            cache.prefill(k[:, piece], v[:, piece])
    for i in (slots + 6, slots + 7):
        q = queries(device) * i
        outs = [c.decode(q, k[:, i], v[:, i], window_size=(window - 1, 0)) for c in caches]
        assert torch.allclose(*(out.float() for out in outs), atol=2e-3, rtol=2e-3)
    seen = list(range(8, slots + 8))
    for held, right in zip(parts(caches[0]), parts(caches[1]), strict=True):
        assert same_bits(raw(held)[:, [t % slots for t in seen]], raw(right)[:, seen])
    assert holds(caches[1], 1, k[1], v[1])


def test_layers_have_scales_of_their_own(device: str) -> None:
    first, last = KVCache.for_layers(2, BATCH, ROOM, HEADS, DIM, E5M2, device, **BY_TOKEN)
    k, v = tokens(3, device)
    first.prefill(k, v)
    last.prefill(v, -k)
    assert all(holds(first, b, k[b], v[b]) and holds(last, b, v[b], -k[b]) for b in range(BATCH))
    assert len({t.data_ptr() for cache in (first, last) for t in parts(cache)}) == 8


def test_heavy_tails_lose_less_than_by_one_scale(device: str) -> None:
    """Of Student's t with three degrees of freedom, as docs/accuracy.md has them."""
    torch.manual_seed(0)
    count, room = 256, 264
    student = torch.distributions.StudentT(3.0)
    k, v = (student.sample((2, count, HEADS, DIM)).half().to(device) for _ in range(2))
    q = torch.randn(2, HEADS * GROUP, DIM).half().to(device)
    exact = attend(q, k, v, [count] * 2, DIM**-0.5, torch.float64)[0]
    errors = []
    largest = {n: float(t.abs().max()) / 448 for n, t in (("k_scale", k), ("v_scale", v))}
    for scales in (BY_TOKEN, largest):
        cache = KVCache(2, room, HEADS, DIM, E4M3, device, **scales)
        cache.prefill(k[:, :-1], v[:, :-1])
        out = cache.decode(q, k[:, -1], v[:, -1])
        error = (out.double() - exact).norm(dim=-1) / exact.norm(dim=-1)
        errors.append(float(error.square().mean().sqrt()))
    assert errors[0] < 0.04 and errors[0] < errors[1] / 1.5, errors


@pytest.mark.parametrize("rows", [BATCH * 3, 1])
def test_large_prompts_are_scaled_piece_by_piece(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gqa_cutlass.cache.scales._PIECE_BYTES", 4 * HEADS * DIM * rows)
    cache = new_cache("cpu")
    k, v = tokens(10, "cpu")
    cache.prefill(k, v)
    assert all(holds(cache, b, k[b], v[b]) for b in range(BATCH))


def test_scales_are_counted_and_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = BATCH, ROOM, HEADS, DIM, E4M3
    cache = KVCache(*sizes, "cpu", head_dim_v=32, **BY_TOKEN)
    needed = sum(t.nbytes for t in parts(cache))
    assert f"bytes={needed}, " in repr(cache)
    state = 3 * BATCH * 4
    assert KVCache.bytes_needed(*sizes, head_dim_v=32, **BY_TOKEN) == needed + state
    without = KVCache.bytes_needed(*sizes, head_dim_v=32) - state
    assert needed - without == 2 * BATCH * ROOM * HEADS * 4
    for scale in parts(cache)[2:]:
        assert scale.dtype == torch.float32 and bool((scale == 1).all())
    other = KVCache(*sizes, "cpu", k_scale=0.5)
    assert (other.k_scale, other.v_scale) == (0.5, None)
    pages = PagedKVCache(6, 8, HEADS, DIM, E4M3, "cpu", num_layers=2, **BY_TOKEN)
    told = PagedKVCache.bytes_needed(6, 8, HEADS, DIM, E4M3, num_layers=2, **BY_TOKEN)
    assert told == 2 * 2 * 6 * 8 * HEADS * (DIM + 4) and f"bytes={told}, " in repr(pages)
    plain = PagedKVCache(6, 8, HEADS, DIM, E4M3, "cpu", num_layers=2, k_scale=[2.0, None])
    assert (plain.k_scale, plain.v_scale) == ((2.0, None), (None, None))


@pytest.mark.parametrize("window", [None, [20, None]], ids=["all", "windows"])
def test_what_fits_fits_with_its_scales(window: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    available = 100 * 2**20
    monkeypatch.setattr(allocation, "available_bytes", lambda device, held=True: available)
    sizes: tuple[Any, ...] = 2, HEADS, 32
    asked: dict[str, Any] = {"window": window, **BY_TOKEN}
    with pytest.raises(CacheAllocationError, match="float32 scales of tokens and KV") as raised:
        KVCache.for_layers(2, 3, 2**24, *sizes[1:], E4M3, "cpu", **asked)
    longest = int(str(raised.value).split("max_seq_len up to ")[1].split()[0])
    shape = 3, longest, *sizes[1:]
    assert KVCache.for_layers(2, *shape, E4M3, "cpu", **asked)[0].max_seq_len == longest
    needed = KVCache.bytes_needed(*shape, E4M3, num_layers=2, **asked)
    assert 0.8 * available < needed <= available
    with pytest.raises(CacheAllocationError):
        KVCache.for_layers(2, 3, longest * 5 // 4, *sizes[1:], E4M3, "cpu", **asked)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "keys alone": ({"k_scale": "token"}, "v_scale: got None; allowed: 'token', as k_scale: both"),
    "values alone": ({"k_scale": 0.5, "v_scale": "token"}, "k_scale: got 0.5; allowed: 'token', "),
    "16 bits": ({"dtype": F16, **BY_TOKEN}, "k_scale: got 'token', with caches of torch.float16"),
    "another word": ({"k_scale": "head"}, "k_scale: got 'head'; allowed: a .*; or 'token' of both"),
    "of one layer": (
        {"k_scale": ["token"], "v_scale": ["token"]},
        "k_scale: got 'token'; allowed: a number .*; or 'token' of both, for all layers",
    ),
    "a tensor": ({"k_scale": torch.ones(2, 8, 2), "v_scale": torch.ones(2, 8, 2)}, "k_scale: got"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("make", [KVCache, PagedKVCache], ids=["KVCache", "PagedKVCache"])
def test_what_is_not_allowed_allocates_nothing(make: Callable[..., Any], name: str) -> None:
    options, message = BAD[name]
    with pytest.raises(InputError, match=f"^{make.__name__}: {message}.*Nothing was allocated"):
        make(2, 8, HEADS, DIM, **{"dtype": E4M3, "device": "cpu"} | options)
    with pytest.raises(InputError, match=f"^{make.__name__}: {message}"):
        make.bytes_needed(2, 8, HEADS, DIM, **{"dtype": E4M3} | options)  # type: ignore[attr-defined]


def test_scales_are_no_options_and_keep_their_memory() -> None:
    cache = new_cache("cpu")
    k, v = tokens(1, "cpu")
    with pytest.raises(InputError, match="decode: k_scale: got an option; allowed: the cache's"):
        cache.decode(queries("cpu"), k, v, k_scale=0.5)
    assert isinstance(cache.v_scale, Tensor)
    lengths = cache.v_scale.view(torch.int32).flatten()[:BATCH]
    with pytest.raises(InputError, match="lengths: got memory of the cache itself"):
        cache.prefill(k, v, lengths)
    cache.v_scale.untyped_storage().resize_(0)
    for call in (lambda: cache.prefill(k, v), lambda: cache.reorder([1, 0])):
        with pytest.raises(InputError, match="the cache's v_scale: got "):
            call()
    assert cache.lengths == [0, 0]


@pytest.mark.xdist_group(GROUP_OF_COMPILING)
@pytest.mark.parametrize(("kind", "count"), diagonal(["a ring", "some", "all"], [3, None], count=2))
def test_compiled_steps_write_the_scales_of_their_tokens(count: int | None, kind: str) -> None:
    """As others do, to the bit; what is behind them in the graph reads those."""
    ring, rows = kind == "a ring", int32("cpu", 2, 0) if kind == "some" else None
    room, window = (160, [20, None]) if ring else (ROOM, None)
    graphed, eager = (
        KVCache.for_layers(
            2, 3, room, HEADS, DIM, E4M3, "cpu", window=window, tokens_per_call=3, **BY_TOKEN
        )
        for _ in range(2)
    )  # fmt: skip

    def through(caches: list[KVCache], q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        for cache in caches:
            q = cache.decode(q, k, v, rows=rows)
        return q, torch.stack([scale.sum((0, 1)) for c in caches for scale in parts(c)[2:]])

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(through, backend=counter, fullgraph=True)
    held = graphed[0].k.shape[1] - (1 if ring else 8)  # so that steps go round
    for cache in (*graphed, *eager):
        for part in parts(cache):
            raw(part).zero_()
        cache.prefill(*tokens(held, "cpu", 3))
    for seed in range(2):
        batch = 3 if rows is None else len(rows)
        k, v = (t if count else t[:, 0] for t in tokens(count or 1, "cpu", batch))
        q = queries("cpu", batch, count=count) + seed
        right = through(eager, q, k, v)
        assert all(map(same_bits, compiled(graphed, q, k, v), right))
        assert right[1].isfinite().all() and graphed[0].lengths is None
    assert counter.frame_count == 1
    assert graphed[0].refresh() == eager[0].refresh() != [held] * 3
    for ours, theirs in zip(graphed, eager, strict=True):
        assert all(map(same_bits, map(raw, parts(ours)), map(raw, parts(theirs))))


@pytest.mark.gpu
def test_a_graph_of_steps_writes_the_scales_of_its_tokens() -> None:
    graph, cache = torch.cuda.CUDAGraph(), new_cache("cuda")
    k, v = tokens(9, "cuda")
    q, new = queries("cuda"), [t[:, 0].clone() for t in (k, v)]
    cache.decode(q, *new)
    cache.reset()
    with torch.cuda.graph(graph):
        out = cache.decode(q, *new)
    cache.reset()
    other = new_cache("cuda")
    for i in range(9):
        for t, tokens_ in zip(new, (k, v), strict=True):
            t.copy_(tokens_[:, i])
        graph.replay()
        assert torch.equal(out, other.decode(q, k[:, i], v[:, i]))
    assert all(holds(cache, b, k[b], v[b]) for b in range(BATCH))
    assert cache.refresh() == [9] * BATCH
