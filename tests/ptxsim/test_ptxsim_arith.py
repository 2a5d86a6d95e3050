"""The element-wise instructions, bit for bit against exact arithmetic."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import ptxsim_oracle as oracle
import pytest
from ptxsim_cases import (
    FEW,
    MANY,
    Opcode,
    arrays,
    byte_edges,
    cases,
    compare,
    execute,
    found,
    name,
)

from gqa_cutlass.ptxsim.element.arith import APPROXIMATE, forms, lookup


def exact_forms(*families: str) -> list[Opcode]:
    return [
        form
        for form in forms()
        if form[0] in families and "approx" not in form and "full" not in form
    ]


def grouped(*families: str) -> list[pytest.ParameterSet]:
    """Group the forms of some families by mnemonic and last type."""
    order = sorted(exact_forms(*families), key=lambda form: (form[0], form[-1]))
    return [
        pytest.param(list(group), id=".".join(key))
        for key, group in itertools.groupby(order, key=lambda form: (form[0], form[-1]))
    ]


@pytest.mark.parametrize(
    "group",
    grouped(
        "add",
        "sub",
        "mul",
        "mad",
        "fma",
        "mul24",
        "mad24",
        "div",
        "rem",
        "sad",
        "neg",
        "abs",
        "min",
        "max",
        "dp4a",
        "dp2a",
        "rcp",
        "sqrt",
        "copysign",
        "testp",
    ),
)
def test_arithmetic(group: list[Opcode]) -> None:
    for opcode in group:
        compare(opcode, cases(opcode, MANY if len(group) < 8 else (60, 100)))


@pytest.mark.parametrize(
    "group",
    grouped(
        "and",
        "or",
        "xor",
        "not",
        "cnot",
        "shl",
        "shr",
        "shf",
        "prmt",
        "popc",
        "clz",
        "bfind",
        "brev",
        "bfe",
        "bfi",
        "bmsk",
        "szext",
        "mov",
        "selp",
        "slct",
    ),
)
def test_logic_and_selection(group: list[Opcode]) -> None:
    for opcode in group:
        compare(opcode, cases(opcode, MANY))


@pytest.mark.parametrize("group", grouped("set", "setp"))
def test_comparison(group: list[Opcode]) -> None:
    for opcode in group:
        compare(opcode, cases(opcode, FEW))


@pytest.mark.parametrize("group", grouped("cvt"))
def test_conversion(group: list[Opcode]) -> None:
    for opcode in group:
        compare(opcode, cases(opcode, (40, 60)))


@pytest.mark.parametrize("kind", oracle.BYTES)
def test_every_number_of_8_bits_becomes_float16_and_back(kind: str) -> None:
    """And all that lies halfway between two of them, or next to that, goes to the right one."""
    compare(("cvt", "rn", "f16x2", kind), [(byte | byte << 8,) for byte in range(256)])
    near = byte_edges(kind)
    compare(("cvt", "rn", "satfinite", kind, "f32"), list(zip(near, reversed(near), strict=True)))


LOP3 = [("lop3", "b32"), ("lop3", "and", "b32"), ("lop3", "or", "b32")]
PRMT = [("prmt", "b32", *mode) for mode in ((), *((mode,) for mode in oracle.PRMT))]
SELECTORS = [0, 1, 2, 3, 0x3210, 0x7654, 0x5410, 0x7632, 0xFEDC, 0x8080, 0x19F3, 0xABCD0123]


@pytest.mark.parametrize("opcode", LOP3, ids=name)
def test_lop3_with_every_table(opcode: Opcode) -> None:
    predicates = [(0,), (1,)] if len(opcode) == 3 else [()]
    words = [(0xF0F0A5A5, 0xCCCC1234, 0xAAAA8001), (0, 0, 0), (0, 0xFFFFFFFF, 0)]
    for table in range(256):
        compare(opcode, [(*row, table, *last) for row in words for last in predicates])


@pytest.mark.parametrize("opcode", PRMT, ids=name)
def test_prmt_with_an_immediate(opcode: Opcode) -> None:
    first, second = np.array([0x83C2F1A0, 0x01028304], np.uint32), np.array([0x7F80, 5], np.uint32)
    for control in SELECTORS:
        (got,) = execute(opcode, [first, second, np.array([control], np.uint32)])
        expected = [
            oracle.run(opcode, int(a), int(b), control)[0]
            for a, b in zip(first, second, strict=True)
        ]
        assert got.tolist() == expected, hex(control)


INF, ONE, NAN = 0x7F800000, 0x3F800000, 0x7FFFFFFF
SIGN, LEAST, TINY = 0x80000000, 0x00800000, 0x00000001
NEGATIVE = SIGN | ONE
# The tables of corner cases in the ISA; "ftz" opcodes are listed where they differ.
CORNERS: dict[str, dict[tuple[int, ...], int]] = {
    "ex2.approx.f32": {(SIGN | INF,): 0, (SIGN,): ONE, (0,): ONE, (INF,): INF, (INF + 1,): NAN},
    "lg2.approx.f32": {
        (SIGN,): SIGN | INF,
        (0,): SIGN | INF,
        (INF,): INF,
        (NEGATIVE,): NAN,
        (SIGN | INF,): NAN,
        (TINY,): 0xC3150000,
    },
    "lg2.approx.ftz.f32": {(TINY,): SIGN | INF, (SIGN | TINY,): SIGN | INF},
    "rcp.approx.f32": {(SIGN | INF,): SIGN, (SIGN,): SIGN | INF, (0,): INF, (INF,): 0, (NAN,): NAN},
    "rcp.approx.ftz.f32": {(TINY,): INF, (SIGN | TINY,): SIGN | INF, (INF - 1,): 0},
    "sqrt.approx.f32": {(SIGN | INF,): NAN, (NEGATIVE,): NAN, (SIGN,): SIGN, (INF,): INF},
    "sqrt.approx.ftz.f32": {(TINY,): 0, (SIGN | TINY,): SIGN},
    "rsqrt.approx.f32": {(NEGATIVE,): NAN, (SIGN,): SIGN | INF, (0,): INF, (INF,): 0},
    "rsqrt.approx.ftz.f32": {(SIGN | TINY,): SIGN | INF},
    "sin.approx.f32": {(SIGN,): SIGN, (0,): 0, (INF,): NAN, (SIGN | INF,): NAN},
    "cos.approx.f32": {(SIGN,): ONE, (0,): ONE, (INF,): NAN},
    "tanh.approx.f32": {(SIGN | INF,): NEGATIVE, (SIGN,): SIGN, (INF,): ONE, (NAN,): NAN},
    "div.approx.f32": {
        (ONE, 0x7E800000): LEAST,
        (ONE, 0x7E800001): 0,
        (INF, 0x7F000000): NAN,
        (NEGATIVE, INF - 1): SIGN,
        (ONE, INF): 0,
        (ONE, 0): INF,
    },
    "div.full.f32": {(ONE, 0x7F000000): 0x00400000, (0, 0): NAN},
    "div.full.ftz.f32": {(ONE, 0x7F000000): 0, (TINY, TINY): NAN},
    "ex2.approx.f16": {(0xFC00,): 0, (0x8000,): 0x3C00, (0x7C00,): 0x7C00, (0xCE00,): 0x0001},
    "ex2.approx.ftz.bf16": {(0xFF80,): 0, (0x8001,): 0x3F80, (0xC300,): 0, (0x7F81,): 0x7FFF},
    "tanh.approx.bf16": {(0xFF80,): 0xBF80, (0x8000,): 0x8000, (0x7F80,): 0x3F80},
    "rcp.approx.ftz.f64": {
        (0xFFF0 << 48,): 1 << 63,
        (1,): 0x7FF0 << 48,
        (0x7FF1 << 48,): NAN << 32,
        (0x40080000FFFFFFFF,): 0x3FD55555 << 32,
    },
    "rsqrt.approx.ftz.f64": {(1 << 63,): 0xFFF0 << 48, (0xBFF0 << 48,): NAN << 32},
    "rsqrt.approx.f64": {(0x4010 << 48,): 0x3FE0 << 48, (0x7FF0 << 48,): 0},
}


@pytest.mark.parametrize("opcode", [tuple(text.split(".")) for text in CORNERS], ids=name)
def test_approximation_of_corner_cases(opcode: Opcode) -> None:
    corners = CORNERS[name(opcode)]
    (got,) = execute(opcode, arrays(opcode, corners))
    shown = {row: hex(int(bits)) for row, bits in zip(corners, got, strict=True)}
    assert shown == {row: hex(bits) for row, bits in corners.items()}


FUNCTIONS: dict[str, Callable[..., float]] = {
    "ex2": lambda x: 2.0**x,
    "lg2": lambda x: math.log2(abs(x)),
    "sin": math.sin,
    "cos": math.cos,
    "tanh": math.tanh,
    "rcp": lambda x: 1 / x,
    "rsqrt": lambda x: 1 / math.sqrt(abs(x)),
    "sqrt": lambda x: math.sqrt(abs(x)),
    "div": lambda x, y: x / y,
}


@pytest.mark.parametrize(
    "opcode", [form for form in forms() if "approx" in form or "full" in form], ids=name
)
def test_approximation_is_the_rounded_value(opcode: Opcode) -> None:
    form = oracle.Form.of(opcode)
    amount, positive = len(found(opcode).sources), form.name in ("lg2", "sqrt", "rsqrt")
    values = [0.0313, 0.37, 0.9, 1.0, 1.75, 2.5, 5.0, 7.3]
    values += [] if positive else [-value for value in values]
    rows = list(itertools.product([bits_of(value, form.type) for value in values], repeat=amount))
    (got,) = execute(
        opcode, arrays(opcode, [tuple(bits * form.lanes for bits in row) for row in rows])
    )
    for row, bits in zip(rows, got.tolist(), strict=True):
        exact = FUNCTIONS[form.name](*(float(oracle.decode(each, form.type).value) for each in row))
        expected = bits_of(exact, form.type)
        if form.type == "f64" and "ftz" in opcode:
            assert abs(bits - expected) < 2 << 32 and bits % (1 << 32) == 0
        else:
            assert abs(bits // form.lanes - expected) <= 1 and bits % form.lanes == 0


def bits_of(value: float, kind: str) -> int:
    return oracle.encode(Fraction(value), kind, "rn", negative_zero=False)


def test_error_bound_is_documented_for_every_approximation() -> None:
    approximate = {form for form in forms() if "approx" in form or "full" in form}
    assert {name(tuple(p for p in form if p != "ftz")) for form in approximate} == set(APPROXIMATE)


def test_each_source_may_be_shared_by_all_threads() -> None:
    for opcode in forms():
        sources = arrays(opcode, cases(opcode, (4, 8)))
        for place, source in enumerate(sources):
            shared = [*sources[:place], source[:1], *sources[place + 1 :]]
            spread = [*sources[:place], source[:1].repeat(len(source)), *sources[place + 1 :]]
            table = slice(3, 4) if opcode[0] == "lop3" else slice(0)
            shared[table], spread[table] = [[s[:1] for s in sources[table]]] * 2
            for got, expected in zip(execute(opcode, shared), execute(opcode, spread), strict=True):
                assert (got == expected).all(), (name(opcode), place)


def test_a_thread_alone_computes_the_same() -> None:
    """Rare operands, which send all threads a slow way, change nothing for the others."""
    for opcode in exact_forms(
        "add", "sub", "mul", "fma", "div", "rcp", "sqrt", "min", "max", "cvt"
    ):
        sources = arrays(opcode, cases(opcode, (8, 12)))
        together = execute(opcode, sources)[0]
        alone = [execute(opcode, [s[place : place + 1] for s in sources])[0] for place in range(12)]
        assert np.array_equal(together[:12], np.concatenate(alone)), name(opcode)


UNKNOWN = """
add add.s8 add.b32 add.rn.s32 add.sat.u32 add.ftz.f64 add.rn.rn.f32 add.rz.f16 add.ftz.rn.f32
add.cc.u32 addc.u32 add.f32.f16 add.rn.f32x2 add.sat.bf16 sub.u16x2 mul.s32 mul.wide.s64 mul.lo.f32
fma.f32 fma.rn.sat.relu.f16 fma.rz.f16 fma.rn.oob.f16 mad.lo.sat.s32 mad.lo.cc.u32 div.f32
div.approx.f64 rcp.approx.f64 sqrt.f32 rsqrt.rn.f32 ex2.f32 ex2.approx.bf16 tanh.approx.ftz.f32
min.relu.u32 max.xorsign.f32 max.NaN.f64 min.f32.f32 neg.u32 abs.ftz.bf16 and.s32 xor.f32 not.u32
lop3.u32 lop3.xor.b32 shl.s32 shr.pred shf.l.b32 prmt.b64 prmt.f4e.b32 popc.u32 bfind.b32 bfe.b32
setp.s32 setp.lt.b32 setp.lo.s32 setp.equ.u32 setp.lt.ftz.f64 setp.lt.not.s32 set.lt.s32 selp.pred
slct.ftz.s32.s32 mov mov.v2.b32 mov.f16 mov.b128 cvt.s32 cvt.f32.s32 cvt.rni.s32.s32 cvt.rn.f64.f32
cvt.sat.u64.u32 cvt.rzi.f32.f64 cvt.f16.f32 cvt.rn.f16x2.f16x2 cvt.rm.f16x2.f32 cvt.rn.f32.f32
cvt.rn.e4m3x2.f32 cvt.rn.f16.e4m3x2 cvt.rna.f16.f32 cvt.pack.sat.u16.s32.b32 cvta.to.global.u64
ld.global.f32 st.shared.b32 bra.uni bar.sync shfl.sync.bfly.b32 mma.sync atom.global.add.u32 ret
"""


@pytest.mark.parametrize("text", UNKNOWN.split())
def test_unknown_combination_is_no_instruction(text: str) -> None:
    assert lookup(tuple(text.split("."))) is None


def test_an_unknown_modifier_is_never_ignored() -> None:
    known = set(forms())
    for opcode in known:
        for place in range(1, len(opcode) + 1):
            assert lookup((*opcode[:place], "bogus", *opcode[place:])) is None
        assert (lookup(opcode[:-1]) is None) == (opcode[:-1] not in known)


def test_lookup_describes_operands() -> None:
    wide, packed = found(("mul", "wide", "s32")), found(("cvt", "rn", "f16x2", "f32"))
    assert (wide.results, wide.sources, wide.signed) == ((64,), (32, 32), True)
    assert (packed.results, packed.sources) == ((32,), (32, 32))
    setp = found(("setp", "lt", "and", "s32"))
    assert (setp.results, setp.sources) == ((1, 1), (32, 32, 1))
    byte = found(("cvt", "s8", "s32"))
    assert (byte.results, byte.signed) == ((8,), True)
    assert lookup(("mul", "wide", "s32")) is wide
