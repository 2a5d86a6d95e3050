"""Features that are refused: nothing is launched, and nothing written."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import Step, make_step
from featured import CAP

import gqa_cutlass
from gqa_cutlass import gqa_decode
from gqa_cutlass.codegen import DType, Math, default_config
from gqa_cutlass.errors import CacheOverflowError, InputError

PROCESS = "features"  # has all tests of this folder, for they have kernels in common


@pytest.mark.parametrize("kernel", [(), (CAP,)], ids=["without", "with"])
def test_a_kernel_given_by_hand_must_have_what_is_asked_for(kernel: tuple[Any, ...]) -> None:
    step = make_step(lengths=[37], max_seq_len=64, head_dim=64, device="cpu")
    config = default_config(Math.TENSOROP, DType.F16, 64, 4, 8, policies=kernel)
    softcap = 0.0 if kernel else 1.0
    wanted = "no feature" if kernel else "softcap"
    with pytest.raises(InputError, match=f"kernels with what the call asks for: {wanted}"):
        gqa_cutlass.plan(*step.tensors(), cache_seqlens=37, kernel=config, softcap=softcap)


BAD: dict[str, tuple[Callable[[Step], dict[str, Any]], str]] = {
    "a negative cap": (lambda s: {"softcap": -1.0}, "softcap: got -1.0; allowed: 0"),
    "no number": (lambda s: {"softcap": math.nan}, "softcap: got nan"),
    "an endless cap": (lambda s: {"softcap": math.inf}, "softcap: got inf"),
    "a cap that underflows": (lambda s: {"softcap": 1e-42}, "softcap: got 1e-42; allowed: .* more"),
    "a cap as text": (lambda s: {"softcap": "50"}, "softcap: got '50'"),
    "a list for a cap": (lambda s: {"softcap": [50.0]}, r"softcap: got \[50.0\]"),
    "a truth for a cap": (lambda s: {"softcap": True}, "softcap: got True"),
    "too few sinks": (lambda s: {"sinks": s.q.new_zeros(4)}, r"sinks: got shape \[4\]"),
    "sinks per sequence": (lambda s: {"sinks": s.q.new_zeros(1, 8)}, r"sinks: got shape \[1, 8\]"),
    "sinks in double": (lambda s: {"sinks": s.q.new_zeros(8).double()}, "sinks: got torch.float64"),
    "sinks elsewhere": (lambda s: {"sinks": s.q.new_zeros(8).to("meta")}, "sinks: got .* on meta"),
    "sinks apart": (lambda s: {"sinks": s.q.new_zeros(16)[::2]}, r"sinks: got strides \[2\]"),
    "sinks in a list": (lambda s: {"sinks": [0.0] * 8}, "sinks: got a list"),
    "sinks that learn": (lambda s: {"sinks": s.q.new_zeros(8).requires_grad_()}, "sinks: .* grad"),
    "one number for a window": (lambda s: {"window_size": 5}, "window_size: got 5; allowed: two"),
    "no window": (lambda s: {"window_size": None}, "window_size: got None"),
    "three numbers": (lambda s: {"window_size": (1, 2, 3)}, r"window_size: got \(1, 2, 3\)"),
    "a window below none": (lambda s: {"window_size": (-2, 0)}, r"window_size: got \(-2, 0\)"),
    "a right below none": (lambda s: {"window_size": (5, -2)}, r"window_size: got \(5, -2\)"),
    "half a window": (lambda s: {"window_size": (5.0, 0)}, r"window_size: got \(5.0, 0\)"),
    "truth for a window": (lambda s: {"window_size": (5, False)}, r"window_size: got \(5, False\)"),
    "too few slopes": (
        lambda s: {"alibi_slopes": s.q.new_zeros(4).float()}, r"alibi_slopes: got shape \[4\]"
    ),
    "slopes of more sequences": (
        lambda s: {"alibi_slopes": s.q.new_zeros(2, 8).float()},
        r"alibi_slopes: got shape \[2, 8\]; allowed: \[1, 8\]",
    ),
    "slopes in half": (lambda s: {"alibi_slopes": s.q.new_zeros(8)}, "slopes: got torch.float16"),
    "slopes elsewhere": (
        lambda s: {"alibi_slopes": s.q.new_zeros(8).float().to("meta")}, "slopes: got .* on meta"
    ),
    "slopes apart": (
        lambda s: {"alibi_slopes": s.q.new_zeros(16).float()[::2]}, r"slopes: got strides \[2\]"
    ),
    "a slope": (lambda s: {"alibi_slopes": 0.5}, "alibi_slopes: got a float"),
    "slopes that learn": (
        lambda s: {"alibi_slopes": s.q.new_zeros(8).float().requires_grad_()}, "slopes: .* grad"
    ),
    "out in the slopes": (
        lambda s: {"alibi_slopes": s.out.view(torch.float32)[0, 0, :8]},
        "out: got memory that alibi_slopes also uses",
    ),
    **{
        f"{name}: {what}": (lambda s, name=name, make=make: {name: make(s)}, f"{name}: got {said}")
        for name in ("cache_leftpad", "cache_batch_idx")
        for what, make, said in (
            ("too many", lambda s: s.seqlens.new_zeros(2), r"shape \[2\]"),
            ("long", lambda s: s.seqlens.long(), "torch.int64"),
            ("elsewhere", lambda s: s.seqlens.to("meta"), ".* on meta"),
            ("a list", lambda s: [0], "a list"),
            ("a number", lambda s: 0, "an? int"),
        )
    },
    **{
        f"block_table: {what}": (
            lambda s, make=make: {"block_table": make(s.seqlens)}, f"block_table: got {said}"
        )
        for what, make, said in (
            ("too many", lambda t: t.new_zeros(2, 1), r"shape \[2, 1\]; allowed: \[1, 1\]"),
            ("one rank less", lambda t: t.new_zeros(1), r"shape \[1\]; allowed: \[batch, max_p"),
            ("long", lambda t: t.new_zeros(1, 1).long(), "torch.int64; allowed: torch.int32; conv"),
            ("elsewhere", lambda t: t.new_zeros(1, 1).to("meta"), "a tensor on meta"),
            ("apart", lambda t: t.new_zeros(1, 4)[:, ::2], r"strides \[4, 2\]; allowed: a contig"),
            ("no pages", lambda t: t.new_zeros(1, 0), "0 pages per sequence, of 64 tokens"),
            ("too many pages", lambda t: t.new_zeros(1, 1).expand(1, 2**25), "33554432 pages per"),
            ("a list", lambda t: [[0]], "a list; allowed: a torch.Tensor or None"),
        )
    },
    "slots without a table": (
        lambda s: {"slot_mapping": s.seqlens.long()}, "slot_mapping: got one without block_table"
    ),
    "slots of 32 bits": (
        lambda s: {"block_table": s.seqlens.new_zeros(1, 1), "slot_mapping": s.seqlens},
        "slot_mapping: got torch.int32; allowed: torch.int64",
    ),
    "a table in the cache": (
        lambda s: {"block_table": s.k_cache.view(torch.int32)[0, 40, 0, :1].view(1, 1)},
        "block_table: got memory of k_cache, to which this",
    ),
    "out in the table": (
        lambda s: {"block_table": s.out.view(torch.int32)[0, :1, 0].view(1, 1)},
        "out: got memory that block_table also uses",
    ),
    "padding in the cache": (
        lambda s: {"cache_leftpad": s.k_cache.view(torch.int32)[0, 37, 0, :1]},
        "cache_leftpad: got memory of k_cache, to which this",
    ),
    "an output of whole numbers": (
        lambda s: {"out_dtype": torch.int32}, "out_dtype: got torch.int32; allowed: None, q's dt"
    ),
    "an output of another half": (
        lambda s: {"out_dtype": torch.bfloat16}, "out_dtype: got torch.bfloat16; allowed: None, q's"
    ),
    "a dtype by name": (lambda s: {"out_dtype": "float32"}, "out_dtype: got 'float32'; allowed"),
    "an out that is not wide": (
        lambda s: {"out_dtype": torch.float32}, "out: got torch.float16; allowed: out_dtype, torch"
    ),
    "out in the sinks": (lambda s: {"sinks": s.out[0, 0, :8]}, "out: got memory that sinks also"),
    "sinks in the cache": (
        lambda s: {"sinks": s.k_cache[0, 37, 0, :8]}, "sinks: got memory of k_cache, to which this"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_features_launch_nothing_and_write_nothing(name: str, device: str) -> None:
    step = make_step(lengths=[37], max_seq_len=64, head_dim=64, device=device)
    options, message = BAD[name]
    with pytest.raises(InputError, match=message):
        gqa_decode(*step.tensors(), cache_seqlens=37, out=step.out, **options(step))
    with pytest.raises(InputError, match=message):
        plan = gqa_cutlass.plan(*step.tensors(), cache_seqlens=37, out=step.out, **options(step))
        plan(*step.tensors(), 37, step.out)
    assert step.out.isnan().all()
    step.check_memory(rejected=(0,))


POOLS: dict[str, tuple[Callable[[Step], dict[str, Any]], str]] = {
    "fewer pages of values": (lambda s: {"v_cache": s.v_cache[1:]}, r"v_cache: got shape \[\d+"),
    "values in smaller pages": (lambda s: {"v_cache": s.v_cache[:, 1:]}, "v_cache: got shape"),
    "more heads of values": (
        lambda s: {"v_cache": s.v_cache.repeat(1, 1, 2, 1)}, "v_cache: got shape"
    ),
    "a pool of another type": (
        lambda s: {"k_cache": s.k_cache.bfloat16()}, "k_cache: got torch.bfloat16"
    ),
    "pages that share memory": (
        lambda s: {"k_cache": s.k_cache[:1].expand(s.k_cache.shape)},
        r"k_cache: got strides .*; allowed: elements that do not share memory",
    ),
    "pools that share memory": (
        lambda s: {"v_cache": s.k_cache}, "v_cache: got memory that k_cache also uses"
    ),
    "pools that share half a page": (
        lambda s: {
            "k_cache": s.k_cache[1:],
            "v_cache": s.k_cache.flatten(0, 1)[8:-8].unflatten(0, (-1, 16)),
        },
        "v_cache: got memory that k_cache also uses",
    ),
    "a token in the pool": (
        lambda s: {"k": s.k_cache[0, :1]}, "k: got memory of k_cache, to which this call writes"
    ),
    "tokens without pages": (
        lambda s: {"k_cache": s.k_cache[0]},
        r"k_cache: got .*; allowed: \[num_pages, page_size, .*pool.unsqueeze\(1\)",
    ),
    "no tokens in a page": (lambda s: {"k_cache": s.k_cache[:, :0]}, "tokens of a page .*: got 0"),
    "no pages at all": (lambda s: {"k_cache": s.k_cache[:0]}, "pages of k_cache: got 0"),
}  # fmt: skip


@pytest.mark.parametrize("name", POOLS)
def test_bad_pools_launch_nothing_and_write_nothing(name: str, device: str) -> None:
    step = make_step(lengths=[37], max_seq_len=64, head_dim=64, device=device)
    step.into_pages(16, "NHD")
    changes, message = POOLS[name]
    given = dict(zip(("q", "k_cache", "v_cache", "k", "v"), step.tensors(), strict=True))
    with pytest.raises(InputError, match=message):
        gqa_decode(
            **given | changes(step), cache_seqlens=37, block_table=step.block_table, out=step.out
        )
    assert step.out.isnan().all()
    step.check_memory(rejected=(0,))


def test_a_length_beyond_all_pages_is_an_overflow(device: str) -> None:
    step = make_step(lengths=[37], max_seq_len=64, head_dim=64, device=device)
    step.into_pages(16)
    with pytest.raises(CacheOverflowError, match="max_seq_len is 64, of all pages in a row of bl"):
        gqa_decode(*step.tensors(), cache_seqlens=64, block_table=step.block_table, out=step.out)
    step.check_memory(rejected=(0,))


def test_slots_without_a_new_token_are_refused(device: str) -> None:
    step = make_step(lengths=[37], max_seq_len=64, head_dim=64, append=False, device=device)
    step.into_pages(16)
    with pytest.raises(InputError, match="slot_mapping: got one without k; allowed: slot_m"):
        gqa_decode(
            *step.tensors(), cache_seqlens=37, block_table=step.block_table,
            slot_mapping=step.seqlens.long(),
        )  # fmt: skip
