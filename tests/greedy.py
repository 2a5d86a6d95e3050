"""Greedy tokens of a model, and when they are those of eager attention."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

NAME = "gqa_cutlass"


@dataclass(frozen=True, kw_only=True)
class Generated:
    """What `generate` made.

    Args:
        sequences: Prompt and new tokens, [batch, tokens].
        mask: Where the prompt's tokens are real, [batch, tokens of the prompt].
        logits: Of every new token, [batch, new tokens, vocabulary]; None with beams.
        scores: With beams, the mean logarithm of the new tokens' probabilities, [batch].
    """

    sequences: Tensor
    mask: Tensor
    logits: Tensor | None
    scores: Tensor | None


def cache_of(model: Any, cache: Any) -> dict[str, Any]:
    """A cache under the name that this version of transformers has for it."""
    known = inspect.signature(model.forward).parameters
    return {"cache" if "cache" in known else "past_key_values": cache}


def generate(
    model: Any, prompt: Tensor, cache: Any, *, tokens: int, mask: Tensor | None = None,
    attention: str = NAME, **options: Any,
) -> Generated:  # fmt: skip
    """Generate with a cache, greedily or all of `num_beams`; None lets transformers choose one."""
    model.set_attn_implementation(attention)
    mask = torch.ones_like(prompt) if mask is None else mask
    beams = options.get("num_beams", 1)
    with torch.no_grad():
        made = model.generate(
            prompt, attention_mask=mask, max_new_tokens=tokens, min_new_tokens=tokens,
            do_sample=False, return_dict_in_generate=True, output_logits=beams == 1,
            output_scores=beams > 1, num_return_sequences=beams,
            **cache_of(model, cache), **options,
        )  # fmt: skip
    return Generated(
        sequences=made.sequences,
        mask=mask.repeat_interleave(beams, dim=0),
        logits=torch.stack(made.logits, dim=1) if beams == 1 else None,
        scores=made.sequences_scores if beams > 1 else None,
    )


def check(model: Any, found: Generated, tolerance: float = 4e-3) -> None:
    """Assert that every token is the one that eager attention chooses after the same tokens.

    All logits may differ by the tolerance. Two tokens tie if eager attention's logits for them
    differ by twice as much at most: either is right then.
    """
    right, worst = compared(model, found)
    assert worst <= tolerance, f"logits differ by {worst}, more than {tolerance}"
    check_tokens(model, found, tolerance, right)


def check_tokens(
    model: Any, found: Generated, tolerance: float = 4e-3, right: Tensor | None = None
) -> None:
    """The same of tokens whose logits are not known."""
    count = found.sequences.shape[1] - found.mask.shape[1]
    if right is None:
        right = eager_logits(model, found)[:, -count:]
    chosen = right.gather(2, found.sequences[:, -count:, None])[..., 0]
    assert (right.amax(2) - chosen <= 2 * tolerance).all(), "another token"


def compared(model: Any, found: Generated) -> tuple[Tensor, float]:
    """The logits of eager attention for the new tokens, and how far from them those found are."""
    assert found.logits is not None
    right = eager_logits(model, found)[:, -found.logits.shape[1] :]
    return right, (found.logits.double() - right).abs().max().item()


def check_beams(model: Any, found: Generated, tolerance: float = 4e-3) -> None:
    """Assert that beams have the scores that eager attention gives their tokens.

    Rows that do not belong to a beam's tokens would give it other scores. Which of two beams with
    about the same score is kept may differ.
    """
    assert found.scores is not None
    count = found.sequences.shape[1] - found.mask.shape[1]
    chances = eager_logits(model, found)[:, -count:].log_softmax(2)
    chosen = chances.gather(2, found.sequences[:, -count:, None])[..., 0]
    torch.testing.assert_close(found.scores.double(), chosen.mean(1), atol=tolerance, rtol=0)


def eager_logits(model: Any, found: Generated) -> Tensor:
    """What eager attention makes of all the tokens at once; float64 [batch, tokens - 1, vocab]."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    tokens = found.sequences[:, :-1]
    generated = tokens.shape[1] - found.mask.shape[1]
    mask = torch.cat([found.mask, found.mask.new_ones(len(tokens), generated)], dim=1)
    prompt = (found.mask.cumsum(1) - 1).masked_fill(found.mask == 0, 0)
    more = prompt[:, -1:] + 1 + torch.arange(generated, device=prompt.device)  # as generate counts
    positions = torch.cat([prompt, more], dim=1)
    with torch.no_grad():
        logits = model(
            input_ids=tokens, attention_mask=mask, position_ids=positions, use_cache=False
        ).logits
    model.set_attn_implementation(before)
    assert isinstance(logits, Tensor)
    return logits.double()
