"""transformers' continuous batching at real shapes (few layers, random weights) on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from greedy import Generated, check_tokens

transformers = pytest.importorskip("transformers")

from bench.continuous import (  # noqa: E402
    Request,
    configured,
    kernel_of_ours,
    requests_of,
    serve,
    sizes_for,
)

pytestmark = pytest.mark.gpu

TOLERANCE = 2e-2  # of logits with a standard deviation of 1.3, in float16
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "windows": ("Qwen2Config", {
        "use_sliding_window": True, "sliding_window": 300,
        "layer_types": ["full_attention", "sliding_attention"] * 2,
    }),
}  # fmt: skip


def make_model(name: str) -> Any:
    kind, options = SHAPES[name]
    config = getattr(transformers, kind)(
        vocab_size=1024, hidden_size=4096, intermediate_size=1024, num_hidden_layers=4,
        num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=4096,
        pad_token_id=0, bos_token_id=None, eos_token_id=None, **options,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device("cuda"):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float16).eval()


@pytest.mark.parametrize("graphs", [False, True], ids=["called", "graphs"])
@pytest.mark.parametrize(
    ("name", "way"), [("llama", "ours"), ("llama", "ours-pages"), ("windows", "ours")]
)
def test_requests_get_the_tokens_that_they_get_alone(name: str, way: str, graphs: bool) -> None:
    """More of them than a batch takes, with prompts in pieces of up to 1024 tokens."""
    model = make_model(name)
    requests: list[Request] = requests_of(12, (3, 1500), 20, 1024)
    sizes = sizes_for(requests, 1024) | {"max_requests_per_batch": 8, "use_cuda_graph": graphs}
    with kernel_of_ours():
        answers, _ = serve(model, requests, configured(model, way, **sizes))
        model.set_attn_implementation("eager")
    for request, answer in zip(requests, answers, strict=True):
        assert len(answer) == request.new_tokens
        tokens = torch.tensor([request.prompt + answer], device="cuda")
        mask = torch.ones_like(tokens[:, : len(request.prompt)])
        found = Generated(sequences=tokens, mask=mask, logits=None, scores=None)
        check_tokens(model, found, TOLERANCE)
