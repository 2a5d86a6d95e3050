"""Caches of 8 bits: every number, how new tokens are rounded, scales, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import TORCH_DTYPE, Step, make_step, snapshot
from featured import step_of
from helpers import call_tensors, check, diagonal, run, skip_unless_it_runs
from torch import Tensor

import gqa_cutlass
from gqa_cutlass import flash_attn_with_kvcache, gqa_decode
from gqa_cutlass.call.stored import FP8
from gqa_cutlass.codegen import DType, KernelConfig, Math, Schedule, default_config
from gqa_cutlass.codegen.schema.policies import named
from gqa_cutlass.errors import InputError
from gqa_cutlass.proof.reference import scales_of, stored

PROCESS = "features"  # has all tests of this folder, for they have kernels in common

KINDS = {
    "multistage": (Math.TENSOROP, 8, Schedule.MULTISTAGE),
    "tma": (Math.TENSOROP, 8, Schedule.TMA),
    "simt": (Math.SIMT, 1, Schedule.MULTISTAGE),
}
E4M3, E5M2 = FP8
every_type = pytest.mark.parametrize("dtype", FP8, ids=str)


@pytest.mark.parametrize(("dtype", "kind", "queries"), diagonal(FP8, KINDS, DType))
def test_every_number_counts_what_it_is(
    dtype: torch.dtype, kind: str, queries: DType, device: str
) -> None:
    """Keys in the lse of queries that ask for one dim each, values in outputs of one token."""
    math_, width, schedule = KINDS[kind]
    config = default_config(math_, queries, 256, 256, width, schedule, (FP8[dtype],))
    skip_unless_it_runs(config, device)
    codes = torch.arange(256, dtype=torch.uint8, device=device).view(1, 1, 1, 256)
    codes = codes.masked_fill(~codes.view(dtype).float().isfinite(), 0)
    numbers = codes.view(dtype).double().flatten()
    q = torch.eye(256, dtype=TORCH_DTYPE[queries], device=device).unsqueeze(0)
    cache = torch.cat([codes, codes.flip(-1)], dim=1).view(dtype)
    made = gqa_cutlass.plan(
        q, cache, cache, cache_seqlens=1, softmax_scale=1.0, return_lse=True, num_splits=1,
        out_dtype=torch.float32, kernel=_wide(config), k_scale=2.0, v_scale=0.5,
    )  # fmt: skip
    out, lse = made(q, cache, cache, None, None, 1)
    torch.testing.assert_close(lse[0].double(), 2 * numbers, rtol=3e-7, atol=0)
    assert torch.equal(out.double(), (0.5 * numbers).expand(1, 256, 256))


def _wide(config: KernelConfig) -> KernelConfig:
    """The kernel with outputs in float32."""
    return replace(config, policies=(*config.policies, named("InFloat32")))


def _of(kind: str, queries: DType) -> tuple[Any, ...]:
    math_, width, schedule = KINDS[kind]
    return math_, queries, 64, 4, width, schedule


SCALES: dict[str, Callable[[Tensor], tuple[Any, Any]]] = {
    "none": lambda s: (None, None),
    "numbers": lambda s: (0.5, 3),
    "tensors of one": lambda s: (s[0, 0].clone(), s[1, :1]),
    "of heads": lambda s: (s[0], s[1].flip(0)),
    "of sequences and heads": lambda s: (s, s.flip(1)),
    "apart": lambda s: (s.repeat(2, 3)[::2, 1::3][:, :2], s.t().contiguous().t()),
    "expanded": lambda s: (s[:1, :1].expand(2, 2), s[:, :1].expand(2, 2)),
    "only keys'": lambda s: (s, None),
    "only values'": lambda s: (None, 2.0),
}  # fmt: skip


@pytest.mark.sanitized
@pytest.mark.parametrize("name", SCALES)
def test_scales_count_whatever_their_form(name: str, device: str) -> None:
    step = step_of("e4m3", lengths=[70, 3], max_seq_len=80, head_dim=64, device=device)
    step.k_cache.copy_((step.k_cache.float() / 256).to(E4M3))
    step.k_scale, step.v_scale = SCALES[name](
        torch.tensor([[0.25, 1.5], [2.0, 0.75]], device=device)
    )
    snapshot(step)
    check(step, run(step))


def step_in_bfloat16(device: str) -> Step:
    return step_of(
        "e4m3", dtype=DType.BF16, lengths=[70], max_seq_len=80, head_dim=64, device=device
    )


@pytest.mark.parametrize("power", [-120, -40, 0, 40, 100])
def test_queries_of_bfloat16_count_whatever_their_size(power: int, device: str) -> None:
    """Each head has a size of its own, and the scale makes up for most of it."""
    step = step_in_bfloat16(device)
    sizes = torch.tensor([2.0**i for i in range(-4, 4)], device=device).view(1, 8, 1)
    step.q.copy_((step.q.float() * sizes * 2.0 ** (power / 2)) * 2.0 ** (power / 2))
    step.scale *= 2.0**-power if power > -100 else 2.0**100
    snapshot(step)
    check(step, run(step, softmax_scale=step.scale))


@pytest.mark.parametrize("power", [-90, 0, 90])
def test_elements_of_a_query_in_bfloat16_may_differ_by_2_to_28(power: int, device: str) -> None:
    """Keys are zero where the large element is, so that the small ones are all that counts."""
    step = step_in_bfloat16(device)
    step.q.copy_((step.q.sign() + step.q.frac()) * 2.0 ** (power - 28))
    step.q[..., 5] = 1.5 * 2.0**power
    step.k_cache[..., 5], step.k[..., 5] = 0, 0
    step.scale *= 2.0 ** (28 - power)
    snapshot(step)
    check(step, run(step, softmax_scale=step.scale))


def test_zeros_and_tiny_elements_of_a_query_in_bfloat16_count_nothing(device: str) -> None:
    """Among others of their head; one has nothing else."""
    step = step_in_bfloat16(device)
    step.q[..., 1::4] *= 2.0**-60
    step.q[..., 2::4] *= 0.0
    step.q[:, 3] *= 0.0
    snapshot(step)
    check(step, run(step))


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_in_a_query_spoils_its_head_alone(wrong: float, device: str) -> None:
    """Multiplied by a zero, too."""
    step = step_in_bfloat16(device)
    step.k_cache[..., 9], step.k[..., 9] = 0, 0
    snapshot(step)
    right = run(step)
    step.k_cache.copy_(step.before["k_cache"]), step.v_cache.copy_(step.before["v_cache"])
    step.q[0, 1, 9] = wrong
    out = run(step)
    assert out[0, 1].isnan().all()
    assert torch.equal(out[0, [0, *range(2, 8)]], right[0, [0, *range(2, 8)]])


def test_what_is_no_number_in_a_cache_shows(device: str) -> None:
    step = step_of("e4m3", lengths=[70], max_seq_len=80, head_dim=64, device=device)
    step.v_cache[0, 5, 0, 3] = step.k_cache[0, 9, 1, 3] = torch.nan
    snapshot(step)
    out = run(step)
    assert out[0, :4, 3].isnan().all() and out[0, 4:].isnan().all()
    assert not out[0, :4, 4:].isnan().any()


@pytest.mark.parametrize("wrong", [0.0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize("name", ["k_scale", "v_scale"])
def test_scales_on_the_device_are_taken_as_they_are(name: str, wrong: float, device: str) -> None:
    """The other head, and the rest of the cache, are not harmed."""
    step = step_of("e4m3", lengths=[37], max_seq_len=64, head_dim=64, device=device)
    scales = torch.full((1, 2), 0.5, device=device)
    step.k_scale = step.v_scale = scales
    snapshot(step)
    right = run(step)
    step.k_cache.copy_(step.before["k_cache"]), step.v_cache.copy_(step.before["v_cache"])
    setattr(step, name, torch.tensor([[wrong, 0.5]], device=device))
    out = run(step)
    assert torch.equal(out[:, 4:], right[:, 4:])
    for cache in ("k", "v"):
        held, token = getattr(step, f"{cache}_cache"), getattr(step, cache)
        expected = stored(token[0], scales_of(getattr(step, f"{cache}_scale"), 0), E4M3).float()
        torch.testing.assert_close(held[0, 37].float(), expected, equal_nan=True, rtol=0, atol=0)


BAD: dict[str, tuple[Callable[[Step], dict[str, Any]], str]] = {
    "zero": (lambda s: {"k_scale": 0.0}, "k_scale: got 0.0; allowed: a number from 1e-30 to 1e"),
    "negative": (lambda s: {"v_scale": -1}, "v_scale: got -1; allowed: a number"),
    "no number": (lambda s: {"k_scale": math.nan}, "k_scale: got nan"),
    "endless": (lambda s: {"v_scale": math.inf}, "v_scale: got inf"),
    "text": (lambda s: {"k_scale": "1"}, "k_scale: got a str; allowed: a number or a torch.T"),
    "truth": (lambda s: {"k_scale": True}, "k_scale: got a bool"),
    "more heads": (lambda s: {"k_scale": s.q.new_ones(3).float()}, r"k_scale: got shape \[3\]"),
    "more sequences": (
        lambda s: {"v_scale": s.q.new_ones(2, 2).float()},
        r"v_scale: got shape \[2, 2\]; allowed: \[\], \[2\] \(of KV heads\) or \[1, 2\]",
    ),
    "of tokens": (
        lambda s: {"k_scale": s.q.new_ones(1, 64, 2).float()}, "v_scale: got none of tokens; allowe"
    ),
    "in half": (lambda s: {"k_scale": s.q.new_ones(2)}, "k_scale: got torch.float16; allowed: t"),
    "elsewhere": (lambda s: {"v_scale": torch.ones(2, device="meta")}, "v_scale: got .* on meta"),
    "that learns": (
        lambda s: {"v_scale": torch.ones(2, device=s.q.device, requires_grad=True)}, "v_scale: .*gr"
    ),
    "in the output": (
        lambda s: {"k_scale": s.out.view(torch.float32)[0, 0, :2]}, "out: got memory that k_scale"
    ),
    "in the cache": (
        lambda s: {"k_scale": s.k_cache[0, 37, 0, :8].view(torch.float32)},
        "k_scale: got memory of k_cache, to which this",
    ),
    "queries of 8 bits": (lambda s: {"q": s.q.to(E4M3)}, "q: got torch.float8_e4m3fn; allowed: t"),
    "a token of 8 bits": (lambda s: {"k": s.k.to(E4M3)}, "k: got torch.float8_e4m3fn; allowed: q"),
    "two types": (lambda s: {"v_cache": s.v_cache.view(E5M2)}, "v_cache: got .*_e5m2; allowed: k"),
    "one of 16 bits": (lambda s: {"v_cache": s.v_cache.half()}, "v_cache: got .*16; allowed: k_ca"),
    "another type": (
        lambda s: {"k_cache": s.k_cache.view(torch.int8)},
        "k_cache: got torch.int8; allowed: q's dtype, torch.float16, or torch.float8_e4m3fn or "
        "torch.float8_e5m2; view bytes that are such numbers: ",
    ),
    "odd rows": (
        lambda s: {"k_cache": _rows_apart(s.k_cache, 65)},
        "k_cache: got strides .*; allowed: rows at multiples of 2 bytes",
    ),
    "odd addresses": (
        lambda s: {"v_cache": _rows_apart(s.v_cache, 66, 1)},
        "v_cache: got strides .*; allowed: rows at multiples of 2 bytes",
    ),
}  # fmt: skip


def _rows_apart(cache: Tensor, pitch: int, first: int = 0) -> Tensor:
    """A cache of the same shape whose rows lie so many bytes apart."""
    *sizes, dim = cache.shape
    memory = torch.zeros(math.prod(sizes) * pitch + first, dtype=torch.uint8, device=cache.device)
    rows = memory[first:].view(*sizes, pitch)[..., :dim]
    return rows.view(cache.dtype)


@pytest.mark.parametrize("name", BAD)
def test_bad_scales_and_caches_launch_nothing_and_write_nothing(name: str, device: str) -> None:
    step = step_of("e4m3", lengths=[37], max_seq_len=64, head_dim=64, device=device)
    changes, message = BAD[name]
    given = dict(zip(("q", "k_cache", "v_cache", "k", "v"), step.tensors(), strict=True))
    with pytest.raises(InputError, match=message):
        gqa_decode(**given | changes(step), cache_seqlens=37, out=step.out)
    with pytest.raises(InputError, match=message):
        gqa_cutlass.plan(**given | changes(step), cache_seqlens=37, out=step.out)
    assert step.out.isnan().all()
    step.check_memory(rejected=(0,))


@pytest.mark.parametrize("scale", [0.5, torch.ones(2)], ids=["a number", "a tensor"])
def test_caches_of_16_bits_have_no_scales(scale: float | Tensor) -> None:
    tensors = call_tensors()
    for call in (gqa_decode, gqa_cutlass.plan):
        with pytest.raises(InputError, match="v_scale: got .*, with caches of torch.float16; allo"):
            call(**tensors, cache_seqlens=3, v_scale=scale)
    with pytest.raises(InputError, match="v_scale: got .*, with caches of torch.float16; allowed"):
        gqa_cutlass.explain(**tensors, v_scale=scale)


@every_type
def test_rows_that_are_no_multiple_of_16_bytes(dtype: torch.dtype, device: str) -> None:
    """Contiguous rows of 40 bytes, and of 72."""
    step = make_step(lengths=[37, 5], max_seq_len=48, head_dim=40, head_dim_v=72, device=device)
    step.into_fp8(dtype)
    step.k_cache, step.v_cache = step.k_cache.contiguous(), step.v_cache.contiguous()
    snapshot(step)
    check(step, run(step))


def test_every_number_for_a_scale_has_its_own_plan(device: str) -> None:
    step = step_of("e5m2", lengths=[37], max_seq_len=64, head_dim=64, append=False, device=device)
    for _ in range(2):  # the second time from the plans that are kept
        for scale in (2e-5, 4e-5, 1, None):
            step.k_scale, step.v_scale = 1e-5, scale
            check(step, run(step))


def test_flash_attention_calls_them_descales(device: str) -> None:
    step = step_of("e4m3", lengths=[37, 12], max_seq_len=64, head_dim=64, device=device)
    out = flash_attn_with_kvcache(
        step.q.unsqueeze(1), step.k_cache, step.v_cache, step.k.unsqueeze(1), step.v.unsqueeze(1),
        cache_seqlens=step.seqlens, k_descale=step.k_scale, v_descale=step.v_scale,
    )  # fmt: skip
    check(step, out.squeeze(1))


@pytest.mark.parametrize("number", [True, False], ids=["a number", "tensors"])
def test_compiled_code_has_scales(number: bool) -> None:
    step = step_of("e4m3", lengths=[37, 12], max_seq_len=64, head_dim=64, device="cpu")
    if number:
        step.k_scale, step.v_scale = 0.01, 2.0

    @torch.compile(backend="eager", fullgraph=True)
    def decode(*tensors: Tensor) -> Any:
        return gqa_decode(
            *tensors, cache_seqlens=step.seqlens, k_scale=step.k_scale, v_scale=step.v_scale
        )

    check(step, decode(*step.tensors()))
