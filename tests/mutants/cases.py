"""Small problems that show planted bugs, and the kernels that solve them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from cases import Layout, Step, make_step, snapshot

from gqa_cutlass.codegen import ARCHES, DType, KernelConfig, Math, Schedule
from gqa_cutlass.codegen.schema.launch import Pdl
from gqa_cutlass.codegen.schema.policies import POLICIES, Policy
from gqa_cutlass.codegen.schema.problem import Problem
from gqa_cutlass.dispatch import Dispatch, dispatch, model_device


@dataclass(frozen=True, kw_only=True)
class Case:
    """A small problem, and the kernel that solves it."""

    math: Math = Math.TENSOROP
    head_dim: int = 64
    group_size: int = 4
    block_h: int = 8
    num_warps: int = 2
    num_stages: int = 1
    lengths: tuple[int, ...] = (100,)
    max_seq_len: int = 128
    heads: int = 1
    splits: int = 1
    layout: Layout = "NHD"
    append: bool = True
    schedule: Schedule = Schedule.MULTISTAGE
    stages: int | None = None  # of the launch, with tma
    pdl: Pdl = Pdl.NONE
    softcap: float = 0.0
    sinks: bool = False
    window: int | None = None  # tokens
    alibi: bool = False
    leftpad: tuple[int, ...] = ()  # of each sequence
    index: tuple[int, ...] = ()  # as many rows as sequences
    float32: bool = False  # the output
    pages: int = 0  # tokens of each
    e4m3: bool = False  # the caches

    @property
    def policies(self) -> tuple[Policy, ...]:
        asked = {
            "softcap": self.softcap, "sinks": self.sinks, "window_size": self.window,
            "alibi_slopes": self.alibi, "cache_leftpad": self.leftpad,
            "cache_batch_idx": self.index, "out_dtype": self.float32,
            "block_table": self.pages, "float8_e4m3fn": self.e4m3,
        }  # fmt: skip
        return tuple(policy for policy in POLICIES if asked.get(policy.feature))

    @property
    def config(self) -> KernelConfig:
        return KernelConfig(
            math=self.math, dtype=DType.F16, head_dim=self.head_dim, group_size=self.group_size,
            vec_width=8, block_h=self.block_h, block_n=16, num_warps=self.num_warps,
            num_stages=self.num_stages, schedule=self.schedule, pdl=self.pdl is not Pdl.NONE,
            policies=self.policies,
        )  # fmt: skip

    def dispatch(self, problem: Problem) -> Dispatch:
        """How the kernel is launched."""
        device = model_device(ARCHES["sm_90a"])
        chosen = dispatch(problem, device, self.splits, self.config, pdl=self.pdl is not Pdl.NONE)
        chosen = replace(chosen, pdl=self.pdl)
        if self.stages is None:
            return chosen
        shape = replace(chosen.shape, shared_bytes=self.config.shared_bytes_with(self.stages))
        return replace(chosen, num_stages=self.stages, shape=shape)

    def step(self) -> Step:
        step = make_step(
            head_dim=self.head_dim, group_size=self.group_size, lengths=list(self.lengths),
            max_seq_len=self.max_seq_len, num_kv_heads=self.heads, layout=self.layout,
            append=self.append, device="cpu",
        )  # fmt: skip
        step.softcap = self.softcap
        heads = self.heads * self.group_size
        if self.sinks:  # as much as all keys together, and different from head to head
            step.sinks = torch.linspace(3, 5, heads).half()
        if self.alibi:  # of each sequence's own heads
            step.alibi_slopes = torch.linspace(0.01, 0.5, len(self.lengths) * heads).view(-1, heads)
        if self.leftpad:
            step.cache_leftpad = torch.tensor(self.leftpad, dtype=torch.int32)
        if self.index:
            step.cache_batch_idx = torch.tensor(self.index, dtype=torch.int32)
            back = torch.argsort(step.cache_batch_idx)
            step.k_cache, step.v_cache = step.k_cache[back], step.v_cache[back]
            snapshot(step)
        if self.window is not None:  # what is hidden is not used, nor its NaN
            step.window_size = (self.window - 1, -1)
            for b, length in enumerate(self.lengths):
                hidden = max(0, length + self.append - self.window)
                step.k_cache[b, :hidden] = step.v_cache[b, :hidden] = float("nan")
            snapshot(step)
        if self.float32:
            step.in_float32()
        if self.pages:
            step.into_pages(self.pages)
        if self.e4m3:
            step.into_fp8(torch.float8_e4m3fn)
        return step


# Seven tiles for two warps: every ring is refilled.
PLAIN = Case()
TWO_STAGES = Case(num_stages=2)
TWO_HEADS = Case(heads=2, lengths=(20,))
FULL = Case(lengths=(127,))
READ_ONLY = Case(lengths=(125,), max_seq_len=125, append=False)
EMPTY = Case(lengths=(0, 5), append=False)
PADDED_ROWS = Case(lengths=(20,), layout="padded")
HEAD_BLOCKS = Case(group_size=16)
ONE_TILE = Case(lengths=(20,))
READ_ONE_TILE = Case(lengths=(20,), max_seq_len=24, append=False)
SPLIT = Case(splits=3)
SPLIT_HEADS = Case(splits=2, heads=2, lengths=(40,))
RAGGED = Case(splits=3, lengths=(100, 40, 5))
ODD_DIM = Case(head_dim=40, lengths=(9,))  # no multiple of the MMA's 16
ODD_EMPTY = Case(head_dim=40, lengths=(0,), append=False)
SIMT = Case(math=Math.SIMT, block_h=4, lengths=(70,))


def tma(**changes: Any) -> Case:
    """With tma: four warps, so a block takes 64 tokens at once."""
    defaults = {"num_warps": 4, "num_stages": 2, "schedule": Schedule.TMA}
    return Case(**(defaults | {"max_seq_len": changes["lengths"][0] + 8} | changes))


ONCE = tma(lengths=(50,))
WALK = tma(lengths=(200,), stages=1)
WALK_TWO_STAGES = tma(lengths=(230,))
CLUSTER = tma(lengths=(200,), splits=4)
CLUSTER_WALK = tma(lengths=(300,), splits=2)
TWO_OF_THREE_CLUSTERS = tma(lengths=(250,), splits=6)
IDLE_RANKS = tma(lengths=(5,), splits=4, max_seq_len=250)
ODD_BOXES = tma(head_dim=40, lengths=(100,), splits=8)

# Of launches that start before the one before them is done
WHOLE_PDL = Case(lengths=(20,), max_seq_len=24, pdl=Pdl.WHOLE)
END_PDL = Case(lengths=(20,), max_seq_len=24, pdl=Pdl.END)
PADDED_PDL = Case(head_dim=40, lengths=(9,), max_seq_len=16, layout="padded", pdl=Pdl.WHOLE)
CLUSTER_WHOLE_PDL = tma(lengths=(200,), splits=4, pdl=Pdl.WHOLE)
CLUSTER_END_PDL = tma(lengths=(200,), splits=4, pdl=Pdl.END)
ODD_BOXES_PDL = tma(head_dim=40, lengths=(100,), splits=8, pdl=Pdl.WHOLE)

# With features; caps so low that they matter
CAPPED = Case(softcap=1.0, lengths=(20,))
CAPPED_SIMT = Case(softcap=1.0, math=Math.SIMT, block_h=4, lengths=(20,))
CAPPED_CLUSTER = tma(softcap=1.0, lengths=(90,), splits=2)
SINK = Case(sinks=True, heads=2, lengths=(20,))
SINK_SPLIT = Case(sinks=True, splits=3)
SINK_HEAD_BLOCKS = Case(sinks=True, group_size=16)
SINK_CLUSTER = tma(sinks=True, lengths=(200,), splits=4)
SINK_OF_CLUSTERS = tma(sinks=True, lengths=(250,), splits=6)
IN_8_BITS = Case(e4m3=True, heads=2, lengths=(20,))
IN_8_BITS_CLUSTER = tma(e4m3=True, lengths=(90,), splits=2, append=False)
FLOAT32 = Case(float32=True, lengths=(20,))
FLOAT32_CLUSTER = tma(float32=True, lengths=(90,), splits=2)
WINDOWED = Case(window=39)
WINDOW_WALK = tma(lengths=(300,), window=200, stages=1)
WINDOW_ONCE = tma(lengths=(90,), window=39)
ALIBI = Case(alibi=True, heads=2, lengths=(20, 30))
ALIBI_CAPPED = Case(alibi=True, softcap=1.0, lengths=(20,))
ALIBI_CLUSTER = tma(alibi=True, lengths=(90,), splits=2, heads=2)
PADDED = Case(leftpad=(25, 0), lengths=(90, 40))
PADDED_AWAY = Case(leftpad=(70,), lengths=(30,))
PADDED_CLUSTER = tma(leftpad=(25,), lengths=(90,), splits=2)
PADDED_AWAY_ONCE = tma(leftpad=(70,), lengths=(30,))
INDEXED = Case(index=(1, 2, 0), lengths=(20, 30, 40))
INDEXED_CLUSTER = tma(index=(1, 0), lengths=(90, 40), splits=2)
PAGED = Case(pages=3, lengths=(99, 40))
PAGED_CLUSTER = tma(pages=48, lengths=(200, 40), splits=4)
PAGED_CLUSTERS = tma(pages=16, lengths=(262,), splits=6)  # fewer splits than there could be
PAGED_LONG = tma(pages=64, lengths=(2060,), stages=1)  # more tiles of a warp than lanes
CASES = {name: case for name, case in globals().items() if isinstance(case, Case)}
