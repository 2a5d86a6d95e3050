"""Bugs of scores, softmax and sums, on CUDA cores and tensor cores."""

from __future__ import annotations

from mutants.cases import EMPTY, SIMT
from mutants.mutant import UNWRITTEN, Mutant

ARITHMETIC = (
    # CUDA cores
    Mutant(
        name="queries used before they are there",
        header="score.cuh",
        old="    __syncthreads();\n",
        new="",
        fault=f"({UNWRITTEN}|never written).* at score.cuh",
        case=SIMT,
    ),
    Mutant(
        name="probabilities used before they are there",
        header="value.cuh",
        old="p[h][lane] = probability[h][0];\n    }\n    __syncwarp();",
        new="p[h][lane] = probability[h][0];\n    }",
        fault=f"{UNWRITTEN}.* at value.cuh",
        case=SIMT,
    ),
    Mutant(
        name="lanes that share a token not summed",
        header="score.cuh",
        old="for (int bit = T::kBlockN; bit < kWarpSize; bit *= 2)",
        new="for (int bit = T::kBlockN; bit < T::kBlockN; bit *= 2)",
        wrong="output",
        case=SIMT,
    ),
    # Arithmetic
    Mutant(
        name="a token past the end attended",
        header="mask_whole.cuh",
        old="at.token < at.end",
        new="at.token <= at.end",
        wrong="output",
    ),
    Mutant(
        name="halves of the queries swapped",
        header="score.cuh",
        old="query[i / 2][n][i % 2] =",
        new="query[i / 2][n][1 - i % 2] =",
        wrong="output",
    ),
    Mutant(
        name="rows of the keys from the wrong lanes",
        header="score.cuh",
        old="lane % 16, lane / 16)",
        new="lane / 2, lane % 2)",
        wrong="output",
    ),
    Mutant(
        name="scale forgotten",
        header="logit_scaled.cuh",
        old="dot * scale_log2",
        new="dot",
        wrong="output",
    ),
    Mutant(
        name="values not transposed",
        header="element_native.cuh",
        old="cute::SM75_U16x8_LDSM_T",
        new="cute::SM75_U32x4_LDSM_N",
        wrong="output",
    ),
    Mutant(
        name="output not rescaled",
        header="softmax.cuh",
        old="    rescale(factor);\n",
        new="",
        wrong="output",
    ),
    Mutant(
        name="sum not rescaled",
        header="softmax.cuh",
        old="row_sum[h] *= factor[h];",
        new="",
        wrong="output",
    ),
    Mutant(
        name="maximum over the wrong lanes",
        header="softmax.cuh",
        old="__shfl_xor_sync(0xffffffffu, tile_max[h], bit)",
        new="__shfl_xor_sync(0xffffffffu, tile_max[h], bit / 2)",
        wrong="output",
    ),
    Mutant(
        name="sum over half of the lanes",
        header="softmax.cuh",
        old="bit <= T::kLastLaneBit; bit *= 2) {\n        sum",
        new="bit < T::kLastLaneBit; bit *= 2) {\n        sum",
        wrong="output",
    ),
    Mutant(
        name="no finite maximum of no scores",
        header="traits.cuh",
        old="kNoMax = -3.402823466e+38f",
        new="kNoMax = -cuda::std::numeric_limits<float>::infinity()",
        wrong="output",
        case=EMPTY,
    ),
)
