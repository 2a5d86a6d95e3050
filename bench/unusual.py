"""Steps of several tokens, with norm and rotation, and over caches of 8 bits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import gqa_cutlass
from bench.data import ALLOWED_ERROR, Data, num_sets, relative_error
from bench.points import Point
from gqa_cutlass.proof.reference import attend, stored
from gqa_cutlass.proof.turning import turned

_CHECKED = 2  # sequences whose outputs are compared
SCALE = 0.02  # of caches of 8 bits: random numbers use most of their range


class TokensData(Data):
    """Buffer sets of a point whose newest tokens are new, several of a sequence.

    Args:
        point: The problem; its tokens include the new ones.
        pool: As for `Data`.
        tokens: Query tokens and new tokens of a sequence.
    """

    def __init__(self, point: Point, pool: Tensor, tokens: int) -> None:
        super().__init__(point, pool)
        self.q = self.random(point.batch, tokens, point.num_q_heads, point.head_dim)
        self.new_k = self.random(point.batch, tokens, point.num_kv_heads, point.head_dim)
        self.new_v = torch.randn_like(self.new_k)
        self.seqlens -= tokens - 1


class Fp8Data(Data):
    """Buffer sets of a point whose caches are of float8_e4m3fn, and as many as that takes.

    Args:
        point: The problem.
        pool: As for `Data`.
    """

    def __init__(self, point: Point, pool: Tensor) -> None:
        super().__init__(point, pool)
        self.num_sets = num_sets(point.read_bytes // 2)
        k, v = self.k, self.v
        self.k = [self._stored(k[i % len(k)]) for i in range(self.num_sets)]
        self.v = [self._stored(v[i % len(v)]) for i in range(self.num_sets)]

    @staticmethod
    def _stored(cache: Tensor) -> Tensor:
        return torch.stack([stored(row, SCALE, torch.float8_e4m3fn) for row in cache])


def tables(data: Data) -> dict[str, Any]:
    """Options for RMS norm and rotary embedding, of Llama's kind."""
    dim, device = data.point.head_dim, data.q.device
    speeds = 10.0 ** -torch.linspace(0, 4, dim // 2, device=device)
    angles = torch.arange(data.point.tokens + 1, device=device).unsqueeze(1) * speeds
    weight = torch.linspace(0.5, 1.5, dim, device=device)
    return {
        "rotary_cos": angles.cos(), "rotary_sin": angles.sin(), "q_norm_weight": weight,
        "k_norm_weight": weight,
    }  # fmt: skip


def check_unusual(plan: gqa_cutlass.Plan, data: Data, **options: Any) -> float:
    """Run the first set, and compare the first sequences with float32.

    Returns:
        The output's relative error by norm.

    Raises:
        AssertionError: The output is wrong.
    """
    out = data.step(plan, 0)
    tokens = 1 if data.q.dim() == 3 else data.q.shape[1]
    q = data.q[:_CHECKED]
    if "rotary_cos" in options:
        rows = [_turned(q[b], data.point.tokens - 1, options) for b in range(len(q))]
        q = torch.stack(rows).to(q.dtype)
    lengths = [n + tokens for n in data.seqlens[:_CHECKED].tolist()]
    caches = data.k[0][:_CHECKED], data.v[0][:_CHECKED]
    scales: dict[str, Any] = {n: SCALE for n in ("k_scale", "v_scale") if n in options}
    right, _ = attend(q, *caches, lengths, q.shape[-1] ** -0.5, torch.float32, **scales)
    error = relative_error(out[:_CHECKED], right)
    assert error < ALLOWED_ERROR, f"{data.point}: relative error {error}"
    return error


def _turned(row: Tensor, position: int, options: dict[str, Any]) -> Tensor:
    """One token's queries, [heads, head_dim], as they are multiplied."""
    positions = torch.tensor([position], device=row.device)
    return turned(
        row.unsqueeze(0), positions, weight=options["q_norm_weight"], eps=1e-6,
        cos=options["rotary_cos"], sin=options["rotary_sin"],
    )[0]  # fmt: skip
