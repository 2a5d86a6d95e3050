"""A plan: one problem with everything resolved, so that a call only binds pointers and launches.

A call is checked in two steps. The layouts of its tensors are compared with the plan's, in C++ by
what Dynamo guards its graphs with, and in Python where that finds a difference. Alignment and
aliasing follow from layouts and addresses; a plan is called with few sets of addresses, and keeps
the kernel's argument for each that it has checked.
"""

from __future__ import annotations

import logging
import math
import os
import sys
import threading
from abc import ABC, abstractmethod
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any, Generic, NoReturn, TypedDict, Unpack
from weakref import WeakSet

import torch
from torch import Tensor
from typing_extensions import TypeVar

from gqa_cutlass.call import layout as inputs
from gqa_cutlass.call.layout import Tensors
from gqa_cutlass.call.options import Features
from gqa_cutlass.call.record import LaunchRecord
from gqa_cutlass.codegen.schema.params import CacheStrides, Params, TmaParams
from gqa_cutlass.codegen.schema.problem import Problem
from gqa_cutlass.codegen.schema.storage import BOX_DIMS
from gqa_cutlass.dispatch import Dispatch
from gqa_cutlass.errors import DeviceError, InputError
from gqa_cutlass.gpu import torch_private as shortcuts
from gqa_cutlass.gpu import workspace
from gqa_cutlass.gpu.driver import LoadedKernel, encode_tensor_map
from gqa_cutlass.gpu.torch_private import FORWARD_AD
from gqa_cutlass.tensormap import TensorMap
from gqa_cutlass.tensors import byte_reach
from gqa_cutlass.tracing import HOST_ONLY, break_graph, is_traced

LOG = logging.getLogger("gqa_cutlass")
_ALIGNMENT, _INT_BYTES = 16, 4
_MAX_KNOWN = 1024

# q, k_cache, v_cache, k, v, out; the last three may be absent. Their addresses go into FIELDS.
Arguments = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]
FIELDS = ("q", "k_cache", "v_cache", "k_new", "v_new", "out")
_Q, _K_CACHE, _V_CACHE, _K, _V, OUT, _LENGTHS = range(7)

# Of the arguments, then of the lengths on the device; 0 for what is absent.
Addresses = tuple[int, int, int, int, int, int, int]
Signature = tuple[object, ...]
Pair = tuple[Tensor, Tensor]  # output and log-sum-exp
Result = Tensor | Pair
R_co = TypeVar("R_co", bound=Result, default=Result, covariant=True)


def signature(tensors: Arguments) -> Signature:
    """What a plan depends on: layouts, types, devices and alignments, but not addresses."""
    return tuple(
        None
        if t is None
        else (t.shape, t.stride(), t.dtype, t.device, t.data_ptr() % _ALIGNMENT, t.requires_grad)
        for t in tensors
    )


_alive: WeakSet[Plan] = WeakSet()


class Settings(TypedDict):
    """What every plan is made from, wherever it runs; `arguments` as passed, `tensors` gathered."""

    problem: Problem
    chosen: Dispatch
    arguments: Arguments
    tensors: Tensors
    softmax_scale: float
    return_lse: bool
    device_lengths: bool
    features: Features


