"""Every kind of tensor that torch has and that is not plain, dense memory.

Each kind makes a tensor with the shape, the dtype and, where it has any, the values of a plain one,
and hands it to `use` while the kind's surroundings (a vmap, a level of forward AD) last.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad

Use = Callable[[Tensor], object]
Kind = Callable[[Tensor, Use], object]


class Wrapper(Tensor):
    """A subclass without memory, which means another tensor."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapper:
        made: Wrapper = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device=inner.device
        )
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        raise NotImplementedError(func)


class Dispatching(Wrapper):
    """A subclass with memory, and with operations of its own."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> Dispatching:
        return Tensor._make_subclass(cls, inner)  # type: ignore[no-any-return, attr-defined]


class Refusing(Wrapper):
    """A subclass that lets nobody ask anything."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        raise ArithmeticError(f"asked for {func}")


def _made(make: Callable[[Tensor], Tensor]) -> Kind:
    """A kind without surroundings."""
    return lambda plain, use: use(make(plain))


def _transformed(transform: Callable[..., Callable[..., object]]) -> Kind:
    """What a function transform of torch.func wraps."""

    def kind(plain: Tensor, use: Use) -> object:
        def inner(wrapped: Tensor) -> Tensor:
            use(wrapped)
            return wrapped.sum()

        return transform(inner)(plain)

    return kind


def _batched(plain: Tensor, use: Use) -> object:
    return torch.func.vmap(lambda one: (use(one), one)[1])(plain[None])


def _tangent(plain: Tensor, use: Use) -> object:
    return torch.func.jvp(lambda one: (use(one), one)[1], (plain,), (plain.clone(),))


def _dual(plain: Tensor, use: Use) -> object:
    with forward_ad.dual_level():
        return use(forward_ad.make_dual(plain, plain.clone()))


def _nested(plain: Tensor, layout: torch.layout) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rows = list(plain) if plain.dim() > 1 else [plain]
        return torch.nested.nested_tensor(rows, dtype=plain.dtype, layout=layout)


def _compressed(layout: torch.layout, *block: tuple[int, int]) -> Kind:
    def make(plain: Tensor) -> Tensor:
        matrix = plain if plain.dim() > 1 else plain[None]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return matrix.to_sparse(layout=layout, blocksize=block[0] if block else None)

    return _made(make)


def _quantized(plain: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(plain.float(), 1.0, 0, torch.qint32)


ANY_DTYPE: dict[str, Kind] = {
    "nested": _made(lambda plain: _nested(plain, torch.strided)),
    "sparse_coo": _made(lambda plain: plain.to_sparse()),
    "sparse_csr": _compressed(torch.sparse_csr),
    "sparse_csc": _compressed(torch.sparse_csc),
    "sparse_bsr": _compressed(torch.sparse_bsr, (1, 1)),
    "sparse_bsc": _compressed(torch.sparse_bsc, (1, 1)),
    "quantized": _made(_quantized),
    "meta": _made(lambda plain: plain.to("meta")),
    "functional": _made(torch._to_functional_tensor),
    "negated": _made(torch._neg_view),
    "zero": _made(lambda plain: torch._efficientzerotensor(plain.shape, dtype=plain.dtype)),
    "wrapper subclass": _made(Wrapper),
    "dispatching subclass": _made(Dispatching),
    "refusing subclass": _made(Refusing),
    "vmap": _batched,
    "functionalize": _transformed(torch.func.functionalize),
    "lazy parameter": _made(lambda plain: torch.nn.UninitializedBuffer(dtype=plain.dtype)),
}
FLOATING: dict[str, Kind] = {
    "mkldnn": _made(lambda plain: plain.bfloat16().to_mkldnn()),
    "imaginary part of a conjugate": _made(
        lambda plain: torch.view_as_complex(
            torch.stack([plain.float(), plain.float()], dim=-1)
        ).to(torch.complex32).conj().imag
    ),
    "conjugate": _made(lambda plain: plain.to(torch.complex32).conj()),
}  # fmt: skip


# Whose first use takes seconds, for what torch then imports.
SLOW: dict[str, Kind] = {
    "jagged": _made(lambda plain: _nested(plain, torch.jagged)),
    "fake": _made(lambda plain: FakeTensorMode().from_tensor(plain)),
}
SLOW_FLOATING: dict[str, Kind] = {
    "grad": _transformed(torch.func.grad),
    "jvp": _tangent,
    "dual": _dual,
}


def kinds_for(dtype: torch.dtype, slow: bool = False) -> dict[str, Kind]:
    """The kinds that a plain tensor of a dtype can be made into."""
    kinds = ANY_DTYPE | (SLOW if slow else {})
    return kinds | (FLOATING | (SLOW_FLOATING if slow else {}) if dtype.is_floating_point else {})
