"""The operators of torch, and what compiled and exported code makes of the public calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from compiling import GROUP, ROOM, copies, random_step, same
from helpers import every
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor import config as inductor_config

import gqa_cutlass
from gqa_cutlass import GQADecodeConfig, InputError, KVCache, gqa_attention_decode, gqa_decode, ops
from gqa_cutlass.errors import CacheOverflowError

pytestmark = pytest.mark.xdist_group(GROUP)


@pytest.fixture(autouse=True)
def nothing_compiled() -> None:
    torch._dynamo.reset()


def counted(function: Callable[..., Any], **options: Any) -> tuple[Any, CompileCounterWithBackend]:
    """A function compiled in one graph, and what counts how often it was."""
    counter = CompileCounterWithBackend("aot_eager")
    return torch.compile(function, backend=counter, fullgraph=True, **options), counter


def lengths_of(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


FEATURES = {"softcap": 1.5, "sinks": torch.linspace(-2, 4, 8), "window_size": (2, 0),
            "alibi_slopes": torch.linspace(0, 1, 8), "out_dtype": torch.float32,
            "cache_leftpad": torch.tensor([1, 0], dtype=torch.int32)}  # fmt: skip


@pytest.mark.parametrize("append", [True, False], ids=["decode", "attend"])
@pytest.mark.parametrize("lengths", [lengths_of(3, 5), 4], ids=["device", "int"])
def test_operators_are_what_torch_expects(append: bool, lengths: int | Tensor) -> None:
    step = random_step()
    name, tensors = "gqa_decode", list(step.values())
    if not append:
        name, tensors = "gqa_attend", tensors[:3]
    given = (None, lengths) if isinstance(lengths, int) else (lengths, 0)
    operator = getattr(torch.ops.gqa_cutlass, name).default
    torch.library.opcheck(operator, (*tensors, *given, 0.125, 2, append, False))
    torch.library.opcheck(operator, (*tensors, *given), FEATURES)


def test_the_schema_says_what_is_written() -> None:
    written = {
        name: [a.name for a in operator._schema.arguments if a.is_write]
        for name in ("gqa_decode", "gqa_attend", "gqa_decode_scales_of_tokens")
        if (operator := getattr(torch.ops.gqa_cutlass, name).default)
    }
    assert written == {
        "gqa_decode": ["k_cache", "v_cache"],
        "gqa_attend": [],
        "gqa_decode_scales_of_tokens": ["k_cache", "v_cache", "k_scale", "v_scale"],
    }


def test_an_operator_returns_what_the_call_does() -> None:
    step, lengths = random_step(), lengths_of(3, 5)
    expected = gqa_decode(**copies(step), cache_seqlens=lengths, return_lse=True)
    found = torch.ops.gqa_cutlass.gqa_decode(
        *copies(step).values(), lengths, 0, return_lse=True, softmax_scale=None
    )
    assert all(map(torch.equal, found, expected))
    out, lse = torch.ops.gqa_cutlass.gqa_decode(*copies(step).values(), lengths, 0)
    assert torch.equal(out, expected[0]) and lse.shape == (0,)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"return_lse": True, "softmax_scale": 0.3, "num_splits": 2, "ragged": False} | FEATURES,
    ],
    ids=["plain", "all options"],
)
@pytest.mark.parametrize("append", [True, False], ids=["append", "attend"])
def test_a_compiled_call_does_what_the_call_does(append: bool, options: dict[str, Any]) -> None:
    step, lengths = random_step(), lengths_of(3, 5)
    if not append:
        del step["k"], step["v"]
    compiled, counter = counted(gqa_decode)
    expected, found = copies(step), copies(step)
    right = gqa_decode(**expected, cache_seqlens=lengths, **options)
    out = compiled(**found, cache_seqlens=lengths, **options)
    torch.testing.assert_close(out, right, rtol=0, atol=0)
    assert same(found, expected) and counter.frame_count == 1


def test_features_of_a_compiled_call_may_change() -> None:
    compiled, _ = counted(gqa_decode)
    step, sinks = random_step(), torch.linspace(-2, 4, 8)
    seen: list[Tensor] = []
    for cap, given in ((1.0, None), (2, sinks), (3.0, sinks.half()), (0.0, sinks), (0.0, None)):
        options: dict[str, Any] = {"softcap": cap, "sinks": given}
        right = gqa_decode(**copies(step), cache_seqlens=4, **options)
        assert torch.equal(compiled(**step, cache_seqlens=4, **options), right)
        assert not any(torch.equal(right, other) for other in seen)
        seen.append(right)


def test_a_compiled_call_writes_to_the_out_it_is_given() -> None:
    step = random_step()
    compiled, _ = counted(gqa_decode)
    out = torch.zeros_like(step["q"])
    right = gqa_decode(**copies(step), cache_seqlens=4)
    assert compiled(**step, cache_seqlens=4, out=out) is out and torch.equal(out, right)


@pytest.mark.parametrize("wanted", [None, torch.float32], ids=str)
def test_an_out_of_another_dtype_is_refused_where_torch_traces(wanted: torch.dtype | None) -> None:
    """Copying to it would round, or widen, in silence."""
    step = random_step()
    out = torch.zeros_like(step["q"], dtype=torch.float32 if wanted is None else None)
    compiled = torch.compile(gqa_decode, backend="aot_eager")
    with pytest.raises(InputError, match=r"out: got torch\.float(32|16); allowed: .*float(16|32)"):
        compiled(**step, cache_seqlens=4, out=out, out_dtype=wanted)
    assert not out.any()


def test_a_compiled_call_writes_to_an_out_in_float32() -> None:
    step = random_step()
    compiled, _ = counted(gqa_decode)
    out = torch.zeros_like(step["q"], dtype=torch.float32)
    right = gqa_decode(**copies(step), cache_seqlens=4, out_dtype=torch.float32)
    assert compiled(**step, cache_seqlens=4, out=out, out_dtype=torch.float32) is out
    assert torch.equal(out, right) and right.dtype == torch.float32


BAD_OUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "that the result is repeated in": lambda q: q.new_zeros(3, *q.shape),
    "of another head_dim": lambda q: q.new_zeros(2, 8, 32),
    "elsewhere": lambda q: torch.empty_like(q, device="meta"),
    "that learns": lambda q: torch.zeros_like(q).requires_grad_(),
    "that shares memory with itself": lambda q: q.new_zeros(1, 8, 64).expand(2, 8, 64),
}


@pytest.mark.parametrize("name", BAD_OUTS)
def test_a_wrong_out_is_refused_where_torch_traces_before_anything_is_written(name: str) -> None:
    step = random_step()
    before, out = copies(step), BAD_OUTS[name](step["q"])
    with pytest.raises(InputError, match="out: got"):
        torch.compile(gqa_decode, backend="aot_eager")(**step, cache_seqlens=4, out=out)
    assert same(step, before)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="gqa_decode: out: it"):
        counted(gqa_decode)[0](**step, cache_seqlens=4, out=out)


@pytest.mark.parametrize(
    ("name", "value"),
    every(2, [
        ("softmax_scale", "x"), ("softmax_scale", True), ("num_splits", True), ("num_splits", None),
        ("return_lse", 1), ("ragged", None), ("ragged", 2), ("softcap", False), ("softcap", "x"),
        ("window_size", None), ("window_size", 3), ("window_size", (1.0, 0)),
        ("out_dtype", "float32"), ("sinks", [1.0] * 8), ("cache_seqlens", 1.5), ("q", [1.0]),
    ]),
)  # fmt: skip
def test_types_that_torch_would_convert_or_complain_of_are_refused_as_ever(
    name: str, value: object
) -> None:
    step = random_step()
    before = copies(step)
    compiled = torch.compile(gqa_decode, backend="aot_eager")
    with pytest.raises(InputError, match=f"{name}: got"):
        compiled(**(step | {"cache_seqlens": 4, name: value}))
    assert same(step, before)


def test_the_form_with_a_configuration_compiles() -> None:
    step = {name: t.unsqueeze(1) if t.dim() == 3 else t for name, t in random_step().items()}
    q, k_cache, v_cache, k, v = step.values()
    config = GQADecodeConfig(
        batch_size=2, cache_len=4, num_q_heads=8, num_kv_heads=2, head_dim=64, scale=0.125,
        max_seq_len=ROOM,
    )  # fmt: skip
    compiled, _ = counted(gqa_attention_decode)
    output = torch.zeros(2, 1, 8 * 64, dtype=q.dtype)
    compiled(output, q, k, v, k_cache, v_cache, config)
    assert torch.equal(output, gqa_decode(**step, cache_seqlens=4).flatten(2))


def separate(step: dict[str, Tensor]) -> dict[str, Tensor]:
    return step


def heads_first(step: dict[str, Tensor]) -> dict[str, Tensor]:
    caches = {n: step[n].transpose(1, 2).contiguous().transpose(1, 2) for n in CACHES}
    return step | caches


def one_buffer(step: dict[str, Tensor]) -> dict[str, Tensor]:
    return step | dict(zip(CACHES, torch.stack([step[n] for n in CACHES]).unbind(), strict=True))


def interleaved(step: dict[str, Tensor]) -> dict[str, Tensor]:
    both = torch.stack([step[n] for n in CACHES], dim=2)
    return step | dict(zip(CACHES, both.unbind(2), strict=True))


CACHES = "k_cache", "v_cache"


@pytest.mark.parametrize("layout", [separate, heads_first, one_buffer, interleaved])
def test_compiled_writes_reach_caches_of_every_layout(layout: Callable[..., Any]) -> None:
    step = layout(random_step())
    compiled, _ = counted(lambda step, n: gqa_decode(**step, cache_seqlens=n) * 2)
    lengths = lengths_of(3, 5)
    expected = copies(step)
    right = gqa_decode(**expected, cache_seqlens=lengths) * 2
    assert torch.equal(compiled(step, lengths), right) and same(step, expected)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [interleaved])
def test_inductor_writes_to_the_caches_in_place(
    layout: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No copy of a cache is made, before the operator or after it."""
    step, lengths = layout(random_step()), lengths_of(3, 5)
    seen: list[Tensor] = []

    def noted(q: Tensor, k_cache: Tensor, v_cache: Tensor, *rest: Any, **options: Any) -> Any:
        seen.extend((k_cache, v_cache))
        return gqa_decode(q, k_cache, v_cache, *rest, **options)

    def model(step: dict[str, Tensor], lengths: Tensor) -> Tensor:
        q = step["q"] * 1.0
        out = gqa_decode(**(step | {"q": q}), cache_seqlens=lengths)
        lengths.add_(1)
        return out + 1

    expected = copies(step)
    right = model(expected, lengths.clone())
    monkeypatch.setattr(ops, "gqa_decode", noted)
    # Most of the time would go into trying vector instructions, and precompiling torch's headers.
    quick = {"cpp.vec_isa_ok": False, "cpp_cache_precompile_headers": False}
    fresh = {"force_disable_caches": True}  # whose keys do not have what operators write to
    with inductor_config.patch(quick | fresh):
        torch.testing.assert_close(torch.compile(model, fullgraph=True)(step, lengths), right)
    assert same(step, expected) and lengths.tolist() == [4, 6]
    for tensor, name in zip(seen, CACHES, strict=True):
        assert tensor.data_ptr() == step[name].data_ptr(), f"{name} was copied"
        assert tensor.stride() == step[name].stride()


