"""A merge of parts as one launch: tensors in, the kernel's argument out; and the launch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from gqa_cutlass.call.given import is_plain
from gqa_cutlass.call.layout import NUMBER_TYPES
from gqa_cutlass.call.record import LOG
from gqa_cutlass.codegen.merge import PARTS_AT_ONCE, MergeConfig, widest
from gqa_cutlass.codegen.schema.launch import LaunchShape
from gqa_cutlass.codegen.schema.merge import MAX_PARTS, MergeParams, divisor
from gqa_cutlass.codegen.schema.rounding import ceil_div
from gqa_cutlass.gpu.torch_private import is_watching
from gqa_cutlass.tensors import memory_flaw

if TYPE_CHECKING:
    from gqa_cutlass.call.executor import Executor

Parts = Sequence[Tensor] | Tensor  # or one tensor with the parts in front
_WIDEST_BYTES = 16  # of an access
_MOST_THREADS = 2**31 - 1  # of a launch


@dataclass(frozen=True, kw_only=True, eq=False)
class Settled:
    """What merges of one layout have in common. Each is equal to itself alone.

    Args:
        config: The kernel.
        shape: Its launch.
        argument: What it is told, but addresses.
    """

    config: MergeConfig
    shape: LaunchShape
    argument: bytes


@dataclass(frozen=True, kw_only=True)
class MergeCall:
    """One merge.

    Args:
        settled: Kernel and launch.
        argument: What the kernel is told.
        reads: The tensors that it reads.
        writes: Those that it writes: output and log-sum-exp.
    """

    settled: Settled
    argument: MergeParams
    reads: Sequence[Tensor]
    writes: tuple[Tensor, Tensor]


class _Layout(NamedTuple):
    """How parts lie.

    Args:
        dtype: What they hold.
        shape: Of each.
        strides: Of each, in elements.
        step: Elements from one of the first `MAX_PARTS` to the one as many behind it.
        alignment: Bytes that all addresses are a multiple of, up to 16.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    step: int
    alignment: int


def merge(
    executor_of: Callable[[torch.device], Executor], outs: Parts, lses: Parts, dtype: torch.dtype
) -> tuple[Tensor, Tensor] | None:
    """Merge parts, which were checked, by one launch on the current stream.

    Args:
        executor_of: Where the kernels for tensors on a device run.
        outs: The parts' outputs.
        lses: Their log-sum-exps.
        dtype: Of the merged output.

    Returns:
        Output and log-sum-exp; None where no kernel may or can do it: for gradients, where torch
        records its operations, for tensors that are not plain or have no elements, and where
        head_dim is not contiguous.

    Raises:
        GqaError: The kernel cannot be compiled, loaded or launched.
    """
    given = [*_listed(outs), *_listed(lses)]
    if not all(map(is_plain, given)) or any(map(memory_flaw, given)):
        return None
    if torch.is_grad_enabled() and any(t.requires_grad for t in given):
        return None
    if is_watching():
        return None
    executor = executor_of(given[0].device)
    if executor.current_device() != executor.device.index:
        with executor.entered():
            return _launch(executor, outs, lses, dtype)
    return _launch(executor, outs, lses, dtype)


def _launch(
    executor: Executor, outs: Parts, lses: Parts, dtype: torch.dtype
) -> tuple[Tensor, Tensor] | None:
    outs, lses = _in_step(outs), _in_step(lses)
    (out_layout, out_addresses), (lse_layout, lse_addresses) = _placed(outs), _placed(lses)
    settled = _settle(out_layout, lse_layout, dtype, len(outs))
    if settled is None:
        return None
    reads = [*_listed(outs), *_listed(lses)]
    out = torch.empty(out_layout.shape, dtype=dtype, device=reads[0].device)
    lse = torch.empty(lse_layout.shape, dtype=torch.float32, device=out.device)
    argument = MergeParams.from_buffer_copy(settled.argument)
    argument.out, argument.lse = out.data_ptr(), lse.data_ptr()
    argument.outs[: len(out_addresses)] = out_addresses
    argument.lses[: len(lse_addresses)] = lse_addresses
    stream = executor.current_stream(executor.device.index)
    call = MergeCall(settled=settled, argument=argument, reads=reads, writes=(out, lse))
    executor.merge(call, stream)
    if LOG.isEnabledFor(logging.DEBUG):
        LOG.debug("merge kernel=%s parts=%d shape=%s device=%s stream=%d", settled.config.name,
                  len(outs), list(out.shape), executor.name, stream)  # fmt: skip
    return out, lse


