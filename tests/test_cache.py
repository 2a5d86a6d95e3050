"""KVCache: what it holds, what the host knows of it, what does not fit, and that nothing waits."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from reference import attend, errors
from torch import Tensor

from gqa_cutlass import (
    CacheAllocationError,
    CacheOverflowError,
    InputError,
    KVCache,
    allocation,
    gqa_decode,
    lengths,
    rows,
)
from gqa_cutlass import cache as cache_module
from gqa_cutlass.errors import DeviceError, GqaError

HEADS, DIM, GROUP = 1, 64, 2
F16 = torch.float16


def new_cache(batch: int = 3, room: int = 12, device: str = "cpu") -> KVCache:
    return KVCache(batch, room, HEADS, DIM, F16, device)


def filled(cache: KVCache, counts: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Give an empty cache so many random tokens per sequence, known to the host; returns them."""
    k, v = tokens(cache, max(counts))
    cache.prefill(k, v, list(counts))
    return k, v


def random_like(cache: KVCache, *shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float32).to(cache.k)


def tokens(cache: KVCache, count: int) -> tuple[Tensor, Tensor]:
    """Random K and V, [batch, count, heads, dim]."""
    shape = cache.batch_size, count, HEADS, DIM
    return random_like(cache, *shape), random_like(cache, *shape)


def token(cache: KVCache) -> tuple[Tensor, Tensor]:
    """Random K and V of one token, [batch, heads, dim]."""
    k, v = tokens(cache, 1)
    return k[:, 0], v[:, 0]


def queries(cache: KVCache) -> Tensor:
    return random_like(cache, cache.batch_size, HEADS * GROUP, DIM)


def on_device(cache: KVCache, *values: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=cache.device)


def bits(*tensors: Tensor) -> list[Tensor]:
    """Copies that compare equal only where every bit is."""
    return [t.clone().contiguous().view(torch.int16) for t in tensors]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(map(torch.equal, a, b))


@contextmanager
def nothing_written(cache: KVCache) -> Iterator[None]:
    """Neither a bit of the storage nor a length changes meanwhile."""
    before, held = bits(cache.k, cache.v), cache.seqlens.clone()
    known, bound = cache.lengths, cache.bound
    yield
    assert same(bits(cache.k, cache.v), before)
    assert torch.equal(cache.seqlens, held)
    assert (cache.lengths, cache.bound) == (known, bound)


