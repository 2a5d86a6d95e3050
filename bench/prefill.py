"""Attention of whole prompts, to compare the decode step with that follows them.

Protocol: our decode step over as many tokens is timed first; then PyTorch's causal attention, with
each of its two fast backends in turn; each as a CUDA graph over cold buffer sets. The better
backend counts. K and V of both are the same. The last token of the prompts is the step's, so that
both give the same output for it, which is checked; and so is the first token's, which attends
itself alone.

The step takes no turns with the prompts. Behind 20 ms of tensor cores at their limit, 0.1 ms of
steps were seen to take 2 to 26% longer than among steps, by the GPU; clocks that fall are likely.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.baselines import SDPA
from bench.data import Data, check, num_sets, relative_error
from bench.points import Point
from bench.record import Prefill
from bench.timing import Attend, agreeing, interleaved
from gqa_cutlass.tuning.timing import Graph


class Prompts:
    """Queries of whole prompts, one set for each of the first buffer sets of a point.

    Args:
        data: The decode step's tensors, whose K and V are the prompts' too.
    """

    def __init__(self, data: Data) -> None:
        point = data.point
        self._data = data
        shape = point.batch, point.tokens, point.num_q_heads, point.head_dim
        query_bytes = data.q.numel() * data.q.element_size() * point.tokens
        self.num_sets = min(data.num_sets, num_sets(point.read_bytes + query_bytes))
        self.q = data.random(self.num_sets, *shape)
        self.q[:, :, -1] = data.q

    def attend(self, backend: SDPBackend) -> Attend:
        """Attend a buffer set with one backend; outputs are [sequence, token, head, head_dim]."""

        def attend(i: int) -> Tensor:
            sets = self.q[i], self._data.k[i], self._data.v[i]
            q, k, v = (x.transpose(1, 2) for x in sets)
            with sdpa_kernel(backend):
                out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            return out.transpose(1, 2)

        return attend

    def error(self, out: Tensor, step: Tensor) -> float:
        """Relative error for the first buffer set: the worse one of the first and last tokens'.

        Args:
            out: What `attend` gave.
            step: What the decode step gave.
        """
        point = self._data.point
        group = point.num_q_heads // point.num_kv_heads
        first = self._data.v[0][:, 0].repeat_interleave(group, 1)
        errors = relative_error(out[:, 0], first), relative_error(out[:, -1], step)
        return float(torch.tensor(errors).max())  # NaN where one of them is


def measure_prefill(point: Point, pool: Tensor) -> Prefill | None:
    """Check and time the prompts of a point beside its step; None where no backend runs."""
    data = Data(point, pool)
    plan = data.plan()
    step, _ = check(plan, data)
    prompts = Prompts(data)
    backends = {name: partial(prompts.attend, backend) for name, backend in SDPA.items()}
    error = partial(prompts.error, step=step)
    decode = interleaved({"decode": Graph(lambda i: data.step(plan, i), data.num_sets)})["decode"]
    graphs = agreeing(point, backends, error, prompts.num_sets)
    if not graphs:
        return None
    return Prefill(point=str(point), decode=decode, measured=interleaved(graphs))
