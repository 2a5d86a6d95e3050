"""transformers' continuous batching: requests that come and go, with the tokens they get alone."""

from __future__ import annotations

from collections.abc import Iterator
from functools import wraps
from typing import Any

import pytest
import torch
from compiling import GROUP
from greedy import Generated, check_tokens
from torch import Tensor

transformers = pytest.importorskip("transformers")

from transformers.generation.continuous_batching import initialization, model_runner  # noqa: E402

from bench.continuous import PAGE_SIZE, Request, configured, kernel_of_ours, serve  # noqa: E402
from gqa_cutlass import InputError  # noqa: E402
from gqa_cutlass.integrations import flash_kernel  # noqa: E402
from gqa_cutlass.integrations.transformers import continuous_batching  # noqa: E402

pytestmark = pytest.mark.xdist_group(GROUP)

# They come and go: the third one's prompt is read in pieces, while the second one is answered.
REQUESTS = [
    Request(prompt=[5, 9, 33], new_tokens=5),
    Request(prompt=[7, 1, 60, 2, 18, 44, 21], new_tokens=2),
    Request(prompt=[11, 12, 13, 14, 15, 16, 17, 18, 19, 20], new_tokens=2),
]
SIZES = {PAGE_SIZE: 4, "num_blocks": 64, "max_batch_tokens": 12, "max_requests_per_batch": 4}
MODELS = {
    "llama": lambda **sizes: transformers.LlamaConfig(**sizes),
    "windows": lambda **sizes: transformers.Qwen2Config(
        use_sliding_window=True, sliding_window=5,
        layer_types=["full_attention", "sliding_attention"], **sizes,
    ),
}  # fmt: skip


def make_model(name: str) -> Any:
    config = MODELS[name](
        vocab_size=64, hidden_size=128, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64, pad_token_id=0,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float16).eval()


def check_alone(model: Any, requests: list[Request], answers: list[list[int]]) -> None:
    """Assert that every token is the one that eager attention chooses for the request alone."""
    model.set_attn_implementation("eager")
    for request, answer in zip(requests, answers, strict=True):
        assert len(answer) == request.new_tokens
        tokens = torch.tensor([request.prompt + answer])
        mask = torch.ones(1, len(request.prompt), dtype=torch.long)
        check_tokens(model, Generated(sequences=tokens, mask=mask, logits=None, scores=None))


@pytest.mark.parametrize("name", MODELS)
def test_requests_get_the_tokens_that_they_get_alone(name: str) -> None:
    model = make_model(name)
    answers, _ = serve(model, REQUESTS, configured(model, "ours", **SIZES))
    check_alone(model, REQUESTS, answers)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[list[int]]]:
    """Lengths of every call by pages, which transformers makes on the CPU, too."""
    found: list[list[int]] = []
    decode = flash_kernel.flash_attn_with_kvcache

    @wraps(decode)  # transformers looks at the parameters
    def noted(*args: Any, cache_seqlens: Tensor, **options: Any) -> Any:
        found.append(cache_seqlens.tolist())
        return decode(*args, cache_seqlens=cache_seqlens, **options)

    monkeypatch.setattr(flash_kernel, "flash_attn_with_kvcache", noted)
    anyway = "ensure_decode_fast_path_is_available"  # which wants a GPU
    monkeypatch.setattr(initialization, anyway, lambda *_: None)
    with kernel_of_ours():
        yield found


def test_a_token_of_each_goes_by_pages(
    steps: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches are padded to 4 rows, as CUDA graphs have them: with rows that hold nothing."""
    monkeypatch.setattr(model_runner, "pad_to_pow2", lambda *_: 4)
    padded = property(lambda self: True, lambda self, value: None)
    monkeypatch.setattr(model_runner.ModelRunner, "pad_inputs", padded, raising=False)
    model = make_model("llama")
    answers, _ = serve(
        model, REQUESTS, configured(model, "ours-pages", max_blocks_per_request=8, **SIZES)
    )
    check_alone(model, REQUESTS, answers)
    assert any(max(lengths) > 0 and -1 in lengths for lengths in steps)


def test_block_tables_are_refused_where_transformers_would_not_pass_them() -> None:
    with pytest.raises(InputError, match="max_blocks_per_request: got 4; allowed: 0"):
        continuous_batching(make_model("llama"), max_blocks_per_request=4)