@contextmanager
def captured(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What is called meanwhile is taken to be captured, and replayed once."""
    with monkeypatch.context() as patch:
        patch.setattr(lengths, "capturing", lambda device: True)
        patch.setattr(cache_module, "capturing", lambda device: True)
        yield


# What a cache is


def test_storage_is_contiguous_and_typed(device: str) -> None:
    cache = KVCache(3, 16, 2, 64, torch.bfloat16, device)
    for tensor in (cache.k, cache.v):
        assert tensor.shape == (3, 16, 2, 64) and tensor.is_contiguous()
        assert tensor.dtype == torch.bfloat16 and tensor.device.type == device
    assert cache.seqlens.tolist() == cache.lengths == [0, 0, 0] and cache.bound == 0
    assert cache.seqlens.dtype == torch.int32 and cache.seqlens.device == cache.k.device
    assert cache.seqlens.is_contiguous()
    assert (cache.batch_size, cache.max_seq_len, cache.device) == (3, 16, cache.k.device)


@pytest.mark.parametrize("layers", [1, 3])
def test_bytes_needed_is_what_is_allocated(layers: int) -> None:
    caches = KVCache.for_layers(layers, 3, 16, 2, 64, torch.bfloat16, "cpu")
    state = caches[0].seqlens.untyped_storage()
    assert all(c.seqlens.untyped_storage().data_ptr() == state.data_ptr() for c in caches)
    held = sum(c.k.nbytes + c.v.nbytes for c in caches) + state.nbytes()
    assert KVCache.bytes_needed(3, 16, 2, 64, torch.bfloat16, layers) == held
    assert KVCache.bytes_needed(3, 16, 2, 64, num_layers=layers) == held


def test_repr_names_sizes_bytes_and_bound() -> None:
    cache = new_cache(2, 16)
    filled(cache, [3, 1])
    assert repr(cache) == (
        "KVCache(batch_size=2, max_seq_len=16, num_kv_heads=1, head_dim=64, dtype=torch.float16, "
        "device='cpu', bytes=8192, bound=3)"
    )


SIZES = dict(batch_size=2, max_seq_len=16, num_kv_heads=1, head_dim=64, dtype=F16, device="cpu")


@pytest.mark.parametrize(
    ("name", "bad", "allowed"),
    [
        ("batch_size", 0, "an int from 1 to 65535"),
        ("batch_size", 65536, "an int from 1 to 65535"),
        ("batch_size", True, "an int from 1 to 65535"),
        ("batch_size", 2.0, "an int from 1 to 65535"),
        ("max_seq_len", 0, "an int from 1 to 1073741824"),
        ("max_seq_len", 2**30 + 1, "an int from 1 to 1073741824"),
        ("max_seq_len", None, "an int from 1 to 1073741824"),
        ("num_kv_heads", -1, "an int from 1"),
        ("num_kv_heads", "2", "an int from 1"),
        ("head_dim", 65, "multiples of 8 from 32"),
        ("head_dim", 64.0, "multiples of 8 from 32"),
        ("dtype", torch.float32, "torch.float16 or torch.bfloat16"),
        ("dtype", "float16", "torch.float16 or torch.bfloat16"),
        ("device", "meta", "a CUDA device, such as 'cuda:0', or 'cpu'"),
        ("device", "nonsense", "a CUDA device, such as 'cuda:0', or 'cpu'"),
        ("device", None, "a CUDA device, such as 'cuda:0', or 'cpu'"),
        ("device", True, "a CUDA device, such as 'cuda:0', or 'cpu'"),
    ],
)
def test_sizes_that_no_decode_step_allows_are_refused(name: str, bad: Any, allowed: str) -> None:
    with pytest.raises(InputError) as raised:
        KVCache(**SIZES | {name: bad})  # type: ignore[arg-type]
    message = str(raised.value)
    assert message.startswith(f"KVCache: {name}: got ") and f"allowed: {allowed}" in message
    assert "Nothing was allocated." in message
    with pytest.raises(InputError):
        KVCache.for_layers(2, **SIZES | {name: bad})  # type: ignore[arg-type]


@pytest.mark.parametrize("layers", [0, True, None])
def test_a_number_of_layers_that_is_none_is_refused(layers: Any) -> None:
    with pytest.raises(InputError, match="num_layers: got .*; allowed: an int from 1"):
        KVCache.for_layers(layers, **SIZES)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="num_layers"):
        KVCache.bytes_needed(1, 1, 1, 64, num_layers=layers)


@pytest.mark.parametrize("device", ["cuda", "cuda:0", 0])
def test_without_a_gpu_the_remedy_is_named(
    device: str | int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError, match=r"KVCache: device: got cuda.*doctor.*device='cpu'"):
        KVCache(**SIZES | {"device": device})  # type: ignore[arg-type]


# What is decoded, appended and kept


def test_decode_is_gqa_decode_on_the_storage_to_the_bit(device: str) -> None:
    cache = new_cache(device=device)
    filled(cache, [5, 0, 11])
    k_cache, v_cache, held = cache.k.clone(), cache.v.clone(), cache.seqlens.clone()
    q, (k, v) = queries(cache), token(cache)
    options: dict[str, Any] = dict(softmax_scale=0.3, num_splits=2, return_lse=True)
    expected = gqa_decode(q, k_cache, v_cache, k, v, cache_seqlens=held, **options)
    out = torch.empty_like(q)
    got = cache.decode(q, k, v, **options, out=out)
    assert got[0].data_ptr() == out.data_ptr()
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])
    assert same(bits(cache.k, cache.v), bits(k_cache, v_cache))
    assert cache.lengths == cache.seqlens.tolist() == [6, 1, 12] and cache.bound == 12


def test_decode_without_a_token_changes_nothing(device: str) -> None:
    cache = new_cache(device=device)
    filled(cache, [5, 0, 12])  # a full sequence can be attended to
    q = queries(cache)
    with nothing_written(cache):
        out = cache.decode(q)
    assert torch.equal(out, gqa_decode(q, cache.k, cache.v, cache_seqlens=cache.seqlens))


def test_an_append_without_attending_is_the_append_of_decode(device: str) -> None:
    """Of equal lengths (a slice is copied) and of others (rows go where the device says)."""
    for counts in ([4, 4, 4], [4, 0, 11]):
        one, other = new_cache(device=device), new_cache(device=device)
        for cache in (one, other):
            cache.k.zero_(), cache.v.zero_()
            torch.manual_seed(0)
            filled(cache, counts)
        k, v = token(one)
        one.decode(queries(one), k, v)
        other.append(k.unsqueeze(1), v.unsqueeze(1))
        assert same(bits(one.k, one.v), bits(other.k, other.v))
        assert one.lengths == other.lengths == other.seqlens.tolist()


def test_a_models_forward_pass_is_right_at_every_layer(device: str) -> None:
    """Ragged prompts, tokens, speculation taken back, beams: against lists of tokens per layer."""
    caches = KVCache.for_layers(2, 3, 12, HEADS, DIM, F16, device)
    told = Told(caches)
    told.prefill([5, 2, 7])
    told.decode()
    told.decode()
    told.truncate([6, 4, 7])
    told.decode()
    told.reorder([2, -1, 2])
    told.decode()
    told.reorder_on_device([1, 0, 5])  # there is no row 5: an empty one
    told.decode()
    told.truncate_on_device([1, 9, 0])
    told.decode()
    assert caches[0].lengths is None and caches[1].refresh() == told.lengths == [2, 10, 1]


class Told:
    """Caches of a model's layers, beside lists of the tokens that they have been told to hold."""

    def __init__(self, caches: list[KVCache]) -> None:
        self.caches = caches
        self.first = caches[0]
        self.held: list[list[Tensor]] = [[] for _ in range(self.first.batch_size)]

    @property
    def lengths(self) -> list[int]:
        return [len(sequence) for sequence in self.held]

    def new(self, count: int) -> Tensor:
        """Random tokens, [layers, 2, batch, count, heads, dim]."""
        pairs = [torch.stack(tokens(self.first, count)) for _ in self.caches]
        return torch.stack(pairs)

    def add(self, new: Tensor, counts: Sequence[int]) -> list[int]:
        """Let every sequence that has the room hold its tokens; returns those that have not."""
        without = []
        for b, (sequence, count) in enumerate(zip(self.held, counts, strict=True)):
            if 0 <= count <= new.shape[3] and len(sequence) + count <= self.first.max_seq_len:
                sequence += [new[:, :, b, j] for j in range(count)]
            else:
                without.append(b)
        return without

    def prefill(self, counts: list[int]) -> None:
        new = self.new(max(counts))
        for cache, (k, v) in zip(self.caches, new, strict=True):
            cache.prefill(k, v, counts)
        assert self.add(new, counts) == []
        self.check()

    def decode(self) -> None:
        """Every layer's output is right, and as `gqa_decode` computes it from the same tokens."""
        new = self.new(1)
        outs = []
        for cache, (k, v) in zip(self.caches, new, strict=True):
            outs.append((q := queries(cache), cache.decode(q, k, v)))
        assert self.add(new, [1] * len(self.held)) == []
        self.check()
        for layer, (q, out) in enumerate(outs):
            k, v = self.dense(layer)
            held = on_device(self.first, *self.lengths)
            assert torch.equal(out, gqa_decode(q, k, v, cache_seqlens=held))
            exact, in_f16 = (
                attend(q, k, v, self.lengths, DIM**-0.5, dtype)[0] for dtype in (torch.double, F16)
            )
            assert errors(out, exact, in_f16).share <= 1

    def truncate(self, most: list[int]) -> None:
        self.caches[0].truncate(most)
        self._keep(most)

    def truncate_on_device(self, most: list[int]) -> None:
        self.caches[-1].truncate(on_device(self.first, *most))
        self._keep(most)

    def reorder(self, order: list[int]) -> None:
        for cache in self.caches:
            cache.reorder(order)
        self._take(order)

    def reorder_on_device(self, order: list[int]) -> None:
        for cache in self.caches:
            cache.reorder(on_device(cache, *order, dtype=torch.int64))
        self._take(order)

    def _keep(self, most: list[int]) -> None:
        self.held = [h[: max(0, n)] for h, n in zip(self.held, most, strict=True)]
        self.check()

    def _take(self, order: list[int]) -> None:
        rows = range(len(self.held))
        self.held = [list(self.held[i]) if i in rows else [] for i in order]
        self.check()

    def dense(self, layer: int) -> tuple[Tensor, Tensor]:
        """The tokens of a layer in new tensors of the cache's size, NaN where there is none."""
        k, v = (torch.full_like(t, float("nan")) for t in (self.first.k, self.first.v))
        for b, sequence in enumerate(self.held):
            for j, row in enumerate(sequence):
                k[b, j], v[b, j] = row[layer]
        return k, v

    def check(self) -> None:
        """The caches hold these tokens, and what the host claims to know is true."""
        for layer, cache in enumerate(self.caches):
            assert cache.seqlens.tolist() == self.lengths
            assert cache.lengths in (None, self.lengths)
            assert max(self.lengths) <= cache.bound <= cache.max_seq_len
            for tensor, expected in zip((cache.k, cache.v), self.dense(layer), strict=True):
                for b, length in enumerate(self.lengths):
                    assert same(bits(tensor[b, :length]), bits(expected[b, :length]))


class Walk(Told):
    """Does anything, at random."""

    def __init__(self, caches: list[KVCache], seed: int) -> None:
        super().__init__(caches)
        self.random = random.Random(seed)
        self.without_room: set[int] = set()

    def step(self) -> None:
        names = ["append", "prompt", "prompt", "shorten", "permute", "empty", "look", "report"]
        getattr(self, "do_" + self.random.choice(names))()
        self.check()

    def numbers(self, least: int, most: int) -> list[int]:
        return [self.random.randint(least, most) for _ in self.held]

    def do_append(self) -> None:
        new = self.new(1)
        self.extend(new, [1] * len(self.held), None, lambda c, k, v: c.append(k[:, 0], v))

    def do_prompt(self) -> None:
        new = self.new(self.random.randint(0, 4))
        most = new.shape[3]
        form = self.random.choice(["all", "ints", "device"])
        counts = self.numbers(0, most) if form == "ints" else self.numbers(-1, most + 1)
        given: Any = {"all": None, "ints": counts, "device": on_device(self.first, *counts)}[form]
        counts = [most] * len(self.held) if form == "all" else counts
        self.extend(new, counts, given, lambda c, k, v: c.prefill(k, v, given))

    def extend(self, new: Tensor, counts: list[int], given: Any, call: Callable[..., None]) -> None:
        known = self.first.lengths is not None and not isinstance(given, Tensor)
        room = [self.first.max_seq_len - n for n in self.lengths]
        fit = all(count <= left for count, left in zip(counts, room, strict=True))
        for cache, (k, v) in zip(self.caches, new, strict=True):
            if known and not fit:
                with nothing_written(cache), pytest.raises(CacheOverflowError):
                    call(cache, k, v)
            else:
                call(cache, k, v)
        if fit or not known:
            self.without_room |= set(self.add(new, counts))

    def do_shorten(self) -> None:
        form = self.random.choice(["int", "ints", "device"])
        most = self.numbers(-2 if form == "device" else 0, self.first.max_seq_len)
        most = most[:1] * len(most) if form == "int" else most
        given = {"int": most[0], "ints": most, "device": on_device(self.first, *most)}[form]
        self.random.choice(self.caches).truncate(given)
        self._keep(most)

    def do_permute(self) -> None:
        order = self.numbers(-1, len(self.held) - 1)
        self.random.choice([self.reorder, self.reorder_on_device])(order)

    def do_empty(self) -> None:
        rows = self.random.sample(range(len(self.held)), self.random.randint(0, len(self.held)))
        self.random.choice(self.caches).reset(rows)
        self.held = [[] if b in rows else h for b, h in enumerate(self.held)]

    def do_look(self) -> None:
        cache = self.random.choice(self.caches)
        if self.random.random() < 0.3:
            cache.forget()
        else:
            assert cache.refresh() == cache.lengths == self.lengths
            assert cache.bound == max(self.lengths)

    def do_report(self) -> None:
        cache = self.random.choice(self.caches)
        if self.without_room:
            named = ", ".join(map(str, sorted(self.without_room)))
            with pytest.raises(CacheOverflowError, match=rf"\[{named}\] have no room"):
                cache.check()
        cache.check()
        self.without_room.clear()


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("seed", range(12))
def test_any_sequence_of_operations_keeps_the_tokens(seed: int, layers: int, device: str) -> None:
    torch.manual_seed(seed)
    walk = Walk(KVCache.for_layers(layers, 3, 9, HEADS, DIM, F16, device), seed)
    for _ in range(40):
        walk.step()
    walk.first.truncate(8)
    walk._keep([8] * 3)
    walk.decode()


def test_prompts_longer_than_the_cache_are_allowed_if_their_tokens_fit(device: str) -> None:
    """Right-padded ones, whose padding is longer than the cache."""
    for known in (True, False):
        cache = new_cache(2, 4, device)
        k, v = tokens(cache, 9)
        cache.prefill(k, v, [3, 1] if known else on_device(cache, 3, 5))
        assert cache.refresh() == [3, 1 if known else 0]
        assert same(bits(cache.k[0, :3], cache.v[0, :3]), bits(k[0, :3], v[0, :3]))
    with pytest.raises(CacheOverflowError, match=r"sequence 1 holds 0 tokens and 5 are"):
        cache.prefill(k, v, [3, 5])


def test_decode_says_whether_lengths_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[object] = []
    monkeypatch.setattr(cache_module, "gqa_decode", lambda *_, ragged, **__: told.append(ragged))
    cache = KVCache(1, 16, 2, 64, dtype=torch.float16, device="cpu")
    q = torch.ones(1, 8, 64, dtype=torch.float16)
    cache.decode(q)
    cache.decode(q, ragged=False)
    assert told == [True, False]


def test_reorder_moves_only_what_changes_and_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = new_cache(5)
    filled(cache, [4, 6, 0, 2, 1])
    calls: list[tuple[int, list[int], list[int] | None]] = []

    def noted(caches: Any, reach: int, sources: Tensor, targets: Tensor | None = None) -> None:
        calls.append((reach, sources.tolist(), None if targets is None else targets.tolist()))
        rows.gather(caches, reach, sources, targets)

    monkeypatch.setattr(cache_module, "gather", noted)
    cache.reorder([0, 1, 2, 3, 4])
    cache.reorder([-1, 1, 2, 3, -1])
    assert calls == []
    cache.reorder([3, 1, 1, 3, 2])  # row 2 is empty: nothing to move from there
    assert calls == [(6, [3, 1], [0, 2])]
    cache.reorder(on_device(cache, 0, 0, -1, 9, 4))
    assert calls[1:] == [(6, [0, 0, 2, 3, 4], None)]


@pytest.mark.parametrize("form", ["ints", "device"])
def test_reorder_takes_little_memory_at_a_time(
    form: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = 2 * 3 * HEADS * DIM * 2  # two tokens of all sequences
    monkeypatch.setattr(rows, "_TEMPORARY_BYTES", limit)
    taken: list[int] = []
    select = Tensor.index_select

    def noted(tensor: Tensor, dim: int, index: Tensor) -> Tensor:
        taken.append((result := select(tensor, dim, index)).nbytes)
        return result

    monkeypatch.setattr(Tensor, "index_select", noted)
    told = Told([new_cache(device=device)])
    told.prefill([5, 9, 7])
    behind = bits(told.first.k[:, 9:], told.first.v[:, 9:])
    reorder = {"ints": told.reorder, "device": told.reorder_on_device}[form]
    reorder([1, 2, 0])
    reorder([2, 2, 1])
    assert max(taken) == limit
    assert same(behind, bits(told.first.k[:, 9:], told.first.v[:, 9:])), (
        "more was moved than is held"
    )


# What the host knows


def test_the_host_knows_what_it_does_itself() -> None:
    cache = new_cache()
    for operation, expected in (
        (lambda: cache.prefill(*tokens(cache, 4), [4, 1, 2]), [4, 1, 2]),
        (lambda: cache.append(*token(cache)), [5, 2, 3]),
        (lambda: cache.prefill(*tokens(cache, 2)), [7, 4, 5]),
        (lambda: cache.decode(queries(cache), *token(cache)), [8, 5, 6]),
        (lambda: cache.truncate(7), [7, 5, 6]),
        (lambda: cache.truncate([9, 2, 3]), [7, 2, 3]),
        (lambda: cache.reorder([1, -1, 0]), [2, 0, 7]),
        (lambda: cache.reset([2]), [2, 0, 0]),
        (lambda: cache.reset(), [0, 0, 0]),
    ):
        operation()
        assert cache.lengths == cache.seqlens.tolist() == expected
        assert cache.bound == max(expected)


def test_after_values_from_the_device_the_host_knows_a_bound() -> None:
    cache = new_cache()
    for operation, bound in (
        (lambda: cache.prefill(*tokens(cache, 3), on_device(cache, 3, 0, 1)), 3),
        (lambda: cache.truncate(on_device(cache, 2, 2, 2)), 3),
        (lambda: cache.reorder(on_device(cache, 2, 1, 0)), 3),
        (lambda: cache.reorder([0, 2, 1]), 3),
        (lambda: cache.append(*token(cache)), 4),
        (lambda: cache.truncate([2, 3, 1]), 3),
        (lambda: cache.reset([1]), 3),
        (lambda: cache.prefill(*tokens(cache, 4)), 7),
        (lambda: cache.truncate(6), 6),
        (lambda: cache.prefill(*tokens(cache, 8), [8, 1, 1]), 12),
        (lambda: cache.forget(), 12),
    ):
        operation()
        assert cache.lengths is None and cache.bound == bound
        assert max(cache.seqlens.tolist()) <= bound
    exact = cache.refresh()
    assert cache.lengths == exact == cache.seqlens.tolist() and cache.bound == max(exact)


@pytest.mark.parametrize(
    "empty",
    [
        lambda c: c.reset(),
        lambda c: c.reset([2, 0, 1, 1]),
        lambda c: c.truncate(0),
        lambda c: c.truncate([0, 0, 0]),
    ],
    ids=["reset", "reset all", "truncate", "truncate all"],
)
def test_an_empty_cache_is_known_to_be_empty(empty: Callable[[KVCache], None]) -> None:
    cache = new_cache()
    filled(cache, [1, 2, 3])
    cache.forget()
    empty(cache)
    assert cache.lengths == cache.seqlens.tolist() == [0, 0, 0] and cache.bound == 0


def test_what_lengths_returns_is_the_callers() -> None:
    cache = new_cache()
    filled(cache, [1, 2, 3])
    for get in (lambda: cache.lengths, cache.refresh):
        mine = get()
        assert mine is not None
        mine[0] = 99
        assert cache.lengths == [1, 2, 3]


def test_lengths_written_by_the_user_need_a_refresh() -> None:
    cache = new_cache()
    filled(cache, [5, 5, 5])
    cache.seqlens[1] = 2
    assert cache.lengths == [5, 5, 5]  # it cannot know
    assert cache.refresh() == cache.lengths == [5, 2, 5]
    k, v = token(cache)
    cache.append(k, v)
    assert same(bits(cache.k[1, 2]), bits(k[1]))


@pytest.mark.parametrize("bad", [13, -1])
def test_refresh_refuses_lengths_that_nothing_can_have(bad: int) -> None:
    cache = new_cache()
    cache.seqlens[1] = bad
    expected = rf"KVCache.refresh: seqlens\[1\]: got {bad}; allowed: 0 to 12"
    with pytest.raises(InputError, match=expected):
        cache.refresh()
    assert cache.lengths is None and cache.bound == 12
    cache.append(*token(cache))  # what has such a length is left alone
    assert cache.seqlens.tolist() == [1, bad, 1]
    with pytest.raises(CacheOverflowError, match=r"\[1\]"):
        cache.check()


def test_layers_share_lengths_that_the_last_one_moves(device: str) -> None:
    first, last = KVCache.for_layers(2, 2, 8, HEADS, DIM, F16, device)
    k, v = tokens(first, 3)
    one = k[:, 0], v[:, 0]
    for operation, moved in (
        (lambda c: c.prefill(k, v, [3, 1]), [3, 1]),
        (lambda c: c.append(*one), [4, 2]),
        (lambda c: c.decode(queries(c), *one), [5, 3]),
        (lambda c: c.reorder([1, 0]), [3, 5]),
        (lambda c: c.prefill(k, v, on_device(c, 2, 3)), [5, 8]),
        (lambda c: c.reorder(on_device(c, 0, 0)), [5, 5]),
    ):
        before = first.seqlens.tolist(), first.lengths, first.bound
        operation(first)
        assert (first.seqlens.tolist(), first.lengths, first.bound) == before
        operation(last)
        assert first.seqlens.tolist() == last.seqlens.tolist() == moved
        assert first.lengths == last.lengths and first.bound == last.bound
    first.truncate(2)
    assert last.seqlens.tolist() == [2, 2] and last.bound == 2


# What does not fit


@pytest.mark.parametrize("method", ["decode", "append", "prefill"])
def test_what_is_known_not_to_fit_is_refused_before_anything_is_written(
    method: str, device: str
) -> None:
    cache = new_cache(7, 4, device)
    filled(cache, [4, 1, 4, 4, 4, 4, 4])
    k, v = token(cache)
    call = {
        "decode": lambda: cache.decode(queries(cache), k, v),
        "append": lambda: cache.append(k, v),
        "prefill": lambda: cache.prefill(k[:, None], v[:, None], [1, 1, 1, 1, 1, 1, 0]),
    }[method]
    with nothing_written(cache), pytest.raises(CacheOverflowError) as raised:
        call()
    message = str(raised.value)
    assert message.startswith(f"KVCache.{method}: cache overflow: sequence 0 holds 4 tokens and 1 ")
    assert "sequence 1 " not in message and "sequence 4 holds 4 tokens and 1 is" in message
    left = 1 if method == "prefill" else 2
    assert "sequence 5 holds" not in message and f"and {left} more like these" in message
    assert "max_seq_len is 4. Nothing was written." in message and "truncate" in message
    cache.check()  # nothing was noted on the device either


def test_a_prompt_that_fits_no_cache_is_refused_whatever_the_lengths() -> None:
    cache = new_cache(2, 4)
    cache.forget()
    k, v = tokens(cache, 5)
    with nothing_written(cache):
        with pytest.raises(CacheOverflowError, match="sequence 0 holds 0 or more tokens and 5 are"):
            cache.prefill(k, v)
        with pytest.raises(CacheOverflowError, match="overflow: sequence 1 holds 0 or more tokens"):
            cache.prefill(k, v, [4, 5])


def test_a_decode_that_the_device_finds_not_to_fit_spoils_only_its_sequence(device: str) -> None:
    cache = new_cache(4, 5, device)
    filled(cache, [5, 2, 5, 4])
    cache.forget()
    before, (k, v) = bits(cache.k, cache.v), token(cache)
    q = queries(cache)
    out = cache.decode(q, k, v)
    with pytest.raises(CacheOverflowError, match=r"cache_seqlens\[[02]\]"):
        cache.check()
    cache.check()  # reported once
    assert out[[0, 2]].isnan().all() and not out[[1, 3]].isnan().any()
    expected = gqa_decode(q, cache.k, cache.v, cache_seqlens=cache.seqlens)
    assert torch.equal(out[[1, 3]], expected[[1, 3]])
    for name, old, new in zip("kv", before, (k, v), strict=True):
        old.view(F16)[1, 2], old.view(F16)[3, 4] = new[1], new[3]
        assert same([old], bits(getattr(cache, name))), name
    assert cache.seqlens.tolist() == [5, 3, 5, 5] and cache.bound == 5


def test_a_later_decode_reports_what_the_device_found(device: str) -> None:
    cache = new_cache(2, 5, device)
    filled(cache, [5, 2])
    cache.forget()
    cache.decode(queries(cache), *token(cache))
    if device == "cuda":
        torch.cuda.synchronize()
    with nothing_written(cache), pytest.raises(CacheOverflowError, match="earlier call"):
        cache.decode(queries(cache), *token(cache))
    cache.refresh()
    with pytest.raises(CacheOverflowError, match="KVCache.decode: .* sequence 0 holds 5 tokens"):
        cache.decode(queries(cache), *token(cache))


@pytest.mark.parametrize("method", ["append", "prefill", "prefill, lengths on the device"])
def test_half_a_batch_that_does_not_fit_leaves_the_other_half_right(
    method: str, device: str
) -> None:
    told = Told([new_cache(4, 6, device)])
    (cache,) = told.caches
    told.prefill([6, 1, 6, 3] if method == "append" else [6, 1, 5, 3])
    cache.forget()
    before, new = bits(cache.k, cache.v), told.new(1 if method == "append" else 3)
    k, v = new[0]
    if method == "append":
        counts = [1, 1, 1, 1]
        cache.append(k, v)
    elif method == "prefill":
        counts = [3, 3, 3, 3]
        cache.prefill(k, v)
    else:
        counts = [1, 3, 2, 0]
        cache.prefill(k, v, on_device(cache, *counts))
    assert told.add(new, counts) == [0, 2]
    told.check()
    for old, now in zip(before, bits(cache.k, cache.v), strict=True):
        assert torch.equal(old[[0, 2]], now[[0, 2]])  # to the end of the rows
        for b, length in enumerate(told.lengths):
            assert torch.equal(old[b, length:], now[b, length:])
    with pytest.raises(CacheOverflowError) as raised:
        cache.check()
    assert "sequences [0, 2] have no room" in str(raised.value)
    assert "max_seq_len is 6" in str(raised.value) and "Nothing was written" in str(raised.value)
    cache.check()  # reported once
    told.truncate([5, 5, 5, 5])
    told.decode()


def test_findings_are_kept_until_they_are_reported(device: str) -> None:
    first, last = KVCache.for_layers(2, 2, 4, HEADS, DIM, F16, device)
    for cache in (first, last):
        filled(cache, [4, 1])
    first.forget()
    first.append(*token(first))  # not the one that moves the lengths
    first.truncate(2)
    last.append(*token(last))
    last.reset()
    with pytest.raises(CacheOverflowError, match=r"\[0\] have no room"):
        last.check()
    first.check()


def test_findings_of_append_and_of_decode_are_reported_together(device: str) -> None:
    cache = new_cache(2, 4, device)
    filled(cache, [1, 4])
    cache.forget()
    cache.append(*token(cache))
    cache.decode(queries(cache), *token(cache))
    with pytest.raises(CacheOverflowError, match=r"\[1\] have no room.*cache_seqlens\[1\]"):
        cache.check()
    cache.check()


@pytest.mark.parametrize(
    "counts", [(-1, 1), (4, 1), (2**31 - 1, 1), (-(2**31), 1)], ids=lambda c: str(c[0])
)
def test_numbers_of_tokens_that_were_not_given_do_not_fit(
    counts: tuple[int, int], device: str
) -> None:
    told = Told([new_cache(2, 8, device)])
    (cache,) = told.caches
    told.prefill([2, 3])
    new = told.new(3)
    cache.prefill(*new[0], on_device(cache, *counts))
    assert told.add(new, counts) == [0]
    told.check()
    with pytest.raises(
        CacheOverflowError, match=r"\[0\].*or a number of tokens that was not given"
    ):
        cache.check()


@pytest.mark.parametrize("bad", [9, 2**31 - 1, -1, -(2**31)])
def test_lengths_that_the_user_spoilt_write_nothing(bad: int, device: str) -> None:
    cache = new_cache(2, 8, device)
    filled(cache, [3, 3])
    cache.seqlens[0] = bad
    cache.forget()
    before = bits(cache.k, cache.v)
    cache.append(*token(cache))
    out = cache.decode(queries(cache), *token(cache))
    assert out[0].isnan().all() and not out[1].isnan().any()
    assert cache.seqlens.tolist() == [bad, 5]
    for old, now in zip(before, bits(cache.k, cache.v), strict=True):
        assert torch.equal(old[0], now[0])
    with pytest.raises(CacheOverflowError):
        cache.check()


# CUDA graphs, as far as they can be had without a GPU: a call is taken to be a capture and a replay


def test_after_a_capture_the_host_knows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    recover: list[Callable[[KVCache], object]]
    recover = [lambda c: c.refresh(), lambda c: c.reset(), lambda c: c.truncate(0)]
    for again in recover:
        cache = new_cache()
        with captured(monkeypatch):
            cache.append(*token(cache))
            assert cache.lengths is None
        assert cache.lengths is None and cache.bound == 12
        cache.append(*token(cache))
        assert cache.lengths is None and cache.bound == 12
        again(cache)
        assert cache.lengths == cache.seqlens.tolist() and cache.bound == cache.lengths[0]


def test_a_captured_decode_does_not_raise_for_lengths_at_capture_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cache = new_cache(2, 4)
    filled(cache, [4, 1])
    with captured(monkeypatch):
        out = cache.decode(queries(cache), *token(cache))
    assert out[0].isnan().all() and not out[1].isnan().any()
    assert cache.seqlens.tolist() == [4, 2]
    with pytest.raises(CacheOverflowError):
        cache.check()


def test_captured_calls_that_move_nothing_leave_the_host_its_knowledge(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first, _last = KVCache.for_layers(2, 2, 8, HEADS, DIM, F16, "cpu")
    filled(_last, [3, 1])
    with captured(monkeypatch):
        first.decode(queries(first))
        first.append(*token(first))
    assert first.lengths == [3, 1]


@pytest.mark.parametrize("prompt", [0, 4])
@pytest.mark.parametrize("operation", ["append", "prefill", "ragged", "reorder", "on device"])
def test_replays_that_the_host_does_not_see_spoil_no_data(
    operation: str, prompt: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Capture, reset, prompts, replays, and on: without a refresh, which would be the rule."""
    told = Told([new_cache(3, 12)])
    (cache,) = told.caches
    with captured(monkeypatch):
        cache.append(*token(cache))
    cache.reset()
    told.prefill([prompt] * 3)
    for _ in range(7):
        replay(told)
    assert cache.lengths == [prompt] * 3  # outdated
    new = told.new(2)
    if operation == "append":
        cache.append(*new[0, :, :, :1])
        told.add(new, [1, 1, 1])
    elif operation in ("prefill", "ragged"):
        counts = [2, 2, 2] if operation == "prefill" else [2, 0, 1]
        cache.prefill(*new[0], counts)
        without = told.add(new, counts)
        assert without == ([b for b in range(3) if counts[b] > 1] if prompt else [])
        if without:
            with pytest.raises(CacheOverflowError, match="have no room"):
                cache.check()
    else:
        cache.reorder([1, 2, -1] if operation == "reorder" else on_device(cache, 1, 2, -1))
        told.held = [told.held[1], told.held[2], []]
    cache.refresh()
    told.check()


def replay(told: Told) -> None:
    """What a graph of an append does when it is replayed: the host sees nothing of it."""
    (cache,), new = told.caches, told.new(1)
    k, v = new[0]
    for b, length in enumerate(told.lengths):
        cache.k[b, length], cache.v[b, length] = k[b, 0], v[b, 0]
    cache.seqlens.add_(1)
    told.add(new, [1] * len(told.held))


def test_a_capture_refuses_what_no_replay_could_do(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = new_cache(2, 8)
    k, v = tokens(cache, 3)
    with captured(monkeypatch):
        for call in (
            lambda: cache.prefill(k, v, [1, 2]),
            lambda: cache.truncate([1, 2]),
            lambda: cache.reorder([1, 0]),
            lambda: cache.reset([1]),
            lambda: cache.refresh(),
            lambda: cache.check(),
        ):
            with nothing_written(cache), pytest.raises(InputError, match="in a CUDA-graph capture"):
                call()
        with pytest.raises(InputError, match="got a CUDA-graph capture; allowed: to allocate bef"):
            new_cache()
        for allowed in (
            lambda: cache.prefill(k, v),
            lambda: cache.prefill(k, v, on_device(cache, 1, 2)),
            lambda: cache.truncate(3),
            lambda: cache.truncate(on_device(cache, 1, 2)),
            lambda: cache.reorder(on_device(cache, 1, 0)),
            lambda: cache.reset(),
        ):
            allowed()
            assert cache.lengths is None and cache.bound == 8


# What is refused


def wrong(cache: KVCache, *shape: int, **options: Any) -> Tensor:
    kind: dict[str, Any] = dict(dtype=cache.k.dtype, device=cache.device) | options
    return torch.zeros(*shape, **kind)


@pytest.mark.parametrize(
    ("method", "bad", "got"),
    [
        ("append", lambda c: None, "a NoneType"),
        ("append", lambda c: wrong(c, 3, HEADS), r"torch.float16 \[3, 1\]"),
        ("append", lambda c: wrong(c, 3, 2, HEADS, DIM), r"torch.float16 \[3, 2, 1, 64\]"),
        ("append", lambda c: wrong(c, 2, HEADS, DIM), r"torch.float16 \[2, 1, 64\]"),
        ("append", lambda c: wrong(c, 3, 2, DIM), r"torch.float16 \[3, 2, 64\]"),
        ("append", lambda c: wrong(c, 3, 1, HEADS, 32), r"torch.float16 \[3, 1, 1, 32\]"),
        ("append", lambda c: wrong(c, 3, HEADS, DIM, dtype=torch.bfloat16), "torch.bfloat16"),
        ("append", lambda c: wrong(c, 3, HEADS, DIM, device="meta"), ".* on meta"),
        ("append", lambda c: wrong(c, 3, HEADS, DIM).to_sparse(), "a torch.sparse_coo tensor"),
        ("append", lambda c: wrong(c, 3, HEADS, DIM, requires_grad=True), ".*requires grad"),
        ("prefill", lambda c: [1], "a list"),
        ("prefill", lambda c: wrong(c, 3, HEADS, DIM), r"torch.float16 \[3, 1, 64\]"),
        ("prefill", lambda c: wrong(c, 2, 2, HEADS, DIM), r"torch.float16 \[2, 2, 1, 64\]"),
        ("prefill", lambda c: wrong(c, 3, 2, 2, DIM), r"torch.float16 \[3, 2, 2, 64\]"),
        ("prefill", lambda c: wrong(c, 3, 2, HEADS, 72), r"torch.float16 \[3, 2, 1, 72\]"),
        ("prefill", lambda c: wrong(c, 3, 2, HEADS, DIM, dtype=torch.float32), "torch.float32"),
        ("prefill", lambda c: wrong(c, 3, 2, HEADS, DIM, device="meta"), ".* on meta"),
        ("prefill", lambda c: wrong(c, 3, 2, HEADS, DIM, requires_grad=True), ".*requires grad"),
    ],
)
def test_tokens_of_another_kind_are_refused(
    method: str, bad: Callable[[KVCache], Any], got: str
) -> None:
    cache = new_cache()
    good = wrong(cache, *([3, HEADS, DIM] if method == "append" else [3, 2, HEADS, DIM]))
    for name, arguments in (("k", (bad(cache), good)), ("v", (good, bad(cache)))):
        expected = rf"^KVCache.{method}: {name}: got {got}.*; allowed: .*Nothing was written\.$"
        with nothing_written(cache), pytest.raises(InputError, match=expected):
            getattr(cache, method)(*arguments)


def test_a_prompts_keys_and_values_must_be_as_many() -> None:
    cache = new_cache()
    with pytest.raises(
        InputError, match=r"prefill: v: got .*\[3, 2, 1, 64\].*; allowed: k's shape"
    ):
        cache.prefill(tokens(cache, 3)[0], tokens(cache, 2)[1])


@pytest.mark.parametrize("method", ["prefill", "truncate", "reorder", "reset"])
@pytest.mark.parametrize(
    "bad",
    [
        [1, 2],
        [1, 2, 3, 4],
        [1, 99, 1],
        [1, -2, 1],
        [1, True, 1],
        [1, 1.0, 1],
        "012",
        {1, 2, 3},
        2.5,
        True,
        -1,
        torch.zeros(3, dtype=torch.float32),
        torch.zeros(3, dtype=torch.int16),
        torch.zeros(2, dtype=torch.int32),
        torch.zeros(3, 1, dtype=torch.int32),
        torch.zeros(3, dtype=torch.int32, device="meta"),
        torch.zeros(3, dtype=torch.int32).to_sparse(),
    ],
    ids=str,
)
def test_lengths_and_indices_of_another_kind_are_refused(method: str, bad: Any) -> None:
    cache = new_cache()
    filled(cache, [1, 2, 3])
    if method == "reset" and bad in ([1, 2],):
        cache.reset(bad)
        return
    call = {
        "prefill": lambda: cache.prefill(*tokens(cache, 2), bad),
        "truncate": lambda: cache.truncate(bad),
        "reorder": lambda: cache.reorder(bad),
        "reset": lambda: cache.reset(bad),
    }[method]
    expected = rf"^KVCache.{method}: .*: got .*; allowed: .*Nothing was written\.$"
    with nothing_written(cache), pytest.raises(InputError, match=expected):
        call()


def test_int64_is_for_indices_only() -> None:
    cache = new_cache()
    filled(cache, [1, 2, 3])
    wide = on_device(cache, 2, 1, 0, dtype=torch.int64)
    cache.reorder(wide)
    assert cache.seqlens.tolist() == [3, 2, 1]
    for call in (lambda: cache.truncate(wide), lambda: cache.prefill(*tokens(cache, 3), wide)):
        with pytest.raises(InputError, match="got torch.int64.*; allowed: torch.int32"):
            call()


def test_what_gqa_decode_refuses_changes_no_length() -> None:
    cache = new_cache()
    k, v = token(cache)
    with nothing_written(cache):
        with pytest.raises(InputError, match="gqa_decode: q"):
            cache.decode(queries(cache).float(), k, v)
        with pytest.raises(InputError, match="gqa_decode: k and v: got no v"):
            cache.decode(queries(cache), k)


# Gradients and inference mode


def test_a_cache_works_in_and_out_of_inference_mode(device: str) -> None:
    """Wherever it was made, and wherever what it is given was."""
    modes = [torch.inference_mode, torch.no_grad, torch.enable_grad]
    for made in modes:
        with made():
            cache = new_cache(device=device)
        for used in modes:
            with used():
                cache.reset()
                k, v = tokens(cache, 2)
            for then in modes:
                with then():
                    cache.prefill(k, v, on_device(cache, 2, 1, 0))
                    cache.append(k[:, 0], v[:, 0])
                    cache.truncate(2)
                    cache.reorder([1, 0, 2])
                    cache.reorder(on_device(cache, 1, 0, 2))
                    cache.refresh()
                    cache.append(k[:, 1], v[:, 1])
                    cache.reset([0])
        assert not (cache.k.requires_grad or cache.v.requires_grad)


def test_gradients_are_not_tracked() -> None:
    cache = new_cache()
    k, v = (t.requires_grad_() for t in tokens(cache, 2))
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            cache.prefill(k, v)
            cache.prefill(k, v, on_device(cache, 1, 1, 0))
    assert cache.k.grad_fn is None and not cache.k.requires_grad


# Memory


def test_a_cache_too_large_for_the_cpu_says_what_would_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    available = 64 * 2**20
    monkeypatch.setattr(allocation, "available_bytes", lambda device, held=True: available)
    with pytest.raises(CacheAllocationError) as raised:
        KVCache.for_layers(2, 3, 2**30, 2, 64, F16, "cpu")
    message = str(raised.value)
    needed = KVCache.bytes_needed(3, 2**30, 2, 64, num_layers=2)
    assert f"{needed} bytes (3072.00 GiB)" in message and "in each of 2 layers" in message
    assert "[3, 1073741824, 2, 64] (batch_size, max_seq_len, num_kv_heads, head_dim)" in message
    assert f"free on cpu: {available} bytes" in message and "Nothing was allocated." in message
    longest = int(message.split("max_seq_len up to ")[1].split()[0])
    assert KVCache.for_layers(2, 3, longest, 2, 64, F16, "cpu")[0].max_seq_len == longest
    assert KVCache.bytes_needed(3, longest, 2, 64, num_layers=2) > 0.8 * available
    with pytest.raises(CacheAllocationError):
        KVCache.for_layers(2, 3, longest * 5 // 4, 2, 64, F16, "cpu")


def test_where_not_even_one_token_fits_none_is_promised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocation, "available_bytes", lambda device, held=True: 1000)
    with pytest.raises(CacheAllocationError, match="no max_seq_len fits"):
        KVCache(4, 1, 1, 64, F16, "cpu")


def test_a_really_too_large_cache_is_an_error_of_memory_and_of_this_package() -> None:
    for kind in (CacheAllocationError, MemoryError, GqaError):
        with pytest.raises(kind, match="max_seq_len up to [1-9][0-9]* fits"):
            KVCache(64, 2**30, 1, 64, F16, "cpu")


def test_a_refusal_of_the_allocator_is_the_same_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where what seemed to be free was not: torch's own allocator refuses 8 TiB."""
    monkeypatch.setattr(allocation, "available_bytes", lambda device, held=True: 2**60 * held)
    with pytest.raises(CacheAllocationError, match="no max_seq_len fits") as raised:
        KVCache(64, 2**30, 1, 64, F16, "cpu")
    assert raised.value.__context__ is None  # whose traceback would keep tensors
    monkeypatch.setattr(allocation, "available_bytes", lambda device, held=True: 2**60)
    with pytest.raises(CacheAllocationError, match=f"max_seq_len up to {2**30 - 1} fits"):
        KVCache(64, 2**30, 1, 64, F16, "cpu")  # and what was refused is not promised


def test_available_memory_is_read_where_linux_says_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "meminfo"
    monkeypatch.setattr(allocation, "_MEMINFO", path)
    cpu = torch.device("cpu")
    assert allocation.available_bytes(cpu) > 2**20  # without the file
    path.write_text("MemFree: 1 kB\nMemAvailable:   2048 kB\n")
    assert allocation.available_bytes(cpu) == 2**21


# What only a GPU has


@pytest.fixture
def graph() -> torch.cuda.CUDAGraph:
    return torch.cuda.CUDAGraph()


@pytest.mark.gpu
@pytest.mark.parametrize("layers", [1, 2])
def test_a_graph_advances_the_lengths_until_they_overflow(
    layers: int, graph: torch.cuda.CUDAGraph
) -> None:
    told = Told(KVCache.for_layers(layers, 2, 6, HEADS, DIM, F16, "cuda"))
    q, new = queries(told.first), told.new(1)
    outs = [torch.empty_like(q) for _ in told.caches]

    def forward() -> None:
        for cache, out, (k, v) in zip(told.caches, outs, new, strict=True):
            cache.decode(q, k, v, out=out)

    told.first.forget()
    forward()
    told.first.reset()
    told.prefill([3, 1])
    with torch.cuda.graph(graph):
        forward()
    assert told.first.lengths is None and told.first.bound == 6
    assert told.first.seqlens.tolist() == [3, 1], "capturing moved the lengths"
    for full in (False, False, False, True):
        q.copy_(queries(told.first)), new.copy_(told.new(1))
        graph.replay()
        assert told.add(new.clone(), [1, 1]) == ([0] if full else [])
        told.check()
        for layer, out in enumerate(outs):
            held = on_device(told.first, *told.lengths)
            expected = gqa_decode(q, *told.dense(layer), cache_seqlens=held) if not full else None
            assert bool(out[0].isnan().all()) == full and not out[1].isnan().any()
            assert expected is None or torch.equal(out, expected)
    with pytest.raises(CacheOverflowError, match=r"cache_seqlens\[0\]"):
        told.first.check()
    assert told.first.refresh() == told.lengths == [6, 5]
    with pytest.raises(CacheOverflowError, match="KVCache.decode: .* sequence 0 holds 6 tokens"):
        told.first.decode(q, *new[0, :, :, 0])


@pytest.mark.gpu
def test_a_graph_of_appends_advances_the_lengths_until_they_overflow(
    graph: torch.cuda.CUDAGraph,
) -> None:
    told = Told([new_cache(2, 6, "cuda")])
    (cache,) = told.caches
    new = told.new(1)
    cache.forget()
    cache.append(*new[0])
    cache.reset()
    told.prefill([3, 1])
    with torch.cuda.graph(graph):
        cache.append(*new[0])
    for full in (False, False, False, True):
        new.copy_(told.new(1))
        graph.replay()
        assert told.add(new.clone(), [1, 1]) == ([0] if full else [])
        told.check()
    with pytest.raises(CacheOverflowError, match=r"\[0\] have no room"):
        cache.check()


@pytest.mark.gpu
def test_a_capture_on_a_gpu_refuses_what_no_replay_could_do(graph: torch.cuda.CUDAGraph) -> None:
    cache = new_cache(2, 8, "cuda")
    k, v = tokens(cache, 3)
    indices = on_device(cache, 1, 0)
    cache.prefill(k, v, indices)
    cache.reorder(indices)
    cache.reset()
    with torch.cuda.graph(graph):
        for call in (lambda: cache.prefill(k, v, [1, 2]), cache.refresh, cache.check):
            with pytest.raises(InputError, match="in a CUDA-graph capture"):
                call()
        cache.prefill(k, v, indices)
        cache.reorder(indices)
    assert cache.lengths is None
    graph.replay()
    assert cache.refresh() == [0, 1]
    assert same(bits(cache.k[1, 0]), bits(k[0, 0]))


@pytest.mark.gpu
def test_nothing_waits_for_the_gpu() -> None:
    first, last = KVCache.for_layers(2, 3, 40, HEADS, DIM, F16, "cuda")
    k, v = tokens(first, 2)
    q, counts, order = queries(first), on_device(first, 2, 0, 1), on_device(first, 1, -1, 0)

    def everything() -> None:
        for cache in (first, last):
            cache.prefill(k, v)
            cache.prefill(k, v, [1, 2, 0])
            cache.decode(q, k[:, 0], v[:, 0])
            cache.append(k[:, 0], v[:, 0])
            cache.reorder([1, 0, -1])
            cache.truncate([3, 4, 5])
            cache.reset([1])
            cache.prefill(k, v, counts)
            cache.reorder(order)
            cache.truncate(counts)
            cache.append(k[:, :1], v[:, :1])
            cache.decode(q, k[:, 0], v[:, 0])
            cache.forget()
            cache.append(k[:, 0], v[:, 0])
            cache.decode(q, k[:, 0], v[:, 0])
            cache.truncate(5)
            cache.reset()

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
    last.check()


@pytest.mark.gpu
def test_a_cache_too_large_for_the_gpu_says_what_fits() -> None:
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    with pytest.raises(CacheAllocationError, match="free on cuda:") as raised:
        KVCache.for_layers(2, 8, 2**30, 8, 128, torch.bfloat16, "cuda")
    assert torch.cuda.memory_allocated() == before
    longest = int(str(raised.value).split("max_seq_len up to ")[1].split()[0])
    assert KVCache.bytes_needed(8, longest, 8, 128, num_layers=2) > 0.9 * (
        allocation.available_bytes(torch.device("cuda", torch.cuda.current_device()))
    )
    caches = KVCache.for_layers(2, 8, longest, 8, 128, torch.bfloat16, "cuda")
    assert torch.cuda.memory_allocated() > before
    caches.clear()
    assert torch.cuda.memory_allocated() == before
    torch.cuda.empty_cache()


@pytest.mark.gpu
def test_a_refusal_of_the_gpus_allocator_is_the_same_error(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = allocation.available_bytes
    monkeypatch.setattr(
        allocation, "available_bytes", lambda device, held=True: 2**60 if held else honest(device)
    )
    before = torch.cuda.memory_allocated()
    torch.cuda.empty_cache()
    _, total = torch.cuda.mem_get_info()
    room = total * 3 // 2 // KVCache.bytes_needed(8, 1, 8, 128, num_layers=4)  # some layers fit
    with pytest.raises(CacheAllocationError, match="free on cuda:") as raised:
        KVCache.for_layers(4, 8, room, 8, 128, F16, "cuda")
    assert torch.cuda.memory_allocated() == before
    longest = int(str(raised.value).split("max_seq_len up to ")[1].split()[0])
    available = honest(torch.device("cuda", torch.cuda.current_device()))
    assert KVCache.bytes_needed(8, longest, 8, 128, num_layers=4) > 0.9 * available
    KVCache.for_layers(4, 8, longest, 8, 128, F16, "cuda")
    torch.cuda.empty_cache()