def test_a_dynamic_batch_and_growing_lengths_do_not_compile_again() -> None:
    compiled, counter = counted(gqa_decode, dynamic=True)
    for batch in (3, 5, 4):  # torch takes sizes that are equal at first for one and the same
        step = random_step(batch=batch)
        for held in (2, 3, 7):
            lengths = torch.full((batch,), held, dtype=torch.int32)
            right = gqa_decode(**copies(step), cache_seqlens=lengths)
            assert torch.equal(compiled(**step, cache_seqlens=lengths), right)
    assert counter.frame_count == 1


def test_a_length_that_is_an_int_becomes_a_symbol() -> None:
    """Torch takes an int for a constant until it changes once."""
    compiled, counter = counted(gqa_decode)
    step = random_step()
    for held in range(2, 7):
        right = gqa_decode(**copies(step), cache_seqlens=held)
        assert torch.equal(compiled(**step, cache_seqlens=held), right)
    assert counter.frame_count == 2


@pytest.mark.parametrize("strict", [True, False])
def test_a_call_can_be_exported(strict: bool) -> None:
    class Model(torch.nn.Module):
        def forward(self, step: dict[str, Tensor], lengths: Tensor) -> Tensor:
            out = gqa_decode(**step, cache_seqlens=lengths)
            assert isinstance(out, Tensor)
            return out

    step, lengths = random_step(), lengths_of(3, 5)
    program = torch.export.export(Model(), (step, lengths), strict=strict)
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert torch.ops.gqa_cutlass.gqa_decode.default in targets
    expected = copies(step)
    right = gqa_decode(**expected, cache_seqlens=lengths)
    assert torch.equal(program.module()(step, lengths), right) and same(step, expected)


