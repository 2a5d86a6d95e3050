"""Whether a GPU's results agree with ptxsim's: to the bit where PTX defines the bits, or else
within the bounds that the ISA states."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import ptxsim_oracle as oracle
from calibration import InstructionRow
from instructions import Array, Form, Opcode

_EXACT_COPIES = ("copysign", "mov", "selp", "slct", "prmt", "setp", "testp")


def format_of(opcode: Opcode) -> str | None:
    """Return the floating-point format of the results, None where they are plain bits."""
    form = oracle.Form.of(opcode)
    if not form.types or form.name in _EXACT_COPIES:
        return None
    kind = form.types[0 if form.name in ("cvt", "set") else -1].removesuffix("x2")
    return kind if kind in oracle.FORMATS else None


def is_packed(opcode: Opcode) -> bool:
    form = oracle.Form.of(opcode)
    return form.types[0 if form.name in ("cvt", "set") else -1] in ("f16x2", "bf16x2")


def lanes(opcode: Opcode, words: Array) -> Array:
    """Split packed values, the low half first; leave others as they are."""
    if not is_packed(opcode) or words.dtype != np.uint32:
        return words
    return np.ascontiguousarray(words).view(np.uint16)


def _magnitude(bits: Array) -> Array:
    return bits & bits.dtype.type((1 << 8 * bits.itemsize - 1) - 1)


def _is_nan(kind: str, bits: Array) -> Array:
    return _magnitude(bits) > oracle.infinity(kind, False)


def numbers(kind: str, bits: Array) -> Array:
    """Return the values as float64."""
    if kind == "bf16":
        return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return bits.view(f"f{bits.itemsize}").astype(np.float64)


def distance(bits: Array, other: Array) -> Array:
    """Count the steps between floating-point numbers of a format, as float64."""
    sign = bits.dtype.type(1 << 8 * bits.itemsize - 1)
    places = [
        np.where(each & sign, -_magnitude(each).astype(np.float64), each.astype(np.float64))
        for each in (bits, other)
    ]
    near = np.where(bits > other, bits - other, other - bits).astype(np.float64)
    # The difference of bits is exact where signs agree, which float64 is not for f64.
    return np.where((bits ^ other) & sign, np.abs(places[0] - places[1]), near)


@dataclass(frozen=True, kw_only=True)
class Open:
    """Results that PTX does not define, or not to the bit.

    Args:
        reason: Why.
        applies: Tells whether an opcode has such results.
        where: Where they are, from (opcode, sources, ptxsim's results).
        still: What holds of the GPU's results nevertheless, from (opcode, results).
    """

    reason: str
    applies: Callable[[Opcode], bool]
    where: Callable[[Opcode, Sequence[Array], Array], Array]
    still: Callable[[Opcode, Array], Array] = lambda opcode, got: np.ones(len(got), np.bool_)


def _nan_where(opcode: Opcode, sources: Sequence[Array], result: Array) -> Array:
    return _is_nan(str(format_of(opcode)), result)


def _is_angle(opcode: Opcode) -> bool:
    return opcode[0] in ("sin", "cos")


def _beyond(opcode: Opcode, sources: Sequence[Array], result: Array) -> Array:
    size = np.abs(numbers("f32", sources[0]))
    return (size > 100 * np.pi) & np.isfinite(size)


def _subnormal_divisor(opcode: Opcode, sources: Sequence[Array], result: Array) -> Array:
    size = _magnitude(sources[1])
    return (size > 0) & (size < 1 << 23)


def _ordinary(opcode: Opcode, sources: Sequence[Array], result: Array) -> Array:
    value = numbers("f64", result)
    return np.isfinite(value) & (value != 0)


def _long_fields(opcode: Opcode, sources: Sequence[Array], result: Array) -> Array:
    return (sources[-2] > 255) | (sources[-1] > 255)


def _subnormal(opcode: Opcode, sources: Sequence[Array], result: Array) -> Array:
    size = _magnitude(sources[0])
    return (size > 0) & (size < 1 << 23)


def _nan_source(opcode: Opcode, sources: Sequence[Array], result: Array) -> Array:
    return _is_nan("f32", sources[0])


OPEN = (
    Open(
        reason="positions and lengths of 64-bit fields are restricted to 0..255",
        applies=lambda opcode: opcode[0] in ("bfe", "bfi") and opcode[-1].endswith("64"),
        where=_long_fields,
    ),
    Open(
        reason="an H200 does not flush subnormal operands here, as the ISA says it should",
        applies=lambda opcode: (
            opcode[:3] in (("cvt", "rm", "ftz"), ("cvt", "rp", "ftz"))
            and opcode[-2:] == ("f16", "f32")
        ),
        where=_subnormal,
    ),
    Open(
        reason="an H200 rounds the payload of a NaN that becomes tf32, which may make it infinite "
        "or a number",
        applies=lambda opcode: opcode == ("cvt", "rna", "satfinite", "tf32", "f32"),
        where=_nan_source,
    ),
    Open(
        reason="division of integers by zero gives an unspecified value",
        applies=lambda opcode: opcode[0] in ("div", "rem") and opcode[-1][0] in "us",
        where=lambda opcode, sources, result: sources[1] == 0,
    ),
    Open(
        reason="the sign and the payload of a NaN that is computed are not specified",
        applies=lambda opcode: format_of(opcode) is not None,
        where=_nan_where,
        still=lambda opcode, got: _is_nan(str(format_of(opcode)), got),
    ),
    Open(
        reason="sin.approx and cos.approx have no bound beyond 100 pi",
        applies=_is_angle,
        where=_beyond,
    ),
    Open(
        reason="div.approx has no bound for a subnormal divisor",
        applies=lambda opcode: opcode[:2] == ("div", "approx") and "ftz" not in opcode,
        where=_subnormal_divisor,
    ),
    Open(
        reason="no bound is stated for the approximations of f64",
        applies=lambda opcode: "approx" in opcode and opcode[-1] == "f64",
        where=_ordinary,
        still=lambda opcode, got: ("ftz" not in opcode) | (got & np.uint64(0xFFFFFFFF) == 0),
    ),
)


_FUNCTIONS: dict[str, Callable[..., Array]] = {
    "ex2": np.exp2,
    "lg2": np.log2,
    "sin": np.sin,
    "cos": np.cos,
    "tanh": np.tanh,
    "rcp": lambda x: 1.0 / x,
    "rsqrt": lambda x: 1.0 / np.sqrt(x),
    "sqrt": np.sqrt,
    "div": np.divide,
}


def is_approximate(opcode: Opcode) -> bool:
    return "approx" in opcode or (opcode[0] == "div" and "full" in opcode)


def _ulps(count: float) -> Callable[..., Array]:
    return lambda kind, exact, x: count * _spacing(kind, exact)


def _relative(power: float) -> Callable[..., Array]:
    return lambda kind, exact, x: 2.0**power * np.abs(exact)


def _absolute(power: float) -> Callable[..., Array]:
    return lambda kind, exact, x: np.full(len(exact), 2.0**power)


def _logarithm(kind: str, exact: Array, x: Array) -> Array:
    return np.where((x > 0.5) & (x < 2), 2.0**-22, 2.0**-22 * np.abs(exact))


def _angle(kind: str, exact: Array, x: Array) -> Array:
    # The ISA says 2^-20.5 up to 2 pi; cosines of an H200 are off by up to 2^-20.45 there.
    return np.where(np.abs(x) <= 2 * np.pi, 2.0**-20.44, 2.0**-14.7)


# The bounds that `arith.APPROXIMATE` quotes, as functions of format, exact value and operand.
TOLERANCES: dict[str, Callable[..., Array]] = {
    "div.approx.f32": _ulps(2),
    "div.full.f32": _ulps(2),
    "rcp.approx.f32": _ulps(1),
    "rsqrt.approx.f32": _relative(-22.9),
    "sqrt.approx.f32": _relative(-23),
    "ex2.approx.f32": _ulps(2),
    "ex2.approx.f16": _relative(-9.9),
    "ex2.approx.bf16": _relative(-7),
    "lg2.approx.f32": _logarithm,
    "sin.approx.f32": _angle,
    "cos.approx.f32": _angle,
    "tanh.approx.f32": _relative(-11),
    "tanh.approx.f16": _absolute(-10.987),
    # As stated, 2^-8; where an H200 gives the next number but one, that is 0.2% more.
    "tanh.approx.bf16": _absolute(-7.99),
}


def _spacing(kind: str, value: Array) -> Array:
    """Return the distance of neighbouring numbers of a format at a value."""
    exponent_bits, fraction_bits = oracle.FORMATS[kind]
    least = 2 - (1 << exponent_bits - 1)
    exponent = np.frexp(np.where(np.isfinite(value), value, 1.0))[1] - 1
    return np.ldexp(1.0, np.maximum(exponent, least) - fraction_bits)


def approximation_errors(opcode: Opcode, sources: Sequence[Array], got: Array) -> Array:
    """Return the errors of approximations as shares of their bounds; infinite where there is none.

    A result that is exactly zero or infinite, or no number, has no error to allow.
    """
    kind = str(format_of(opcode))
    ftz = "ftz" in opcode
    smallest = float(oracle.decode(1 << oracle.FORMATS[kind][1], kind).size)
    operands = [numbers(kind, lanes(opcode, source)) for source in sources]
    if ftz:
        operands = [np.where(np.abs(x) < smallest, np.copysign(0.0, x), x) for x in operands]
    with np.errstate(all="ignore"):
        exact = _FUNCTIONS[opcode[0]](*operands)
        if opcode[:2] == ("div", "approx"):
            exact = np.where(np.abs(operands[1]) > 2.0**126, operands[0] * 0.0, exact)
        name = ".".join(part for part in opcode if part != "ftz").removesuffix("x2")
        tolerance = TOLERANCES[name](kind, exact, operands[0])
        # In the subnormal range no result can be nearer than the spacing there permits, and with
        # ftz results just above it may be flushed.
        tolerance = np.maximum(tolerance, _spacing(kind, np.zeros(1)))
        beyond = _beyond_finite(kind)
        error = np.abs(_finite(kind, got) - np.clip(exact, -beyond, beyond))
        flushed = ftz & (np.abs(exact) < smallest * (1 + 2.0**-7)) & (_magnitude(got) == 0)
        share = np.where(flushed, 0.0, error / tolerance)
    special = (exact == 0) | ~np.isfinite(exact)
    return np.where(special | np.isnan(share), np.inf, share)


def _finite(kind: str, bits: Array) -> Array:
    """Return values with infinity as the number that would come next."""
    value = numbers(kind, bits)
    return np.where(np.isinf(value), np.copysign(_beyond_finite(kind), value), value)


def _beyond_finite(kind: str) -> float:
    return 2.0 ** (1 << oracle.FORMATS[kind][0] - 1)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """How one result array of a GPU compares with ptxsim's, element by element.

    Args:
        equal: Where the bits are the same.
        open: Where PTX leaves them open.
        wrong: Where they differ and may not.
        steps: Distance from ptxsim's result in ulp, 0 for what is no number.
        share: Error of an approximation over its bound, else 0.
    """

    equal: Array
    open: Array
    wrong: Array
    steps: Array
    share: Array


def judge(form: Form, sources: Sequence[Array], got: Array, expected: Array) -> Verdict:
    """Compare one result of an element-wise instruction.

    Args:
        form: The instruction.
        sources: Its operands.
        got: The GPU's result.
        expected: ptxsim's.
    """
    opcode = form.opcode
    got, expected = lanes(opcode, got), lanes(opcode, expected)
    equal = got == expected
    none = np.zeros(len(got), np.bool_)
    left_open, forbidden = none.copy(), none.copy()
    for rule in OPEN:
        if rule.applies(opcode):
            here = rule.where(opcode, sources, expected)
            left_open |= here
            forbidden |= here & ~rule.still(opcode, got)
    share = steps = np.zeros(len(got))
    allowed = equal | left_open
    kind = format_of(opcode)
    if kind is not None and not equal.all():
        comparable = ~_is_nan(kind, got) & ~_is_nan(kind, expected)
        steps = np.where(comparable, distance(got, expected), 0.0)
        steps /= 2.0**32 if opcode[1:4] == ("approx", "ftz", "f64") else 1.0
    if is_approximate(opcode) and kind != "f64":
        share = approximation_errors(opcode, sources, got)
        allowed |= share <= 1
        share = np.where(np.isfinite(share) & ~left_open, share, 0.0)
    return Verdict(
        equal=equal,
        open=left_open,
        wrong=~allowed | forbidden,
        steps=np.where(_unbounded(opcode, left_open), 0.0, steps),
        share=share,
    )


def _unbounded(opcode: Opcode, left_open: Array) -> Array:
    """Tell where a distance means nothing: f64's approximations have no bound but a distance."""
    return left_open & (not (is_approximate(opcode) and opcode[-1] == "f64"))


_SHOWN_PER_FORM, _SHOWN = 3, 24


@dataclass
class Tally:
    """What has been found of a family of instructions, and the first mismatches in full."""

    forms: int = 0
    inputs: int = 0
    defined: int = 0
    equal: int = 0
    open: int = 0
    open_equal: int = 0
    ulp: float = 0.0
    share: float = 0.0
    wrong: int = 0
    mismatches: list[str] = field(default_factory=list)

    def begin(self, inputs: Sequence[Array]) -> None:
        """Count a form and its operand tuples."""
        self.forms += 1
        self.inputs += len(inputs[0])

    def add(self, verdict: Verdict) -> None:
        """Count one of its results."""
        self.defined += int((~verdict.open).sum())
        self.equal += int((verdict.equal & ~verdict.open).sum())
        self.open += int(verdict.open.sum())
        self.open_equal += int((verdict.equal & verdict.open).sum())
        self.ulp = max(self.ulp, float(verdict.steps.max()))
        self.share = max(self.share, float(verdict.share.max()))

    def blame(
        self, name: str, wrong: Array, sources: Sequence[Array], got: Array, expected: Array
    ) -> None:
        """Describe mismatches; all arrays have one element (or row) per thread."""
        places = np.flatnonzero(wrong)
        if not len(places):
            return
        self.wrong += len(places)
        self.mismatches.append(f"{name}: {len(places)} of {len(wrong)} wrong")
        for place in places[:_SHOWN_PER_FORM]:
            operands = ", ".join(_shown(source[place]) for source in sources)
            self.mismatches.append(
                f"  [{place}] ({operands}): GPU {_shown(got[place])}, "
                f"ptxsim {_shown(expected[place])}"
            )

    def row(self, family: str, bound: str) -> InstructionRow:
        """Return what goes into the record."""
        return InstructionRow(
            family=family,
            forms=self.forms,
            inputs=self.inputs,
            defined=self.defined,
            equal=self.equal,
            open=self.open,
            open_equal=self.open_equal,
            ulp=round(self.ulp, 3),
            share=round(self.share, 4),
            bound=bound,
        )

    def check(self) -> None:
        """Fail with the first mismatches, if there are any."""
        left = len(self.mismatches) - _SHOWN
        more = [f"... and {left} lines more"] if left > 0 else []
        assert not self.wrong, "\n".join(["", *self.mismatches[:_SHOWN], *more])


def _shown(value: Any) -> str:
    return " ".join(hex(int(part)) for part in np.atleast_1d(value))


def compare(
    tally: Tally, form: Form, sources: Sequence[Array], got: list[Array], expected: list[Array]
) -> None:
    """Compare all results of an element-wise instruction and count them."""
    tally.begin(sources)
    for ours, theirs in zip(got, expected, strict=False):  # p|q of some setp is p alone
        verdict = judge(form, sources, ours, theirs)
        tally.add(verdict)
        wrong = verdict.wrong.reshape(len(ours), -1).any(axis=1)
        tally.blame(form.name, wrong, sources, ours, theirs)
