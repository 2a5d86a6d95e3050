"""Conversions between all types."""

from __future__ import annotations

import math
from fractions import Fraction

from ptxsim_oracle.arithmetic import finish
from ptxsim_oracle.form import Form, Oracle
from ptxsim_oracle.number import (
    BYTES,
    FORMATS,
    NAN,
    PACKED,
    WIDTH,
    decode,
    encode,
    infinity,
    round_integer,
)


def _cvt(form: Form, *sources: int) -> int:
    target, source = form.types[0], form.types[-1]
    if source in BYTES:
        return sum(_from_byte(form, sources[0] >> 8 * i & 0xFF) << 16 * i for i in range(2))
    if target in BYTES:
        upper, lower = (_to_byte(form, each) for each in sources)
        return upper << 8 | lower
    if target in PACKED:
        upper, lower = (
            _float_to_float(form, each, target.removesuffix("x2"), source) for each in sources
        )
        return upper << 16 | lower
    bits = sources[0]
    if target == "tf32":
        return _tensor_float(form, bits)
    if target in FORMATS:
        if source in FORMATS:
            return _float_to_float(form, bits, target, source)
        bits = encode(Fraction(form.integer(bits)), target, form.mode, negative_zero=False)
        return finish(form, bits, target)
    least, most = _range(target)
    if source in FORMATS:
        number = decode(bits, source, ftz=form.has("ftz") and source == "f32")
        if number.nan:
            wide = source == "f64" or WIDTH[target] == 64
            return 1 << WIDTH[target] - 1 if wide else 0
        if number.infinite:
            value = least if number.negative else most
        else:
            value = round_integer(number.value, form.mode)
        return form.wrap(max(least, min(most, value)), WIDTH[target])
    value = form.integer(bits)
    if form.has("sat"):
        value = max(least, min(most, value))
    return form.wrap(value, WIDTH[target])


def size_of_byte(code: int, kind: str) -> Fraction | None:
    """What 7 bits of a type mean; None for an infinity or NaN."""
    exponent_bits, fraction_bits = BYTES[kind]
    exponent, fraction = divmod(code, 1 << fraction_bits)
    # e5m2 is as IEEE's types are; e4m3 has numbers in place of infinities, but for its last.
    if code == 0x7F or kind == "e5m2x2" and exponent == (1 << exponent_bits) - 1:
        return None
    least = 2 - (1 << exponent_bits - 1)
    if exponent:
        fraction, least = fraction + (1 << fraction_bits), least + exponent - 1
    return Fraction(fraction, 1 << fraction_bits) * Fraction(2) ** least


def _from_byte(form: Form, byte: int) -> int:
    kind, negative = form.types[-1], byte >> 7 == 1
    size = size_of_byte(byte & 0x7F, kind)
    if size is None:
        infinite = kind == "e5m2x2" and byte & 3 == 0
        bits = infinity("f16", negative) if infinite else NAN["f16"]
    else:
        bits = encode(-size if negative else size, "f16", "rn", negative_zero=negative)
    return finish(form, bits, "f16")


def _to_byte(form: Form, bits: int) -> int:
    kind, number = form.types[0], decode(bits, "f32")
    if number.nan:
        return 0x7F
    if number.negative and form.has("relu"):
        return 0
    codes = [code for code in range(0x7F) if size_of_byte(code, kind) is not None]
    if number.infinite:
        nearest = codes[-1]
    else:
        sizes = {code: size_of_byte(code, kind) for code in codes}
        nearest = min(codes, key=lambda code: (abs(sizes[code] - number.size), code % 2))
    return number.negative << 7 | nearest


def _range(name: str) -> tuple[int, int]:
    width = WIDTH[name]
    return (-(1 << width - 1), (1 << width - 1) - 1) if name[0] == "s" else (0, (1 << width) - 1)


def _converted_nan(form: Form, bits: int, target: str, source: str) -> int:
    if (
        (target, source) in (("f32", "f32"), ("f64", "f64"))
        and form.mode == "rn"
        and not form.words
    ):
        return bits
    if target == source == "f64":
        return bits if form.words == ("sat",) else bits | 1 << 51
    if (target, source) == ("f32", "bf16") and not form.has("ftz"):
        return bits << 16
    if target == "f64":
        single = bits if source == "f32" else NAN["f32"]
        return (single >> 31) << 63 | 0x7FF8 << 48 | (single & 0x7FFFFF) << 29
    return NAN[target]


def _float_to_float(form: Form, bits: int, target: str, source: str) -> int:
    number = decode(bits, source, ftz=form.has("ftz") and source == "f32")
    if number.nan:
        return finish(form, _converted_nan(form, bits, target, source), target)
    if number.infinite:
        return finish(form, infinity(target, number.negative), target)
    value, mode = number.value, form.mode
    if mode.endswith("i"):
        value, mode = Fraction(round_integer(value, mode)), "rn"
    ftz = form.has("ftz") and target == "f32"
    return finish(form, encode(value, target, mode, negative_zero=number.negative, ftz=ftz), target)


def _tensor_float(form: Form, bits: int) -> int:
    number = decode(bits, "f32")
    if number.nan:
        kept = form.mode == "rna" and not form.has("satfinite")
        return bits & 0xFFFFE000 if kept else 0x7FFFE000
    if not number.infinite:
        unit = 1 << 13
        size = Fraction(bits & 0x7FFFFFFF, unit)
        steps = (
            math.floor(size + Fraction(1, 2))
            if form.mode == "rna"
            else round_integer(size, form.mode)
        )
        bits = bits & 0x80000000 | steps * unit
    if form.has("satfinite") and bits & 0x7FFFFFFF == 0x7F800000:
        bits -= 1 << 13
    return 0 if form.has("relu") and bits >> 31 else bits


CONVERSIONS: dict[str, Oracle] = {
    "mov": lambda form, bits: bits,
    "cvt": _cvt,
}