class Plan(ABC, Generic[R_co]):
    """Runs decode steps of one problem: the lowest-overhead call.

    A plan holds no tensors but the sinks that it was made with. It can be called from several
    threads and on any stream, and captured into CUDA graphs. It outlives `os.fork` on the CPU,
    whatever other threads were at; on a GPU, where torch does not, the child's calls raise
    DeviceError.
    """

    def __init__(
        self,
        *,
        problem: Problem,
        chosen: Dispatch,
        arguments: Arguments,
        tensors: Tensors,
        softmax_scale: float,
        return_lse: bool,
        device_lengths: bool,
        features: Features,
        flag: workspace.OverflowFlag,
    ) -> None:
        q = arguments[0]
        self.problem = problem
        self.dispatch = chosen
        self.softmax_scale = softmax_scale
        self.return_lse = return_lse
        self.features = features
        self._key = signature(arguments)
        self._device_lengths = device_lengths
        self._longest = problem.max_seq_len - problem.append
        self._flag = flag
        self._overflowed = flag.word
        self._new_out = shortcuts.allocator(tuple(q.shape), q.dtype, q.device)
        lse_shape = problem.batch_size, problem.num_q_heads
        self._new_lse = shortcuts.allocator(lse_shape, torch.float32, q.device)
        self._equal = shortcuts.unequal
        self._absent = shortcuts.stand_ins()
        self._alignments = _alignments(_addresses(arguments, 0))
        self._num_absent = sum(t is None for t in arguments) + (not device_lengths)
        self._reaches = _reaches(tensors, problem.batch_size if device_lengths else 0)
        self._may_meet = _may_meet(self._reaches, problem.append)
        self._lock = threading.Lock()
        _alive.add(self)
        params = _params(problem, chosen, tensors, softmax_scale, flag.address)
        for field, value in features.fields(softmax_scale).items():
            setattr(params, field, value)
        tma = chosen.config.tma
        self._argument = TmaParams(decode=params) if tma else params
        self._params: Params = self._argument.decode if tma else params
        self._memory = memoryview(self._argument).cast("B")
        self._known: dict[Addresses, bytes] = {}  # what the argument's memory then holds
        self._maps: dict[tuple[int, int], bytes] = {}  # by the caches' addresses
        self._constants = bytes(params)
        self._described = [
            describe(t, chosen.config.block_n) for t in (tensors.k_cache, tensors.v_cache) if tma
        ]

    def __call__(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        cache_seqlens: int | Tensor,
        out: Tensor | None = None,
    ) -> R_co:
        """Run one decode step; arguments as for `gqa_decode`, laid out as when the plan was made.

        Raises:
            InputError: A tensor's layout differs from the plan's, or a length is not allowed.
            CacheOverflowError: The new token does not fit, or did not in an earlier call.
        """
        if is_traced():
            return break_graph(self.__call__, HOST_ONLY)(
                q, k_cache, v_cache, k, v, cache_seqlens, out
            )
        tensors = q, k_cache, v_cache, k, v, out
        argument = self.match(tensors, cache_seqlens)
        if argument is None:
            self._check_layouts(tensors, cache_seqlens)
            argument = self.adopt(tensors, cache_seqlens)
        return self.run(tensors, cache_seqlens, argument)

    def match(self, tensors: Arguments, cache_seqlens: int | Tensor) -> bytes | None:
        """See quickly that a call is right, or ask for a closer look.

        Returns:
            What `run` wants; None when a layout may differ from the plan's or a length be wrong.

        Raises:
            InputError: Memory is shared that must not be, or missing.
        """
        if type(cache_seqlens) is int and not 0 <= cache_seqlens <= self._longest:
            return None
        given: tuple[Any, ...] = tensors
        q, k_cache, v_cache, k, v, out = given
        lengths: Any = cache_seqlens
        if self._num_absent:  # as `_fill_gaps`, whose call would cost as much again
            no_k, no_v, no_out, no_lengths = self._absent
            k = no_k if k is None else k
            v = no_v if v is None else v
            out = no_out if out is None else out
            lengths = no_lengths if type(lengths) is int else lengths
        try:
            if (
                q.is_nested or k_cache.is_nested or v_cache.is_nested or k.is_nested
                or v.is_nested or out.is_nested or lengths.is_nested
                or FORWARD_AD._current_level >= 0
                or not self._equal(q, k_cache, v_cache, k, v, out, lengths)
            ):  # fmt: skip
                return None
            addresses = (
                q.data_ptr(), k_cache.data_ptr(), v_cache.data_ptr(), k.data_ptr(), v.data_ptr(),
                out.data_ptr(), lengths.data_ptr(),
            )  # fmt: skip
        except Exception:  # no tensors, or some that cannot answer
            return None
        argument = self._known.get(addresses)
        if argument is None and _alignments(addresses) == self._alignments:
            return self._learn(tensors, cache_seqlens, addresses)
        return argument

    def adopt(self, tensors: Arguments, cache_seqlens: int | Tensor) -> bytes:
        """Check the rest of a call of plain tensors whose signature is the plan's.

        From then on `match` knows its like.

        Returns:
            What `run` wants.

        Raises:
            InputError: A length is not allowed; memory is shared that must not be, or missing.
            CacheOverflowError: The new token does not fit.
        """
        inputs.check_lengths(self.problem, cache_seqlens, tensors[0].device)
        q, k_cache, v_cache, k, v, out = tensors
        self._equal = shortcuts.comparison(
            (q, k_cache, v_cache, *self._fill_gaps(k, v, out, cache_seqlens))
        )
        addresses = _addresses(tensors, cache_seqlens)
        return self._known.get(addresses) or self._learn(tensors, cache_seqlens, addresses)

    def enter_child(self) -> None:
        """Begin anew in a child process: a thread that held the lock in the parent is not there."""
        self._lock = threading.Lock()

    @abstractmethod
    def run(self, tensors: Arguments, cache_seqlens: int | Tensor, argument: bytes) -> R_co:
        """As `__call__`, for what `match` or `adopt` found to be right."""

    def _fill_gaps(
        self, k: Tensor | None, v: Tensor | None, out: Tensor | None, lengths: int | Tensor
    ) -> tuple[Tensor, Tensor, Tensor, object]:
        """What may be absent, with stand-ins for what is."""
        no_k, no_v, no_out, no_lengths = self._absent
        return (
            no_k if k is None else k,
            no_v if v is None else v,
            no_out if out is None else out,
            no_lengths if type(lengths) is int else lengths,
        )

    def _check_layouts(self, tensors: Arguments, cache_seqlens: int | Tensor) -> None:
        try:
            same = signature(tensors) == self._key
        except Exception:  # no tensors, or some that cannot answer
            same = False
        if not same:
            raise InputError(
                "plan: a tensor's shape, strides, dtype, device or alignment differs from what the "
                "plan was made for (or k, v or out was given then and not now, or the reverse). "
                "Nothing was launched. Make a new plan, or call gqa_decode."
            )
        inputs.check_kinds(tensors, cache_seqlens)
        if isinstance(cache_seqlens, Tensor) != self._device_lengths:
            kind = "an int32 tensor" if self._device_lengths else "an int"
            raise InputError(f"plan: cache_seqlens: the plan was made for {kind}; make a new plan.")

    def _learn(
        self, tensors: Arguments, cache_seqlens: int | Tensor, addresses: Addresses
    ) -> bytes:
        """Check addresses, and make the kernel's argument for them."""
        q, k_cache, v_cache, k, v, out = tensors
        named = partial(Tensors, q=q, k_cache=k_cache, v_cache=v_cache, k=k, v=v, out=out)
        held = all(map(_holds, (*tensors, cache_seqlens), self._reaches))
        if not held or addresses.count(0) != self._num_absent or addresses[_LENGTHS] % _INT_BYTES:
            inputs.check_memory(named(), cache_seqlens)
        lasting = True
        for a, a_reach, b, b_reach in self._may_meet:  # spans first, which is cheap
            if addresses[a] < addresses[b] + b_reach and addresses[b] < addresses[a] + a_reach:
                lasting = inputs.check_aliases(named(), cache_seqlens)
                break
        written = (OUT, _K_CACHE, _V_CACHE) if self.problem.append else (OUT,)
        for place in written:
            self.features.check_apart(
                inputs.ARGUMENTS[place], addresses[place], self._reaches[place]
            )
        params = Params.from_buffer_copy(self._constants)
        for field, address in zip((*FIELDS, "seqlens"), addresses, strict=True):
            setattr(params, field, address)
        argument = bytes(params)
        if self._described:
            argument += self._maps_of(addresses[_K_CACHE], addresses[_V_CACHE])
        if lasting:
            if len(self._known) >= _MAX_KNOWN:
                self._known.clear()
            self._known[addresses] = argument
        return argument

    def _maps_of(self, k_address: int, v_address: int) -> bytes:
        """The encoded tensor maps of the caches, which are kept: encoding takes microseconds."""
        with self._lock:
            maps = self._maps.get((k_address, v_address))
            if maps is None:
                keys, values = self._described
                maps = self._encode(replace(keys, address=k_address))
                maps += self._encode(replace(values, address=v_address))
                if len(self._maps) >= _MAX_KNOWN:
                    del self._maps[next(iter(self._maps))]  # the oldest
                self._maps[k_address, v_address] = maps
            return maps

    def _bind(
        self,
        argument: bytes,
        out: Tensor,
        cache_seqlens: int | Tensor,
        lse: Tensor | None,
        partials: int,
        tickets: int,
    ) -> None:
        """Write the kernel's argument, what is not in it yet; called under the lock."""
        self._memory[:] = argument
        params = self._params
        if not params.out:
            params.out = out.data_ptr()
        if tickets:
            params.partials, params.tickets = partials, tickets
        if lse is not None:
            params.lse = lse.data_ptr()
        if not self._device_lengths:
            params.seqlen = params.prefetch_limit = cache_seqlens

    @abstractmethod
    def _encode(self, description: TensorMap) -> bytes:
        """Encode a tensor map for where the kernel runs."""

    def log(self, cache_seqlens: int | Tensor, device: int | str, stream: int) -> None:
        """Log a launch, at DEBUG: every parameter of it."""
        LOG.debug("launch %s", LaunchRecord.of(self, cache_seqlens, device, stream))


