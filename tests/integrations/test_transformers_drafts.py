"""Several tokens behind others in a GqaCache: assisted generation, beside eager attention."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from compiling import GROUP
from greedy import NAME, cache_of, check, generate
from helpers import few
from torch import Tensor

transformers = pytest.importorskip("transformers")

from gqa_cutlass import KVCache  # noqa: E402
from gqa_cutlass.integrations import transformers as integration  # noqa: E402
from gqa_cutlass.integrations.transformers import GqaCache  # noqa: E402

pytestmark = pytest.mark.xdist_group(GROUP)


@pytest.fixture
def model() -> Iterator[Any]:
    """A tiny Llama, and nothing noted in the log so far."""
    integration.register()
    noted = set(integration._noted)
    integration._noted.clear()
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=256, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=1, max_position_embeddings=64,
        pad_token_id=0, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    yield transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float16).eval()
    integration._noted.update(noted)


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Query tokens of every decode."""
    found: list[int] = []
    decode = KVCache.decode

    def noted(self: Any, q: Tensor, *args: Any, **options: Any) -> Any:
        found.append(q.shape[1])
        return decode(self, q, *args, **options)

    monkeypatch.setattr(KVCache, "decode", noted)
    return found


E4M3: dict[str, Any] = {"cache_dtype": torch.float8_e4m3fn}
KINDS = {
    "16 bits": {},
    "8 bits": E4M3,
    "scales of tokens": E4M3 | dict(k_scale="token", v_scale="token"),
}


@pytest.mark.parametrize("kind", few(KINDS))
def test_assisted_generation_has_the_tokens_of_eager_attention(
    model: Any, counts: list[int], kind: str
) -> None:
    """Drafts are decoded at once, and taken back by `crop`."""
    prompt = torch.tensor([[11, 12, 13, 14, 11, 12, 13, 14]])
    cache = GqaCache(model.config, 24, **KINDS[kind])
    found = generate(model, prompt, cache, tokens=6, prompt_lookup_num_tokens=3)
    check(model, found, 4e-3 if kind == "16 bits" else 0.03)
    assert max(counts) > 1
    assert cache.storage.caches[0].lengths == [8 + 6 - 1]


def test_a_mask_that_is_not_causal_goes_through_sdpa(
    model: Any, counts: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "gqa_cutlass")
    tokens = torch.arange(1, 9)[None]
    own = torch.zeros(1, 1, 2, 8, dtype=torch.float16)
    own[0, 0, 0, 7] = own[0, 0, 1, 2] = -(2.0**15)
    outs = []
    for name in (NAME, "eager"):
        model.set_attn_implementation(name)
        cache = (
            GqaCache(model.config, 8)
            if name == NAME
            else transformers.DynamicCache(config=model.config)
        )
        with torch.no_grad():
            model(tokens[:, :6], **cache_of(model, cache))
            out = model(tokens[:, 6:], attention_mask=own, **cache_of(model, cache))
        outs.append(out.logits)
    torch.testing.assert_close(outs[0], outs[1], atol=4e-3, rtol=0)
    assert not counts and "attention goes through SDPA: a prompt" in caplog.text
