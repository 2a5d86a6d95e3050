"""What the PTX ISA says that element-wise instructions compute, in Python integers and rationals.

Slow and one element at a time, and independent of the code under test: numbers are exact until
they are encoded once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

# Exponent and fraction bits.
FORMATS = {"f16": (5, 10), "bf16": (8, 7), "f32": (8, 23), "f64": (11, 52)}
NAN = {"f16": 0x7FFF, "bf16": 0x7FFF, "f32": 0x7FFFFFFF, "f64": 0xFFF8 << 48}
WIDTH = {"pred": 1, "tf32": 32} | {name: 1 + sum(shape) for name, shape in FORMATS.items()}
WIDTH |= {f"{sort}{width}": width for sort in "bus" for width in (8, 16, 32, 64)}
PACKED = ("u16x2", "s16x2", "f16x2", "bf16x2")
ROUNDINGS = ("rn", "rz", "rm", "rp", "rna", "rni", "rzi", "rmi", "rpi")


@dataclass(frozen=True)
class Number:
    """A decoded floating-point number."""

    negative: bool
    size: Fraction = Fraction(0)
    infinite: bool = False
    nan: bool = False

    @property
    def value(self) -> Fraction:
        return -self.size if self.negative else self.size

    @property
    def finite(self) -> bool:
        return not (self.infinite or self.nan)

    @property
    def zero(self) -> bool:
        return self.finite and not self.size


def decode(bits: int, name: str, *, ftz: bool = False) -> Number:
    exponent_bits, fraction_bits = FORMATS[name]
    fraction = bits & (1 << fraction_bits) - 1
    exponent = bits >> fraction_bits & (1 << exponent_bits) - 1
    negative = bool(bits >> exponent_bits + fraction_bits)
    least = 2 - (1 << exponent_bits - 1)
    if exponent == (1 << exponent_bits) - 1:
        return Number(negative, infinite=not fraction, nan=bool(fraction))
    if exponent == 0:
        size = Fraction(0) if ftz else Fraction(fraction) * Fraction(2) ** (least - fraction_bits)
        return Number(negative, size)
    significand = Fraction(fraction + (1 << fraction_bits))
    return Number(negative, significand * Fraction(2) ** (least + exponent - 1 - fraction_bits))


def _exponent(size: Fraction) -> int:
    """Return the exponent of the leading bit."""
    guess = size.numerator.bit_length() - size.denominator.bit_length()
    return guess if size >= Fraction(2) ** guess else guess - 1


def round_integer(value: Fraction, mode: str) -> int:
    return {
        "n": lambda: round(value),
        "z": lambda: math.trunc(value),
        "m": lambda: math.floor(value),
        "p": lambda: math.ceil(value),
    }[mode[1]]()


def encode(value: Fraction, name: str, mode: str, *, negative_zero: bool, ftz: bool = False) -> int:
    """Round an exact value once; `negative_zero` is the sign of an exact zero."""
    exponent_bits, fraction_bits = FORMATS[name]
    sign = 1 << exponent_bits + fraction_bits
    if not value:
        return sign if negative_zero else 0
    negative, size = value < 0, abs(value)
    # Rounding a magnitude: down and up swap for negative numbers.
    mode = {"rm": "rp", "rp": "rm"}.get(mode, mode) if negative else mode
    least = 2 - (1 << exponent_bits - 1)
    exponent = _exponent(size)
    if ftz:
        unit = Fraction(2) ** (exponent - fraction_bits)
        if round_integer(size / unit, mode) * unit < Fraction(2) ** least:
            return sign if negative else 0
    exponent = max(exponent, least)
    steps = round_integer(size / Fraction(2) ** (exponent - fraction_bits), mode)
    bits = ((exponent - least) << fraction_bits) + steps
    infinity = ((1 << exponent_bits) - 1) << fraction_bits
    if exponent > -least + 1:
        bits = infinity if mode in ("rn", "rp") else infinity - 1
    return (sign if negative else 0) | min(bits, infinity)


def infinity(name: str, negative: bool) -> int:
    exponent_bits, fraction_bits = FORMATS[name]
    return (((1 << exponent_bits) - 1) << fraction_bits) | negative << exponent_bits + fraction_bits


def signed(bits: int, width: int) -> int:
    return bits - (1 << width) if bits >> width - 1 else bits


@dataclass(frozen=True)
class Form:
    """An opcode, taken apart independently of the code under test."""

    name: str
    words: tuple[str, ...]
    types: tuple[str, ...]

    @classmethod
    def of(cls, opcode: tuple[str, ...]) -> Form:
        types = tuple(part for part in opcode[1:] if part in WIDTH or part in PACKED)
        words = tuple(part for part in opcode[1:] if part not in types)
        return cls(opcode[0], words, types)

    def has(self, word: str) -> bool:
        return word in self.words

    @property
    def type(self) -> str:
        return self.types[-1].removesuffix("x2")

    @property
    def width(self) -> int:
        return WIDTH[self.type]

    @property
    def lanes(self) -> int:
        """Return what repeats a value of the type in every lane, as a factor."""
        return 0x10001 if self.types[-1] in PACKED else 1

    @property
    def mode(self) -> str:
        return next((word for word in self.words if word in ROUNDINGS), "rn")

    def integer(self, bits: int) -> int:
        return signed(bits, self.width) if self.type[0] == "s" else bits

    def wrap(self, value: int, width: int | None = None) -> int:
        return value & (1 << (width or self.width)) - 1


Oracle = Callable[..., int | tuple[int, int]]


def run(opcode: tuple[str, ...], *sources: int) -> tuple[int, ...]:
    """Return the results of one thread."""
    form = Form.of(opcode)
    oracle = ORACLES[form.name]
    two_results = form.name == "setp" or (form.name == "lop3" and form.words)
    if form.types[-1] in PACKED and form.name not in ("cvt", "setp", "set"):
        low, high = (
            oracle(form, *(each >> 16 * half & 0xFFFF for each in sources)) for half in (0, 1)
        )
        return (low | high << 16,)
    result = oracle(form, *sources)
    return result if two_results else (result,)


def _finish(form: Form, bits: int, name: str) -> int:
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
        return _finish(form, _nan(name, *sources), name)
    if special is not None:
        return _finish(form, infinity(name, special == "-inf"), name)
    value, negative_zero = _exact(form.name, numbers, mode)
    if form.name == "sqrt" and value:
        bits = _root(value, name, mode, ftz)
    else:
        bits = encode(value, name, mode, negative_zero=negative_zero, ftz=ftz)
    return _finish(form, bits, name)


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
        pairs.append(((_order(number), not number.negative) if not number.nan else None, bits))
    nans = [pair for pair in pairs if pair[0] is None]
    if len(nans) == 2 or (nans and form.has("NaN")):
        return _nan(form.type, right, left)
    return choose(pair for pair in pairs if pair[0] is not None)[1] | flip


def _bit_count(form: Form, bits: int) -> int:
    return bits.bit_count() if form.name == "popc" else form.width - bits.bit_length()


def _bfind(form: Form, bits: int) -> int:
    if form.type[0] == "s" and bits >> form.width - 1:
        bits = form.wrap(~bits)
    if not bits:
        return 0xFFFFFFFF
    place = bits.bit_length() - 1
    return form.width - 1 - place if form.has("shiftamt") else place


def _brev(form: Form, bits: int) -> int:
    return int(f"{bits:0{form.width}b}"[::-1], 2)


def _bfe(form: Form, bits: int, start: int, length: int) -> int:
    top, start, length = form.width - 1, start & 255, length & 255
    fill = 0
    if form.type[0] == "s" and length:
        fill = bits >> min(start + length - 1, top) & 1
    result = 0
    for place in range(form.width):
        inside = place < length and start + place <= top
        result |= (bits >> start + place & 1 if inside else fill) << place
    return result


def _bfi(form: Form, field: int, base: int, start: int, length: int) -> int:
    for place in range(min(length & 255, max(0, form.width - (start & 255)))):
        where = (start & 255) + place
        base = base & ~(1 << where) | (field >> place & 1) << where
    return base


def _bmsk(form: Form, start: int, length: int) -> int:
    if form.has("clamp"):
        places = range(min(start, 32), min(start + length, 32))
    else:
        places = range(start & 31, min((start & 31) + (length & 31), 32))
    return sum(1 << place for place in places)


def _szext(form: Form, bits: int, size: int) -> int:
    size = min(size, 32) if form.has("clamp") else size & 31
    if not size:
        return 0
    field = bits & (1 << size) - 1
    return form.wrap(signed(field, size) if form.type == "s32" else field)


def _dot(form: Form, left: int, right: int, base: int) -> int:
    width = 8 if form.name == "dp4a" else 16
    first = 2 if form.has("hi") else 0
    for place in range(32 // width):
        a, b = left >> width * place & (1 << width) - 1, right >> 8 * (first + place) & 255
        a = signed(a, width) if form.types[0] == "s32" else a
        b = signed(b, 8) if form.types[1] == "s32" else b
        base += a * b
    return form.wrap(base)


def _lop3(form: Form, a: int, b: int, c: int, table: int, *predicate: int) -> int | tuple[int, int]:
    result = 0
    for place in range(32):
        index = (a >> place & 1) << 2 | (b >> place & 1) << 1 | c >> place & 1
        result |= (table >> index & 1) << place
    if not predicate:
        return result
    holds = result != 0
    return result, (holds and predicate[0]) if form.has("and") else (holds or predicate[0])


def _shift(form: Form, bits: int, count: int) -> int:
    return (
        form.wrap(bits << min(count, 64))
        if form.name == "shl"
        else form.wrap(form.integer(bits) >> count)
    )


def _shf(form: Form, low: int, high: int, count: int) -> int:
    amount = count & 31 if form.has("wrap") else min(count, 32)
    both = high << 32 | low
    return form.wrap(both << amount >> 32) if form.has("l") else form.wrap(both >> amount)


PRMT = {
    "f4e": lambda c: [c, c + 1, c + 2, c + 3],
    "b4e": lambda c: [c, (c - 1) % 8, (c - 2) % 8, (c - 3) % 8],
    "rc8": lambda c: [c] * 4,
    "ecl": lambda c: [max(c, place) for place in range(4)],
    "ecr": lambda c: [min(c, place) for place in range(4)],
    "rc16": lambda c: [2 * (c & 1), 2 * (c & 1) + 1] * 2,
}


def _prmt(form: Form, a: int, b: int, control: int) -> int:
    if form.words:
        chosen = PRMT[form.words[0]](control & 3)
    else:
        chosen = [control >> 4 * place & 15 for place in range(4)]
    pool, result = b << 32 | a, 0
    for place, choice in enumerate(chosen):
        byte = pool >> 8 * (choice & 7) & 255
        if choice & 8:
            byte = 255 * (byte >> 7)
        result |= byte << 8 * place
    return result


_RELATION = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
}
_RELATION |= {"lo": _RELATION["lt"], "ls": _RELATION["le"]}
_RELATION |= {"hi": _RELATION["gt"], "hs": _RELATION["ge"]}
_BOOL = {"and": lambda a, b: a and b, "or": lambda a, b: a or b, "xor": lambda a, b: a != b}


def _order(number: Number) -> tuple[int, Fraction]:
    """Return a key that sorts numbers and infinities."""
    return (0, number.value) if number.finite else (-1 if number.negative else 1, Fraction(0))


def _holds(form: Form, left: int, right: int) -> bool:
    relation = form.words[0]
    if form.type not in FORMATS:
        return _RELATION[relation](form.integer(left), form.integer(right))
    numbers = [decode(bits, form.type, ftz=form.has("ftz")) for bits in (left, right)]
    unordered = any(number.nan for number in numbers)
    if relation in ("num", "nan"):
        return unordered == (relation == "nan")
    if unordered:
        return relation.endswith("u")
    return _RELATION[relation.removesuffix("u")](*map(_order, numbers))


def _join(form: Form, holds: bool, predicates: tuple[int, ...]) -> bool:
    names = [word for word in form.words[1:] if word in _BOOL]
    return bool(_BOOL[names[0]](holds, bool(predicates[0]))) if names else holds


def _setp(form: Form, left: int, right: int, *predicates: int) -> tuple[int, int]:
    if form.types[-1] in PACKED:
        first = _holds(form, left & 0xFFFF, right & 0xFFFF)
        second = _holds(form, left >> 16, right >> 16)
    else:
        first = _holds(form, left, right)
        second = not first
    return _join(form, first, predicates), _join(form, second, predicates)


def _set(form: Form, left: int, right: int, *predicates: int) -> int:
    target = form.types[0].removesuffix("x2")
    packed = form.types[-1] in PACKED
    yes = {"f16": 0x3C00, "bf16": 0x3F80, "f32": 0x3F800000}.get(target)
    if yes is None:
        yes = 0xFFFF if packed else (1 << WIDTH[target]) - 1
    if not packed:
        return yes if _join(form, _holds(form, left, right), predicates) else 0
    result = 0
    for half in (0, 16):
        holds = _holds(form, left >> half & 0xFFFF, right >> half & 0xFFFF)
        result |= (yes if _join(form, holds, predicates) else 0) << half
    return result


def _slct(form: Form, yes: int, no: int, selector: int) -> int:
    if form.type == "s32":
        return yes if signed(selector, 32) >= 0 else no
    number = decode(selector, "f32", ftz=form.has("ftz"))
    return yes if not number.nan and (not number.negative or number.zero) else no


def _testp(form: Form, bits: int) -> bool:
    number = decode(bits, form.type)
    least = Fraction(2) ** (2 - (1 << FORMATS[form.type][0] - 1))
    tiny = number.finite and 0 < number.size < least
    return {
        "finite": number.finite,
        "infinite": number.infinite,
        "number": not number.nan,
        "notanumber": number.nan,
        "normal": number.finite and not tiny,
        "subnormal": tiny,
    }[form.words[0]]


def _cvt(form: Form, *sources: int) -> int:
    target, source = form.types[0], form.types[-1]
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
        return _finish(form, bits, target)
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
        return _finish(form, _converted_nan(form, bits, target, source), target)
    if number.infinite:
        return _finish(form, infinity(target, number.negative), target)
    value, mode = number.value, form.mode
    if mode.endswith("i"):
        value, mode = Fraction(round_integer(value, mode)), "rn"
    ftz = form.has("ftz") and target == "f32"
    return _finish(
        form, encode(value, target, mode, negative_zero=number.negative, ftz=ftz), target
    )


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


ORACLES: dict[str, Oracle] = {
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
    "popc": _bit_count,
    "clz": _bit_count,
    "bfind": _bfind,
    "brev": _brev,
    "bfe": _bfe,
    "bfi": _bfi,
    "bmsk": _bmsk,
    "szext": _szext,
    "dp4a": _dot,
    "dp2a": _dot,
    "and": lambda form, a, b: a & b,
    "or": lambda form, a, b: a | b,
    "xor": lambda form, a, b: a ^ b,
    "not": lambda form, a: form.wrap(~a),
    "cnot": lambda form, a: int(a == 0),
    "lop3": _lop3,
    "shl": _shift,
    "shr": _shift,
    "shf": _shf,
    "prmt": _prmt,
    "setp": _setp,
    "set": _set,
    "selp": lambda form, yes, no, predicate: yes if predicate else no,
    "slct": _slct,
    "mov": lambda form, bits: bits,
    "testp": _testp,
    "copysign": lambda form, sign, bits: (
        sign & 1 << form.width - 1 | bits & (1 << form.width - 1) - 1
    ),
    "cvt": _cvt,
}
