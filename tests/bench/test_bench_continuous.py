"""The benchmark of continuous batching: its rows, on the CPU with transformers' own attention."""

from __future__ import annotations

import pytest
from compiling import GROUP

pytest.importorskip("transformers")

import torch  # noqa: E402
from transformers import LlamaForCausalLM  # noqa: E402

from bench import continuous, e2e_steps  # noqa: E402
from bench.e2e_points import Shape  # noqa: E402

pytestmark = pytest.mark.xdist_group(GROUP)

TOY = Shape(
    name="toy", config="LlamaConfig", layers=1,
    sizes={"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2,
           "num_key_value_heads": 1, "vocab_size": 64},
)  # fmt: skip


def test_a_way_that_fails_loses_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """And a row says how many tokens are made in a second."""
    model = e2e_steps.build(TOY, None, "cpu", torch.float16)
    assert isinstance(model, LlamaForCausalLM)
    requests = continuous.requests_of(3, (3, 9), 4, 64)
    assert all(3 <= len(request.prompt) <= 9 for request in requests)
    monkeypatch.setattr(continuous, "continuous_batching", None)
    sizes = continuous.sizes_for(requests, 16, page_size=4)
    first, broken = continuous.measured(model, ["sdpa", "ours"], requests, sizes)
    assert broken.missing is not None and broken.missing.startswith("TypeError")
    assert first.seconds is not None and first.agreeing_tokens == 4
    assert first.new_tokens_per_second == pytest.approx(12 / first.seconds, rel=0.2)
    lines = continuous.table([first, broken]).splitlines()
    assert lines[2].endswith(" | 4.0 |") and "TypeError" in lines[3]


def test_answers_agree_until_a_token_differs() -> None:
    assert continuous._agreeing([1, 2, 3], [1, 2, 3]) == 3
    assert continuous._agreeing([1, 2, 3], [1, 4, 3]) == 1
