"""The kernels that a model's decode steps run, for every type of its layers, shipped or not."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from itertools import chain

from gqa_cutlass.codegen.config import KernelConfig
from gqa_cutlass.codegen.models import Attention, LayerType
from gqa_cutlass.codegen.schema.kinds import DType, Math, Schedule
from gqa_cutlass.codegen.schema.problem import WIDEST
from gqa_cutlass.codegen.variants import default_config, policies_for
from gqa_cutlass.errors import ConfigError, InputError


@dataclass(frozen=True, kw_only=True)
class Ranked:
    """Layers as one rank of tensor parallelism has them.

    Args:
        tp: Ranks.
        layers: The layers, with the heads of one rank.
        dtype: What they are run in.
    """

    tp: int
    layers: LayerType
    dtype: DType


def ranked(model: Attention, tps: Sequence[int], dtypes: Collection[DType]) -> list[Ranked]:
    """A model's layers for every number of ranks and every type.

    Args:
        model: The model.
        tps: Numbers of ranks.
        dtypes: Types; empty for those that the model says.

    Raises:
        InputError: Heads cannot be divided so, or the model's type is none of the kernels'.
    """
    if not (types := dtypes or model.dtypes):
        raise InputError(
            f"--dtype: got none, and {model.source} says a type that kernels do not have; allowed: "
            "float16, bfloat16. Name what the model is run in."
        )
    return [
        Ranked(tp=tp, layers=_of_rank(layers, tp), dtype=dtype)
        for tp in tps
        for layers in model.layer_types
        for dtype in types
    ]


def kernels_of(
    layers: Collection[Ranked], *, paged: bool = False, dependent: bool = False
) -> list[KernelConfig]:
    """The kernels of layers, each once: for both schedules, between which dispatch chooses.

    Layers with a sliding window have those for pages in any case: a ring of its tokens is pages.

    Args:
        layers: As `ranked` gives them.
        paged: Whether the caches of all layers are in pages.
        dependent: Whether to add the kernels of dependent launches.

    Raises:
        ConfigError: There is no kernel for a layer.
    """
    found = list(dict.fromkeys(chain.from_iterable(_kernels_of(each, paged) for each in layers)))
    twins = [replace(kernel, pdl=True) for kernel in found] if dependent else []
    return found + twins


def _kernels_of(each: Ranked, paged: bool) -> list[KernelConfig]:
    layers = each.layers
    needs = [(*layers.needs, "block_table")] if paged else [layers.needs]
    if not paged and "window_size" in layers.needs:
        needs.append((*layers.needs, "block_table"))
    try:
        return [
            default_config(
                Math.TENSOROP, each.dtype, layers.head_dim, layers.group_size, WIDEST, schedule,
                policies_for(features), layers.head_dim_v,
            )
            for features in needs
            for schedule in Schedule
        ]  # fmt: skip
    except ConfigError as error:
        raise ConfigError(f"--model: no kernel for layers of {layers.name}: {error}") from error


def _of_rank(layers: LayerType, tp: int) -> LayerType:
    """Layers with the heads of one rank; where there are more ranks than KV heads, they have copies
    of them, as serving engines do it.
    """
    q_heads, kv_heads = layers.num_q_heads, layers.num_kv_heads
    if q_heads % tp or (kv_heads % tp and tp % kv_heads):
        raise InputError(
            f"--tp: got {tp} for {q_heads} query heads and {kv_heads} KV heads; allowed: divisors "
            "of the query heads that divide the KV heads or are multiples of them."
        )
    return replace(layers, num_q_heads=q_heads // tp, num_kv_heads=max(1, kv_heads // tp))
