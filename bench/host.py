"""Microseconds of host time that a decode step costs its caller, on llama3-8b 1x1024 in fp16.

Protocol: batches of 200 calls, fewer than the GPU's queue takes before it makes the host wait; the
GPU is waited for outside the timed window. The median of 50 batches counts. Contenders take turns.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import gqa_cutlass
from bench.points import GRID
from gqa_cutlass import gqa_decode
from gqa_cutlass.call.record import LOG
from gqa_cutlass.gpu import torch_private

POINT = "llama3-8b 32/8/128 1x1024"
LOG_CHECK = "DEBUG log check (off), in each above"
CALLS, BATCHES, WARM_UP = 200, 50, 5

Arguments = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
Calls = dict[str, Callable[[], object]]

log_check = partial(LOG.isEnabledFor, logging.DEBUG)  # all that a call does for the log when off


def host_costs() -> dict[str, float]:
    """Median microseconds per call, by contender."""
    return medians(contenders(*arguments()))


def host_profile() -> dict[str, float]:
    """Median microseconds of the parts of a plan's call."""
    return medians(parts(*arguments()))


def arguments(device: str = "cuda") -> tuple[Arguments, Tensor]:
    """Tensors of a call, q to v, and the lengths."""
    (point,) = [p for p in GRID if str(p) == POINT]

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float16, device=device)

    cache = point.batch, point.tokens, point.num_kv_heads, point.head_dim
    token = point.batch, point.num_kv_heads, point.head_dim
    q = random(point.batch, point.num_q_heads, point.head_dim)
    k_cache, v_cache, k, v = random(*cache), random(*cache), random(*token), random(*token)
    lengths = torch.full((point.batch,), point.tokens - 1, dtype=torch.int32, device=device)
    return (q, k_cache, v_cache, k, v), lengths


def contenders(tensors: Arguments, lengths: Tensor) -> Calls:
    """Calls that a user makes, and the check for the log that is in each of ours, alone."""
    q, k_cache, v_cache, *_ = tensors
    out = torch.empty_like(q)
    bound = gqa_cutlass.plan(*tensors, cache_seqlens=lengths, out=out)
    free = gqa_cutlass.plan(*tensors, cache_seqlens=lengths)
    views = q[:, :, None], k_cache.transpose(1, 2), v_cache.transpose(1, 2)
    return {
        "plan, out given": lambda: bound(*tensors, lengths, out),
        "plan": lambda: free(*tensors, lengths),
        "gqa_decode": lambda: gqa_decode(*tensors, cache_seqlens=lengths),
        LOG_CHECK: log_check,
        "SDPA, views made before": lambda: F.scaled_dot_product_attention(*views, enable_gqa=True),
    }


def parts(tensors: Arguments, lengths: Tensor) -> Calls:
    """The steps of a plan's call, each alone, down to what only it calls."""
    out = torch.empty_like(tensors[0])
    plan = gqa_cutlass.plan(*tensors, cache_seqlens=lengths, out=out)
    given = *tensors, out, lengths
    plan(*tensors, lengths, out)
    argument = plan.bind_quickly(given)
    assert argument is not None
    executor, chosen = plan._executor, plan.dispatch
    index = executor.device.index
    stream = executor.current_stream(index)
    borrowed = index, stream, chosen.partial_floats, max(1, chosen.num_merge_counters)
    executor.borrow(*borrowed)
    return {
        "nothing (the loop)": lambda: None,
        "bind": lambda: plan.bind_quickly(given),
        "  compare layouts": lambda: plan._equal(*given),
        "  seven is_nested": lambda: [t.is_nested for t in given],
        "  seven data_ptr()": lambda: [t.data_ptr() for t in given],
        "launch": lambda: plan.launch(given, argument),
        "  current device": executor.current_device,
        "  current stream": lambda: executor.current_stream(index),
        "  borrow workspace": lambda: executor.borrow(*borrowed),
        "    is a capture on": torch.cuda.is_current_stream_capturing,
        "  submit": lambda: plan.kernel(stream),
        "  DEBUG log check (off)": log_check,
        "allocate out": plan._new_out,
        "torch.empty_like": lambda: torch.empty_like(out),
    }


def medians(calls: Calls) -> dict[str, float]:
    """Median microseconds per call of every contender, one batch each in turn."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(WARM_UP + BATCHES):
        for name, call in calls.items():
            micros = batch(call)
            if turn >= WARM_UP:
                times[name].append(micros)
    return {name: statistics.median(values) for name, values in times.items()}


def batch(call: Callable[[], object]) -> float:
    """Microseconds per call of one batch."""
    start = time.perf_counter_ns()
    for _ in range(CALLS):
        call()
    elapsed = time.perf_counter_ns() - start
    torch.cuda.synchronize()
    return elapsed / CALLS / 1e3


def main() -> None:
    """Print the costs, and with --profile the parts of a plan's call."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--profile", action="store_true", help="also the parts of a plan's call")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench: needs a GPU")
    costs = host_costs() | (host_profile() if options.profile else {})
    if options.profile:
        private = torch_private.comparison([torch.empty(1)]) is not torch_private.unequal
        allocation = torch_private._allocation("cuda") is not None
        print(f"torch {torch.__version__}: compares layouts {private}, allocates {allocation}")
    for name, micros in costs.items():
        print(f"{name:28} {micros:7.2f} us")


if __name__ == "__main__":
    main()
