"""A plan: one problem with everything resolved, so that a call only binds pointers and launches."""

from __future__ import annotations

import logging
import math
import threading
from abc import ABC, abstractmethod
from typing import TypedDict, Unpack

import torch
from torch import Tensor

from gqa_cutlass import inputs, workspace
from gqa_cutlass.dispatch import Dispatch
from gqa_cutlass.errors import InputError
from gqa_cutlass.inputs import Problem, Tensors
from gqa_cutlass.launcher import LoadedKernel, Params

LOG = logging.getLogger("gqa_cutlass")
_ALIGNMENT = 16

# q, k_cache, v_cache, k, v, out; the last three may be absent. Their addresses go into FIELDS.
Arguments = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]
FIELDS = ("q", "k_cache", "v_cache", "k_new", "v_new", "out")
_K_CACHE, _V_CACHE, _OUT = 1, 2, 5

Signature = tuple[object, ...]


def signature(tensors: Arguments) -> Signature:
    """What a plan depends on: layouts, types, devices and alignments, but not addresses."""
    return tuple(
        None
        if t is None
        else (t.shape, t.stride(), t.dtype, t.device, t.data_ptr() % _ALIGNMENT, t.requires_grad)
        for t in tensors
    )


class Settings(TypedDict):
    """What every plan is made from, wherever it runs."""

    problem: Problem
    chosen: Dispatch
    tensors: Tensors
    key: Signature
    softmax_scale: float
    return_lse: bool
    device_lengths: bool


class Plan(ABC):
    """Runs decode steps of one problem: the lowest-overhead call.

    A plan holds no tensors. It can be called from several threads and on any stream, and captured
    into CUDA graphs.
    """

    def __init__(
        self,
        *,
        problem: Problem,
        chosen: Dispatch,
        tensors: Tensors,
        key: Signature,
        softmax_scale: float,
        return_lse: bool,
        device_lengths: bool,
        flag: workspace.OverflowFlag,
    ) -> None:
        self.problem = problem
        self.dispatch = chosen
        self.return_lse = return_lse
        self._key = key
        self._device_lengths = device_lengths
        self._flag = flag
        self._lock = threading.Lock()
        self._may_meet = _may_meet(tensors, problem.batch_size if device_lengths else 0)
        self._params = _params(problem, chosen, tensors, softmax_scale, flag.address)

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
        tensors = q, k_cache, v_cache, k, v, out
        try:
            same = signature(tensors) == self._key
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
        return self.run(tensors, cache_seqlens)

    def run(
        self, tensors: Arguments, cache_seqlens: int | Tensor
    ) -> Tensor | tuple[Tensor, Tensor]:
        """As `__call__`, for callers that have compared the signature already."""
        inputs.check_lengths(self.problem, cache_seqlens, tensors[0].device)
        addresses = [0 if t is None else t.data_ptr() for t in tensors]
        lengths = cache_seqlens.data_ptr() if isinstance(cache_seqlens, Tensor) else 0
        self._check_aliases(tensors, cache_seqlens, [*addresses, lengths])
        self._flag.raise_if_set()
        return self._launch(tensors, cache_seqlens, addresses, lengths)

    def _check_aliases(
        self, tensors: Arguments, cache_seqlens: int | Tensor, addresses: list[int]
    ) -> None:
        """Compare spans of memory, which is cheap, and look closer only where some meet."""
        for a, a_reach, b, b_reach in self._may_meet:
            start, other = addresses[a], addresses[b]
            if start < other + b_reach and other < start + a_reach:
                q, k_cache, v_cache, k, v, out = tensors
                named = Tensors(q=q, k_cache=k_cache, v_cache=v_cache, k=k, v=v, out=out)
                inputs.check_aliases(named, cache_seqlens)
                return

    def _launch(
        self,
        tensors: Arguments,
        cache_seqlens: int | Tensor,
        addresses: list[int],
        lengths: int,
    ) -> Tensor | tuple[Tensor, Tensor]:
        q, k_cache, v_cache, k, v, out = tensors
        if out is None:
            out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
            addresses[_OUT] = out.data_ptr()
        lse = None
        if self.return_lse:
            shape = self.problem.batch_size, self.problem.num_q_heads
            lse = torch.empty(shape, dtype=torch.float32, device=q.device)
        with self._lock:
            params = self._params
            for field, address in zip(FIELDS, addresses, strict=True):
                setattr(params, field, address)
            if isinstance(cache_seqlens, Tensor):
                params.seqlens = lengths
            else:
                params.seqlen = cache_seqlens
            params.lse = None if lse is None else lse.data_ptr()
            bound = (q, k_cache, v_cache, k, v, out)
            self._submit(params, bound, cache_seqlens, lse)
        return out if lse is None else (out, lse)

    @abstractmethod
    def _submit(
        self,
        params: Params,
        tensors: Arguments,
        cache_seqlens: int | Tensor,
        lse: Tensor | None,
    ) -> None:
        """Bind the workspace and run the kernel; `tensors` have the output in place."""

    def log(self, device: object, stream: int) -> None:
        """Log a launch, at DEBUG."""
        shape, problem = self.dispatch.shape, self.problem
        LOG.debug(
            "launch kernel=%s grid=%s cluster=(1, 1, 1) block=%d shared_bytes=%d num_splits=%d "
            "batch_size=%d num_q_heads=%d num_kv_heads=%d head_dim=%d max_seq_len=%d append=%s "
            "device=%s stream=%#x",
            self.dispatch.config.name, shape.grid, shape.block, shape.shared_bytes,
            self.dispatch.num_splits, problem.batch_size, problem.num_q_heads,
            problem.num_kv_heads, problem.head_dim, problem.max_seq_len, problem.append,
            device, stream,
        )  # fmt: skip


