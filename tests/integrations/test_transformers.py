"""Models of transformers, tiny and with random weights: our attention and cache against theirs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from compiling import GROUP
from greedy import Generated, cache_of, check, check_beams, generate
from helpers import few
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

transformers = pytest.importorskip("transformers")

from gqa_cutlass import CacheOverflowError, InputError  # noqa: E402
from gqa_cutlass.integrations import transformers as integration  # noqa: E402
from gqa_cutlass.integrations.transformers import NAME, GqaCache, attention, mask  # noqa: E402

pytestmark = pytest.mark.xdist_group(GROUP)

PROMPT, TOKENS, ROOM = 6, 4, 16
MODELS = {  # all with heads of 64, in groups of 4: one kernel serves them
    "llama": lambda **sizes: transformers.LlamaConfig(**sizes),
    "qwen2": lambda **sizes: transformers.Qwen2Config(**sizes),
    "qwen3": lambda **sizes: transformers.Qwen3Config(head_dim=64, **sizes),
    "phi3": lambda **sizes: transformers.Phi3Config(**sizes),
    # A cap that bends scores, and all experts for every token: which ones count is no lottery.
    "gemma2": lambda **sizes: transformers.Gemma2Config(
        head_dim=64, query_pre_attn_scalar=16, attn_logit_softcapping=0.5,
        **{"layer_types": ["full_attention"] * 2} | sizes,
    ),
    "gpt_oss": lambda **sizes: transformers.GptOssConfig(
        head_dim=64, num_local_experts=2, num_experts_per_tok=2,
        **{"layer_types": ["full_attention"] * 2} | sizes,
    ),
}  # fmt: skip
WITH_FEATURES = "gemma2", "gpt_oss"
OTHERS = {  # for tests of their windows
    "mistral": lambda **sizes: transformers.MistralConfig(**sizes),
    "gemma3": lambda **sizes: transformers.Gemma3TextConfig(
        head_dim=64, query_pre_attn_scalar=64, **sizes
    ),
}


def make_model(name: str = "llama", dtype: torch.dtype = torch.float16, **sizes: Any) -> Any:
    config = (MODELS | OTHERS)[name](
        **{
            "vocab_size": 64, "hidden_size": 256, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 1, "max_position_embeddings": 64,
            "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None,
        } | sizes,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    for layer, sinks in enumerate(sinks_of(model)):
        torch.nn.init.uniform_(sinks, -1 - layer, 3)
    return model


def sinks_of(model: Any) -> list[Tensor]:
    return [parameter for name, parameter in model.named_parameters() if "sinks" in name]


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    """Registered, and with nothing noted in the log so far."""
    integration.register()
    noted = set(integration._noted)
    integration._noted.clear()
    yield
    integration._noted.update(noted)


@pytest.fixture(scope="module")
def llama() -> Any:
    return make_model()


def prompt() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(1, 64, (2, PROMPT), generator=generator)


def padding(kind: str) -> Tensor:
    """Where the prompt's tokens are real: the first sequence is the shorter one."""
    real = torch.ones(2, PROMPT, dtype=torch.long)
    where = {"none": [], "left": [0, 1, 2], "right": [4, 5], "holes": [0, 3]}[kind]
    real[0, where] = 0
    return real


def ours(model: Any, cache: Any, kind: str = "none", **options: Any) -> Generated:
    return generate(model, prompt(), cache, tokens=TOKENS, mask=padding(kind), **options)


@pytest.mark.parametrize("name", MODELS)
def test_greedy_tokens_are_those_of_eager_attention(name: str) -> None:
    model = make_model(name)
    cache = GqaCache(model.config, ROOM)
    check(model, ours(model, cache, "left"))
    # All but the last token are in the cache; of the padding nothing is.
    assert cache.storage.caches[0].lengths == [PROMPT - 3 + TOKENS - 1, PROMPT + TOKENS - 1]
    assert cache.get_seq_length() == PROMPT + TOKENS - 1


