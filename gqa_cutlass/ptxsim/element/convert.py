"""Conversions (PTX ISA, "cvt")."""

# NumPy types the operators of an array of any dtype as Any.
# mypy: disable-error-code="no-any-return"
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from gqa_cutlass.ptxsim.element.bits import (
    Arithmetic,
    Bits,
    Builder,
    Kind,
    Numbers,
    Opcode,
    Run,
    join_lanes,
)
from gqa_cutlass.ptxsim.element.exact import odd_sum
from gqa_cutlass.ptxsim.element.formats import (
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
    rectify,
    step,
    widen,
    write,
)

_TO_INTEGRAL: dict[str, np.ufunc] = {
    "rni": np.rint,
    "rzi": np.trunc,
    "rmi": np.floor,
    "rpi": np.ceil,
}


def _conversion(op: Opcode, run: Run) -> Arithmetic:
    """Describe a conversion of one value, with what its modifiers do before and after."""
    target, source = op.kinds
    if "ftz" in op and source.name == "f32":
        run = _after_flush(run)
    finish = after(op, FORMATS[target.name]) if target.floating else None
    return Arithmetic(
        results=(target.width,),
        sources=(source.width,),
        signed=target.signed,
        run=run if finish is None else lambda value: finish(run(value)),
    )


def _after_flush(run: Run) -> Run:
    return lambda value: run(flush(value, F32))


def _integer_to_integer(op: Opcode) -> Arithmetic:
    target, source = op.kinds

    def run(value: Bits) -> Bits:
        return value.view(source.numbers).astype(target.numbers).view(target.bits)

    def saturated(value: Bits) -> Bits:
        inside = np.clip(value.view(source.numbers), *_common_range(target, source))
        return inside.astype(target.numbers).view(target.bits)

    return _conversion(op, saturated if "sat" in op else run)


def _common_range(target: Kind, source: Kind) -> tuple[int, int]:
    limits = np.iinfo(target.numbers), np.iinfo(source.numbers)
    return max(int(each.min) for each in limits), min(int(each.max) for each in limits)


_LOW_WORD = np.uint64(0xFFFFFFFF)


def _halves(value: Bits, kind: Kind) -> tuple[Numbers, Numbers]:
    """Split integers into two float64 terms that add up to them."""
    if kind.width < 64:
        numbers = value.view(kind.numbers).astype(np.float64)
        return numbers, np.zeros_like(numbers)
    high = (value.view(kind.numbers) >> kind.numbers.type(32)).astype(np.float64) * 2.0**32
    return high, (value & _LOW_WORD).astype(np.float64)


def _integer_to_double(value: Bits, kind: Kind, mode: str) -> Bits:
    """Round integers to f64, which holds all those of up to 53 bits."""
    high, low = _halves(value, kind)
    total = high + low
    bits = total.view(np.uint64)
    if mode == "rn":
        return bits
    # |high| >= |low| or high is zero, so this is exact (Dekker's Fast2Sum).
    error = low - (total - high)
    away = np.where(total < 0, -error, error)
    return step(bits, F64, mode, larger=away > 0, smaller=away < 0)


def _integer_to_float(op: Opcode) -> Arithmetic:
    target, source = op.kinds
    shape, mode = FORMATS[target.name], op.rounding

    def rounded(value: Bits) -> Bits:
        return narrow(odd_sum(*_halves(value, source)), shape, mode)

    def double(value: Bits) -> Bits:
        return _integer_to_double(value, source, mode)

    def single(value: Bits) -> Bits:
        return value.view(source.numbers).astype(np.float32).view(np.uint32)

    if shape is F64:
        return _conversion(op, double)
    return _conversion(op, single if shape is F32 and mode == "rn" else rounded)


def _float_to_integer(op: Opcode) -> Arithmetic:
    target, source = op.kinds
    shape, to_integral = FORMATS[source.name], _TO_INTEGRAL[op.rounding]
    limits = np.iinfo(target.numbers)
    # The limits as the nearest doubles inside the range, of which s64 and u64 miss the upper ones.
    least, most = float(limits.min), float(limits.max)
    beyond = most if int(most) > limits.max else np.inf
    # The ISA's rule: the top bit alone where f64 or 64-bit integers are involved, or else zero.
    wide = source.name == "f64" or target.width == 64
    invalid = target.bits.type(1 << (target.width - 1) if wide else 0)

    def run(value: Bits) -> Bits:
        numbers = to_integral(widen(value, shape))
        inside = np.clip(numbers, least, most if beyond == np.inf else np.nextafter(most, 0))
        result = _as_integer(inside, target)
        if beyond != np.inf:
            result = np.where(numbers >= beyond, target.bits.type(limits.max), result)
        nan = np.isnan(numbers)
        return np.where(nan, invalid, result) if nan.any() else result

    return _conversion(op, run)