class GpuPlan(Plan):
    """A plan for a GPU.

    Args:
        kernel: The kernel, loaded there.
        settings: As for `Plan`.
    """

    def __init__(self, kernel: LoadedKernel, **settings: Unpack[Settings]) -> None:
        super().__init__(flag=workspace.overflow_flag(kernel.device.index), **settings)
        self._kernel = kernel
        self._prepared = kernel.prepare(self.dispatch.shape)

    def _launch(
        self,
        tensors: Arguments,
        cache_seqlens: int | Tensor,
        addresses: list[int],
        lengths: int,
    ) -> Tensor | tuple[Tensor, Tensor]:
        if torch.cuda.current_device() != self._kernel.device.index:
            with torch.cuda.device(self._kernel.device.index):
                return super()._launch(tensors, cache_seqlens, addresses, lengths)
        return super()._launch(tensors, cache_seqlens, addresses, lengths)

    def _submit(
        self,
        params: Params,
        tensors: Arguments,
        cache_seqlens: int | Tensor,
        lse: Tensor | None,
    ) -> None:
        # What Inductor and Triton use: torch.cuda.current_stream() costs 5 us more.
        stream = torch._C._cuda_getCurrentRawStream(self._kernel.device.index)
        # Held until the launch: a capture may give the memory to its next allocation.
        partials = self._bind_workspace(params, stream)
        self._kernel.launch(self._prepared, stream, params)
        del partials
        if LOG.isEnabledFor(logging.DEBUG):
            self.log(self._kernel.device.index, stream)

    def _bind_workspace(self, params: Params, stream: int) -> Tensor | None:
        chosen, index = self.dispatch, self._kernel.device.index
        if chosen.num_splits == 1:
            return None
        partials, params.tickets = workspace.borrow(
            index, stream, chosen.partial_floats, chosen.num_tickets
        )
        params.partials = partials.data_ptr()
        return partials


def _may_meet(tensors: Tensors, num_lengths: int) -> tuple[tuple[int, int, int, int], ...]:
    """What must not share memory: pairs of argument positions, each with its reach in bytes.

    The lengths on the device, if there are any, stand behind the tensors.
    """
    reach = [0 if t is None else inputs.byte_reach(t) for t in vars(tensors).values()]
    reach.append(num_lengths * 4)
    pairs = [(_K_CACHE, _V_CACHE)] if tensors.k is not None else []
    pairs += [(_OUT, other) for other in range(len(reach)) if other != _OUT]
    return tuple((a, reach[a], b, reach[b]) for a, b in pairs if reach[a] and reach[b])


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