@pytest.mark.parametrize("kind", ["none", "right", "holes"])
def test_padding_of_any_kind_is_not_attended(llama: Any, kind: str) -> None:
    check(llama, ours(llama, GqaCache(llama.config, ROOM), kind))


def test_beams_continue_what_they_branched_from(llama: Any) -> None:
    check_beams(llama, ours(llama, GqaCache(llama.config, ROOM), "left", num_beams=3))


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_caches_of_transformers_serve_as_well(
    llama: Any, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "gqa_cutlass")
    cache = {
        "dynamic": lambda: transformers.DynamicCache(config=llama.config),
        "static": lambda: transformers.StaticCache(config=llama.config, max_cache_len=ROOM),
    }[kind]()
    check(llama, ours(llama, cache))
    notes = [r.message for r in caplog.records if "transformers:" in r.message]
    assert "transformers: attention goes through SDPA: a prompt" in notes
    assert any("GqaCache" in note for note in notes) == (kind == "static")
    assert len(notes) == len(set(notes))  # each once


def test_a_conversation_goes_on(llama: Any) -> None:
    """A second prompt after generated tokens, and tokens taken back."""
    cache = GqaCache(llama.config, ROOM)
    first = ours(llama, cache).sequences
    longer = torch.cat([first, prompt()[:, :3]], dim=1)
    check(llama, generate(llama, longer, cache, tokens=2))
    held = cache.get_seq_length()
    cache.crop(-2)
    assert cache.get_seq_length() == held - 2
    assert cache.storage.caches[1].lengths == [held - 2] * 2
    cache.reset()
    assert cache.get_seq_length() == 0
    check(llama, ours(llama, cache, "left"))


def test_a_window_of_a_layer_is_the_kernels() -> None:
    """With a cache of transformers that holds more than the window shows."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, h, n, 64, generator=generator).half() for h, n in ((4, 1), (1, 9), (1, 9))
    )
    for window in (1, 4, 9, 20):
        module = torch.nn.Module()
        out, _ = attention(module, q, k, v, None, scaling=0.125, sliding_window=window)
        seen = (t[:, :, -window:] for t in (k, v))
        right = torch.nn.functional.scaled_dot_product_attention(
            q, *seen, scale=0.125, enable_gqa=True
        )
        torch.testing.assert_close(out, right.transpose(1, 2), atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("name", WITH_FEATURES)
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_features_with_caches_of_transformers(
    name: str, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "gqa_cutlass")
    model = make_model(name)
    make = transformers.DynamicCache if kind == "dynamic" else transformers.StaticCache
    sizes = {} if kind == "dynamic" else {"max_cache_len": ROOM}
    check(model, ours(model, make(config=model.config, **sizes)))
    notes = [r.message for r in caplog.records if "transformers:" in r.message]
    assert "transformers: attention goes through plain torch: a prompt" in notes
    assert len(notes) == (1 if kind == "dynamic" else 2)  # the second is of the static one's mask


@pytest.mark.parametrize("name", WITH_FEATURES)
def test_without_its_feature_a_model_is_another(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests above would see it."""
    model = make_model(name)
    monkeypatch.setattr(integration, "_features", lambda options: {})
    monkeypatch.setattr(integration, "sdpa_attention_forward", integration.attend_eagerly)
    with pytest.raises(AssertionError, match="logits differ"):
        check(model, ours(model, GqaCache(model.config, ROOM)))


def test_a_prompt_of_one_token(llama: Any) -> None:
    check(llama, generate(llama, prompt()[:, :1], GqaCache(llama.config, ROOM), tokens=2))


