"""A plan: one problem with everything resolved, so that a call only binds addresses and launches.

The layouts of a call's tensors are compared with the plan's, in C++ by what Dynamo guards its
graphs with, and in Python where that finds a difference. A plan is called with few sets of
addresses, and keeps the kernel's argument for each that it has checked.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Callable
from functools import cache
from operator import itemgetter
from typing import Any, Generic, NoReturn
from weakref import WeakSet

import torch
from torch import Tensor
from typing_extensions import TypeVar

from gqa_cutlass.call.addresses import Addresses
from gqa_cutlass.call.executor import Executor, Task
from gqa_cutlass.call.given import LENGTHS, ROWS, Given, key_of, look, see
from gqa_cutlass.call.layout import check_lengths
from gqa_cutlass.call.record import LOG, LaunchRecord
from gqa_cutlass.codegen.schema.params import Params, TmaParams
from gqa_cutlass.errors import DeviceError, InputError
from gqa_cutlass.gpu.torch_private import FORWARD_AD, comparison
from gqa_cutlass.tracing import HOST_ONLY, break_graph, is_traced

_NAMES = list(ROWS)
OUT, _LENGTHS = _NAMES.index("out"), _NAMES.index(LENGTHS)

Pair = tuple[Tensor, Tensor]  # output and log-sum-exp
Result = Tensor | Pair
R_co = TypeVar("R_co", bound=Result, default=Result, covariant=True)

_data_ptr = Tensor.data_ptr
_alive: WeakSet[Plan] = WeakSet()


class Plan(Generic[R_co]):
    """Runs decode steps of one problem: the lowest-overhead call.

    A plan holds no tensors but those of features that it was made with, such as sinks. It can be
    called from several threads and on any stream, and captured into CUDA graphs. It outlives
    `os.fork` on the CPU, whatever other threads were at; on a GPU, where torch does not, the
    child's calls raise DeviceError.

    Args:
        executor: Where it runs.
        task: What it is for.
        given: A call, which is checked and bound.
        keeps: Whether every `__call__` uses the tensors of features that are in it.

    Attributes:
        problem: What it solves.
        dispatch: The kernel and its launch.
        kernel: The kernel as its executor prepared it.
        first: What `launch` wants for the call that the plan was made with.

    Raises:
        InputError: A length is not allowed; memory is shared that must not be, or missing.
        CacheOverflowError: The new token does not fit.
        GqaError: The kernel cannot be loaded.
    """

    def __init__(self, executor: Executor, task: Task, given: Given, keeps: bool = False) -> None:
        problem, chosen, layout, q = task.problem, task.dispatch, task.layout, task.layout["q"]
        self.problem, self.dispatch, self.task = problem, chosen, task
        self.softmax_scale, self.return_lse = task.softmax_scale, task.asked.return_lse
        self._executor, self._index = executor, executor.device.index
        self._overflowed = executor.flag.word
        shape = *q.shape[:-1], problem.value_dim
        self._new_out = executor.allocator(shape, task.out_dtype, q.device)
        lse_shape = task.tokens.lse_shape
        self._new_lse = executor.allocator(lse_shape, torch.float32, q.device)
        self._floats, self._merge_counters = chosen.partial_floats, chosen.num_merge_counters
        self._makes_out, self._device_lengths = "out" not in layout, LENGTHS in layout
        self._longest = problem.max_seq_len - problem.appended
        if task.positions is not None:
            self._longest = min(self._longest, task.positions)
        self._pick = itemgetter(*map(_NAMES.index, layout))
        self._addresses_of = _spelled_out(tuple([name in layout for name in _NAMES[: len(given)]]))
        self._keeps = tuple(given[_LENGTHS + 1 :]) if keeps else ()
        argument = TmaParams() if chosen.config.tma else Params()
        self._params: Params = argument.decode if isinstance(argument, TmaParams) else argument
        self._memory = memoryview(argument).cast("B")
        self._lock = threading.Lock()
        tensors = self._pick(given)
        self._equal = comparison(tensors)
        self._addresses = Addresses(task, executor)
        self._known = self._addresses.known
        addresses = tuple(map(_data_ptr, tensors))
        self.first = self._addresses.bind(tensors, given[_LENGTHS], addresses)
        self.kernel = executor.prepare(task, argument)  # last, for it may take long
        _alive.add(self)

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
        given: tuple[Any, ...] = q, k_cache, v_cache, k, v, out, cache_seqlens
        if self._keeps:
            given += self._keeps
        argument = self.bind_quickly(given)
        if argument is None:
            self._check_layout(given)
            argument = self.bind(given)
        return self.launch(given, argument)

    def bind_quickly(self, given: Given) -> bytes | None:
        """See that a call is right, or ask for a closer look; only tensors that are there count.

        Returns:
            What `launch` wants; None when a layout may differ from the plan's or a length be wrong.

        Raises:
            InputError: Memory is shared that must not be, or missing.
        """
        lengths: Any = given[_LENGTHS]
        if type(lengths) is int:
            if self._device_lengths or not 0 <= lengths <= self._longest:
                return None
        elif not self._device_lengths:
            return None
        try:
            if FORWARD_AD._current_level >= 0:
                return None
            addresses = self._addresses_of(self._equal, given)
        except Exception:  # no tensors, or some that cannot answer
            return None
        if addresses is None:
            return None
        argument = self._known.get(addresses)
        if argument is None and self._addresses.fit(addresses):
            return self._addresses.bind(self._pick(given), lengths, addresses)
        return argument

    def bind(self, given: Given) -> bytes:
        """Check the rest of a call of plain tensors whose layout is the plan's.

        From then on `bind_quickly` knows its like.

        Returns:
            What `launch` wants.

        Raises:
            InputError: A length is not allowed; memory is shared that must not be, or missing.
            CacheOverflowError: The new token does not fit.
        """
        tensors = self._pick(given)
        self._equal = comparison(tensors)
        return self._addresses.bind(tensors, given[_LENGTHS], tuple(map(_data_ptr, tensors)))

    def launch(self, given: Given, argument: bytes) -> R_co:
        """Launch a call that was bound, on the plan's device, whichever is current.

        Raises:
            CacheOverflowError: A token did not fit in an earlier call.
            LaunchError: The driver refused.
        """
        executor, index = self._executor, self._index
        if executor.current_device() != index:
            with executor.entered():
                return self.launch(given, argument)
        if self._overflowed.value:
            executor.flag.raise_if_set()
        out: Any = self._new_out() if self._makes_out else given[OUT]
        lse = self._new_lse() if self.return_lse else None
        stream = executor.current_stream(index)
        held, split_workspace, merge_counters = None, 0, 0
        if self._merge_counters:
            # Held until the launch: a capture may give the memory to its next allocation.
            held, split_workspace, merge_counters = executor.borrow(
                index, stream, self._floats, self._merge_counters
            )
        params, lengths = self._params, given[_LENGTHS]
        try:
            with self._lock:
                self._memory[:] = argument
                if self._makes_out:
                    params.out = out.data_ptr()
                if merge_counters:
                    params.split_workspace = split_workspace
                    params.merge_counters = merge_counters
                if lse is not None:
                    params.lse = lse.data_ptr()
                if not self._device_lengths:
                    params.seqlen = params.prefetch_limit = lengths
                self.kernel(stream)
        finally:
            del held
            if LOG.isEnabledFor(logging.DEBUG):
                self.log(lengths, executor.name, stream)
        return out if lse is None else (out, lse)  # type: ignore[return-value]

    def enter_child(self) -> None:
        """Begin anew in a child process: a thread that held the lock in the parent is not there."""
        self._lock = threading.Lock()
        self._addresses.enter_child()
        if not self._executor.survives_fork:
            self.launch = _refuse_after_fork  # type: ignore[method-assign]

    def log(self, cache_seqlens: object, device: int | str, stream: int) -> None:
        """Log a launch, at DEBUG: every parameter of it."""
        LOG.debug("launch %s", LaunchRecord.of(self, cache_seqlens, device, stream))

    def _check_layout(self, given: Given) -> None:
        """Raise InputError unless a call's layout is the plan's."""
        try:
            tensors = {n: t for n, t in zip(ROWS, given, strict=False) if t is not None}
            tensors.pop(LENGTHS, None)
            same = key_of({n: look(t) for n, t in tensors.items()}) == key_of(self.task.layout)
        except Exception:  # no tensors, or some that cannot answer
            same = False
        if not same:
            raise InputError(
                "plan: a tensor's shape, strides, dtype, device or alignment differs from what the "
                "plan was made for (or k, v or out was given then and not now, or the reverse). "
                "Nothing was launched. Make a new plan, or call gqa_decode."
            )
        layout = see(given)
        if (LENGTHS in layout) != self._device_lengths:
            kind = "an int32 tensor" if self._device_lengths else "an int"
            raise InputError(f"plan: cache_seqlens: the plan was made for {kind}; make a new plan.")
        check_lengths(layout, self.problem.batch_size)


@cache
def _spelled_out(given: tuple[bool, ...]) -> Callable[..., tuple[int, ...] | None]:
    """Make what asks tensors for their addresses, if they are laid out as they should be.

    It looks at those that are there, and costs nothing for those that are not. It is made of text,
    for a loop takes half as long again.

    Args:
        given: Which arguments calls give, as tensors.

    Returns:
        A function of a comparison and of the arguments; it returns None for no.
    """
    names = [f"t{i}" for i in range(len(given))]
    there = [name for name, is_given in zip(names, given, strict=True) if is_given]
    absent = [name for name in names if name not in there and name != f"t{_LENGTHS}"]
    wrong = [f"{name} is not None" for name in absent] + [f"{name}.is_nested" for name in there]
    addresses = ", ".join([f"{name}.data_ptr()" for name in there])
    made: dict[str, Any] = {}
    exec(
        "def addresses_of(equal, given):\n"
        f"    {', '.join(names)} = given\n"
        f"    if {' or '.join(wrong)} or not equal({', '.join(there)}):\n"
        "        return None\n"
        f"    return {addresses}\n",
        made,
    )
    function: Callable[..., tuple[int, ...] | None] = made["addresses_of"]
    return function


def _refuse_after_fork(given: Given, argument: bytes) -> NoReturn:
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