class GpuPlan(Plan[R_co]):
    """A plan for a GPU.

    Args:
        kernel: The kernel, loaded there.
        settings: As for `Plan`.
    """

    def __init__(self, kernel: LoadedKernel, **settings: Unpack[Settings]) -> None:
        self._index = kernel.device.index
        super().__init__(flag=workspace.overflow_flag(self._index), **settings)
        self._floats, self._tickets = self.dispatch.partial_floats, self.dispatch.num_tickets
        self._launch = kernel.prepare(self.dispatch.shape, self._argument)

    def run(self, tensors: Arguments, cache_seqlens: int | Tensor, argument: bytes) -> R_co:
        """As `Plan.run`, on the plan's GPU, whichever is current."""
        if shortcuts.current_device() != self._index:
            with torch.cuda.device(self._index):
                return self.run(tensors, cache_seqlens, argument)
        if self._overflowed.value:
            self._flag.raise_if_set()
        out = tensors[OUT]
        if out is None:
            out = self._new_out()
        lse = self._new_lse() if self.return_lse else None
        stream = shortcuts.current_stream(self._index)
        held, partials, tickets = None, 0, 0
        if self._tickets:
            # Held until the launch: a capture may give the memory to its next allocation.
            held, partials, tickets = workspace.borrow(
                self._index, stream, self._floats, self._tickets
            )
        with self._lock:
            self._bind(argument, out, cache_seqlens, lse, partials, tickets)
            self._launch(stream)
        del held
        if LOG.isEnabledFor(logging.DEBUG):
            self.log(cache_seqlens, self._index, stream)
        return out if lse is None else (out, lse)  # type: ignore[return-value]

    def enter_child(self) -> None:
        """Call it quits: CUDA does not outlive a fork."""
        self.run = _refuse_after_fork  # type: ignore[method-assign]

    def _encode(self, description: TensorMap) -> bytes:
        return encode_tensor_map(description, self._index)


