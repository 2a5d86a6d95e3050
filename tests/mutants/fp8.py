"""Bugs of caches of 8 bits."""

from __future__ import annotations

from mutants.cases import IN_8_BITS, IN_8_BITS_CLUSTER
from mutants.mutant import Mutant

FP8 = (
    Mutant(
        name="queries in the order of 16 bits",
        header="element_fp8.cuh",
        old="return i / 2 * 16 + quarter * 4 + i % 2 * 2;",
        new="return i * 8 + quarter * 2;",
        wrong="output",
        case=IN_8_BITS,
    ),
    Mutant(
        name="two dims for two tokens",
        header="element_fp8.cuh",
        old="Format::halves(__byte_perm(four, 0, 0x3120), even, odd);",
        new="Format::halves(four, even, odd);",
        wrong="output",
        case=IN_8_BITS,
    ),
    Mutant(
        name="values of the chunk beside",
        header="element_fp8.cuh",
        old="row(values, token, dim_tile % 2);",
        new="row(values, token, 0);",
        wrong="output",
        case=IN_8_BITS_CLUSTER,
    ),
    Mutant(
        name="the scale of the first head's keys",
        header="element_fp8.cuh",
        old="int64_t(w.kv_head) * p.k_scale_head",
        new="0",
        wrong="lse",
        case=IN_8_BITS,
    ),
    Mutant(
        name="an output without its scale",
        header="output.cuh",
        old="  OperandsOf<T>::scale_values(p, w, r);\n",
        new="",
        wrong="output",
        case=IN_8_BITS,
    ),
    Mutant(
        name="tokens stored without their scale",
        header="element_fp8.cuh",
        old="scale.under(float(given[j]))",
        new="float(given[j])",
        wrong="caches",
        case=IN_8_BITS,
    ),
    Mutant(
        name="tokens cut off instead of rounded",
        header="fp8.cuh",
        old="(1u << (kDropped - 1)) - 1 + (bits >> kDropped & 1)",
        new="0",
        wrong="caches",
        case=IN_8_BITS,
    ),
    Mutant(
        name="exponents of another bias",
        header="fp8.cuh",
        old="kFactor = 0x5c005c00;",
        new="kFactor = 0x60006000;",
        wrong="lse",
        case=IN_8_BITS,
    ),
)
