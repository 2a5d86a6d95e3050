"""transformers' continuous batching with our attention, beside each request alone.

A tiny Llama with random weights, so that nothing is fetched. Any Llama, Qwen2, Qwen3, Mistral or
Phi-3 from `from_pretrained(..., dtype=torch.bfloat16)` takes its place.
"""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig

from gqa_cutlass.integrations.transformers import continuous_batching

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def main(tokens: int = 3) -> tuple[list[list[int]], list[list[int]]]:
    """Answer requests in one batch, then each alone with eager attention; returns both."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=128, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float16).to(DEVICE).eval()
    prompts = [[11, 12, 13], [21, 22, 23, 24, 25], [31]]
    generation = GenerationConfig(
        max_new_tokens=tokens, do_sample=False, eos_token_id=-1, pad_token_id=0
    )

    batches = continuous_batching(model, num_blocks=16, max_batch_tokens=32)
    answers = model.generate_batch(
        prompts, generation_config=generation, continuous_batching_config=batches
    )
    by_prompt = {tuple(answer.prompt_ids): answer.generated_tokens for answer in answers.values()}
    ours = [by_prompt[tuple(prompt)] for prompt in prompts]

    model.set_attn_implementation("eager")
    alone = []
    for prompt in prompts:
        ids = torch.tensor([prompt], device=DEVICE)
        alone.append(model.generate(ids, generation_config=generation)[0, -tokens:].tolist())
    print("in one batch:", ours)
    print("alone:       ", alone)
    return ours, alone


if __name__ == "__main__":
    main()
