"""The tensors of a point, as often as cold caches take, and the check of a plan against float32."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import gqa_cutlass
from bench.points import Point, Ragged
from gqa_cutlass.proof.reference import attend

ROTATE_BYTES, MAX_SETS = 256 << 20, 512
ALLOWED_ERROR = 1e-2  # by norm


def num_sets(read_bytes: int) -> int:
    """Buffer sets whose reading takes at least `ROTATE_BYTES`, or `MAX_SETS` of them; never one."""
    return max(2, min(MAX_SETS, -(-ROTATE_BYTES // read_bytes) + 1))


def pool_bytes(point: Point) -> int:
    """Bytes of all buffer sets of a point."""
    return num_sets(point.read_bytes) * point.cache_bytes


class Data:
    """Buffer sets for one point, cut from a pool of random numbers.

    Args:
        point: The problem.
        pool: At least `pool_bytes(point)` of them.
    """

    def __init__(self, point: Point, pool: Tensor) -> None:
        self.point = point
        self.num_sets = num_sets(point.read_bytes)
        shape = point.batch, point.tokens, point.num_kv_heads, point.head_dim
        sets = pool[: pool_bytes(point) // pool.element_size()].view(self.num_sets, 2, *shape)
        self.k, self.v = list(sets[:, 0]), list(sets[:, 1])
        read = point.read_bytes // pool.element_size()
        self.flat = [both.view(-1)[:read] for both in sets]  # what the roofline reads
        self.q = self.random(point.batch, point.num_q_heads, point.head_dim)
        self.new_k = self.random(point.batch, point.num_kv_heads, point.head_dim)
        self.new_v = torch.randn_like(self.new_k)
        self.seqlens = torch.tensor(point.lengths, dtype=torch.int32, device=pool.device)

    def random(self, *shape: int) -> Tensor:
        """Random numbers of the caches' type, beside them."""
        return torch.randn(shape, dtype=self.k[0].dtype, device=self.k[0].device)

    def plan(
        self, *, ragged: bool | None = None, dependent: bool = False, **features: Any
    ) -> gqa_cutlass.Plan:
        """The plan whose calls `step` makes.

        Args:
            ragged: As for `gqa_cutlass.plan`; by default as the point is.
            dependent: As for `gqa_cutlass.plan`.
            features: More options for it; their tensors stay with the plan.
        """
        return gqa_cutlass.plan(
            self.q, self.k[0], self.v[0], self.new_k, self.new_v, cache_seqlens=self.seqlens,
            ragged=isinstance(self.point, Ragged) if ragged is None else ragged,
            dependent=dependent, **features,
        )  # fmt: skip

    def step(self, plan: gqa_cutlass.Plan, i: int) -> Tensor:
        """Append to a buffer set and attend it."""
        out = plan(self.q, self.k[i], self.v[i], self.new_k, self.new_v, self.seqlens)
        assert isinstance(out, Tensor)
        return out


def check(
    plan: gqa_cutlass.Plan, data: Data, *, behind: int | None = None, **features: Any
) -> tuple[Tensor, float]:
    """Run the first set with NaN from the new token on; leave random numbers behind that token.

    Args:
        plan: What is checked.
        data: Its tensors.
        behind: Rows behind the new token that are looked at; None: all.
        features: As for `expected`.

    Returns:
        The output, and its relative error by norm against float32.

    Raises:
        AssertionError: The new token was not appended, something else was written, or the output
            is wrong.
    """
    caches = ((data.k[0], data.new_k), (data.v[0], data.new_v))
    most = data.point.tokens if behind is None else behind + 1
    rows = [
        (cache[b, n : n + most], new[b])
        for cache, new in caches
        for b, n in enumerate(data.point.lengths)
    ]
    for tail, _ in rows:
        tail.fill_(float("nan"))
    out = data.step(plan, 0)
    for tail, new in rows:
        assert torch.equal(tail[0], new), "the new token was not appended"
        assert bool(tail[1:].isnan().all()), "a row behind the new token was written"
        tail[1:].normal_()
    error = relative_error(out, expected(data, **features))
    assert error < ALLOWED_ERROR, f"{data.point}: relative error {error}"
    return out, error


def expected(data: Data, **features: Any) -> Tensor:
    """What attending the first set gives in float32, the new tokens appended."""
    lengths = [n + 1 for n in data.point.lengths]
    scale = data.q.shape[-1] ** -0.5
    caches = data.k[0], data.v[0]
    return attend(data.q, *caches, lengths, scale, torch.float32, **features)[0]


def relative_error(out: Tensor, right: Tensor) -> float:
    """Norm of the difference over the norm of what is right."""
    return float((out.float() - right.float()).norm() / right.float().norm())
