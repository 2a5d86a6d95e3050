"""A merge of parts as one launch: tensors in, the kernel's argument out; and the launch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from gqa_cutlass.call.given import is_plain
from gqa_cutlass.call.layout import NUMBER_TYPES
from gqa_cutlass.call.record import LOG
from gqa_cutlass.codegen.merge import MergeConfig, widest
from gqa_cutlass.codegen.schema.launch import LaunchShape
from gqa_cutlass.codegen.schema.merge import MAX_PARTS, VECTORS_PER_THREAD, MergeParams, divisor
from gqa_cutlass.codegen.schema.rounding import ceil_div
from gqa_cutlass.gpu.torch_private import is_watching
from gqa_cutlass.tensors import memory_flaw

if TYPE_CHECKING:
    from gqa_cutlass.call.executor import Executor

Parts = Sequence[Tensor] | Tensor  # or one tensor with the parts in front
_MOST_THREADS = 2**31 - 1  # of a launch


@dataclass(frozen=True, kw_only=True)
class MergeCall:
    """One merge, settled.

    Args:
        config: The kernel.
        shape: Its launch.
        argument: What it is told.
        reads: The tensors that it reads.
        writes: Those that it writes: output and log-sum-exp.
    """

    config: MergeConfig
    shape: LaunchShape
    argument: MergeParams
    reads: Sequence[Tensor]
    writes: tuple[Tensor, Tensor]


class _Placed(NamedTuple):
    """Where parts lie.

    Args:
        addresses: Of the first `MAX_PARTS`.
        step: Elements from each to the one as many behind it.
        shape: Of each.
        strides: Of each, in elements; 0 where there is one of something.
    """

    addresses: list[int]
    step: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


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
    out_parts, lse_parts = _placed(outs), _placed(lses)
    reads = [*_listed(outs), *_listed(lses)]
    out = torch.empty(out_parts.shape, dtype=dtype, device=reads[0].device)
    lse = torch.empty(lse_parts.shape, dtype=torch.float32, device=out.device)
    if not out.numel():
        return None
    call = _call(out_parts, lse_parts, reads, (out, lse), len(outs))
    if call is None:
        return None
    stream = executor.current_stream(executor.device.index)
    executor.merge(call, stream)
    if LOG.isEnabledFor(logging.DEBUG):
        LOG.debug("merge kernel=%s parts=%d shape=%s device=%s stream=%d", call.config.name,
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


def _placed(parts: Parts) -> _Placed:
    if isinstance(parts, Tensor):
        shape, (distance, *strides) = parts.shape[1:], parts.stride()
        num_bytes = distance * parts.itemsize
        addresses = [parts.data_ptr() + i * num_bytes for i in range(min(len(parts), MAX_PARTS))]
        step = MAX_PARTS * distance if len(parts) > MAX_PARTS else 0
        return _Placed(addresses, step, shape, _used(shape, strides))
    first = parts[0]
    addresses = [part.data_ptr() for part in parts]
    return _Placed(addresses, 0, first.shape, _used(first.shape, first.stride()))


def _used(shape: Sequence[int], strides: Sequence[int]) -> tuple[int, ...]:
    return tuple([s if n > 1 else 0 for n, s in zip(shape, strides, strict=True)])


def _call(
    outs: _Placed,
    lses: _Placed,
    reads: Sequence[Tensor],
    writes: tuple[Tensor, Tensor],
    num_parts: int,
) -> MergeCall | None:
    """The launch for parts that lie so; None where no kernel can do it."""
    batch, *tokens, heads, dim = outs.shape
    out_batch, *out_token, out_head, gap = outs.strides
    lse_batch, lse_head, *lse_token = lses.strides
    out, lse = writes
    vec_width = _vec_width(outs, reads[0])
    row_vectors = dim // max(1, vec_width)
    row_threads = ceil_div(row_vectors, VECTORS_PER_THREAD)
    num_threads = out.numel() // dim * row_threads
    in_rows = gap == 1 or dim == 1
    misaligned = not vec_width or any(address % lse.itemsize for address in lses.addresses)
    if not in_rows or misaligned or num_threads > _MOST_THREADS:
        return None
    config = MergeConfig(
        dtype=NUMBER_TYPES[reads[0].dtype],
        out_dtype=NUMBER_TYPES[out.dtype],
        vec_width=vec_width,
    )
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
        out=out.data_ptr(),
        lse=lse.data_ptr(),
    )
    argument.outs[: len(outs.addresses)] = outs.addresses
    argument.lses[: len(lses.addresses)] = lses.addresses
    grid = ceil_div(num_threads, config.num_threads), 1, 1
    shape = LaunchShape(grid=grid, block=config.num_threads, shared_bytes=0)
    return MergeCall(config=config, shape=shape, argument=argument, reads=reads, writes=writes)


def _vec_width(outs: _Placed, like: Tensor) -> int:
    """Elements per access that every address allows; 0 where not even one."""
    elements = outs.shape[-1] | outs.step
    for stride in outs.strides[:-1]:
        elements |= stride
    found = elements * like.itemsize
    for address in outs.addresses:
        found |= address
    # The lowest bit that is set in any of them: the largest power of two that divides all.
    return min((found & -found) // like.itemsize, widest(NUMBER_TYPES[like.dtype]))
