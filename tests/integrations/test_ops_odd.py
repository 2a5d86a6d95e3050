"""What operators and compiled calls refuse of what torch itself would let pass, or refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from compiling import GROUP, random_step

from gqa_cutlass import InputError, gqa_decode, ops  # noqa: F401 - which registers the operators

pytestmark = pytest.mark.xdist_group(GROUP)


@pytest.fixture(autouse=True)
def nothing_compiled() -> None:
    torch._dynamo.reset()


def test_an_operator_makes_up_no_result_beside_a_tensor_without_values() -> None:
    step = random_step()
    given = *(step[name] for name in ("q", "k_cache", "v_cache", "k", "v")), None, 4
    operators = torch.ops.gqa_cutlass
    sinks = torch.zeros(8, device="meta")
    outs, lses = torch.zeros(1, 8, 64), torch.zeros(1, 8, device="meta")
    calls: list[Callable[[], object]] = [
        lambda: operators.gqa_decode(*given, sinks=sinks),
        lambda: operators.gqa_attend(*given[:3], None, 4, sinks=sinks),
        lambda: operators.merge_states([outs], [lses], torch.float32),
    ]
    for call in calls:
        with pytest.raises(InputError, match="tensors: got some on meta and some on cpu; allowed"):
            call()


class Model(torch.nn.Module):
    def forward(self, given: dict[str, Any]) -> Any:
        return gqa_decode(**given, cache_seqlens=4)


FLAWS: dict[str, tuple[dict[str, Any], str]] = {
    "k alone": ({"v": None}, "k and v: one of them came without the other"),
    "a wrong out": ({"out": torch.zeros(2, 8, 32)}, "out: its dtype is neither q's nor out_dtype"),
    "a wrong type": ({"softcap": "x"}, "softcap: it is of a type that is not allowed"),
    "learning": ({"sinks": torch.zeros(8, requires_grad=True)}, "a tensor requires grad, and dec"),
}


@pytest.mark.parametrize("name", FLAWS)
def test_export_without_dynamo_says_what_no_graph_can_hold(name: str) -> None:
    """And not that tensors are FakeTensors, which no caller made."""
    changes, told = FLAWS[name]
    with pytest.raises(InputError, match=f"^gqa_decode: {told}"):
        torch.export.export(Model(), (random_step() | changes,), strict=False)


@pytest.mark.parametrize("name", ["k_cache", "v_cache"])
def test_a_compiled_call_appends_to_no_expanded_cache(name: str) -> None:
    step = random_step()
    step[name] = step[name][:1].expand_as(step[name])
    with pytest.raises(InputError, match=f"{name}: got strides .*elements that do not share mem"):
        torch.compile(gqa_decode, backend="aot_eager")(**step, cache_seqlens=4)
