"""A cache of 8 bits for transformers' models: as transformers' own, and what it is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compiling import GROUP
from greedy import Generated, cache_of, compared, generate
from torch import Tensor
from torch._dynamo.utils import counters

transformers = pytest.importorskip("transformers")

from test_transformers import NAME, PROMPT, ROOM, make_model, ours, prompt, step  # noqa: E402

from gqa_cutlass import InputError, KVCache  # noqa: E402
from gqa_cutlass.integrations import transformers as integration  # noqa: E402
from gqa_cutlass.integrations.transformers import GqaCache  # noqa: E402
from gqa_cutlass.integrations.transformers_scales import HEADROOM  # noqa: E402
from gqa_cutlass.proof.reference import same_bits, scale_of_row, stored  # noqa: E402

pytestmark = pytest.mark.xdist_group(GROUP)

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
TOLERANCE = {E4M3: 0.03, E5M2: 0.06}  # of logits, beside a cache of 16 bits


@pytest.fixture(scope="module")
def llama() -> Any:
    integration.register()
    return make_model()


def cache_for(model: Any, dtype: torch.dtype = E4M3, **scales: Any) -> GqaCache:
    return GqaCache(model.config, ROOM, dtype, **scales)


def differences(model: Any, found: Generated) -> float:
    return compared(model, found)[1]


@pytest.mark.parametrize(
    ("dtype", "kind"), [(E4M3, "left"), (E5M2, "none")], ids=["e4m3, padded", "e5m2"]
)
def test_logits_are_next_to_those_of_16_bits(llama: Any, dtype: torch.dtype, kind: str) -> None:
    cache = cache_for(llama, dtype)
    assert 1e-4 < differences(llama, ours(llama, cache, kind)) < TOLERANCE[dtype]
    assert {c.k.dtype for c in cache.storage.caches} == {dtype}


def test_logits_are_those_of_transformers_fp8_cache_with_its_scales(llama: Any) -> None:
    """Which are those of a prompt's largest number. Ours leave room for larger ones behind it."""
    try:
        theirs = transformers.QuantizedCache("fp8", llama.config)
    except (TypeError, ValueError):
        pytest.skip("this transformers has no fp8 cache")
    tokens = ours(llama, cache_for(llama)).sequences
    right = stepwise(llama, "eager", theirs, tokens)
    scales = {
        "k_scale": [layer._quantized_keys[1] for layer in theirs.layers],
        "v_scale": [layer._quantized_values[1] for layer in theirs.layers],
    }
    found = stepwise(llama, NAME, cache_for(llama, **scales), tokens)
    assert (found - right).abs().max() <= 4e-3
    exact = stepwise(llama, NAME, GqaCache(llama.config, ROOM), tokens)
    assert (exact - right).abs().max() > 8e-3  # which would be no test otherwise
    by_prompt = stepwise(llama, NAME, cache_for(llama), tokens)
    assert (by_prompt - exact).abs().max() < (right - exact).abs().max()


def stepwise(model: Any, attention: str, cache: Any, tokens: Tensor) -> Tensor:
    """Logits of a prompt, and of tokens behind it, one by one."""
    model.set_attn_implementation(attention)
    pieces = [tokens[:, :PROMPT], *tokens[:, PROMPT:].split(1, dim=1)]
    with torch.no_grad():
        return torch.cat(
            [model(input_ids=t, use_cache=True, **cache_of(model, cache)).logits[:, -1:].float()
             for t in pieces], dim=1,
        )  # fmt: skip


def test_the_first_prompt_says_the_scales_of_each_layer_until_the_cache_is_emptied(
    llama: Any,
) -> None:
    cache = cache_for(llama)
    ours(llama, cache)
    said = [[t.clone() for t in cache.storage.scales.given[n]] for n in ("k_scale", "v_scale")]
    held = [layer.views(PROMPT) for layer in cache.layers]
    for side, scales in enumerate(said):
        assert len({float(scale) for scale in scales}) == 2
        for scale, views in zip(scales, held, strict=True):
            largest = views[side].float().abs().max()
            assert float(scale) == pytest.approx(float(largest) * HEADROOM / 448, rel=0.07)
    longer = torch.cat([prompt(), prompt()[:, :3]], dim=1)
    cache.reset()
    generate(llama, longer.flip(1), cache, tokens=1)
    again = cache.storage.scales.given["k_scale"]
    assert all(not torch.equal(a, b) for a, b in zip(again, said[0], strict=True))


BY_TOKEN = {"k_scale": "token", "v_scale": "token"}


