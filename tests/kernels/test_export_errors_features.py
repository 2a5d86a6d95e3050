"""Features that the C library refuses: those that it was not exported with, and their tensors."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import pytest
import torch
from c_library import STATUSES, Config, Explained, Library, fresh_library
from c_refusals import PAGES, SHARING, STEP, VALID, far_apart, nothing_happened, sizes_of
from cases import Step, make_step

from gqa_cutlass.codegen.schema import public
from gqa_cutlass.codegen.schema.policies import CALL

FEATURES: dict[str, dict[str, Any]] = {  # that the library has no kernels for
    "softcap": dict(softcap=30),
    "sinks": dict(sinks=0x10000, sinks_type=2),
    "window": dict(window=29),
    "alibi_slopes": dict(alibi_slopes=0x10000, alibi_batch_stride=8),
    "cache_leftpad": dict(cache_leftpad=0x10000),
    "cache_batch_idx": dict(cache_batch_idx=0x10000, cache_rows=9),
    "output_float32": dict(output_float32=1),
    "block_table": dict(block_table=0x10000, page_size=15, max_pages=2, num_pages=4),
    "num_tokens": dict(num_tokens=2),
    "tree_mask": dict(num_tokens=2, tree_mask=0x10000),
    "q_norm_weight": dict(k_norm_weight=0x10000),
    "rotary_cos": dict(rotary_cos=0x10000, rotary_sin=0x20000, rotary_positions=30),
    "window, softcap, sinks": dict(softcap=30, sinks=0x10000, window=1),
}


@pytest.fixture
def library() -> Library:
    """As in a new process."""
    return fresh_library()


@pytest.fixture
def step() -> Step:
    """A step of two sequences of which the library has the kernel, and which needs no workspace."""
    return make_step(**STEP)


@pytest.fixture
def overflow() -> torch.Tensor:
    """Where a sequence that does not fit is reported."""
    return torch.zeros(1, dtype=torch.int32)


@pytest.mark.parametrize(("names", "changes"), FEATURES.items(), ids=FEATURES)
def test_features_that_were_not_exported_are_unsupported_and_named(
    library: Library, names: str, changes: dict[str, Any]
) -> None:
    config = Config(**VALID | changes)
    calls: list[Callable[[], int]] = [
        lambda: library.c.gqa_explain(config, b"sm_90a", 132, 0, Explained()),
        lambda: library.c.gqa_workspace_size(config, ctypes.c_size_t()),
        lambda: library.c.gqa_prepare(config),
    ]
    for call in calls:
        assert STATUSES[call()] == "GQA_ERROR_UNSUPPORTED"
        assert nothing_happened(library, f"no kernel with {names} for float16, head_dim 64, ")


def test_nothing_of_the_schema_is_missing_here() -> None:
    assert {*FEATURES, "cache_type", "scales_of_tokens"} >= set(public.ASKED_BY.values())
    assert set(SHARING) == {row.field for row in CALL.rows if row.feature in public.ASKED_BY}


def test_what_asks_for_nothing_is_launched(library: Library, step: Step) -> None:
    """A negative zero, types without tensors, and a window that hides nothing."""
    for changes in (
        dict(softcap=-0.0), dict(sinks_type=2), dict(alibi_batch_stride=8), dict(cache_rows=2),
        dict(window=30), dict(window=2**31 - 1),
    ):  # fmt: skip
        assert library.decode(step, Config(**VALID | changes)) == "GQA_SUCCESS", library.error


@pytest.mark.parametrize("target", ["output", "kv_cache_k", "kv_cache_v"])
@pytest.mark.parametrize("name", SHARING)
def test_what_features_read_may_not_be_written_to(
    library: Library, step: Step, overflow: torch.Tensor, name: str, target: str
) -> None:
    changes, size = SHARING[name]
    given, sizes = far_apart(step), sizes_of(step, in_8_bits="cache_type" in SHARING[name][0])
    start, end = given[target], given[target] + sizes[target]
    message = f"{target}: got memory that {name} also" if target == "output" else (
        f"{name}: got memory of {target}, to which"
    )  # fmt: skip
    one = 8 if name == "slot_mapping" else 4
    for shared in (start, end - one, start - size + one):
        config = Config(**VALID | changes | {name: shared})
        status = library.decode_ragged(step, overflow, config, **given)
        assert status == "GQA_ERROR_INVALID_VALUE"
        assert nothing_happened(library, message)
    for beside in (end, start - size):
        config = Config(**VALID | changes | {name: beside})
        # Checked, and then not found: this library has plain kernels.
        assert library.decode_ragged(step, overflow, config, **given) == "GQA_ERROR_UNSUPPORTED"


def test_the_rows_of_a_table_reach_as_far_as_their_stride(
    library: Library, step: Step, overflow: torch.Tensor
) -> None:
    """Of three rows, by an index; and all pages are written to."""
    given = far_apart(step)
    asked = PAGES | dict(
        block_table_stride=10, cache_batch_idx=1 << 50, cache_rows=3, max_seq_len=0
    )
    reach = 4 * (2 * 10 + 2)
    for shared, found in ((reach - 4, "INVALID_VALUE"), (reach, "UNSUPPORTED")):
        table = given["output"] - shared
        status = library.decode_ragged(
            step, overflow, Config(**VALID | asked | dict(block_table=table)), **given
        )
        assert status == f"GQA_ERROR_{found}"
    longest = asked | dict(block_table=1 << 52, page_size=16, max_pages=2**26)
    status = library.decode_ragged(step, overflow, Config(**VALID | longest), **given)
    assert status == "GQA_ERROR_UNSUPPORTED"  # as many tokens as are allowed
    size = 5 * 15 * 2 * 64 * 2
    config = Config(**VALID | asked | dict(block_table=1 << 52, num_pages=5))
    given["q"] = given["kv_cache_k"] + size - 2
    assert library.decode_ragged(step, overflow, config, **given) == "GQA_ERROR_INVALID_VALUE"
    assert nothing_happened(library, "q: got memory of kv_cache_k, to which the new token")
    given["q"] += 2
    assert library.decode_ragged(step, overflow, config, **given) == "GQA_ERROR_UNSUPPORTED"
    assert nothing_happened(library, "no kernel with cache_batch_idx, block_table for float16")


def test_the_rows_of_an_index_are_all_written_to(
    library: Library, step: Step, overflow: torch.Tensor
) -> None:
    given, rows = far_apart(step), 5
    size = sizes_of(step)["kv_cache_k"] // 2 * rows
    config = Config(**VALID | dict(cache_batch_idx=1 << 50, cache_rows=rows))
    given["q"] = given["kv_cache_k"] + size - 2
    assert library.decode_ragged(step, overflow, config, **given) == "GQA_ERROR_INVALID_VALUE"
    assert nothing_happened(library, "q: got memory of kv_cache_k, to which the new token")
    given["q"] += 2
    assert library.decode_ragged(step, overflow, config, **given) == "GQA_ERROR_UNSUPPORTED"
