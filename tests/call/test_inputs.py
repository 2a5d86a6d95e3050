"""What a call accepts. Bad input raises before a launch, says what, got and allowed, and writes
nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import call_tensors
from torch import Tensor

from gqa_cutlass import gqa_decode
from gqa_cutlass.call.addresses import check_length
from gqa_cutlass.call.asked import check_options
from gqa_cutlass.call.given import see
from gqa_cutlass.call.layout import check_lengths
from gqa_cutlass.call.layout import problem_of as problem_of_call
from gqa_cutlass.codegen.schema.problem import MAX_BATCH, MAX_SEQ_LEN, MAX_SPLITS
from gqa_cutlass.errors import CacheOverflowError, GqaError, InputError

Change = Callable[[dict[str, Any]], Any]
NAMES = ("q", "k_cache", "v_cache", "k", "v", "out")


def bad(what: str, got: str, allowed: str, **changes: Change) -> Any:
    """One rule, broken by changing some arguments of a valid call."""
    return pytest.param(what, got, allowed, changes, id=f"{what}: {got}")


def _misshapen(name: str) -> Change:
    return lambda t: torch.cat([t[name], t[name]], dim=-2)


def _strided(name: str) -> Change:
    return lambda t: torch.stack([t[name], t[name]], dim=-1)[..., 0]


def _replaced(**sizes: Any) -> dict[str, Change]:
    """All tensors anew, for sizes that concern all of them."""
    return {name: lambda t, name=name: call_tensors(**sizes)[name] for name in NAMES}  # type: ignore[misc]


def _at_odd_address(tensor: Tensor) -> Tensor:
    memory = bytearray(tensor.numel() * 2 + 2)
    start = 1 - torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % 2
    flat = torch.frombuffer(memory, dtype=tensor.dtype, offset=start, count=tensor.numel())
    return flat.view(tensor.shape)


RANKS = "[batch, heads, head_dim] or [batch, tokens, heads, head_dim]"
BROKEN_RULES = [
    *(bad(n, "a list", "a torch.Tensor", **{n: lambda t: [1.0]}) for n in NAMES),
    *(bad(n, "a NoneType", "a torch.Tensor", **{n: lambda t: None}) for n in NAMES[:3]),
    *(
        bad(n, "a torch.sparse_coo tensor", "a dense", **{n: lambda t, n=n: t[n].to_sparse()})
        for n in NAMES
    ),
    bad("q", "a nested tensor", "a dense", q=lambda t: torch.nested.nested_tensor(list(t["q"]))),
    bad("k", "address 0x", "a multiple of 2", k=lambda t: _at_odd_address(t["k"])),
    bad("k and v", "no v", "both (append the token) or neither", v=lambda t: None),
    bad("k and v", "no k", "both (append the token) or neither", k=lambda t: None),
    bad("q", "shape [8, 64]", RANKS, q=lambda t: t["q"][0]),
    bad("q", "shape [2, 1, 1, 8, 64]", RANKS, q=lambda t: t["q"][:, None, None]),
    bad("tokens of q", "0", "1 to 256 per sequence", q=lambda t: t["q"][:, None][:, :0]),
    bad("tokens of q", "257", "1 to 256 per sequence", q=lambda t: torch.stack([t["q"]] * 257, 1)),
    bad("k", "shape [2, 64]", RANKS, k=lambda t: t["k"][:, 0]),
    bad("v", "shape [2, 2, 2, 64]", "[2, 1, 2, 64]", v=lambda t: torch.stack([t["v"]] * 2, dim=1)),
    bad("out", "shape [2, 512]", RANKS, out=lambda t: t["out"].flatten(1)),
    *(
        bad(n, "shape [16, 2, 64]", "[batch, max_seq_len, num_kv_heads, head_dim",
            **{n: lambda t: t["k_cache"][0]})
        for n in ("k_cache", "v_cache")
    ),
    bad("q", "torch.float32", "torch.float16 or torch.bfloat16", q=lambda t: t["q"].float()),
    bad("q", "torch.int16", "torch.float16 or torch.bfloat16", q=lambda t: t["q"].short()),
    *(
        bad(n, "torch.bfloat16", "q's dtype, torch.float16", **{n: lambda t, n=n: t[n].bfloat16()})
        for n in NAMES[1:]
    ),
    *(
        bad(n, "a tensor on meta", "q's device, cpu", **{n: lambda t, n=n: t[n].to("meta")})
        for n in NAMES[1:]
    ),
    *(
        bad(n, "a tensor that requires grad", "torch.inference_mode()",
            **{n: lambda t, n=n: t[n].clone().requires_grad_()})
        for n in NAMES
    ),
    *(bad("head_dim", str(d), "multiples of 8 from 32 to 256", **_replaced(head_dim=d))
      for d in (24, 100, 264)),
    bad("batch size", "0", f"1 to {MAX_BATCH}", **_replaced(batch=0)),
    bad("batch size", "65536", f"1 to {MAX_BATCH}", **_replaced(batch=65536, device="meta")),
    bad("max_seq_len", "0", f"1 to {MAX_SEQ_LEN}", **_replaced(max_seq_len=0)),
    bad("max_seq_len", str(2**30 + 1), f"1 to {MAX_SEQ_LEN}",
        **_replaced(max_seq_len=2**30 + 1, device="meta")),
    bad("head counts", "7 query heads and 2 KV heads", "cache.transpose(1, 2)",
        **_replaced(q_heads=7)),
    bad("head counts", "2 query heads and 4 KV heads", "a multiple of",
        **_replaced(q_heads=2, kv_heads=4)),
    bad("head counts", "8 query heads and 0 KV heads", "a multiple of", **_replaced(kv_heads=0)),
    bad("head counts", "0 query heads and 2 KV heads", "a multiple of", **_replaced(q_heads=0)),
    bad("k_cache", "shape [1, 16, 2, 64]", "pages go with block_table",
        k_cache=lambda t: t["k_cache"][:1]),
    bad("v_cache", "shape [2, 15, 2, 64]", "[2, 16, 2, 64]", v_cache=lambda t: t["v_cache"][:, 1:]),
    bad("v_cache", "shape [2, 16, 4, 64]", "[2, 16, 2, 64]", v_cache=_misshapen("v_cache")),
    bad("k", "shape [2, 4, 64]", "[2, 2, 64]", k=_misshapen("k")),
    bad("v", "shape [2, 2, 32]", "[2, 2, 64]", v=lambda t: t["v"][..., :32]),
    bad("out", "shape [2, 16, 64]", "[2, 8, 64]", out=_misshapen("out")),
    *(bad(n, "strides [", "a contiguous last dimension", **{n: _strided(n)}) for n in NAMES),
    bad("k_cache", "strides [0, 128, 64, 1]", "elements that do not share memory",
        k_cache=lambda t: t["k_cache"][:1].expand(2, -1, -1, -1)),
    bad("v_cache", "strides [2048, 64, 64, 1]", "elements that do not share memory",
        v_cache=lambda t: t["v_cache"].as_strided((2, 16, 2, 64), (2048, 64, 64, 1))),
    bad("out", "strides [512, 0, 1]", "elements that do not share memory",
        out=lambda t: t["out"][:, :1].expand(-1, 8, -1)),
    bad("v_cache", "memory that k_cache also uses", "two caches", v_cache=lambda t: t["k_cache"]),
    bad("out", "memory that q also uses", "memory of its own", out=lambda t: t["q"]),
    bad("out", "memory that k_cache also uses", "memory of its own",
        out=lambda t: t["k_cache"].flatten()[-1024:].view(2, 8, 64)),
    bad("out", "memory that v also uses", "memory of its own",
        v=lambda t: t["out"][:, 2:4]),
    bad("softmax_scale", "nan", "a number from -1e+38", softmax_scale=lambda t: float("nan")),
    bad("softmax_scale", "inf", "a number from -1e+38", softmax_scale=lambda t: float("inf")),
    bad("softmax_scale", "1e+39", "a number from -1e+38", softmax_scale=lambda t: 1e39),
    bad("softmax_scale", "1000", "a number from -1e+38", softmax_scale=lambda t: 10**400),
    bad("softmax_scale", "True", "a number from -1e+38", softmax_scale=lambda t: True),
    bad("group size", "1025", "1 to 1024", **_replaced(q_heads=1025, kv_heads=1)),
    bad("softmax_scale", "'1'", "a number from -1e+38", softmax_scale=lambda t: "1"),
    *(
        bad("num_splits", repr(n), f"0 (the dispatcher decides) to {MAX_SPLITS}",
            num_splits=lambda t, n=n: n)
        for n in (-1, MAX_SPLITS + 1, 1.5, "2")
    ),
    *(
        bad("cache_seqlens", got, "an int", cache_seqlens=lambda t, value=value: value)
        for value, got in ((1.0, "a float"), (True, "a bool"), (None, "a NoneType"))
    ),
    bad("cache_seqlens", "-1", "0 to 15", cache_seqlens=lambda t: -1),
    *(
        bad("cache_seqlens", got, "contiguous torch.int32 [2] on cpu",
            cache_seqlens=lambda t, value=value: value)
        for value, got in (
            (torch.zeros(2, dtype=torch.int64), "torch.int64 shape [2] on cpu"),
            (torch.zeros(3, dtype=torch.int32), "torch.int32 shape [3] on cpu"),
            (torch.zeros(2, 1, dtype=torch.int32), "torch.int32 shape [2, 1] on cpu"),
            (torch.zeros((), dtype=torch.int32), "torch.int32 shape [] on cpu"),
            (torch.zeros(2, dtype=torch.int32, device="meta"), "torch.int32 shape [2] on meta"),
            (torch.zeros(1, dtype=torch.int32).expand(2), "torch.int32 shape [2] on cpu"),
        )
    ),
]  # fmt: skip


@pytest.mark.parametrize(("what", "got", "allowed", "changes"), BROKEN_RULES)
def test_broken_rule_raises_and_nothing_is_written(
    what: str, got: str, allowed: str, changes: dict[str, Change]
) -> None:
    valid = call_tensors()
    arguments = {"cache_seqlens": 3} | valid | {n: change(valid) for n, change in changes.items()}
    tensors = {
        n: t
        for n, t in arguments.items()
        if isinstance(t, Tensor) and t.device.type == "cpu" and not (t.is_sparse or t.is_nested)
    }
    before = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    with pytest.raises(InputError) as raised:
        gqa_decode(**arguments)
    message = str(raised.value)
    assert message.startswith(f"gqa_decode: {what}: got {got}")
    assert allowed in message.partition("; allowed: ")[2]
    assert message.endswith("Nothing was launched.")
    assert all(torch.equal(tensors[name], before[name]) for name in tensors)


@pytest.mark.parametrize(
    ("length", "append"), [(16, True), (17, True), (10**9, True), (17, False), (18, False)]
)
def test_overflow_raises_before_anything_is_written(length: int, append: bool) -> None:
    tensors = call_tensors() if append else call_tensors() | {"k": None, "v": None}
    with pytest.raises(CacheOverflowError) as raised:
        gqa_decode(**tensors, cache_seqlens=length)
    message = str(raised.value)
    assert f"the cache holds {length} tokens" in message and "max_seq_len is 16" in message
    assert ("one is to be appended" in message) == append
    assert "Nothing was written. Evict tokens, or allocate a larger cache." in message
    assert all((t == 1).all() for t in tensors.values() if t is not None)
    assert isinstance(raised.value, InputError) and isinstance(raised.value, GqaError)


def problem_of(**tensors: Tensor | None) -> Any:
    """The problem that a valid call poses; without `k`, `v` or `out` where they are not given."""
    return problem_of_call(see([*(tensors.get(name) for name in NAMES), 0]))


def test_problem_is_what_the_shapes_say() -> None:
    problem = problem_of(**call_tensors(batch=3, q_heads=14, kv_heads=2, max_seq_len=9))
    assert (problem.batch_size, problem.num_q_heads, problem.num_kv_heads) == (3, 14, 2)
    assert (problem.head_dim, problem.max_seq_len, problem.group_size) == (64, 9, 7)
    assert (problem.dtype, problem.vec_width, problem.append) == ("f16", 8, True)


def test_queries_may_carry_a_dimension_of_one_token() -> None:
    flat = call_tensors()
    one = flat | {name: flat[name].unsqueeze(1) for name in ("q", "k", "v", "out")}
    assert problem_of(**one) == problem_of(**flat)


@pytest.mark.parametrize("length", [0, 15])
def test_lengths_that_leave_room_for_the_token_are_accepted(length: int) -> None:
    check_length(length, 16, 1)


def test_full_cache_may_be_attended_to_when_nothing_is_appended() -> None:
    check_length(16, 16, 0)


def test_lengths_on_the_device_are_accepted_without_being_read() -> None:
    lengths = torch.full((2,), 10**6, dtype=torch.int32)  # too long, which the kernel will find
    check_lengths(see([*call_tensors().values(), lengths]), 2)


@pytest.mark.parametrize("scale", [None, 2, -0.5, 0, 1e38])
def test_scale_that_float32_holds_is_accepted(scale: float | None) -> None:
    check_options(softmax_scale=scale)


@pytest.mark.parametrize("num_splits", [0, 1, MAX_SPLITS])
def test_number_of_splits_in_range_is_accepted(num_splits: int) -> None:
    check_options(num_splits)
