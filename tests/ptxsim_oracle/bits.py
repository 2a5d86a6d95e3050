"""Instructions on bits: counts, fields, shifts, permutations."""

from __future__ import annotations

from ptxsim_oracle.form import Form, Oracle, signed


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


BITS: dict[str, Oracle] = {
    "popc": _bit_count,
    "clz": _bit_count,
    "bfind": _bfind,
    "brev": _brev,
    "bfe": _bfe,
    "bfi": _bfi,
    "bmsk": _bmsk,
    "szext": _szext,
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
}