def _refuse_after_fork(
    tensors: Arguments, cache_seqlens: int | Tensor, argument: bytes
) -> NoReturn:
    raise DeviceError(
        "plan: got a call in a process that was forked from the one whose GPU the plan is for; "
        "needed: CUDA, which does not outlive fork(). Nothing was launched. Use the `spawn` or "
        "`forkserver` start method of multiprocessing, and make the plan there."
    )


def _enter_child() -> None:
    for plan in list(_alive):
        plan.enter_child()


if sys.platform != "win32":
    os.register_at_fork(after_in_child=_enter_child)


def _addresses(tensors: Arguments, cache_seqlens: int | Tensor) -> Addresses:
    q, k_cache, v_cache, k, v, out = tensors
    return (
        q.data_ptr(),
        k_cache.data_ptr(),
        v_cache.data_ptr(),
        0 if k is None else k.data_ptr(),
        0 if v is None else v.data_ptr(),
        0 if out is None else out.data_ptr(),
        cache_seqlens.data_ptr() if isinstance(cache_seqlens, Tensor) else 0,
    )


def _alignments(addresses: Addresses) -> list[int]:
    return [address % _ALIGNMENT for address in addresses[:-1]]


def _reaches(tensors: Tensors, num_lengths: int) -> tuple[int, ...]:
    """Bytes from first to last of the tensors, then of the lengths on the device; 0 if absent."""
    given = vars(tensors).values()
    return *(0 if t is None else byte_reach(t) for t in given), num_lengths * _INT_BYTES


