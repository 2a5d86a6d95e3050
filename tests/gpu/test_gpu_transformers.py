"""transformers' models at real shapes (few layers, random weights) on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from greedy import NAME, cache_of, check, check_beams, compared, generate
from torch import Tensor
from torch._dynamo.utils import counters

transformers = pytest.importorskip("transformers")

from gqa_cutlass.integrations.transformers import GqaCache, register  # noqa: E402

pytestmark = pytest.mark.gpu

TOKENS, LAYERS = 200, 4
TOLERANCE = 2e-2  # of logits with a standard deviation of 1.3, in float16
RATIO = 2.0  # to how far PyTorch's own logits are from eager attention's, as in proof.reference
SIZES: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8},
    "qwen2": {"hidden_size": 3584, "num_attention_heads": 28, "num_key_value_heads": 4},
    "qwen3": {"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8,
              "head_dim": 128},
    "phi3": {"hidden_size": 3072, "num_attention_heads": 32, "num_key_value_heads": 32,
             "sliding_window": None},
}  # fmt: skip
CONFIGS = {"llama": "LlamaConfig", "qwen2": "Qwen2Config", "qwen3": "Qwen3Config",
           "phi3": "Phi3Config"}  # fmt: skip


def make_model(name: str) -> Any:
    config = getattr(transformers, CONFIGS[name])(
        vocab_size=1024, intermediate_size=1024, num_hidden_layers=LAYERS, pad_token_id=0,
        bos_token_id=None, eos_token_id=None, max_position_embeddings=4096, **SIZES[name],
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float16)
    return model.eval()


@pytest.fixture(params=CONFIGS, scope="module")
def model(request: pytest.FixtureRequest) -> Any:
    register()
    return make_model(request.param)


@pytest.fixture(scope="module")
def llama() -> Any:
    register()
    return make_model("llama")


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def prompt(batch: int = 4, tokens: int = 300) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(1)
    return torch.randint(1, 1024, (batch, tokens), generator=generator, device="cuda")


def padded(ids: Tensor, side: str) -> Tensor:
    """Where tokens are real: sequence b is shorter by 50 b."""
    mask = torch.ones_like(ids)
    for b in range(1, len(ids)):
        columns = slice(0, 50 * b) if side == "left" else slice(-50 * b, None)
        mask[b, columns] = 0
    return mask


def allowed(model: Any) -> float:
    """How far logits may be from eager attention's: twice as far as SDPA's are, in float16."""
    cache = transformers.StaticCache(config=model.config, max_cache_len=600)
    options = {"attention": "sdpa", "disable_compile": True}
    return RATIO * compared(model, generate(model, prompt(), cache, tokens=TOKENS, **options))[1]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_200_greedy_tokens_are_those_of_eager_attention(model: Any, compiled: bool) -> None:
    """Compiled by generate itself, with CUDA graphs, as it does for caches that allow it."""
    ids = prompt()
    cache = GqaCache(model.config, 600)
    options = {} if compiled else {"disable_compile": True}
    found = generate(model, ids, cache, tokens=TOKENS, mask=padded(ids, "left"), **options)
    check(model, found, allowed(model))
    cache.check()
    assert int(cache.get_seq_length()) == ids.shape[1] + TOKENS - 1
    assert (counters["stats"]["unique_graphs"] > 0) == compiled
    assert counters["inductor"]["cudagraph_skips"] == 0


@pytest.mark.parametrize("kind", ["dynamic", "static", "right-padded"])
def test_other_caches_and_padding(llama: Any, kind: str) -> None:
    ids = prompt()
    mask = padded(ids, "right") if kind == "right-padded" else None
    cache = {
        "dynamic": lambda: transformers.DynamicCache(config=llama.config),
        "static": lambda: transformers.StaticCache(config=llama.config, max_cache_len=600),
        "right-padded": lambda: GqaCache(llama.config, 600),
    }[kind]()
    found = generate(llama, ids, cache, tokens=TOKENS, mask=mask)
    check(llama, found, allowed(llama))


@pytest.mark.parametrize("scale", [None, "token"], ids=["of the prompt", "of tokens"])
def test_a_cache_of_8_bits_in_compiled_steps(llama: Any, scale: Any) -> None:
    """With CUDA graphs; the logits of other numbers have a standard deviation of 1.3 and more."""
    ids = prompt()
    cache = GqaCache(llama.config, 600, torch.float8_e4m3fn, k_scale=scale, v_scale=scale)
    found = generate(llama, ids, cache, tokens=20, mask=padded(ids, "left"))
    assert TOLERANCE < compared(llama, found)[1] < 1
    cache.check()
    assert cache.storage.caches[0].k.dtype == torch.float8_e4m3fn
    assert counters["stats"]["unique_graphs"] > 0 == counters["inductor"]["cudagraph_skips"]


def test_beams(llama: Any) -> None:
    ids = prompt(2)
    cache = GqaCache(llama.config, 600)
    found = generate(llama, ids, cache, tokens=50, mask=padded(ids, "left"), num_beams=4)
    check_beams(llama, found, TOLERANCE)


@pytest.mark.parametrize("batch", [1, 8])
def test_a_step_of_the_whole_model_is_one_graph(llama: Any, batch: int) -> None:
    """Compiled by hand, without a break, and replayed while the lengths grow."""
    llama.set_attn_implementation(NAME)
    ids = prompt(batch)
    caches = [GqaCache(llama.config, 600) for _ in range(2)]
    compiled = torch.compile(llama, mode="reduce-overhead", fullgraph=True)
    with torch.no_grad():
        for cache in caches:
            llama(input_ids=ids, use_cache=True, **cache_of(llama, cache))
        for count in range(8):
            token = ids[:, count : count + 1]
            positions = torch.full((batch, 1), ids.shape[1] + count, device="cuda")
            torch.compiler.cudagraph_mark_step_begin()
            ours, theirs = (
                forward(
                    input_ids=token, position_ids=positions, use_cache=True,
                    **cache_of(llama, cache),
                ).logits.clone()
                for forward, cache in zip((compiled, llama), caches, strict=True)
            )  # fmt: skip
            torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=0)
    assert counters["stats"]["unique_graphs"] == 1
    assert counters["inductor"]["cudagraph_skips"] == 0
    assert int(caches[0].get_seq_length()) == caches[1].get_seq_length() == 308


def test_a_step_captured_by_hand(llama: Any) -> None:
    llama.set_attn_implementation(NAME)
    ids = prompt(8)
    caches = [GqaCache(llama.config, 600) for _ in range(2)]
    token, positions = ids[:, :1].clone(), torch.full((8, 1), ids.shape[1], device="cuda")

    def step(cache: GqaCache) -> Tensor:
        with torch.no_grad():
            logits = llama(
                input_ids=token, position_ids=positions, use_cache=True, **cache_of(llama, cache)
            ).logits
        assert isinstance(logits, Tensor)
        return logits

    with torch.no_grad():
        for cache in caches:
            llama(input_ids=ids, use_cache=True, **cache_of(llama, cache))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(caches[0])
    torch.cuda.current_stream().wait_stream(side)
    caches[0].crop(-1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step(caches[0])
    for count in range(5):
        token.copy_(ids[:, count : count + 1])
        positions.fill_(ids.shape[1] + count)
        graph.replay()
        torch.testing.assert_close(out, step(caches[1]), atol=TOLERANCE, rtol=0)
    assert int(caches[0].get_seq_length()) == 305
