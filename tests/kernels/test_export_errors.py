"""What the C library refuses: the status, a message that says what, got, allowed and remedy, and
nothing launched."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from c_library import (
    STATUSES,
    Config,
    Explained,
    Library,
    addresses_of,
    config_of,
    fresh_library,
    workspace_of,
)
from c_refusals import CLUSTERS, STEP, VALID, far_apart, nothing_happened, sizes_of
from cases import Step, make_step

import gqa_cutlass

PAGED: dict[str, Any] = dict(block_table=0x10000, page_size=15, max_pages=2, num_pages=4)
BAD_FIELDS: dict[str, tuple[dict[str, Any], str]] = {
    "batch_size 0": (dict(batch_size=0), "batch_size: got 0; allowed: 1 to 65535"),
    "batch_size -1": (dict(batch_size=-1), "batch_size: got -1; allowed: 1 to 65535"),
    "batch_size 65536": (dict(batch_size=65536), "batch_size: got 65536; allowed: 1 to 65535"),
    "max_seq_len 0": (dict(max_seq_len=0), "max_seq_len: got 0; allowed: 1 to 1073741824"),
    "max_seq_len 2^30+1": (
        dict(max_seq_len=2**30 + 1), "max_seq_len: got 1073741825; allowed: 1 to 1073741824",
    ),
    "cache_len -1": (dict(cache_len=-1), "cache_len: got -1; allowed: 0 to 29"),
    "head_dim 0": (dict(head_dim=0), "head_dim: got 0; allowed: multiples of 8 from 32 to 256"),
    "head_dim -64": (dict(head_dim=-64), "head_dim: got -64; allowed: multiples of 8 from 32"),
    "head_dim 24": (dict(head_dim=24), "head_dim: got 24; allowed: multiples of 8 from 32 to 256"),
    "head_dim 68": (dict(head_dim=68), "head_dim: got 68; allowed: multiples of 8 from 32 to 256"),
    "head_dim 264": (dict(head_dim=264), "head_dim: got 264; allowed: multiples of 8 from 32"),
    "no KV heads": (dict(num_kv_heads=0), "heads: got 8 query heads and 0 KV heads; allowed: a"),
    "no query heads": (dict(num_q_heads=0), "heads: got 0 query heads and 2 KV heads; allowed: a"),
    "negative heads": (
        dict(num_q_heads=-8, num_kv_heads=-2), "heads: got -8 query heads and -2 KV heads; allowed",
    ),
    "heads that do not divide": (
        dict(num_q_heads=9), "heads: got 9 query heads and 2 KV heads; allowed: a number of query",
    ),
    "large groups": (
        dict(num_q_heads=2050), "query heads per KV head: got 1025; allowed: 1 to 1024",
    ),
    "scale inf": (dict(scale=float("inf")), "scale: got inf; allowed: a number from -1e+38 to 1e"),
    "scale nan": (dict(scale=float("nan")), "scale: got nan; allowed: a number from -1e+38 to 1e"),
    "scale 2e38": (dict(scale=2e38), "scale: got 2e+38; allowed: a number from -1e+38 to 1e+38"),
    "scale -2e38": (dict(scale=-2e38), "scale: got -2e+38; allowed: a number from -1e+38 to 1e+38"),
    "caches of 2^51 bytes": (
        dict(batch_size=2**13, max_seq_len=2**30),
        "sizes: got caches of 2.252e+15 bytes; allowed: up to 1.407e+14",
    ),
    "dtype 2": (dict(dtype=2), "dtype: got 2; allowed: GQA_FLOAT16 (0), GQA_BFLOAT16 (1)"),
    "dtype -1": (dict(dtype=-1), "dtype: got -1; allowed: GQA_FLOAT16 (0), GQA_BFLOAT16 (1)"),
    "softcap -1": (dict(softcap=-1), "softcap: got -1; allowed: 0 (none), or a number up to 1e+37"),
    "softcap nan": (dict(softcap=math.nan), "softcap: got nan; allowed: 0 (none), or a number up"),
    "softcap inf": (dict(softcap=math.inf), "softcap: got inf; allowed: 0 (none), or a number up"),
    "softcap 1e38": (dict(softcap=1e38), "softcap: got 1e+38; allowed: 0 (none), or a number up"),
    "softcap subnormal": (
        dict(softcap=1e-39, scale=0),
        "softcap: got 1e-39; allowed: 0 (none), or 1.18e-38 and more with this scale.",
    ),
    "softcap small for the scale": (
        dict(softcap=0.5, scale=1e37), "softcap: got 0.5; allowed: 0 (none), or 1 and more with t",
    ),
    "equal_lengths 2": (dict(equal_lengths=2), "equal_lengths: got 2; allowed: 0 to 1"),
    "output_float32 -1": (dict(output_float32=-1), "output_float32: got -1; allowed: 0 to 1"),
    **{
        f"head_dim_v {value}": (
            dict(head_dim_v=value),
            f"head_dim_v: got {value}; allowed: multiples of 8 from 32 to 256",
        )
        for value in (-64, 24, 68, 264)
    },
    "values of 2^48 bytes": (
        dict(head_dim=32, head_dim_v=256, batch_size=2**15, max_seq_len=2**23),
        "sizes: got caches of 2.815e+14 bytes; allowed: up to 1.407e+14",
    ),
    "dependent -1": (dict(dependent=-1), "dependent: got -1; allowed: 0 to 1"),
    "window -1": (dict(window=-1), "window: got -1; allowed: 0 to 2147483647"),
    "sinks_type 3": (
        dict(sinks_type=3),
        "sinks_type: got 3; allowed: GQA_FLOAT16 (0), GQA_BFLOAT16 (1), GQA_FLOAT32 (2)",
    ),
    "sinks_type -1": (dict(sinks_type=-1), "sinks_type: got -1; allowed: GQA_FLOAT16 (0), "),
    "sinks between elements": (
        dict(sinks=0x10001), "sinks: got address 0x10001; allowed: multiples of 2.",
    ),
    "float32 sinks between elements": (
        dict(sinks=0x10002, sinks_type=2), "sinks: got address 0x10002; allowed: multiples of 4.",
    ),
    "slopes between elements": (
        dict(alibi_slopes=0x10002), "alibi_slopes: got address 0x10002; allowed: multiples of 4.",
    ),
    "slopes of another stride": (
        dict(alibi_slopes=0x10000, alibi_batch_stride=4),
        "alibi_batch_stride: got 4; allowed: 0 (the same slopes for all sequences), or num_q_heads",
    ),
    "padding between elements": (
        dict(cache_leftpad=0x10001), "cache_leftpad: got address 0x10001; allowed: multiples of 4.",
    ),
    "an index between elements": (
        dict(cache_batch_idx=0x10002), "cache_batch_idx: got address 0x10002; allowed: multiples ",
    ),
    "negative rows": (
        dict(cache_batch_idx=0x10000, cache_rows=-1), "cache_rows: got -1; allowed: 0 to 214748364",
    ),
    "rows without an index": (
        dict(cache_rows=3),
        "cache_rows: got 3 without cache_batch_idx; allowed: 0, or batch_size, 2. Nothing was ",
    ),
    "rows of 2^50 bytes": (
        dict(cache_batch_idx=0x10000, cache_rows=2**31 - 1, max_seq_len=2**12),
        "sizes: got caches of 2.252e+15 bytes; allowed: up to 1.407e+14",
    ),
    "pages of no token": (
        dict(PAGED, page_size=0), "page_size: got 0; allowed: 1 to 1073741824",
    ),
    "pages of -1 tokens": (dict(PAGED, page_size=-1), "page_size: got -1; allowed: 1 to 1073"),
    "no pages": (dict(PAGED, num_pages=0), "num_pages: got 0; allowed: 1 to 2147483647"),
    "a table of no columns": (
        dict(PAGED, max_pages=0),
        "max_pages: got 0 pages per sequence, of 15 tokens; allowed: 1 to 1073741824 tokens per s",
    ),
    "a table of more tokens than fit into an int32": (
        dict(PAGED, max_pages=2**30, page_size=2**30),
        "max_pages: got 1073741824 pages per sequence, of 1073741824 tokens; allowed: 1 to 1073741",
    ),
    "a table of more tokens than a sequence may have": (
        dict(PAGED, max_pages=2**26 + 1, page_size=16, max_seq_len=0),
        "max_pages: got 67108865 pages per sequence, of 16 tokens; allowed: 1 to 1073741824 token",
    ),
    "another length than that of all pages": (
        dict(PAGED, max_seq_len=29),
        "max_seq_len: got 29 with block_table; allowed: 0, or max_pages * page_size, 30. Nothing",
    ),
    "a table's negative stride": (
        dict(PAGED, block_table_stride=-2), "block_table_stride: got -2; allowed: 0 to 35184372088",
    ),
    "a table of 2^63 bytes": (
        dict(PAGED, block_table_stride=2**61),
        "block_table: got 9.223e+18 bytes from its first entry to its last; allowed: up to 1.407e",
    ),
    "pools of 2^50 bytes": (
        dict(PAGED, num_pages=2**31 - 1, page_size=2**12, max_pages=1, max_seq_len=0),
        "sizes: got caches of 2.252e+15 bytes; allowed: up to 1.407e+14",
    ),
    "a table between elements": (
        dict(PAGED, block_table=0x10002), "block_table: got address 0x10002; allowed: multiples ",
    ),
    "slots between elements": (
        dict(PAGED, slot_mapping=0x10004), "slot_mapping: got address 0x10004; allowed: multiple",
    ),
    "slots without a table": (
        dict(slot_mapping=0x10000),
        "slot_mapping: got 0x10000 without block_table; allowed: null. Nothing was launched. Pass ",
    ),
    **{
        f"{name} without a table": (
            {name: 3}, f"{name}: got 3 without block_table; allowed: 0. Nothing was launched. Pass",
        )
        for name in ("page_size", "max_pages", "num_pages", "block_table_stride")
    },
    "pages with one length for all": (
        PAGED, "block_table: got 0x10000 with one length for all; allowed: null, or lengths on the",
    ),
    "an index with one length for all": (
        dict(cache_batch_idx=0x10000),
        "cache_batch_idx: got 0x10000 with one length for all; allowed: null, or lengths on the ",
    ),
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


def test_what_is_valid_is_launched(library: Library, step: Step, overflow: torch.Tensor) -> None:
    config = Config(**VALID)
    assert library.decode(step, config) == "GQA_SUCCESS"
    assert library.decode_ragged(step, overflow, config) == "GQA_SUCCESS"
    assert library.driver.launches == 2
    assert library.error == ""


@pytest.mark.parametrize(("changes", "message"), BAD_FIELDS.values(), ids=BAD_FIELDS)
def test_a_bad_field_is_refused(
    library: Library, step: Step, changes: dict[str, Any], message: str
) -> None:
    assert library.decode(step, Config(**VALID | changes)) == "GQA_ERROR_INVALID_VALUE"
    assert nothing_happened(library, f"config: {message}")
    assert library.driver.all_calls() == {}


@pytest.mark.parametrize("field", ["batch_size", "head_dim", "dtype", "max_seq_len"])
def test_every_function_checks_the_configuration(
    library: Library, step: Step, overflow: torch.Tensor, field: str
) -> None:
    config, size = Config(**VALID | {field: -1}), ctypes.c_size_t(77)
    assert library.decode_ragged(step, overflow, config) == "GQA_ERROR_INVALID_VALUE"
    calls: list[Callable[[], int]] = [
        lambda: library.c.gqa_workspace_size(config, size),
        lambda: library.c.gqa_prepare(config),
        lambda: library.c.gqa_explain(config, b"sm_90a", 132, 0, Explained()),
    ]
    for call in calls:
        assert STATUSES[call()] == "GQA_ERROR_INVALID_VALUE"
        assert nothing_happened(library, f"config: {field}: got -1; allowed: ")
    assert size.value == 77


@pytest.mark.parametrize("name", ["output", "q", "k", "v", "kv_cache_k", "kv_cache_v"])
def test_a_null_tensor_is_refused(library: Library, step: Step, name: str) -> None:
    cache = 2 * 30 * 2 * 64 * 2
    size = {"output": 2048, "q": 2048, "k": 512, "v": 512}.get(name, cache)
    assert library.decode(step, **{name: None}) == "GQA_ERROR_NULL_POINTER"
    assert nothing_happened(library, f"{name}: got null; needed: device memory of {size} bytes")


@pytest.mark.parametrize(("name", "size"), [("cache_seqlens", 8), ("overflow", 4)])
def test_null_lengths_are_refused(
    library: Library, step: Step, overflow: torch.Tensor, name: str, size: int
) -> None:
    assert library.decode_ragged(step, overflow, **{name: None}) == "GQA_ERROR_NULL_POINTER"
    assert nothing_happened(library, f"{name}: got null; needed: device memory of {size} bytes")


def test_a_null_configuration_is_refused(library: Library, step: Step) -> None:
    tensors = addresses_of(step).values()
    lengths = step.seqlens.data_ptr()
    calls: list[Callable[[], int]] = [
        lambda: library.c.gqa_attention_decode(*tensors, None, None),
        lambda: library.c.gqa_attention_decode_ragged(*tensors, lengths, lengths, None, None),
        lambda: library.c.gqa_workspace_size(None, ctypes.c_size_t()),
        lambda: library.c.gqa_prepare(None),
        lambda: library.c.gqa_explain(None, b"sm_90a", 132, 0, Explained()),
    ]
    for call in calls:
        assert STATUSES[call()] == "GQA_ERROR_NULL_POINTER"
        assert nothing_happened(library, "config: got null; needed: a GQADecodeConfig.")


def test_null_results_are_refused(library: Library) -> None:
    config, explain = Config(**VALID), library.c.gqa_explain
    calls: list[tuple[Callable[[], int], str]] = [
        (lambda: library.c.gqa_workspace_size(config, None), "bytes: got null; needed: where to"),
        (lambda: explain(config, None, 132, 0, Explained()), "got null; needed: both"),
        (lambda: explain(config, b"sm_90a", 132, 0, None), "got null; needed: both"),
    ]
    for call, message in calls:
        assert STATUSES[call()] == "GQA_ERROR_NULL_POINTER"
        assert message in library.error


@pytest.mark.parametrize("name", ["output", "q", "k", "v", "kv_cache_k", "kv_cache_v"])
def test_an_odd_address_is_refused(library: Library, step: Step, name: str) -> None:
    odd = addresses_of(step)[name] + 1
    assert library.decode(step, **{name: odd}) == "GQA_ERROR_INVALID_VALUE"
    assert nothing_happened(library, f"{name}: got address {odd:#x}; allowed: multiples of 2.")


@pytest.mark.parametrize("name", ["cache_seqlens", "overflow"])
def test_lengths_between_words_are_refused(
    library: Library, step: Step, overflow: torch.Tensor, name: str
) -> None:
    given = {"cache_seqlens": step.seqlens.data_ptr(), "overflow": overflow.data_ptr()}
    off = given[name] + 2
    assert library.decode_ragged(step, overflow, **{name: off}) == "GQA_ERROR_INVALID_VALUE"
    assert nothing_happened(library, f"{off:#x}", "allowed: multiples of 4.")


@pytest.mark.parametrize("name", ["q", "k", "v", "kv_cache_k", "kv_cache_v"])
def test_an_output_that_shares_memory_is_refused(library: Library, step: Step, name: str) -> None:
    given, sizes = far_apart(step), sizes_of(step)
    start, end = given[name], given[name] + sizes[name]
    for shared in (start, end - 2, start - sizes["output"] + 2):
        assert library.decode(step, **given | {"output": shared}) == "GQA_ERROR_INVALID_VALUE"
        assert nothing_happened(library, f"output: got memory that {name} also uses; allowed: ")
    for beside in (end, start - sizes["output"]):
        assert library.decode(step, **given | {"output": beside}) == "GQA_SUCCESS"


def test_caches_that_share_memory_are_refused(library: Library, step: Step) -> None:
    given, size = far_apart(step), sizes_of(step)["kv_cache_k"]
    start = given["kv_cache_k"]
    for shared in (start, start + size - 2, start - size + 2):
        assert library.decode(step, **given | {"kv_cache_v": shared}) == "GQA_ERROR_INVALID_VALUE"
        assert nothing_happened(library, "kv_cache_v: got memory that kv_cache_k also uses; allow")
    for beside in (start + size, start - size):
        assert library.decode(step, **given | {"kv_cache_v": beside}) == "GQA_SUCCESS"


@pytest.mark.parametrize("cache", ["kv_cache_k", "kv_cache_v"])
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_what_is_read_may_not_lie_in_a_cache(
    library: Library, step: Step, name: str, cache: str
) -> None:
    given, sizes = far_apart(step), sizes_of(step)
    start, end = given[cache], given[cache] + sizes[cache]
    for shared in (start, end - 2, start - sizes[name] + 2):
        assert library.decode(step, **given | {name: shared}) == "GQA_ERROR_INVALID_VALUE"
        assert nothing_happened(library, f"{name}: got memory of {cache}, to which the new token")
    for beside in (end, start - sizes[name]):
        assert library.decode(step, **given | {name: beside}) == "GQA_SUCCESS"


@pytest.mark.parametrize("cache", ["kv_cache_k", "kv_cache_v"])
def test_lengths_may_not_lie_in_a_cache(
    library: Library, step: Step, overflow: torch.Tensor, cache: str
) -> None:
    given, sizes = far_apart(step), sizes_of(step)
    start, end = given[cache], given[cache] + sizes[cache]
    for shared in (start, end - 4, start - 4):
        given["cache_seqlens"] = shared
        assert library.decode_ragged(step, overflow, **given) == "GQA_ERROR_INVALID_VALUE"
        assert nothing_happened(library, f"cache_seqlens: got memory of {cache}, to which the new")
    for beside in (end, start - 8):
        given["cache_seqlens"] = beside
        assert library.decode_ragged(step, overflow, **given) == "GQA_SUCCESS"


def test_an_output_over_the_lengths_is_refused(
    library: Library, step: Step, overflow: torch.Tensor
) -> None:
    given, size = far_apart(step), sizes_of(step)["output"]
    start = given["output"]
    for shared in (start, start + size - 4, start - 4):
        given["cache_seqlens"] = shared
        assert library.decode_ragged(step, overflow, **given) == "GQA_ERROR_INVALID_VALUE"
        assert nothing_happened(library, "output: got memory that cache_seqlens also uses; allowed")
    for beside in (start + size, start - 8):
        given["cache_seqlens"] = beside
        assert library.decode_ragged(step, overflow, **given) == "GQA_SUCCESS"


def test_a_workspace_is_refused_that_is_missing_small_or_misaligned(library: Library) -> None:
    step = make_step(**CLUSTERS)
    chosen = gqa_cutlass.plan(*step.tensors(), cache_seqlens=3, out=step.out).dispatch
    workspace = workspace_of(chosen)
    assert workspace is not None
    needed, address = 4 * workspace.numel(), workspace.data_ptr()
    config = config_of(step, workspace)
    for given, size, message in (
        (None, needed, f"workspace: got {needed} bytes at (nil); needed: {needed} bytes of zeroed"),
        (None, 0, f"workspace: got 0 bytes at (nil); needed: {needed} bytes of zeroed device"),
        (address, needed - 1, f"got {needed - 1} bytes at {address:#x}; needed: {needed} bytes"),
        (address + 8, needed, f"got address {address + 8:#x}; allowed: multiples of 16"),
    ):
        config.workspace, config.workspace_size = given, size
        assert library.decode(step, config) == "GQA_ERROR_WORKSPACE"
        assert nothing_happened(library, message)
    config.workspace, config.workspace_size = address, needed
    assert library.decode(step, config) == "GQA_SUCCESS"


def test_a_workspace_that_is_not_needed_is_not_looked_at(library: Library, step: Step) -> None:
    config = Config(**VALID, workspace=1, workspace_size=1)
    assert library.decode(step, config) == "GQA_SUCCESS"
    argument = library.driver.last_launch().argument
    assert argument["split_workspace"] is argument["merge_counters"] is None


@pytest.mark.parametrize(
    ("changes", "fragments"),
    [
        (dict(num_q_heads=6), ("float16", "head_dim 64, 3 query heads per KV head")),
        (dict(num_q_heads=6, dtype=1), ("bfloat16", "head_dim 64, 3 query heads per KV head")),
        (dict(head_dim=72), ("float16", "head_dim 72, 4 query heads per KV head")),
    ],
    ids=["group", "bfloat16", "head_dim"],
)
def test_what_was_not_exported_is_unsupported(
    library: Library, changes: dict[str, Any], fragments: tuple[str, ...]
) -> None:
    config = Config(**VALID | changes)
    calls: list[Callable[[], int]] = [
        lambda: library.c.gqa_explain(config, b"sm_90a", 132, 0, Explained()),
        lambda: library.c.gqa_workspace_size(config, ctypes.c_size_t()),
        lambda: library.c.gqa_prepare(config),
    ]
    for call in calls:
        assert STATUSES[call()] == "GQA_ERROR_UNSUPPORTED"
        assert nothing_happened(library, *fragments, "rows aligned to 16 bytes, on sm_90a")
        assert f"exported with {len(library.kernels)} kernels" in library.error
        assert "Export one that has it: gqa-cutlass export --kernels" in library.error


def test_more_merges_than_there_are_counters_are_unsupported(library: Library) -> None:
    config = Config(**VALID | dict(max_seq_len=8192))
    for batch_size, status in ((8192, "GQA_SUCCESS"), (8193, "GQA_ERROR_UNSUPPORTED")):
        config.batch_size = batch_size
        found = library.c.gqa_explain(config, b"sm_80", 2**20, 0, Explained())
        assert STATUSES[found] == status
    assert nothing_happened(library, "16386 merges in one launch; allowed: 16384.")


def test_what_cannot_be_explained_is_refused(library: Library) -> None:
    config = Config(**VALID)
    for arch, num_sms, message in (
        (b"sm_70", 132, "arch: got sm_70; allowed: what was exported, sm_80 for instance."),
        (b"sm_100f", 132, "arch: got sm_100f; allowed: what was exported, sm_80 for instance."),
        (b"x" * 500, 132, "arch: got " + 32 * "x" + "; allowed"),
        (b"sm_80", 0, "num_sms: got 0; allowed: 1 to 2147483647"),
        (b"sm_80", -1, "num_sms: got -1; allowed: 1 to 2147483647"),
    ):
        status = library.c.gqa_explain(config, arch, num_sms, 0, Explained())
        assert STATUSES[status] == "GQA_ERROR_INVALID_VALUE"
        assert message in library.error


def test_explaining_needs_no_driver(library: Library) -> None:
    library.driver.remove()
    assert library.explain(Config(**VALID), "sm_80", 108).kernel.decode() in library.kernels
    assert library.driver.all_calls() == {}
