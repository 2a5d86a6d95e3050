"""Floating-point arithmetic (PTX ISA, "Floating-Point" and "Half Precision" instructions).

The ISA leaves the payload of a NaN open. Here each NaN result of f16, bf16 and f32 is the canonical
one, that of neg and abs included; f64 passes on the payload of its first NaN operand.
"""

# NumPy types the operators of an array of any dtype as Any.
# mypy: disable-error-code="no-any-return"
from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np

from gqa_cutlass.ptxsim.element.bits import Arithmetic, Bits, Builder, Numbers, Opcode, Run, uniform
from gqa_cutlass.ptxsim.element.exact import double, signed_sum
from gqa_cutlass.ptxsim.element.formats import (
    BF16,
    F16,
    F32,
    F64,
    FORMATS,
    Format,
    after,
    flush,
    narrow,
    nearest_brain,
    propagate,
    read,
    widen,
    write,
)

# Takes float64 operands and the rounding mode; gives the exact result or one rounded to odd.
Exact: TypeAlias = Callable[..., Numbers]


def _fma(left: Numbers, right: Numbers, base: Numbers, mode: str) -> Numbers:
    return signed_sum(left * right, base, mode)


# A quotient or root in float64 that is no number of a narrower format lies on the same side of each
# of them as the exact one, and of each midpoint (Figueroa, "When is double rounding innocuous?").
EXACT: dict[str, Exact] = {
    "add": signed_sum,
    "sub": lambda left, right, mode: signed_sum(left, -right, mode),
    "mul": lambda left, right, mode: left * right,
    "fma": _fma,
    "mad": _fma,
    "div": lambda left, right, mode: left / right,
    "rcp": lambda value, mode: 1.0 / value,
    "sqrt": lambda value, mode: np.sqrt(value),
}


def _by_rounding(name: str, shape: Format, mode: str, *, ftz: bool = False) -> Run:
    """Return an operation that computes in float64 and rounds once: any format, mode and ftz."""
    exact = EXACT[name]

    def run(*sources: Bits) -> Bits:
        if ftz:
            sources = tuple(flush(source, shape) for source in sources)
        operands = (widen(source, shape) for source in sources)
        return narrow(exact(*operands, mode), shape, mode, ftz=ftz)

    return run


def _repaired(result: Bits, doubtful: Bits, exact: Run, sources: tuple[Bits, ...]) -> Bits:
    """Recompute doubtful elements the slow way."""
    if doubtful.any():
        result[doubtful] = exact(*(source[doubtful] for source in np.broadcast_arrays(*sources)))
    return result


def _fma_single(*sources: Bits) -> Bits:
    """Fuse multiply and add in f32, with the detour over round to odd only where it can matter.

    The product is exact in float64 and the sum is rounded twice, to 53 and to 24 bits. This goes
    wrong only if the first rounding lands halfway between two numbers of f32.
    """
    left, right, base = (source.view(np.float32) for source in sources)
    total = np.multiply(left, right, dtype=np.float64) + base
    result = total.astype(np.float32)
    doubtful = total.view(np.uint64) & 0x1FFFFFFF == 0x10000000
    if np.abs(result).min() <= _LEAST:
        # Where the result is subnormal, halfway points have other bits.
        doubtful |= (np.abs(total) < _LEAST) & (total != 0)
    return _repaired(write(result, F32), doubtful, _FMA_SINGLE, sources)


_LEAST = np.finfo(np.float32).smallest_normal
_FMA_SINGLE = _by_rounding("fma", F32, "rn")


def _brain(name: str, function: Callable[..., Numbers], below: int) -> Run:
    """Return an operation in bf16 that computes in f32 first.

    Both have the same exponents. Rounding twice goes wrong only if the first lands halfway.

    Args:
        name: The operation.
        function: What computes it, from and to float32.
        below: The magnitude of f32, as bits, from which on the first rounding cannot matter.
    """
    exact = _by_rounding(name, BF16, "rn")

    def run(*sources: Bits) -> Bits:
        bits = function(*(read(source, BF16) for source in sources)).view(np.uint32)
        result, magnitudes = nearest_brain(bits), bits & F32.magnitude
        if magnitudes.min() >= below:
            return result
        doubtful = (magnitudes < below) & (bits & 0xFFFF == 0x8000)
        return _repaired(result, doubtful, exact, sources)

    return run


def _fma_brain(left: Numbers, right: Numbers, base: Numbers) -> Numbers:
    return (np.multiply(left, right, dtype=np.float64) + base).astype(np.float32)


