"""Approximations: the correctly rounded value where the ISA grants an error.

Hardware looks results up in tables and differs in the last bits, within the bounds given here.
"""

# NumPy types the operators of an array of any dtype as Any.
# mypy: disable-error-code="no-any-return"
from __future__ import annotations

from collections.abc import Callable

import numpy as np

from gqa_cutlass.ptxsim.element.bits import Arithmetic, Bits, Builder, Numbers, Opcode, Run, uniform
from gqa_cutlass.ptxsim.element.formats import F32, F64, FORMATS, Format, flush, narrow, widen

# What the ISA says of the error, by opcode without ftz.
APPROXIMATE: dict[str, str] = {
    "div.approx.f32": "2 ulp for |b| in [2^-126, 2^126]; 0 (NaN for infinite a) above",
    "div.full.f32": "2 ulp",
    "rcp.approx.f32": "1 ulp",
    "rcp.approx.f64": "reads and gives the upper 32 bits only; the lower ones are zero",
    "rsqrt.approx.f32": "relative 2^-22.9",
    "rsqrt.approx.f64": "none stated; with ftz the upper 32 bits only",
    "sqrt.approx.f32": "relative 2^-23",
    "ex2.approx.f32": "2 ulp",
    "ex2.approx.f16": "relative 2^-9.9",
    "ex2.approx.f16x2": "relative 2^-9.9",
    "ex2.approx.bf16": "relative 2^-7",
    "ex2.approx.bf16x2": "relative 2^-7",
    "lg2.approx.f32": "absolute 2^-22 for a in (0.5, 2); relative 2^-22 elsewhere",
    "sin.approx.f32": "absolute 2^-20.5 in [-2 pi, 2 pi], 2^-14.7 in [-100 pi, 100 pi]",
    "cos.approx.f32": "absolute 2^-20.5 in [-2 pi, 2 pi], 2^-14.7 in [-100 pi, 100 pi]",
    "tanh.approx.f32": "relative 2^-11",
    "tanh.approx.f16": "absolute 2^-10.987",
    "tanh.approx.f16x2": "absolute 2^-10.987",
    "tanh.approx.bf16": "absolute 2^-8",
    "tanh.approx.bf16x2": "absolute 2^-8",
}
_HUGE = 2.0**126


def _divide(left: Numbers, right: Numbers) -> Numbers:
    """Divide as through a reciprocal that underflows to zero for huge divisors."""
    huge = np.abs(right) > _HUGE
    return np.where(huge, left * np.copysign(0.0, right), left / right)


def _rsqrt(value: Numbers) -> Numbers:
    return 1.0 / np.sqrt(value)


def _rcp(value: Numbers) -> Numbers:
    return 1.0 / value


_FUNCTIONS: dict[str, Callable[..., Numbers]] = {
    "ex2": np.exp2,
    "lg2": np.log2,
    "sin": np.sin,
    "cos": np.cos,
    "tanh": np.tanh,
    "rcp": _rcp,
    "rsqrt": _rsqrt,
    "sqrt": np.sqrt,
}


def _rounding(function: Callable[..., Numbers], shape: Format, *, ftz: bool) -> Run:
    """Return a float64 function as one of a narrower format."""

    def run(*sources: Bits) -> Bits:
        if ftz:
            sources = tuple(flush(source, shape) for source in sources)
        result = narrow(function(*(widen(source, shape) for source in sources)), shape)
        return flush(result, shape) if ftz else result

    return run


def _approximate(op: Opcode) -> Arithmetic:
    run = _rounding(_FUNCTIONS[op.name], FORMATS[op.kind.lane.name], ftz="ftz" in op)
    return uniform(op, 1, run)


def _div(op: Opcode) -> Arithmetic:
    function = _divide if "approx" in op else np.divide
    return uniform(op, 2, _rounding(function, F32, ftz="ftz" in op))


_UPPER = np.uint64(0xFFFFFFFF << 32)
_HALF_OF_LOWER = np.uint64(1 << 31)


def _upper_half(op: Opcode) -> Arithmetic:
    """Build the f64 forms with ftz, which see 20 bits of the fraction and give as many."""
    function = _FUNCTIONS[op.name]

    def run(value: Bits) -> Bits:
        argument = flush(value & _UPPER, F64)
        result = function(argument.view(np.float64)).view(np.uint64)
        nan = argument & F64.magnitude > F64.infinity
        rounded = flush(result + _HALF_OF_LOWER & _UPPER, F64)
        return np.where(nan | np.isnan(result.view(np.float64)), _NAN, rounded)

    return uniform(op, 1, run)


_NAN = np.uint64(F64.magnitude) & _UPPER


def _rsqrt_double(op: Opcode) -> Arithmetic:
    def run(value: Bits) -> Bits:
        result = _rsqrt(value.view(np.float64))
        return np.where(np.isnan(result), np.uint64(F64.nan), result.view(np.uint64))

    return uniform(op, 1, run)


FAMILIES: dict[str, Builder] = {
    "div.approx|full.{ftz}.f32": _div,
    "ex2|lg2|sin|cos|rcp|rsqrt|sqrt.approx.{ftz}.f32": _approximate,
    "tanh.approx.f32|f16|f16x2|bf16|bf16x2": _approximate,
    "ex2.approx.f16|f16x2": _approximate,
    "ex2.approx.ftz.bf16|bf16x2": _approximate,
    "rcp|rsqrt.approx.ftz.f64": _upper_half,
    "rsqrt.approx.f64": _rsqrt_double,
}
