"""transformers' generate with our attention and cache, beside eager attention.

A tiny Llama with random weights, so that nothing is fetched. Any Llama, Qwen2, Qwen3 or Phi-3 from
`from_pretrained(..., dtype=torch.bfloat16)` takes its place.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from gqa_cutlass.integrations.transformers import GqaCache, register

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def main(tokens: int = 4) -> tuple[Tensor, Tensor]:
    """Generate with ours, then with eager attention; returns both."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=256, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=1, pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float16).to(DEVICE).eval()
    prompts = torch.tensor([[0, 0, 11, 12, 13], [21, 22, 23, 24, 25]], device=DEVICE)
    options = {
        "attention_mask": (prompts != 0).long(), "max_new_tokens": tokens, "do_sample": False
    }  # fmt: skip

    model.set_attn_implementation(register())
    cache = GqaCache(model.config, max_cache_len=64)
    ours = model.generate(prompts, past_key_values=cache, **options)

    model.set_attn_implementation("eager")
    eager = model.generate(prompts, **options)
    print("ours: ", ours[:, -tokens:].tolist())
    print("eager:", eager[:, -tokens:].tolist())
    return ours, eager


if __name__ == "__main__":
    main()
