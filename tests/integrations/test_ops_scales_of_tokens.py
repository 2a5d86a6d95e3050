"""Scales of tokens in compiled and exported code: an operator that says it writes to them."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from compiling import GROUP
from helpers import diagonal, every, few
from token_scales import (
    BAD,
    BF16,
    E4M3,
    E5M2,
    F16,
    FEATURES,
    HEADS,
    STORED,
    Case,
    case,
    in_pages,
)
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor import config as inductor_config

from gqa_cutlass import InputError, flash_attn_with_kvcache, gqa_decode, ops
from gqa_cutlass.errors import CacheOverflowError
from gqa_cutlass.proof.reference import same_bits

pytestmark = pytest.mark.xdist_group(GROUP)

OPERATOR = "gqa_decode_scales_of_tokens"
POSITIONAL = "q", "k_cache", "v_cache", "k", "v", "k_scale", "v_scale"


@pytest.fixture(autouse=True)
def nothing_compiled() -> None:
    torch._dynamo.reset()


def counted(function: Callable[..., Any], **options: Any) -> tuple[Any, CompileCounterWithBackend]:
    """A function compiled in one graph, and what counts how often it was."""
    counter = CompileCounterWithBackend("aot_eager")
    return torch.compile(function, backend=counter, fullgraph=True, **options), counter


def small(**options: Any) -> Case:
    """A step of two sequences, of which scales are numbers wherever there is memory."""
    made = case("cpu", **{"lengths": (20, 33), "capacity": 64} | options)
    for scale in (made.k_scale, made.v_scale):
        scale.nan_to_num_(7.0)
    return made


def lengths_of(made: Case) -> Tensor:
    return torch.tensor(made.lengths, dtype=torch.int32)


def positional(made: Case) -> list[Tensor]:
    return [getattr(made, name) for name in POSITIONAL]


def same(a: Case, b: Case) -> bool:
    """Whether two steps left the same behind, to the bit."""
    return all(same_bits(getattr(a, name), getattr(b, name)) for name in STORED)


@pytest.mark.parametrize("several", [False, True], ids=["one", "several, in pages"])
def test_the_operator_is_what_torch_expects(several: bool) -> None:
    """But for `test_schema`, which compares in arithmetic that torch has not for 8 bits; what is
    written is compared here, by its bits."""
    made = small(tokens=(3, 3) if several else None)
    if several:
        in_pages(made)
    operator = getattr(torch.ops.gqa_cutlass, OPERATOR).default
    given = (*positional(made), lengths_of(made), 0, 0.125, 2, True)
    before = [t.clone() for t in given[:8]]  # type: ignore[union-attr]
    torch.library.opcheck(
        operator, given, made.options,
        test_utils=("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"),
    )  # fmt: skip
    assert all(map(same_bits, given[:8], before))  # it works on copies
    operator(*given, **made.options)
    changed = [not same_bits(*pair) for pair in zip(given[:8], before, strict=True)]
    assert changed == [a.is_write for a in operator._schema.arguments[:8]]


def test_the_operator_returns_what_the_call_does() -> None:
    expected, found = small(), small()
    options = {"return_lse": True, "softcap": 1.5, "out_dtype": torch.float32}
    right = gqa_decode(**expected.given(), cache_seqlens=lengths_of(expected), **options)
    operator = getattr(torch.ops.gqa_cutlass, OPERATOR)
    assert all(
        map(torch.equal, operator(*positional(found), lengths_of(found), 0, **options), right)
    )
    assert same(found, expected)
    out, lse = operator(*positional(small()), None, 20, 0.3, 2, False, False)
    right = gqa_decode(**small().given(), cache_seqlens=20, softmax_scale=0.3, num_splits=2)
    assert torch.equal(out, right) and lse.shape == (0,)


@pytest.mark.parametrize(
    ("dtype", "queries", "tokens", "lengths"),
    diagonal([E4M3, E5M2], [F16, BF16], [None, (4, 4), (1, 3)], [(37, 300), (0, 16)]),
)
def test_compiled_appends_compute_scales_and_attention_counts_them(
    dtype: torch.dtype, queries: torch.dtype, tokens: Any, lengths: tuple[int, ...]
) -> None:
    compiled, counter = counted(gqa_decode)
    case("cpu", dtype, queries, lengths=lengths, tokens=tokens).check(call=compiled)
    assert counter.frame_count == 1


@pytest.mark.parametrize("name", few(FEATURES, 2))
def test_compiled_features_go_with_scales_of_tokens(name: str) -> None:
    made = case("cpu", capacity=304)
    FEATURES[name](made)
    made.check(call=counted(gqa_decode)[0])


def test_a_graph_reads_scales_as_they_are_before_and_after_each_step() -> None:
    """From the copies that torch makes of what a step writes to."""

    def model(made: dict[str, Any], lengths: Tensor) -> tuple[Tensor, ...]:
        first = made["k_scale"] + 0, made["v_scale"].sum(1)
        out = gqa_decode(**made, cache_seqlens=lengths)
        between = made["k_scale"] * 2, made["v_scale"].sum(1)
        made["k_scale"].mul_(0.5)
        after = gqa_decode(**made, cache_seqlens=lengths + 1)
        return out, after, *first, *between, made["k_scale"] * 2, made["v_scale"].clone()

    compiled, _ = counted(model)
    expected, found = small(), small()
    right = model(expected.given(), lengths_of(expected))
    assert not torch.equal(right[2], right[4] / 2) and not torch.equal(right[3], right[5])
    assert all(map(torch.equal, compiled(found.given(), lengths_of(found)), right))
    assert same(found, expected)


def test_scales_may_lie_in_one_buffer_and_rows_of_them_apart() -> None:
    compiled, _ = counted(gqa_decode)
    for _ in range(2):
        expected, found = small(), small()
        for made in (expected, found):
            held = torch.zeros(2, 3, 80, HEADS)
            both = held[:, :2, :64]  # rows have more room than the caches'
            both.copy_(torch.stack([made.k_scale, made.v_scale]))
            made.k_scale, made.v_scale = both.unbind()
        right = expected.run()
        assert torch.equal(found.run(compiled), right) and same(found, expected)
        assert not held[:, 2].any() and not held[:, :, 64:].any()
    found.check(call=compiled)


def test_what_was_compiled_serves_other_scales_and_other_kinds_of_them() -> None:
    """Scales are no constants, nor is their kind."""
    compiled, counter = counted(gqa_decode)
    for seed in range(3):
        small(seed=seed).check(call=compiled)
    assert counter.frame_count == 1
    once, again = small(), small()
    once.run(compiled)
    once.k_scale, once.v_scale = again.k_scale, again.v_scale  # others, of a step that was
    once.check(call=compiled)
    assert counter.frame_count == 1
    for scale in (0.5, torch.full((HEADS,), 0.25), None):
        made = small()
        before = made.held()
        given = made.given() | {"k_scale": scale, "v_scale": scale}
        out = compiled(**given, cache_seqlens=lengths_of(made))
        right = gqa_decode(**given, cache_seqlens=lengths_of(made))
        assert torch.equal(out, right) and same_bits(made.k_scale, before["k_scale"])
    small(seed=4).check(call=compiled)


def test_a_dynamic_batch_room_and_lengths_do_not_compile_again() -> None:
    compiled, counter = counted(gqa_decode, dynamic=True)
    for batch, room in ((3, 48), (5, 96), (4, 80)):
        for held in (2, 40):
            lengths = tuple(range(held, held + batch))
            case("cpu", lengths=lengths, capacity=room).check(call=compiled)
    assert counter.frame_count == 1


def test_a_length_that_is_an_int_becomes_a_symbol() -> None:
    compiled, counter = counted(gqa_decode)
    expected, found = small(), small()
    for held in range(20, 25):
        right = gqa_decode(**expected.given(), cache_seqlens=held)
        assert torch.equal(compiled(**found.given(), cache_seqlens=held), right)
    assert same(found, expected) and counter.frame_count == 2


def test_attending_alone_writes_to_no_scale() -> None:
    made = small()
    before = made.held()
    compiled, _ = counted(gqa_decode)
    given = made.given() | {"k": None, "v": None}
    right = gqa_decode(**given, cache_seqlens=lengths_of(made))
    assert torch.equal(compiled(**given, cache_seqlens=lengths_of(made)), right)
    assert all(same_bits(getattr(made, name), before[name]) for name in STORED)


def test_a_compiled_step_without_room_writes_no_scale() -> None:
    made = small(lengths=(20, 64))
    before = made.k_scale[1].clone()
    out = made.run(counted(gqa_decode)[0])
    assert out[1].isnan().all() and not out[0].isnan().any()
    assert torch.equal(made.k_scale[1], before)
    with pytest.raises(CacheOverflowError):
        ops.gqa_decode(**small().given(), cache_seqlens=lengths_of(made))


def test_the_call_of_flash_attention_is_compiled_as_well() -> None:
    def call(made: dict[str, Any], lengths: Tensor) -> Tensor:
        out: Tensor = flash_attn_with_kvcache(
            made["q"], made["k_cache"], made["v_cache"], made["k"], made["v"],
            cache_seqlens=lengths, k_descale=made["k_scale"], v_descale=made["v_scale"],
        )  # fmt: skip
        return out

    expected, found = (small(tokens=(1, 1)) for _ in range(2))
    right = call(expected.given(), lengths_of(expected))
    assert torch.equal(counted(call)[0](found.given(), lengths_of(found)), right)
    assert same(found, expected)


class Model(torch.nn.Module):
    def forward(self, given: dict[str, Tensor], lengths: Tensor) -> Any:
        return gqa_decode(**given, cache_seqlens=lengths)


@pytest.mark.parametrize("strict", [True, False])
def test_a_step_can_be_exported_and_loaded(strict: bool) -> None:
    made, expected = small(), small()
    given = made.given(), lengths_of(made)
    before = made.held()
    program = torch.export.export(Model(), given, strict=strict)
    assert all(same_bits(getattr(made, name), before[name]) for name in STORED)
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert getattr(torch.ops.gqa_cutlass, OPERATOR).default in targets
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    right = expected.run()
    for each in (program, torch.export.load(file), program.run_decompositions()):
        found = small()
        assert torch.equal(each.module()(found.given(), lengths_of(found)), right)
        assert same(found, expected)


@pytest.mark.slow
def test_inductor_writes_to_the_scales_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """No copy is made of them or of the caches, before the operator or after it; and what is read
    before a step is not taken for what is read after it, as torch does with what no operator says
    that it writes."""
    seen: list[list[int]] = []

    def noted(q: Tensor, k_cache: Tensor, v_cache: Tensor, *rest: Any, **options: Any) -> Any:
        written = k_cache, v_cache, options["k_scale"], options["v_scale"]
        seen.append([t.data_ptr() for t in written])
        return gqa_decode(q, k_cache, v_cache, *rest, **options)

    def model(made: dict[str, Any], lengths: Tensor) -> tuple[Tensor, ...]:
        before = [made[name] * 2 for name in ("k_scale", "v_scale")]
        out = gqa_decode(**made | {"q": made["q"] * 1.0}, cache_seqlens=lengths)
        lengths.add_(1)
        return out + 1, *before, made["k_scale"] * 2, made["v_scale"] * 2

    expected, found = small(), small()
    right = model(expected.given(), lengths_of(expected))
    assert not torch.equal(right[1], right[3]) and not torch.equal(right[2], right[4])
    lengths = lengths_of(found)
    monkeypatch.setattr(ops, "gqa_decode", noted)
    # Most of the time would go into trying vector instructions, and precompiling torch's headers.
    quick = {"cpp.vec_isa_ok": False, "cpp_cache_precompile_headers": False}
    fresh = {"force_disable_caches": True}  # whose keys do not have what operators write to
    with inductor_config.patch(quick | fresh):
        torch.testing.assert_close(
            torch.compile(model, fullgraph=True)(found.given(), lengths), right
        )
    assert same(found, expected) and lengths.tolist() == [21, 34]
    assert seen == [[getattr(found, name).data_ptr() for name in STORED]]


# ---- what is refused ----


BAD_COMPILED: dict[str, tuple[Callable[[Case], dict[str, Any]], str]] = BAD | {
    "none of values": (lambda c: {"v_scale": None}, "v_scale: got none of tokens; allowed: as k_s"),
    "views of one": (
        lambda c: {"k_scale": c.v_scale[:], "v_scale": c.v_scale[:, :]},
        "v_scale: got memory that k_scale also uses; allowed: two caches that do not share",
    ),
    "elsewhere": (
        lambda c: {"k_scale": torch.empty_like(c.k_scale, device="meta")},
        "tensors: got some on meta and some on cpu; allowed: all on one device",
    ),
    "expanded": (
        lambda c: {"v_scale": c.v_scale[:, :1].expand(1, 64, HEADS)},
        r"v_scale: got strides \[128, 0, 1\]; allowed: \[128 or more, 2, 1\]",
    ),
    "learning": (
        lambda c: {"k_scale": c.k_scale.clone().requires_grad_()},
        "k_scale: got a tensor that requires grad",
    ),
    "a word": (lambda c: {"k_scale": "token"}, "k_scale: got a str; allowed: a number or a torch"),
    "caches of 16 bits": (
        lambda c: {"k_cache": c.k_cache.half(), "v_cache": c.v_cache.half()},
        "k_scale: got a tensor, with caches of torch.float16; allowed: None, or caches of",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", every(2, BAD_COMPILED))
def test_what_is_not_allowed_is_refused_as_ever_and_nothing_written(name: str) -> None:
    made = small(lengths=(20,))
    before = made.held()
    changes, message = BAD_COMPILED[name]
    # Torch itself traces no tensors that are views of one memory in unlike types.
    backend = "eager" if name == "of the cache" else "aot_eager"
    compiled = torch.compile(gqa_decode, backend=backend)
    for _ in range(2):  # the second time torch knows whether the graph breaks
        with pytest.raises(InputError, match=message):
            compiled(**made.given() | changes(made), cache_seqlens=20)
    assert all(same_bits(getattr(made, name), before[name]) for name in STORED)


@pytest.mark.parametrize("other", ["one alone", "and one of heads", "none of values"])
def test_one_graph_says_that_scales_are_of_two_kinds(other: str) -> None:
    made = small(lengths=(20,))
    given = made.given() | BAD_COMPILED[other][0](made)
    told = "gqa_decode: k_scale and v_scale: of tokens is one of them, and not the other"
    with pytest.raises(torch._dynamo.exc.Unsupported, match=told):
        counted(gqa_decode)[0](**given, cache_seqlens=20)
    with pytest.raises(InputError, match=told):
        torch.export.export(Model(), (given, lengths_of(made)), strict=False)


def test_no_graph_has_scales_of_tokens_in_an_operator_that_does_not_say_so() -> None:
    """Whoever calls operators by their names is told which one does."""
    made = small()
    operators = torch.ops.gqa_cutlass
    scales = {"k_scale": made.k_scale, "v_scale": made.v_scale}
    told = f"k_scale: got scales of tokens; allowed: others; or the operator {OPERATOR}"

    def call(given: list[Tensor], lengths: Tensor, **scales: Tensor) -> Any:
        return operators.gqa_decode(*given, lengths, 0, **scales)

    before = made.held()
    with pytest.raises(Exception, match=told):
        counted(call)[0](positional(made)[:5], lengths_of(made), **scales)
    assert all(same_bits(getattr(made, name), before[name]) for name in STORED)
    given = [t.to("meta") for t in positional(made)]
    with pytest.raises(InputError, match=told):
        operators.gqa_decode(*given[:5], None, 3, k_scale=given[5], v_scale=given[6])
    out, _ = getattr(operators, OPERATOR)(*given, None, 3)
    assert out.is_meta and out.shape == made.q.shape


def test_a_step_runs_where_torch_compiles_no_more() -> None:
    """It then takes up frames within those that it skips, the operator's too if it were let."""
    made, again = small(lengths=(20,)), small(lengths=(20,))
    step = torch.compile(
        lambda options: gqa_decode(**made.given() | options, cache_seqlens=20), backend="eager"
    )
    with torch._dynamo.config.patch(recompile_limit=1):
        with pytest.raises(InputError, match="of tokens"):
            step({"v_scale": 2.0})
        step({"k_scale": 1.0, "v_scale": 1.0})
        out = step({})
    assert torch.equal(out, gqa_decode(**again.given(), cache_seqlens=20)) and same(made, again)
