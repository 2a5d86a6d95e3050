"""One decode step of one kernel in ptxsim, on random data: is it right, and what does it do?"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypedDict

import torch
from torch import Tensor

from gqa_cutlass.api import plan
from gqa_cutlass.cache.allocation import available_bytes
from gqa_cutlass.call.layout import DTYPES
from gqa_cutlass.call.stored import FP8, SCALES
from gqa_cutlass.call.tokens import pack_tree_mask
from gqa_cutlass.codegen.config import KernelConfig
from gqa_cutlass.codegen.schema.launch import LaunchShape
from gqa_cutlass.codegen.schema.policies import OF_TOKENS
from gqa_cutlass.codegen.schema.rounding import ceil_div
from gqa_cutlass.codegen.schema.slots import QUERIES
from gqa_cutlass.codegen.schema.storage import PAGE_TOKENS
from gqa_cutlass.cpu.executor import CpuKernel
from gqa_cutlass.proof.reference import attend, errors, scale_of_row, stored
from gqa_cutlass.proof.turning import is_rounded_once, turned
from gqa_cutlass.ptxsim.prepare import Program
from gqa_cutlass.ptxsim.simulate import Checks
from gqa_cutlass.ptxsim.stats import Stats
from gqa_cutlass.sizes import check_room, check_sizes, enough_memory

Trace = Callable[[Program, int, int, int], None]
_PAGE_SIZE = PAGE_TOKENS  # of paged caches: the least that every schedule takes
_SEVERAL = 3  # tokens of a sequence, where a kernel takes several
_NORM_EPS = 1e-6
# About what a step takes per element of K, with the reference and what ptxsim notes.
BYTES_PER_ELEMENT = 64
_TORCH = {kind: dtype for dtype, kind in DTYPES.items()}
_CPU = torch.device("cpu")
STEPS = 3  # of a run: compiled, run, compared


def _quiet(_: str) -> None:
    """Tell nobody."""


class _Asked(TypedDict, total=False):
    """Options of `plan` that ask for features."""

    softcap: float
    sinks: Tensor
    window_size: tuple[int, int]
    alibi_slopes: Tensor
    cache_leftpad: Tensor
    cache_batch_idx: Tensor
    block_table: Tensor
    k_scale: float | Tensor
    v_scale: float | Tensor
    tree_mask: Tensor


class _Turns(TypedDict, total=False):
    """Options of `plan` that ask for norms and rotations, and which are done before `attend`."""

    q_norm_weight: Tensor
    k_norm_weight: Tensor
    norm_eps: float
    rotary_cos: Tensor
    rotary_sin: Tensor


@dataclass(frozen=True, kw_only=True)
class SimRun:
    """What came of it.

    Args:
        program: The kernel.
        shape: How it was launched.
        stats: What it did.
        seconds: How long ptxsim took.
        error: Largest difference of the output from attention in float64.
        error_torch: The same of PyTorch's attention in the input type.
        lse_error: Largest difference of the lse.
        appended: Whether the new tokens' K and V are in the caches bit for bit, or rounded as they
            are stored; of K that is normed or rotated, rounded once, or next to it in 8 bits.
        least_bytes: Bytes that a step must at least read: the caches' tokens, q and new tokens.
    """

    program: Program
    shape: LaunchShape
    stats: Stats
    seconds: float
    error: float
    error_torch: float
    lse_error: float
    appended: bool
    least_bytes: int


def run_sim(
    config: KernelConfig,
    *,
    cache_len: int,
    batch: int = 1,
    kv_heads: int = 1,
    num_splits: int = 0,
    races: bool = True,
    trace: Trace | None = None,
    told: Callable[[str], None] = _quiet,
) -> SimRun:
    """Run one decode step.

    Args:
        config: The kernel.
        cache_len: Tokens in every sequence's cache before the step.
        batch: Sequences.
        kv_heads: KV heads.
        num_splits: Parts that each sequence is cut into; 0 leaves the choice to the dispatcher.
        races: Whether to look for races.
        trace: Called for every instruction with the kernel, the instruction's position, and how
            many warps and lanes execute it.
        told: Called with what was done, `STEPS` times.

    Raises:
        InputError: A size is not allowed.
        KernelFault: The kernel did what no kernel may.
    """
    check_sizes("sim", batch=batch, kv_heads=kv_heads, splits=num_splits)
    row = batch * kv_heads * max(config.head_dim, config.value_dim) * BYTES_PER_ELEMENT
    check_room(
        "sim", "cache_len", cache_len, least=0, each=row, fixed=row * config.group_size,
        room=available_bytes(_CPU), where="free on the CPU",
    )  # fmt: skip
    check_sizes("sim", cache_len=cache_len)
    with enough_memory("sim"):
        return _run(
            config, cache_len, batch, kv_heads, num_splits, Checks(races=races), trace, told
        )


def _run(
    config: KernelConfig,
    cache_len: int,
    batch: int,
    kv_heads: int,
    num_splits: int,
    checks: Checks,
    trace: Trace | None,
    told: Callable[[str], None],
) -> SimRun:
    """Run it; sizes are checked."""
    several = any(policy.slot is QUERIES for policy in config.policies)
    new = _SEVERAL if several else 1
    total = cache_len + new
    q, k_cache, v_cache, k, v = _step(config, total, batch, kv_heads, new)
    asked, turns = _features(config, batch, q.shape[-2], total, new), _turns(config, q, total)
    for (dtype, policy), of_tokens in zip(FP8.items(), OF_TOKENS, strict=True):
        if policy in config.policies:
            k_cache = stored(k_cache, asked["k_scale"], dtype)
            v_cache = stored(v_cache, asked["v_scale"], dtype)
        if of_tokens in config.policies:
            scales = scale_of_row(k_cache, dtype), scale_of_row(v_cache, dtype)
            k_cache, v_cache = (
                stored(cache, scale.unsqueeze(-1), dtype)
                for cache, scale in zip((k_cache, v_cache), scales, strict=True)
            )
            asked["k_scale"], asked["v_scale"] = scales
    if (table := asked.get("block_table")) is not None:
        k_cache, v_cache = (_in_pages(cache, table) for cache in (k_cache, v_cache))
        for name in SCALES:
            if isinstance(scale := asked.get(name), Tensor):
                asked[name] = _in_pages(scale, table)  # type: ignore[literal-required]
    options = asked.copy()
    if "tree_mask" in asked:
        options["tree_mask"] = pack_tree_mask(asked["tree_mask"])
    given_q, given_k, given_v = (q, k, v) if several else (q[:, 0], k[:, 0], v[:, 0])
    made = plan(
        given_q, k_cache, v_cache, given_k, given_v, cache_seqlens=cache_len, num_splits=num_splits,
        return_lse=True, kernel=config, out_dtype=_out_dtype(config), **options, **turns,
    )  # fmt: skip
    kernel = made.kernel
    assert isinstance(kernel, CpuKernel)
    program = kernel.program
    told("compiled")
    kernel.checks = checks
    kernel.stats = Stats(len(program.code), None if trace is None else partial(trace, program))
    start = time.perf_counter()
    out, lse = made(given_q, k_cache, v_cache, given_k, given_v, cache_len)
    seconds = time.perf_counter() - start
    told("run")
    keys, appended = _turned(k, cache_len, turns, "k_norm_weight"), []
    for b in range(batch):
        places = [_place(b, cache_len + i, table) for i in range(new)]
        found, values = (torch.stack([c[at] for at in places]) for c in (k_cache, v_cache))
        right = keys[b].to(k.dtype)
        held = _held(right, k_cache, asked.get("k_scale"))
        appended.append(
            is_rounded_once(found, keys[b]) if turns and k_cache.dtype == k.dtype
            else _distance(found, held) <= bool(turns)
        )  # fmt: skip
        appended.append(_distance(values, _held(v[b], v_cache, asked.get("v_scale"))) == 0)
        for at, key in zip(places, held, strict=True):
            k_cache[at] = key  # which may be rounded the other way
    queries = _turned(q, cache_len, turns, "q_norm_weight").to(q.dtype).view(given_q.shape)
    step = queries, k_cache, v_cache, [total] * batch, config.head_dim**-0.5
    exact, exact_lse = attend(*step, torch.float64, **asked)
    typed, _ = attend(*step, q.dtype, **asked)
    found_errors = errors(out, exact, typed)
    told("compared")
    return SimRun(
        program=program,
        shape=made.dispatch.shape,
        stats=kernel.stats,
        seconds=seconds,
        error=found_errors.max,
        error_torch=found_errors.max_torch,
        lse_error=(lse.double() - exact_lse).abs().max().item(),
        appended=all(appended),
        least_bytes=made.problem.cache_bytes + q.nbytes,
    )


def _step(
    config: KernelConfig, tokens: int, batch: int, kv_heads: int, new: int
) -> tuple[Tensor, ...]:
    """Random q, caches of so many tokens, and new tokens."""
    generator = torch.Generator().manual_seed(0)
    dims = config.head_dim, config.value_dim
    query = batch, new, kv_heads * config.group_size, config.head_dim
    caches = [(batch, tokens, kv_heads, dim) for dim in dims]
    token = [(batch, new, kv_heads, dim) for dim in dims]
    return tuple(
        torch.randn(*shape, generator=generator).to(_TORCH[config.dtype])
        for shape in (query, *caches, *token)
    )


def _out_dtype(config: KernelConfig) -> torch.dtype | None:
    """The type of the kernel's outputs, where it is not that of q."""
    wide = any(policy.feature == "out_dtype" for policy in config.policies)
    return torch.float32 if wide else None


