"""FlashAttention's call: its parameters, its callers as they are, and what it refuses."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from cases import Step, make_step
from compiling import GROUP, copies, random_step, same
from executors import Notes, running_on
from featured import PAIRS as ALL_PAIRS
from featured import POLICIES, step_of
from helpers import check, check_lse, every
from torch import Tensor

from gqa_cutlass import flash_attn_with_kvcache, gqa_decode
from gqa_cutlass.errors import CacheOverflowError, InputError

pytestmark = pytest.mark.xdist_group(GROUP)

# hopper/flash_attn_interface.py
FA3: dict[str, Any] = {
    "k": None, "v": None, "qv": None, "rotary_cos": None, "rotary_sin": None,
    "cache_seqlens": None, "cache_batch_idx": None, "cache_leftpad": None, "page_table": None,
    "cu_seqlens_q": None, "cu_seqlens_k_new": None, "max_seqlen_q": None, "rotary_seqlens": None,
    "q_descale": None, "k_descale": None, "v_descale": None, "softmax_scale": None,
    "causal": False, "window_size": (-1, -1), "attention_chunk": 0, "softcap": 0.0,
    "rotary_interleaved": True, "scheduler_metadata": None, "num_splits": 0, "pack_gqa": None,
    "sm_margin": 0, "return_softmax_lse": False,
}  # fmt: skip
# flash_attn/flash_attn_interface.py
FA2: dict[str, Any] = {
    "k": None, "v": None, "rotary_cos": None, "rotary_sin": None, "cache_seqlens": None,
    "cache_batch_idx": None, "cache_leftpad": None, "block_table": None, "softmax_scale": None,
    "causal": False, "window_size": (-1, -1), "softcap": 0.0, "rotary_interleaved": True,
    "alibi_slopes": None, "num_splits": 0, "return_softmax_lse": False,
}  # fmt: skip
VLLM = {"out": None, "s_aux": None}  # what vLLM's build adds
# It has no trees and no norms; steps of several tokens have queries of four dimensions already.
ITS_OWN = [name for name in POLICIES if name not in ("tree", "norm")]
PAIRS = [pair for pair in ALL_PAIRS if set(pair.split(" and ")) <= set(ITS_OWN)]


def test_parameters_are_those_of_flash_attention_3_in_its_order() -> None:
    parameters = inspect.signature(flash_attn_with_kvcache).parameters
    given = [p.name for p in parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert given == ["q", "k_cache", "v_cache", *FA3]
    for name, default in (FA3 | FA2 | VLLM).items():
        assert parameters[name].default == default, name


def test_every_parameter_is_explained() -> None:
    text = inspect.getdoc(flash_attn_with_kvcache) or ""
    names = [line.split(":")[0].strip() for line in text.partition("Args:\n")[2].splitlines()]
    assert [
        n for n in inspect.signature(flash_attn_with_kvcache).parameters if n not in names
    ] == []


def tokens(step: Step) -> dict[str, Tensor | None]:
    """The step's queries and new token as FlashAttention has them, with their one token."""
    token = {"k": step.k, "v": step.v} if step.k is not None else {}
    return {name: None if t is None else in_four(t) for name, t in token.items()}


def in_four(t: Tensor) -> Tensor:
    """Rows of tokens, which may be but one."""
    return t if t.dim() == 4 else t.unsqueeze(1)


def call(step: Step, **options: Any) -> Any:
    asked = {name.replace("_scale", "_descale"): t for name, t in step.features().items()}
    return flash_attn_with_kvcache(
        in_four(step.q), step.k_cache, step.v_cache, **tokens(step),
        cache_seqlens=step.seqlens, causal=True, **asked, **options,
    )  # fmt: skip


