"""Sums, products, quotients, roots, minima and dot products."""

from __future__ import annotations

from fractions import Fraction

from ptxsim_oracle.form import Form, Oracle, signed
from ptxsim_oracle.number import FORMATS, NAN, WIDTH, Number, decode, encode, infinity, order


def finish(form: Form, bits: int, name: str) -> int:
    """Apply sat, relu and satfinite to a rounded result."""
    sign = 1 << WIDTH[name] - 1
    number = decode(bits, name)
    if form.has("satfinite") and number.infinite:
        bits, number = bits - 1, decode(bits - 1, name)
    if form.has("sat"):
        if number.nan or number.negative:
            return 0
        one = infinity(name, False) >> 1 & -(1 << FORMATS[name][1])
        return min(bits, one)
    if form.has("relu") and not number.nan and bits & sign:
        return 0
    return bits


def _nan(name: str, *operands: int) -> int:
    """Return the NaN of a result: that of an operand for f64."""
    if name == "f64":
        for bits in operands:
            if decode(bits, name).nan:
                return bits | 1 << 51
    return NAN[name]


def _arithmetic(form: Form, *sources: int) -> int:
    name, mode, ftz = form.type, form.mode, form.has("ftz") and form.type != "f64"
    numbers = [decode(bits, name, ftz=ftz) for bits in sources]
    special = _special(form.name, numbers)
    if special == "nan" or any(number.nan for number in numbers):
        return finish(form, _nan(name, *sources), name)
    if special is not None:
        return finish(form, infinity(name, special == "-inf"), name)
    value, negative_zero = _exact(form.name, numbers, mode)
    if form.name == "sqrt" and value:
        bits = _root(value, name, mode, ftz)
    else:
        bits = encode(value, name, mode, negative_zero=negative_zero, ftz=ftz)
    return finish(form, bits, name)


def _special(operation: str, numbers: list[Number]) -> str | None:
    """Return "nan", "inf" or "-inf" where the result is no finite number."""
    if any(number.nan for number in numbers):
        return "nan"
    if operation in ("add", "sub"):
        left, right = numbers
        terms = [
            (left.infinite, left.negative),
            (right.infinite, right.negative != (operation == "sub")),
        ]
    elif operation in ("mul", "fma", "mad"):
        left, right = numbers[:2]
        if (left.infinite and right.zero) or (right.infinite and left.zero):
            return "nan"
        terms = [(left.infinite or right.infinite, left.negative != right.negative)]
        terms += [(base.infinite, base.negative) for base in numbers[2:]]
    elif operation == "sqrt":
        if numbers[0].negative and not numbers[0].zero:
            return "nan"
        terms = [(numbers[0].infinite, False)]
    else:
        left = Number(False, Fraction(1)) if operation == "rcp" else numbers[0]
        right = numbers[-1]
        if (left.infinite and right.infinite) or (left.zero and right.zero):
            return "nan"
        terms = [(left.infinite or right.zero, left.negative != right.negative)]
    signs = {negative for infinite, negative in terms if infinite}
    if len(signs) == 2:
        return "nan"
    return None if not signs else "-inf" if signs.pop() else "inf"


def _exact(operation: str, numbers: list[Number], mode: str) -> tuple[Fraction, bool]:
    """Return the exact value and the sign of a zero."""
    if operation in ("rcp", "div"):
        left = Number(False, Fraction(1)) if operation == "rcp" else numbers[0]
        right = numbers[-1]
        value = Fraction(0) if right.infinite else left.value / right.value
        return value, left.negative != right.negative
    if operation == "sqrt":
        return numbers[0].value, numbers[0].negative
    if operation == "mul":
        left, right = numbers
        return left.value * right.value, left.negative != right.negative
    left, right = numbers[0], numbers[-1]
    first, first_negative = left.value, left.negative
    if operation in ("fma", "mad"):
        first, first_negative = left.value * numbers[1].value, left.negative != numbers[1].negative
    second_negative = right.negative != (operation == "sub")
    second = -right.size if second_negative else right.size
    if first_negative == second_negative:
        return first + second, first_negative
    return first + second, mode == "rm"


def _root(value: Fraction, name: str, mode: str, ftz: bool) -> int:
    """Round a square root by bisection over the format's numbers."""
    low, high = 0, infinity(name, False)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if decode(middle, name).value ** 2 <= value else (low, middle)
    below = decode(low, name).value
    if below**2 == value or mode in ("rz", "rm"):
        return low
    above = decode(high, name).value
    if mode == "rp":
        return high
    return low if ((below + above) / 2) ** 2 > value else high


