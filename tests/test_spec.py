"""What the story (LT-016) promises: docs/spec.md says of every line what proves it, and the unit
tests that the story asks for are here in its own words."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest
import torch
from cases import Step, make_step
from helpers import REPOSITORY, check
from torch import Tensor

from gqa_cutlass import CacheOverflowError, GQADecodeConfig, gqa_attention_decode, gqa_decode

PAGE = REPOSITORY / "docs" / "spec.md"

# The story's own lines.
STORY = {
    "Acceptance criteria": [
        "Implement GQA attention kernel for decode (single token)",
        "Read K, V from KV cache (all previous positions)",
        "Compute Q @ K_cache^T for current token",
        "Apply softmax to attention scores (no causal mask needed)",
        "Compute attention @ V_cache to get output",
        "Append current K, V to KV cache",
        "Support variable cache lengths (1 to max_seq_len)",
        "Optimize for low latency (single token)",
        "Unit tests validate decode attention",
        "Unit tests validate KV cache reading/writing",
        "Benchmark kernel latency (microseconds)",
        "Error handling for cache overflow",
        "Log kernel launch parameters at DEBUG level",
    ],
    "Dependencies": [
        "LT-015: GQA Attention Prefill (needs attention logic)",
        "FT-022: KV Cache Management (needs cache interface)",
        "LT-024: Qwen Forward Pass (needs decode attention)",
        "LT-031: Phi-3 Forward Pass (needs decode attention)",
    ],
    "Files": [
        "`bin/worker-orcd/cuda/kernels/gqa_attention_decode.cu` - GQA decode kernel",
        "`bin/worker-orcd/cuda/kernels/gqa_attention_decode.h` - Decode interface",
        "`bin/worker-orcd/src/kernels/gqa_attention.rs` - Rust FFI wrapper (extend)",
    ],
    "Interfaces": [
        "`struct GQADecodeConfig`",
        "`int batch_size;` Batch size (usually 1 for decode)",
        "`int cache_len;` Current cache length (1 to max_seq_len)",
        "`int num_q_heads;` Number of query heads",
        "`int num_kv_heads;` Number of KV heads",
        "`int head_dim;` Dimension per head",
        "`float scale;` 1.0 / sqrt(head_dim)",
        "`void gqa_attention_decode(...)`",
        "`half* output` [batch, 1, num_q_heads * head_dim]",
        "`const half* q` [batch, 1, num_q_heads, head_dim]",
        "`const half* k`, `const half* v` [batch, 1, num_kv_heads, head_dim] (current token)",
        "`half* kv_cache_k`, `half* kv_cache_v` [batch, max_seq_len, num_kv_heads, head_dim]",
        "`cudaStream_t stream = nullptr`",
        "`#[repr(C)] pub struct GQADecodeConfig`",
        '`extern "C" pub fn gqa_attention_decode(...)`',
    ],
    "Algorithm": [
        "1. Append current K, V to cache at position cache_len",
        "2. For each Q head:",
        "a. Determine KV head: kv_head = q_head / (num_q_heads / num_kv_heads)",
        "b. Compute scores: scores[j] = Q @ K_cache[j]^T * scale (j = 0..cache_len)",
        "c. Apply softmax: attn_weights = softmax(scores)",
        "d. Compute output: output = sum(attn_weights[j] * V_cache[j])",
        "`if (threadIdx.x == 0 && q_head == 0)` append",
        "`__syncthreads();` between the append and the scores",
        "`extern __shared__ float scores[];`",
    ],
    "Optimization": [
        "Use shared memory for Q (reused across all cache positions)",
        "Vectorize K/V cache reads (half2 or float4)",
        "Fuse cache append with attention computation",
        "Minimize synchronization overhead",
    ],
    "Unit tests": [
        "Test decode with cache_len=1 (first decode step)",
        "Test decode with cache_len=100 (mid-sequence)",
        "Test decode with cache_len=max_seq_len-1 (near end)",
        "Test KV cache append (verify correct position)",
        "Test attention score computation (Q @ K_cache^T)",
        "Test softmax normalization",
        "Test output computation (attn @ V_cache)",
    ],
    "Numerical validation": [
        "Compare against reference GQA decode (PyTorch)",
        "Tolerance: ±0.05 (attention accumulation errors)",
        "Test with random Q, K, V and populated cache",
    ],
    "Performance tests": [
        "Benchmark decode latency (microseconds per token)",
        "Measure cache read bandwidth",
        "Compare with prefill performance (should be faster)",
    ],
    "Manual verification": [
        "1. Run decode step with cache_len=10",
        "2. Verify output shape [batch, 1, num_q_heads * head_dim]",
        "3. Verify KV cache updated at position 10",
        "4. Check logs show kernel launch parameters",
    ],
    "Definition of done": [
        "All acceptance criteria met",
        "Code reviewed",
        "Unit tests passing (7+ tests)",
        "Numerical validation passing (±0.05 tolerance)",
        "Performance benchmarks recorded",
        "Documentation updated",
        "Story marked complete in day-tracker.md",
    ],
}
WITHOUT_TEST = {"Code reviewed", "Story marked complete in day-tracker.md"}

_REFERENCE = re.compile(r"`([\w.-]+(?:/[\w.-]+)*(?:/|\.[a-z]+))(?:::(\w+))?`")


def rows() -> dict[str, dict[str, list[str]]]:
    """The page's tables: by heading, the cells of each row behind the story's line."""
    found: dict[str, dict[str, list[str]]] = {}
    heading = ""
    for line in PAGE.read_text("utf-8").splitlines():
        if line.startswith("## "):
            heading = line.removeprefix("## ")
        elif line.startswith("| ") and not line.startswith(("| The story |", "| --- |")):
            promise, *cells = (cell.strip() for cell in line.strip("|").split(" | "))
            assert promise not in found.setdefault(heading, {}), f"twice: {promise}"
            found[heading][promise] = cells
    return found


def references(text: str) -> set[tuple[str, str]]:
    """Files that a text names, each with what it names in it."""
    return {(file, name) for file, name in _REFERENCE.findall(text)}


def is_of_tests(file: str) -> bool:
    """Whether a file is one that pytest collects."""
    return file.startswith("tests/") and Path(file).name.startswith("test_")


@cache
def names_in(file: Path) -> set[str]:
    """What a file has by name: what a Python file defines, and all words of another."""
    if file.suffix != ".py":
        return set(re.findall(r"\w+", file.read_text("utf-8")))
    nodes = ast.walk(ast.parse(file.read_text("utf-8")))
    return {n.name for n in nodes if isinstance(n, ast.FunctionDef | ast.ClassDef)}


def collected_in(file: Path) -> set[str]:
    """The tests that pytest finds in a file, in classes too."""
    body = ast.parse(file.read_text("utf-8")).body
    classes = [n for n in body if isinstance(n, ast.ClassDef) and n.name.startswith("Test")]
    return {
        node.name
        for node in (*body, *(inner for found in classes for inner in found.body))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


@pytest.mark.parametrize("heading", STORY)
def test_every_line_of_the_story_has_a_row(heading: str) -> None:
    assert list(rows()[heading]) == STORY[heading]


def test_the_page_has_nothing_else() -> None:
    assert list(rows()) == list(STORY)


@pytest.mark.parametrize("heading", STORY)
def test_every_row_says_what_where_and_which_test_or_why_none(heading: str) -> None:
    for promise, cells in rows()[heading].items():
        meaning, where, proof = cells
        assert meaning and where, promise
        named = {file for file, _ in references(proof) if is_of_tests(file)}
        assert bool(named) != (promise in WITHOUT_TEST), promise
        assert named or proof.startswith("No test: "), promise


CELLS = [cell for table in rows().values() for cells in table.values() for cell in cells]
NAMED = sorted(set().union(*map(references, CELLS)))


@pytest.mark.parametrize(("file", "name"), NAMED, ids=lambda part: part or "-")
def test_what_the_page_names_exists(file: str, name: str) -> None:
    path = REPOSITORY / file
    assert path.is_dir() if file.endswith("/") else path.is_file()
    if name:
        defined = collected_in(path) if name.startswith("test_") else names_in(path)
        assert name in defined


def test_the_page_names_tests_by_file_and_function() -> None:
    proofs = [cells[-1] for table in rows().values() for cells in table.values()]
    named = set().union(*map(references, proofs))
    unnamed = {file for file, name in named if is_of_tests(file) and not name}
    assert unnamed == set()
    assert len({name for _, name in named if name}) >= 40


# The story's unit tests, by its own call. Behind the new token the caches hold NaN.

MAX_SEQ_LEN = 256
LENGTHS = (1, 100, MAX_SEQ_LEN - 1)


def in_the_storys_form(step: Step, cache_len: int) -> Tensor:
    """Run a step through the story's function; returns its output, [batch, 1, heads * dim]."""
    q, k_cache, v_cache, k, v = step.tensors()
    assert k is not None and v is not None
    batch, max_seq_len, num_kv_heads, head_dim = k_cache.shape
    config = GQADecodeConfig(
        batch_size=batch, cache_len=cache_len, num_q_heads=q.shape[1], num_kv_heads=num_kv_heads,
        head_dim=head_dim, scale=step.scale, max_seq_len=max_seq_len,
    )  # fmt: skip
    output = step.out.view(batch, 1, -1)
    tokens = (tensor.unsqueeze(1) for tensor in (q, k, v))
    gqa_attention_decode(output, *tokens, k_cache, v_cache, config)
    return output


