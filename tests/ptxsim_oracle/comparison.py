"""Comparisons, selections and tests of numbers."""

from __future__ import annotations

from fractions import Fraction

from ptxsim_oracle.form import Form, Oracle, signed
from ptxsim_oracle.number import FORMATS, PACKED, WIDTH, decode, order

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
    return _RELATION[relation.removesuffix("u")](*map(order, numbers))


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


COMPARISONS: dict[str, Oracle] = {
    "setp": _setp,
    "set": _set,
    "selp": lambda form, yes, no, predicate: yes if predicate else no,
    "slct": _slct,
    "testp": _testp,
}
