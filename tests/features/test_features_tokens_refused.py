"""Several tokens, norms and rotations that are refused: nothing is launched, nothing written."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import Step, make_step, snapshot
from tokens import take_tokens
from torch import Tensor

import gqa_cutlass
from gqa_cutlass import gqa_decode
from gqa_cutlass.errors import InputError

PROCESS = "features"  # has all tests of this folder, for they have kernels in common
Change = Callable[[Step], dict[str, Any]]


def angles(rows: int = 64, columns: int = 32, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.zeros(rows, columns, dtype=dtype)


def rotary(cos: Tensor | None, sin: Tensor | None = None, **more: Any) -> Change:
    """Tables of a call, sines like cosines unless they are given."""
    return lambda s: (
        {
            name: None if t is None else t.to(s.q.device)
            for name, t in (("rotary_cos", cos), ("rotary_sin", cos if sin is None else sin))
        }
        | {name: make(s) for name, make in more.items()}
    )


def ends(*values: int, dtype: torch.dtype = torch.int32) -> Callable[[Step], Tensor]:
    return lambda s: torch.tensor(values, dtype=dtype, device=s.q.device)


def flat(name: str, index: str, make: Callable[[Step], Any], **more: Any) -> Change:
    """Queries or new tokens one behind the other."""
    names = {"q": ("q",), "k": ("k", "v")}[name]
    return lambda s: (
        ({each: getattr(s, each).flatten(0, 1) for each in names} | {index: make(s), "out": None})
        | more
    )


def tokens(queries: int, new: int) -> Change:
    def change(s: Step) -> dict[str, Any]:
        q, k = s.q[:, :1], s.before["k"][:, :1]
        both = k.expand(-1, new, -1, -1)
        return {"q": q.expand(-1, queries, -1, -1), "k": both, "v": both, "out": None}

    return change


def tree(*shape: int, dtype: torch.dtype = torch.bool) -> Change:
    return lambda s: {"tree_mask": torch.ones(shape, dtype=dtype, device=s.q.device)}


BAD: dict[str, tuple[Change, str]] = {
    "dims that are no 16": (rotary(angles(64, 20)), "rotary_dim .*: got 40; allowed: multiples of"),
    "no dims": (rotary(angles(64, 0)), "rotary_dim .*: got 0; allowed: multiples of 16 up to head"),
    "more dims than heads have": (rotary(angles(64, 40)), "rotary_dim .*: got 80; .* head_dim, 64"),
    "cosines alone": (
        lambda s: {"rotary_cos": angles()}, "rotary_cos: got one without rotary_sin; allowed"
    ),
    "sines alone": (lambda s: {"rotary_sin": angles()}, "rotary_sin: got one without rotary_cos"),
    "positions alone": (
        lambda s: {"rotary_seqlens": s.seqlens}, "rotary_seqlens: got one without rotary_cos"
    ),
    "fewer sines": (rotary(angles(), angles(60)), r"rotary_sin: got .* \[60, 32\]; allowed: as"),
    "sines of another type": (
        rotary(angles(), angles(dtype=torch.float32)), "rotary_sin: got torch.float32 shape"
    ),
    "tables of another half": (
        rotary(angles(dtype=torch.bfloat16)), "rotary_cos: got torch.bfloat16; allowed: q's dtype"
    ),
    "tables in double": (rotary(angles(dtype=torch.float64)), "rotary_cos: got torch.float64"),
    "tables elsewhere": (
        lambda s: {"rotary_cos": angles().to("meta"), "rotary_sin": angles().to("meta")},
        "rotary_cos: got a tensor on meta; allowed: q's device",
    ),
    "one row of a table": (rotary(angles()[0]), r"rotary_cos: got shape \[32\]; allowed: \[pos"),
    "tables that lie across": (
        rotary(angles(32, 64).T), r"rotary_cos: got strides \[1, 64\]; allowed: a contiguous last"
    ),
    "tables that begin at odd places": (
        lambda s: dict.fromkeys(
            ("rotary_cos", "rotary_sin"), angles(64, 33).to(s.q.device)[:, 1:]
        ),
        "rotary_cos: got rows that are not aligned to two elements",
    ),
    "tables shorter than the tokens": (
        rotary(angles(2)), "rotary_cos: got 2 positions; allowed: 3 and more"
    ),
    "positions of 64 bits": (
        rotary(angles(), rotary_seqlens=lambda s: s.seqlens.long()),
        "rotary_seqlens: got torch.int64; allowed: torch.int32",
    ),
    "positions of more sequences": (
        rotary(angles(), rotary_seqlens=ends(1, 2, 3)), r"rotary_seqlens: got shape \[3\]"
    ),
    "a number for a truth": (
        rotary(angles(), rotary_interleaved=lambda s: 1), "rotary_interleaved: got 1; allowed: True"
    ),
    "a table in the cache": (
        lambda s: {"rotary_cos": s.k_cache[0, :, 0, :32], "rotary_sin": angles().to(s.q.device)},
        "rotary_cos: got memory of k_cache, to which this call writes",
    ),
    **{
        f"{name}: {what}": (lambda s, name=name, make=make: {name: make(s)}, f"{name}: got {said}")
        for name in ("q_norm_weight", "k_norm_weight")
        for what, make, said in (
            ("too few", lambda s: s.q.new_zeros(32), r"shape \[32\]; allowed: \[64\]"),
            ("of each head", lambda s: s.q.new_zeros(8, 64), r"shape \[8, 64\]; allowed: \[head"),
            ("in double", lambda s: s.q.new_zeros(64).double(), "torch.float64"),
            ("elsewhere", lambda s: s.q.new_zeros(64).to("meta"), "a tensor on meta"),
            ("apart", lambda s: s.q.new_zeros(128)[::2], r"strides \[2\]; allowed: contiguous"),
        )
    },
    **{
        f"eps of {eps}": (
            lambda s, eps=eps: {"q_norm_weight": s.q.new_zeros(64), "norm_eps": eps},
            "norm_eps: got .*; allowed: a number from 0 to",
        )
        for eps in (-1e-6, math.nan, math.inf, 1e39, "1e-6", True)
    },
    "an offset": (lambda s: {"norm_plus_one": 1}, "norm_plus_one: got 1; allowed: True or False"),
    "neither true nor false": (lambda s: {"causal": None}, "causal: got None; allowed: True or F"),
    "neither, with a window": (
        lambda s: {"causal": s.q[0, 0], "window_size": (3, 0)}, "causal: got tensor"
    ),
    "too many queries": (tokens(257, 3), "tokens of q: got 257; allowed: 1 to 256 per sequence"),
    "no queries": (tokens(0, 3), "tokens of q: got 0; allowed: 1 to 256"),
    "too many new tokens": (tokens(3, 257), "tokens of k: got 257; allowed: 1 to 256"),
    "more new tokens than room": (tokens(3, 65), "tokens of k: got 65; allowed: at most max_seq"),
    "no new tokens": (tokens(3, 0), "tokens of k: got 0; allowed: 1 to 256"),
    "values of one token": (
        lambda s: {"v": s.before["v"][:, 0]}, r"v: got shape \[2, 2, 64\]; allowed: \[2, 3, 2, 64\]"
    ),
    "keys of one token": (
        lambda s: {"k": s.before["k"][:, 0]}, r"v: got shape \[2, 3, 2, 64\]; allowed: \[2, 1, 2"
    ),
    "an output of one token": (lambda s: {"out": s.out[:, 0]}, r"out: got shape \[2, 8, 64\]"),
    "a tree of more drafts": (tree(2, 4, 4), r"tree_mask: got .* shape \[2, 4, 1\]; allowed: bool"),
    "a tree that is no square": (tree(2, 3, 4), r"tree_mask: got torch.bool shape \[2, 3, 4\]"),
    "a tree for all": (tree(1, 3, 3), r"tree_mask: got .* \[1, 3, 1\]; allowed: bool \[2, 3, 3\]"),
    "a tree of numbers": (
        tree(2, 3, 3, dtype=torch.int32), r"tree_mask: got torch.int32 shape \[2, 3, 3\]; allowed"
    ),
    "a tree of fewer new tokens": (
        lambda s: tokens(3, 2)(s) | tree(2, 3, 3)(s),
        "tree_mask: got one with 3 queries and 2 new tokens",
    ),
    **{
        f"a tree of unlike {name}": (
            lambda s, change=change: change(s) | tree(2, 3, 3)(s),
            "tree_mask: got one with cu_seqlens_q or cu_seqlens_k_new",
        )
        for name, change in (
            ("queries", flat("q", "cu_seqlens_q", ends(0, 3, 6))),
            ("tokens", flat("k", "cu_seqlens_k_new", ends(0, 3, 6))),
        )
    },
    "an index without its tokens": (
        lambda s: {"k": None, "v": None, "cu_seqlens_k_new": ends(0, 3, 6)(s)},
        "cu_seqlens_k_new: got one without k",
    ),
    "an index of equal tokens": (
        lambda s: {"cu_seqlens_q": ends(0, 3, 6)(s)},
        r"q: got shape \[2, 3, 8, 64\]; allowed: \[all tokens, heads, head_dim\], with cu_seqlens",
    ),
    **{
        f"{index}: {what}": (flat(name, index, make), said)
        for name, index in (("q", "cu_seqlens_q"), ("k", "cu_seqlens_k_new"))
        for what, make, said in (
            ("long", ends(0, 3, 6, dtype=torch.int64), f"{index}: got torch.int64"),
            ("a matrix", lambda s: ends(0, 3, 6)(s)[None], rf"{index}: got shape \[1, 3\]"),
            ("a list", lambda s: [0, 3, 6], f"{index}: got a list"),
            ("elsewhere", lambda s: ends(0, 3, 6)(s).to("meta"), f"{index}: got a tensor on meta"),
            ("of more sequences", ends(0, 3, 6, 6), r"got shape .*; allowed: \["),
        )
    },
    **{
        f"at most {most}": (
            flat("q", "cu_seqlens_q", ends(0, 3, 6), max_seqlen_q=most), "max_seqlen_q: got"
        )
        for most in (0, -1, 2**31, 3.0, True, "3")
    },
    "too many for a sequence": (
        lambda s: {
            "q": s.q[0, :1].expand(600, -1, -1), "cu_seqlens_q": ends(0, 300, 600)(s),
            "max_seqlen_q": 300, "out": None,
        },
        "max_seqlen_q: got 300; allowed: 1 to 256",
    ),
    "too many to be of one": (
        lambda s: {
            "q": s.q[0, :1].expand(300, -1, -1), "cu_seqlens_q": ends(0, 150, 300)(s), "out": None
        },
        "tokens of q, without max_seqlen_q: got 300",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_tokens_and_turns_launch_nothing_and_write_nothing(name: str, device: str) -> None:
    step = make_step(lengths=[37, 9], max_seq_len=64, head_dim=64, device=device)
    take_tokens(step)
    snapshot(step)
    change, message = BAD[name]
    named = dict(zip(("q", "k_cache", "v_cache", "k", "v"), step.tensors(), strict=True))
    given = named | {"cache_seqlens": step.seqlens, "out": step.out} | change(step)
    with pytest.raises(InputError, match=message):
        gqa_decode(**given)
    if not name.startswith("a tree"):  # plans take packed ones alone
        with pytest.raises(InputError, match=message):
            gqa_cutlass.plan(**given)
    assert step.out.isnan().all()
    step.check_memory(rejected=(0, 1))
