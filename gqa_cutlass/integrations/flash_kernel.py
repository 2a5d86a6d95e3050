"""What transformers asks of a kernel of flash attention in continuous batching: these two calls.

`flash_attn_with_kvcache` takes a token of each request, and reads and writes transformers' pages.
`flash_attn_varlen_func` takes prompts, and what transformers has gathered from its pages before.

transformers loads a kernel as `attn_implementation="org/repo"`, through the package `kernels`, and
uses its pages if the name says flash and 2 or 3. One that has these two calls is

    from gqa_cutlass.integrations.flash_kernel import *
"""

from __future__ import annotations

import inspect
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from gqa_cutlass.api import gqa_decode
from gqa_cutlass.call.asked import check_window
from gqa_cutlass.call.stored import is_number
from gqa_cutlass.codegen.schema.problem import MAX_SEQ_LEN, MAX_TOKENS
from gqa_cutlass.errors import InputError, shown
from gqa_cutlass.flash_attn import flash_attn_with_kvcache
from gqa_cutlass.tensors import flaw
from gqa_cutlass.tracing import is_traced

__all__ = ["flash_attn_varlen_func", "flash_attn_with_kvcache"]

_NO_WINDOW = -1, -1
_TENSORS = "q", "k", "v", "cu_seqlens_q", "cu_seqlens_k"
# Torch's attention to sequences behind one another learned these in some version.
_TORCH_CAN = {"scale", "window_size", "enable_gqa"} <= {*inspect.signature(varlen_attn).parameters}


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = _NO_WINDOW,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
) -> Tensor:
    """Attend to sequences that lie one behind the other: FlashAttention's call, causal.

    Query i of T sees key j of S where j <= i + S - T. Nothing waits for the device, so that the
    call can be captured. Where a sequence may have more than 256 queries, torch's `varlen_attn`
    attends, if it can, for kernels of prompts are faster then.

    Args:
        q: [all queries, num_q_heads, head_dim], float16 or bfloat16.
        k: [all keys, num_kv_heads, head_dim].
        v: As k; its head_dim may be another.
        cu_seqlens_q: Where each sequence's queries begin, int32 [batch + 1] on q's device. Rows of
            q behind the last are padding, and so are those of the output.
        cu_seqlens_k: The same of k and v.
        max_seqlen_q: Queries of a sequence, at most. Where it is 1 and q has as many rows as there
            are sequences, row b is sequence b's, and `cu_seqlens_q` is not looked at.
        max_seqlen_k: Keys of a sequence, at most.
        softmax_scale: Factor on the scores; None for head_dim ** -0.5.
        causal: True.
        window_size: (left, right) as in `gqa_decode`; -1 for all.
        softcap: Bound of the scores; 0 or None for none.
        s_aux: One more logit per query head, [num_q_heads].

    Returns:
        [all queries, num_q_heads, head_dim of v], of q's dtype.

    Raises:
        InputError: It is not causal; or as for `gqa_decode`.
    """
    if causal is not True:
        _refuse("causal", shown(causal), "True, as requests of one batch are")
    if not is_traced():
        _check((q, k, v, cu_seqlens_q, cu_seqlens_k), max_seqlen_q, max_seqlen_k)
    asked: dict[str, Any] = {"softmax_scale": softmax_scale}
    left, _ = check_window(window_size)
    if left >= 0:
        asked["window_size"] = left, 0
    if softcap is not None and (not is_number(softcap) or softcap):
        asked["softcap"] = softcap
    if s_aux is not None:
        asked["sinks"] = s_aux
    lengths = cu_seqlens_k.diff()
    if max_seqlen_q == 1 and len(q) == len(lengths):
        asked["block_table"] = _single_tokens(cu_seqlens_k[:-1], max_seqlen_k)
        step: Tensor = gqa_decode(q, *_pools(k, v), cache_seqlens=lengths, **asked)
        return step
    if max_seqlen_q > MAX_TOKENS and _torch_can(q, v, asked):
        window = asked.get("window_size", (-1, 0))
        attended = varlen_attn(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
            scale=softmax_scale, window_size=window, enable_gqa=True,
        )  # fmt: skip
        assert isinstance(attended, Tensor)  # and no log-sum-exp
        return attended
    return _several(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, asked)


def _check(tensors: tuple[Tensor, ...], max_seqlen_q: int, max_seqlen_k: int) -> None:
    """Raise InputError for what cannot be made arguments of `gqa_decode`."""
    for name, tensor, dims in zip(_TENSORS, tensors, (3, 3, 3, 1, 1), strict=True):
        if found := flaw(tensor):
            _refuse(name, found.got, found.allowed)
        if tensor.dim() != dims or tensor.device != tensors[0].device:
            got = f"shape {list(tensor.shape)} on {tensor.device}"
            _refuse(name, got, f"{dims} dimensions, on q's device, {tensors[0].device}")
    ends, ends_k = tensors[3:]
    for name, tensor in zip(_TENSORS[3:], (ends, ends_k), strict=True):
        if tensor.dtype != torch.int32 or len(tensor) != max(len(ends), 2):
            got = f"{tensor.dtype} {list(tensor.shape)}"
            _refuse(name, got, "torch.int32 [batch + 1], with the same batch for both")
    for name, most in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
        if type(most) is not int or not 1 <= most <= MAX_SEQ_LEN:
            _refuse(name, shown(most), f"an int from 1 to {MAX_SEQ_LEN}")


def _torch_can(q: Tensor, v: Tensor, asked: dict[str, Any]) -> bool:
    """Whether torch attends to prompts like these."""
    plain = not {"softcap", "sinks"} & {*asked} and q.shape[-1] == v.shape[-1]
    return _TORCH_CAN and q.is_cuda and plain


def _several(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
    max_seqlen_q: int, max_seqlen_k: int, asked: dict[str, Any],
) -> Tensor:  # fmt: skip
    """Several queries of a sequence, in pieces of as many as a kernel takes, all in one launch.

    A piece is a sequence of its own to the kernel: it ends with its last query's own key.
    """
    pieces = -(-max_seqlen_q // MAX_TOKENS)
    first = torch.arange(0, pieces * MAX_TOKENS, MAX_TOKENS, dtype=torch.int32, device=q.device)
    ends = cu_seqlens_q[1:, None]
    begins = (cu_seqlens_q[:-1, None] + first).minimum(ends)
    left = ends - (begins + MAX_TOKENS).minimum(ends)  # queries behind a piece
    lengths = (cu_seqlens_k.diff()[:, None] - left).flatten()
    table = _single_tokens(cu_seqlens_k[:-1].repeat_interleave(pieces), max_seqlen_k)
    out = q.new_zeros(*q.shape[:-1], v.shape[-1])
    gqa_decode(
        q, *_pools(k, v), cache_seqlens=lengths, block_table=table, out=out,
        cu_seqlens_q=torch.cat([begins.flatten(), cu_seqlens_q[-1:]]),
        max_seqlen_q=min(max_seqlen_q, MAX_TOKENS), **asked,
    )  # fmt: skip
    return out


def _pools(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values as pools of pages of one token."""
    return k.unsqueeze(1), v.unsqueeze(1)


def _single_tokens(starts: Tensor, width: int) -> Tensor:
    """A table of pages of one token, for sequences whose tokens lie behind one another."""
    return starts[:, None] + torch.arange(width, dtype=torch.int32, device=starts.device)


def _refuse(what: str, got: str, allowed: str) -> NoReturn:
    raise InputError(
        f"flash_attn_varlen_func: {what}: got {got}; allowed: {allowed}. Nothing was launched."
    )
