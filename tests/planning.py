"""Calls with a driver that only takes notes: tensors of a call, and what a kernel is told."""

from __future__ import annotations

from typing import Any

from helpers import call_tensors

import gqa_cutlass
from gqa_cutlass.codegen.schema.params import Params, TmaParams
from gqa_cutlass.tensormap import TensorMap

# Capacities of caches that the schedules serve.
MULTISTAGE, TMA = 128, 300
INPUTS = ("q", "k_cache", "v_cache", "k", "v")


def params_of(argument: Params | TmaParams) -> Params:
    """What a kernel of either schedule is told."""
    return argument.decode if isinstance(argument, TmaParams) else argument


def maps_of(argument: TmaParams) -> list[TensorMap]:
    return [TensorMap.from_bytes(bytes(field)) for field in (argument.keys, argument.values)]


def inputs_of(**sizes: Any) -> dict[str, Any]:
    """Tensors of a call without `out`."""
    tensors = call_tensors(**sizes)
    return {name: tensors[name] for name in INPUTS}


def run(plan: gqa_cutlass.Plan, tensors: dict[str, Any], lengths: Any) -> Any:
    """Call a plan with tensors by name."""
    return plan(*(tensors[name] for name in INPUTS), lengths, tensors.get("out"))
