"""`gqa_attention_decode`: a step whose sizes stand in a configuration."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from gqa_cutlass.api import gqa_decode
from gqa_cutlass.call.asked import check_options
from gqa_cutlass.call.layout import check_sizes
from gqa_cutlass.errors import InputError, shown
from gqa_cutlass.tensors import Flaw, flaw
from gqa_cutlass.tracing import is_traced

_DEFAULT_STREAMS, _PER_THREAD_STREAM = (0, 1), 2  # names of streams, not their addresses
_MAX_HANDLE = 2**64


@dataclass(frozen=True, kw_only=True)
class GQADecodeConfig:
    """Sizes of one decode step: its batch and heads, the tokens cached, the cache's capacity.

    Args:
        batch_size: Sequences.
        cache_len: Tokens in every sequence's cache before the call, 0 to max_seq_len - 1.
        num_q_heads: Query heads.
        num_kv_heads: KV heads; divides num_q_heads.
        head_dim: Dimension per head; a multiple of 8 from 32 to 256.
        scale: Factor on the scores, usually head_dim ** -0.5.
        max_seq_len: Tokens that the cache can hold per sequence.
    """

    batch_size: int
    cache_len: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    max_seq_len: int


def gqa_attention_decode(
    output: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_cache_k: Tensor,
    kv_cache_v: Tensor,
    config: GQADecodeConfig,
    stream: torch.cuda.Stream | int | None = None,
) -> None:
    """Run one decode step whose sizes a `GQADecodeConfig` says; same kernels as `gqa_decode`.

    Args:
        output: Written; [batch, 1, num_q_heads * head_dim].
        q: [batch, 1, num_q_heads, head_dim].
        k: The new token's keys, [batch, 1, num_kv_heads, head_dim].
        v: As k.
        kv_cache_k: [batch, max_seq_len, num_kv_heads, head_dim]; written at position cache_len. Of
            8 bits it counts with a scale of 1: `gqa_decode` takes others.
        kv_cache_v: As kv_cache_k.
        config: Sizes, which must agree with the tensors, the cache's length and the scale.
        stream: A torch stream, a stream's handle, or None for the current stream. The handles 0
            (the null stream) and 1 (cudaStreamLegacy) mean the default stream, as torch calls it;
            2 (cudaStreamPerThread) is refused: one handle for many streams. With tensors on the
            CPU there is only the default stream.

    Raises:
        InputError: A tensor's shape differs from what the configuration says.
        GqaError: As for `gqa_decode`.
    """
    check_config("gqa_attention_decode: config", config)
    c = config
    query = (c.batch_size, 1, c.num_q_heads, c.head_dim)
    token = (c.batch_size, 1, c.num_kv_heads, c.head_dim)
    cache = (c.batch_size, c.max_seq_len, c.num_kv_heads, c.head_dim)
    flat = (c.batch_size, 1, c.num_q_heads * c.head_dim)
    for name, tensor, shape in (
        ("output", output, flat), ("q", q, query), ("k", k, token), ("v", v, token),
        ("kv_cache_k", kv_cache_k, cache), ("kv_cache_v", kv_cache_v, cache),
    ):  # fmt: skip
        found = None if is_traced() else flaw(tensor)  # the operator sees what tracing stands for
        if found is None and tuple(tensor.shape) != shape:
            found = Flaw(f"shape {list(tensor.shape)}", f"{list(shape)}, from the configuration")
        if found:
            raise InputError(
                f"gqa_attention_decode: {name}: got {found.got}; allowed: {found.allowed}. Nothing "
                "was launched."
            )
    with _on_stream(stream, q.device):
        gqa_decode(
            q, kv_cache_k, kv_cache_v, k, v,
            cache_seqlens=c.cache_len, softmax_scale=c.scale,
            out=output.unflatten(-1, (c.num_q_heads, c.head_dim)),
        )  # fmt: skip


def check_config(what: str, config: GQADecodeConfig, allowed: str = "a GQADecodeConfig") -> None:
    """Raise InputError unless a configuration's sizes are such that a kernel can have them."""
    if not isinstance(config, GQADecodeConfig):
        raise InputError(f"{what}: got {shown(config)}; allowed: {allowed}. Nothing was launched.")
    for name in ("batch_size", "cache_len", "num_q_heads", "num_kv_heads", "head_dim",
                 "max_seq_len"):  # fmt: skip
        value = getattr(config, name)
        if type(value) is not int:
            raise InputError(
                f"{what}: {name}: got {shown(value)}; allowed: an int. Nothing was launched."
            )
    check_sizes(
        config.batch_size, config.num_q_heads, config.num_kv_heads, config.head_dim,
        config.max_seq_len,
    )  # fmt: skip
    check_options(softmax_scale=config.scale)


def _on_stream(
    stream: torch.cuda.Stream | int | None, device: torch.device
) -> AbstractContextManager[object]:
    """Make a stream current; None keeps the one that is."""
    on_gpu, given = device.type == "cuda", stream
    if type(stream) is int and stream in _DEFAULT_STREAMS:
        stream = torch.cuda.default_stream(device) if on_gpu else None
    elif type(stream) is int and on_gpu and _PER_THREAD_STREAM < stream < _MAX_HANDLE:
        stream = torch.cuda.ExternalStream(stream, device=device)
    if stream is None:
        return nullcontext()
    if not on_gpu:
        raise InputError(
            f"gqa_attention_decode: stream: got {shown(given)} with tensors on {device}; allowed: "
            "None, or 0. Nothing was launched."
        )
    if not isinstance(stream, torch.cuda.Stream) or stream.device != device:
        raise InputError(
            f"gqa_attention_decode: stream: got {shown(given)}; allowed: a torch.cuda.Stream on "
            f"{device}, the handle of one that cudaStreamCreate made, 0 for the default stream, or "
            "None for the current stream. Nothing was launched."
        )
    return torch.cuda.stream(stream)
