"""What does not fit into a cache: refused by the host, or found on the device."""

from __future__ import annotations

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

from gqa_cutlass import (
    CacheOverflowError,
    KVCache,
    gqa_decode,
)


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


@pytest.mark.parametrize("negative", [-1, -(2**31)])
def test_rows_of_negative_length_stay_inactive(negative: int, device: str) -> None:
    cache = new_cache(2, 8, device)
    filled(cache, [3, 3])
    cache.seqlens[0] = negative
    cache.forget()
    before = bits(cache.k, cache.v)
    cache.truncate(4)  # since when it is known that there is room
    cache.append(*token(cache))
    out = cache.decode(queries(cache), *token(cache))
    cache.prefill(*(t.unsqueeze(1) for t in token(cache)))
    assert (out[0] == 0).all() and not out[1].isnan().any()
    assert cache.seqlens.tolist() == [negative, 6] == cache.refresh()
    cache.check()
    for old, now in zip(before, bits(cache.k, cache.v), strict=True):
        assert torch.equal(old[0], now[0])
    cache.append(*token(cache))
    assert cache.seqlens.tolist() == [negative, 7]
    cache.reset([0])
    assert cache.refresh() == [0, 7]
    cache.decode(queries(cache), *token(cache))
    assert cache.lengths == [1, 8]


@pytest.mark.parametrize("bad", [9, 2**31 - 1])
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
