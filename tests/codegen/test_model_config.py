"""What is read of a model's config.json, and which kernels follow."""

from __future__ import annotations

import json
import os
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from gqa_cutlass.codegen import DType, Schedule
from gqa_cutlass.codegen.config import ARCHES
from gqa_cutlass.codegen.model_config import find_model
from gqa_cutlass.codegen.model_kernels import kernels_of, ranked
from gqa_cutlass.codegen.models import FULL, MODELS, SLIDING, Model
from gqa_cutlass.codegen.schema.policies import named
from gqa_cutlass.codegen.schema.problem import Problem
from gqa_cutlass.dispatch import choose_config, model_device
from gqa_cutlass.errors import ConfigError, GqaError, InputError

LLAMA = {
    "model_type": "llama", "num_attention_heads": 32, "num_key_value_heads": 8,
    "hidden_size": 4096, "num_hidden_layers": 32, "torch_dtype": "bfloat16",
    "max_position_embeddings": 8192,
}  # fmt: skip


def _written(folder: Path, config: object) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _layers(folder: Path, config: dict[str, Any]) -> list[tuple[Any, ...]]:
    found = find_model(str(_written(folder, config)))
    return [
        (each.name, each.num_layers, each.num_q_heads, each.num_kv_heads, each.head_dim,
         each.window, each.needs)
        for each in found.layer_types
    ]  # fmt: skip


def test_a_file_and_its_folder_are_the_same_model(tmp_path: Path) -> None:
    folder = _written(tmp_path, LLAMA)
    found = find_model(str(folder))
    assert found == find_model(str(folder / "config.json"))
    assert found.dtypes == (DType.BF16,) and found.source == str(folder / "config.json")
    assert _layers(tmp_path, LLAMA) == [(FULL, 32, 32, 8, 128, 0, ())]


@pytest.mark.parametrize(
    ("config", "layers"),
    [
        ({"model_type": "gemma2", "num_hidden_layers": 4},
         [(SLIDING, 2, 8, 4, 256, 4096, ("window_size", "softcap")),
          (FULL, 2, 8, 4, 256, 0, ("softcap",))]),
        ({"model_type": "gemma3", "torch_dtype": "bfloat16",
          "text_config": {"model_type": "gemma3_text", "num_hidden_layers": 12,
                          "sliding_window": 1024}},
         [(SLIDING, 10, 8, 4, 256, 1024, ("window_size",)), (FULL, 2, 8, 4, 256, 0, ())]),
        ({"model_type": "gpt_oss", "layer_types": [SLIDING, FULL] * 2},
         [(SLIDING, 0, 64, 8, 64, 128, ("window_size", "sinks")),
          (FULL, 0, 64, 8, 64, 0, ("sinks",))]),
        (LLAMA | {"model_type": "mistral", "sliding_window": 4096},
         [(SLIDING, 32, 32, 8, 128, 4096, ("window_size",))]),
        (LLAMA | {"model_type": "mistral", "sliding_window": None},
         [(FULL, 32, 32, 8, 128, 0, ())]),
        (LLAMA | {"sliding_window": 8192}, [(FULL, 32, 32, 8, 128, 0, ())]),
        (LLAMA | {"model_type": "qwen2", "sliding_window": 4096, "use_sliding_window": False},
         [(FULL, 32, 32, 8, 128, 0, ())]),
        (LLAMA | {"model_type": "qwen2", "sliding_window": 4096, "use_sliding_window": True,
                  "max_window_layers": 28},
         [(SLIDING, 4, 32, 8, 128, 4096, ("window_size",)), (FULL, 28, 32, 8, 128, 0, ())]),
        ({"model_type": "falcon", "num_attention_heads": 71, "hidden_size": 4544,
          "num_hidden_layers": 32, "multi_query": True, "alibi": True},
         [(FULL, 32, 71, 1, 64, 0, ("alibi_slopes",))]),
        (LLAMA | {"layer_types": ["linear_attention", FULL]}, [(FULL, 1, 32, 8, 128, 0, ())]),
        (LLAMA | {"full_attention_interval": 4}, [(FULL, 8, 32, 8, 128, 0, ())]),
    ],
    ids=["gemma2", "gemma3", "gpt-oss", "mistral-v0.1", "mistral-v0.3", "window-of-all",
         "qwen2-off", "qwen2-on", "falcon", "hybrid", "interval"],
)  # fmt: skip
def test_layers_are_what_the_file_says(
    tmp_path: Path, config: dict[str, Any], layers: list[tuple[Any, ...]]
) -> None:
    assert _layers(tmp_path, config) == layers


@pytest.mark.parametrize(
    "kind",
    ["llama", "mistral", "mixtral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "gpt_oss",
     "phi", "phi3", "cohere2", "olmo3", "falcon", "granite", "starcoder2"],
)  # fmt: skip
def test_what_files_leave_out_is_as_in_transformers(tmp_path: Path, kind: str) -> None:
    """A file without defaults, as hubs have it, says the same as the whole configuration."""
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(kind, max_position_embeddings=1 << 17)
    whole = json.loads(config.to_json_string(use_diff=False))
    text_only = {"model_type": kind, "num_hidden_layers": config.num_hidden_layers}
    sizes = {"gemma3_text", "gemma2", "gpt_oss"}  # whose published files leave sizes out
    sparse = text_only if kind in sizes else {k: v for k, v in whole.items() if k != "layer_types"}
    assert _layers(tmp_path, sparse) == _layers(tmp_path, whole)
    types = getattr(config, "layer_types", None) or []
    counted = {name: count for name, count, *_ in _layers(tmp_path, whole)}
    assert {SLIDING, FULL} & set(types) <= set(counted)
    assert all(types.count(name) in (0, count) for name, count in counted.items()) or not types


