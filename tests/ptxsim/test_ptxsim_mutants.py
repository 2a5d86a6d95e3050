"""ptxsim finds bugs: each one here is planted in the kernels' own source, compiled and run.

What breaks the rules of memory or of concurrency must end in a fault that names it. What only
computes something else must show in what the launch leaves behind.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
from cases import Layout, Step, make_step, snapshot
from helpers import THOROUGH
from torch import Tensor

from gqa_cutlass import api  # noqa: F401 - whose calls `check` knows
from gqa_cutlass.call.addresses import constants
from gqa_cutlass.call.executor import Task
from gqa_cutlass.call.given import Seen, see
from gqa_cutlass.call.layout import problem_of
from gqa_cutlass.call.options import TENSORS, check, fields_of
from gqa_cutlass.codegen import ARCHES, DType, KernelConfig, Math, Schedule, render
from gqa_cutlass.codegen.compile import compile_source
from gqa_cutlass.codegen.headers import include_dir
from gqa_cutlass.codegen.schema.launch import Pdl
from gqa_cutlass.codegen.schema.params import Params, TmaParams
from gqa_cutlass.codegen.schema.policies import CALL, POLICIES, Policy
from gqa_cutlass.codegen.schema.problem import Problem
from gqa_cutlass.cpu.executor import Checks, overreads, program_from, regions_of, run
from gqa_cutlass.dispatch import Dispatch, dispatch, model_device
from gqa_cutlass.errors import KernelFault
from gqa_cutlass.ptxsim.prepare import Program
from gqa_cutlass.tensormap import map_of

_MAX_STEPS = 10_000  # the longest of the runs that end takes a third of them
_INCLUDE = re.compile(r"#include <gqa/([\w/]+\.cuh)>\n")
_FOREIGN_INCLUDE = re.compile(r"#include <(?!gqa/).*>\n")


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

    @property
    def policies(self) -> tuple[Policy, ...]:
        asked = {
            "softcap": self.softcap, "sinks": self.sinks, "window_size": self.window,
            "alibi_slopes": self.alibi, "cache_leftpad": self.leftpad,
            "cache_batch_idx": self.index, "out_dtype": self.float32,
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


def _tma(**changes: Any) -> Case:
    """With tma: four warps, so a block takes 64 tokens at once."""
    defaults = {"num_warps": 4, "num_stages": 2, "schedule": Schedule.TMA}
    return Case(**(defaults | {"max_seq_len": changes["lengths"][0] + 8} | changes))


ONCE = _tma(lengths=(50,))
WALK = _tma(lengths=(200,), stages=1)
WALK_TWO_STAGES = _tma(lengths=(230,))
CLUSTER = _tma(lengths=(200,), splits=4)
CLUSTER_WALK = _tma(lengths=(300,), splits=2)
TWO_OF_THREE_CLUSTERS = _tma(lengths=(250,), splits=6)
IDLE_RANKS = _tma(lengths=(5,), splits=4, max_seq_len=250)
ODD_BOXES = _tma(head_dim=40, lengths=(100,), splits=8)

# Of launches that start before the one before them is done
WHOLE_PDL = Case(lengths=(20,), max_seq_len=24, pdl=Pdl.WHOLE)
END_PDL = Case(lengths=(20,), max_seq_len=24, pdl=Pdl.END)
PADDED_PDL = Case(head_dim=40, lengths=(9,), max_seq_len=16, layout="padded", pdl=Pdl.WHOLE)
CLUSTER_WHOLE_PDL = _tma(lengths=(200,), splits=4, pdl=Pdl.WHOLE)
CLUSTER_END_PDL = _tma(lengths=(200,), splits=4, pdl=Pdl.END)
ODD_BOXES_PDL = _tma(head_dim=40, lengths=(100,), splits=8, pdl=Pdl.WHOLE)

# With features; caps so low that they matter
CAPPED = Case(softcap=1.0, lengths=(20,))
CAPPED_SIMT = Case(softcap=1.0, math=Math.SIMT, block_h=4, lengths=(20,))
CAPPED_CLUSTER = _tma(softcap=1.0, lengths=(90,), splits=2)
SINK = Case(sinks=True, heads=2, lengths=(20,))
SINK_SPLIT = Case(sinks=True, splits=3)
SINK_HEAD_BLOCKS = Case(sinks=True, group_size=16)
SINK_CLUSTER = _tma(sinks=True, lengths=(200,), splits=4)
SINK_OF_CLUSTERS = _tma(sinks=True, lengths=(250,), splits=6)
FLOAT32 = Case(float32=True, lengths=(20,))
FLOAT32_CLUSTER = _tma(float32=True, lengths=(90,), splits=2)
WINDOWED = Case(window=39)
WINDOW_WALK = _tma(lengths=(300,), window=200, stages=1)
WINDOW_ONCE = _tma(lengths=(90,), window=39)
ALIBI = Case(alibi=True, heads=2, lengths=(20, 30))
ALIBI_CAPPED = Case(alibi=True, softcap=1.0, lengths=(20,))
ALIBI_CLUSTER = _tma(alibi=True, lengths=(90,), splits=2, heads=2)
PADDED = Case(leftpad=(25, 0), lengths=(90, 40))
PADDED_AWAY = Case(leftpad=(70,), lengths=(30,))
PADDED_CLUSTER = _tma(leftpad=(25,), lengths=(90,), splits=2)
PADDED_AWAY_ONCE = _tma(leftpad=(70,), lengths=(30,))
INDEXED = Case(index=(1, 2, 0), lengths=(20, 30, 40))
INDEXED_CLUSTER = _tma(index=(1, 0), lengths=(90, 40), splits=2)
CASES = {name: case for name, case in globals().items() if isinstance(case, Case)}


@dataclass(frozen=True, kw_only=True)
class Mutant:
    """One bug.

    Args:
        name: What is wrong.
        header: Where, in gqa/.
        old: Text that occurs once there.
        new: What it becomes.
        fault: What the fault says, a regular expression.
        wrong: What else the launch gets wrong, if there is no fault.
        case: What shows it.
    """

    name: str
    header: str
    old: str
    new: str
    fault: str = ""
    wrong: str = ""
    case: Case = PLAIN


_UNWRITTEN = "reads what another thread wrote"
_STILL_READ = "writes what another thread reads"
_TOO_EARLY = "an asynchronous copy has not finished"
_UNDER_WAY = "writes where an asynchronous copy is under way"
_GLOBAL_RACE = "race in global memory"
_NOT_KNOWN = "what an asynchronous copy wrote, which this thread does not know to have finished"

MUTANTS = (
    # The ring of tiles
    Mutant(
        name="no syncwarp behind the wait for a tile",
        header="load.cuh",
        old="cute::cp_async_wait<2 * T::kNumStages - 1>();\n    __syncwarp();",
        new="cute::cp_async_wait<2 * T::kNumStages - 1>();",
        fault=_UNWRITTEN,
    ),
    Mutant(
        name="keys refilled while other lanes read them",
        header="load.cuh",
        old="__syncwarp();\n    load_if(keys_",
        new="load_if(keys_",
        fault=f"{_STILL_READ}.* at ptx.cuh",
    ),
    Mutant(
        name="values refilled while other lanes read them",
        header="load.cuh",
        old="__syncwarp();\n    load_if(values_",
        new="load_if(values_",
        fault=f"{_STILL_READ}.* at ptx.cuh",
    ),
    Mutant(
        name="one group too many left in flight",
        header="load.cuh",
        old="cp_async_wait<2 * T::kNumStages - 1>",
        new="cp_async_wait<2 * T::kNumStages>",
        fault=_TOO_EARLY,
    ),
    Mutant(
        name="half of the lanes wait",
        header="load.cuh",
        old="cute::cp_async_wait<2 * T::kNumStages - 1>();",
        new="if (threadIdx.x % 32 < 16) cute::cp_async_wait<2 * T::kNumStages - 1>();",
        fault=_TOO_EARLY,
    ),
    Mutant(
        name="no group committed past the last tile",
        header="load.cuh",
        old="if (tile < w.num_tiles) rows.copy_tile(tile, w.first_token, w.num_cached, slot);\n"
        "    cute::cp_async_fence();",
        new="if (tile >= w.num_tiles) return;\n"
        "    rows.copy_tile(tile, w.first_token, w.num_cached, slot);\n"
        "    cute::cp_async_fence();",
        fault=_TOO_EARLY,
    ),
    Mutant(
        name="the slot at the head never moves on",
        header="load.cuh",
        old="stage_ = stage_ + 1 == T::kNumStages ? 0 : stage_ + 1;",
        new="",
        fault=_TOO_EARLY,
        case=TWO_STAGES,
    ),
    Mutant(
        name="keys and values share their slots",
        header="load.cuh",
        old="key_slot(stage) + KeyTile::kElements",
        new="key_slot(stage)",
        fault=_UNDER_WAY,
    ),
    Mutant(
        name="refilled with the next tile instead of the next but one",
        header="load.cuh",
        old="load_if(keys_, tile + T::kNumStages * w.tile_step()",
        new="load_if(keys_, tile + w.tile_step()",
        wrong="output",
        case=TWO_STAGES,
    ),
    Mutant(
        name="padding behind the rows not cleared",
        header="load.cuh",
        old="clear_padding<KeyTile>(key_slot(0));",
        new="",
        fault="reads shared memory that was never written.* at score.cuh",
        case=ODD_DIM,
    ),
    Mutant(
        name="partials over padding that other lanes clear",
        header="load.cuh",
        old="cute::cp_async_wait<0>();\n    __syncwarp();",
        new="cute::cp_async_wait<0>();",
        fault="writes over what another thread wrote.* at value.cuh",
        case=ODD_EMPTY,
    ),
    # Global memory
    Mutant(
        name="rows from one element further",
        header="load.cuh",
        old="<Vector<T> const*>(source + dim)",
        new="<Vector<T> const*>(source + dim + 1)",
        fault="global access not a multiple of 16 bytes.* at ptx.cuh",
    ),
    # The tile in which the sequence ends
    Mutant(
        name="the new key not put into its tile",
        header="decode.cuh",
        old="put_new_row<typename T::KeyTile>(token.key, left, keys);",
        new="",
        wrong="output",
    ),
    Mutant(
        name="the new value not put into its tile",
        header="decode.cuh",
        old="put_new_row<typename T::ValueTile>(token.value, left, values);",
        new="{}",
        wrong="output",
    ),
    Mutant(
        name="the new row put where the next one goes",
        header="decode.cuh",
        old="(left - 1, 0)",
        new="(left, 0)",
        wrong="output",
    ),
    Mutant(
        name="lanes score before the new row is there",
        header="decode.cuh",
        old="(left - 1, 0));\n  __syncwarp();",
        new="(left - 1, 0));",
        fault=_UNWRITTEN,
    ),
    Mutant(
        name="rows behind the end left as the cache has them",
        header="decode.cuh",
        old="clear_value_rows<T>(values, left);",
        new="",
        wrong="output",
        case=ONE_TILE,
    ),
    Mutant(
        name="rows cleared while lanes go on",
        header="decode.cuh",
        old="clear_value_rows<T>(values, left);\n"
        "      if (w.appends) put_new_row<typename T::ValueTile>(token.value, left, values);\n"
        "      __syncwarp();",
        new="clear_value_rows<T>(values, left);",
        fault=_UNWRITTEN,
        case=READ_ONE_TILE,
    ),
    Mutant(
        name="queries past the group read",
        header="score.cuh",
        old="n * 8 + lane / 4 < last ? n * 8 + lane / 4 : last;",
        new="n * 8 + lane / 4;",
        fault="outside all tensors.* past the end of q .* at score.cuh",
    ),
    Mutant(
        name="queries read past the head_dim",
        header="score.cuh",
        old="bool const padding = i * 8 >= T::kHeadDim;",
        new="bool const padding = false;",
        fault="outside all tensors.* past the end of q .* at score.cuh",
        case=ODD_DIM,
    ),
    Mutant(
        name="appended one row too early",
        header="cache_dense.cuh",
        old="w.num_cached * stride.token",
        new="(w.num_cached - 1) * stride.token",
        wrong="caches",
    ),
    Mutant(
        name="appended one row too late",
        header="cache_dense.cuh",
        old="w.num_cached * stride.token",
        new="w.num_tokens * stride.token",
        wrong="caches",
    ),
    Mutant(
        name="appended behind the cache",
        header="cache_dense.cuh",
        old="w.num_cached * stride.token",
        new="w.num_tokens * stride.token",
        fault="outside all tensors.* past the end of k_cache.* at row.cuh",
        case=FULL,
    ),
    Mutant(
        name="more appended than there is",
        header="row.cuh",
        old="at < kVecs)",
        new="at <= kVecs)",
        fault="outside all tensors.* past the end of k_new.* at row.cuh",
    ),
    Mutant(
        name="every block of a KV head appends",
        header="decode.cuh",
        old="if (w.head_block == 0) token.append(p, w);",
        new="token.append(p, w);",
        fault=f"{_GLOBAL_RACE}.* of k_cache.* at row.cuh",
        case=HEAD_BLOCKS,
    ),
    Mutant(
        name="every split of a cluster appends",
        header="decode_tma.cuh",
        old="if (w.split == 0 && w.head_block == 0) token.append(p.decode, w);",
        new="token.append(p.decode, w);",
        fault=f"{_GLOBAL_RACE}.* of k_cache.* at row.cuh",
        case=CLUSTER,
    ),
    Mutant(
        name="nothing appended",
        header="decode.cuh",
        old="if (w.head_block == 0) token.append(p, w);",
        new="",
        wrong="caches",
    ),
    Mutant(
        name="output rows as if they were dense",
        header="output.cuh",
        old="head * p.out_stride.head",
        new="head * T::kHeadDimV",
        fault="outside all tensors.* at output.cuh",
        case=PADDED_ROWS,
    ),
    Mutant(
        name="heads counted from the block's first",
        header="output.cuh",
        old="int const head = w.first_head() + s.head;",
        new="int const head = s.head;",
        fault=f"{_GLOBAL_RACE}.* of (out|lse).* at output.cuh",
        case=TWO_HEADS,
    ),
    Mutant(
        name="lse of the neighbour",
        header="output.cuh",
        old="num_q_heads + head]",
        new="num_q_heads + (head ^ 1)]",
        wrong="lse",
    ),
    Mutant(
        name="shared memory used behind its end",
        header="decode.cuh",
        old="<SharedStorage<T>*>(storage)",
        new="<SharedStorage<T>*>(storage + 16)",
        fault="outside the block's .* bytes of shared memory",
        case=SPLIT,
    ),
    # Warps and blocks meet
    Mutant(
        name="no barrier before warps merge",
        header="decode.cuh",
        old="start_next_kernel();\n  __syncthreads();",
        new="start_next_kernel();",
        fault=f"{_UNWRITTEN}.* at merge.cuh",
    ),
    Mutant(
        name="no barrier before the count",
        header="combine.cuh",
        old="  __syncthreads();\n  if (threadIdx.x == 0) {",
        new="  if (threadIdx.x == 0) {",
        fault=f"{_GLOBAL_RACE}.* of split_workspace",
        case=SPLIT,
    ),
    Mutant(
        name="no barrier behind the count",
        header="combine.cuh",
        old="  __syncthreads();\n  return shared_answer;",
        new="  return shared_answer;",
        fault=f"({_UNWRITTEN}|never written).* at combine.cuh",
        case=SPLIT,
    ),
    Mutant(
        name="a barrier for one warp only",
        header="combine.cuh",
        old="  __syncthreads();\n  return shared_answer;",
        new="  if (threadIdx.x < 32) __syncthreads();\n  return shared_answer;",
        fault=f"({_UNWRITTEN}|never written).* at combine.cuh",
        case=SPLIT,
    ),
    Mutant(
        name="one warp leaves before the barrier",
        header="merge.cuh",
        old="if (alone || !arrives_last",
        new="if (alone || threadIdx.x < 32 || !arrives_last",
        fault="unbalanced barrier 0: 32 threads of the block have exited.* at combine.cuh",
        case=SPLIT,
    ),
    Mutant(
        name="half of the lanes meet",
        header="load.cuh",
        old="cute::cp_async_wait<2 * T::kNumStages - 1>();\n    __syncwarp();",
        new="cute::cp_async_wait<2 * T::kNumStages - 1>();\n"
        "    if (threadIdx.x % 32 < 16) __syncwarp();",
        fault="deadlock: .* wait for the rest of its warp in `bar.warp.sync` at",
    ),
    Mutant(
        name="only lanes whose maximum grows rescale",
        header="softmax.cuh",
        old="if (__any_sync(0xffffffffu, grows)) raise",
        new="if (grows) raise",
        fault="deadlock: .* wait for the rest of its warp",
    ),
    Mutant(
        name="a count that orders nothing",
        header="ptx.cuh",
        old="atom.acq_rel.gpu",
        new="atom.relaxed.gpu",
        fault=f"{_GLOBAL_RACE}.* of split_workspace",
        case=SPLIT,
    ),
    Mutant(
        name="a count that does not release",
        header="ptx.cuh",
        old="atom.acq_rel.gpu",
        new="atom.acquire.gpu",
        fault=f"{_GLOBAL_RACE}.* of split_workspace",
        case=SPLIT,
    ),
    Mutant(
        name="a count that does not acquire",
        header="ptx.cuh",
        old="atom.acq_rel.gpu",
        new="atom.release.gpu",
        fault=f"{_GLOBAL_RACE}.* of split_workspace",
        case=SPLIT,
    ),
    Mutant(
        name="a count for the block alone",
        header="ptx.cuh",
        old="atom.acq_rel.gpu",
        new="atom.acq_rel.cta",
        fault=f"{_GLOBAL_RACE}.* of split_workspace",
        case=SPLIT,
    ),
    Mutant(
        name="a count that is no atomic",
        header="combine.cuh",
        old="atomic_inc_acq_rel(counter, last) == last",
        new="(*counter)++ == last",
        fault=f"{_GLOBAL_RACE}.* of merge_counters",
        case=SPLIT,
    ),
    Mutant(
        name="whoever comes first merges",
        header="combine.cuh",
        old="atomic_inc_acq_rel(counter, last) == last",
        new="atomic_inc_acq_rel(counter, last) == 0",
        fault=f"{_GLOBAL_RACE}.* of split_workspace",
        case=SPLIT,
    ),
    Mutant(
        name="nobody merges",
        header="combine.cuh",
        old="last = count - 1;",
        new="last = count;",
        wrong="output",
        case=SPLIT,
    ),
    Mutant(
        name="counters not back at zero",
        header="combine.cuh",
        old="atomic_inc_acq_rel(counter, last)",
        new="atomic_inc_acq_rel(counter, last + 1)",
        wrong="merge_counters",
        case=SPLIT,
    ),
    Mutant(
        name="heads share a counter",
        header="tile_scheduler.cuh",
        old="int64_t(batch) * gridDim.x + blockIdx.x;",
        new="batch;",
        fault=_GLOBAL_RACE,
        case=SPLIT_HEADS,
    ),
    Mutant(
        name="heads share their partials",
        header="tile_scheduler.cuh",
        old="int64_t(blockIdx.x) * gridDim.y * gridDim.z + first_part;",
        new="first_part;",
        fault=f"{_GLOBAL_RACE}.* of split_workspace",
        case=SPLIT_HEADS,
    ),
    Mutant(
        name="partials of splits that have none",
        header="merge.cuh",
        old="store.merge(w.num_splits, s)",
        new="store.merge(p.num_splits, s)",
        fault="never written before.* of split_workspace",
        case=RAGGED,
    ),
    Mutant(
        name="splits without work go on",
        header="decode.cuh",
        old="  if (w.split >= w.num_splits) return ring.drain();\n",
        new="",
        fault=f"{_GLOBAL_RACE}.* of (out|lse).* at output.cuh",
        case=RAGGED,
    ),
    Mutant(
        name="the last split left out",
        header="combine.cuh",
        old="bool const exists = first + i < num_parts;",
        new="bool const exists = first + i < num_parts - 1;",
        wrong="output",
        case=SPLIT,
    ),
    Mutant(
        name="splits merged without their maxima",
        header="combine.cuh",
        old="exp2_approx(max_sum[i].x - next.max)",
        new="1.f",
        wrong="output",
        case=SPLIT,
    ),
    Mutant(
        name="partials of heads overlap",
        header="traits.cuh",
        old="kPartialPitch = kHeadDimV + 4;",
        new="kPartialPitch = kHeadDimV - 4;",
        fault="race: writes .* at value.cuh",
    ),
    Mutant(
        name="no end",
        header="decode.cuh",
        old="tile += w.tile_step()",
        new="tile += 0",
        fault=f"no end after {_MAX_STEPS} instructions",
    ),
    Mutant(
        name="accumulators without a first value",
        header="value.cuh",
        old="float out[kDimTiles][kHeadTiles][4] = {};",
        new="float out[kDimTiles][kHeadTiles][4];",
        fault="register .* is read and was never written.* at value.cuh",
    ),
    # CUDA cores
    Mutant(
        name="queries used before they are there",
        header="score.cuh",
        old="    __syncthreads();\n",
        new="",
        fault=f"({_UNWRITTEN}|never written).* at score.cuh",
        case=SIMT,
    ),
    Mutant(
        name="probabilities used before they are there",
        header="value.cuh",
        old="p[h][lane] = probability[h][0];\n    }\n    __syncwarp();",
        new="p[h][lane] = probability[h][0];\n    }",
        fault=f"{_UNWRITTEN}.* at value.cuh",
        case=SIMT,
    ),
    Mutant(
        name="lanes that share a token not summed",
        header="score.cuh",
        old="for (int bit = T::kBlockN; bit < kWarpSize; bit *= 2)",
        new="for (int bit = T::kBlockN; bit < T::kBlockN; bit *= 2)",
        wrong="output",
        case=SIMT,
    ),
    # Arithmetic
    Mutant(
        name="a token past the end attended",
        header="mask_whole.cuh",
        old="at.token < at.end",
        new="at.token <= at.end",
        wrong="output",
    ),
    Mutant(
        name="halves of the queries swapped",
        header="score.cuh",
        old="query[i / 2][n][i % 2] =",
        new="query[i / 2][n][1 - i % 2] =",
        wrong="output",
    ),
    Mutant(
        name="rows of the keys from the wrong lanes",
        header="score.cuh",
        old="lane % 16, lane / 16)",
        new="lane / 2, lane % 2)",
        wrong="output",
    ),
    Mutant(
        name="scale forgotten",
        header="logit_scaled.cuh",
        old="dot * scale_log2",
        new="dot",
        wrong="output",
    ),
    Mutant(
        name="values not transposed",
        header="element_native.cuh",
        old="cute::SM75_U16x8_LDSM_T",
        new="cute::SM75_U32x4_LDSM_N",
        wrong="output",
    ),
    Mutant(
        name="output not rescaled",
        header="softmax.cuh",
        old="    rescale(factor);\n",
        new="",
        wrong="output",
    ),
    Mutant(
        name="sum not rescaled",
        header="softmax.cuh",
        old="row_sum[h] *= factor[h];",
        new="",
        wrong="output",
    ),
    Mutant(
        name="maximum over the wrong lanes",
        header="softmax.cuh",
        old="__shfl_xor_sync(0xffffffffu, tile_max[h], bit)",
        new="__shfl_xor_sync(0xffffffffu, tile_max[h], bit / 2)",
        wrong="output",
    ),
    Mutant(
        name="sum over half of the lanes",
        header="softmax.cuh",
        old="bit <= T::kLastLaneBit; bit *= 2) {\n        sum",
        new="bit < T::kLastLaneBit; bit *= 2) {\n        sum",
        wrong="output",
    ),
    Mutant(
        name="no finite maximum of no scores",
        header="traits.cuh",
        old="kNoMax = -3.402823466e+38f",
        new="kNoMax = -cuda::std::numeric_limits<float>::infinity()",
        wrong="output",
        case=EMPTY,
    ),
)

_NEXT = """\
    int const next = tile + params_.decode.num_stages * w.tile_step();
    if (next < w.num_tiles) {
      """

TMA_MUTANTS = (
    # The ring of tiles
    Mutant(
        name="keys used before they have landed",
        header="load_tma.cuh",
        old="barrier_wait(keys_barrier(stage_), parity_);",
        new="",
        fault=f"reads {_NOT_KNOWN}",
        case=ONCE,
    ),
    Mutant(
        name="values used before they have landed",
        header="load_tma.cuh",
        old="barrier_wait(values_barrier(stage_), parity_);",
        new="",
        fault=f"reads {_NOT_KNOWN}",
        case=WALK,
    ),
    Mutant(
        name="half of a tile expected",
        header="load_tma.cuh",
        old="Tile::kElements * int(sizeof(Element)));\n    Box at",
        new="Tile::kElements);\n    Box at",
        fault="deadlock: .* wait for mbarrier .* -1024 bytes from the end of phase 0",
        case=ONCE,
    ),
    Mutant(
        name="more than a tile expected",
        header="load_tma.cuh",
        old="Tile::kElements * int(sizeof(Element)));\n    Box at",
        new="Tile::kElements * int(sizeof(Element)) + 16);\n    Box at",
        fault="deadlock: .* wait for mbarrier .* 16 bytes from the end of phase 0",
        case=ONCE,
    ),
    Mutant(
        name="phases not told apart",
        header="load_tma.cuh",
        old="parity_ ^= 1;",
        new="",
        fault="deadlock: .* wait for mbarrier",
        case=WALK,
    ),
    Mutant(
        name="as many stages as there may be, not as there are",
        header="load_tma.cuh",
        old="if (++stage_ == params_.decode.num_stages) {",
        new="if (++stage_ == T::kNumStages) {",
        fault="mbarrier that was not initialised",
        case=WALK,
    ),
    Mutant(
        name="refilled before it is read",
        header="decode_tma.cuh",
        old="score(ring.wait_keys(), {left, left - 1 + w.appends}, "
        "Logits<T>(p.decode, bias), scores);\n"
        "    hide_padding<T>(w, tile, scores);\n    ring.refill_keys(w, tile);",
        new="auto const* keys = ring.wait_keys();\n    ring.refill_keys(w, tile);\n"
        "    score(keys, {left, left - 1 + w.appends}, Logits<T>(p.decode, bias), scores);",
        fault=f"reads {_NOT_KNOWN}",
        case=WALK,
    ),
    Mutant(
        name="keys refilled while other lanes read them, by a copy",
        header="load_tma.cuh",
        old=f"__syncwarp();\n{_NEXT}load<KeyTile>(params_.keys",
        new=f"{_NEXT}load<KeyTile>(params_.keys",
        fault=_STILL_READ,
        case=WALK,
    ),
    Mutant(
        name="values refilled while other lanes read them, by a copy",
        header="load_tma.cuh",
        old=f"__syncwarp();\n{_NEXT}load<ValueTile>(params_.values",
        new=f"{_NEXT}load<ValueTile>(params_.values",
        fault=_STILL_READ,
        case=WALK,
    ),
    Mutant(
        name="the next tile instead of the one a ring later",
        header="load_tma.cuh",
        old="first_tile + stage * w.tile_step();",
        new="first_tile + stage;",
        wrong="output",
        case=WALK_TWO_STAGES,
    ),
    Mutant(
        name="lanes do not wait for the barriers to be ready",
        header="load_tma.cuh",
        old="barrier_init_fence();\n    }\n    __syncwarp();",
        new="barrier_init_fence();\n    }",
        fault=f"{_UNWRITTEN}.* in `mbarrier.try_wait",
        case=ONCE,
    ),
    Mutant(
        name="warps share their slots",
        header="storage_tma.cuh",
        old="(stage * T::kNumWarps + warp) * T::kPairElements",
        new="(stage * T::kNumWarps + warp) * T::KeyTile::kElements",
        fault=f"writes over {_NOT_KNOWN}",
        case=ONCE,
    ),
    Mutant(
        name="a block leaves while its first tile is under way",
        header="decode_tma.cuh",
        old="return ring.drain();",
        new="return;",
        fault="exits while an asynchronous copy writes",
        case=IDLE_RANKS,
    ),
    Mutant(
        name="a warp without tokens leaves its tile under way",
        header="single_tile.cuh",
        old="    ring.drain();\n",
        new="",
        fault="exits while an asynchronous copy writes",
        case=_tma(lengths=(5,), max_seq_len=64),
    ),
    Mutant(
        name="rows past the end not cleared",
        header="single_tile.cuh",
        old="if (left < T::kBlockN) clear_rows<T>(values, left);",
        new="",
        wrong="output",
        case=ONCE,
    ),
    Mutant(
        name="rows used while other lanes clear them",
        header="decode_tma.cuh",
        old="clear_rows<T>(values, left);\n      __syncwarp();",
        new="clear_rows<T>(values, left);",
        fault=_UNWRITTEN,
        case=WALK,
    ),
    Mutant(
        name="one row too many cleared",
        header="load_tma.cuh",
        old="for (int i = first * kChunks + lane;",
        new="for (int i = (first - 1) * kChunks + lane;",
        wrong="output",
        case=ONCE,
    ),
    Mutant(
        name="another swizzle than the copy engine's",
        header="tile.cuh",
        old="cute::Swizzle<3, 4, 3>",
        new="cute::Swizzle<2, 4, 3>",
        wrong="output",
        case=ONCE,
    ),
    Mutant(
        name="a box that nobody asks for",
        header="load_tma.cuh",
        old="for (int box = 0; box < Tile::kBoxes; ++box) {\n        cute::SM90",
        new="for (int box = 1; box < Tile::kBoxes; ++box) {\n        cute::SM90",
        fault="deadlock: nobody can go on",
        case=ODD_BOXES,
    ),
    # Warps meet
    Mutant(
        name="maxima used before all warps have theirs",
        header="single_tile.cuh",
        old="publish<T>(max, shared.row_max);\n  __syncthreads();",
        new="publish<T>(max, shared.row_max);",
        fault=f"({_UNWRITTEN}|never written).* at single_tile.cuh",
        case=ONCE,
    ),
    Mutant(
        name="probabilities used before all warps have theirs",
        header="single_tile.cuh",
        old="    ring.drain();\n  }\n  __syncthreads();",
        new="    ring.drain();\n  }",
        fault=f"({_UNWRITTEN}|never written).* at single_tile.cuh",
        case=ONCE,
    ),
    Mutant(
        name="a token past the end of the cache attended",
        header="single_tile.cuh",
        old="int const left = w.num_cached - w.first_tile(warp) * T::kBlockN;",
        new="int const left = w.num_tokens - w.first_tile(warp) * T::kBlockN;",
        wrong="output",
        case=ONCE,
    ),
    Mutant(
        name="what a block keeps used before it is there",
        header="cluster_combine.cuh",
        old="if (alone()) __syncthreads();",
        new="",
        fault=f"({_UNWRITTEN}|never written).* at cluster_combine.cuh",
        case=ONCE,
    ),
    # Blocks meet
    Mutant(
        name="sent before the other blocks are ready",
        header="decode_tma.cuh",
        old="if (w.log_cluster_size > 0) cute::cluster_wait();",
        new="",
        fault="uses what another thread wrote.* in `st.async",
        case=CLUSTER,
    ),
    Mutant(
        name="merged before the cluster's parts have come",
        header="cluster_combine.cuh",
        old="if (!alone()) barrier_wait(shared_.combine_barrier, 0);",
        new="",
        fault=f"reads {_NOT_KNOWN}.* at cluster_combine.cuh",
        case=CLUSTER,
    ),
    Mutant(
        name="maxima and sums not expected",
        header="cluster_combine.cuh",
        old="num_own_dims() * num_pairs_ + work_.num_heads();",
        new="num_own_dims() * num_pairs_;",
        fault="deadlock: .* wait for mbarrier .* -128 bytes from the end of phase 0",
        case=CLUSTER,
    ),
    Mutant(
        name="nothing expected",
        header="decode_tma.cuh",
        old="    cluster_combine.expect();\n",
        new="",
        fault="deadlock: .* wait for mbarrier .* 1 arrivals and -1088 bytes",
        case=CLUSTER_WALK,
    ),
    Mutant(
        name="completed on the sender's barrier",
        header="cluster_combine.cuh",
        old="            in_block(shared_.combine_barrier, owner), exists};",
        new="            in_block(shared_.combine_barrier, work_.rank), exists};",
        fault="the mbarrier lies in another block than the data",
        case=CLUSTER,
    ),
    Mutant(
        name="every block sends to where the first one does",
        header="cluster_combine.cuh",
        old="out(work_.rank, dim - owner * num_dims_, pair)",
        new="out(0, dim - owner * num_dims_, pair)",
        fault="race: writes with another thread .* in `st.async",
        case=CLUSTER,
    ),
    Mutant(
        name="dims sent to the block behind their owner",
        header="cluster_combine.cuh",
        old="owner = dim / own_dims(log);",
        new="owner = (dim + 1) / own_dims(log);",
        fault="mapa: block 4 of a cluster of 4.* at cluster_combine.cuh",
        case=CLUSTER,
    ),
    Mutant(
        name="every cluster brings in the new token",
        header="cluster_combine.cuh",
        old="this->appends && cluster == 0 && is_token;",
        new="this->appends;",
        wrong="output",
        case=TWO_OF_THREE_CLUSTERS,
    ),
    Mutant(
        name="no cluster brings in the new token",
        header="cluster_combine.cuh",
        old="this->appends && cluster == 0 && is_token;",
        new="false;",
        wrong="output",
        case=CLUSTER,
    ),
    Mutant(
        name="scores of the new token used before they are there",
        header="cluster_combine.cuh",
        old="shared_.new_score[warp]);\n      __syncwarp();",
        new="shared_.new_score[warp]);",
        fault=f"({_UNWRITTEN}|never written).* at cluster_combine.cuh",
        case=ONCE,
    ),
    Mutant(
        name="blocks of a cluster share a counter",
        header="cluster_combine.cuh",
        old="arrives_last(p.merge_counters + index,",
        new="arrives_last(p.merge_counters + work_.head_index(),",
        fault=f"{_GLOBAL_RACE}.* of split_workspace",
        case=TWO_OF_THREE_CLUSTERS,
    ),
    Mutant(
        name="blocks of a cluster share their partials",
        header="cluster_combine.cuh",
        old="(p.split_workspace, index * parts,",
        new="(p.split_workspace, work_.head_index() * parts,",
        fault=f"{_GLOBAL_RACE}.* of split_workspace",
        case=TWO_OF_THREE_CLUSTERS,
    ),
    Mutant(
        name="clusters that have no part waited for",
        header="cluster_combine.cuh",
        old="arrives_last(p.merge_counters + index, work_.num_clusters,",
        new="arrives_last(p.merge_counters + index, parts,",
        wrong="output",
        case=TWO_OF_THREE_CLUSTERS,
    ),
    Mutant(
        name="barriers not announced to the other blocks",
        header="ptx_sm90.cuh",
        old='asm volatile("fence.mbarrier_init.release.cluster;" : : : "memory");',
        new="",
        fault="uses what another thread wrote.* in `st.async",
        case=CLUSTER,
    ),
)
_TOO_SOON = "before griddepcontrol.wait: the kernel before this one may not be done"
_FOLLOW = """\
  if constexpr (T::kPdl) {
    follow_previous_kernel(p.pdl, [&] { ring.prefetch(p, first_tile); });
  }
"""
_LENGTH = "  int const length = Work<T>::read_length(p);\n"
_FOLLOW_TMA = """\
    follow_previous_kernel(p.decode.pdl, [&] { ring.prefetch(first_tile); });
"""
_LENGTH_TMA = "    length = Work<T>::read_length(p.decode);\n"
_START, _START_TMA = "  ring.start(p, first_tile);\n", "  ring.start(first_tile);\n"
_WAIT = "  wait_for_previous_kernel();\n"

DEPENDENT_MUTANTS = (
    # Before the wait
    Mutant(
        name="the length read before the wait",
        header="decode.cuh",
        old=_FOLLOW + _LENGTH,
        new=_LENGTH + _FOLLOW,
        fault=f"global memory is read {_TOO_SOON}; at byte 0 of seqlens.* at tile_scheduler.cuh",
        case=WHOLE_PDL,
    ),
    Mutant(
        name="the length read before the wait of a cluster",
        header="decode_tma.cuh",
        old=_FOLLOW_TMA + _LENGTH_TMA,
        new=_LENGTH_TMA + _FOLLOW_TMA,
        fault=f"global memory is read {_TOO_SOON}; at byte 0 of seqlens.* at tile_scheduler.cuh",
        case=CLUSTER_WHOLE_PDL,
    ),
    Mutant(
        name="the first tile asked for before the wait",
        header="decode.cuh",
        old=_FOLLOW + _LENGTH + _START,
        new=_START + _FOLLOW + _LENGTH,
        fault=f"global memory is read {_TOO_SOON}; at byte 0 of k_cache.* in `cp.async.c",
        case=END_PDL,
    ),
    Mutant(
        name="the first tile asked for before the wait by a copy",
        header="decode_tma.cuh",
        old=f"{_FOLLOW_TMA}{_LENGTH_TMA}  }}\n{_START_TMA}",
        new=f"{_START_TMA}{_FOLLOW_TMA}{_LENGTH_TMA}  }}\n",
        fault=f"global memory is read {_TOO_SOON}; at byte 0 of k_cache.* in `cp.async.bulk.tensor",
        case=CLUSTER_END_PDL,
    ),
    Mutant(
        name="a tile brought to the block instead of to L2",
        header="load.cuh",
        old="      keys_.prefetch_tile(first_tile, p.prefetch_limit);\n",
        new="      keys_.copy_tile(first_tile, 0, p.prefetch_limit, key_slot(0));\n",
        fault=f"global memory is read {_TOO_SOON}; at byte 0 of k_cache.* in `cp.async.c",
        case=WHOLE_PDL,
    ),
    Mutant(
        name="waits only if it may start the next kernel at once",
        header="pdl.cuh",
        old=f"{_WAIT}  if (pdl == Pdl::kWhole) start_next_kernel();\n",
        new=f"  if (pdl != Pdl::kWhole) return;\n{_WAIT}  start_next_kernel();\n",
        fault=f"global memory is read {_TOO_SOON}; at byte 0 of seqlens",
        case=END_PDL,
    ),
    Mutant(
        name="one warp waits for all of the block",
        header="pdl.cuh",
        old=_WAIT,
        new="  if (threadIdx.x < 32) wait_for_previous_kernel();\n  __syncthreads();\n",
        fault=f"global memory is read {_TOO_SOON}.* warp 1, lane 0",
        case=CLUSTER_WHOLE_PDL,
    ),
    # What is prefetched
    Mutant(
        name="rows past the end of the cache prefetched",
        header="load.cuh",
        old="if (token < (tile + 1) * T::kBlockN && token < end) {",
        new="if (token < (tile + 1) * T::kBlockN) {",
        fault="outside all tensors; 0 bytes past the end of k_cache.* in `cp.async.bulk.prefetch",
        case=WHOLE_PDL,
    ),
    Mutant(
        name="padding behind the rows prefetched",
        header="load.cuh",
        old="kRowBytes = Tile::kDims * int(",
        new="kRowBytes = Tile::kDimsPadded * int(",
        fault="outside all tensors; at byte 80 of k_cache.* in `cp.async.bulk.prefetch",
        case=PADDED_PDL,
    ),
    Mutant(
        name="rows prefetched from one element further",
        header="load.cuh",
        old="prefetch_to_l2(row(token), kRowBytes);",
        new="prefetch_to_l2(row(token) + 1, kRowBytes);",
        fault="global access not a multiple of 16 bytes.* in `cp.async.bulk.prefetch.L2",
        case=PADDED_PDL,
    ),
    Mutant(
        name="bytes taken for elements",
        header="load.cuh",
        old="Tile::kDims * int(sizeof(typename T::Element));",
        new="Tile::kDims;",
        fault="cp.async.bulk: 40 bytes; allowed: positive multiples of 16",
        case=PADDED_PDL,
    ),
    Mutant(
        name="a prefetch of another rank than the map's",
        header="load_tma.cuh",
        old="using Prefetch = cute::SM90_TMA_LOAD_5D::PREFETCH;\n"
        "      Prefetch::copy(&map, 0, at.token, 0, at.head, at.sequence);",
        new="using Prefetch = cute::SM90_TMA_LOAD_4D::PREFETCH;\n"
        "      Prefetch::copy(&map, 0, at.token, at.head, at.sequence);",
        fault="tensor map of 5 dimensions, and coordinates of 4",
        case=CLUSTER_WHOLE_PDL,
    ),
    Mutant(
        name="a prefetch by boxes as if they were pieces of 8 bytes",
        header="load_tma.cuh",
        old="Prefetch::copy(&map, box * kBoxDims, at.token",
        new="Prefetch::copy(&map, box * kBoxDims + 4, at.token",
        fault="innermost coordinate 4, byte 8; .* in `cp.async.bulk.prefetch.tensor.4d",
        case=ODD_BOXES_PDL,
    ),
)
FEATURE_MUTANTS = (
    Mutant(
        name="a cap without the scale",
        header="logit_softcap.cuh",
        old="tanhf(dot * in)",
        new="tanhf(dot)",
        wrong="output",
        case=CAPPED,
    ),
    Mutant(
        name="a cap that does not scale back",
        header="logit_softcap.cuh",
        old="return out * tanhf",
        new="return tanhf",
        wrong="output",
        case=CAPPED_SIMT,
    ),
    Mutant(
        name="capped after the mask",
        header="logits.cuh",
        old="bias(logit(dot, head, at), head, at);\n    return mask.sees(at) ? s : -kInfinity;",
        new="logit(mask.sees(at) ? dot : -kInfinity, head, at);\n    return s;",
        wrong="output",
        case=CAPPED,
    ),
    Mutant(
        name="a new token in a cluster without the cap",
        header="score.cuh",
        old="logit(sum[0][h / 2][h % 2] + sum[1][h / 2][h % 2], h, {0, 1, 0});",
        new="(sum[0][h / 2][h % 2] + sum[1][h / 2][h % 2]) * logit.logit.in * logit.logit.out;",
        wrong="output",
        case=CAPPED_CLUSTER,
    ),
    Mutant(
        name="a sink that is scaled",
        header="output_sink.cuh",
        old="* kLog2E;",
        new="* p.scale_log2;",
        wrong="output",
        case=SINK,
    ),
    Mutant(
        name="a sink in units of log2",
        header="output_sink.cuh",
        old=" * kLog2E;",
        new=";",
        wrong="lse",
        case=SINK,
    ),
    Mutant(
        name="a sink that counts for the output alone",
        header="output.cuh",
        old="(r.max + log2f(r.sum)) * kLn2",
        new="(r.max + log2f(r.sum - exp2_approx(-r.max))) * kLn2",
        wrong="lse",
        case=SINK,
    ),
    Mutant(
        name="the sink of the first KV head's heads",
        header="output_sink.cuh",
        old="w.first_head() + s.head",
        new="s.head",
        wrong="output",
        case=SINK,
    ),
    Mutant(
        name="the sink of the first head block's heads",
        header="output_sink.cuh",
        old="w.first_head() + s.head",
        new="w.kv_head * T::kGroupSize + s.head",
        wrong="output",
        case=SINK_HEAD_BLOCKS,
    ),
    Mutant(
        name="sinks of another type",
        header="output_sink.cuh",
        old="case NumberType::kFloat16:\n        return float(static_cast<cutlass::half_t",
        new="case NumberType::kFloat16:\n        return float(static_cast<cutlass::bfloat16_t",
        wrong="output",
        case=SINK,
    ),
    Mutant(
        name="sinks read past their end",
        header="output_sink.cuh",
        old="float(static_cast<cutlass::half_t const*>(p.sinks)[head])",
        new="float(static_cast<cutlass::half_t const*>(p.sinks)[head + 1])",
        fault="outside all tensors.* past the end of sinks.* at output_sink.cuh",
        case=SINK,
    ),
    Mutant(
        name="a sink forgotten when splits merge",
        header="output.cuh",
        old="  OutputOf<T>::finish(p, w, s, r);",
        new="  if (w.num_splits == 1) OutputOf<T>::finish(p, w, s, r);",
        wrong="output",
        case=SINK_SPLIT,
    ),
    Mutant(
        name="a sink per split",
        header="merge.cuh",
        old="      store.write(w.split, s, r);",
        new="      OutputOf<T>::finish(p, w, s, r);\n      store.write(w.split, s, r);",
        wrong="output",
        case=SINK_SPLIT,
    ),
    Mutant(
        name="a sink per block of a cluster",
        header="output.cuh",
        old="  OutputOf<T>::finish(p, w, s, r);",
        new="  for (int i = 0; i < w.num_splits; ++i) OutputOf<T>::finish(p, w, s, r);",
        wrong="output",
        case=SINK_CLUSTER,
    ),
    Mutant(
        name="a sink per cluster",
        header="cluster_combine.cuh",
        old="store.write(work_.cluster, s, merge(s));",
        new="auto r = merge(s); OutputOf<T>::finish(p, work_, s, r); "
        "store.write(work_.cluster, s, r);",
        wrong="output",
        case=SINK_OF_CLUSTERS,
    ),
    Mutant(
        name="rows of float32 as if of 16 bits",
        header="output.cuh",
        old="static_cast<Stored*>(p.out)",
        new="static_cast<typename T::Element*>(p.out)",
        fault="not a multiple of 16 bytes; at byte 8 of out .* at output.cuh",
        case=FLOAT32,
    ),
    Mutant(
        name="half of what is stored in float32",
        header="output.cuh",
        old="i < kWidth / kVec",
        new="i < kWidth * 2 / kVec / int(sizeof(Stored))",
        wrong="output",
        case=FLOAT32_CLUSTER,
    ),
    Mutant(
        name="a window that is a token short",
        header="mask_window.cuh",
        old="at.token >= at.query - left",
        new="at.token > at.query - left",
        wrong="output",
        case=WINDOWED,
    ),
    Mutant(
        name="a window without a left end",
        header="mask_window.cuh",
        old=" && at.token >= at.query - left",
        new="",
        wrong="lse",
        case=WINDOWED,
    ),
    Mutant(
        name="a window that is read from a token too late",
        header="mask_window.cuh",
        old="num_tokens - 1 - p.window_left",
        new="num_tokens - p.window_left",
        wrong="output",
        case=WINDOWED,
    ),
    Mutant(
        name="a window counted from the cached tokens",
        header="mask_window.cuh",
        old="at.token >= at.query - left",
        new="at.token >= at.query - 1 - left",
        wrong="lse",
        case=WINDOW_ONCE,
    ),
    Mutant(
        name="what a window hides is copied",
        header="load.cuh",
        old="token < end && (kSeesFirstToken<T> || token >= first)",
        new="token < end",
        wrong="output",
        case=WINDOWED,
    ),
    Mutant(
        name="what a window hides is not cleared",
        header="single_tile.cuh",
        old="    clear_hidden_rows<T>(w, w.first_tile(warp), values);\n",
        new="",
        wrong="output",
        case=WINDOW_ONCE,
    ),
    Mutant(
        name="what a window hides is not cleared by warps that walk",
        header="decode_tma.cuh",
        old="    clear_hidden_rows<T>(w, tile, values);\n",
        new="",
        wrong="output",
        case=WINDOW_WALK,
    ),
    Mutant(
        name="hidden rows used while other lanes clear them",
        header="load_tma.cuh",
        old="    cute::tma_store_fence();\n    __syncwarp();",
        new="    cute::tma_store_fence();",
        fault=_UNWRITTEN,
        case=WINDOW_WALK,
    ),
    Mutant(
        name="a row too many cleared before a window",
        header="load_tma.cuh",
        old="min(w.first_token, w.num_cached) - tile * T::kBlockN;",
        new="min(w.first_token, w.num_cached) + 1 - tile * T::kBlockN;",
        wrong="output",
        case=WINDOW_WALK,
    ),
    Mutant(
        name="a bias counted from the oldest key",
        header="bias_alibi.cuh",
        old="float(at.query - at.token)",
        new="float(-at.token)",
        wrong="output",
        case=ALIBI,
    ),
    Mutant(
        name="a bias counted from the end of a tile",
        header="bias_alibi.cuh",
        old="float(at.query - at.token)",
        new="float(at.end - at.token)",
        wrong="lse",
        case=ALIBI,
    ),
    Mutant(
        name="a bias counted from the newest cached key",
        header="bias_alibi.cuh",
        old="float(at.query - at.token)",
        new="float(at.end - 1 - at.token)",
        wrong="output",
        case=ALIBI_CLUSTER,
    ),
    Mutant(
        name="slopes in natural units",
        header="bias_alibi.cuh",
        old="* -kLog2E",
        new="* -1.f",
        wrong="output",
        case=ALIBI,
    ),
    Mutant(
        name="slopes of the first sequence",
        header="bias_alibi.cuh",
        old="w.batch * int64_t(p.alibi_batch_stride) + ",
        new="",
        wrong="output",
        case=ALIBI,
    ),
    Mutant(
        name="slopes of the first KV head's heads",
        header="bias_alibi.cuh",
        old=" + w.first_head();",
        new=";",
        wrong="output",
        case=ALIBI_CLUSTER,
    ),
    Mutant(
        name="slopes of heads that do not exist",
        header="bias_alibi.cuh",
        old="slopes[head < last ? head : last]",
        new="slopes[head]",
        fault="outside all tensors.* past the end of alibi_slopes.* at bias_alibi.cuh",
        case=ALIBI,
    ),
    Mutant(
        name="a bias that is capped",
        header="logits.cuh",
        old="bias(logit(dot, head, at), head, at)",
        new="logit(bias(dot, head, at), head, at)",
        wrong="output",
        case=ALIBI_CAPPED,
    ),
    Mutant(
        name="padding on the wrong side",
        header="score.cuh",
        old="Scorer<T>::token(t) < first",
        new="Scorer<T>::token(t) >= first",
        wrong="output",
        case=PADDED,
    ),
    Mutant(
        name="a token too much of padding",
        header="score.cuh",
        old="Scorer<T>::token(t) < first",
        new="Scorer<T>::token(t) <= first",
        wrong="output",
        case=PADDED_CLUSTER,
    ),
    Mutant(
        name="padding that counts",
        header="score.cuh",
        old="    if (first <= 0) return;",
        new="    return;",
        wrong="lse",
        case=PADDED,
    ),
    Mutant(
        name="the first sequence's padding",
        header="start_leftpad.cuh",
        old="p.cache_leftpad[batch]",
        new="p.cache_leftpad[0]",
        wrong="output",
        case=PADDED,
    ),
    Mutant(
        name="padding that is read past its end",
        header="start_leftpad.cuh",
        old="p.cache_leftpad[batch]",
        new="p.cache_leftpad[batch + 1]",
        fault="outside all tensors.* past the end of cache_leftpad.* at start_leftpad.cuh",
        case=PADDED,
    ),
    Mutant(
        name="nothing appended where all is padding",
        header="tile_scheduler.cuh",
        old="min(first_token, num_tokens > 0 ? num_tokens - 1 : 0)",
        new="first_token",
        wrong="caches",
        case=PADDED_AWAY,
    ),
    Mutant(
        name="a new token that counts although it is padding",
        header="cluster_combine.cuh",
        old="this->appends && cluster == 0 && is_token",
        new="this->appends && cluster == 0",
        wrong="lse",
        case=PADDED_AWAY_ONCE,
    ),
    Mutant(
        name="rows before and behind what is seen cleared by different lanes",
        header="load_tma.cuh",
        old="min(w.first_token, w.num_cached) - tile",
        new="w.first_token - tile",
        fault="writes over what another thread wrote.* at load_tma.cuh",
        case=PADDED_AWAY_ONCE,
    ),
    Mutant(
        name="a row of the same number in spite of the index",
        header="row_indexed.cuh",
        old="p.cache_batch_idx[batch]",
        new="batch",
        wrong="output",
        case=INDEXED,
    ),
    Mutant(
        name="a row that the cache does not have",
        header="row_indexed.cuh",
        old="return row < p.cache_rows ? row : -1;",
        new="return row + p.cache_rows;",
        fault="outside all tensors",
        case=INDEXED,
    ),
    Mutant(
        name="appended to the row of the same number",
        header="cache_dense.cuh",
        old="w.cache_row() * stride.batch",
        new="w.batch * stride.batch",
        fault=f"{_GLOBAL_RACE}.* of k_cache.* at row.cuh",
        case=INDEXED,
    ),
    Mutant(
        name="boxes of the row of the same number",
        header="load_tma.cuh",
        old="    if constexpr (!RowOf<T>::is_own()) at.sequence = row_;\n",
        new="",
        wrong="output",
        case=INDEXED_CLUSTER,
    ),
)
MUTANTS += TMA_MUTANTS + DEPENDENT_MUTANTS + FEATURE_MUTANTS


@cache
def headers(source: str) -> dict[str, str]:
    """The headers that a source includes, by file name, each behind those that it includes."""
    folder = include_dir() / "gqa"
    found: dict[str, str] = {}

    def visit(text: str) -> None:
        for path in _INCLUDE.findall(text):
            name = path.rpartition("/")[2]
            if name not in found:
                header = folder.joinpath(*path.split("/")).read_text(encoding="utf-8")
                visit(header)
                found[name] = header

    visit(source)
    return found


@cache
def program(config: KernelConfig, header: str = "", old: str = "", new: str = "") -> Program:
    """A kernel compiled from one text, in which one place of one header is replaced.

    Headers that are not ours come first, so that all texts can share them.
    """
    source = render(config)
    foreign = _FOREIGN_INCLUDE.findall("".join(headers(source).values()))
    parts = [*dict.fromkeys(foreign), "#pragma nv_hdrstop\n"]
    assert not header or header in headers(source)
    for name, text in headers(source).items():
        if name == header:
            assert text.count(old) == 1, f"{old!r} must occur once in {name}"
            text = text.replace(old, new)
        text = _INCLUDE.sub("\n", text.replace("#pragma once", ""))
        parts.append(f'#line 1 "{name}"\n{text}')
    own = f'#line 1 "{config.name}.cu"\n' + _INCLUDE.sub("\n", source)
    ptx = compile_source("".join(parts) + own, config.name, config.ptx_arch).code.decode()
    return program_from(ptx, config.name)


def launch(case: Case, program: Program) -> set[str]:
    """Run a decode step; returns what it got wrong.

    Raises:
        KernelFault: The kernel did what no kernel may.
    """
    config, step = case.config, case.step()
    tensors = {name: getattr(step, name, None) for name in TENSORS}
    given = *step.tensors(), step.out, step.seqlens, *tensors.values()
    options = {name: getattr(step, name) for name in ("softcap", "window_size", "out_dtype")}
    asked, policies = check("plan", options, given)
    layout = see(given)
    problem = problem_of(layout, policies, asked.window_size[0], asked.out_dtype)
    chosen = case.dispatch(problem)
    lse = torch.full(step.q.shape[:2], float("nan"))
    counters = torch.zeros(chosen.num_merge_counters, dtype=torch.int32)
    tensors = {row.field: tensor for row, tensor in zip(CALL.rows, given, strict=True)} | {
        "lse": lse,
        "split_workspace": torch.empty(chosen.partial_floats),
        "merge_counters": counters,
        "overflow_flag": torch.zeros(1, dtype=torch.int32),
    }
    task = Task(
        layout=layout, problem=problem, dispatch=chosen, asked=asked, softmax_scale=step.scale,
        out_dtype=asked.out_dtype or step.q.dtype, fields=fields_of(asked, layout, step.scale),
    )  # fmt: skip
    params = constants(task, 0)
    for field, tensor in tensors.items():
        setattr(params, field, 0 if tensor is None else tensor.data_ptr())
    argument = _with_maps(params, layout, config) if config.tma else params
    checks = Checks(max_steps=_MAX_STEPS)
    run(
        program, chosen.shape, argument, regions_of(tensors, case.append, overreads(chosen)), checks
    )
    return wrong(step, lse, counters)


def _with_maps(params: Params, layout: dict[str, Seen], config: KernelConfig) -> TmaParams:
    """The argument of a kernel that copies by tensor maps."""
    caches = layout["k_cache"], layout["v_cache"]
    maps = [
        map_of(t.address, t.shape, t.strides, t.itemsize, config.block_n).to_bytes() for t in caches
    ]
    return TmaParams.from_buffer_copy(bytes(params) + b"".join(maps))


def wrong(step: Step, lse: Tensor, counters: Tensor) -> set[str]:
    """What a launch got wrong."""
    found = set()
    if step.errors(step.out).share > 1:
        found.add("output")
    if not torch.allclose(lse.double(), step.reference()[1], atol=2e-5, rtol=2e-6):
        found.add("lse")
    if counters.any():
        found.add("merge_counters")
    try:
        step.check_memory()
    except AssertionError:
        found.add("caches")
    return found


@pytest.mark.parametrize("mutant", MUTANTS, ids=[m.name.replace(" ", "-") for m in MUTANTS])
def test_every_bug_has_its_place_in_the_source(mutant: Mutant) -> None:
    """Also those that CI leaves out."""
    text = headers(render(mutant.case.config))[mutant.header]
    assert text.count(mutant.old) == 1 and mutant.new != mutant.old


def firsts(named: dict[str, Any], kind: Callable[[Any], object]) -> list[Any]:
    """Test parameters, of which CI takes the first of every kind."""
    kinds = [kind(each) for each in named.values()]
    return [
        pytest.param(each, id=name, marks=THOROUGH if kinds[i] in kinds[:i] else ())
        for i, (name, each) in enumerate(named.items())
    ]


def what_finds(mutant: Mutant) -> object:
    """The rule that is broken, as the first words of the fault say, or what comes out wrong."""
    return mutant.wrong or re.findall(r"\w+", mutant.fault)[:2]


def way_of(case: Case) -> object:
    """What the main loop is made for; features have tests of their own."""
    return case.schedule, case.math, case.pdl


@pytest.mark.parametrize("case", firsts(CASES, way_of))
def test_the_kernels_as_they_are_pass(case: Case) -> None:
    assert launch(case, program(case.config)) == set()


@pytest.mark.parametrize(
    "mutant",
    firsts({mutant.name.replace(" ", "-"): mutant for mutant in MUTANTS}, what_finds),
)
def test_finds(mutant: Mutant) -> None:
    case = mutant.case
    kernel = program(case.config, mutant.header, mutant.old, mutant.new)
    if mutant.fault:
        with pytest.raises(KernelFault, match=mutant.fault):
            launch(case, kernel)
    else:
        assert mutant.wrong in launch(case, kernel)
