"""What a cache's methods refuse, and gradients and inference mode."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from cache_model import (
    DIM,
    HEADS,
    filled,
    new_cache,
    nothing_written,
    on_device,
    queries,
    token,
    tokens,
)
from torch import Tensor

from gqa_cutlass import (
    InputError,
    KVCache,
)


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
        InputError, match=r"prefill: v: got .*\[3, 2, 1, 64\].*; allowed: as many tokens as k, 3"
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


class Changing(Sequence[int]):
    """Says that it has three values, and has others whenever it is asked."""

    def __init__(self) -> None:
        self.times = 0

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: Any) -> Any:
        raise IndexError

    def __iter__(self) -> Iterator[int]:
        self.times += 1
        return iter([1, 0, 2] if self.times == 1 else [99] * 99)


def test_sequences_are_read_once() -> None:
    cache = new_cache()
    filled(cache, [3, 4, 5])
    cache.reorder(Changing())
    assert cache.lengths == cache.seqlens.tolist() == [4, 3, 5]
    cache.truncate(Changing())
    assert cache.lengths == cache.seqlens.tolist() == [1, 0, 2]
    cache.prefill(*tokens(cache, 2), Changing())
    assert cache.lengths == cache.seqlens.tolist() == [2, 0, 4]
    again = Changing()
    list(again)
    with nothing_written(cache), pytest.raises(InputError, match="got 99"):
        cache.truncate(again)


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