@pytest.mark.parametrize("cache_len", LENGTHS)
def test_decode_with_a_cache_len(cache_len: int, device: str) -> None:
    step = make_step(lengths=[cache_len] * 2, max_seq_len=MAX_SEQ_LEN, device=device)
    output = in_the_storys_form(step, cache_len)
    assert output.shape == (2, 1, 8 * 128)
    check(step, step.out)
    expected, _ = step.reference()
    assert (step.out.double() - expected).abs().max() <= 0.05


@pytest.mark.parametrize("cache_len", [0, *LENGTHS])
def test_the_token_is_appended_at_cache_len(cache_len: int, device: str) -> None:
    step = make_step(lengths=[cache_len] * 3, max_seq_len=MAX_SEQ_LEN, device=device)
    in_the_storys_form(step, cache_len)
    assert step.k is not None and step.v is not None
    assert torch.equal(step.k_cache[:, cache_len], step.k)
    assert torch.equal(step.v_cache[:, cache_len], step.v)
    step.check_memory()  # every other row is as it was, to the bit


def test_a_full_cache_overflows_and_nothing_is_written(device: str) -> None:
    step = make_step(lengths=[MAX_SEQ_LEN], max_seq_len=MAX_SEQ_LEN, append=False, device=device)
    token = torch.zeros(1, 2, 128, dtype=torch.float16, device=device)
    with pytest.raises(CacheOverflowError, match="holds 256 tokens and one is to be appended"):
        gqa_decode(*step.tensors()[:3], token, token, cache_seqlens=MAX_SEQ_LEN)
    step.check_memory()