def _as_integer(numbers: Numbers, kind: Kind) -> Bits:
    """Convert integral float64 inside the range of an integer; NaN gives anything."""
    wide = kind.numbers if kind.width == 64 else np.dtype(np.int64)
    return numbers.astype(wide).astype(kind.numbers).view(kind.bits)


def _to_integral(op: Opcode) -> Arithmetic:
    """Build the rounding to an integral number of the same type."""
    shape, to_integral = FORMATS[op.kind.name], _TO_INTEGRAL[op.rounding]

    def run(value: Bits) -> Bits:
        numbers = read(value, shape)
        if shape is F64:
            return propagate(to_integral(numbers), numbers)
        return write(to_integral(numbers), shape)

    return _conversion(op, run)


def _same_float(op: Opcode) -> Arithmetic:
    """Build a conversion of a type to itself, which only its modifiers or a NaN make a change."""
    shape = FORMATS[op.kind.name]
    # The half types pass through an addition, and so does f32 with a modifier.
    plain = shape is F64 or (shape is F32 and not op.modifiers)
    return _conversion(op, (lambda value: value) if plain else lambda value: _quiet(value, shape))


def _quiet(value: Bits, shape: Format) -> Bits:
    """Replace NaNs by the format's own."""
    nan = value & shape.magnitude > shape.infinity
    return np.where(nan, shape.bits.type(shape.nan), value) if nan.any() else value


def _to_double(value: Bits, shape: Format) -> Bits:
    """Widen to f64: f32 keeps the payload of a NaN, which f16 and bf16 lose on the way to f32."""
    if shape is F32:
        return value.view(np.float32).astype(np.float64).view(np.uint64)
    return (
        write(read(value, shape).astype(np.float32), F32)
        .view(np.float32)
        .astype(np.float64)
        .view(np.uint64)
    )


def _brain_to_single(value: Bits) -> Bits:
    """Shift: the one conversion of floating-point numbers that keeps every bit."""
    return np.left_shift(value, 16, dtype=np.uint32)


def _widening(op: Opcode) -> Arithmetic:
    """Build an exact conversion to a wider format; a rounding modifier says nothing then."""
    target, source = (FORMATS[kind.name] for kind in op.kinds)
    if target is F64:
        return _conversion(op, lambda value: _to_double(value, source))
    if source is F16:
        return _flushed_result(op, lambda value: write(read(value, F16).astype(np.float32), F32))
    if "ftz" not in op:
        return _conversion(op, _brain_to_single)
    return _flushed_result(op, lambda value: _quiet(_brain_to_single(value), F32))


def _flushed_result(op: Opcode, run: Run) -> Arithmetic:
    if "ftz" not in op:
        return _conversion(op, run)
    return _conversion(op, lambda value: flush(run(value), F32))


_FAST: dict[tuple[str, str], Run] = {
    ("f16", "f32"): lambda value: write(value.view(np.float32).astype(np.float16), F16),
    ("bf16", "f32"): nearest_brain,
    ("f32", "f64"): lambda value: write(value.view(np.float64).astype(np.float32), F32),
}


def _narrowing(op: Opcode) -> Arithmetic:
    """Build a conversion that rounds."""
    target, source = op.kinds
    mode = op.rounding
    # An f32 source is flushed beforehand.
    ftz = "ftz" in op and target.name == "f32"
    run = _rounded(FORMATS[target.name], FORMATS[source.name], mode, ftz=ftz)
    return _conversion(op, run)


def _rounded(target: Format, source: Format, mode: str, *, ftz: bool = False) -> Run:
    fast = _FAST.get((target.name, source.name))
    if fast is not None and mode == "rn" and not ftz:
        return fast
    return lambda value: narrow(widen(value, source), target, mode, ftz=ftz)


def _packed(op: Opcode) -> Arithmetic:
    """Build the conversion of two f32, the first of which goes to the upper half."""
    shape = FORMATS[op.kinds[0].lane.name]
    rounded, finish = _rounded(shape, F32, op.rounding), after(op, shape)

    def run(upper: Bits, lower: Bits) -> Bits:
        halves = np.empty((max(len(upper), len(lower)), 2), np.uint16)
        halves[:, 0], halves[:, 1] = rounded(lower), rounded(upper)
        return join_lanes(halves if finish is None else finish(halves))

    return Arithmetic(results=(32,), sources=(32, 32), signed=False, run=run)


# tf32 keeps 10 bits of the fraction of f32; the others are zero.
_TF32_DROPPED = 13
_TF32_MASK = np.uint32(0xFFFFFFFF << _TF32_DROPPED & 0xFFFFFFFF)
_TF32_HALF = 1 << (_TF32_DROPPED - 1)
_TF32_EXTRA: dict[str, Callable[[Bits], Any]] = {
    "rn": lambda bits: _TF32_HALF - 1 + (bits >> _TF32_DROPPED & 1),
    "rna": lambda bits: _TF32_HALF,
    "rz": lambda bits: 0,
}


