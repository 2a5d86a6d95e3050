"""The public calls: validate, then dispatch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Unpack, overload

import torch
from torch import Tensor

from gqa_cutlass.call.asked import TENSORS, features_of, rename, rounded
from gqa_cutlass.call.given import fail
from gqa_cutlass.call.options import CallOptions, PlanOptions, listed
from gqa_cutlass.call.plan import Pair, Plan, Result
from gqa_cutlass.call.plans import Plans
from gqa_cutlass.call.tokens import is_tree, packed_tree
from gqa_cutlass.codegen.schema.arguments import ARGUMENTS
from gqa_cutlass.devices import device_of, executor_of, gpu_index
from gqa_cutlass.tracing import is_traced, untraced

_FEATURES, _FIRST_FEATURE = frozenset(TENSORS), len(ARGUMENTS.rows)


_PLANS = Plans(executor_of)


@overload
def gqa_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    cache_seqlens: int | Tensor,
    return_lse: Literal[False] = False,
    **options: Unpack[CallOptions],
) -> Tensor: ...
@overload
def gqa_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    cache_seqlens: int | Tensor,
    return_lse: Literal[True],
    **options: Unpack[CallOptions],
) -> Pair: ...
@overload
def gqa_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    cache_seqlens: int | Tensor,
    return_lse: bool,
    **options: Unpack[CallOptions],
) -> Result: ...
@listed(CallOptions)
def gqa_decode(  # noqa: D417 - the decorator completes the list
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    cache_seqlens: int | Tensor,
    softmax_scale: float | None = None,
    num_splits: int = 0,
    return_lse: bool = False,
    ragged: bool = True,
    max_seqlen: int | None = None,
    out: Tensor | None = None,
    **features: Any,
) -> Result:
    """Run one decode step: append the new tokens' K and V, then attend over everything cached.

    One kernel launch on the current stream; no synchronisation. Can be captured into a CUDA graph,
    with lengths that change between replays when `cache_seqlens` is a tensor. The caller advances
    the lengths. CPU tensors run through the same dispatch and kernel in ptxsim, which interprets
    the kernel's PTX: for tests and trying things out, a fraction of a second per call and more.

    Tensors are plain and dense, parameters and views included: no wrappers of torch.func, negated
    views (call `.resolve_neg()`) or subclasses with `__torch_dispatch__`.

    Args:
        q: Queries of the new token, float16 or bfloat16, [batch, num_q_heads, head_dim], or of
            several, 1 to 256, [batch, tokens, num_q_heads, head_dim]. head_dim is a multiple of 8
            from 32 to 256.
        k_cache: [batch, max_seq_len, num_kv_heads, head_dim], or pools of pages with `block_table`;
            dtype of q, or float8_e4m3fn or float8_e5m2; any strides (even ones, of 8 bits) with a
            contiguous last dimension (an HND cache is passed as `cache.transpose(1, 2)`).
            num_kv_heads divides num_q_heads. Token cache_seqlens[b] of sequence b, and as many
            behind it as are new, are written when k is given.
        v_cache: As k_cache, of its dtype; its head_dim, and that of v and the output, may be
            another, head_dim_v.
        k: The new token's keys, [batch, num_kv_heads, head_dim], or those of several,
            [batch, tokens, num_kv_heads, head_dim], of the dtype of q. None: attend only, append
            nothing. If not all new tokens of a sequence fit, none of them is written.
        v: As k. The row of a cache that is written must not hold q, k, v or cache_seqlens; with
            lengths on the device, no row of a cache that is appended to may. This is told by
            addresses: memory that is mapped twice is not seen.
        cache_seqlens: Tokens in the cache before this call, those in k not counted (engines that
            count them pass `seq_lens - tokens`): one int for all sequences, or
            int32 [batch] on q's device, which the host never reads. A negative one there makes its
            row inactive, as the rows that pad the batch of a CUDA graph are: nothing is read of its
            cache or written to it, and it has nothing to attend to.
        return_lse: Also return the logarithm of the softmax's denominator.
        **features: `Options`.

    Returns:
        The output, q's shape (with head_dim_v), of its dtype or `out_dtype`; with return_lse also
        the log-sum-exp, float32 [batch, num_q_heads], of several tokens
        [batch, num_q_heads, tokens], with cu_seqlens_q [num_q_heads, all tokens]: the natural
        logarithm of the sum of the
        exponentials of the scaled (and capped) scores, and of the sinks. A sequence with nothing to
        attend to gives zeros and minus infinity, or the sink.

    Raises:
        InputError: An argument is not allowed. Nothing was launched.
        CacheOverflowError: The new token does not fit. With lengths on the device this is found by
            the kernel: that sequence's output is NaN, its cache is untouched, and a later call (or
            `check_overflow`) raises.
        DeviceError: No usable GPU, for tensors on one.
        GqaError: Compiling, storing or launching the kernel failed; see `gqa_cutlass.errors`.

    Source: Ainslie et al., "GQA" (arXiv:2305.13245); split over the sequence as in Flash-Decoding.
    """
    if features:
        rename(features)
        if "tree_mask" in features:
            features["tree_mask"] = packed_tree(features["tree_mask"])
    given: tuple[Any, ...] = q, k_cache, v_cache, k, v, out, cache_seqlens
    quick: tuple[object, ...] | None = None
    known: Sequence[Plan] = ()
    if not is_traced():
        try:
            if max_seqlen is not None:
                max_seqlen = rounded(max_seqlen)
            # With types, for True == 1 would find the plans of 1.
            quick = (
                k_cache.shape, softmax_scale, type(softmax_scale), num_splits, type(num_splits),
                return_lse, type(return_lse), ragged, type(ragged), max_seqlen, type(max_seqlen),
                torch.is_grad_enabled(),
            )  # fmt: skip
            if features:
                tensors = features_of(features)
                given += tensors
                quick += *map(type, tensors), *features.items(), *map(type, features.values())
            known = _PLANS.latest.get(quick, ())
        except Exception:  # no tensor, or no options: `Plans.find` says what is wrong
            quick = None
        for made in known:
            argument = made.bind_quickly(given)
            if argument is not None:
                return made.launch(given, argument)
    options = {
        "softmax_scale": softmax_scale, "num_splits": num_splits, "return_lse": return_lse,
        "ragged": ragged, "max_seqlen": max_seqlen, **features,
    }  # fmt: skip
    if is_traced() or torch.compiler.is_compiling():  # by torch.export, which may do without Dynamo
        return _traced(given, options)
    made, argument = _PLANS.find("gqa_decode", given, options, quick)
    return made.launch(given, argument)


def _traced(given: tuple[Any, ...], options: dict[str, Any]) -> Result:
    """The call as an operator of torch; registered when torch first traces it."""
    from gqa_cutlass import ops

    *tensors, cache_seqlens = given[:_FIRST_FEATURE]
    features = dict(zip(TENSORS, given[_FIRST_FEATURE:], strict=False))
    for name in options.keys() & features.keys():  # a number in place of a tensor
        del features[name]
    return ops.traced(tuple(tensors), cache_seqlens, **options, **features)


@overload
def plan(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    cache_seqlens: int | Tensor,
    return_lse: Literal[False] = False,
    **options: Unpack[PlanOptions],
) -> Plan[Tensor]: ...
@overload
def plan(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    cache_seqlens: int | Tensor,
    return_lse: Literal[True],
    **options: Unpack[PlanOptions],
) -> Plan[Pair]: ...
@overload
def plan(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    cache_seqlens: int | Tensor,
    return_lse: bool,
    **options: Unpack[PlanOptions],
) -> Plan: ...
@untraced
@listed(PlanOptions)
def plan(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    cache_seqlens: int | Tensor,
    return_lse: bool = False,
    out: Tensor | None = None,
    **options: Any,
) -> Plan:
    """Resolve everything about a problem once: validate, choose, compile and load the kernel.

    Launches nothing. The plan is then called as `plan(q, k_cache, v_cache, k, v, cache_seqlens,
    out)` with tensors laid out like these; others, such as sinks or block_table, it keeps for every
    call: write into them what is to change.

    Args:
        q: As for `gqa_decode`, as is all that follows unless it says otherwise.
        k_cache: As for `gqa_decode`.
        v_cache: As for `gqa_decode`.
        k: As for `gqa_decode`.
        v: As for `gqa_decode`.
        cache_seqlens: As for `gqa_decode`; whether it is an int or a tensor is part of the plan.
        return_lse: As for `gqa_decode`.
        out: As for `gqa_decode`; whether and how it is laid out is part of the plan.
        **options: `PlanOptions`.

    Raises:
        GqaError: As for `gqa_decode`.
    """
    rename(options)
    if is_tree(options.get("tree_mask")):
        fail(
            "tree_mask",
            "torch.bool, of which a plan would keep a copy",
            "what pack_tree_mask makes of it, into which the next trees can be written",
        )
    given = q, k_cache, v_cache, k, v, out, cache_seqlens, *features_of(options)
    made, _ = _PLANS.find("plan", given, options | {"return_lse": return_lse}, own=True)
    return made


@untraced
def check_overflow(device: torch.device | int | str = "cuda") -> None:
    """Wait for a GPU and report a length that a kernel found not to be allowed, if any.

    Args:
        device: The GPU, or "cpu" for calls on CPU tensors.

    Raises:
        CacheOverflowError: A call since the last report had a length in `cache_seqlens` that its
            cache could not hold, or a row or page that there is not.
        DeviceError: No usable GPU.
    """
    where = device_of(device)
    if where.type != "cpu":
        torch.cuda.synchronize(gpu_index(where))
    executor_of(where).flag.raise_if_set()
