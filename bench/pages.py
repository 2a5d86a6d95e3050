"""Steps over caches in pages, which lie in any order."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import gqa_cutlass
from bench.data import ALLOWED_ERROR, Data, relative_error
from bench.points import Point
from gqa_cutlass.proof.reference import attend


class PagedData(Data):
    """Buffer sets of a point whose caches are pools of pages, shuffled.

    Args:
        point: The problem; its tokens are a multiple of the page's.
        pool: As for `Data`.
        page_size: Tokens of a page.
    """

    def __init__(self, point: Point, pool: Tensor, page_size: int) -> None:
        super().__init__(point, pool)
        pages = (-1, page_size, point.num_kv_heads, point.head_dim)
        self.k, self.v = ([cache.view(pages) for cache in caches] for caches in (self.k, self.v))
        order = torch.randperm(len(self.k[0]), device=pool.device)
        self.table = order.to(torch.int32).view(point.batch, -1)

    def in_order(self, cache: Tensor) -> Tensor:
        """The tokens of every sequence: [batch, tokens, num_kv_heads, head_dim]."""
        return cache[self.table.long()].flatten(1, 2)


def check_paged(plan: gqa_cutlass.Plan, data: PagedData, **features: Any) -> tuple[Tensor, float]:
    """Run the first set with NaN where the new tokens go.

    Returns:
        The output, and its relative error by norm against float32.

    Raises:
        AssertionError: A new token was not appended, something else was written, or the output is
            wrong.
    """
    page_size = data.k[0].shape[1]
    at = data.seqlens.long()
    pages = data.table.long().gather(1, (at // page_size)[:, None])[:, 0]
    expected = []
    for cache, new in ((data.k[0], data.new_k), (data.v[0], data.new_v)):
        cache[pages, at % page_size] = float("nan")
        expected.append(cache.clone())
        expected[-1][pages, at % page_size] = new
    out = data.step(plan, 0)
    for cache, right in zip((data.k[0], data.v[0]), expected, strict=True):
        assert torch.equal(cache, right), "the pools are not as they were, with the new tokens"
    lengths = [n + 1 for n in data.point.lengths]
    caches = data.in_order(data.k[0]), data.in_order(data.v[0])
    scale = data.q.shape[-1] ** -0.5
    error = relative_error(out, attend(data.q, *caches, lengths, scale, torch.float32)[0])
    assert error < ALLOWED_ERROR, f"{data.point}: relative error {error}"
    return out, error
