"""The log's line for a launch, at DEBUG: `launch`, and every parameter as key=value.

No value holds a space, so a line comes apart at its spaces. The C library writes the same keys.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gqa_cutlass.call.plan import Plan

LOG = logging.getLogger("gqa_cutlass")


@dataclass(frozen=True, kw_only=True)
class LaunchRecord:
    """What one launch was given; as text, key=value in this order.

    Args:
        kernel: The kernel's name.
        grid: Blocks in x (KV heads times head blocks), y (splits) and z (sequences).
        cluster: Blocks of a cluster.
        block: Threads per block.
        shared_bytes: Dynamic shared memory per block.
        num_splits: Parts that a sequence is cut into when all are about as long.
        num_stages: K tiles (and V tiles) that a warp keeps in flight.
        dependent: Programmatic dependent launch.
        batch_size: Sequences.
        num_q_heads: Query heads.
        num_kv_heads: KV heads.
        group_size: Query heads per KV head.
        head_dim: Dimension per head of queries and keys.
        head_dim_v: The same of values and outputs.
        max_seq_len: Tokens that a sequence's cache can hold.
        num_tokens: Query tokens of a sequence, at most.
        num_new_tokens: Tokens of k and v of a sequence; 0 for none, or where sequences differ.
        dtype: Element type of every tensor but caches of 8 bits, of which the kernel's name tells.
        out_dtype: That of the output.
        append: Whether a new token came with the call.
        cache_seqlens: Tokens in every sequence's cache, or `device` where only the device knows.
        softmax_scale: Factor on the scores.
        return_lse: Whether the log-sum-exp was asked for.
        softcap: Bound of the scores; 0 for none.
        sinks: Whether each head has a sink.
        window_size: Tokens seen to the left and to the right of the query's own; -1 for all.
        alibi: Whether scores fall with the distance.
        leftpad: Whether sequences have padding before them.
        batch_idx: Whether an index says which rows of the caches they have.
        page_size: Tokens of a page; 0 where every sequence's are in one piece.
        workspace_bytes: Of partial outputs and merge counters.
        device: The GPU's index, or `cpu`.
        stream: The stream's handle; as text, hexadecimal.
    """

    kernel: str
    grid: tuple[int, int, int]
    cluster: tuple[int, int, int]
    block: int
    shared_bytes: int
    num_splits: int
    num_stages: int
    dependent: bool
    batch_size: int
    num_q_heads: int
    num_kv_heads: int
    group_size: int
    head_dim: int
    head_dim_v: int
    max_seq_len: int
    num_tokens: int
    num_new_tokens: int
    dtype: str
    out_dtype: str
    append: bool
    cache_seqlens: int | str
    softmax_scale: float
    return_lse: bool
    softcap: float
    sinks: bool
    window_size: tuple[int, int]
    alibi: bool
    leftpad: bool
    batch_idx: bool
    page_size: int
    workspace_bytes: int
    device: int | str
    stream: int

    @classmethod
    def of(cls, plan: Plan, cache_seqlens: object, device: int | str, stream: int) -> LaunchRecord:
        """The record of a plan's launch."""
        problem, chosen, shape = plan.problem, plan.dispatch, plan.dispatch.shape
        return cls(
            kernel=chosen.config.name,
            grid=shape.grid,
            cluster=(1, shape.cluster, 1),
            block=shape.block,
            shared_bytes=shape.shared_bytes,
            num_splits=chosen.num_splits,
            num_stages=chosen.num_stages,
            dependent=shape.pdl,
            batch_size=problem.batch_size,
            num_q_heads=problem.num_q_heads,
            num_kv_heads=problem.num_kv_heads,
            group_size=problem.group_size,
            head_dim=problem.head_dim,
            head_dim_v=problem.value_dim,
            max_seq_len=problem.max_seq_len,
            num_tokens=problem.num_tokens,
            num_new_tokens=problem.appended,
            dtype=problem.dtype,
            out_dtype="f32" if plan.task.out_dtype.itemsize == 4 else problem.dtype,
            append=problem.append,
            cache_seqlens=cache_seqlens if isinstance(cache_seqlens, int) else "device",
            softmax_scale=plan.softmax_scale,
            return_lse=plan.return_lse,
            softcap=float(plan.task.asked.softcap),
            sinks="sinks" in plan.task.layout,
            window_size=plan.task.asked.window_size,
            alibi="alibi_slopes" in plan.task.layout,
            leftpad="cache_leftpad" in plan.task.layout,
            batch_idx="cache_batch_idx" in plan.task.layout,
            page_size=problem.page_size or 0,
            workspace_bytes=chosen.workspace_bytes,
            device=device,
            stream=stream,
        )

    def __str__(self) -> str:
        values = vars(self) | {"stream": hex(self.stream)}
        return " ".join(f"{key}={_text(value)}" for key, value in values.items())


def parse(line: str) -> dict[str, str]:
    """The keys and values of a launch's line."""
    return dict(part.partition("=")[::2] for part in line.split()[1:])


def _text(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