@pytest.mark.parametrize("append", [True, False], ids=["append", "attend"])
@pytest.mark.parametrize("feature", [*ITS_OWN, "plain"])
def test_every_feature_matches_the_reference(feature: str, append: bool, device: str) -> None:
    sizes: dict[str, Any] = {"lengths": [37, 20], "max_seq_len": 64, "head_dim": 64}
    make = make_step if feature == "plain" else partial(step_of, feature)
    step = make(**sizes, append=append, device=device)
    out, lse = call(step, return_softmax_lse=True)
    count = step.queries(0)
    assert out.shape == (2, count, 8, 64) and lse.shape == (2, 8, count)
    assert lse.dtype == torch.float32
    check(step, out.squeeze(1))
    check_lse(step, lse.squeeze(-1))


@pytest.mark.parametrize("feature", every(20, PAIRS))
def test_pairs_of_features_match_the_reference(feature: str, device: str) -> None:
    step = step_of(feature, lengths=[37, 20], max_seq_len=64, head_dim=64, device=device)
    check(step, call(step).squeeze(1))


def a_step() -> tuple[dict[str, Tensor], Tensor]:
    step = random_step()
    return {n: t if "cache" in n else t.unsqueeze(1) for n, t in step.items()}, torch.tensor(
        [3, 5], dtype=torch.int32
    )


def as_fa2_users_do(step: dict[str, Tensor], lengths: Tensor) -> Any:
    return flash_attn_with_kvcache(
        step["q"], step["k_cache"], step["v_cache"], step["k"], step["v"], rotary_cos=None,
        rotary_sin=None, cache_seqlens=lengths, cache_batch_idx=None, cache_leftpad=None,
        block_table=None, softmax_scale=None, causal=True, window_size=(-1, -1), softcap=0.0,
        rotary_interleaved=True, alibi_slopes=None, num_splits=0, return_softmax_lse=False,
    )  # fmt: skip


def as_fa3_users_do(step: dict[str, Tensor], lengths: Tensor) -> Any:
    """All that it takes, by position, with its hints."""
    metadata = torch.zeros(3, dtype=torch.int32)  # of get_scheduler_metadata
    return flash_attn_with_kvcache(
        step["q"], step["k_cache"], step["v_cache"], step["k"], step["v"], None, None, None,
        lengths, None, None, None, None, None, 1, None, None, None, None, 0.125, True, (-1, 0), 0,
        0.0, False, metadata, 1, True, 2, False,
    )  # fmt: skip


def as_vllm_does(step: dict[str, Tensor], lengths: Tensor) -> Any:
    """Into an output of its own, with all that is off said so."""
    out = torch.zeros_like(step["q"])
    found = flash_attn_with_kvcache(
        q=step["q"], k_cache=step["k_cache"], v_cache=step["v_cache"], k=step["k"], v=step["v"],
        cache_seqlens=lengths, block_table=None, softmax_scale=0.125, causal=True,
        window_size=[-1, -1], softcap=0, alibi_slopes=None, out=out, fa_version=3,
        scheduler_metadata=None, q_descale=None, k_descale=None, v_descale=None, num_splits=0,
        s_aux=None,
    )  # fmt: skip
    assert found is out
    return out.view_as(out)


def as_transformers_does(step: dict[str, Tensor], lengths: Tensor) -> Any:
    """By what it finds in the signature: `_flash_attention_forward` of continuous batching."""
    utilities = pytest.importorskip("transformers.modeling_flash_attention_utils")
    arguments = utilities._lazy_define_process_function(flash_attn_with_kvcache)(
        query_length=1, key_length=1, is_causal=True, dropout=0.0, softmax_scale=0.125,
        sliding_window=None, use_top_left_mask=False, softcap=None, deterministic=None, s_aux=None,
        max_seqlen_q=1, max_seqlen_k=4096, block_table=None, cache_seqlens=lengths,
    )  # fmt: skip
    assert {"causal", "softmax_scale", "cache_seqlens"} <= set(arguments)
    return flash_attn_with_kvcache(
        step["q"], step["k_cache"], step["v_cache"], step["k"], step["v"], **arguments
    )