def _add(form: Form, *sources: int) -> int:
    if form.type in FORMATS:
        return _arithmetic(form, *sources)
    left, right = map(form.integer, sources)
    value = left + right if form.name == "add" else left - right
    return _clamp(form, value) if form.has("sat") else form.wrap(value)


def _clamp(form: Form, value: int) -> int:
    return form.wrap(max(-(2**31), min(2**31 - 1, value)))


def _product(form: Form, value: int) -> int:
    shift = form.width if form.has("hi") else 0
    width = 2 * form.width if form.has("wide") else form.width
    return form.wrap(value >> shift, width)


def _mul(form: Form, *sources: int) -> int:
    if form.type in FORMATS:
        return _arithmetic(form, *sources)
    left, right = map(form.integer, sources)
    return _product(form, left * right)


def _mad(form: Form, *sources: int) -> int:
    if form.type in FORMATS:
        return _arithmetic(form, *sources)
    product = _mul(form, *sources[:2])
    if form.has("sat"):
        return _clamp(form, signed(product, 32) + signed(sources[2], 32))
    return form.wrap(product + sources[2], 2 * form.width if form.has("wide") else None)


def _mul24(form: Form, *sources: int) -> int:
    left, right = (
        signed(side & 0xFFFFFF, 24) if form.type == "s32" else side & 0xFFFFFF
        for side in sources[:2]
    )
    product = left * right >> 16 if form.has("hi") else left * right
    if len(sources) == 2:
        return form.wrap(product)
    if form.has("sat"):
        return _clamp(form, signed(form.wrap(product), 32) + signed(sources[2], 32))
    return form.wrap(product + sources[2])


def _div(form: Form, *sources: int) -> int:
    if form.type in FORMATS:
        return _arithmetic(form, *sources)
    left, right = map(form.integer, sources)
    if right == 0:
        return form.wrap(-1) if form.name == "div" else sources[0]
    quotient = abs(left) // abs(right) * (1 if (left < 0) == (right < 0) else -1)
    return form.wrap(quotient if form.name == "div" else left - quotient * right)


def _sad(form: Form, *sources: int) -> int:
    left, right = map(form.integer, sources[:2])
    return form.wrap(abs(left - right) + sources[2])


def _sign_change(form: Form, bits: int) -> int:
    if form.type not in FORMATS:
        value = form.integer(bits)
        return form.wrap(-value if form.name == "neg" else abs(value))
    sign = 1 << form.width - 1
    number = decode(bits, form.type)
    if number.nan and form.type != "f64":
        return NAN[form.type]
    if form.has("ftz") and decode(bits, form.type, ftz=True).zero:
        bits &= sign
    return bits ^ sign if form.name == "neg" else bits & ~sign


def _min_max(form: Form, left: int, right: int) -> int:
    choose = min if form.name == "min" else max
    if form.type not in FORMATS:
        value = choose(form.integer(left), form.integer(right))
        return form.wrap(max(value, 0) if form.has("relu") else value)
    sign = 1 << form.width - 1
    flip = (left ^ right) & sign if form.has("xorsign") else 0
    if form.has("abs"):
        left, right = left & ~sign, right & ~sign
    pairs = []
    for bits in (left, right):
        number = decode(bits, form.type, ftz=form.has("ftz"))
        bits = bits & sign if number.zero else bits
        pairs.append(((order(number), not number.negative) if not number.nan else None, bits))
    nans = [pair for pair in pairs if pair[0] is None]
    if len(nans) == 2 or (nans and form.has("NaN")):
        return _nan(form.type, right, left)
    return choose(pair for pair in pairs if pair[0] is not None)[1] | flip


def _dot(form: Form, left: int, right: int, base: int) -> int:
    width = 8 if form.name == "dp4a" else 16
    first = 2 if form.has("hi") else 0
    for place in range(32 // width):
        a, b = left >> width * place & (1 << width) - 1, right >> 8 * (first + place) & 255
        a = signed(a, width) if form.types[0] == "s32" else a
        b = signed(b, 8) if form.types[1] == "s32" else b
        base += a * b
    return form.wrap(base)


ARITHMETIC: dict[str, Oracle] = {
    "add": _add,
    "sub": _add,
    "mul": _mul,
    "fma": _arithmetic,
    "mad": _mad,
    "mul24": _mul24,
    "mad24": _mul24,
    "div": _div,
    "rem": _div,
    "rcp": _arithmetic,
    "sqrt": _arithmetic,
    "sad": _sad,
    "neg": _sign_change,
    "abs": _sign_change,
    "min": _min_max,
    "max": _min_max,
    "dp4a": _dot,
    "dp2a": _dot,
    "copysign": lambda form, sign, bits: (
        sign & 1 << form.width - 1 | bits & (1 << form.width - 1) - 1
    ),
}
