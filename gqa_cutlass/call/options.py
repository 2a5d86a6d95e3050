"""The options that public calls have in common. Features are those with kernels of their own."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Collection
from dataclasses import fields
from inspect import Parameter
from textwrap import dedent, indent
from typing import Any, TypedDict, TypeVar

import torch
from torch import Tensor

from gqa_cutlass.call.asked import ALIASES, TAKEN, TENSORS, Asked
from gqa_cutlass.codegen.config import KernelConfig
from gqa_cutlass.dispatch.choice import Choice

_Function = TypeVar("_Function", bound=Callable[..., Any])


class Options(TypedDict, total=False):
    """What `gqa_decode`, `plan`, `explain` and `KVCache.decode` also take.

    Args:
        softmax_scale: Factor on the scores; None, the default, for head_dim ** -0.5.
        num_splits: Parts that each sequence is cut into; 0, the default, leaves the choice to the
            dispatcher. Results of the same number of splits are equal to the bit from run to run.
        ragged: Whether lengths on the device may differ much, so that long sequences get more
            blocks: up to several times faster then; 1 to 5% slower where all are about equal, and
            up to 26% where many sequences hold few tokens (H200). Results are right either way.
            True by default.
        max_seqlen: Tokens that no sequence has more of after the call, where the host knows: the
            launch is chosen for sequences of about so many, instead of for all lengths that the
            caches have room for. It counts as the next power of two, so that it may change with
            every call. A hint: results are right whatever the lengths are. None, the default: as
            many as there is room for.
        batch_invariant: Whether a sequence's result depends on nothing but itself, to the bit: not
            on how many others there are, how long they are, or how much room there is. Slower than
            what is chosen otherwise. With `cu_seqlens_q`, pass the same `max_seqlen_q` each time.
            False by default.
        softcap: Bound of the scores: softcap * tanh(scaled score / softcap), as in Gemma 2;
            0, the default, for none.
        sinks: One more logit per query head, as in gpt-oss: [num_q_heads], float32, float16 or
            bfloat16, contiguous, on q's device. In natural units, neither scaled nor capped; it
            is part of the softmax's denominator, and has no value. None, the default: without.
        window_size: A sliding window, (left, right): a query's token attends to itself and to
            `left` tokens before it, and older ones are not read; -1, the default, for all. `right`,
            of tokens behind it, counts for several queries that are not causal. Hugging Face's
            `sliding_window=W` is (W - 1, 0).
        alibi_slopes: ALiBi: slope * distance is subtracted from the scaled (and capped) scores, the
            distance in tokens from the newest. Slopes of query heads: float32, [num_q_heads] or
            [batch, num_q_heads], contiguous, on q's device. None, the default: without.
        cache_leftpad: Tokens of padding at the start of each sequence's cache, int32 [batch] on q's
            device, which the host never reads. They are counted in `cache_seqlens`, and not
            attended to; where there are more of them than tokens, nothing is. Negative counts as 0.
        causal: With several query tokens: whether each sees the keys up to its own and no more, the
            last query's being the newest of all (query i of T sees key j where j <= i + S - T, of S
            tokens in all). True by default; False: all see all. One token sees all either way.
        tree_mask: With several query tokens, which are drafts and the last of their sequence: which
            of them each sees, instead of `causal`; all that comes before them is seen by all. bool
            [batch, tokens, tokens], whether a row's token sees that of the column, or what
            `pack_tree_mask` makes of it once, uint32 [batch, tokens, ceil(tokens / 32)], contiguous
            (calls pack the former every time, in launches of their own). Distances and positions
            are those of the order in which drafts come. None, the default: without.
        rotary_cos: Rotary embedding of q and k, before the keys are cached: cosines by position,
            [positions, rotary_dim / 2] with a contiguous last dimension, of q's dtype or float32 on
            q's device. The first rotary_dim dims turn, a multiple of 16. New token i of a sequence
            has position cache_seqlens + i, and so has query i; all queries have that of the first
            where they are neither causal nor in a window. Sequences whose positions the tables do
            not have count like those whose length does not fit. None, the default: without.
        rotary_sin: Sines, as rotary_cos.
        rotary_seqlens: Positions of each sequence's first new token and first query, instead of
            cache_seqlens: int32 [batch] on q's device, which the host never reads. None, the
            default: without.
        rotary_interleaved: Whether neighbours turn together (GPT-J); False, the default: dim i and
            i + rotary_dim / 2 do (GPT-NeoX, Llama, Qwen, Gemma).
        q_norm_weight: RMS norm of q over each head, before it is rotated, in float32: what heads
            divided by the root of their mean square are multiplied by. [head_dim], float32, float16
            or bfloat16, contiguous, on q's device. None, the default: without.
        k_norm_weight: The same of k.
        norm_eps: What is added to mean squares; 1e-6 by default.
        norm_plus_one: Whether 1 is added to weights, as in Gemma; False by default.
        k_scale: Of caches of float8_e4m3fn or float8_e5m2: what stored keys are multiplied by, and
            what a new one is divided by before it is rounded to the nearest of them, or to the
            last. A positive number; or float32 on q's device, which the host never reads: [],
            [num_kv_heads] or [batch, num_kv_heads], with any strides. Zeros, negative numbers and
            NaN there are no error: zero stores the last numbers and NaN, and forgets every key;
            NaN makes the output NaN. Or one for every token and KV head, float32 [batch,
            max_seq_len, num_kv_heads], or [num_pages, page_size, num_kv_heads], as caches are
            without head_dim, contiguous but for the first dimension: appends compute those of new
            rows, the largest number over the type's largest, or 1 where all are 0, and write them;
            with v_scale of the same kind. None, the default: 1.
        v_scale: The same of values.
        out_dtype: torch.float32: the output as it was computed, before it is rounded, as a part to
            be merged with others by `merge_states`. None, the default, or q's dtype: that of q.
        out: Where to write; q's shape (with head_dim_v), and its dtype or `out_dtype`, sharing no
            memory with an input. None, the default: a new tensor.
    """

    softmax_scale: float | None
    num_splits: int
    ragged: bool
    max_seqlen: int | None
    batch_invariant: bool
    softcap: float
    sinks: Tensor | None
    window_size: tuple[int, int]
    alibi_slopes: Tensor | None
    cache_leftpad: Tensor | None
    causal: bool
    tree_mask: Tensor | None
    rotary_cos: Tensor | None
    rotary_sin: Tensor | None
    rotary_seqlens: Tensor | None
    rotary_interleaved: bool
    q_norm_weight: Tensor | None
    k_norm_weight: Tensor | None
    norm_eps: float
    norm_plus_one: bool
    k_scale: float | Tensor | None
    v_scale: float | Tensor | None
    out_dtype: torch.dtype | None
    out: Tensor | None


class CallOptions(Options, total=False):
    """What `gqa_decode`, `plan` and `explain` take besides.

    Args:
        cache_batch_idx: Which row of the caches each sequence has, int32 [batch] on q's device,
            which the host never reads; the caches may have any number of rows. Sequences that
            share one must not append to it: what it then holds is undefined. One that names no row
            counts like a length that does not fit: NaN, nothing is read or written, and a later
            call raises CacheOverflowError.
        block_table: Paged caches: which page holds which tokens of a sequence, int32
            [batch, max_pages] on q's device, which the host never reads, with any stride between
            rows. k_cache and v_cache are then pools [num_pages, page_size, num_kv_heads, head_dim]
            of any page_size and any strides, which may differ between K and V, with a contiguous
            last dimension. Token t of sequence b is token t % page_size of page
            block_table[b, t // page_size], and max_seq_len is max_pages * page_size. Entries behind
            a sequence's last page may be anything. With `cache_batch_idx`, rows of the table are
            those that it names. A page that the pools do not have, of a token that is read or
            appended, counts like a length that does not fit: NaN, nothing outside of the pools is
            read or written, and a later call raises CacheOverflowError. A page that sequences share
            must not be appended to. None, the default: caches without pages.
        page_table: Another name of `block_table`.
        cu_seqlens_q: Sequences with unlike numbers of query tokens: q is [tokens of all,
            num_q_heads, head_dim], and those of sequence b are from cu_seqlens_q[b] to
            cu_seqlens_q[b + 1], excluded: int32 [batch + 1] on q's device, which the host never
            reads. Where it is out of order, or has more tokens than q or max_seqlen_q, that
            sequence counts like one whose length does not fit, and its rows of the output are what
            they were. None, the default: as many tokens in each.
        cu_seqlens_k_new: The same of k and v, [tokens of all, num_kv_heads, head_dim].
        max_seqlen_q: With `cu_seqlens_q`, query tokens of a sequence at most, up to 256, by which
            the launch is sized. None, the default: all tokens of q may be of one.
        slot_mapping: Where k and v are written in paged caches, instead of where the table says:
            int64 [batch] on q's device ([batch, tokens] or [tokens of all], as k has them), which
            the host never reads; page * page_size + token of the page, or a negative number to
            write nothing. Attention is the same either way: the new tokens are those from
            cache_seqlens[b] on, and their places in the table are not looked at. A slot behind the
            end of the pools counts like a page that they do not have. With `block_table` and k
            only. None, the default: where the table says.
    """

    cache_batch_idx: Tensor | None
    block_table: Tensor | None
    page_table: Tensor | None
    slot_mapping: Tensor | None
    cu_seqlens_q: Tensor | None
    cu_seqlens_k_new: Tensor | None
    max_seqlen_q: int | None


class PlanOptions(CallOptions, total=False):
    """What `plan` takes besides.

    Args:
        kernel: A kernel to use instead of the dispatcher's choice; or a `dispatch.Choice`, a kernel
            with its launch.
        dependent: Programmatic dependent launch, where it pays (Hopper and newer, caches of up to
            32 MiB): the kernel may start while the kernel before it in the stream finishes. It
            reads nothing before that one is done, but may fetch its first tiles to L2. Worth
            having where that kernel lets others start early, as this one does; after one that does
            not, a call takes up to a microsecond longer. It is a kernel of its own, which is
            compiled on first use, or by name with `gqa-cutlass build`.
    """

    kernel: KernelConfig | Choice | None
    dependent: bool


_DEFAULTS: dict[str, Any] = {
    **{field.name: field.default for field in fields(Asked)},
    **dict.fromkeys((*TENSORS, *ALIASES, "out")),
}  # fmt: skip


def listed(options: Any, *, without: Collection[str] = ()) -> Callable[[_Function], _Function]:
    """Let `help` and `inspect.signature` say what the `**` at the end of a function stands for.

    Its line in the docstring gives way to those of the options that have none there.

    Args:
        options: `Options`, or a class with more of them.
        without: Those that the function does not take.
    """
    names = [name for name in options.__annotations__ if name not in without]
    texts = _explained(options)

    def decorate(function: _Function) -> _Function:
        signature = inspect.signature(function)
        TAKEN[function.__name__] = {*signature.parameters, *names}
        *named, last = signature.parameters.values()
        named += [
            Parameter(
                name,
                Parameter.KEYWORD_ONLY,
                default=_DEFAULTS[name],
                annotation=options.__annotations__[name].__forward_arg__,
            )
            for name in names
            if name not in signature.parameters
        ]
        function.__signature__ = signature.replace(parameters=named)  # type: ignore[attr-defined]
        doc = function.__doc__ or ""  # which Python may leave out
        missing = [name for name in names if not re.search(rf"^ +{name}: ", doc, re.MULTILINE)]
        text = "".join(texts[name] for name in missing)
        line = re.compile(rf"^( +)\*\*{last.name}: .*\n", re.MULTILINE)
        function.__doc__ = line.sub(lambda found: indent(text, found[1]), doc) or None
        return function

    return decorate


def _explained(options: Any) -> dict[str, str]:
    """What the docstrings of options say of each."""
    found: dict[str, str] = {}
    for kind in (Options, CallOptions, options):
        _, _, listing = inspect.cleandoc(kind.__doc__ or "").partition("Args:\n")
        for entry in re.split(r"^(?=\S)", dedent(listing), flags=re.MULTILINE):
            found[entry.partition(":")[0]] = entry.rstrip() + "\n"
    return found
