"""The options that public calls have in common. Features are those with kernels of their own."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields, replace
from inspect import Parameter
from textwrap import dedent, indent
from typing import Any, TypedDict, TypeVar

import torch
from torch import Tensor

from gqa_cutlass.call.given import PAGES, Given, Layout, Seen, Tokens, fail
from gqa_cutlass.call.layout import NUMBER_TYPES
from gqa_cutlass.call.stored import SCALES, is_number, scale_fields
from gqa_cutlass.call.tokens import SEVERAL, TREE, stride_fields
from gqa_cutlass.call.turning import turning_fields
from gqa_cutlass.codegen.config import KernelConfig
from gqa_cutlass.codegen.schema.policies import CALL, FP8, POLICIES, Policy, special
from gqa_cutlass.codegen.schema.problem import (
    MAX_SCALE,
    MAX_SEQ_LEN,
    MAX_SOFTCAP,
    MAX_SPLITS,
    MAX_TOKENS,
)
from gqa_cutlass.codegen.schema.rounding import reciprocal
from gqa_cutlass.dispatch.choice import Choice
from gqa_cutlass.errors import InputError, shown

NO_WINDOW = -1, -1
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
            not in compiled code, and with v_scale of the same kind. None, the default: 1.
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


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The options of a call that are no tensors, by their defaults; see `Options`."""

    softmax_scale: float | None = None
    num_splits: int = 0
    return_lse: bool = False
    ragged: bool = True
    max_seqlen: int | None = None
    batch_invariant: bool = False
    softcap: float = 0  # an int, for torch traces a float as one that may vary
    window_size: tuple[int, int] = NO_WINDOW
    causal: bool = True
    rotary_interleaved: bool = False
    norm_eps: float = 1e-6
    norm_plus_one: bool = False
    max_seqlen_q: int | None = None
    k_scale: float | None = None
    v_scale: float | None = None
    out_dtype: torch.dtype | None = None
    kernel: KernelConfig | Choice | None = None
    dependent: bool = False


# Options that are tensors, in the order of the table: those of features.
TENSORS = tuple(row.name for row in CALL.rows if row.feature)
ALIASES = {"page_table": "block_table"}  # other names that options have elsewhere
_NONES = (None,) * len(TENSORS)
_taken: dict[str, set[str]] = {}  # names of options, by functions
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
        _taken[function.__name__] = {*signature.parameters, *names}
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


def features_of(options: dict[str, Any]) -> tuple[Tensor | None, ...]:
    """Take the tensors of features out of options.

    Returns:
        Them in the order of the table; nothing if there are none.
    """
    numbers = {name: options.pop(name) for name in SCALES if is_number(options.get(name))}
    tensors = tuple(map(options.pop, TENSORS, _NONES))
    options |= numbers
    for tensor in tensors:
        if tensor is not None:
            return tensors
    return ()


def rename(options: dict[str, Any]) -> None:
    """Give options that came by other names those that they have here.

    Raises:
        InputError: One came by both.
    """
    for alias, name in ALIASES.items():
        if alias in options:
            value = options.pop(alias)
            if value is not None and options.get(name) is not None:
                fail(f"{name} and {alias}", "both", "one of them: they are the same")
            if value is not None:
                options[name] = value


def rounded(longest: Any) -> Any:
    """`max_seqlen` as it counts: the next power of two; what is no size stays as it is."""
    return 1 << (longest - 1).bit_length() if type(longest) is int and longest > 0 else longest


def check(call: str, options: Mapping[str, Any], given: Given) -> tuple[Asked, tuple[Policy, ...]]:
    """Check options, whatever the tensors are.

    Args:
        call: The name of the function that was called.
        options: Those that are no tensors.
        given: The tensors, of which it counts whether they are there.

    Returns:
        All that are no tensors; and what the kernel must have in its slots: the features that were
        asked for, by value or by tensor.

    Raises:
        InputError: An option is not allowed.
        TypeError: There is no such option.
    """
    for name in options:
        if name not in _taken[call]:
            raise TypeError(f"{call}() got an unexpected keyword argument {name!r}")
    asked = Asked(**options)
    if asked.window_size is not NO_WINDOW:
        asked = replace(
            asked, window_size=check_window(asked.window_size, asked.causal is not False)
        )
    check_options(
        asked.num_splits, asked.softmax_scale, return_lse=asked.return_lse, ragged=asked.ragged,
        batch_invariant=asked.batch_invariant,
        dependent=asked.dependent, causal=asked.causal,
        rotary_interleaved=asked.rotary_interleaved, norm_plus_one=asked.norm_plus_one,
    )  # fmt: skip
    if not _is_number(asked.norm_eps) or not 0 <= asked.norm_eps <= MAX_SCALE:
        fail("norm_eps", shown(asked.norm_eps), f"a number from 0 to {MAX_SCALE:g}")
    if asked.max_seqlen is not None:
        longest = rounded(asked.max_seqlen)
        if type(longest) is not int or longest < 1:
            fail("max_seqlen", shown(longest), "an int, 1 and more, or None")
        asked = replace(asked, max_seqlen=min(longest, MAX_SEQ_LEN))
    most = asked.max_seqlen_q
    if most is not None and (type(most) is not int or not 1 <= most < 2**31):
        fail("max_seqlen_q", shown(most), f"an int, 1 to {MAX_TOKENS}, or None")
    if asked.kernel is not None and not isinstance(asked.kernel, KernelConfig | Choice):
        raise InputError(
            f"plan: kernel: got {shown(asked.kernel)}; allowed: a KernelConfig (another plan's "
            "`dispatch.config`, for instance), a Choice, or None. Nothing was launched."
        )
    if asked.out_dtype is not None and not isinstance(asked.out_dtype, torch.dtype):
        fail("out_dtype", shown(asked.out_dtype), "None, q's dtype, or torch.float32")
    wanted = [row.feature for row, t in zip(CALL.rows, given, strict=False) if t is not None]
    if check_softcap(asked.softcap, 0):
        wanted.append("softcap")
    if asked.window_size[0] >= 0:
        wanted.append("window_size")
    if asked.out_dtype is torch.float32:
        wanted.append("out_dtype")
    if "tree_mask" in wanted:  # which goes with no tokens of its own
        wanted = [feature for feature in wanted if feature != SEVERAL.feature]
    # What caches hold, their type says.
    features = [p for p in POLICIES if p.feature in wanted and p not in FP8]
    return asked, special(tuple(features))


