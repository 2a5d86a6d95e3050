"""Values that no option takes: each is an error of the package, before anything is done."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from executors import Notes, running_on
from helpers import call_tensors
from torch import Tensor

from gqa_cutlass import (  # fmt: skip
    GQADecodeConfig,
    check_overflow,
    explain,
    gqa_attention_decode,
    gqa_decode,
    plan,
    warmup,
)
from gqa_cutlass.codegen import shipped
from gqa_cutlass.errors import GqaError


class Hostile:
    """Raises at everything that may be asked of it."""

    def _refuse(self, *_: object) -> Any:
        raise ArithmeticError("asked")

    __eq__ = __hash__ = __bool__ = __repr__ = __str__ = __len__ = __iter__ = _refuse
    __index__ = __int__ = __float__ = __lt__ = __le__ = __gt__ = __ge__ = _refuse
    __getattr__ = _refuse


class LikeTrue(Hostile):
    """Found in a dictionary where True is."""

    def __hash__(self) -> int:  # type: ignore[override]
        return 1


ODD: dict[str, Any] = {
    "None": None, "text": "name", "empty": "", "list": [1], "dict": {}, "two": torch.tensor([1, 2]),
    "huge": 10**400, "too long to print": 10**5000, "negative": -1, "2**63": 2**63, "2.5": 2.5,
    "nan": float("nan"), "inf": float("inf"), "True": True, "1.0": 1.0, "bytes": b"x",
    "hostile": Hostile(), "like True": LikeTrue(), "type": int, "mock": Mock(spec=Tensor),
}  # fmt: skip
CONFIG = GQADecodeConfig(
    batch_size=2, cache_len=3, num_q_heads=8, num_kv_heads=2, head_dim=64, scale=0.125,
    max_seq_len=16,
)  # fmt: skip
KERNEL = shipped()[0]


def _story(**options: Any) -> object:
    t = call_tensors()
    tokens = {name: t[name].unsqueeze(1) for name in ("q", "k", "v")}
    caches = {"kv_cache_k": t["k_cache"], "kv_cache_v": t["v_cache"]}
    output = t["out"].view(2, 1, 512)
    return gqa_attention_decode(
        **{**tokens, **caches, "output": output, "config": CONFIG} | options
    )


def _decode(**options: Any) -> object:
    return gqa_decode(**call_tensors() | {"cache_seqlens": 3} | options)


def _plan(**options: Any) -> object:
    return plan(**call_tensors() | {"cache_seqlens": 3} | options)


def _explain(**options: Any) -> object:
    return explain(**call_tensors() | options)


def _run_plan(cache_seqlens: Any) -> object:
    t = call_tensors()
    return plan(**t, cache_seqlens=3)(**t, cache_seqlens=cache_seqlens)


def _with_field(name: str, use: Callable[[GQADecodeConfig], object]) -> Callable[..., object]:
    return lambda value: use(replace(CONFIG, **{name: value}))


# By option: what passes it on, and which of the odd values are none there.
NUMBERS = ("None", "negative", "2.5", "1.0", "2**63")
OPTIONS: dict[str, tuple[Callable[..., object], tuple[str, ...]]] = {
    **{
        f"{call.__name__[1:]}: {name}": (lambda value, c=call, n=name: c(**{n: value}), allowed)
        for call, name, allowed in (
            *((call, name, ("True",)) for call in (_decode, _plan)
              for name in ("return_lse", "ragged")),
            *((call, "num_splits", ()) for call in (_decode, _plan, _explain)),
            *((call, "softmax_scale", NUMBERS) for call in (_decode, _plan)),
            *((call, "cache_seqlens", ()) for call in (_decode, _plan)),
            *((call, name, ("True",)) for call in (_plan, _explain) for name in ("dependent",)),
            (_explain, "ragged", ("True",)),
            (_explain, "arch", ("None",)),
            (_plan, "kernel", ("None",)),
            (_story, "config", ()),
            (_story, "stream", ("None",)),
        )
    },
    "a plan: cache_seqlens": (lambda value: _run_plan(value), ()),
    "warmup: configs": (
        lambda value: warmup(value, device="cpu"), ("empty", "dict", "hostile", "like True"),
    ),
    "warmup: one of the configs": (lambda value: warmup([KERNEL, value], device="cpu"), ()),
    "warmup: dtype": (lambda value: warmup([KERNEL], dtype=value, device="cpu"), ()),
    "warmup: device": (lambda value: warmup([KERNEL], device=value), ()),
    "check_overflow: device": (lambda value: check_overflow(value), ()),
    **{
        f"{what}: {field.name}": (
            _with_field(field.name, use), NUMBERS if field.name == "scale" else allowed
        )
        for what, use, allowed in (
            ("gqa_attention_decode", lambda config: _story(config=config), ()),
            ("warmup", lambda config: warmup([config], device="cpu"), ()),
        )
        for field in fields(GQADecodeConfig)
    },
}  # fmt: skip
CASES = [
    pytest.param(use, ODD[value], id=f"{option}: {value}")
    for option, (use, allowed) in OPTIONS.items()
    for value in ODD
    if value not in allowed
    and not (option == "warmup: cache_len" and isinstance(ODD[value], int))  # not asked for
]


@pytest.fixture(autouse=True)
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[object]]:
    """What was launched, in place of launching it."""
    monkeypatch.setattr("gqa_cutlass.cpu.executor.program_of", lambda config: None)
    notes = Notes()
    with running_on(notes):
        yield notes.launches


@pytest.mark.parametrize(("use", "value"), CASES)
def test_odd_values_are_errors_of_the_package(
    launched: list[object], use: Callable[[object], object], value: object
) -> None:
    with pytest.raises(GqaError):
        use(value)
    assert launched == []
    _decode(return_lse=True)  # whose plan is found by what equals its options
    launched.clear()
    with pytest.raises(GqaError):
        use(value)
    assert launched == []


def test_what_is_refused_is_said() -> None:
    for use, message in (
        (lambda: _plan(kernel="name"), "plan: kernel: got 'name'; allowed: a KernelConfig"),
        (lambda: warmup(["name"]), "warmup: configs: got 'name'; allowed: a KernelConfig, a Merge"),
        (lambda: warmup(CONFIG), "warmup: configs: got GQADecodeConfig(batch_size=2, "),
        (lambda: warmup([KERNEL], device="foo"), "device: got 'foo'; allowed: a CUDA device"),
        (lambda: check_overflow(""), "device: got ''; allowed: a CUDA device, such as 'cuda:0'"),
        (lambda: check_overflow(256), "device: got 256; allowed: a CUDA device"),
        (lambda: check_overflow("cuda:300"), "device: got 'cuda:300'; allowed: a CUDA device"),
        (lambda: _decode(ragged=[1]), "gqa_decode: ragged: got [1]; allowed: True or False"),
        (lambda: _explain(arch=["sm_80"]), "explain: arch: got ['sm_80']; allowed: sm_80, "),
        (
            lambda: _story(config=replace(CONFIG, batch_size=2.0)),
            "batch_size: got 2.0; allowed: an",
        ),
        (lambda: _story(stream=2), "stream: got 2 with tensors on cpu; allowed: None, or 0"),
    ):
        with pytest.raises(GqaError) as raised:
            use()
        assert message in str(raised.value)


def test_configurations_are_for_caches_that_a_kernel_can_have() -> None:
    huge = dict(batch_size=65535, max_seq_len=2**30, num_kv_heads=2**30, num_q_heads=2**31)
    with pytest.raises(GqaError, match="number of query heads: got 2147483648; allowed: 1 to"):
        warmup([replace(CONFIG, **huge)], device="cpu")
