"""FlashAttention's call for decoding, by its own names: one decode step of `gqa_decode`.

A program changes its import. FlashAttention-3's parameters come in its order; what
FlashAttention-2, and vLLM's build of it, call otherwise, is taken by name.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from gqa_cutlass.api import gqa_decode
from gqa_cutlass.errors import InputError, shown

_NO_WINDOW = -1, -1
_NUMBERS = int, float
_SCALED = "None; queries of 16 bits, with their scale multiplied into softmax_scale"
# What FlashAttention does and no kernel here: what to pass instead.
_NOT_YET = {
    "qv": "None, the attention of models without qv",
    "q_descale": _SCALED,
    "attention_chunk": "0; for chunks, pass cache_leftpad, where the newest token's begins",
}


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    qv: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    page_table: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    max_seqlen_q: int | None = None,
    rotary_seqlens: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: float | Tensor | None = None,
    v_descale: float | Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = _NO_WINDOW,
    attention_chunk: int = 0,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    scheduler_metadata: object = None,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
    return_softmax_lse: bool = False,
    *,
    sinks: Tensor | None = None,
    s_aux: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    block_table: Tensor | None = None,
    out: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    fa_version: object = None,
) -> Any:
    """Append a token's K and V to the cache, if given, and attend: FlashAttention's call.

    What it does is `gqa_decode`: dtypes, sizes, strides,
    inactive rows, overflow, CUDA graphs and `torch.compile` are as there. A call with what is not
    supported yet is refused before anything is written.

    Args:
        q: The queries, [batch, tokens, num_q_heads, head_dim], 1 to 256 tokens.
        k_cache: [batch, max_seq_len, num_kv_heads, head_dim], or more rows with `cache_batch_idx`,
            or with `page_table` [num_pages, page_size, num_kv_heads, head_dim].
            Of q's dtype, or float8_e4m3fn or float8_e5m2.
        v_cache: As k_cache; its head_dim, and that of v and the output, may be another.
        k: The new tokens' keys, [batch, tokens, num_kv_heads, head_dim], written from
            `cache_seqlens` on.
        v: As k.
        qv: Not supported yet: None.
        rotary_cos: Cosines, [positions, rotary_dim / 2]: q and k are rotated, then k is cached. Of
            q's dtype or float32; rotary_dim is a multiple of 16.
        rotary_sin: Sines, likewise.
        cache_seqlens: Tokens in the cache before this call: an int, or int32 [batch] on q's
            device. None is all of the cache, where nothing is appended.
        cache_batch_idx: The row of the caches, or of the table, that each sequence has, int32
            [batch].
        cache_leftpad: Where each sequence begins in its row, int32 [batch].
        page_table: The pages of each sequence, int32 [batch, max_pages]; see `block_table` of
            `gqa_decode`. Pages are of any size.
        cu_seqlens_q: Where each sequence's tokens begin in q, [all tokens, num_q_heads, head_dim]:
            int32 [batch + 1].
        cu_seqlens_k_new: The same of k and v.
        max_seqlen_q: With `cu_seqlens_q`, query tokens of a sequence at most.
        rotary_seqlens: Positions of each sequence's first new token, int32 [batch]; None for
            `cache_seqlens`.
        q_descale: Not supported yet: None. Queries are of 16 bits, also with caches of 8.
        k_descale: Of a cache of float8_e4m3fn or float8_e5m2: what its keys are multiplied by, and
            what a new one is divided by; float32, [], [num_kv_heads] or [batch, num_kv_heads], or a
            number: `k_scale` of `gqa_decode`. None for 1.
        v_descale: The same of values.
        softmax_scale: Factor on the scores; None for head_dim ** -0.5.
        causal: Whether each of several query tokens sees the keys up to its own alone. One sees
            every key either way.
        window_size: (left, right): a query's token attends to itself, to `left` before it, and
            unless `causal` to `right` behind it; -1 for all.
        attention_chunk: Not supported yet: 0.
        softcap: Bound of the scores; 0 for none.
        rotary_interleaved: Whether neighbouring dims turn together (GPT-J, the default here), or
            those half of rotary_dim apart (GPT-NeoX, Llama: pass False).
        scheduler_metadata: A hint, without effect.
        num_splits: Parts that each sequence is cut into; 0 leaves the choice to the dispatcher.
        pack_gqa: A hint, without effect: the heads of a group are always packed.
        sm_margin: A hint, without effect.
        return_softmax_lse: Also return the log-sum-exp.
        sinks: One more logit per query head, [num_q_heads]; see `gqa_decode`.
        s_aux: Another name of `sinks`.
        alibi_slopes: ALiBi, float32, [num_q_heads] or [batch, num_q_heads]; see `gqa_decode`.
        block_table: Another name of `page_table`.
        out: Where to write, of the output's shape and dtype; None for a new tensor.
        out_dtype: torch.float32 for a part that `merge_states` merges; None for q's dtype.
        fa_version: A hint, without effect.

    Returns:
        The output, q's shape with the head_dim of v, of q's dtype or `out_dtype`; with
        return_softmax_lse also the log-sum-exp, float32 [batch, num_q_heads, tokens], or with
        `cu_seqlens_q` [num_q_heads, all tokens].

    Raises:
        InputError: An argument is not allowed, or not supported yet. Nothing was launched.
        GqaError: As for `gqa_decode`.

    Source: the call of FlashAttention-3, Shah et al. (arXiv:2407.08608).
    """
    chunked = attention_chunk is not None and not _is_zero(attention_chunk)
    if chunked or not (qv is q_descale is None):
        _refuse(
            qv=qv, q_descale=q_descale,
            attention_chunk=attention_chunk if chunked else None,
        )  # fmt: skip
    shape = _shape(q)
    ragged = cu_seqlens_q is not None
    if shape is not None and len(shape) != (3 if ragged else 4):
        dims = "[all tokens" if ragged else "[batch, tokens"
        _fail("q", f"shape {shape}", f"{dims}, num_q_heads, head_dim]")
    if block_table is not None:
        if page_table is not None:
            _fail("block_table and page_table", "both", "one of them: they are the same")
        page_table = block_table
    if cache_seqlens is None:
        cache_seqlens = _whole_cache(k_cache, k, page_table)
    features: dict[str, Any] = {}  # those that are asked for: others cost time, if they are named
    if s_aux is not None:
        if sinks is not None:
            _fail("sinks and s_aux", "both", "one of them: they are the same")
        sinks = s_aux
    if sinks is not None:
        features["sinks"] = sinks
    if not _is_zero(softcap):
        features["softcap"] = softcap
    if not _is_no_window(window_size):
        features["window_size"] = window_size
    if alibi_slopes is not None:
        features["alibi_slopes"] = alibi_slopes
    if cache_leftpad is not None:
        features["cache_leftpad"] = cache_leftpad
    if cache_batch_idx is not None:
        features["cache_batch_idx"] = cache_batch_idx
    if page_table is not None:
        features["block_table"] = page_table
    if k_descale is not None:
        features["k_scale"] = k_descale
    if v_descale is not None:
        features["v_scale"] = v_descale
    if out_dtype is not None:
        features["out_dtype"] = out_dtype
    if ragged or shape is not None and shape[1] != 1:
        features["causal"] = causal  # which one query is in any case
    if ragged or cu_seqlens_k_new is not None:
        features["cu_seqlens_q"] = cu_seqlens_q
        features["cu_seqlens_k_new"] = cu_seqlens_k_new
        features["max_seqlen_q"] = max_seqlen_q
    if rotary_cos is not None or rotary_sin is not None or rotary_seqlens is not None:
        features["rotary_cos"], features["rotary_sin"] = rotary_cos, rotary_sin
        features["rotary_seqlens"] = rotary_seqlens
        features["rotary_interleaved"] = rotary_interleaved
    result = gqa_decode(
        q, k_cache, v_cache, k, v, cache_seqlens=cache_seqlens, softmax_scale=softmax_scale,
        num_splits=num_splits, return_lse=return_softmax_lse, out=out, **features,
    )  # fmt: skip
    if return_softmax_lse:
        attended, lse = result
        return attended, lse if ragged or lse.dim() == 3 else lse.unsqueeze(-1)
    return result


def _is_zero(value: object) -> bool:
    """Whether it is the number; other types may not be compared, and are refused later."""
    return type(value) in _NUMBERS and value == 0


def _is_no_window(value: object) -> bool:
    """Whether it is two times -1, in a tuple or list; what else it may be is refused later."""
    if not isinstance(value, tuple | list):
        return False
    return [type(end) is int and end == -1 for end in value] == [True, True]


def _whole_cache(k_cache: Tensor, k: Tensor | None, page_table: Tensor | None) -> int:
    """The length of sequences that fill their cache, to which nothing is appended."""
    if k is not None:
        _fail("cache_seqlens", "None, with k", "the lengths before the new token, where it goes")
    shape = _shape(k_cache) or []
    if len(shape) < 2:
        return 0  # what is no cache, `gqa_decode` refuses
    if page_table is None:
        return shape[1]
    return shape[1] * (_shape(page_table) or [0])[-1]


def _refuse(**arguments: object) -> NoReturn:
    """Raise InputError for the first argument that is there and not supported."""
    name = next(name for name, value in arguments.items() if value is not None)
    value = arguments[name]
    shape = _shape(value)
    got = shown(value) if shape is None else f"shape {shape}"
    _fail(name, f"{got}, which is not supported yet", _NOT_YET[name])


def _shape(value: object) -> list[int] | None:
    """A tensor's; None for what is none, and for nested ones, which have no such thing."""
    try:
        return list(value.shape)  # type: ignore[attr-defined]
    except Exception:
        return None


def _fail(what: str, got: str, allowed: str) -> NoReturn:
    raise InputError(
        f"flash_attn_with_kvcache: {what}: got {got}; allowed: {allowed}. Nothing was launched."
    )