CALLERS = [as_fa2_users_do, as_fa3_users_do, as_vllm_does, as_transformers_does]


@pytest.mark.parametrize("caller", CALLERS, ids=lambda c: c.__name__)
def test_callers_get_what_gqa_decode_gives_to_the_bit(caller: Callable[..., Any]) -> None:
    step, lengths = a_step()
    expected = copies(step)
    right = gqa_decode(**expected, cache_seqlens=lengths)
    out = caller(step, lengths)
    assert torch.equal(out, right) and out.shape == (2, 1, 8, 64) and same(step, expected)


def test_transformers_asks_for_the_features_by_our_names() -> None:
    """The window in its symmetric form, and sinks by another name."""
    utilities = pytest.importorskip("transformers.modeling_flash_attention_utils")
    step, lengths = a_step()
    sinks = torch.linspace(-1, 3, 8)
    arguments = utilities._lazy_define_process_function(flash_attn_with_kvcache)(
        query_length=1, key_length=5, is_causal=True, softmax_scale=0.125, sliding_window=3,
        softcap=20.0, s_aux=sinks, cache_seqlens=lengths,
    )  # fmt: skip
    right = gqa_decode(
        **copies(step), cache_seqlens=lengths, window_size=(2, 0), softcap=20.0, sinks=sinks
    )
    tensors = step["q"], step["k_cache"], step["v_cache"], step["k"], step["v"]
    assert torch.equal(flash_attn_with_kvcache(*tensors, **arguments), right)


def test_transformers_passes_tables_of_pages() -> None:
    utilities = pytest.importorskip("transformers.modeling_flash_attention_utils")
    step, lengths = a_step()
    arguments = utilities._lazy_define_process_function(flash_attn_with_kvcache)(
        query_length=1, key_length=5, is_causal=True, cache_seqlens=lengths,
        block_table=torch.tensor([[1], [0]], dtype=torch.int32),
    )  # fmt: skip
    expected = copies(step)
    for name in ("k_cache", "v_cache"):
        expected[name] = expected[name].flip(0)
    right = gqa_decode(**expected, cache_seqlens=lengths)
    tensors = step["q"], step["k_cache"], step["v_cache"], step["k"], step["v"]
    assert torch.equal(flash_attn_with_kvcache(*tensors, **arguments), right)
    assert torch.equal(step["k_cache"], expected["k_cache"].flip(0))


def test_lengths_of_none_are_all_that_the_table_has_pages_for() -> None:
    step, _ = a_step()
    q, k_cache, v_cache, *_ = step.values()
    pages = torch.tensor([[1, 0], [0, 0]], dtype=torch.int32)
    dense = [cache[pages.long()].flatten(1, 2) for cache in (k_cache, v_cache)]
    right = gqa_decode(q, *dense, cache_seqlens=2 * k_cache.shape[1])
    for name in ("page_table", "block_table"):
        found = flash_attn_with_kvcache(q, k_cache, v_cache, **{name: pages})
        torch.testing.assert_close(found, right)


def test_lengths_may_be_an_int_or_none_for_all_of_the_cache() -> None:
    step, _ = a_step()
    q, k_cache, v_cache, k, v = step.values()
    right = gqa_decode(q, k_cache, v_cache, cache_seqlens=k_cache.shape[1])
    assert torch.equal(flash_attn_with_kvcache(q, k_cache, v_cache), right)
    right = gqa_decode(**copies(step), cache_seqlens=4)
    assert torch.equal(flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=4), right)


@pytest.mark.parametrize("causal", [True, False])
def test_one_token_is_causal_either_way(causal: bool) -> None:
    step, lengths = a_step()
    right = gqa_decode(**copies(step), cache_seqlens=lengths)
    assert torch.equal(flash_attn_with_kvcache(**step, cache_seqlens=lengths, causal=causal), right)