def test_a_mask_of_the_callers_own_goes_through_sdpa(llama: Any) -> None:
    """A token that does not see the first one; what came after it was not told apart."""
    results = []
    for name, make in ((NAME, GqaCache), ("eager", None)):
        llama.set_attn_implementation(name)
        cache = make(llama.config, ROOM) if make else transformers.DynamicCache()
        step(llama, cache, prompt())
        custom = torch.ones(2, 1, 1, PROMPT + 1, dtype=torch.bool)
        custom[..., 0] = False
        if name == "eager":
            custom = torch.zeros(custom.shape, dtype=torch.float16).masked_fill(~custom, -6e4)
        step(llama, cache, prompt()[:, :1], attention_mask=custom)
        results.append(step(llama, cache, prompt()[:, 1:2]))
    torch.testing.assert_close(*results, atol=4e-3, rtol=0)


def step(model: Any, cache: Any, tokens: Tensor, **options: Any) -> Tensor:
    """Logits of a forward pass."""
    with torch.no_grad():
        logits = model(input_ids=tokens, use_cache=True, **cache_of(model, cache), **options).logits
    assert isinstance(logits, Tensor)
    return logits


# ---- compiled ----


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kind"),
    few([("windows", "none"), ("gemma2", "left"), ("llama", "none"), ("llama", "left")], 2),
)
def test_compiled_steps_are_one_graph_for_all_lengths(name: str, kind: str) -> None:
    torch._dynamo.reset()
    model = make_model("gemma3", sliding_window=4) if name == "windows" else make_model(name)
    model.set_attn_implementation(NAME)
    real = padding(kind)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    caches = [GqaCache(model.config, ROOM) for _ in range(2)]
    positions = (real.cumsum(-1) - 1).clamp(min=0)
    options = {"attention_mask": real, "position_ids": positions}
    token, _ = (step(model, c, prompt(), **options)[:, -1:].argmax(-1) for c in caches)
    for count in range(1, 4):
        seen = None if kind == "none" else (real.sum(-1, dtype=torch.int32) + count)
        options = {
            "position_ids": positions[:, -1:] + count,
            "attention_mask": None if seen is None else seen[:, None, None, None],
        }
        logits = step(compiled, caches[0], token, **options)
        assert torch.equal(logits, step(model, caches[1], token, **options))
        token = logits.argmax(-1)
    assert counter.frame_count == 1
    assert int(caches[0].get_seq_length()) == caches[1].get_seq_length() == PROMPT + 3
    # Uncompiled, it goes on from what the device has counted.
    more = prompt()[:, :2]
    if kind == "none":
        assert torch.equal(step(model, caches[0], more), step(model, caches[1], more))


def test_a_compiled_step_whose_mask_hides_tokens_gives_nan(llama: Any) -> None:
    torch._dynamo.reset()
    llama.set_attn_implementation(NAME)
    cache = GqaCache(llama.config, ROOM)
    step(llama, cache, prompt())
    compiled = torch.compile(llama, backend="eager", fullgraph=True)
    seen = torch.tensor([PROMPT + 1, PROMPT], dtype=torch.int32)[:, None, None, None]
    positions = torch.full((2, 1), PROMPT)
    logits = step(compiled, cache, prompt()[:, :1], attention_mask=seen, position_ids=positions)
    assert not logits[0].isnan().any() and logits[1].isnan().all()


# ---- what is not allowed ----