def _features(config: KernelConfig, batch: int, heads: int, tokens: int, new: int) -> _Asked:
    """Options that ask for what the kernel has, such that it makes a difference."""
    wanted = {policy.feature for policy in config.policies}
    asked: _Asked = {}
    if "softcap" in wanted:
        asked["softcap"] = 1.5
    if "sinks" in wanted:
        asked["sinks"] = torch.linspace(-2, 7, heads)
    if "window_size" in wanted:
        asked["window_size"] = max(tokens // 2 - 1, 0), 0
    if "alibi_slopes" in wanted:
        asked["alibi_slopes"] = torch.linspace(0, 0.3, heads)
    if "cache_leftpad" in wanted:
        asked["cache_leftpad"] = torch.full((batch,), 2 * tokens // 3, dtype=torch.int32)
    if "cache_batch_idx" in wanted:
        asked["cache_batch_idx"] = torch.arange(batch, dtype=torch.int32)
    if "block_table" in wanted:
        pages = torch.arange(batch * ceil_div(tokens, _PAGE_SIZE), dtype=torch.int32)
        asked["block_table"] = pages.flip(0).view(batch, -1)
    if config.packed > 1:
        asked["k_scale"], asked["v_scale"] = 0.01, 0.02  # some numbers are beyond the last
    if "tree_mask" in wanted:  # of siblings: all see the first, and themselves
        mask = torch.eye(new, dtype=torch.bool)
        mask[:, 0] = True
        asked["tree_mask"] = mask.repeat(batch, 1, 1)
    return asked


def _turns(config: KernelConfig, q: Tensor, tokens: int) -> _Turns:
    """The same of norms and rotations."""
    wanted = {policy.feature for policy in config.policies}
    turns: _Turns = {}
    if "q_norm_weight" in wanted:
        weights = torch.linspace(0.5, 1.5, config.head_dim)
        turns["q_norm_weight"], turns["k_norm_weight"] = weights, weights.flip(0).to(q.dtype)
        turns["norm_eps"] = _NORM_EPS
    if "rotary_cos" in wanted:
        speeds = 10.0 ** -torch.linspace(0, 4, config.head_dim // 16 * 8)
        angles = torch.arange(tokens).unsqueeze(1) * speeds
        turns["rotary_cos"], turns["rotary_sin"] = angles.cos(), angles.sin()
    return turns


def _turned(rows: Tensor, first: int, turns: _Turns, weight: str) -> Tensor:
    """Queries or new keys, [batch, tokens, heads, head_dim], as they are multiplied; in float64."""
    positions = torch.arange(first, first + rows.shape[1])
    made = [
        turned(
            each, positions, weight=turns.get(weight), eps=_NORM_EPS,  # type: ignore[arg-type]
            cos=turns.get("rotary_cos"), sin=turns.get("rotary_sin"),
        )
        for each in rows
    ]  # fmt: skip
    return torch.stack(made)


def _held(rows: Tensor, cache: Tensor, scale: float | Tensor | None) -> Tensor:
    """Rows of 16 bits as a cache has them, by the scale for all, or by their own."""
    if isinstance(scale, Tensor):
        scale = scale_of_row(rows, cache.dtype).unsqueeze(-1)
    return stored(rows, scale, cache.dtype) if cache.dtype in FP8 else rows


def _distance(found: Tensor, right: Tensor) -> int:
    """By how many bits' worth numbers are apart at most."""
    integer = torch.uint8 if found.itemsize == 1 else torch.int16
    steps = found.contiguous().view(integer).int() - right.contiguous().view(integer).int()
    return int(steps.abs().max())


def _place(b: int, token: int, table: Tensor | None) -> tuple[int, int]:
    """Where a token of a sequence is in a cache."""
    if table is None:
        return b, token
    page, place = divmod(token, _PAGE_SIZE)
    return int(table[b, page]), place


def _in_pages(cache: Tensor, table: Tensor) -> Tensor:
    """The tokens of a cache, one sequence's behind the other's, in pages as a table has them."""
    batch, tokens, *row = cache.shape
    room = table.shape[1] * _PAGE_SIZE
    whole = torch.cat([cache, cache.new_zeros(batch, room - tokens, *row)], dim=1)
    pool = cache.new_empty(table.numel(), _PAGE_SIZE, *row)
    pool[table.flatten().long()] = whole.view(pool.shape)
    return pool
