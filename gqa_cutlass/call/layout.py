"""Turns the tensors of a call into a validated problem. Everything here happens before a launch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from gqa_cutlass.codegen.config import HEAD_DIM_RULE, HEAD_DIMS, MAX_GROUP_SIZE
from gqa_cutlass.codegen.schema.kinds import DType
from gqa_cutlass.codegen.schema.problem import (
    MAX_BATCH,
    MAX_HEADS,
    MAX_SCALE,
    MAX_SEQ_LEN,
    MAX_SPLITS,
    VECTOR_WIDTHS,
    Problem,
)
from gqa_cutlass.errors import CacheOverflowError, InputError, shown
from gqa_cutlass.tensors import byte_reach, flaw, is_tensor, memory_flaw

DTYPES = {torch.float16: DType.F16, torch.bfloat16: DType.BF16}
ARGUMENTS = ("q", "k_cache", "v_cache", "k", "v", "out")
_OPTIONAL = ("k", "v", "out")
_ELEMENT_BYTES, _INT_BYTES = 2, 4


@dataclass(frozen=True, kw_only=True)
class Tensors:
    """The tensors of one call, query-like ones as [batch, heads, head_dim].

    Args:
        q: [batch, num_q_heads, head_dim].
        k_cache: [batch, max_seq_len, num_kv_heads, head_dim].
        v_cache: As k_cache.
        k: [batch, num_kv_heads, head_dim], or None when nothing is appended.
        v: As k.
        out: As q, or None when it is to be allocated.
    """

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    k: Tensor | None
    v: Tensor | None
    out: Tensor | None

    def present(self) -> dict[str, Tensor]:
        """The tensors that were given, by name."""
        return {name: t for name, t in vars(self).items() if t is not None}


def check_kinds(arguments: Sequence[object], cache_seqlens: object = 0) -> None:
    """Raise InputError unless all arguments are plain, dense tensors, or absent where they may be.

    Args:
        arguments: As in `ARGUMENTS`.
        cache_seqlens: The lengths; an int will do.
    """
    k, v = arguments[3:5]
    if (k is None) != (v is None):
        missing = "v" if v is None else "k"
        _fail("k and v", f"no {missing}", "both (append the token) or neither (attend only)")
    for name, value in zip(ARGUMENTS, arguments, strict=True):
        optional = name in _OPTIONAL
        if not (optional and value is None) and (found := flaw(value)):
            _fail(name, found.got, found.allowed + optional * " or None")
    if type(cache_seqlens) is int:
        return
    if not is_tensor(cache_seqlens):
        _fail("cache_seqlens", f"a {type(cache_seqlens).__name__}", "an int or an int32 tensor")
    if found := flaw(cache_seqlens):
        _fail("cache_seqlens", *found)


def gather(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    out: Tensor | None,
) -> Tensors:
    """Check kinds and ranks, and drop the single-token dimension of 4-D queries.

    Raises:
        InputError: An argument is no plain tensor or has the wrong rank, or k comes without v.
    """
    check_kinds((q, k_cache, v_cache, k, v, out))
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if cache.dim() != 4:
            _fail(name, _shape(cache), "[batch, max_seq_len, num_kv_heads, head_dim]")
    return Tensors(
        q=_single_token("q", q),
        k_cache=k_cache,
        v_cache=v_cache,
        k=None if k is None else _single_token("k", k),
        v=None if v is None else _single_token("v", v),
        out=None if out is None else _single_token("out", out),
    )


def validate(tensors: Tensors) -> Problem:
    """Check shapes, types, devices, strides and overlaps, and name the problem.

    Raises:
        InputError: A rule is broken; the message says which, what was given and what to do.
    """
    _check_placement(tensors)
    problem = _check_shapes(tensors)
    _check_layouts(tensors)
    return problem


def check_lengths(problem: Problem, cache_seqlens: int | Tensor, device: torch.device) -> None:
    """Check lengths of the right kind: an int wholly, of a tensor everything but the values.

    Raises:
        CacheOverflowError: The new token does not fit.
        InputError: Negative, or of the wrong dtype, shape or device.
    """
    if isinstance(cache_seqlens, Tensor):
        ok = (
            cache_seqlens.dtype == torch.int32
            and tuple(cache_seqlens.shape) == (problem.batch_size,)
            and cache_seqlens.device == device
            and cache_seqlens.is_contiguous()
        )
        if not ok:
            _fail(
                "cache_seqlens",
                f"{cache_seqlens.dtype} {_shape(cache_seqlens)} on {cache_seqlens.device}",
                f"an int, or contiguous torch.int32 [{problem.batch_size}] on {device}",
            )
        return
    if cache_seqlens < 0:
        allowed = f"0 to {problem.max_seq_len - problem.append}"
        _fail("cache_seqlens", shown(cache_seqlens), allowed)
    if cache_seqlens > problem.max_seq_len - problem.append:
        raise CacheOverflowError(
            f"gqa_decode: cache overflow: the cache holds {shown(cache_seqlens)} tokens"
            f"{' and one is to be appended' * problem.append}; max_seq_len is "
            f"{problem.max_seq_len}. Nothing was written. Evict tokens, or allocate a larger cache."
        )


def check_options(num_splits: int = 0, softmax_scale: float | None = None, **flags: bool) -> None:
    """Raise InputError for an option that is not allowed.

    Args:
        num_splits: 0 (choose) to MAX_SPLITS.
        softmax_scale: A number that float32 can hold, or None for head_dim ** -0.5.
        flags: True or False, by name.
    """
    if type(num_splits) is not int or not 0 <= num_splits <= MAX_SPLITS:
        _fail("num_splits", shown(num_splits), f"0 (the dispatcher decides) to {MAX_SPLITS}")
    if softmax_scale is not None:
        number = isinstance(softmax_scale, (int, float)) and not isinstance(softmax_scale, bool)
        # Compared before it is converted: an int may be too large for a float.
        if not number or not -MAX_SCALE <= softmax_scale <= MAX_SCALE:
            allowed = f"a number from {-MAX_SCALE:g} to {MAX_SCALE:g}, or None for head_dim ** -0.5"
            _fail("softmax_scale", shown(softmax_scale), allowed)
    for name, value in flags.items():
        if type(value) is not bool:
            _fail(name, shown(value), "True or False")


def check_mode() -> None:
    """Raise InputError while torch makes tensors that no kernel can work on."""
    made = torch.empty(1, device="cpu")
    if found := flaw(made) or memory_flaw(made):
        _fail(
            "torch's mode",
            f"one in which a new tensor is {found.got}",
            "calls outside of FakeTensorMode and of the transforms of torch.func",
        )


def check_memory(tensors: Tensors, cache_seqlens: int | Tensor) -> None:
    """Raise InputError for a tensor whose memory is not all there, or misaligned lengths.

    A storage that is shrunk later, under a tensor that was checked, gets memory elsewhere: then the
    address is new, and the tensor is checked again. Not seen is one that comes back to an address
    where it was seen whole, after it was resized twice.
    """
    given = tensors.present() | {"cache_seqlens": cache_seqlens}
    for name, tensor in given.items():
        if isinstance(tensor, Tensor) and (found := memory_flaw(tensor)):
            _fail(name, *found)
    if isinstance(cache_seqlens, Tensor) and cache_seqlens.data_ptr() % _INT_BYTES:
        address = f"address {cache_seqlens.data_ptr():#x}"
        _fail("cache_seqlens", address, "an address that is a multiple of 4")


def check_aliases(tensors: Tensors, cache_seqlens: int | Tensor) -> bool:
    """Raise InputError when what is written shares memory with what it must not.

    Returns:
        Whether that is so for every length: not when a row of a cache is read that is another one
        than the row which is written, and will be that one at another length.
    """
    read = tensors.present() | {"cache_seqlens": cache_seqlens}
    if tensors.out is not None:
        for name, other in read.items():
            if name != "out" and isinstance(other, Tensor) and _overlap(tensors.out, other):
                _fail("out", f"memory that {name} also uses", "memory of its own; pass out=None")
    if tensors.k is None:
        return True
    if _overlap(tensors.k_cache, tensors.v_cache):
        _fail("v_cache", "memory that k_cache also uses", "two caches that do not share memory")
    return not any(
        [
            _reads_what_is_written(name, other, tensors, cache_seqlens)
            for name, other in read.items()
            if name in ("q", "k", "v", "cache_seqlens") and isinstance(other, Tensor)
        ]
    )


def _reads_what_is_written(
    name: str, read: Tensor, tensors: Tensors, cache_seqlens: int | Tensor
) -> bool:
    """Whether a tensor lies in a cache that a token is appended to; raises if in the very row."""
    inside = False
    for cache_name, cache in (("k_cache", tensors.k_cache), ("v_cache", tensors.v_cache)):
        if _overlap(cache, read):
            inside = True
            if isinstance(cache_seqlens, Tensor) or _overlap(cache[:, cache_seqlens], read):
                _fail(
                    name,
                    f"memory of {cache_name}, to which this call writes the new token",
                    f"memory of its own; pass {name}.clone()",
                )
    return inside


def _single_token(name: str, tensor: Tensor) -> Tensor:
    if tensor.dim() == 4 and tensor.shape[1] == 1:
        return tensor.squeeze(1)
    if tensor.dim() != 3:
        _fail(name, _shape(tensor), "[batch, heads, head_dim] or [batch, 1, heads, head_dim]")
    return tensor


def _check_placement(tensors: Tensors) -> None:
    q = tensors.q
    if q.dtype not in DTYPES:
        _fail("q", str(q.dtype), "torch.float16 or torch.bfloat16; convert with .to(...)")
    for name, tensor in tensors.present().items():
        if tensor.dtype != q.dtype:
            _fail(name, str(tensor.dtype), f"q's dtype, {q.dtype}")
        if tensor.device != q.device:
            _fail(name, f"a tensor on {tensor.device}", f"q's device, {q.device}")
        if tensor.requires_grad and torch.is_grad_enabled():
            _fail(
                name,
                "a tensor that requires grad (decode has no backward pass)",
                "tensors without grad; call it under torch.inference_mode() or torch.no_grad()",
            )


def check_sizes(
    batch: int, num_q_heads: int, num_kv_heads: int, head_dim: int, max_seq_len: int
) -> None:
    """Raise InputError for sizes that no kernel takes."""
    if not 1 <= batch <= MAX_BATCH:
        _fail("batch size", shown(batch), f"1 to {MAX_BATCH}")
    if head_dim not in HEAD_DIMS:
        allowed = f"{HEAD_DIM_RULE}; pad q, k, v and the cache with zeros"
        _fail("head_dim", shown(head_dim), allowed)
    if not 1 <= max_seq_len <= MAX_SEQ_LEN:
        _fail("max_seq_len", shown(max_seq_len), f"1 to {MAX_SEQ_LEN}")
    if num_kv_heads < 1 or num_q_heads < 1 or num_q_heads % num_kv_heads:
        _fail(
            "head counts",
            f"{shown(num_q_heads)} query heads and {shown(num_kv_heads)} KV heads",
            "a number of query heads that is a multiple of the number of KV heads",
        )
    if num_q_heads // num_kv_heads > MAX_GROUP_SIZE:
        _fail("group size", shown(num_q_heads // num_kv_heads), f"1 to {MAX_GROUP_SIZE}")
    if num_q_heads > MAX_HEADS:
        _fail("number of query heads", shown(num_q_heads), f"1 to {MAX_HEADS}")


def _check_shapes(tensors: Tensors) -> Problem:
    batch, num_q_heads, head_dim = tensors.q.shape
    _, max_seq_len, num_kv_heads, _ = tensors.k_cache.shape
    check_sizes(batch, num_q_heads, num_kv_heads, head_dim, max_seq_len)
    cache_shape = (batch, max_seq_len, num_kv_heads, head_dim)
    token_shape = (batch, num_kv_heads, head_dim)
    query_shape = (batch, num_q_heads, head_dim)
    expected = dict(q=query_shape, out=query_shape, k_cache=cache_shape, v_cache=cache_shape,
                    k=token_shape, v=token_shape)  # fmt: skip
    for name, tensor in tensors.present().items():
        if tuple(tensor.shape) != expected[name]:
            _fail(name, _shape(tensor), f"{list(expected[name])}, from the shapes of q and k_cache")
    return Problem(
        batch_size=batch,
        num_q_heads=num_q_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_seq_len=max_seq_len,
        dtype=DTYPES[tensors.q.dtype],
        vec_width=min(vector_width(tensor) for tensor in tensors.present().values()),
        append=tensors.k is not None,
    )


def _check_layouts(tensors: Tensors) -> None:
    for name, tensor in tensors.present().items():
        if tensor.device.type != "meta" and tensor.data_ptr() % _ELEMENT_BYTES:
            _fail(name, f"address {tensor.data_ptr():#x}", "an address that is a multiple of 2")
        if tensor.stride(-1) != 1:
            _fail(
                name,
                f"strides {list(tensor.stride())}",
                "a contiguous last dimension (stride 1); call .contiguous()",
            )
    written = {"out": tensors.out}
    if tensors.k is not None:
        written |= {"k_cache": tensors.k_cache, "v_cache": tensors.v_cache}
    for name, target in written.items():
        if target is not None and _overlaps_itself(target):
            _fail(name, f"strides {list(target.stride())}", "elements that do not share memory")


def vector_width(tensor: Tensor) -> int:
    """Widest access in elements (8, 4, 2 or 1) to which every row of a tensor is aligned."""
    bits = tensor.data_ptr() // _ELEMENT_BYTES if tensor.device.type != "meta" else 0
    for size, stride in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True):
        bits |= stride if size > 1 else 0
    return next(width for width in VECTOR_WIDTHS if bits % width == 0)


def _overlaps_itself(tensor: Tensor) -> bool:
    """Whether two elements share an address, for layouts where one dimension nests in the next."""
    reach = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride < reach:
                return True
            reach = stride * (size - 1) + reach
    return False


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors may share an address.

    Tensors that interleave are told apart by a common pitch: if each lies, modulo some stride, in
    an interval of its own, they do not touch (slices of a fused projection, K and V in one buffer).
    """
    if "meta" in (a.device.type, b.device.type):
        return False
    a_start, b_start = a.data_ptr(), b.data_ptr()
    if a_start + byte_reach(a) <= b_start or b_start + byte_reach(b) <= a_start:
        return False
    for pitch in {s * a.element_size() for s, n in zip(a.stride(), a.shape, strict=True) if n > 1}:
        if pitch:
            offset = (b_start - a_start) % pitch
            a_reach, b_reach = _reach_within(a, pitch), _reach_within(b, pitch)
            if a_reach and b_reach and a_reach <= offset and offset + b_reach <= pitch:
                return False
    return True


def _reach_within(tensor: Tensor, pitch: int) -> int:
    """Length of the interval of bytes, modulo pitch, that holds all elements; 0 for none."""
    reach = tensor.element_size()
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        step = stride * tensor.element_size()
        if size > 1 and step % pitch:
            reach += (size - 1) * step if step < pitch else pitch
    return reach if reach <= pitch else 0


def _shape(tensor: Tensor) -> str:
    return f"shape {list(tensor.shape)}"


def _fail(what: str, got: str, allowed: str) -> NoReturn:
    raise InputError(f"gqa_decode: {what}: got {got}; allowed: {allowed}. Nothing was launched.")
