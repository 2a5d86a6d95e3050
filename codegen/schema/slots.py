"""The slots, where kernels differ by feature, and what each asks of its policies.

policy/slots.cuh, below templates/include/gqa/, says what the names stand for.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Slot:
    """A place in the kernel where features differ.

    Args:
        alias: What a generated file calls its policy.
        contract: The names that a policy's struct must define.
    """

    alias: str
    contract: tuple[str, ...]


ROW = Slot(alias="Row", contract=("row", "is_own"))
CACHE = Slot(
    alias="Cache", contract=("by_number", "Pages", "Rows", "keys", "values", "NewRow", "Boxes")
)
START = Slot(alias="Start", contract=("padding", "none"))
MASK = Slot(alias="Mask", contract=("sees", "first_token", "from_start"))
LOGIT = Slot(alias="Logit", contract=("operator()",))
BIAS = Slot(alias="Bias", contract=("operator()",))
NEW_TOKEN = Slot(alias="NewToken", contract=("load_key", "load_value"))
ELEMENT = Slot(alias="Operands", contract=("Stored", "Multiplied"))
OUTPUT = Slot(alias="Output", contract=("finish",))
RESULT = Slot(alias="Result", contract=("rounded",))
QUERIES = Slot(alias="Queries", contract=("is_one",))
NORM = Slot(alias="Norm", contract=("none", "Weights"))
ROTARY = Slot(alias="Rotary", contract=("none",))
SLOTS = (
    ROW, CACHE, START, MASK, LOGIT, BIAS, NEW_TOKEN, ELEMENT, OUTPUT, RESULT, QUERIES, NORM, ROTARY,
)  # fmt: skip
