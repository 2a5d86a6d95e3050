"""The ranks' parts of a step, one after the other in one process, merged; and captured on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from gqa_cutlass import InputError, gqa_decode, merge_states
from gqa_cutlass.cache.scales import raw
from gqa_cutlass.distributed import agreement, decode_context_parallel
from gqa_cutlass.distributed.exchange import Part
from gqa_cutlass.distributed.groups import Ranks
from gqa_cutlass.distributed.local import attend, here_of
from gqa_cutlass.distributed.settle import settle

SIZE, LOCAL_MAX, BATCH, HEADS, KV_HEADS, DIM = 3, 8, 4, 12, 3, 64
ASKED = {"interleave": 1, "q_heads": "whole", "exchange": None, "return_lse": True}


class Parts:
    """A step, and its ranks' shards of the caches."""

    def __init__(self, device: str, features: dict[str, Any]) -> None:
        def random(*shape: int) -> Tensor:
            return torch.randn(shape).half().to(device)

        torch.manual_seed(5)
        self.features = features
        self.caches = random(2, BATCH, SIZE * LOCAL_MAX, KV_HEADS, DIM)
        if "k_scale" in features:
            self.caches = self.caches.to(torch.float8_e4m3fn)
        self.shards = [self.caches[:, :, rank::SIZE].clone() for rank in range(SIZE)]
        self.q = random(BATCH, HEADS, DIM)
        self.new = random(2, BATCH, KV_HEADS, DIM)
        self.lengths = torch.zeros(BATCH, dtype=torch.int32, device=device)
        self.settled = [
            settle(Ranks(group=None, rank=rank, size=SIZE), self.given(rank), self.lengths, ASKED,  # type: ignore[arg-type]
                   features)
            for rank in range(SIZE)
        ]  # fmt: skip

    def given(self, rank: int) -> tuple[Tensor, ...]:
        return self.q, *self.shards[rank], *self.new

    def step(self) -> tuple[Tensor, Tensor]:
        """What every rank does, and the merge."""
        parts = [Part.empty(self.q.shape, self.q.device) for _ in range(SIZE)]
        for rank, part in enumerate(parts):
            here = here_of(self.settled[rank], self.lengths, True, None)
            attend(self.settled[rank], self.given(rank), here, self.features, part)
        outs, lses = [part.out for part in parts], [part.lse for part in parts]
        return merge_states(outs, lses, out_dtype=self.q.dtype)

    def check(self, out: Tensor, lse: Tensor) -> None:
        """Compare with the step in one place, whose caches get the token as well."""
        wanted, sums = gqa_decode(
            self.q, *self.caches, *self.new, cache_seqlens=self.lengths, return_lse=True,
            **self.features,
        )  # fmt: skip
        assert torch.allclose(out, wanted, atol=2e-3, rtol=2e-3)
        assert torch.allclose(lse, sums, rtol=1e-5, atol=1e-5)
        for rank, shard in enumerate(self.shards):
            assert torch.equal(raw(shard), raw(self.caches)[:, :, rank::SIZE])


def _features(device: str) -> list[dict[str, Any]]:
    return [
        {"window_size": (7, -1), "sinks": torch.linspace(-1, 2, HEADS, device=device)},
        {"alibi_slopes": torch.linspace(0.01, 0.4, HEADS, device=device)},
        {"k_scale": torch.tensor([0.5, 0.7, 0.02], device=device), "v_scale": 0.4},
    ]


@pytest.mark.parametrize("which", [0, 1, 2], ids=["window-sinks", "alibi", "fp8"])
def test_parts_make_the_step(device: str, which: int) -> None:
    parts = Parts(device, _features(device)[which])
    for lengths in ([0, 1, 2, 23], [9, -1, 10, 11]):
        parts.lengths.copy_(torch.tensor(lengths))
        parts.check(*parts.step())


@pytest.mark.gpu
def test_a_captured_step_follows_the_lengths() -> None:
    parts = Parts("cuda", _features("cuda")[0])
    parts.check(*parts.step())  # which appends the token to the caches in one place, too
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = parts.step()
    for lengths in ([0, 1, 2, 23], [9, -1, 10, 11]):
        parts.lengths.copy_(torch.tensor(lengths))
        graph.replay()
        parts.check(out, lse)


@pytest.fixture
def alone() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
def test_a_layout_is_agreed_on_once_and_not_in_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    agreed = []
    agree = agreement.agree
    monkeypatch.setattr(agreement, "agree", lambda *given: agreed.append(given) or agree(*given))
    caches = torch.zeros(2, 1, 8, 1, DIM).half()
    q, k = torch.zeros(1, 4, DIM).half(), torch.zeros(1, 1, DIM).half()
    lengths = torch.zeros(1, dtype=torch.int32)
    mesh = dist.init_device_mesh("cpu", (1,))
    for group in (None, None, dist.group.WORLD, mesh):
        decode_context_parallel(q, *caches, k, k, cache_seqlens=lengths, group=group)
    assert len(agreed) == 1
    monkeypatch.setattr(agreement, "capturing", lambda device: True)
    decode_context_parallel(q, *caches, k, k, cache_seqlens=lengths)
    with pytest.raises(InputError, match="in a CUDA-graph capture; .* once before the capture"):
        decode_context_parallel(q, *caches, k, k, cache_seqlens=lengths, softcap=2.0)
