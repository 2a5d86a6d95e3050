"""What the PTX ISA says that element-wise instructions compute, in Python integers and rationals.

Slow and one element at a time, and independent of the code under test: numbers are exact until
they are encoded once.
"""

from __future__ import annotations

from ptxsim_oracle.arithmetic import ARITHMETIC
from ptxsim_oracle.bits import BITS, PRMT
from ptxsim_oracle.comparison import COMPARISONS
from ptxsim_oracle.conversion import CONVERSIONS, size_of_byte
from ptxsim_oracle.form import Form
from ptxsim_oracle.number import BYTES, FORMATS, PACKED, WIDTH, decode, encode, infinity

__all__ = [
    "BYTES", "FORMATS", "ORACLES", "PRMT", "WIDTH", "Form", "decode", "encode", "infinity", "run",
    "size_of_byte",
]  # fmt: skip

ORACLES = ARITHMETIC | BITS | COMPARISONS | CONVERSIONS


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
