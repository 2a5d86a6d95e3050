"""Attention over parts of the keys, merged: what it is, at its edges, and what it refuses.

By operators of torch, and by the kernel: in ptxsim, and on a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from compiling import GROUP, random_step
from helpers import diagonal
from merging import DTYPES, merged_by_kernel
from torch import Tensor
from torch.nn.parameter import UninitializedParameter

import gqa_cutlass.merge as module
from gqa_cutlass import gqa_decode, merge_states
from gqa_cutlass.errors import InputError
from gqa_cutlass.proof.reference import attend

pytestmark = pytest.mark.xdist_group(GROUP)

Merge = Callable[..., tuple[Tensor, Tensor]]
BATCH, HEADS, KV_HEADS, DIM = 3, 8, 2, 64


@pytest.fixture(params=["operators", "cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def merge(request: pytest.FixtureRequest) -> Merge:
    """What merges CPU tensors: operators, or the kernel, wherever it runs."""
    if request.param == "operators":
        return merge_states
    return partial(merged_by_kernel, request.param)


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * scale


def parts_of(lengths: list[int]) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
    """Outputs and log-sum-exps of parts of so many tokens, and of them all, in double."""
    q = random(BATCH, HEADS, DIM)
    k, v = (random(BATCH, sum(lengths), KV_HEADS, DIM, seed=seed) for seed in (1, 2))
    ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    found = [
        attend(q, k[:, end - n : end], v[:, end - n : end], [n] * BATCH, 0.4, torch.float64)
        for n, end in zip(lengths, ends, strict=True)
    ]
    whole = attend(q, k, v, [sum(lengths)] * BATCH, 0.4, torch.float64)
    return [out for out, _ in found], [lse.float() for _, lse in found], *whole


@pytest.mark.parametrize("lengths", [[5], [3, 9], [1] * 33, [0, 4, 0, 100, 1]], ids=str)
def test_merged_parts_are_attention_over_all_keys(merge: Merge, lengths: list[int]) -> None:
    outs, lses, right, right_lse = parts_of(lengths)
    for given in (
        ([out.float() for out in outs], lses),
        (torch.stack(outs).float(), torch.stack(lses)),
        (tuple(out.float() for out in outs), torch.stack(lses)),
    ):
        out, lse = merge(*given)
        torch.testing.assert_close(out.double(), right, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(lse.double(), right_lse, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("wanted", "dtype"), diagonal([None, *DTYPES], DTYPES))
def test_every_dtype_is_merged_in_float32_and_rounded_once(
    merge: Merge, dtype: torch.dtype, wanted: torch.dtype | None
) -> None:
    outs, lses, *_ = parts_of([3, 9, 2])
    given = torch.stack(outs).to(dtype)
    out, _ = merge(given, lses, out_dtype=wanted)
    exact, _ = merge(given.float(), lses)
    assert out.dtype == (wanted or dtype) and torch.equal(out, exact.to(out.dtype))


def test_tokens_stand_before_the_heads_of_outputs_and_behind_those_of_sums(merge: Merge) -> None:
    """As FlashAttention has them; the sums of one token may also be those of `gqa_decode`."""
    outs, lses = random(2, BATCH, 4, HEADS, DIM), random(2, BATCH, HEADS, 4, seed=1)
    out, lse = merge(outs, lses)
    for t in range(4):
        right, right_lse = merge(outs[:, :, t], lses[..., t])
        # The CPU's exponential rounds otherwise where neighbours are strided.
        torch.testing.assert_close(out[:, t], right, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(lse[..., t], right_lse, rtol=1e-6, atol=1e-6)
    one, one_lse = merge(outs[:, :, :1], lses[..., 0])
    torch.testing.assert_close(one, out[:, :1], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(one_lse, lse[..., 0], rtol=1e-6, atol=1e-6)


def test_what_an_empty_part_holds_does_not_count(merge: Merge) -> None:
    outs, lses = random(3, BATCH, HEADS, DIM), random(3, BATCH, HEADS, seed=1)
    right, right_lse = merge(outs[:2], lses[:2])
    outs[2], lses[2] = math.nan, -math.inf
    out, lse = merge(outs, lses)
    assert torch.equal(out, right) and torch.equal(lse, right_lse)


def test_parts_that_are_all_empty_give_zeros_and_minus_infinity(merge: Merge) -> None:
    outs, lses = random(2, BATCH, HEADS, DIM), torch.full((2, BATCH, HEADS), -math.inf)
    lses[0, 1] = 0
    out, lse = merge(outs, lses)
    assert (out[::2] == 0).all() and (lse[::2] == -math.inf).all()
    assert torch.equal(out[1], outs[0, 1]) and (lse[1] == 0).all()


def test_gradients_are_those_of_the_formula_and_zero_where_all_parts_are_empty() -> None:
    outs = random(3, 2, 2, 8).requires_grad_()
    lses = random(3, 2, 2, seed=1)
    lses[0, 0], lses[:, 1, 0] = -math.inf, -math.inf
    lses.requires_grad_()
    out, lse = merge_states(outs, lses)
    (out.sin().sum() + lse[lse > -math.inf].cos().sum()).backward()
    assert outs.grad is not None and lses.grad is not None
    assert (outs.grad[:, 1, 0] == 0).all() and (lses.grad[:, 1, 0] == 0).all()
    assert (outs.grad[0, 0] == 0).all() and (lses.grad[0, 0] == 0).all()
    for row in ((0, 0, slice(1, 3)), (0, 1, slice(1, 3)), (1, 1, slice(3))):
        o, s = (t.detach()[row[2], row[0], row[1]].double() for t in (outs, lses))
        o, s = o.requires_grad_(), s.requires_grad_()
        right = torch.einsum("pd,p->d", o, s.softmax(0)).sin().sum() + s.logsumexp(0).cos()
        for found, wanted in zip((outs, lses), torch.autograd.grad(right, (o, s)), strict=True):
            got = found.grad[row[2], row[0], row[1]].double()  # type: ignore[index]
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("where", ["outs", "lses"])
def test_what_is_no_number_stays_so_and_spoils_only_its_head(merge: Merge, where: str) -> None:
    outs, lses = random(2, BATCH, HEADS, DIM), random(2, BATCH, HEADS, seed=1)
    right, right_lse = merge(outs, lses)
    (outs if where == "outs" else lses)[1, 2, 5] = math.nan
    lses[0, 0] = -math.inf
    out, lse = merge(outs, lses)
    assert out[2, 5].isnan().all() and bool(lse[2, 5].isnan()) == (where == "lses")
    assert torch.equal(out[1], right[1]) and torch.equal(lse[1], right_lse[1])
    assert out.isnan().sum() == DIM


@pytest.mark.parametrize("level", [-3e38, -1e4, 0.0, 1e4, 3e38])
def test_sums_of_any_size_do_not_overflow(merge: Merge, level: float) -> None:
    outs = random(3, BATCH, HEADS, DIM)
    out, lse = merge(outs, torch.full((3, BATCH, HEADS), level))
    torch.testing.assert_close(out, outs.mean(0))
    torch.testing.assert_close(lse, torch.full((BATCH, HEADS), level + math.log(3)))


def test_a_part_that_weighs_nothing_beside_another_leaves_it_as_it_was(merge: Merge) -> None:
    outs, lses = random(2, BATCH, HEADS, DIM), torch.zeros(2, BATCH, HEADS)
    lses[1] = -1e4
    assert torch.equal(merge(outs, lses)[0], outs[0])


def test_decoded_parts_are_what_decoding_all_gives() -> None:
    step = random_step()
    q, k_cache, v_cache = step["q"], step["k_cache"], step["v_cache"]
    right, right_lse = gqa_decode(q, k_cache, v_cache, cache_seqlens=13, return_lse=True)
    found: list[Any] = [
        gqa_decode(q, k_cache[:, a:], v_cache[:, a:], cache_seqlens=n, return_lse=True)
        for a, n in ((0, 6), (6, 7))
    ]
    out, lse = merge_states(*zip(*found, strict=True))
    torch.testing.assert_close(out, right, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(lse, right_lse, rtol=1e-6, atol=1e-5)


def test_parts_in_float32_round_once() -> None:
    """As far from exact attention as one call is, where 16-bit parts round twice."""
    step = random_step()
    q, k_cache, v_cache = step["q"], step["k_cache"], step["v_cache"]
    exact, _ = attend(q, k_cache, v_cache, [16, 16], 0.125, torch.float64)
    off: dict[torch.dtype, float] = {}
    for dtype in (torch.float32, torch.float16):
        found: list[Any] = [
            gqa_decode(
                q, k_cache[:, a:], v_cache[:, a:], cache_seqlens=4, return_lse=True, out_dtype=dtype
            )
            for a in range(0, 16, 4)
        ]
        out, _ = merge_states(*zip(*found, strict=True), out_dtype=torch.float32)
        off[dtype] = (out - exact).abs().mean().item()
    assert off[torch.float32] < off[torch.float16] / 2


def test_a_compiled_merge_is_one_graph() -> None:
    torch._dynamo.reset()
    outs, lses = random(2, BATCH, HEADS, DIM), random(2, BATCH, HEADS, seed=1)
    compiled = torch.compile(merge_states, backend="aot_eager", fullgraph=True)
    assert all(map(torch.equal, compiled(list(outs), list(lses)), merge_states(outs, lses)))


OUTS, LSES = torch.zeros(2, 3, 4, 8), torch.zeros(2, 3, 4)
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "nothing": ({"outs": []}, r"outs: got \[\]; allowed: one tensor with"),
    "no part": ({"outs": OUTS[:0]}, "outs: got torch.float32 .*; allowed: 1 part or more"),
    "one part, bare": ({"outs": OUTS[0]}, r"outs: got torch.float32 \[3, 4, 8\] on cpu; allowed"),
    "a number": ({"outs": 1.0}, "outs: got 1.0; allowed: one tensor"),
    "numbers": ({"outs": [1.0, 2.0]}, "outs: got a float among the parts; allowed: tensors"),
    "parts of two sizes": ({"outs": [OUTS[0], OUTS[1, :2]]}, r"outs: got .*\[2, 4, 8\] .* behind"),
    "parts of two dtypes": ({"outs": [OUTS[0], OUTS[1].half()]}, "outs: got torch.float16 .* beh"),
    "parts of two places": ({"lses": [LSES[0], LSES[1].to("meta")]}, "lses: got .* meta behind"),
    "a sparse tensor": ({"outs": OUTS.to_sparse()}, "outs: got a nested or sparse tensor; allowed"),
    "a nested part": ({"lses": [torch.nested.nested_tensor([LSES[0]])] * 2}, "lses: got a nested"),
    "whole numbers": ({"outs": OUTS.int()}, "outs: got torch.int32 .*; allowed: .* float32, fl"),
    "another number of parts": ({"lses": LSES[:1]}, r"lses: got .* \[1, 3, 4\] .*: float32 \[2, 3"),
    "tokens of nobody": ({"lses": LSES.unsqueeze(-1)}, r"lses: got .* \[2, 3, 4, 1\] on cpu; all"),
    "heads before batch": ({"lses": LSES.transpose(1, 2)}, r"lses: got .* \[2, 4, 3\] on cpu; all"),
    "sums in half": ({"lses": LSES.half()}, "lses: got torch.float16 .*; allowed: float32"),
    "sums elsewhere": ({"lses": LSES.to("meta")}, "lses: got .* on meta; allowed: .* on cpu"),
    "no sums": ({"lses": None}, "lses: got None; allowed: one tensor"),
    "a type of whole numbers": ({"out_dtype": torch.int32}, "out_dtype: got torch.int32; allowed"),
    "an array for a type": (
        {"out_dtype": np.zeros(2)},
        r"out_dtype: got array\(\[0., 0.\]\); allow",
    ),
    "no values yet": ({"outs": UninitializedParameter()}, "outs: got a parameter that"),
    "a part without values": (
        {"lses": [UninitializedParameter()]},
        "lses: got a parameter that",
    ),
    "a type by name": ({"out_dtype": "float32"}, "out_dtype: got 'float32'; allowed: None"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_parts_are_refused(name: str) -> None:
    changes, message = BAD[name]
    with pytest.raises(InputError, match=f"merge_states: {message}"):
        merge_states(**({"outs": OUTS, "lses": LSES} | changes))


@pytest.mark.parametrize("held", [0, 8])
@pytest.mark.parametrize("name", ["outs", "lses"])
@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("by", ["operators", "kernel"])
def test_parts_whose_storage_was_freed_are_refused(
    monkeypatch: pytest.MonkeyPatch, by: str, listed: bool, name: str, held: int
) -> None:
    monkeypatch.setattr(module, "_BY_KERNEL", frozenset({"cpu"} if by == "kernel" else ()))
    given = {"outs": OUTS.clone(), "lses": LSES.clone()}
    made = {n: list(t) if listed else t for n, t in given.items()}
    given[name].untyped_storage().resize_(held)
    with pytest.raises(InputError, match=f"merge_states: {name}: got a tensor .* storage"):
        merge_states(**made)