def test_scales_of_tokens_need_no_prompt_to_say_them(llama: Any) -> None:
    """Prompts, steps and beams."""
    padded = ours(llama, cache_for(llama, **BY_TOKEN), "left")
    assert 1e-4 < differences(llama, padded) < TOLERANCE[E4M3]
    cache = cache_for(llama, **BY_TOKEN)
    assert cache.is_compileable and cache_for(llama).is_compileable
    assert differences(llama, ours(llama, cache)) < TOLERANCE[E4M3]
    assert ours(llama, cache_for(llama, **BY_TOKEN), num_beams=2).scores is not None


def test_several_tokens_behind_others_have_a_scale_each(
    llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the kernel, once more where some were taken back."""
    given, decode = list[tuple[KVCache, int, Tensor, Tensor]](), KVCache.decode

    def noted(self: KVCache, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        given.append((self, int(self.seqlens[0]), k.clone(), v.clone()))
        out = decode(self, q, k, v, **options)
        assert is_held(*given[-1])
        return out

    monkeypatch.setattr(KVCache, "decode", noted)
    llama.set_attn_implementation(NAME)
    cache = cache_for(llama, **BY_TOKEN)
    step(llama, cache, prompt())
    step(llama, cache, prompt()[:, :4])
    cache.crop(-3)
    step(llama, cache, prompt()[:, 2:5])
    assert [(held, k.shape[1]) for _, held, k, _ in given] == 2 * [(6, 4)] + 2 * [(7, 3)]
    assert all(is_held(kept, held, k[:, :1], v[:, :1]) for kept, held, k, v in given)


def is_held(cache: KVCache, held: int, k: Tensor, v: Tensor) -> bool:
    """Whether a cache has these tokens behind so many, [batch, tokens, heads, dim], as steps store
    them."""
    right = []
    for name, rows in (("k", k), ("v", v)):
        new = slice(held, held + rows.shape[1])
        kept, scales = getattr(cache, name)[:, new], getattr(cache, f"{name}_scale")[:, new]
        scale = scale_of_row(rows, kept.dtype)
        right += [same_bits(scales, scale), same_bits(kept, stored(rows, scale[..., None], E4M3))]
    return all(right)


def test_what_is_seen_of_a_cache_counts_by_the_scales_of_its_tokens(llama: Any) -> None:
    cache = cache_for(llama, **BY_TOKEN)
    ours(llama, cache)
    for layer, kept in zip(cache.layers, cache.storage.caches, strict=True):
        count = int(kept.seqlens[0])
        sides = (kept.k, kept.k_scale), (kept.v, kept.v_scale)
        for seen, (held, scale) in zip(layer.views(count), sides, strict=True):
            assert isinstance(scale, Tensor)
            held, scale = held[:, :count].float(), scale[:, :count]
            assert held.abs().amax(-1).eq(448).all()
            assert scale.unique().numel() > count  # of two sequences
            counted = (held * scale.unsqueeze(-1)).to(seen.dtype)
            assert torch.equal(seen, counted.transpose(1, 2))


@pytest.mark.parametrize("form", ["numbers", "of heads", "of layers"])
def test_scales_may_be_given(llama: Any, form: str) -> None:
    k_scale, v_scale = {
        "numbers": (0.01, 0.02),
        "of heads": (torch.tensor([0.01]), torch.tensor(0.02)),
        "of layers": ([None, torch.tensor([0.02])], [0.02, 0.03]),
    }[form]
    cache = cache_for(llama, k_scale=k_scale, v_scale=v_scale)
    assert differences(llama, ours(llama, cache)) < TOLERANCE[E4M3]
    assert cache.storage.scales.given == {"k_scale": k_scale, "v_scale": v_scale}
    for layer in cache.layers:
        assert layer.views(PROMPT)[0].float().abs().max() > 0.1
    far = cache_for(llama, k_scale=1e-6, v_scale=1e-6)
    assert differences(llama, ours(llama, far)) > TOLERANCE[E4M3]


@pytest.mark.parametrize("scales", [{}, BY_TOKEN], ids=["of the prompt", "of tokens"])
def test_a_conversation_goes_on(llama: Any, scales: dict[str, Any]) -> None:
    """Several tokens behind others, by the kernel and by SDPA, which gets them multiplied out."""
    cache = cache_for(llama, **scales)
    first = ours(llama, cache).sequences
    longer = torch.cat([first, prompt()[:, :3]], dim=1)
    assert differences(llama, generate(llama, longer, cache, tokens=2)) < TOLERANCE[E4M3]
    cache.crop(-4)
    held, key = cache.get_seq_length(), torch.zeros(2, 1, 2, 64, dtype=torch.float16)
    query, mask = torch.zeros(2, 4, 2, 64, dtype=torch.float16), torch.ones(2, 1, 2, held + 2)
    pending, _ = cache.update(key, key, 0)
    before = cache.layers[0].views(held)[1].float()
    module = torch.nn.Module()
    module.num_key_value_groups = 4
    out, _ = integration.attention(module, query, pending, pending, mask.bool())
    expected = before.sum(2) / (held + 2)  # of scores that are all 0
    torch.testing.assert_close(out[:, 0].float(), expected.expand(2, 4, 64), atol=2e-3, rtol=0)


def test_beams_and_a_prompt_of_one_token(llama: Any) -> None:
    assert ours(llama, cache_for(llama), "left", num_beams=2).scores is not None
    found = generate(llama, prompt()[:, :1], cache_for(llama), tokens=2)
    assert differences(llama, found) < TOLERANCE[E4M3]


def parts(cache: KVCache) -> list[Tensor]:
    """What a cache has of its tokens."""
    held = cache.k, cache.v, *cache._scales.of_tokens
    return [t.view(torch.uint8) if t.dtype == E4M3 else t for t in held]


@pytest.mark.slow
@pytest.mark.parametrize("scales", [{}, BY_TOKEN], ids=["of the prompt", "of tokens"])
def test_compiled_steps_are_those_that_are_not(scales: dict[str, Any]) -> None:
    torch._dynamo.reset()
    integration.register()
    model = make_model()
    model.set_attn_implementation(NAME)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    caches = [cache_for(model, **scales) for _ in range(2)]
    with torch.no_grad():
        token = prompt()
        for first in (0, PROMPT, PROMPT + 1):
            positions = torch.arange(first, first + token.shape[1])[None]
            logits = [
                m(input_ids=token, position_ids=positions, use_cache=True, **cache_of(m, c)).logits
                for m, c in zip((model, compiled if first else model), caches, strict=True)
            ]
            assert torch.equal(*logits)
            token = logits[0][:, -1:].argmax(-1)
    for pair in zip(*(cache.storage.caches for cache in caches), strict=True):
        ours, theirs = ([t[:, : PROMPT + 2] for t in parts(cache)] for cache in pair)
        assert all(map(same_bits, ours, theirs))


@pytest.mark.slow
def test_generate_compiles_steps_with_scales_of_tokens() -> None:
    """In one graph, as it does by itself on a GPU."""
    torch._dynamo.reset()
    counters.clear()
    integration.register()
    model = make_model()
    how = transformers.CompileConfig(backend="aot_eager", mode=None, fullgraph=True)
    how._compile_all_devices = True
    eager = ours(model, cache_for(model, **BY_TOKEN), "left")
    assert not counters["stats"]["unique_graphs"]
    found = ours(model, cache_for(model, **BY_TOKEN), "left", compile_config=how)
    assert counters["stats"]["unique_graphs"] == 1
    assert found.logits is not None and eager.logits is not None
    assert torch.equal(found.logits, eager.logits)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"cache_dtype": torch.float16}, "cache_dtype: got torch.float16; allowed: None, for the"),
        ({"cache_dtype": []}, r"cache_dtype: got \[\]; allowed: None, for the model's"),
        ({"max_cache_len": "64"}, "max_cache_len: got '64'; allowed: an int from 1 to"),
        ({"max_cache_len": 0}, "max_cache_len: got 0; allowed: an int from 1 to"),
        ({"cache_dtype": "fp8"}, "cache_dtype: got 'fp8'; allowed: None, for the model's, or tor"),
        ({"k_scale": 0.5}, "k_scale: got one without cache_dtype; allowed: None, or a cache_dtype"),
        ({"v_scale": [1, 2]}, "v_scale: got one without cache_dtype; allowed: None"),
        ({"k_scale": "token"}, "k_scale: got one without cache_dtype; allowed: None, or a cache_d"),
        ({"cache_dtype": E4M3, "k_scale": "token"}, "v_scale: got None; allowed: 'token', as k_s"),
        ({"cache_dtype": E4M3, "k_scale": 0.0}, "^GqaCache: k_scale: got 0.0; allowed: a number"),
        ({"cache_dtype": E4M3, "v_scale": [1.0, "x"]}, "^GqaCache: v_scale: got 'x'; allowed: a n"),
    ],
)  # fmt: skip
def test_what_is_not_allowed_is_refused(llama: Any, options: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        GqaCache(llama.config, **{"max_cache_len": ROOM} | options)


def test_a_scale_for_each_layer_is_counted_with_the_first_prompt(llama: Any) -> None:
    cache = cache_for(llama, k_scale=[1.0])
    with pytest.raises(InputError, match="k_scale: got 1 scales; allowed: one"):
        ours(llama, cache)
