"""Baselines: those that run here, and those whose times were recorded elsewhere.

Recorded times are those of baselines.json, which says where they come from. GPUs of a type differ
by some percent, so that a recorded time is scaled by how fast this run's GPU reads the same bytes.
"""

from __future__ import annotations

import importlib.util
import json
import math
from bisect import bisect_left
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.data import Data
from bench.points import Point, Ragged
from bench.timing import Attend

Adapter = Callable[[Data], Attend]  # outputs are [sequence, query head, head_dim]

PAGE = 16
_RECORD: dict[str, Any] = json.loads((Path(__file__).parent / "baselines.json").read_text())
NOT_SHIPPED = frozenset(_RECORD["not_shipped"])  # what no user of the baseline gets by calling it
SOURCE = {key: str(_RECORD[key]) for key in ("source", "gpu", "measured")}


def recorded(point: Point) -> dict[str, float]:
    """Recorded microseconds by baseline; baselines without a figure for the point are left out."""
    return {name: micros for name, micros, _ in _figures(point)}


def scaled(point: Point, floor: float) -> dict[str, float]:
    """Recorded microseconds by baseline, scaled to a run with this roofline at the point."""
    return {name: micros * floor / then for name, micros, then in _figures(point)}


def feature_recorded(feature: str, point: str) -> dict[str, float] | None:
    """Recorded microseconds of a point over "pages" or "fp8", our dense step among them, by name.

    None: the point was not recorded.
    """
    found = _RECORD[feature]
    figures = found["micros"].get(point)
    return None if figures is None else dict(zip(found["columns"], figures, strict=True))


def _figures(point: Point) -> list[tuple[str, float, float]]:
    """Baseline, its microseconds, and the roofline of its run."""
    found = []
    for run in _RECORD["runs"]:
        figures = run["micros"].get(str(point), [None] * len(run["columns"]))
        row = dict(zip(run["columns"], figures, strict=True))
        floor = row.get("floor") or floor_by_bytes(point.read_bytes)
        found += [(name, row[name], floor) for name in run["baselines"] if row[name] is not None]
    return found


def floor_by_bytes(num_bytes: int) -> float:
    """Recorded microseconds to read so many bytes.

    Between the sizes measured, and beyond them, time is taken to be a power of the size.
    """
    sizes, micros = zip(*_RECORD["floor_by_mib"], strict=True)
    mib = num_bytes / 2**20
    right = min(max(bisect_left(sizes, mib), 1), len(sizes) - 1)
    (x0, x1), (y0, y1) = (
        map(math.log, values[right - 1 : right + 1]) for values in (sizes, micros)
    )
    return math.exp(y0 + (y1 - y0) * (math.log(mib) - x0) / (x1 - x0))


def running(point: Point) -> dict[str, Adapter]:
    """Baselines that can be measured here: SDPA, and of the others those that are installed.

    SDPA has none for ragged points, for which it would need a mask or padding.
    """
    found = {} if isinstance(point, Ragged) else {n: sdpa(b) for n, b in SDPA.items()}
    absent = missing()
    return found | {name: made for name, (_, made) in INSTALLABLE.items() if name not in absent}


def missing() -> dict[str, str]:
    """Baselines that cannot be measured here, with the module that is not installed."""
    return {
        name: module
        for name, (module, _) in INSTALLABLE.items()
        if importlib.util.find_spec(module) is None
    }


def sdpa(backend: SDPBackend) -> Adapter:
    """PyTorch with one backend."""

    def adapter(data: Data) -> Attend:
        q = data.q[:, :, None]

        def attend(i: int) -> Tensor:
            k, v = data.k[i].transpose(1, 2), data.v[i].transpose(1, 2)
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)[:, :, 0]

        return attend

    return adapter


def flashinfer(data: Data) -> Attend:
    """FlashInfer's paged decode on tensor cores. Written from its documentation, never run here."""
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper

    point = data.point
    if point.head_dim not in (64, 128, 256):
        raise ValueError(f"FlashInfer faults at head_dim {point.head_dim}")
    attended = data.seqlens.cpu() + 1
    pages = -(-attended // PAGE)
    starts = torch.arange(point.batch) * (point.tokens // PAGE)
    used = [s + torch.arange(n) for s, n in zip(starts.tolist(), pages.tolist(), strict=True)]
    tables = F.pad(pages.cumsum(0), (1, 0)), torch.cat(used), attended - (pages - 1) * PAGE
    workspace = torch.zeros(128 << 20, dtype=torch.uint8, device=data.q.device)
    wrapper = BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True)
    heads = point.num_q_heads, point.num_kv_heads, point.head_dim
    kind = {"q_data_type": data.q.dtype, "kv_data_type": data.q.dtype}
    wrapper.plan(*(t.int().to(data.q.device) for t in tables), *heads, PAGE, **kind)
    caches = [
        [x.view(-1, PAGE, *x.shape[2:]) for x in both] for both in zip(data.k, data.v, strict=True)
    ]
    return lambda i: wrapper.run(data.q, tuple(caches[i]))


def flash_attn_3(data: Data) -> Attend:
    """FlashAttention-3, schedule precomputed. Written from its documentation, never run here."""
    from flash_attn_interface import flash_attn_with_kvcache, get_scheduler_metadata

    point, q, attended = data.point, data.q[:, None], data.seqlens + 1
    heads = point.num_q_heads, point.num_kv_heads, point.head_dim
    schedule = get_scheduler_metadata(
        point.batch, 1, point.tokens, *heads, attended, qkv_dtype=q.dtype
    )
    lengths = {"cache_seqlens": attended, "scheduler_metadata": schedule}
    return lambda i: flash_attn_with_kvcache(q, data.k[i], data.v[i], **lengths)[:, 0]


def flash_attn_2(data: Data) -> Attend:
    """FlashAttention-2. Written from its documentation, never run here."""
    from flash_attn import flash_attn_with_kvcache

    q, attended = data.q[:, None], data.seqlens + 1
    return lambda i: flash_attn_with_kvcache(q, data.k[i], data.v[i], cache_seqlens=attended)[:, 0]


def torch_varlen(data: Data) -> Attend:
    """PyTorch's attention of packed sequences, told how much of each is used where that differs."""
    from torch.nn.attention.varlen import varlen_attn

    point, device = data.point, data.q.device
    queries = torch.arange(point.batch + 1, dtype=torch.int32, device=device)
    rows = queries * point.tokens
    used = data.seqlens + 1 if isinstance(point, Ragged) else None

    def attend(i: int) -> Tensor:
        k, v = data.k[i].flatten(0, 1), data.v[i].flatten(0, 1)
        out = varlen_attn(
            data.q, k, v, queries, rows, 1, point.tokens, enable_gqa=True, seqused_k=used
        )
        assert isinstance(out, Tensor)  # no log-sum-exp was asked for
        return out

    return attend


SDPA = {"SDPA flash": SDPBackend.FLASH_ATTENTION, "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION}
# By name: the module that it needs, and how it attends.
INSTALLABLE: dict[str, tuple[str, Adapter]] = {
    "torch varlen": ("torch.nn.attention.varlen", torch_varlen),
    "FlashInfer": ("flashinfer", flashinfer),
    "FA3": ("flash_attn_interface", flash_attn_3),
    "FA2": ("flash_attn", flash_attn_2),
}