def decode_arguments(cache: GqaCache, **options: Any) -> dict[str, Any]:
    """Arguments of the attention function for one token on its way to a cache."""
    query = torch.zeros(2, 4, 1, 64, dtype=torch.float16)
    key = torch.zeros(2, 1, 1, 64, dtype=torch.float16)
    pending, _ = cache.update(key, key, 0)
    module = torch.nn.Module()
    return {
        "module": module, "query": query, "key": pending, "value": pending, "attention_mask": None
    } | options  # fmt: skip


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ({"head_mask": torch.ones(4)}, "mask of heads"),
        ({"sliding_window": 8}, "sliding window"),
        ({"position_bias": torch.zeros(1)}, "bias by position"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_would_be_ignored_is_refused(llama: Any, option: dict[str, Any], says: str) -> None:
    cache = GqaCache(llama.config, ROOM)
    with pytest.raises(InputError, match=says):
        attention(**decode_arguments(cache, **option))
    assert cache.storage.caches[0].lengths == [0, 0]
    tensors = torch.zeros(2, 4, 1, 64), torch.zeros(2, 1, 3, 64), torch.zeros(2, 1, 3, 64)
    if next(iter(option)) in integration.SDPA_IGNORES:  # whatever the cache
        with pytest.raises(InputError, match=says):
            attention(torch.nn.Module(), *tensors, None, **option)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"dropout": 0.5}, "dropout"),
        ({"output_attentions": True}, "the attention weights"),
        ({"query": torch.zeros(2, 4, 1, 64)}, "tensors of torch.float32"),
        ({"query": torch.zeros(2, 4, 1, 20).half(), "key": torch.zeros(2, 1, 3, 20).half(),
          "value": torch.zeros(2, 1, 3, 20).half()}, "head_dim 20"),
        ({"value": torch.zeros(2, 1, 3, 20).half()}, "values of head_dim 20"),
        ({"query": torch.zeros(2, 4, 1, 64).half().requires_grad_()}, "gradients"),
        ({"s_aux": torch.zeros(4).requires_grad_()}, "gradients"),
        ({"softcap": 1.0, "position_bias": torch.zeros(4)}, "plain torch: a bias by position"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_what_the_kernel_does_not_do_goes_to_torch(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, change: dict[str, Any],
    why: str,
) -> None:  # fmt: skip
    caplog.set_level(logging.INFO, "gqa_cutlass")
    asked: list[Any] = []
    result = torch.zeros(1), None

    def sdpa(*arguments: Any, **options: Any) -> tuple[Tensor, None]:
        asked.append(options)
        return result

    has_feature = not integration.FEATURES.keys().isdisjoint(change)
    other = "attend_eagerly" if has_feature else "sdpa_attention_forward"
    monkeypatch.setattr(integration, other, sdpa)
    key = torch.zeros(2, 1, 3, 64, dtype=torch.float16)
    arguments = {
        "query": torch.zeros(2, 4, 1, 64, dtype=torch.float16), "key": key, "value": key,
        "attention_mask": None, "scaling": 0.3,
    }  # fmt: skip
    assert attention(torch.nn.Module(), **(arguments | change)) is result
    assert asked[0]["scaling"] == 0.3
    assert caplog.messages == [m for m in caplog.messages if why in m] != []


@pytest.mark.parametrize("kind", ["none", "bool", "float"])
@pytest.mark.parametrize("tokens", [1, 5])
def test_plain_torch_without_features_is_sdpa(kind: str, tokens: int) -> None:
    """With keys behind the last token's, as static caches have them."""
    generator = torch.Generator().manual_seed(0)
    sizes = (2, 4, tokens, 32), (2, 2, 7, 32), (2, 2, 7, 32), (1, 4, tokens, 7)
    *tensors, bias = (torch.randn(size, generator=generator) for size in sizes)
    sees = torch.rand(2, 1, tokens, 7, generator=generator) < 0.7
    sees[..., 0] = True
    given = {"none": None, "bool": sees, "float": torch.where(sees, 0.0, -1e9)}[kind]
    module = torch.nn.Module()
    module.num_key_value_groups = 2  # type: ignore[assignment]
    options = {"scaling": 0.3, "position_bias": bias, "is_causal": None}
    found, right = (
        attend(module, *tensors, given, **options)[0]
        for attend in (integration.attend_eagerly, integration.sdpa_attention_forward)
    )
    torch.testing.assert_close(found, right)


def test_another_attention_function_does_not_get_our_cache(llama: Any) -> None:
    for name in ("eager", "sdpa"):
        with pytest.raises(InputError, match=r"set_attn_implementation\('gqa_cutlass'\)"):
            generate(llama, prompt(), GqaCache(llama.config, ROOM), tokens=2, attention=name)


def test_a_mask_must_show_what_the_cache_holds(llama: Any) -> None:
    llama.set_attn_implementation(NAME)
    cache = GqaCache(llama.config, ROOM)
    real = padding("left")
    step(llama, cache, prompt(), attention_mask=real)
    token = prompt()[:, :1]
    with pytest.raises(InputError, match="no mask for a padded batch"):
        step(llama, cache, token)
    hidden = torch.cat([real, torch.ones(2, 1, dtype=torch.long)], dim=1)
    hidden[1, 0] = 0
    with pytest.raises(InputError, match="does not show all that was appended"):
        step(llama, cache, token, attention_mask=hidden)
    hidden[1, 0] = 1
    step(llama, cache, token, attention_mask=hidden)
    with pytest.raises(InputError, match="padded batch that goes on"):
        longer = torch.ones(2, PROMPT + 3, dtype=torch.long)
        longer[:, :PROMPT] = real
        step(llama, cache, prompt()[:, :2], attention_mask=longer)
    with pytest.raises(InputError, match="padded batch"):
        cache.crop(-1)
    assert cache.storage.caches[0].lengths == [PROMPT - 2, PROMPT + 1]


def test_a_mask_that_is_not_causal_does_not_fit_our_cache(llama: Any) -> None:
    with pytest.raises(InputError, match="causal"):
        mask(q_length=1, kv_length=0, mask_function=lambda *_: True)


def test_a_full_cache_is_found_before_anything_is_written(llama: Any) -> None:
    cache = GqaCache(llama.config, PROMPT)
    with pytest.raises(CacheOverflowError, match="max_seq_len is 6"):
        ours(llama, cache)
    assert cache.storage.caches[0].lengths == [PROMPT, PROMPT]
    cache.check()
    with pytest.raises(CacheOverflowError):
        ours(llama, GqaCache(llama.config, PROMPT - 1))


@pytest.mark.parametrize(
    "call",
    [
        lambda cache: cache.crop(1),
        lambda cache: cache.layers[0].offload(),
        lambda cache: cache.layers[0].prefetch(),
        lambda cache: cache.batch_repeat_interleave(2),
        lambda cache: cache.batch_select_indices(torch.tensor([0])),
    ],
    ids=["crop", "offload", "prefetch", "repeat", "select"],
)
def test_what_the_cache_does_not_offer_is_refused(
    llama: Any, call: Callable[[GqaCache], None]
) -> None:
    with pytest.raises(InputError, match="GqaCache"):
        call(GqaCache(llama.config, ROOM))


def test_models_that_do_not_fit_are_refused() -> None:
    chunks = transformers.LlamaConfig(num_hidden_layers=2)
    chunks.layer_types, chunks.attention_chunk_size = ["chunked_attention"] * 2, 4
    with pytest.raises(InputError, match="at least one layer has full attention"):
        GqaCache(chunks, ROOM)
    cache = GqaCache(transformers.LlamaConfig(num_hidden_layers=1), ROOM)
    k, v = torch.zeros(1, 1, 2, 64).half(), torch.zeros(1, 1, 2, 20).half()
    with pytest.raises(InputError, match="head_dim_v: got 20"):
        cache.update(k, v, 0)
    with pytest.raises(InputError, match=r"dtype: got torch.float32"):
        cache.update(k.float(), k.float(), 0)
    assert not cache.is_initialized and cache.get_seq_length() == 0
    cache.early_initialization(1, 1, 64, torch.float16, torch.device("cpu"))
    assert cache.is_initialized and cache.layers[0].keys.shape == (1, 1, ROOM, 64)
    with pytest.raises(InputError, match="one device"):
        cache.update(k.to("meta"), k.to("meta"), 0)
