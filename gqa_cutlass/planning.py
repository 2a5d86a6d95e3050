"""A plan: one problem with everything resolved, so that a call only binds pointers and launches."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from gqa_cutlass import inputs, workspace
from gqa_cutlass.dispatch import Dispatch
from gqa_cutlass.errors import InputError
from gqa_cutlass.inputs import Problem, Tensors
from gqa_cutlass.launcher import LoadedKernel, Params

_LOG = logging.getLogger("gqa_cutlass")
_ALIGNMENT = 16

Signature = tuple[object, ...]


def signature(tensors: Sequence[Tensor | None]) -> Signature:
    """What a plan depends on: layouts, types, devices and alignments, but not addresses."""
    return tuple(
        None
        if t is None
        else (t.shape, t.stride(), t.dtype, t.device, t.data_ptr() % _ALIGNMENT, t.requires_grad)
        for t in tensors
    )


class Plan:
    """Runs decode steps of one problem: the lowest-overhead call.

    A plan holds no tensors. It can be called from several threads and on any stream, and captured
    into CUDA graphs.
    """

    def __init__(
        self,
        *,
        problem: Problem,
        chosen: Dispatch,
        kernel: LoadedKernel,
        tensors: Tensors,
        key: Signature,
        softmax_scale: float,
        return_lse: bool,
        device_lengths: bool,
    ) -> None:
        self.problem = problem
        self.dispatch = chosen
        self.return_lse = return_lse
        self._kernel = kernel
        self._prepared = kernel.prepare(chosen.shape)
        self._key = key
        self._device_lengths = device_lengths
        self._flag = workspace.overflow_flag(kernel.device.index)
        self._lock = threading.Lock()
        self._reaches = tuple(map(_reach, vars(tensors).values()))
        self._params = _params(problem, chosen, tensors, softmax_scale, self._flag.address)

    def __call__(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        cache_seqlens: int | Tensor,
        out: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Run one decode step; arguments as for `gqa_decode`, laid out as when the plan was made.

        Raises:
            InputError: A tensor's layout differs from the plan's, or a length is not allowed.
            CacheOverflowError: The new token does not fit, or did not in an earlier call.
        """
        try:
            same = signature((q, k_cache, v_cache, k, v, out)) == self._key
        except (AttributeError, RuntimeError):  # no dense tensors
            same = False
        if not same:
            raise InputError(
                "plan: a tensor's shape, strides, dtype, device or alignment differs from what the "
                "plan was made for (or k, v or out was given then and not now, or the reverse). "
                "Nothing was launched. Make a new plan, or call gqa_decode."
            )
        if isinstance(cache_seqlens, Tensor) != self._device_lengths:
            kind = "an int32 tensor" if self._device_lengths else "an int"
            raise InputError(f"plan: cache_seqlens: the plan was made for {kind}; make a new plan.")
        return self.run(q, k_cache, v_cache, k, v, cache_seqlens, out)

    def run(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        cache_seqlens: int | Tensor,
        out: Tensor | None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """As `__call__`, for callers that have compared the signature already."""
        inputs.check_lengths(self.problem, cache_seqlens, q.device)
        self._check_aliases(q, k_cache, v_cache, k, v, cache_seqlens, out)
        self._flag.raise_if_set()
        if torch.cuda.current_device() != self._kernel.device.index:
            with torch.cuda.device(self._kernel.device.index):
                return self._launch(q, k_cache, v_cache, k, v, cache_seqlens, out)
        return self._launch(q, k_cache, v_cache, k, v, cache_seqlens, out)

    def _check_aliases(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        cache_seqlens: int | Tensor,
        out: Tensor | None,
    ) -> None:
        """Compare spans of memory, which is cheap, and look closer only where some meet."""
        keys, values = k_cache.data_ptr(), v_cache.data_ptr()
        keys_end, values_end = keys + self._reaches[1], values + self._reaches[2]
        apart = k is None or keys_end <= values or values_end <= keys
        if out is not None:
            start = out.data_ptr()
            end = start + self._reaches[5]
            for tensor, reach in zip((q, k_cache, v_cache, k, v), self._reaches, strict=False):
                if tensor is not None:
                    other = tensor.data_ptr()
                    apart = apart and (end <= other or other + reach <= start)
            if isinstance(cache_seqlens, Tensor):
                other = cache_seqlens.data_ptr()
                apart = apart and (end <= other or other + 4 * self.problem.batch_size <= start)
        if not apart:
            tensors = Tensors(q=q, k_cache=k_cache, v_cache=v_cache, k=k, v=v, out=out)
            inputs.check_aliases(tensors, cache_seqlens)

    def _launch(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        cache_seqlens: int | Tensor,
        out: Tensor | None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        if out is None:
            out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        lse = None
        if self.return_lse:
            shape = self.problem.batch_size, self.problem.num_q_heads
            lse = torch.empty(shape, dtype=torch.float32, device=q.device)
        # What Inductor and Triton use: torch.cuda.current_stream() costs 5 us more.
        stream = torch._C._cuda_getCurrentRawStream(self._kernel.device.index)
        with self._lock:
            params = self._params
            params.q, params.out = q.data_ptr(), out.data_ptr()
            params.k_cache, params.v_cache = k_cache.data_ptr(), v_cache.data_ptr()
            if k is not None and v is not None:
                params.k_new, params.v_new = k.data_ptr(), v.data_ptr()
            if isinstance(cache_seqlens, Tensor):
                params.seqlens = cache_seqlens.data_ptr()
            else:
                params.seqlen = cache_seqlens
            params.lse = None if lse is None else lse.data_ptr()
            # Held until the launch: a capture may give the memory to its next allocation.
            partials = self._bind_workspace(params, stream)
            self._kernel.launch(self._prepared, stream, params)
            del partials
        if _LOG.isEnabledFor(logging.DEBUG):
            self._log(stream)
        return out if lse is None else (out, lse)

    def _bind_workspace(self, params: Params, stream: int) -> Tensor | None:
        chosen, index = self.dispatch, self._kernel.device.index
        if chosen.num_splits == 1:
            return None
        partials, params.tickets = workspace.borrow(
            index, stream, chosen.partial_floats, chosen.num_tickets
        )
        params.partials = partials.data_ptr()
        return partials

    def _log(self, stream: int) -> None:
        shape, problem = self.dispatch.shape, self.problem
        _LOG.debug(
            "launch kernel=%s grid=%s cluster=(1, 1, 1) block=%d shared_bytes=%d num_splits=%d "
            "batch_size=%d num_q_heads=%d num_kv_heads=%d head_dim=%d max_seq_len=%d append=%s "
            "device=%d stream=%#x",
            self.dispatch.config.name, shape.grid, shape.block, shape.shared_bytes,
            self.dispatch.num_splits, problem.batch_size, problem.num_q_heads,
            problem.num_kv_heads, problem.head_dim, problem.max_seq_len, problem.append,
            self._kernel.device.index, stream,
        )  # fmt: skip


def _reach(tensor: Tensor | None) -> int:
    """Bytes from a tensor's first to the one past its last."""
    start, end = (0, 0) if tensor is None else inputs.byte_span(tensor)
    return end - start


def _params(
    problem: Problem, chosen: Dispatch, tensors: Tensors, softmax_scale: float, status: int
) -> Params:
    """The kernel's argument, with everything set that does not change from call to call."""
    params = Params(
        max_seq_len=problem.max_seq_len,
        num_kv_heads=problem.num_kv_heads,
        num_splits=chosen.num_splits,
        scale_log2=softmax_scale * math.log2(math.e),
        status=status,
    )
    for field, tensor in (
        (params.q_stride, tensors.q),
        (params.k_new_stride, tensors.k),
        (params.v_new_stride, tensors.v),
        (params.k_cache_stride, tensors.k_cache),
        (params.v_cache_stride, tensors.v_cache),
        (params.out_stride, tensors.out),
    ):
        if tensor is not None:
            field.batch, field.head = tensor.stride(0), tensor.stride(-2)
            field.token = tensor.stride(1) if tensor.dim() == 4 else 0
    if tensors.out is None:
        params.out_stride.batch = problem.num_q_heads * problem.head_dim
        params.out_stride.head = problem.head_dim
    return params
