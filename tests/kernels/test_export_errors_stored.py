"""Caches of 8 bits, and scales, that the C library refuses."""

from __future__ import annotations

import ctypes
import math
from typing import Any

import pytest
from c_library import STATUSES, Config, Explained, fresh_library
from c_refusals import STEP, VALID, far_apart, nothing_happened
from cases import make_step

E4M3: dict[str, Any] = dict(cache_type=3)
SCALES: dict[str, Any] = E4M3 | dict(k_scales=1 << 50, v_scales=1 << 51)
INVALID: dict[str, tuple[dict[str, Any], str]] = {
    "another type": (
        dict(cache_type=1),
        "cache_type: got 1; allowed: 0 or dtype, 0 (caches of the type of q), GQA_FLOAT8_E4M3FN (3",
    ),
    "of 32 bits": (dict(cache_type=2), "cache_type: got 2; allowed: 0 or dtype, 0"),
    "no type": (dict(cache_type=5), "cache_type: got 5; allowed: 0 or dtype, 0"),
    "negative type": (dict(cache_type=-1), "cache_type: got -1; allowed: 0 or dtype, 0"),
    "negative scale": (
        E4M3 | dict(k_scale=-1), "k_scale: got -1; allowed: 0 (one), or a number from 1e-30 to 1e+3"
    ),
    "no number": (E4M3 | dict(v_scale=math.nan), "v_scale: got nan; allowed: 0 (one), or a number"),
    "endless": (E4M3 | dict(k_scale=math.inf), "k_scale: got inf; allowed: 0 (one), or a number"),
    "too small": (E4M3 | dict(v_scale=9e-31), "v_scale: got 9e-31; allowed: 0 (one), or a number"),
    "too large": (E4M3 | dict(v_scale=2e30), "v_scale: got 2e+30; allowed: 0 (one), or a number"),
    "both": (SCALES | dict(k_scale=1), "k_scale: got 1 with k_scales; allowed: one of the two."),
    "both of values": (SCALES | dict(v_scale=2), "v_scale: got 2 with v_scales; allowed: one of t"),
    "aligned": (SCALES | dict(k_scales=6), "k_scales: got address 0x6; allowed: multiples of 4."),
    "negative stride": (
        SCALES | dict(v_scale_batch_stride=-1), "v_scale_batch_stride: got -1; allowed: 0 to 214748"
    ),
    "negative step": (
        SCALES | dict(k_scale_head_stride=-1), "k_scale_head_stride: got -1; allowed: 0 to 21474836"
    ),
    "caches of 16 bits": (
        dict(k_scale=0.5),
        "k_scale: got one with caches of the type of q; allowed: 0. Nothing was launched. Set ca",
    ),
    "and tensors": (
        dict(cache_type=0, v_scales=1 << 50),
        "v_scales: got one with caches of the type of q; allowed: null. Nothing was launched. Set",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", INVALID)
def test_what_is_not_allowed_is_refused(name: str) -> None:
    changes, message = INVALID[name]
    library, step = fresh_library(), make_step(**STEP)
    status = library.decode(step, Config(**VALID | changes), **far_apart(step))
    assert status == "GQA_ERROR_INVALID_VALUE"
    assert nothing_happened(library, message)
    assert library.error.startswith("config: ")


@pytest.mark.parametrize("cache", ["kv_cache_k", "kv_cache_v"])
def test_rows_begin_with_a_whole_pair(cache: str) -> None:
    """Which a stride or the address may keep them from; of what there is one of, none does."""
    library, step = fresh_library(), make_step(**STEP)
    given = far_apart(step)
    odd = {f"{cache}_token_stride": 131, f"{cache}_batch_stride": 30 * 131}
    for config, addresses in (
        (Config(**VALID | E4M3 | odd), given),
        (Config(**VALID | E4M3), given | {cache: given[cache] + 1}),
    ):
        assert library.decode(step, config, **addresses) == "GQA_ERROR_INVALID_VALUE"
        assert nothing_happened(library, f"{cache}: got strides ", "allowed: rows at multiples of ")
    alone = {"batch_size": 1, f"{cache}_batch_stride": 30 * 2 * 64 + 1}
    status = library.decode(step, Config(**VALID | E4M3 | alone), **given)
    assert status == "GQA_ERROR_UNSUPPORTED"  # checked, and then not found


@pytest.mark.parametrize(("type_", "name"), [(3, "float8_e4m3fn"), (4, "float8_e5m2")])
def test_types_that_were_not_exported_are_unsupported_and_named(type_: int, name: str) -> None:
    library = fresh_library()
    for changes, features in ((dict(softcap=30), " with softcap"), ({}, "")):
        config = Config(**VALID | changes | dict(cache_type=type_))
        status = STATUSES[library.c.gqa_explain(config, b"sm_90a", 132, 0, Explained())]
        assert status == "GQA_ERROR_UNSUPPORTED"
        says = f"no kernel{features} for float16 and caches of {name}, head_dim 64, "
        assert nothing_happened(library, says)
        assert STATUSES[library.c.gqa_workspace_size(config, ctypes.c_size_t())] == status


def test_what_asks_for_nothing_is_launched() -> None:
    library, step = fresh_library(), make_step(**STEP)
    for changes in (dict(k_scale_batch_stride=2), dict(k_scale=-0.0)):
        assert library.decode(step, Config(**VALID | changes)) == "GQA_SUCCESS", library.error


def test_a_place_for_later_versions_is_zero() -> None:
    library, step = fresh_library(), make_step(**STEP)
    status = library.decode(step, Config(**VALID | dict(reserved=1)), **far_apart(step))
    assert status == "GQA_ERROR_UNSUPPORTED_FEATURE"
    assert nothing_happened(library, "config: reserved: got 1; allowed: 0.")