def _by_numpy(function: Callable[..., Numbers], shape: Format) -> Run:
    """Return an operation that NumPy rounds correctly in the format's own dtype."""
    return lambda *sources: write(
        function(*(source.view(shape.numbers) for source in sources)), shape
    )


def _fma_half(left: Numbers, right: Numbers, base: Numbers) -> Numbers:
    """Fuse multiply and add in f16: the product fits f32, and float64 keeps clear of midpoints."""
    product = np.multiply(left, right, dtype=np.float32)
    return np.add(product, base, dtype=np.float64).astype(np.float16)


_ONE = np.float32(1)
# The fast ways to round to nearest, where there is one.
_NEAREST: dict[tuple[str, str], Run] = {
    ("add", "f16"): _by_numpy(np.add, F16),
    ("sub", "f16"): _by_numpy(np.subtract, F16),
    ("mul", "f16"): _by_numpy(np.multiply, F16),
    ("fma", "f16"): _by_numpy(_fma_half, F16),
    # Sums of two are exact or far from halfway, and products are exact unless they underflow.
    ("add", "bf16"): _brain("add", np.add, below=0),
    ("sub", "bf16"): _brain("sub", np.subtract, below=0),
    ("mul", "bf16"): _brain("mul", np.multiply, below=F32.smallest),
    ("fma", "bf16"): _brain("fma", _fma_brain, below=F32.infinity),
    ("add", "f32"): _by_numpy(np.add, F32),
    ("sub", "f32"): _by_numpy(np.subtract, F32),
    ("mul", "f32"): _by_numpy(np.multiply, F32),
    ("fma", "f32"): _fma_single,
    ("mad", "f32"): _fma_single,
    ("div", "f32"): _by_numpy(np.divide, F32),
    ("rcp", "f32"): _by_numpy(lambda value: _ONE / value, F32),
    ("sqrt", "f32"): _by_numpy(np.sqrt, F32),
}


def _flushing(fast: Run, slow: Run, shape: Format) -> Run:
    """Return a fast operation with ftz, which asks the slow one only at the edge of underflow."""

    def run(*sources: Bits) -> Bits:
        sources = tuple(flush(source, shape) for source in sources)
        bits = fast(*sources)
        magnitudes = bits & shape.magnitude
        if magnitudes.min() > shape.smallest:
            return bits
        if (magnitudes == shape.smallest).any():
            return slow(*sources)
        return np.where(magnitudes < shape.smallest, bits & shape.sign, bits)

    return run


def _rounded(name: str, shape: Format, mode: str, *, ftz: bool) -> Run:
    """Return the quickest way to an operation's rounded result."""
    if shape is F64:
        return double("fma" if name == "mad" else name, mode)
    slow = _by_rounding(name, shape, mode, ftz=ftz)
    fast = _NEAREST.get((name, shape.name))
    if fast is None or mode != "rn":
        return slow
    return _flushing(fast, slow, shape) if ftz else fast


_ARITY = {"rcp": 1, "sqrt": 1, "fma": 3, "mad": 3}


def _arithmetic(op: Opcode) -> Arithmetic:
    """Build an operation that the ISA rounds as IEEE 754 does."""
    shape = FORMATS[op.kind.lane.name]
    # Double precision keeps its subnormal numbers whatever the opcode says.
    rounded = _rounded(op.name, shape, op.rounding, ftz="ftz" in op and shape is not F64)
    finish = after(op, shape)
    run = rounded if finish is None else lambda *sources: finish(rounded(*sources))
    return uniform(op, _ARITY.get(op.name, 2), run)


def _sign(op: Opcode) -> Arithmetic:
    """Build neg and abs."""
    shape = FORMATS[op.kind.lane.name]
    sign, magnitude, ftz = (shape.sign, shape.magnitude, "ftz" in op)

    def run(value: Bits) -> Bits:
        result = value ^ sign if op.name == "neg" else value & magnitude
        if shape is not F64:
            nan = result & magnitude > shape.infinity
            result = np.where(nan, shape.bits.type(shape.nan), result) if nan.any() else result
        return flush(result, shape) if ftz else result

    return uniform(op, 1, run)


def _copysign(op: Opcode) -> Arithmetic:
    shape = FORMATS[op.kind.name]
    return uniform(op, 2, lambda sign, value: sign & shape.sign | value & shape.magnitude)


