"""The options that public calls have in common: said once, and shown by each."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from featured import FEATURES as FEATURE_STEPS
from featured import POLICIES as FEATURE_ROWS
from helpers import call_tensors

import gqa_cutlass.ops  # noqa: F401 - registers the operators
from gqa_cutlass import KVCache, explain, flash_attn_with_kvcache, gqa_decode, plan
from gqa_cutlass.call.asked import TENSORS
from gqa_cutlass.call.options import CallOptions, Options, PlanOptions
from gqa_cutlass.codegen.schema.policies import CALL, FP8, OF_TOKENS, POLICIES

CALLS: dict[str, tuple[Callable[..., Any], set[str]]] = {
    "gqa_decode": (gqa_decode, set(Options.__annotations__)),
    "KVCache.decode": (KVCache.decode, set(Options.__annotations__) - {"k_scale", "v_scale"}),
    "plan": (plan, set(PlanOptions.__annotations__)),
    "explain": (explain, set(PlanOptions.__annotations__) - {"kernel"}),
}
every_call = pytest.mark.parametrize(("call", "options"), CALLS.values(), ids=CALLS)


@every_call
def test_signatures_list_every_option_with_its_default(
    call: Callable[..., Any], options: set[str]
) -> None:
    listed = inspect.signature(call).parameters
    assert options <= set(listed)
    assert all(parameter.kind is not parameter.VAR_KEYWORD for parameter in listed.values())
    keywords = [p for p in listed.values() if p.kind is p.KEYWORD_ONLY]
    assert all(p.default is not p.empty for p in keywords if p.name != "cache_seqlens")
    assert (listed["num_splits"].default, listed["ragged"].default) == (0, True)
    assert listed["softcap"].default == 0 and listed["sinks"].default is None


@every_call
def test_help_explains_every_parameter(call: Callable[..., Any], options: set[str]) -> None:
    arguments = inspect.getdoc(call).partition("Args:\n")[2].partition("\n\n")[0]  # type: ignore[union-attr]
    explained = [line.split(":")[0].strip() for line in arguments.splitlines() if line[4] != " "]
    assert sorted(explained) == sorted(n for n in inspect.signature(call).parameters if n != "self")


@pytest.mark.parametrize(
    ("name", "wrong"),
    [("gqa_decode", "kernel"), ("gqa_decode", "window"), ("plan", "arch"), ("explain", "kernel")],
)
def test_options_that_a_call_does_not_take_are_refused(name: str, wrong: str) -> None:
    given: dict[str, Any] = call_tensors()
    if name != "explain":
        given["cache_seqlens"] = 3
    with pytest.raises(TypeError, match=rf"{name}\(\) got an unexpected keyword .*'{wrong}'"):
        CALLS[name][0](**given, **{wrong: None})


def test_every_feature_is_an_option_of_every_call() -> None:
    """But what caches hold, which their type says. Tensors are rows of the table of arguments."""
    # Several tokens are asked for by the sizes of q and k, too; FlashAttention has no norm or tree.
    stored = *FP8, *OF_TOKENS
    features = {policy.feature for policy in POLICIES if policy.feature and policy not in stored}
    features |= {row.name for policy in FP8 for row in policy.arguments}
    features -= {"num_tokens"}
    assert features <= set(CallOptions.__annotations__)
    theirs = {name.replace("_descale", "_scale") for name in
              inspect.signature(flash_attn_with_kvcache).parameters}  # fmt: skip
    assert features - {"tree_mask", "q_norm_weight"} <= theirs
    operators = torch.ops.gqa_cutlass
    for operator in (
        operators.gqa_decode, operators.gqa_attend, operators.gqa_decode_scales_of_tokens,
    ):  # fmt: skip
        assert features <= {argument.name for argument in operator.default._schema.arguments}
    assert set(TENSORS) == {row.name for p in POLICIES for row in p.arguments}
    assert [row.name for row in CALL.rows][-len(TENSORS) :] == list(TENSORS)


def test_every_feature_has_rows_in_the_tests_of_features() -> None:
    apart = {*OF_TOKENS}  # in test_features_fp8_tokens.py
    assert set(FEATURE_ROWS.values()) == {policy for policy in POLICIES if policy.tag} - apart
    assert set(FEATURE_ROWS) == set(FEATURE_STEPS)
