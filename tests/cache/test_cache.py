"""KVCache: what it is, what is decoded, appended, moved and kept."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from cache_model import (
    DIM,
    F16,
    HEADS,
    Told,
    bits,
    filled,
    new_cache,
    nothing_written,
    on_device,
    queries,
    same,
    token,
    tokens,
)
from torch import Tensor

from gqa_cutlass import (
    CacheAllocationError,
    CacheOverflowError,
    InputError,
    KVCache,
    gqa_decode,
)
from gqa_cutlass.cache import kv_cache as cache_module
from gqa_cutlass.cache import rows
from gqa_cutlass.errors import DeviceError

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
        ("num_kv_heads", -1, "an int from 1 to 2147483647"),
        ("num_kv_heads", 2**31, "an int from 1 to 2147483647"),
        ("num_kv_heads", "2", "an int from 1 to 2147483647"),
        ("head_dim", 65, "multiples of 8 from 32"),
        ("head_dim", 64.0, "multiples of 8 from 32"),
        ("dtype", torch.float32, "torch.float16 or torch.bfloat16"),
        ("dtype", "float16", "torch.float16 or torch.bfloat16"),
        ("device", "meta", "a CUDA device, such as 'cuda:0', or 'cpu'"),
        ("device", "nonsense", "a CUDA device, such as 'cuda:0', or 'cpu'"),
        ("device", None, "a CUDA device, such as 'cuda:0', or 'cpu'"),
        ("device", True, "a CUDA device, such as 'cuda:0', or 'cpu'"),
        ("device", 256, "a CUDA device, such as 'cuda:0', or 'cpu'"),  # of which torch makes 0
        ("device", "cuda:256", "a CUDA device, such as 'cuda:0', or 'cpu'"),
        ("device", "cpu:300", "a CUDA device, such as 'cuda:0', or 'cpu'"),
        ("device", -1, "a CUDA device, such as 'cuda:0', or 'cpu'"),
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


@pytest.mark.parametrize("digits", [20, 400, 5000])
def test_numbers_that_no_machine_holds_are_refused_and_said_shortly(digits: int) -> None:
    """Python prints no int of more than 4,300 digits, and makes no float of one of 400."""
    cache, number = new_cache(), 10**digits
    k, v = tokens(cache, 1)
    sizes = ["num_layers", "batch_size", "max_seq_len", "num_kv_heads", "head_dim", "device"]
    kind = dict(SIZES, num_layers=2)
    calls: list[Callable[[], object]] = [
        *(partial(KVCache.for_layers, **kind | {name: number}) for name in sizes),
        *(partial(KVCache.for_layers, **kind | {name: -number}) for name in sizes),
        lambda: KVCache.bytes_needed(1, 1, number, 64),
        lambda: cache.prefill(k, v, [0, number, 1]),
        lambda: cache.truncate(number),
        lambda: cache.truncate([0, -number, 1]),
        lambda: cache.reorder([number, 1, 2]),
        lambda: cache.reset([number]),
    ]
    for call in calls:
        with pytest.raises(InputError) as raised:
            call()
        assert len(str(raised.value)) < 300


def test_the_largest_sizes_have_a_number_of_bytes_and_no_memory() -> None:
    most = 2**31 - 1
    needed = KVCache.bytes_needed(65535, 2**30, most, 256, num_layers=most)
    assert needed == 2 * most * 65535 * 2**30 * most * 256 * 2 + 65535 * 12
    with pytest.raises(CacheAllocationError, match=f"{needed} bytes"):
        KVCache.for_layers(most, 65535, 2**30, most, 256, F16, "cpu")


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
    monkeypatch.setattr(
        cache_module, "gqa_decode", lambda *_, **options: told.append(options.get("ragged", True))
    )
    cache = KVCache(1, 16, 2, 64, dtype=torch.float16, device="cpu")
    q = torch.ones(1, 8, 64, dtype=torch.float16)
    cache.decode(q)
    cache.decode(q, ragged=False)
    assert told == [True, False]


def test_reorder_moves_only_what_changes_and_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = new_cache(5)
    filled(cache, [4, 6, 0, 2, 1])
    calls: list[tuple[int, list[int], list[int] | None]] = []

    def noted(
        caches: Any, reach: int, sources: Tensor, targets: Tensor | None, buffer: Tensor
    ) -> None:
        calls.append((reach, sources.tolist(), None if targets is None else targets.tolist()))
        rows.gather(caches, reach, sources, targets, buffer)

    monkeypatch.setattr(cache_module, "gather", noted)
    cache.reorder([0, 1, 2, 3, 4])
    cache.reorder([-1, 1, 2, 3, -1])
    assert calls == []
    cache.reorder([3, 1, 1, 3, 2])  # row 2 is empty: nothing to move from there
    assert calls == [(6, [3, 1], [0, 2])]
    cache.reorder(on_device(cache, 0, 0, -1, 9, 4))
    assert calls[1:] == [(6, [0, 0, 2, 3, 4], None)]