def _zero_signs(name: str, left: Bits, right: Bits, shape: Format, result: Bits) -> Bits:
    """Order the zeros: -0 counts as less than +0."""
    zeros = (left | right) & shape.magnitude == 0
    if not zeros.any():
        return result
    return np.where(zeros, left | right if name == "min" else left & right, result)


def _number(chosen: Numbers, left: Numbers, right: Numbers) -> Numbers:
    """Undo that the C library lets a signaling NaN win over a number."""
    if not np.isnan(chosen).any():
        return chosen
    return np.where(np.isnan(left), right, np.where(np.isnan(right), left, chosen))


_CHOICES: dict[str, tuple[np.ufunc, np.ufunc]] = {
    "min": (np.fmin, np.minimum),
    "max": (np.fmax, np.maximum),
}


def _choice(name: str, shape: Format, *, nan: bool) -> Run:
    """Return min or max of two values; a NaN loses to a number unless `nan` says that it wins."""
    choose = _CHOICES[name][nan]

    def run(left: Bits, right: Bits) -> Bits:
        numbers = read(left, shape), read(right, shape)
        chosen = choose(*numbers) if nan else _number(choose(*numbers), *numbers)
        if shape is F64:
            # Of two NaNs, the second.
            result = propagate(chosen, *reversed(numbers))
        else:
            result = write(chosen, shape)
        return _zero_signs(name, left, right, shape, result)

    return run


def _min_max(op: Opcode) -> Arithmetic:
    shape = FORMATS[op.kind.lane.name]
    choose = _choice(op.name, shape, nan="NaN" in op)
    ftz, xorsign = "ftz" in op, "xorsign" in op

    def run(left: Bits, right: Bits) -> Bits:
        if ftz:
            left, right = flush(left, shape), flush(right, shape)
        if not xorsign:
            return choose(left, right)
        result = choose(left & shape.magnitude, right & shape.magnitude)
        sign = (left ^ right) & shape.sign
        return np.where(result > shape.infinity, result, result | sign)

    return uniform(op, 2, run)


_TESTS: dict[str, Callable[[Bits, Format], Bits]] = {
    "finite": lambda size, shape: size < shape.infinity,
    "infinite": lambda size, shape: size == shape.infinity,
    "number": lambda size, shape: size <= shape.infinity,
    "notanumber": lambda size, shape: size > shape.infinity,
    "normal": lambda size, shape: (size == 0) | (size >= shape.smallest) & (size < shape.infinity),
    "subnormal": lambda size, shape: (size != 0) & (size < shape.smallest),
}


def _testp(op: Opcode) -> Arithmetic:
    shape, test = FORMATS[op.kind.name], _TESTS[op.modifiers[0]]
    return Arithmetic(
        results=(1,),
        sources=(shape.width,),
        signed=False,
        run=lambda value: test(value & shape.magnitude, shape),
    )


_ANY = "rn|rz|rm|rp"
FAMILIES: dict[str, Builder] = {
    f"add|sub|mul.{{{_ANY}}}.{{ftz}}.{{sat}}.f32": _arithmetic,
    f"fma|mad.{_ANY}.{{ftz}}.{{sat}}.f32": _arithmetic,
    f"div|rcp|sqrt.{_ANY}.{{ftz}}.f32": _arithmetic,
    f"add|sub|mul.{{{_ANY}}}.f64": _arithmetic,
    f"fma|mad|div|sqrt.{_ANY}.f64": _arithmetic,
    f"rcp.{_ANY}.{{ftz}}.f64": _arithmetic,
    "add|sub|mul.{rn}.{ftz}.{sat}.f16|f16x2": _arithmetic,
    "fma.rn.{ftz}.{sat|relu}.f16|f16x2": _arithmetic,
    "add|sub|mul.{rn}.bf16|bf16x2": _arithmetic,
    "fma.rn.{relu}.bf16|bf16x2": _arithmetic,
    "neg|abs.{ftz}.f16|f16x2|f32": _sign,
    "neg|abs.bf16|bf16x2|f64": _sign,
    "copysign.f32|f64": _copysign,
    "min|max.{ftz}.{NaN}.f16|f16x2|f32": _min_max,
    "min|max.{ftz}.{NaN}.xorsign.abs.f16|f16x2|f32": _min_max,
    "min|max.{NaN}.bf16|bf16x2": _min_max,
    "min|max.{NaN}.xorsign.abs.bf16|bf16x2": _min_max,
    "min|max.f64": _min_max,
    "testp.finite|infinite|number|notanumber|normal|subnormal.f32|f64": _testp,
}