BAD = {
    "no heads": ({"hidden_size": 64}, "has no num_attention_heads"),
    "mla": (LLAMA | {"kv_lora_rank": 512}, "multi-head latent attention"),
    "chunks": (LLAMA | {"attention_chunk_size": 8192}, "chunked attention"),
    "blocks": (LLAMA | {"blocksparse_block_size": 64}, "block-sparse attention"),
    "unread": (LLAMA | {"block_types": ["recurrent", "attention"]}, "a way that is not read"),
    "uneven": (LLAMA | {"num_key_value_heads": 7}, "divisors of 32 query heads"),
    "text": (LLAMA | {"num_attention_heads": "32"}, "a whole number from 1"),
    "huge": (LLAMA | {"num_attention_heads": 10**30}, "a whole number from 1"),
    "true": (LLAMA | {"num_attention_heads": True}, "a whole number from 1"),
    "kind": (LLAMA | {"layer_types": ["telepathy"]}, "full_attention, sliding_attention"),
    "kinds": (LLAMA | {"layer_types": 3}, "a list of names"),
    "no keys": (LLAMA | {"layer_types": ["mamba"]}, "keeps keys and values"),
    "pattern": (LLAMA | {"sliding_window": 64, "sliding_window_pattern": "XY"}, "letters L and G"),
    "softcap": (LLAMA | {"attn_logit_softcapping": "50"}, "a number from 0 on"),
    "hidden": (LLAMA | {"hidden_size": 4095}, "multiples of 32 query heads"),
    "decoder": (LLAMA | {"is_encoder_decoder": True}, "a decoder alone"),
    "list": ([LLAMA], "holds no object"),
    "head_dim": (LLAMA | {"head_dim": 512}, "no kernel for layers of full_attention"),
    "float32": (LLAMA | {"torch_dtype": "float32"}, "--dtype: got none"),
}


@pytest.mark.parametrize(("config", "said"), BAD.values(), ids=BAD)
def test_what_no_kernel_does_is_refused(tmp_path: Path, config: object, said: str) -> None:
    with pytest.raises(GqaError) as raised:
        kernels_of(ranked(find_model(str(_written(tmp_path, config))), (1,), ()))
    assert said in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "content", ["", "{", "[" * 100_000, "\x00", "1", "null"], ids=range(6)
)  # fmt: skip
def test_a_file_that_is_no_configuration_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(InputError, match="allowed: a config.json"):
        find_model(str(tmp_path))


def test_no_such_model(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Near: .*llama3-8b"):
        find_model("llama3-8")
    with pytest.raises(InputError, match="a folder without config.json"):
        find_model(str(tmp_path))
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(InputError, match="is no file"):
        find_model(str(tmp_path))
    for odd in ("", "x" * 5000, "a\0b"):
        with pytest.raises(InputError, match="neither file nor preset"):
            find_model(odd)


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_presets_are_known_by_their_names_and_sources(model: Model) -> None:
    for name in (model.name, model.name.upper(), model.source, model.source.rpartition("/")[2]):
        assert find_model(name).layer_types == model.attention.layer_types


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_dispatch_chooses_among_a_models_kernels(model: Model) -> None:
    """Whatever the batch and the length, on every architecture, for every number of ranks."""
    layers = ranked(model.attention, [tp for tp in (1, 2, 4, 8) if not model.num_q_heads % tp and (
        not model.num_kv_heads % tp or not tp % model.num_kv_heads)], ())  # fmt: skip
    kernels = set(kernels_of(layers))
    for each in layers:
        forms = {k.policies for k in kernels_of([each])}
        rings = [policies for policies in forms if named("PagedCache") in policies]
        assert len(forms) == 1 + bool(each.layers.window) and len(rings) == bool(each.layers.window)
        for mine, (batch, length) in product(forms, ((1, 128), (1, 131072), (64, 8192))):
            problem = Problem(
                batch_size=batch, num_q_heads=each.layers.num_q_heads,
                num_kv_heads=each.layers.num_kv_heads, head_dim=each.layers.head_dim,
                max_seq_len=length, dtype=each.dtype, vec_width=8, append=True, policies=mine,
                window=each.layers.window or None, page_size=16 if mine in rings else None,
            )  # fmt: skip
            for arch in ("sm_80", "sm_90a"):
                chosen, _ = choose_config(problem, model_device(ARCHES[arch]))
                assert chosen in kernels


def test_ranks_divide_heads_and_share_the_last_kv_head() -> None:
    model = find_model("llama3-70b")
    found = [each.layers for each in ranked(model, (1, 8, 64), ())]
    assert [(m.num_q_heads, m.num_kv_heads) for m in found] == [(64, 8), (8, 1), (1, 1)]
    for tp in (3, 128, 5):
        with pytest.raises(InputError, match=f"--tp: got {tp} for 64 query heads and 8 KV heads"):
            ranked(model, (tp,), ())
    both = kernels_of(ranked(model, (1,), tuple(DType)), paged=True, dependent=True)
    assert len(both) == 2 * 2 * len(Schedule) and {k.pdl for k in both} == {False, True}
    assert all("paged" in k.name for k in both)


def test_a_kernel_that_cannot_be_is_an_error_that_names_the_layers(tmp_path: Path) -> None:
    folder = _written(tmp_path, LLAMA | {"head_dim": 20})
    with pytest.raises(ConfigError, match="layers of full_attention: .*head_dim: got 20"):
        kernels_of(ranked(find_model(str(folder)), (1,), ()))