def _may_meet(reaches: tuple[int, ...], append: bool) -> tuple[tuple[int, int, int, int], ...]:
    """What must not share memory: pairs of argument positions, each with its reach in bytes."""
    pairs = [(OUT, other) for other in range(len(reaches)) if other != OUT]
    if append:
        pairs += [(_K_CACHE, _V_CACHE), *product((_K_CACHE, _V_CACHE), (_Q, _K, _V, _LENGTHS))]
    return tuple((a, reaches[a], b, reaches[b]) for a, b in pairs if reaches[a] and reaches[b])


def _holds(tensor: Any, reach: int) -> bool:
    """Whether a tensor's memory reaches as far as its elements do; see `tensors.memory_flaw`."""
    if not reach:
        return True
    start = tensor.storage_offset() * tensor.element_size()
    return bool(start + reach <= tensor.untyped_storage().nbytes())


def describe(cache: Tensor, block_n: int) -> TensorMap:
    """The tensor map of a cache, as load_tma.cuh wants it.

    Boxes are 64 dims wide. Where head_dim is a multiple of that, it is two dimensions of the map,
    so that one copy brings whole rows; otherwise the last box of a row reaches beyond head_dim.
    """
    size = cache.element_size()
    batch, max_seq_len, num_kv_heads, head_dim = cache.shape
    to_sequence, to_token, to_head = (
        # Where there is nothing to step to, what was given need be no multiple of 16 bytes.
        size * (stride if length > 1 else head_dim)
        for length, stride in zip(cache.shape[:3], cache.stride()[:3], strict=True)
    )
    columns, span = BOX_DIMS, BOX_DIMS * size
    whole = head_dim % columns == 0
    boxes = head_dim // columns
    return TensorMap(
        address=cache.data_ptr(),
        element_bytes=size,
        sizes=(
            (columns, max_seq_len, boxes, num_kv_heads, batch)
            if whole
            else (head_dim, max_seq_len, num_kv_heads, batch)
        ),
        strides=(to_token, *([span] if whole else []), to_head, to_sequence),
        box=(columns, block_n, *([boxes] if whole else []), 1, 1),
        swizzle=span,
    )


def _params(
    problem: Problem, chosen: Dispatch, tensors: Tensors, softmax_scale: float, status: int
) -> Params:
    """The kernel's argument, with everything set that does not change from call to call."""
    params = Params(
        prefetch_limit=problem.max_seq_len if chosen.early else 0,
        max_seq_len=problem.max_seq_len,
        num_kv_heads=problem.num_kv_heads,
        num_splits=chosen.num_splits,
        num_stages=chosen.num_stages,
        overlap=chosen.overlap,
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
            if isinstance(field, CacheStrides):
                field.token = tensor.stride(1)
    if tensors.out is None:
        params.out_stride.batch = problem.num_q_heads * problem.head_dim
        params.out_stride.head = problem.head_dim
    return params
