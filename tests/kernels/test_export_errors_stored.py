"""Caches of 8 bits, and scales, that the C library refuses."""

from __future__ import annotations

import ctypes
import math
from typing import Any

import pytest
import torch
from c_library import STATUSES, Config, Explained, fresh_library
from c_refusals import STEP, VALID, far_apart, nothing_happened, sizes_of
from cases import make_step

E4M3: dict[str, Any] = dict(cache_type=3)
SCALES: dict[str, Any] = E4M3 | dict(k_scales=1 << 50, v_scales=1 << 51)
TOKENS: dict[str, Any] = SCALES | dict(scales_of_tokens=1)
WITHOUT: dict[str, Any] = TOKENS | dict(v_scales=None)
PAGED: dict[str, Any] = TOKENS | dict(block_table=1 << 52, page_size=15, max_pages=2, num_pages=4)
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
    "beyond memory": (
        SCALES | dict(num_q_heads=2**30, num_kv_heads=2**30, max_seq_len=4, head_dim=32,
                      v_scale_head_stride=2**31 - 1),
        "v_scales: got 9.223e+18 bytes from the first scale to the last; allowed: up to 1.407e+14.",
    ),
    "neither 0 nor 1": (TOKENS | dict(scales_of_tokens=2), "scales_of_tokens: got 2; allowed: 0 t"),
    "of tokens of 16 bits": (
        dict(scales_of_tokens=1),
        "scales_of_tokens: got 1 with caches of the type of q; allowed: 0. Nothing was launched. S",
    ),
    "of tokens of keys alone": (
        WITHOUT, "v_scales: got null with scales_of_tokens; needed: scales on the device. Nothing",
    ),
    "of tokens and a number": (
        WITHOUT | dict(v_scale=0.5), "v_scales: got null with scales_of_tokens; needed: scales on",
    ),
    "of tokens and both": (TOKENS | dict(v_scale=0.5), "v_scale: got 0.5 with v_scales; allowed: "),
    "of tokens aligned": (
        TOKENS | dict(v_scales=2), "v_scales: got address 0x2; allowed: multiples of 4. Nothing w",
    ),
    "of several tokens of keys alone": (
        WITHOUT | dict(num_tokens=2), "v_scales: got null with scales_of_tokens; needed: scales on",
    ),
    "heads apart": (
        TOKENS | dict(k_scale_head_stride=2),
        "k_scale_head_stride: got 2 with scales_of_tokens; allowed: 0 or 1. Nothing was launched.",
    ),
    "rows that share memory": (
        TOKENS | dict(v_scale_batch_stride=59),
        "v_scale_batch_stride: got 59 with scales_of_tokens; allowed: from 60, the scales of all ",
    ),
    "pages that share memory": (
        PAGED | dict(k_scale_batch_stride=29),
        "k_scale_batch_stride: got 29 with scales_of_tokens; allowed: from 30, the scales of all ",
    ),
    "rows too far apart": (
        TOKENS | dict(max_seq_len=2**30),
        "k_scale_batch_stride: got 2147483648 with scales_of_tokens; allowed: from 2147483648, th",
    ),
    "pages beyond memory": (
        PAGED | dict(num_pages=2**31 - 1, k_scale_batch_stride=2**31 - 1),
        "k_scales: got 1.845e+19 bytes from the first scale to the last; allowed: up to 1.407e+14",
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


@pytest.mark.parametrize(
    ("asked", "name"),
    [
        (dict(cache_type=3), "float8_e4m3fn"),
        (dict(cache_type=4), "float8_e5m2"),
        (TOKENS, "float8_e4m3fn with scales of tokens"),
        (TOKENS | dict(cache_type=4), "float8_e5m2 with scales of tokens"),
    ],
    ids=["e4m3", "e5m2", "e4m3t", "e5m2t"],
)
def test_types_that_were_not_exported_are_unsupported_and_named(
    asked: dict[str, Any], name: str
) -> None:
    library = fresh_library()
    several: list[tuple[dict[str, Any], str]] = [
        ({}, ""), (dict(softcap=30), " with softcap"), (dict(num_tokens=2), " with num_tokens"),
        (dict(num_new_tokens=2), " with num_tokens"),
        (dict(num_tokens=2, tree_mask=1 << 52), " with tree_mask"),
    ]  # fmt: skip
    for changes, features in several:
        config = Config(**VALID | changes | asked)
        status = STATUSES[library.c.gqa_explain(config, b"sm_90a", 132, 0, Explained())]
        assert status == "GQA_ERROR_UNSUPPORTED"
        says = f"no kernel{features} for float16 and caches of {name}, head_dim 64, "
        assert nothing_happened(library, says)
        assert STATUSES[library.c.gqa_workspace_size(config, ctypes.c_size_t())] == status


def test_what_asks_for_nothing_is_launched() -> None:
    library, step = fresh_library(), make_step(**STEP)
    for changes in (dict(k_scale_batch_stride=2), dict(k_scale=-0.0)):
        assert library.decode(step, Config(**VALID | changes)) == "GQA_SUCCESS", library.error


WRITTEN = ("output", "kv_cache_k", "kv_cache_v", "k_scales", "v_scales")
READ = ("q", "k", "v", "sinks", "cache_seqlens")
# Query and new tokens of both sequences, how they are asked for, and the bytes of what says so.
COUNTS: dict[str, tuple[int, int, dict[str, int], dict[str, int]]] = {
    "one": (2, 2, {}, {}),
    "several": (6, 8, dict(num_tokens=3, num_new_tokens=4), {}),
    "drafts": (6, 6, dict(num_tokens=3, tree_mask=1 << 55), {"tree_mask": 24}),
    "unlike numbers": (
        5, 7,
        dict(num_tokens=4, total_tokens=5, cu_seqlens_q=1 << 56, total_new_tokens=7,
             cu_seqlens_k_new=1 << 57),
        {"cu_seqlens_q": 12, "cu_seqlens_k_new": 12},
    ),
}  # fmt: skip
PAIRS = [
    (scales, other, name)
    for name, (*_, said) in COUNTS.items()
    for scales in WRITTEN[-2:]
    for other in (*WRITTEN, *READ, "lse", *said)
    if other != scales
]


@pytest.mark.parametrize(("scales", "other", "count"), PAIRS)
def test_scales_of_tokens_have_memory_of_their_own(scales: str, other: str, count: str) -> None:
    """Of which they have as much as they reach over: rows apart, with their tokens and heads."""
    library, step = fresh_library(), make_step(**STEP)
    queries, new, asked, said = COUNTS[count]
    fields = TOKENS | asked | {f"{scales[:-1]}_batch_stride": 100}
    config = Config(**VALID | fields | dict(sinks=1 << 52, sinks_type=2, lse=1 << 53))
    size = 4 * (100 + 30 * 2)
    overflow = torch.zeros(1, dtype=torch.int32)
    given = far_apart(step) | {"cache_seqlens": 1 << 54, "overflow": overflow.data_ptr()}
    sizes = sizes_of(step, in_8_bits=True) | said | {
        "k_scales": 4 * 120, "v_scales": 4 * 120, "sinks": 32, "cache_seqlens": 8,
        "lse": 4 * 8 * queries, **dict.fromkeys(("output", "q"), 2 * 64 * 8 * queries),
        **dict.fromkeys(("k", "v"), 2 * 64 * 2 * new),
    }  # fmt: skip
    start = given.get(other) or getattr(config, other)
    for at, is_shared in (
        (start - size + 4, True), (start + sizes[other] - 4, True),
        (start - size, False), (start + sizes[other], False),
    ):  # fmt: skip
        setattr(config, scales, at)
        status = library.decode_ragged(step, overflow, config, **given)
        if is_shared:
            assert status == "GQA_ERROR_INVALID_VALUE"
            assert nothing_happened(library, *_says(scales, other))
        else:
            assert status == "GQA_ERROR_UNSUPPORTED", library.error  # checked, and then not found


def _says(scales: str, other: str) -> tuple[str, ...]:
    if other in ("output", "lse"):
        return (f"{other}: got memory that {scales} also uses; allowed: memory of its own",)
    if other not in WRITTEN:
        return (f"{other}: got memory of {scales}, to which the new token is written",)
    first, second = sorted((scales, other), key=WRITTEN.index)
    return (f"{second}: got memory that {first} also uses; allowed: memory of its own",)


def test_scales_of_keys_and_values_may_take_turns_in_one_buffer() -> None:
    """Row by row, [batch, 2, max_seq_len, num_kv_heads]; not with a row of which one is shared."""
    library, step = fresh_library(), make_step(**STEP)
    strides = dict(k_scale_batch_stride=120, v_scale_batch_stride=120)
    for beside, status in ((60, "UNSUPPORTED"), (59, "INVALID_VALUE"), (61, "INVALID_VALUE")):
        apart = TOKENS | strides | dict(v_scales=TOKENS["k_scales"] + 4 * beside)
        found = library.decode(step, Config(**VALID | apart), **far_apart(step))
        assert found == f"GQA_ERROR_{status}", library.error
