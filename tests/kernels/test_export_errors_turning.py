"""Norms and rotations that the C library refuses."""

from __future__ import annotations

import math
from typing import Any

import pytest
from c_library import Config, fresh_library
from c_refusals import ROTARY, STEP, VALID, far_apart, nothing_happened
from cases import make_step

TABLES: dict[str, Any] = ROTARY | dict(rotary_cos=1 << 50, rotary_sin=1 << 51)
WEIGHT: dict[str, Any] = dict(q_norm_weight=1 << 50)
INVALID: dict[str, tuple[dict[str, Any], str]] = {
    "no sines": (TABLES | dict(rotary_sin=None), "rotary_sin: got null with rotary_cos; allowed: "),
    "no cosines": (
        TABLES | dict(rotary_cos=None),
        "rotary_sin: got 0x8000000000000 without rotary_cos; allowed: null.",
    ),
    "positions alone": (
        dict(rotary_seqlens=8), "rotary_seqlens: got 0x8 without rotary_cos; allowed: null."
    ),
    "no positions": (TABLES | dict(rotary_positions=0), "rotary_positions: got 0; allowed: 1 to "),
    "odd dims": (
        TABLES | dict(rotary_dim=24),
        "rotary_dim: got 24; allowed: multiples of 16 up to head_dim, 64, and 0 for head_dim, if",
    ),
    "too many dims": (TABLES | dict(rotary_dim=80), "rotary_dim: got 80; allowed: multiples of 16"),
    "negative dims": (TABLES | dict(rotary_dim=-16), "rotary_dim: got -16; allowed: multiples of"),
    "no dims": (TABLES | dict(rotary_dim=0, head_dim=72), "rotary_dim: got 0; allowed: multiples"),
    "type": (
        TABLES | dict(rotary_type=1), "rotary_type: got 1; allowed: dtype, 0, or GQA_FLOAT32 (2)."
    ),
    "odd stride": (
        TABLES | dict(rotary_cos_stride=33), "rotary_cos_stride: got 33; allowed: multiples of 2, "
    ),
    "negative stride": (
        TABLES | dict(rotary_sin_stride=-2), "rotary_sin_stride: got -2; allowed: multiples of 2, "
    ),
    "far stride": (
        TABLES | dict(rotary_sin_stride=2**62), "of tables of up to 1.407e+14 bytes, and 0 for con"
    ),
    "flag": (dict(rotary_interleaved=2), "rotary_interleaved: got 2; allowed: 0 to 1."),
    "aligned": (
        TABLES | dict(rotary_type=2, rotary_sin=12),
        "rotary_sin: got address 0xc; allowed: multiples of 8.",
    ),
    "aligned weights": (
        WEIGHT | dict(k_norm_weight=2, k_norm_type=2),
        "k_norm_weight: got address 0x2; allowed: multiples of 4.",
    ),
    "type of weights": (WEIGHT | dict(q_norm_type=3), "q_norm_type: got 3; allowed: GQA_FLOAT16"),
    "type of k's": (WEIGHT | dict(k_norm_type=-1), "k_norm_type: got -1; allowed: GQA_FLOAT16 (0)"),
    "negative eps": (WEIGHT | dict(norm_eps=-1e-6), "norm_eps: got -1e-06; allowed: a finite numb"),
    "no eps": (WEIGHT | dict(norm_eps=math.nan), "norm_eps: got nan; allowed: a finite number, 0 "),
    "infinite eps": (WEIGHT | dict(norm_eps=math.inf), "norm_eps: got inf; allowed: a finite numb"),
    "plus two": (WEIGHT | dict(norm_plus_one=2), "norm_plus_one: got 2; allowed: 0 to 1."),
}  # fmt: skip


@pytest.mark.parametrize("name", INVALID)
def test_what_is_not_allowed_is_refused(name: str) -> None:
    changes, message = INVALID[name]
    library, step = fresh_library(), make_step(**STEP)
    status = library.decode(step, Config(**VALID | changes), **far_apart(step))
    assert status == "GQA_ERROR_INVALID_VALUE"
    assert nothing_happened(library, message)
    assert library.error.startswith("config: ")


def test_positions_of_their_own_want_lengths_on_the_device() -> None:
    library, step = fresh_library(), make_step(**STEP)
    config = Config(**VALID | TABLES | dict(rotary_seqlens=1 << 52))
    assert library.decode(step, config, **far_apart(step)) == "GQA_ERROR_INVALID_VALUE"
    says = "config: rotary_seqlens: got 0x10000000000000 with one length for all; allowed: null, or"
    assert nothing_happened(library, says, "where to report a position that the tables do not have")


def test_what_goes_with_tables_and_weights_asks_for_nothing_alone() -> None:
    library, step = fresh_library(), make_step(**STEP)
    for changes in (ROTARY, dict(rotary_interleaved=1), dict(norm_eps=1e-6, norm_plus_one=1)):
        assert library.decode(step, Config(**VALID | changes)) == "GQA_SUCCESS", library.error