def check_options(num_splits: int = 0, softmax_scale: float | None = None, **flags: bool) -> None:
    """Raise InputError for an option that is not allowed.

    Args:
        num_splits: 0 (choose) to MAX_SPLITS.
        softmax_scale: A number that float32 can hold, or None for head_dim ** -0.5.
        flags: True or False, by name.
    """
    if type(num_splits) is not int or not 0 <= num_splits <= MAX_SPLITS:
        fail("num_splits", shown(num_splits), f"0 (the dispatcher decides) to {MAX_SPLITS}")
    if softmax_scale is not None:
        # Compared before it is converted: an int may be too large for a float.
        if not _is_number(softmax_scale) or not -MAX_SCALE <= softmax_scale <= MAX_SCALE:
            allowed = f"a number from {-MAX_SCALE:g} to {MAX_SCALE:g}, or None for head_dim ** -0.5"
            fail("softmax_scale", shown(softmax_scale), allowed)
    for name, value in flags.items():
        if type(value) is not bool:
            fail(name, shown(value), "True or False")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_softcap(softcap: float, softmax_scale: float) -> float:
    """A bound of the scores.

    Raises:
        InputError: No number, negative, not finite, or too small for the scale.
    """
    if not _is_number(softcap) or not 0 <= softcap <= MAX_SOFTCAP:
        fail("softcap", shown(softcap), f"0 (none), or a number up to {MAX_SOFTCAP:g}")
    cap = float(softcap)
    least = abs(softmax_scale) / MAX_SOFTCAP
    if cap and (cap < least or not cap >= torch.finfo(torch.float32).tiny):
        least = max(least, torch.finfo(torch.float32).tiny)
        fail("softcap", shown(softcap), f"0 (none), or {least:.3g} and more with this scale")
    return cap


def check_window(window_size: object, causal: bool = True) -> tuple[int, int]:
    """A sliding window. Where nothing is seen to the right of a query, that side is -1.

    Raises:
        InputError: Not two ints, or one below -1.
    """
    allowed = "two ints, (left, right), each -1 (no end) or more"
    if not isinstance(window_size, (tuple, list)) or len(window_size) != 2:
        fail("window_size", shown(window_size), allowed)
    left, right = window_size
    if type(left) is not int or type(right) is not int or min(left, right) < -1:
        fail("window_size", shown(window_size), allowed)
    return (left, -1 if causal else right)


def fields_of(
    asked: Asked, layout: Layout, scale: float, policies: tuple[Policy, ...], tokens: Tokens
) -> dict[str, float]:
    """What features put into the kernel's argument, but addresses, by the names of its fields.

    Args:
        asked: The options.
        layout: The tensors.
        scale: Factor on the scores.
        policies: The kernel's.
        tokens: Of the sequences.

    Raises:
        InputError: An option is not allowed with these tensors.
    """
    found = scale_fields(asked, layout)
    if not policies:
        return found
    if cap := check_softcap(asked.softcap, scale):
        found["softcap_in"] = scale / cap
        found["softcap_out"] = cap * math.log2(math.e)
    found["window_left"] = min(asked.window_size[0], MAX_SEQ_LEN)
    if slopes := layout.get("alibi_slopes"):
        found["alibi_batch_stride"] = slopes.shape[-1] if len(slopes.shape) == 2 else 0
    if tokens.several or TREE in layout:
        found |= stride_fields(tokens, layout, layout["q"].shape[-2])
        right = asked.window_size[1]
        found["window_right"] = 0 if asked.causal else MAX_SEQ_LEN if right < 0 else right
    found |= turning_fields(layout, asked)
    found["cache_rows"] = layout.get(PAGES, layout["k_cache"]).shape[0]
    if table := layout.get(PAGES):
        found |= _pages(table, layout["k_cache"])
    for row in CALL.rows:
        if row.type_field and row.name in layout:
            found[row.type_field] = NUMBER_TYPES[layout[row.name].dtype]
    return found


def _pages(table: Seen, pool: Seen) -> dict[str, float]:
    """What the kernel must know of pages; `page_of` in cache_paged.cuh divides by their size."""
    num_pages, page_size = pool.shape[:2]
    magic, shift = reciprocal(page_size)
    return {
        "num_pages": num_pages,
        "block_table_stride": table.strides[0],
        "page_size": page_size,
        "page_magic": magic,
        "page_shift": shift,
    }
