"""Attention to sequences that lie one behind the other, against the reference."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import pytest
import torch
from compiling import GROUP
from helpers import few
from torch import Tensor

from gqa_cutlass import InputError
from gqa_cutlass.integrations import flash_kernel
from gqa_cutlass.integrations.flash_kernel import flash_attn_varlen_func
from gqa_cutlass.proof import reference

pytestmark = pytest.mark.xdist_group(GROUP)

HEADS, GROUPS = 8, 4
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window_size": (4, 4)},  # as transformers passes both sides of one
    "softcap and sinks": {"softcap": 1.5, "s_aux": torch.linspace(-2, 3, HEADS)},
}


def ends(counts: Sequence[int], device: str) -> Tensor:
    return torch.tensor([0, *accumulate(counts)], dtype=torch.int32, device=device)


def check_varlen(
    queries: Sequence[int], keys: Sequence[int], device: str, head_dim: int = 64,
    padding: int = 0, **options: Any,
) -> None:  # fmt: skip
    """The output of sequences with so many queries and keys is right."""
    generator = torch.Generator(device).manual_seed(0)

    def random(tokens: int, heads: int) -> Tensor:
        made = torch.randn(tokens, heads, head_dim, generator=generator, device=device)
        return made.half()

    q = random(sum(queries) + padding, HEADS)
    k, v = random(sum(keys), HEADS // GROUPS), random(sum(keys), HEADS // GROUPS)
    q_ends, k_ends = ends(queries, device), ends(keys, device)
    if (sinks := options.get("s_aux")) is not None:
        options["s_aux"] = sinks.to(device)
    out = flash_attn_varlen_func(
        q, k, v, q_ends, k_ends, max(queries), max(keys), causal=True, **options
    )
    of = {"softcap": "softcap", "s_aux": "sinks", "window_size": "window_size"}
    table = k_ends[:-1, None] + torch.arange(max(keys), device=device)

    def right(dtype: torch.dtype) -> Tensor:
        return reference.attend(
            q[: sum(queries)], k.unsqueeze(1), v.unsqueeze(1), list(keys), head_dim**-0.5, dtype,
            block_table=table, cu_seqlens_q=q_ends,
            **{of[name]: value for name, value in options.items()},
        )[0]  # fmt: skip

    found = reference.errors(out[: sum(queries)], right(torch.float64), right(torch.float16))
    assert out.shape == q.shape and found.share <= 1, found


@pytest.mark.parametrize("name", few(OPTIONS))
def test_sequences_attend_to_their_own_keys(
    name: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whose first tokens may be older; those of many come in pieces, and some have none."""
    monkeypatch.setattr(flash_kernel, "MAX_TOKENS", 4)
    monkeypatch.setattr(flash_kernel, "_TORCH_CAN", False)
    check_varlen([2, 0, 9, 1], [2, 5, 12, 20], device, padding=2, **OPTIONS[name])


def test_a_token_of_each_is_a_decode_step(device: str) -> None:
    check_varlen([1, 1, 1], [5, 1, 40], device)


@pytest.mark.gpu
@pytest.mark.parametrize("torchs", [True, False], ids=["by torch", "ours"])
@pytest.mark.parametrize("window", [-1, 99])
def test_long_prompts(torchs: bool, window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's attention counts a sequence's queries from its end, as ours does."""
    if not torchs:
        monkeypatch.setattr(flash_kernel, "_TORCH_CAN", False)
    elif not flash_kernel._TORCH_CAN:
        pytest.skip("this torch does not attend to such sequences")
    check_varlen([600, 1, 300], [600, 400, 333], "cuda", 128, window_size=(window, window))


def test_sequences_that_are_not_causal_are_refused() -> None:
    q = torch.zeros(2, 2, 64, dtype=torch.float16)
    with pytest.raises(InputError, match="causal: got False; allowed: True"):
        flash_attn_varlen_func(q, q, q, ends([2], "cpu"), ends([2], "cpu"), 2, 2)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no queries": ({"q": None}, "q: got a NoneType; allowed: a torch.Tensor"),
    "keys of one sequence": (
        {"k": torch.zeros(2, 64)},
        r"k: got shape \[2, 64\] on cpu; allowed: 3",
    ),
    "values elsewhere": ({"v": torch.zeros(2, 2, 64, device="meta")}, "v: got .* on meta; allowed"),
    "a list of ends": ({"cu_seqlens_q": [0, 2]}, "cu_seqlens_q: got a list; allowed"),
    "long ends": ({"cu_seqlens_k": torch.tensor([0, 2])}, r"cu_seqlens_k: got torch.int64 \[2\]"),
    "no sequences": ({"cu_seqlens_q": ends([], "cpu")}, r"cu_seqlens_q: got torch.int32 \[1\]"),
    "other sequences": ({"cu_seqlens_k": ends([1, 1], "cpu")}, "the same batch for both"),
    "no most": ({"max_seqlen_q": None}, "max_seqlen_q: got None; allowed: an int from 1"),
    "a most of nothing": ({"max_seqlen_k": -1}, "max_seqlen_k: got -1; allowed: an int from 1"),
    "no window": ({"window_size": None}, "window_size: got None; allowed: two ints"),
    "several caps": ({"softcap": torch.zeros(2)}, "softcap: got tensor"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_not_allowed_is_refused(name: str) -> None:
    changes, message = BAD[name]
    q = torch.zeros(2, 2, 64, dtype=torch.float16)
    given: dict[str, Any] = {
        "q": q, "k": q, "v": q, "cu_seqlens_q": ends([2], "cpu"), "cu_seqlens_k": ends([2], "cpu"),
        "max_seqlen_q": 2, "max_seqlen_k": 2, "causal": True,
    }  # fmt: skip
    with pytest.raises(InputError, match=message):
        flash_attn_varlen_func(**given | changes)