def _tensor_float(op: Opcode) -> Arithmetic:
    """Build the conversion to tf32, in an f32's place."""
    extra = _TF32_EXTRA[op.rounding]

    def run(value: Bits) -> Bits:
        finite = value & F32.magnitude < F32.infinity
        result = np.where(finite, value + extra(value), value) & _TF32_MASK
        # Rounding to nearest away is done by adding, which leaves a NaN its payload.
        if op.rounding != "rna" or "satfinite" in op:
            result = (
                _quiet(result | (~finite & (value << 1 != F32.infinity << 1)), F32) & _TF32_MASK
            )
        if "satfinite" in op:
            result = (
                np.where(result & F32.magnitude == F32.infinity, result - 1, result) & _TF32_MASK
            )
        return rectify(result, F32) if "relu" in op else result

    return Arithmetic(results=(32,), sources=(32,), signed=False, run=run)


_INTEGERS = ("u8", "u16", "u32", "u64", "s8", "s16", "s32", "s64")
_WORDS = "u16|u32|u64|s16|s32|s64"
_ALL = "|".join(_INTEGERS)
_ROUND = "rn|rz|rm|rp"
_INTEGRAL = "rni|rzi|rmi|rpi"


def _saturating_pairs() -> dict[str, Builder]:
    """Return the integer conversions with sat: those whose target cannot hold every source."""
    pairs: dict[str, Builder] = {}
    for target in _INTEGERS:
        sources = [source for source in _INTEGERS if not _holds(target, source)]
        pairs[f"cvt.sat.{target}.{'|'.join(sources)}"] = _integer_to_integer
    return {syntax: build for syntax, build in pairs.items() if not syntax.endswith(".")}


def _holds(target: str, source: str) -> bool:
    """Tell whether every value of one integer type is one of another."""
    bits, needed = int(target[1:]), int(source[1:])
    if target[0] == source[0]:
        return bits >= needed
    return target[0] == "s" and bits > needed


FAMILIES: dict[str, Builder] = {
    f"cvt.{_ALL}.{_ALL}": _integer_to_integer,
    **_saturating_pairs(),
    f"cvt.{_ROUND}.{{sat}}.f16|f64.{_ALL}": _integer_to_float,
    f"cvt.{_ROUND}.{{ftz}}.{{sat}}.f32.{_ALL}": _integer_to_float,
    f"cvt.{_ROUND}.bf16.{_WORDS}": _integer_to_float,
    f"cvt.{_INTEGRAL}.{{sat}}.{_ALL}.f16|f64": _float_to_integer,
    f"cvt.{_INTEGRAL}.{{ftz}}.{{sat}}.{_ALL}.f32": _float_to_integer,
    f"cvt.{_INTEGRAL}.{_WORDS}.bf16": _float_to_integer,
    f"cvt.{_INTEGRAL}.{{sat}}.f16.f16": _to_integral,
    f"cvt.{_INTEGRAL}.{{sat}}.f64.f64": _to_integral,
    f"cvt.{_INTEGRAL}.{{ftz}}.{{sat}}.f32.f32": _to_integral,
    f"cvt.{_INTEGRAL}.bf16.bf16": _to_integral,
    "cvt.{sat}.f16.f16": _same_float,
    "cvt.{sat}.f64.f64": _same_float,
    "cvt.{ftz}.{sat}.f32.f32": _same_float,
    "cvt.bf16.bf16": _same_float,
    "cvt.{ftz}.{sat}.f32.f16": _widening,
    "cvt.{ftz}.{sat}.f64.f32": _widening,
    "cvt.{sat}.f64.f16": _widening,
    f"cvt.{{{_ROUND}}}.{{ftz}}.f32.bf16": _widening,
    f"cvt.{{{_ROUND}}}.f64.bf16": _widening,
    f"cvt.{_ROUND}.{{ftz}}.{{sat}}.f32.f64": _narrowing,
    f"cvt.{_ROUND}.{{ftz}}.{{sat}}.f16.f32": _narrowing,
    f"cvt.{_ROUND}.{{sat}}.f16.f64": _narrowing,
    f"cvt.{{{_ROUND}}}.f16.bf16": _narrowing,
    f"cvt.{_ROUND}.{{ftz}}.bf16.f32": _narrowing,
    f"cvt.{{{_ROUND}}}.bf16.f16": _narrowing,
    f"cvt.{_ROUND}.bf16.f64": _narrowing,
    "cvt.rn|rz.{relu}.{satfinite}.f16|bf16.f32": _narrowing,
    "cvt.rn|rz.satfinite.relu.f16|bf16.f32": _narrowing,
    "cvt.rn|rz.{relu}.{satfinite}.f16x2|bf16x2.f32": _packed,
    "cvt.rn|rz.satfinite.relu.f16x2|bf16x2.f32": _packed,
    "cvt.rn|rz.{relu}.tf32.f32": _tensor_float,
    "cvt.rna.{satfinite}.tf32.f32": _tensor_float,
}
