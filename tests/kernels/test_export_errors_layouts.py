"""Strides and memory for the log-sum-exp that the C library refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from c_library import Config, Library, fresh_library
from c_refusals import SHARING, STEP, VALID, far_apart, nothing_happened, sizes_of
from cases import Step, make_step

from gqa_cutlass.codegen.schema import public

STRIDES = [f"{name}_{dim}_stride" for name, dims in public.STRIDED.items() for dim in dims]
PAGED = dict(block_table=0x10000, page_size=30, max_pages=1, num_pages=1)
# Of two sequences, eight and two heads of 64, caches of 30 tokens.
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    **{f"negative {name}": ({name: -1}, f"{name}: got -1; allowed: 0 to 70368744177664")
       for name in STRIDES},
    "heads of an output": (
        dict(output_head_stride=63),
        "strides: got output with 512 elements between sequences and 63 between heads of 64; "
        "allowed: elements that do not share memory, and 0 for strides of contiguous memory.",
    ),
    "sequences of q": (dict(q_batch_stride=511), "strides: got q with 511 elements between seq"),
    "a new token": (dict(k_head_stride=128), "strides: got k with 128 elements between sequences "),
    "values of a new token": (dict(v_batch_stride=64), "strides: got v with 64 elements between s"),
    "tokens of a cache": (
        dict(kv_cache_k_token_stride=127),
        "strides: got kv_cache_k with 3840 elements between sequences, 127 between tokens and 64 b",
    ),
    "heads of a cache": (
        dict(kv_cache_v_head_stride=64 * 29, kv_cache_v_token_stride=64),
        "strides: got kv_cache_v with 3840 elements between sequences, 64 between tokens and 1856 ",
    ),
    "sequences of a cache": (
        dict(kv_cache_v_token_stride=256), "strides: got kv_cache_v with 3840 elements between seq",
    ),
    "a cache of 2^60 bytes": (
        dict(kv_cache_k_batch_stride=2**59),
        "strides: got kv_cache_k with 1.153e+18 bytes from its first element to its last; allowed:",
    ),
    "strides whose sums overflow": (
        dict(q_batch_stride=2**63 - 1, q_head_stride=2**63 - 1),
        "strides: got q with 1.476e+20 bytes from its first element to its last; allowed: up to 1",
    ),
    "pages of a pool": (
        dict(PAGED, kv_cache_v_batch_stride=3839, num_pages=2),
        "strides: got kv_cache_v with 3839 elements between pages, 128 between tokens and 64 betw",
    ),
    "an lse between elements": (dict(lse=0x10002), "lse: got address 0x10002; allowed: multiples "),
}  # fmt: skip


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


@pytest.mark.parametrize(("changes", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_layout_is_refused(
    library: Library, step: Step, changes: dict[str, Any], message: str
) -> None:
    assert library.decode(step, Config(**VALID | changes)) == "GQA_ERROR_INVALID_VALUE"
    assert nothing_happened(library, f"config: {message}")
    assert library.driver.all_calls() == {}


def test_strides_that_leave_no_gap_are_launched(library: Library, step: Step) -> None:
    """What contiguous memory has, said aloud, and heads before tokens."""
    given = far_apart(step)
    packed = dict(
        zip(STRIDES, (512, 64, 512, 64, 128, 64, 128, 64, *(3840, 128, 64) * 2), strict=True)
    )
    turned = {f"kv_cache_{x}_token_stride": 64 for x in "kv"} | {
        f"kv_cache_{x}_head_stride": 64 * 30 for x in "kv"
    }
    for changes in (packed, turned):
        assert library.decode(step, Config(**VALID | changes), **given) == "GQA_SUCCESS"
        launched = library.driver.last_launch()
    assert launched.argument["k_cache_stride.head"] == 64 * 30
    assert launched.argument["q_stride.batch"] == 512


def test_values_and_outputs_of_their_own_sizes(library: Library, step: Step) -> None:
    """Of 80 elements, or of four bytes: what they need, and what they may not share."""
    given = far_apart(step)
    unlike, float32 = (
        Config(**VALID | dict(head_dim_v=80)),
        Config(**VALID | dict(output_float32=1)),
    )
    for config, sizes in (
        (unlike, dict(output=2560, q=2048, k=512, v=640, kv_cache_k=15360, kv_cache_v=19200)),
        (float32, dict(output=4096, q=2048, k=512, v=512, kv_cache_k=15360, kv_cache_v=15360)),
    ):
        for name, size in sizes.items():
            assert library.decode(step, config, **{name: None}) == "GQA_ERROR_NULL_POINTER"
            assert nothing_happened(library, f"{name}: got null; needed: device memory of {size} ")
        given["q"] = given["output"] + sizes["output"] - 2
        assert library.decode(step, config, **given) == "GQA_ERROR_INVALID_VALUE"
        assert nothing_happened(library, "output: got memory that q also uses")
    given = far_apart(step)
    given["output"] += 2
    assert library.decode(step, float32, **given) == "GQA_ERROR_INVALID_VALUE"
    assert nothing_happened(library, "output: got address 0x10000000002; allowed: multiples of 4.")
    given["output"] += 2
    assert library.decode(step, float32, **given) == "GQA_ERROR_UNSUPPORTED"
    assert "no kernel with output_float32 for float16, head_dim 64, 4 query heads" in library.error
    assert "rows aligned to 4 bytes" in library.error
    other = Config(**VALID | dict(head_dim_v=96))
    assert library.decode(step, other, **far_apart(step)) == "GQA_ERROR_UNSUPPORTED"
    assert nothing_happened(library, "for float16, head_dim 64 and of values 96, 4 query heads")


def test_a_stride_without_a_narrow_kernel_is_unsupported(library: Library) -> None:
    step = make_step(**STEP | dict(group_size=7))
    for name, width in (("q", 4), ("kv_cache_k", 2), ("output", 1)):
        heads = 14 if name in ("q", "output") else 2
        pitch = 64 + width
        strides = dict(head=pitch, batch=pitch * heads) if heads == 14 else dict(
            head=pitch, token=2 * pitch, batch=60 * pitch
        )  # fmt: skip
        changes = {f"{name}_{dim}_stride": stride for dim, stride in strides.items()}
        config = Config(**VALID | dict(num_q_heads=14) | changes)
        assert library.decode(step, config, **far_apart(step)) == "GQA_ERROR_UNSUPPORTED"
        assert nothing_happened(library, f"7 query heads per KV head, rows aligned to {2 * width} ")


def test_keys_and_values_of_one_buffer_are_told_apart(library: Library, step: Step) -> None:
    """By rows of both: keys, then values; and not where they meet by an element."""
    given = far_apart(step)
    both = {f"kv_cache_{x}_{dim}_stride": 2 * size for x in "kv"
            for dim, size in (("batch", 3840), ("token", 128))}  # fmt: skip
    start = given["kv_cache_k"]
    for beside in (128, -128, 256 * 59 + 128):
        given["kv_cache_v"] = start + 2 * beside
        assert library.decode(step, Config(**VALID | both), **given) == "GQA_SUCCESS"
    launches = library.driver.launches
    for shared in (0, 126, 130, -126, 256, 256 * 59):
        given["kv_cache_v"] = start + 2 * shared
        assert library.decode(step, Config(**VALID | both), **given) == "GQA_ERROR_INVALID_VALUE"
        assert nothing_happened(
            library, "kv_cache_v: got memory that kv_cache_k", launches=launches
        )


def test_what_is_read_may_lie_between_the_rows_of_an_output(library: Library, step: Step) -> None:
    given, strides = far_apart(step), dict(output_batch_stride=1024, output_head_stride=128)
    strides |= {name.replace("output", "q"): stride for name, stride in strides.items()}
    config = Config(**VALID | strides)
    given["q"] = given["output"] + 128
    assert library.decode(step, config, **given) == "GQA_SUCCESS"
    for shared in (126, 130):
        given["q"] = given["output"] + shared
        assert library.decode(step, config, **given) == "GQA_ERROR_INVALID_VALUE"
        assert nothing_happened(library, "output: got memory that q also uses", launches=1)


LSE_BYTES = 4 * 2 * 8


@pytest.mark.parametrize(
    "name", ["output", "q", "k", "v", "kv_cache_k", "kv_cache_v", "cache_seqlens", *SHARING]
)
def test_an_lse_that_shares_memory_is_refused(
    library: Library, step: Step, overflow: torch.Tensor, name: str
) -> None:
    given = far_apart(step) | dict(cache_seqlens=1 << 50)
    asked, size = SHARING.get(name, ({}, 8))
    if name in SHARING:
        asked = asked | {name: 1 << 51}
    start = (given | asked)[name]
    end = start + sizes_of(step).get(name, size)
    for shared in (start, end - 4, start - LSE_BYTES + 4):
        config = Config(**VALID | asked | dict(lse=shared))
        assert library.decode_ragged(step, overflow, config, **given) == "GQA_ERROR_INVALID_VALUE"
        assert nothing_happened(library, f"lse: got memory that {name} also uses; allowed: memory ")
    for beside in (end, start - LSE_BYTES):
        config = Config(**VALID | asked | dict(lse=beside))
        status = library.decode_ragged(step, overflow, config, **given)
        assert status == ("GQA_ERROR_UNSUPPORTED" if asked else "GQA_SUCCESS")
