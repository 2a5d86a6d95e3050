"""The decode step as operators of torch, for programs that are compiled, exported or traced.

`torch.ops.gqa_cutlass.gqa_decode` appends a token and attends; its schema says that it writes to
the caches. `gqa_decode_scales_of_tokens` does with scales of tokens, which it also writes to: a
schema cannot say that an argument is written to at times. `gqa_attend` attends only and writes
nothing, so that a graph that only reads caches may share them. All return the output and the
log-sum-exp, which is empty unless asked for, and run the plans, kernels and checks of
`gqa_cutlass.gqa_decode`, which goes through them by itself in code that torch traces.
`merge_states` is the function of that name, for parts that are on a GPU. A program that loads an
exported graph needs `import gqa_cutlass.ops`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gqa_cutlass.api import gqa_decode, plan
from gqa_cutlass.call.asked import TENSORS
from gqa_cutlass.call.given import fail
from gqa_cutlass.call.stored import SCALES, of_tokens
from gqa_cutlass.errors import InputError
from gqa_cutlass.merge import merge_states
from gqa_cutlass.tracing import break_graph, is_traced, untraced

_LENGTHS = "Tensor? cache_seqlens, SymInt cache_len"  # on the device, or else one for all
_NUMBERS_OF_SCALES = {f"{name}_number": name for name in SCALES}  # which come as tensors, or so
_OPTIONS = {  # of the calls, in the order of the operators' arguments
    "softmax_scale": "float? softmax_scale=None",
    "num_splits": "int num_splits=0",
    "return_lse": "bool return_lse=False",
    "ragged": "bool ragged=True",
    "max_seqlen": "SymInt? max_seqlen=None",
    "batch_invariant": "bool batch_invariant=False",
    "softcap": "float softcap=0.0",
    "sinks": "Tensor? sinks=None",
    "window_size": "int[2] window_size=[-1, -1]",
    "alibi_slopes": "Tensor? alibi_slopes=None",
    "cache_leftpad": "Tensor? cache_leftpad=None",
    "cache_batch_idx": "Tensor? cache_batch_idx=None",
    "block_table": "Tensor? block_table=None",
    "slot_mapping": "Tensor? slot_mapping=None",
    "out_dtype": "ScalarType? out_dtype=None",
    "causal": "bool causal=True",
    "cu_seqlens_q": "Tensor? cu_seqlens_q=None",
    "cu_seqlens_k_new": "Tensor? cu_seqlens_k_new=None",
    "max_seqlen_q": "SymInt? max_seqlen_q=None",
    "tree_mask": "Tensor? tree_mask=None",
    "q_norm_weight": "Tensor? q_norm_weight=None",
    "k_norm_weight": "Tensor? k_norm_weight=None",
    "norm_eps": "float norm_eps=1e-6",
    "norm_plus_one": "bool norm_plus_one=False",
    "rotary_cos": "Tensor? rotary_cos=None",
    "rotary_sin": "Tensor? rotary_sin=None",
    "rotary_seqlens": "Tensor? rotary_seqlens=None",
    "rotary_interleaved": "bool rotary_interleaved=False",
    "k_scale": "Tensor? k_scale=None",
    "v_scale": "Tensor? v_scale=None",
    **{name: f"float? {name}=None" for name in _NUMBERS_OF_SCALES},
}
# Other types torch would complain of in its own words, or convert: 3 to (3, 3), 2 to True.
_NUMBER = int, float, torch.SymInt, torch.SymFloat
_TYPES: dict[str, tuple[type, ...]] = {
    "softmax_scale": (*_NUMBER, type(None)),
    "num_splits": (int, torch.SymInt),
    "return_lse": (bool,),
    "ragged": (bool,),
    "max_seqlen": (int, torch.SymInt, type(None)),
    "batch_invariant": (bool,),
    "softcap": _NUMBER,
    "window_size": (tuple, list),
    "out_dtype": (torch.dtype, type(None)),
    "causal": (bool,),
    "max_seqlen_q": (int, torch.SymInt, type(None)),
    "norm_eps": _NUMBER,
    "norm_plus_one": (bool,),
    "rotary_interleaved": (bool,),
    "cache_seqlens": (int, torch.SymInt, Tensor),
    **dict.fromkeys(TENSORS, (Tensor, type(None))),
    **dict.fromkeys(SCALES, (*_NUMBER, Tensor, type(None))),
}
_UNSCALED = {n: s for n, s in _OPTIONS.items() if n not in (*SCALES, *_NUMBERS_OF_SCALES)}
_SAID, _SAID_UNSCALED = (", ".join(options.values()) for options in (_OPTIONS, _UNSCALED))
_APPENDED_TO = "Tensor q, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor k, Tensor v"
_OF_TOKENS = "gqa_decode_scales_of_tokens"
_SCHEMAS = (
    f"gqa_decode({_APPENDED_TO}, {_LENGTHS}, {_SAID}) -> (Tensor, Tensor)",
    f"{_OF_TOKENS}({_APPENDED_TO}, Tensor(c!) k_scale, Tensor(d!) v_scale, {_LENGTHS}, "
    f"{_SAID_UNSCALED}) -> (Tensor, Tensor)",
    f"gqa_attend(Tensor q, Tensor k_cache, Tensor v_cache, {_LENGTHS}, {_SAID})"
    " -> (Tensor, Tensor)",
    "merge_states(Tensor[] outs, Tensor[] lses, ScalarType out_dtype) -> (Tensor, Tensor)",
)
# Inductor may change the strides of what it passes on, unless it is told not to.
_TAGS = torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides

_Pair = tuple[Tensor, Tensor]


def traced(
    tensors: tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None],
    cache_seqlens: int | Tensor,
    *,
    return_lse: bool = False,
    softcap: float = 0,
    **options: Any,
) -> Tensor | _Pair:
    """What `gqa_decode` is in code that torch traces: one operator, and a copy if there is an out.

    What no operator takes breaks the graph, so that the host says what is wrong with it. Whatever
    else is not allowed, the operator finds when it runs.
    """
    q, k_cache, v_cache, k, v, out = tensors
    given = [t for t in (q, k_cache, v_cache, k, v) if t is not None]
    found = [options[name] for name in SCALES if isinstance(options.get(name), Tensor)]
    scales = [scale for scale in found if of_tokens(scale.shape)]
    asked = {"return_lse": return_lse, "softcap": softcap, **options}
    wrong = _flaw_of_types((*given, out), {"cache_seqlens": cache_seqlens, **asked})
    if wrong is None:
        read = [*given, *(options[n] for n in TENSORS if isinstance(options.get(n), Tensor))]
        if torch.is_grad_enabled() and any(t.requires_grad for t in read):
            wrong = "a tensor requires grad, and decode has no backward pass; use torch.no_grad()"
        elif len(given) == 4:
            wrong = "k and v: one of them came without the other"
        elif len(given) == 5 and any(_repeats(t) for t in (k_cache, v_cache, *scales)):
            wrong = "caches or scales of tokens: elements to which tokens are appended share memory"
        elif len(given) == 5 and len(scales) == 1:
            wrong = "k_scale and v_scale: of tokens is one of them, and not the other"
        elif out is not None:
            wrong = _flaw_of_out(out, q, v_cache, options.get("out_dtype"))
    if wrong is not None:
        if not is_traced():  # but exported without Dynamo: no tensor is what it will be
            raise InputError(f"gqa_decode: {wrong}. Nothing was exported.")
        check: Any = break_graph(plan, f"gqa_decode: {wrong}")
        check(q, k_cache, v_cache, k, v, cache_seqlens=cache_seqlens, out=out, **asked)  # raises
    on_device = isinstance(cache_seqlens, Tensor)
    lengths = (cache_seqlens, 0) if on_device else (None, cache_seqlens)
    call = torch.ops.gqa_cutlass.gqa_decode
    if len(given) == 3:
        call = torch.ops.gqa_cutlass.gqa_attend
    elif scales:
        call = torch.ops.gqa_cutlass.gqa_decode_scales_of_tokens
        given += [options.pop(name) for name in SCALES]
    # A float that may vary makes torch start again; calls without a cap have the int 0, and pass
    # none on.
    if softcap:
        options["softcap"] = softcap
    for number, name in _NUMBERS_OF_SCALES.items():
        if name in options and not isinstance(options[name], Tensor):
            options[number] = options.pop(name)
    result, lse = call(*given, *lengths, return_lse=return_lse, **options)
    if out is not None:
        result = out.copy_(result)
    return (result, lse) if return_lse else result


def _flaw_of_types(tensors: tuple[object, ...], options: dict[str, Any]) -> str | None:
    """Which argument is of a type that the calls do not take, if one is."""
    if not all(t is None or isinstance(t, Tensor) for t in tensors):
        return "a list, a number or the like is where a tensor should be"
    for name, value in options.items():
        types = _TYPES[name]
        if not isinstance(value, types) or isinstance(value, bool) and types != (bool,):
            return f"{name}: it is of a type that is not allowed"
    window = options.get("window_size", (-1, -1))
    if len(window) != 2 or not all(type(end) is int for end in window):
        return "window_size: it is not two ints"
    return None


def _flaw_of_out(out: Tensor, q: Tensor, v_cache: Tensor, out_dtype: object) -> str | None:
    """Why a result must not be copied to a tensor, which would convert, repeat or lose it."""
    if out.dtype != (q.dtype if out_dtype is None else out_dtype):
        return "out: its dtype is neither q's nor out_dtype"
    if out.shape != (*q.shape[:-1], v_cache.shape[-1]):
        return "out: its shape is not that of the result"
    if out.device != q.device:
        return "out: it is not on q's device"
    if torch.is_grad_enabled() and out.requires_grad:
        return "out: it requires grad"
    if _repeats(out):
        return "out: its elements share memory"
    return None


def _repeats(tensor: Tensor) -> bool:
    """Whether a tensor was expanded, so that nothing can be written to it."""
    return any(n > 1 and not s for n, s in zip(tensor.shape, tensor.stride(), strict=True))


def _decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    cache_seqlens: Tensor | None,
    cache_len: int,
    *options: Any,
    **named: Any,
) -> _Pair:
    """Run on tensors with memory, wherever they are: the ordinary call."""
    result: Tensor | _Pair = gqa_decode(
        q, k_cache, v_cache, k, v,
        cache_seqlens=cache_len if cache_seqlens is None else cache_seqlens,
        **_by_name(options, named),
    )  # fmt: skip
    return result if isinstance(result, tuple) else (result, q.new_empty((0,), dtype=torch.float32))


def _attend(q: Tensor, k_cache: Tensor, v_cache: Tensor, *rest: Any, **named: Any) -> _Pair:
    """As `_decode`, appending nothing."""
    return _decode(q, k_cache, v_cache, None, None, *rest, **named)


def _decode_scales_of_tokens(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    cache_seqlens: Tensor | None,
    cache_len: int,
    *options: Any,
    **named: Any,
) -> _Pair:
    """As `_decode`, with scales that are written to."""
    named |= dict(zip(_UNSCALED, options, strict=False))
    given = q, k_cache, v_cache, k, v, cache_seqlens, cache_len
    return _decode(*given, k_scale=k_scale, v_scale=v_scale, **named)


def _shapes_of_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    cache_seqlens: Tensor | None,
    cache_len: int,
    *options: Any,
    **named: Any,
) -> _Pair:
    """Results without their values, for tracing.

    Raises:
        InputError: Scales are of tokens: no graph would know that they are written to.
    """
    given = _by_name(options, named)
    for name in SCALES:
        if isinstance(scale := given.get(name), Tensor) and of_tokens(scale.shape):
            fail(name, "scales of tokens", f"others; or the operator {_OF_TOKENS}")
    return _shapes(q, v_cache, given)


def _shapes_of_decode_scales_of_tokens(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    cache_seqlens: Tensor | None,
    cache_len: int,
    *options: Any,
    **named: Any,
) -> _Pair:
    return _shapes(q, v_cache, dict(zip(_UNSCALED, options, strict=False)) | named)


def _shapes_of_attend(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor | None,
    cache_len: int,
    *options: Any,
    **named: Any,
) -> _Pair:
    return _shapes(q, v_cache, _by_name(options, named))


def _shapes(q: Tensor, v_cache: Tensor, given: dict[str, Any]) -> _Pair:
    """Results of a call with these options, without their values."""
    _check_without_values(q)
    out = q.new_empty((*q.shape[:-1], v_cache.shape[-1]), dtype=given.get("out_dtype"))
    return out, q.new_empty(_lse_shape(q, given), dtype=torch.float32)


def _merge(outs: list[Tensor], lses: list[Tensor], out_dtype: torch.dtype) -> _Pair:
    """Run on tensors with memory, wherever they are: the ordinary call."""
    return merge_states(outs, lses, out_dtype=out_dtype)


def _shapes_of_merge(outs: list[Tensor], lses: list[Tensor], out_dtype: torch.dtype) -> _Pair:
    """Results without their values, for tracing."""
    out, lse = outs[0], lses[0]
    _check_without_values(out)
    return out.new_empty(out.shape, dtype=out_dtype), lse.new_empty(lse.shape)


def _check_without_values(first: Tensor) -> None:
    """Raise InputError where torch takes a call for one without values, and it has some."""
    if type(first) is Tensor and not first.is_meta:
        fail("tensors", f"some on meta and some on {first.device}", "all on one device")


def _by_name(options: tuple[Any, ...], named: dict[str, Any]) -> dict[str, Any]:
    """Options that came by position, and the others."""
    given = dict(zip(_OPTIONS, options, strict=False)) | named
    for number, name in _NUMBERS_OF_SCALES.items():
        if (value := given.pop(number, None)) is not None:
            given[name] = value
    return given


def _lse_shape(q: Tensor, given: dict[str, Any]) -> tuple[int, ...]:
    """Sizes of the log-sum-exp; none without."""
    if not given.get("return_lse", False):
        return (0,)
    batch, *tokens, heads, _ = q.shape
    if given.get("cu_seqlens_q") is not None:
        return heads, batch
    return (batch, heads) if not tokens or tokens[0] == 1 else (batch, heads, tokens[0])


LIBRARY = torch.library.Library("gqa_cutlass", "DEF")  # the operators live as long as this does
for _schema in _SCHEMAS:
    LIBRARY.define(_schema, tags=_TAGS)
for _name, _kernel, _fake in (
    ("gqa_decode", _decode, _shapes_of_decode),
    (_OF_TOKENS, _decode_scales_of_tokens, _shapes_of_decode_scales_of_tokens),
    ("gqa_attend", _attend, _shapes_of_attend),
    ("merge_states", _merge, _shapes_of_merge),
):
    for _where in ("CPU", "CUDA"):  # untraced, or such a call would become the operator again
        LIBRARY.impl(_name, untraced(_kernel), _where)
    torch.library.register_fake(f"gqa_cutlass::{_name}", _fake, lib=LIBRARY)
