"""Layers with sliding windows in a `GqaCache`: what they keep, see, and refuse."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from compiling import GROUP
from greedy import check
from helpers import few

transformers = pytest.importorskip("transformers")

from test_transformers import (  # noqa: E402
    NAME,
    ROOM,
    WITH_FEATURES,
    make_model,
    ours,
    prompt,
    registered,
    step,
)
from transformers.masking_utils import (  # noqa: E402
    and_masks,
    or_masks,
    sliding_window_causal_mask_function,
)

from gqa_cutlass import InputError  # noqa: E402
from gqa_cutlass.integrations.transformers import GqaCache, mask  # noqa: E402

__all__ = ["registered"]  # a fixture

pytestmark = pytest.mark.xdist_group(GROUP)

WINDOWS = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}


def test_a_layer_with_a_window_keeps_no_more() -> None:
    model = make_model("qwen2", use_sliding_window=True, **WINDOWS)
    cache = GqaCache(model.config, 512)
    check(model, ours(model, cache, "left"))
    window, full = cache.storage.caches
    assert cache.is_sliding == [True, False]
    assert (window.window, full.window) == (4, None)
    assert (window.k.shape[1], full.k.shape[1]) == (96, 512)


@pytest.mark.parametrize("name", WITH_FEATURES)
def test_features_beside_windows(name: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "gqa_cutlass")
    model = make_model(name, **WINDOWS)
    check(model, ours(model, GqaCache(model.config, ROOM), "left"))
    notes = [r.message for r in caplog.records if "transformers:" in r.message]
    assert notes == ["transformers: attention goes through plain torch: a prompt"]
    check(model, ours(model, transformers.DynamicCache(config=model.config), "left"))


@pytest.mark.parametrize("kind", ["right", "holes"])
def test_padding_that_a_window_would_count_is_refused(kind: str) -> None:
    model = make_model("qwen2", use_sliding_window=True, **WINDOWS)
    cache = GqaCache(model.config, ROOM)
    with pytest.raises(InputError, match="padding: got some behind tokens; allowed: padding on"):
        ours(model, cache, kind)
    assert cache.storage.caches[0].lengths == [0, 0]
    model = make_model("qwen2", use_sliding_window=True, **WINDOWS | {"sliding_window": ROOM})
    check(model, ours(model, GqaCache(model.config, ROOM), kind))


def test_mistral_has_nothing_but_windows() -> None:
    model = make_model("mistral", sliding_window=4)
    cache = GqaCache(model.config, ROOM)
    assert cache.storage.windows == [4, 4]
    check(model, ours(model, cache, "left"))


def test_gemma3_has_windows_in_most_layers() -> None:
    model = make_model("gemma3", **WINDOWS)
    cache = GqaCache(model.config, ROOM)
    assert cache.storage.windows == [4, None]
    check(model, ours(model, cache, "left"))


@pytest.mark.parametrize(
    "pieces", few([[5, 3, 1, 2, 1], [2, 40, 1, 100, 1, 33, 1], [1, 6, 1, 5, 1]], 2)
)
def test_a_second_prompt_sees_the_window_before_it(pieces: list[int]) -> None:
    """By the kernel, or, of more tokens than it takes, by torch."""
    model = make_model("qwen2", use_sliding_window=True, max_position_embeddings=256, **WINDOWS)
    results = []
    for name in (NAME, "eager"):
        model.set_attn_implementation(name)
        cache = GqaCache(model.config, 200) if name == NAME else transformers.DynamicCache()
        tokens = torch.arange(sum(pieces)).remainder(63).add(1).expand(2, -1).split(pieces, dim=1)
        results.append(torch.cat([step(model, cache, piece) for piece in tokens], dim=1))
    torch.testing.assert_close(*results, atol=4e-3, rtol=0)


def test_windows_are_cropped_as_far_as_they_are_kept() -> None:
    model = make_model("qwen2", use_sliding_window=True, **WINDOWS)
    model.set_attn_implementation(NAME)
    cache = GqaCache(model.config, 200)
    for _ in range(3):
        step(model, cache, prompt()[:, :1].expand(-1, 50))
    cache.crop(-20)
    assert cache.get_seq_length() == 130
    with pytest.raises(InputError, match="older tokens"):
        cache.crop(-20)


def test_masks_that_are_more_than_a_window_are_refused() -> None:
    def more(*_: object) -> bool:
        return True

    window, other = (sliding_window_causal_mask_function(size) for size in (4, 5))
    asked = {"q_length": 1, "kv_length": 0, "local_size": 4}
    assert mask(mask_function=window, **asked) is None
    for function in (other, or_masks(window, more), and_masks(window, more), more):
        with pytest.raises(InputError, match="a mask of its own"):
            mask(mask_function=function, **asked)
    with pytest.raises(InputError, match="a mask of its own"):
        mask(mask_function=window, use_vmap=True, **asked)


@pytest.mark.parametrize("scales", few([{}, {"k_scale": "token", "v_scale": "token"}]), ids=str)
def test_a_second_prompt_sees_a_window_of_8_bits(scales: dict[str, Any]) -> None:
    model = make_model("qwen2", use_sliding_window=True, max_position_embeddings=256, **WINDOWS)
    model.set_attn_implementation(NAME)
    results = []
    for kind in ({}, {"cache_dtype": torch.float8_e4m3fn} | scales):
        cache = GqaCache(model.config, 200, **kind)
        tokens = torch.arange(90).remainder(63).add(1).expand(2, -1).split([30, 50, 10], dim=1)
        results.append(torch.cat([step(model, cache, piece) for piece in tokens], dim=1))
    assert 1e-4 < (results[0] - results[1]).abs().max() < 0.06