def _listed(parts: Parts) -> Sequence[Tensor]:
    """The tensors that parts are in."""
    return [parts] if isinstance(parts, Tensor) else parts


def _in_step(parts: Parts) -> Parts:
    """Parts that one launch can be told of: copied, where they are many or lie differently."""
    if isinstance(parts, Tensor):
        return parts
    strides = parts[0].stride()
    if len(parts) <= MAX_PARTS and all(part.stride() == strides for part in parts):
        return parts
    return torch.stack(tuple(parts))


def _placed(parts: Parts) -> tuple[_Layout, list[int]]:
    """How parts lie, and where the first of them do."""
    if isinstance(parts, Tensor):
        first, (distance, *strides) = parts, parts.stride()
        shape, size = parts.shape[1:], parts.itemsize
        start, listed = parts.data_ptr(), range(min(len(parts), MAX_PARTS))
        addresses = [start + i * distance * size for i in listed]
        step = MAX_PARTS * distance if len(parts) > MAX_PARTS else 0
    else:
        first, step = parts[0], 0
        shape, strides = first.shape, list(first.stride())
        addresses = [part.data_ptr() for part in parts]
    bits = _WIDEST_BYTES
    for address in addresses:
        bits |= address
    return _Layout(first.dtype, tuple(shape), tuple(strides), step, bits & -bits), addresses


@lru_cache(maxsize=4096)
def _settle(outs: _Layout, lses: _Layout, out_dtype: torch.dtype, num_parts: int) -> Settled | None:
    """The kernel for parts that lie so; None where none can merge them."""
    batch, *tokens, heads, dim = outs.shape
    out_batch, *out_token, out_head, _ = _used(outs)
    lse_batch, lse_head, *lse_token = _used(lses)
    rows = batch * heads * prod(tokens)
    if not rows * dim or dim > 1 and outs.strides[-1] != 1:
        return None
    vec_width = _vec_width(outs)
    if not vec_width or lses.alignment < lses.dtype.itemsize:
        return None
    few, many = PARTS_AT_ONCE
    config = MergeConfig(
        dtype=NUMBER_TYPES[outs.dtype],
        out_dtype=NUMBER_TYPES[out_dtype],
        vec_width=vec_width,
        parts_at_once=few if num_parts <= few else many,
    )
    row_vectors = dim // vec_width
    row_threads = ceil_div(row_vectors, config.vectors)
    num_threads = rows * row_threads
    if num_threads > _MOST_THREADS:
        return None
    argument = MergeParams(
        num_threads=num_threads,
        row_vectors=row_vectors,
        row_threads=divisor(row_threads),
        num_heads=divisor(heads),
        num_tokens=divisor(prod(tokens)),
        num_parts=num_parts,
        out_batch=out_batch,
        out_token=sum(out_token),
        out_head=out_head,
        lse_batch=lse_batch,
        lse_head=lse_head,
        lse_token=sum(lse_token),
        outs_step=outs.step,
        lses_step=lses.step,
    )
    grid = ceil_div(num_threads, config.num_threads), 1, 1
    shape = LaunchShape(grid=grid, block=config.num_threads, shared_bytes=0)
    return Settled(config=config, shape=shape, argument=bytes(argument))


def _used(layout: _Layout) -> list[int]:
    """Strides, 0 where there is one of something."""
    return [s if n > 1 else 0 for n, s in zip(layout.shape, layout.strides, strict=True)]


def _vec_width(outs: _Layout) -> int:
    """Elements per access that every address allows; 0 where not even one."""
    elements = outs.shape[-1] | outs.step
    for stride in _used(outs)[:-1]:
        elements |= stride
    found = elements * outs.dtype.itemsize | outs.alignment
    # The lowest bit that is set in any of them: the largest power of two that divides all.
    return min((found & -found) // outs.dtype.itemsize, widest(NUMBER_TYPES[outs.dtype]))
