"""Several tokens that the C library refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from c_library import Config, fresh_library
from c_refusals import STEP, VALID, far_apart, nothing_happened, sizes_of
from cases import make_step

ENDS: dict[str, Any] = dict(cu_seqlens_q=1 << 50, total_tokens=9, num_new_tokens=1)
NEW_ENDS: dict[str, Any] = dict(cu_seqlens_k_new=1 << 50, total_new_tokens=9)
INVALID: dict[str, tuple[dict[str, Any], str]] = {
    "negative": (dict(num_tokens=-1), "num_tokens: got -1; allowed: 1 to 256 per sequence, and 0"),
    "too many": (dict(num_tokens=257), "num_tokens: got 257; allowed: 1 to 256 per sequence, and"),
    "too many of all": (
        ENDS | dict(total_tokens=257),
        "num_tokens: got 0 with cu_seqlens_q; allowed: 1 to 256 per sequence, and 0 for total_tok",
    ),
    "negative new": (dict(num_new_tokens=-1), "num_new_tokens: got -1; allowed: 0 to 256."),
    "too many new": (dict(num_new_tokens=257), "num_new_tokens: got 257; allowed: 0 to 256."),
    "no room": (dict(num_tokens=31), "num_new_tokens: got 31; allowed: at most max_seq_len, 30."),
    "flag": (dict(not_causal=2), "not_causal: got 2; allowed: 0 to 1."),
    "negative window": (dict(not_causal=1, window_right=-1), "window_right: got -1; allowed: 0 to"),
    "causal window": (
        dict(num_tokens=2, window_right=3), "window_right: got 3 without not_causal; allowed: 0."
    ),
    "total": (dict(total_tokens=4), "total_tokens: got 4 without cu_seqlens_q; allowed: 0."),
    "new total": (
        dict(total_new_tokens=4), "total_new_tokens: got 4 without cu_seqlens_k_new; allowed: 0."
    ),
    "no total": (ENDS | dict(total_tokens=0), "total_tokens: got 0; allowed: 1 to 2147483647."),
    "no new ones": (
        ENDS | dict(num_new_tokens=0),
        "num_new_tokens: got 0 with cu_seqlens_q; allowed: 1 to 256, or cu_seqlens_k_new.",
    ),
    "both": (
        NEW_ENDS | dict(num_new_tokens=2), "num_new_tokens: got 2 with cu_seqlens_k_new; allowed: 0"
    ),
    "stride": (
        ENDS | dict(output_batch_stride=512),
        "output_batch_stride: got 512 with cu_seqlens_q; allowed: 0.",
    ),
    "new stride": (
        NEW_ENDS | dict(v_batch_stride=128),
        "v_batch_stride: got 128 with cu_seqlens_k_new; allowed: 0.",
    ),
    "negative stride": (dict(num_tokens=2, k_token_stride=-8), "k_token_stride: got -8; allowed: "),
    "shared elements": (
        dict(num_tokens=2, q_token_stride=64),
        "q with 1024 elements between sequences, 64 between tokens and 64 between heads of 64;",
    ),
    "drafts of unlike numbers": (
        NEW_ENDS | dict(tree_mask=1 << 51, num_tokens=2),
        "tree_mask: got one with cu_seqlens_k_new; allowed: as many drafts in every sequence.",
    ),
    "drafts that are not new": (
        dict(tree_mask=1 << 51, num_tokens=3, num_new_tokens=2),
        "tree_mask: got one with 3 queries and 2 new tokens; allowed: as many of both.",
    ),
    "sizes": (
        ENDS | dict(total_tokens=2**31 - 1, num_tokens=2, num_q_heads=512),
        "sizes: got tokens of 2.815e+14 bytes; allowed: up to 1.407e+14.",
    ),
    "aligned": (ENDS | dict(cu_seqlens_q=2), "cu_seqlens_q: got address 0x2; allowed: multiples"),
}  # fmt: skip


@pytest.mark.parametrize("name", INVALID)
def test_tokens_that_are_not_allowed_are_refused(name: str) -> None:
    changes, message = INVALID[name]
    library, step = fresh_library(), make_step(**STEP)
    flag = torch.zeros(1, dtype=torch.int32)
    status = library.decode_ragged(step, flag, Config(**VALID | changes), **far_apart(step))
    assert status == "GQA_ERROR_INVALID_VALUE"
    assert nothing_happened(library, f"config: {message}" if name != "shared elements" else message)


@pytest.mark.parametrize("asked", [ENDS, NEW_ENDS], ids=["queries", "new tokens"])
def test_an_index_of_ends_wants_lengths_on_the_device(asked: dict[str, Any]) -> None:
    library, step = fresh_library(), make_step(**STEP)
    status = library.decode(step, Config(**VALID | asked), **far_apart(step))
    assert status == "GQA_ERROR_INVALID_VALUE"
    name = next(iter(asked))
    assert nothing_happened(
        library, f"config: {name}: got 0x4000000000000 with one length for all; allowed: null, or",
        "which is told where to report an index that is out of order.",
    )  # fmt: skip


def test_one_token_asks_for_nothing() -> None:
    library, step = fresh_library(), make_step(**STEP)
    for changes in (
        dict(num_tokens=1), dict(num_new_tokens=1), dict(not_causal=1),
        dict(not_causal=1, window_right=3), dict(q_token_stride=8), dict(output_token_stride=1),
    ):  # fmt: skip
        assert library.decode(step, Config(**VALID | changes)) == "GQA_SUCCESS", library.error


@pytest.mark.parametrize("tensor", ["output", "q", "k", "v"])
def test_all_tokens_count_in_what_shares_memory(tensor: str) -> None:
    """Three of each sequence: the last byte lies in a cache, or none does."""
    library, step = fresh_library(), make_step(**STEP)
    size = 3 * sizes_of(step)[tensor]
    config = Config(**VALID | dict(num_tokens=3))
    for beyond, found in ((2, "INVALID_VALUE"), (0, "UNSUPPORTED")):
        given = far_apart(step)
        given[tensor] = given["kv_cache_k"] - size + beyond
        assert library.decode(step, config, **given) == f"GQA_ERROR_{found}"
        assert nothing_happened(library)


def test_a_mask_of_drafts_has_words_of_32() -> None:
    """Two sequences of 33 drafts have two words for each."""
    library, step = fresh_library(), make_step(**STEP)
    given, size = far_apart(step), 2 * 33 * 2 * 4
    asked = dict(num_tokens=33, max_seq_len=60)
    for mask, found in (
        (given["output"] - size + 4, "INVALID_VALUE"), (given["output"] - size, "UNSUPPORTED"),
    ):  # fmt: skip
        config = Config(**VALID | asked | dict(tree_mask=mask))
        assert library.decode(step, config, **given) == f"GQA_ERROR_{found}"
        assert nothing_happened(library)