# ---- a cache ----


def caches(count: int = 2) -> list[KVCache]:
    return KVCache.for_layers(count, 2, ROOM, 2, 64, torch.float16, "cpu")


def through(caches: list[KVCache], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One token through all layers."""
    for cache in caches:
        q = cache.decode(q, k, v)  # type: ignore[assignment]
    return q


def fresh_token(seed: int) -> list[Tensor]:
    step = random_step(seed)
    return [step["q"], step["k"], step["v"]]


def test_compiled_caches_decode_and_count_on_the_device() -> None:
    eager, graphed = caches(), caches()
    prompt = torch.randn(2, 2, 3, 2, 64).half()
    for cache in (*eager, *graphed):
        cache.prefill(*prompt, lengths=[3, 1])
    compiled, counter = counted(through)
    for seed in range(4):
        token = fresh_token(seed)
        assert torch.equal(compiled(graphed, *token), through(eager, *token))
        assert graphed[0].lengths is None and graphed[0].bound == ROOM  # the host has forgotten
    assert counter.frame_count == 1
    assert graphed[0].refresh() == eager[0].lengths == [7, 5]
    for ours, theirs in zip(graphed, eager, strict=True):
        for b, held in enumerate((7, 5)):
            assert torch.equal(ours.k[b, :held], theirs.k[b, :held])
            assert torch.equal(ours.v[b, :held], theirs.v[b, :held])


def test_a_compiled_decode_without_a_token_moves_no_length() -> None:
    (cache,) = caches(1)
    q, k, v = fresh_token(0)
    cache.decode(q, k, v)
    compiled, _ = counted(lambda q: cache.decode(q, return_lse=True))
    found, right = compiled(q), cache.decode(q, return_lse=True)
    assert all(map(torch.equal, found, right)) and cache.lengths == [1, 1]


def test_a_compiled_decode_has_the_features_that_it_is_asked_for() -> None:
    eager, graphed = caches(1) + caches(1)
    plain, *_ = caches(1)
    compiled, _ = counted(lambda *token: graphed.decode(*token, **FEATURES))
    for seed in range(3):
        token = fresh_token(seed)
        right = eager.decode(*token, **FEATURES)
        assert torch.equal(compiled(*token), right)
        assert not torch.equal(plain.decode(*token), right)


def test_a_full_sequence_in_a_compiled_cache_is_found_on_the_device() -> None:
    (cache,) = caches(1)
    cache.prefill(*torch.randn(2, 2, ROOM, 2, 64).half(), lengths=[ROOM, 3])
    before = cache.k[0].clone()
    compiled, _ = counted(cache.decode)
    out = compiled(*fresh_token(0))
    assert out[0].isnan().all() and not out[1].isnan().any()
    assert torch.equal(cache.k[0], before) and cache.seqlens.tolist() == [ROOM, 4]
    with pytest.raises(CacheOverflowError, match=r"cache_seqlens\[0\]"):
        cache.check()


def test_caches_may_be_written_by_cuda_graphs() -> None:
    """Inductor captures no function that writes to tensors which may be elsewhere next time."""
    (cache,) = caches(1)
    address = torch._dynamo.utils.get_static_address_type
    torch._dynamo.mark_static_address(other := torch.empty(1), guard=False)
    assert address(other) is not None
    assert {address(t) for t in (cache.k, cache.v, cache.seqlens)} == {address(other)}


# ---- what compiled code cannot do ----


@pytest.mark.parametrize("fault", ["q requires grad", "sinks requires grad", "k and v"])
def test_what_no_graph_can_hold_is_refused_as_ever(fault: str) -> None:
    step = random_step()
    if fault == "k and v":
        del step["v"]
    else:
        name, fault = fault.split(maxsplit=1)
        step |= {name: step.get(name, torch.zeros(8)).requires_grad_()}

    def doubled(step: dict[str, Tensor]) -> Any:
        return gqa_decode(**step, cache_seqlens=3) * 2

    for _ in range(2):  # the second time torch knows that the graph breaks
        with pytest.raises(InputError, match=r"requires grad|k and v"):
            torch.compile(doubled, backend="aot_eager")(step)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match=f"gqa_decode: .*{fault}"):
        counted(doubled)[0](step)
    if fault == "k and v":

        class Model(torch.nn.Module):
            def forward(self, step: dict[str, Tensor]) -> Any:
                return doubled(step)

        with pytest.raises(InputError, match="k and v"):
            torch.export.export(Model(), (step,), strict=False)


def test_an_operator_refuses_what_requires_grad_unless_nothing_is_recorded() -> None:
    step = random_step()
    step["q"].requires_grad_()
    with pytest.raises(InputError, match="requires grad"):
        torch.ops.gqa_cutlass.gqa_decode(*step.values(), None, 3)
    compiled, _ = counted(gqa_decode)
    with torch.no_grad():
        assert not compiled(**step, cache_seqlens=3).requires_grad


def test_other_faults_are_found_when_the_operator_runs() -> None:
    step = {name: t.float() for name, t in random_step().items()}
    compiled, _ = counted(gqa_decode)
    with pytest.raises(InputError, match=r"q: got torch.float32; allowed: torch.float16"):
        compiled(**step, cache_seqlens=3)


def test_a_plan_runs_beside_the_graph() -> None:
    step = random_step()
    plan = gqa_cutlass.plan(**step, cache_seqlens=3)
    right = plan(*step.values(), 3)

    def doubled(*arguments: Any) -> Any:
        return plan(*arguments) * 2

    compiled = torch.compile(doubled, backend="aot_eager")
    assert torch.equal(compiled(*step.values(), 3), right * 2)
    torch._dynamo.reset()
    compiled, _ = counted(doubled)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="in compiled code call gqa_decode"):
        compiled(*step.values(), 3)