def test_hints_change_nothing_that_is_launched() -> None:
    step, lengths = a_step()
    hints: list[dict[str, Any]] = [
        {}, {"scheduler_metadata": torch.zeros(1)}, {"pack_gqa": False}, {"sm_margin": 7},
        {"rotary_interleaved": False}, {"max_seqlen_q": 4096}, {"fa_version": 2},
    ]  # fmt: skip
    notes = Notes()
    with running_on(notes):
        for hint in hints:
            flash_attn_with_kvcache(
                **step, cache_seqlens=lengths, out=step["q"].new_empty(2, 1, 8, 64), **hint
            )
    assert len(notes.loaded) == 1 and len(notes.launches) == len(hints)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "all options": {
        "softmax_scale": 0.3, "window_size": (2, 0), "softcap": 1.5, "return_softmax_lse": True,
        "s_aux": torch.linspace(-2, 4, 8), "alibi_slopes": torch.linspace(0, 1, 8),
        "cache_leftpad": torch.tensor([1, 0], dtype=torch.int32), "num_splits": 2,
    },
    "whole cache": {"cache_seqlens": None, "k": None, "v": None},
    "pages": {"page_table": torch.tensor([[1], [0]], dtype=torch.int32)},
}  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_compiled_calls_are_one_graph(options: dict[str, Any]) -> None:
    torch._dynamo.reset()
    step, lengths = a_step()
    compiled = torch.compile(flash_attn_with_kvcache, backend="aot_eager", fullgraph=True)
    expected, found = copies(step), copies(step)
    given = {"cache_seqlens": lengths}
    right = flash_attn_with_kvcache(**(expected | given | options))
    torch.testing.assert_close(compiled(**(found | given | options)), right, rtol=0, atol=0)
    assert same(found, expected)


def table(step: Step) -> Tensor:
    return step.seqlens.view(1, 1)


def rotary(step: Step) -> Tensor:
    return step.q[0, :, :32]


