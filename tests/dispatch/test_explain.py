"""How `explain` says what dispatch chose."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from helpers import call_tensors

from gqa_cutlass import explain
from gqa_cutlass.codegen import Math, Schedule, shipped
from gqa_cutlass.errors import InputError

MODELS = {  # query heads, KV heads, head_dim
    "llama-3-8b": (32, 8, 128),
    "llama-3-70b": (64, 8, 128),
    "qwen2.5-0.5b": (14, 2, 64),
    "qwen2.5-7b": (28, 4, 128),
    "qwen3-30b-a3b": (32, 4, 128),
    "phi-3-mini": (32, 32, 96),
    "phi-3-medium": (40, 10, 128),
    "gemma-2-9b": (16, 8, 256),
}


def _explain(q_heads: int, kv_heads: int, head_dim: int, **changes: Any) -> Any:
    tensors = call_tensors(
        q_heads=q_heads, kv_heads=kv_heads, head_dim=head_dim, max_seq_len=4096,
        dtype=torch.bfloat16, device="meta",
    )  # fmt: skip
    return explain(**tensors, **changes)


@pytest.fixture(autouse=True)
def _own_store(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GQA_CUTLASS_CACHE_DIR", str(tmp_path))


@pytest.mark.parametrize("arch", [None, "sm_80", "sm_120f"])
@pytest.mark.parametrize("model", MODELS)
def test_real_models_run_shipped_kernels(model: str, arch: str | None) -> None:
    found = _explain(*MODELS[model], arch=arch)
    assert found.dispatch.config in shipped()
    assert found.dispatch.config.math is Math.TENSOROP
    assert found.device.arch.name == (arch or "sm_90a")


def test_explanation_is_a_readable_report() -> None:
    found = _explain(*MODELS["llama-3-8b"], num_splits=2)
    lines = dict(line.split(maxsplit=1) for line in str(found).splitlines())
    assert lines["kernel"] == found.dispatch.config.name
    assert lines["why"].startswith("tensorop: ") and "2 splits, as asked" in lines["why"]
    assert lines["arch"] == "sm_90a, 132 SMs"
    assert lines["grid"].startswith("(8, 2, 2)")
    assert lines["cluster"] == "2 blocks, along the splits"
    assert f"{found.dispatch.shape.block} threads" in lines["block"]
    assert lines["block"].endswith(" 2 stages")
    assert lines["reads"].startswith(f"{2 * 2 * 4096 * 8 * 128 * 2} bytes")
    assert lines["cubin"].startswith("not built yet")


def test_explanation_says_what_becomes_of_a_kernel_that_is_not_built(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert "not built yet; the first call compiles it" in str(_explain(*MODELS["llama-3-8b"]))
    monkeypatch.setenv("GQA_CUTLASS_DISABLE_JIT", "1")
    assert "not built yet; calls raise KernelMissingError" in str(_explain(*MODELS["llama-3-8b"]))


@pytest.mark.parametrize(
    ("arch", "schedule", "why"),
    [
        ("sm_90a", Schedule.TMA, "tma: 32.0 MiB, at most 128; few heads"),
        ("sm_80", Schedule.MULTISTAGE, "multistage: sm_80 is not among sm_90a"),
        ("sm_100f", Schedule.MULTISTAGE, "multistage: sm_100f is not among sm_90a"),
    ],
)
def test_explanation_says_why_this_schedule(arch: str, schedule: Schedule, why: str) -> None:
    found = _explain(*MODELS["llama-3-8b"], arch=arch)
    assert found.dispatch.config.schedule is schedule
    assert why in str(found)


def test_explanation_of_clusters_counts_them() -> None:
    found = str(_explain(*MODELS["llama-3-8b"]))
    assert "1 cluster of 4 for each of 16 heads, at most 8 tiles per warp" in found


def test_explanation_of_misaligned_tensors_names_the_reason() -> None:
    tensors = call_tensors(head_dim=128, max_seq_len=64)
    tensors["q"] = torch.ones(2 * 8 * 128 + 1, dtype=torch.float16)[1:].view(2, 8, 128)
    found = explain(**tensors)
    assert found.dispatch.config.math is Math.SIMT
    assert "aligned to 2 bytes" in str(found)


def test_unknown_architecture_is_refused() -> None:
    with pytest.raises(InputError, match="arch: got 'sm_70'; allowed: sm_80, .*sm_120f"):
        _explain(*MODELS["llama-3-8b"], arch="sm_70")


def test_explaining_bad_input_raises_as_the_call_does() -> None:
    with pytest.raises(InputError, match="head counts: got 30 query heads and 8 KV heads"):
        _explain(30, 8, 128)
    with pytest.raises(InputError, match="num_splits: got -1"):
        _explain(*MODELS["llama-3-8b"], num_splits=-1)


def test_explanation_shows_the_terms_of_the_model() -> None:
    """Of the multistage schedule those of its cost, which multiply to what dispatch compared."""
    found = _explain(*MODELS["llama-3-8b"], arch="sm_80", ragged=False)
    terms = {term.name: term.value for term in found.terms}
    shares = [
        terms[name] / 100 for name in ("warps busy", "multiprocessors busy", "bytes in flight")
    ]
    expected = terms["reading at full rate"] / math.prod(shares) + terms["merging"]
    assert terms["modelled"] == pytest.approx(expected)
    assert f"modelled reading and merging {terms['modelled']:.1f} us" in str(found)
    tma = {term.name: term for term in _explain(*MODELS["llama-3-8b"]).terms}
    assert tma["caches"].value <= tma["caches"].limit


@pytest.mark.parametrize("arch", ["sm_90a", "sm_80"])
def test_explanation_shows_the_figures_of_the_lengths_that_were_weighed(arch: str) -> None:
    told = _explain(*MODELS["llama-3-8b"], arch=arch, max_seqlen=1000)
    tensors = call_tensors(
        q_heads=32, kv_heads=8, head_dim=128, max_seq_len=1024, dtype=torch.bfloat16, device="meta"
    )
    short, full = explain(**tensors, arch=arch), _explain(*MODELS["llama-3-8b"], arch=arch)
    assert told.terms == short.terms != full.terms
    assert told.runner_up_terms == short.runner_up_terms != full.runner_up_terms


def test_explanation_names_the_runner_up() -> None:
    hopper = _explain(*MODELS["llama-3-8b"])
    assert hopper.dispatch.config.tma and not hopper.runner_up.config.tma
    assert f"runner-up  {hopper.runner_up.config.name}; grid" in str(hopper)
    ampere = _explain(*MODELS["llama-3-8b"], arch="sm_80", ragged=False)
    assert ampere.runner_up.config == ampere.dispatch.config
    assert ampere.runner_up.num_splits != ampere.dispatch.num_splits
    modelled = [next(t for t in each if t.name == "modelled").value
                for each in (ampere.terms, ampere.runner_up_terms)]  # fmt: skip
    assert modelled[0] <= modelled[1]
    assert "none: nothing else" in str(explain_alone())


def explain_alone() -> Any:
    """One token, one head: there is nothing to choose on Ampere."""
    tensors = call_tensors(batch=1, q_heads=1, kv_heads=1, max_seq_len=1, device="meta")
    return explain(**tensors, arch="sm_80")


def test_explanation_is_the_same_for_programs() -> None:
    found = _explain(*MODELS["llama-3-8b"])
    facts = json.loads(json.dumps(found.facts()))
    assert facts["kernel"] == found.dispatch.config.name and facts["cubin"] is None
    assert facts["runner_up"]["kernel"] == found.runner_up.config.name
    assert facts["grid"] == list(found.dispatch.shape.grid)