def test_the_lse_of_a_lone_token_is_its_score(device: str) -> None:
    step = make_step(lengths=[0, 0], max_seq_len=MAX_SEQ_LEN, device=device)
    _, lse = gqa_decode(*step.tensors(), cache_seqlens=0, return_lse=True)
    assert step.k is not None
    keys = step.k.double().repeat_interleave(4, 1)  # the KV head of query head h is h / 4
    scores = (step.q.double() * keys).sum(-1) * step.scale
    torch.testing.assert_close(lse.double(), scores, atol=2e-5, rtol=2e-6)


def weighing(device: str, cache_len: int) -> Step:
    """A step whose values are unit vectors: dim j of the output is the weight of token j."""
    step = make_step(lengths=[cache_len] * 2, max_seq_len=128, device=device)
    units = torch.eye(128, dtype=torch.float16, device=device)
    step.v_cache.copy_(units[None, :, None].expand_as(step.v_cache))
    assert step.v is not None
    step.v.copy_(units[cache_len].expand_as(step.v))
    return step


@pytest.mark.parametrize("cache_len", [0, 1, 100, 127])
def test_weights_are_the_softmax_of_the_scores(cache_len: int, device: str) -> None:
    step = weighing(device, cache_len)
    weights = in_the_storys_form(step, cache_len).view(2, 8, 128).double()
    keys = step.k_cache[:, : cache_len + 1].double().repeat_interleave(4, 2)
    scores = torch.einsum("bhd,bjhd->bhj", step.q.double(), keys) * step.scale
    found = weights[..., : cache_len + 1]
    assert (found - torch.softmax(scores, -1)).abs().max() <= 1e-3
    assert (weights[..., cache_len + 1 :] == 0).all()  # of what lies behind the new token


@pytest.mark.parametrize("cache_len", [0, 1, 100, 127])
def test_weights_sum_to_one(cache_len: int, device: str) -> None:
    step = weighing(device, cache_len)
    weights = in_the_storys_form(step, cache_len).view(2, 8, 128).double()
    assert (weights >= 0).all()
    assert (weights.sum(-1) - 1).abs().max() <= 2e-3  # each was rounded to float16


def test_the_output_is_the_weighted_sum_of_the_values(device: str) -> None:
    """The weights of one step, applied by hand to the values of another with the same scores."""
    weighed = weighing(device, 100)
    weights = in_the_storys_form(weighed, 100).view(2, 8, 128)[..., :101].double()
    step = make_step(lengths=[100] * 2, max_seq_len=128, device=device)
    assert torch.equal(step.q, weighed.q)
    in_the_storys_form(step, 100)
    values = step.v_cache[:, :101].double().repeat_interleave(4, 2)
    expected = torch.einsum("bhj,bjhd->bhd", weights, values)
    assert (step.out.double() - expected).abs().max() <= 2e-3