REFUSED: dict[str, tuple[Callable[[Step], dict[str, Any]], str]] = {
    "qv": (lambda s: {"qv": s.q}, r"qv: got shape \[1, 8, 64\], which is not supported yet; allow"),
    "cosines": (lambda s: {"rotary_cos": rotary(s)}, "rotary_cos: got one without rotary_sin"),
    "sines": (lambda s: {"rotary_sin": rotary(s)}, "rotary_sin: got one without rotary_cos"),
    "places": (lambda s: {"rotary_seqlens": s.seqlens}, "rotary_seqlens: got one without"),
    "long pages": (lambda s: {"page_table": table(s).long()}, "block_table: got torch.int64"),
    "pages twice": (
        lambda s: {"page_table": table(s), "block_table": table(s)},
        "block_table and page_table: got both; allowed: one of them",
    ),
    "packed": (lambda s: {"cu_seqlens_q": s.seqlens}, r"q: got shape .*; allowed: \[all tokens"),
    "new": (lambda s: {"cu_seqlens_k_new": s.seqlens}, r"k: got shape .*; allowed: \[all tokens"),
    "q's scale": (lambda s: {"q_descale": s.q}, "q_descale: got .*; allowed: None; queries of 16"),
    "k's scale": (lambda s: {"k_descale": 2.0}, "k_scale: got 2.0, with caches of .*; allowed: No"),
    "v's scale": (
        lambda s: {"v_descale": s.q.float()[0, 0, :2]}, "v_scale: got .*; allowed: None, or caches"
    ),
    "chunks": (lambda s: {"attention_chunk": 8}, "attention_chunk: got 8, .*; allowed: 0; for"),
    "too many queries": (
        lambda s: {"q": s.q.expand(300, 8, 64).unsqueeze(0)},
        r"tokens of q: got 300; allowed: 1 to 256 per sequence; longer prompts go to",
    ),
    "queries of no token": (lambda s: {"q": s.q}, r"q: got shape \[1, 8, 64\]; allowed: \[batch"),
    "several keys": (
        lambda s: {"k": s.q[:, :6].reshape(1, 3, 2, 64)},
        r"v: got shape \[1, 1, 2, 64\]; allowed: \[1, 3, 2, 64\]",
    ),
    "no lengths": (lambda s: {"cache_seqlens": None}, "cache_seqlens: got None, with k; allowed"),
    "sinks twice": (
        lambda s: {"sinks": s.q.new_zeros(8), "s_aux": s.q.new_zeros(8)},
        "sinks and s_aux: got both; allowed: one of them",
    ),
    "a list for q": (lambda s: {"q": [1.0]}, "q: got a list; allowed: a torch.Tensor"),
    "no cache": (lambda s: {"k_cache": None}, "k_cache: got a NoneType; allowed: a torch.Tensor"),
    "no values": (lambda s: {"v": None}, "k and v: got no v; allowed: both"),
    "a window below none": (lambda s: {"window_size": (-2, 0)}, r"window_size: got \(-2, 0\)"),
    "no window": (lambda s: {"window_size": None}, "window_size: got None"),
    "no cap": (lambda s: {"softcap": None}, "softcap: got None; allowed: 0"),
    "long lengths": (lambda s: {"cache_seqlens": s.seqlens.long()}, "cache_seqlens: got torch.int"),
    "too few sinks": (lambda s: {"s_aux": s.q.new_zeros(4)}, r"sinks: got shape \[4\]"),
    "too many splits": (lambda s: {"num_splits": 4096}, "num_splits: got 4096; allowed: 0"),
    "out in q": (lambda s: {"out": s.q.unsqueeze(1)}, "out: got memory that q also uses"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_launches_nothing_and_writes_nothing(name: str, device: str) -> None:
    step = make_step(lengths=[37], max_seq_len=64, head_dim=64, device=device)
    changes, message = REFUSED[name]
    arguments: dict[str, Any] = {
        "q": step.q.unsqueeze(1), "k_cache": step.k_cache, "v_cache": step.v_cache,
        "cache_seqlens": step.seqlens, "out": step.out.unsqueeze(1), **tokens(step),
    }  # fmt: skip
    with pytest.raises(InputError, match=message) as raised:
        flash_attn_with_kvcache(**(arguments | changes(step)))
    assert "Nothing was launched" in str(raised.value)
    assert step.out.isnan().all()
    step.check_memory(rejected=(0,))


class Incomparable:
    """As an array of several elements is, and worse."""

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("no comparison")

    __ne__ = __eq__
    __hash__ = None  # type: ignore[assignment]

    def __bool__(self) -> bool:
        raise RuntimeError("neither true nor false")


@pytest.mark.parametrize("name", ["attention_chunk", "softcap", "window_size"])
@pytest.mark.parametrize(
    "value", [torch.zeros(2), torch.zeros(0), np.zeros(2), Incomparable(), "", [], (-1, np.ones(2))]
)
def test_options_that_compare_with_nothing_are_refused(name: str, value: object) -> None:
    step, lengths = a_step()
    before = copies(step)
    with pytest.raises(InputError, match=f"{name}: got"):
        flash_attn_with_kvcache(**step, cache_seqlens=lengths, **{name: value})  # type: ignore[arg-type]
    assert same(step, before)


def test_whole_caches_of_what_is_no_cache_are_refused() -> None:
    step, _ = a_step()
    for wrong in (None, [], torch.zeros(3)):
        with pytest.raises(InputError, match="k_cache: got"):
            flash_attn_with_kvcache(step["q"], wrong, step["v_cache"])  # type: ignore[arg-type]


def test_a_token_that_does_not_fit_is_found_before_anything_is_written() -> None:
    step, _ = a_step()
    before = copies(step)
    with pytest.raises(CacheOverflowError):
        flash_attn_with_kvcache(**step, cache_seqlens=step["k_cache"].shape[1])
    assert same(step, before)
