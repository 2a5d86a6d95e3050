"""`gqa-cutlass explain`: what it prints of sizes, features, lengths, caches and GPUs."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from command_line import console_script
from helpers import REPOSITORY

from gqa_cutlass import devices
from gqa_cutlass.codegen import ARCHES
from gqa_cutlass.dispatch import Device
from gqa_cutlass.tuning.table import SHIPPED, Table

H200 = Table.load(SHIPPED / "nvidia-h200.json")
LLAMA = "--q-heads", "32", "--kv-heads", "8", "--head-dim", "128"


@pytest.fixture(autouse=True)
def no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store of its own, and no GPU, whatever there is."""
    monkeypatch.setenv("GQA_CUTLASS_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(devices, "at_hand", list)


def explained(*options: str) -> str:
    """What the command prints."""
    outcome = console_script("explain", *options)
    assert outcome.status == 0, outcome.err
    return outcome.out


def facts(*options: str) -> dict[str, Any]:
    """The same for programs, of one explanation."""
    (found,) = json.loads(explained(*options, "--json"))["explanations"]
    return found  # type: ignore[no-any-return]


def refused(*options: str) -> str:
    """The line with which the command refuses."""
    outcome = console_script("explain", *options)
    assert outcome.is_refusal
    return outcome.err


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ([], "to balance ragged lengths"),
        (["--no-ragged"], "1 split of at most 2"),
        (["--dependent", "--batch", "1", "--max-seq-len", "128"], "may start at once"),
    ],
    ids=["ragged", "equal", "dependent"],
)
def test_it_knows_what_plans_are_told(options: list[str], reason: str) -> None:
    said = explained(*LLAMA, "--batch", "16", "--max-seq-len", "8192", *options)
    why = next(line for line in said.splitlines() if line.startswith("why"))
    assert reason in why
    assert ("ragged" in why) == (not options)


def test_it_prints_the_report() -> None:
    said = explained(*LLAMA, "--dtype", "bfloat16", "--arch", "sm_80")
    assert re.search(r"^kernel +gqa_decode_sm80_tensorop_bf16_bf16_d128_g4_", said, re.M)
    assert re.search(r"^arch +sm_80, 132 SMs$", said, re.M)


def test_it_knows_features() -> None:
    """Of Gemma 2, and of gpt-oss; a window says what is attended to."""
    sizes = ["--q-heads", "16", "--kv-heads", "8", "--head-dim", "256", "--max-seq-len", "8192"]
    said = explained(*sizes, "--window", "4096", "--softcap", "50")
    assert re.search(r"^kernel .*_win_cap$", said, re.M)
    assert "a window of 4096 of at most 8192 tokens" in said
    said = explained(*sizes, "--sinks", "--alibi")
    assert re.search(r"^kernel .*_alibi_sink$", said, re.M) and "window" not in said
    assert "explain: window: got -1; allowed: 0 to" in refused(*sizes, "--window", "-1")


def test_it_fits_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = explained(*LLAMA)
    monkeypatch.setenv("COLUMNS", "80")
    narrow = explained(*LLAMA)
    assert max(map(len, narrow.splitlines())) <= 80 < max(map(len, whole.splitlines()))
    assert narrow.split() == whole.split()


def test_it_knows_pages() -> None:
    said = explained(*LLAMA, "--page-size", "16")
    assert "pages of 16 tokens, at most 4096 of a sequence" in said and "block_table" in said
    assert "the copy engine wants pages of multiples" in explained(*LLAMA, "--page-size", "10")
    for wrong in ("-1", "4097"):
        said = refused(*LLAMA, "--page-size", wrong)
        assert f"explain: page_size: got {wrong}; allowed: 0" in said


@pytest.mark.parametrize(
    ("name", "tag"), [("float8_e4m3fn", "e4m3"), ("float8_e5m2", "e5m2")], ids=["e4m3", "e5m2"]
)
def test_it_knows_caches_of_8_bits(name: str, tag: str) -> None:
    """Of half the bytes, with any feature; queries have 16 bits."""
    wide, half = facts(*LLAMA, "--sinks"), facts(*LLAMA, "--sinks", "--cache-dtype", name)
    assert f"_f16_{tag}_d128_" in half["kernel"] and half["features"] == [name, "sinks"]
    assert wide["kv_bytes"] == 2 * half["kv_bytes"]


@pytest.mark.parametrize("pages", [(), ("--page-size", "16")], ids=["one piece", "pages"])
def test_it_knows_scales_of_tokens(pages: tuple[str, ...]) -> None:
    found = facts(*LLAMA, "--cache-dtype", "float8_e5m2", "--token-scales", *pages)
    assert "_f16_e5m2t_d128_" in found["kernel"]
    said = refused(*LLAMA, "--token-scales")
    assert "explain: --token-scales: got caches of 16 bits; allowed: --cache-dtype" in said


@pytest.mark.parametrize("name", ["int8", "float16", "", "float8_e4m3fn,float8_e5m2"])
def test_caches_of_other_types_are_refused_as_tune_refuses_them(name: str) -> None:
    said = refused(*LLAMA, "--cache-dtype", name)
    allowed = f"got {name!r}; allowed: float8_e4m3fn, float8_e5m2, or no such option"
    assert f"explain: --cache-dtype: {allowed}" in said
    tuning = console_script("tune", "--heads", "32/8/128", "--cache-dtype", name, "--dry-run")
    assert f"tune: --cache-dtype: {allowed}" in tuning.err


def test_a_bound_of_the_lengths_counts() -> None:
    """As the next power of two, in the choice and in the figures behind it."""
    room = "--batch", "8", "--max-seq-len", "8192"
    found = facts(*LLAMA, *room, "--max-seqlen", "300")
    short = facts(*LLAMA, "--batch", "8", "--max-seq-len", "512")
    assert "sequences of at most 512 of 8192 tokens, as told" in found["reasons"]
    for name in ("kernel", "terms", "runner_up"):
        assert found[name] == short[name] != facts(*LLAMA, *room)[name]
    assert "explain: max_seqlen: got 0; allowed: 1 to" in refused(*LLAMA, "--max-seqlen", "0")


def sizes_of(position: int) -> tuple[str, ...]:
    """Options for a problem that the table of the H200 has."""
    problem = H200.found[position].problem
    sizes = {
        "q-heads": problem.num_q_heads, "kv-heads": problem.num_kv_heads,
        "head-dim": problem.head_dim, "batch": problem.batch_size,
        "max-seq-len": problem.max_seq_len, "page-size": problem.page_size or 0,
    }  # fmt: skip
    return tuple(word for name, size in sizes.items() for word in (f"--{name}", str(size)))


def test_the_table_of_a_named_gpu_decides() -> None:
    given, best = (*sizes_of(0), "--gpu", "NVIDIA H200"), H200.found[0].best
    by = f"by the table of NVIDIA H200, {H200.run['date']}"
    said, found = explained(*given), facts(*given)
    assert re.search(rf"^decided +{by}$", said, re.M) and f"{best.splits} splits in" in said
    assert re.search(r"^arch +sm_90a, 132 SMs, NVIDIA H200$", said, re.M)
    assert (found["decided"], found["by_table"]) == (by, True)
    assert (found["gpu"], found["arch"]) == ("NVIDIA H200", "sm_90a")
    assert (found["kernel"], found["num_splits"]) == (best.config.name, best.splits)
    assert facts(*given, "--arch", "sm_90a") == found


def test_what_no_table_has_the_model_decides() -> None:
    """A window, for one; without a GPU's name it decides for all."""
    windowed = facts(*sizes_of(0), "--gpu", "NVIDIA H200", "--window", "100")
    assert windowed["decided"] == "by the model: no table of NVIDIA H200 has this"
    unnamed = facts(*sizes_of(0))
    assert unnamed["decided"] == "by the model: no GPU is named, so no table is looked into"
    assert unnamed["gpu"] is None and not (unnamed["by_table"] or windowed["by_table"])


def test_the_gpu_at_hand_is_meant_where_it_is_of_the_target(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    here = [
        Device(index=i, arch=ARCHES[arch], num_sms=sms, name=name)
        for i, (arch, sms, name) in enumerate(
            [("sm_80", 108, "NVIDIA A100"), ("sm_90a", 132, "NVIDIA H200"), ("sm_90a", 78, "X")]
        )
    ]
    monkeypatch.setattr(devices, "at_hand", lambda: here)
    said = json.loads(explained(*sizes_of(0), "--arch", "all", "--json"))["explanations"]
    found = {row["arch"]: (row["gpu"], row["num_sms"], row["by_table"]) for row in said}
    assert found == {
        **{arch: (None, 132, False) for arch in ARCHES},
        "sm_80": ("NVIDIA A100", 108, False),
        "sm_90a": ("NVIDIA H200", 132, True),
    }
    named = facts(*sizes_of(0), "--gpu", "NVIDIA A100")
    assert (named["gpu"], named["arch"], named["num_sms"]) == ("NVIDIA A100", "sm_80", 108)


def test_other_gpus_are_refused() -> None:
    for name in ("H200", "nvidia h200", ""):
        said = refused(*LLAMA, "--gpu", name)
        assert f"explain: gpu: got {name!r}; allowed: the name of a GPU at hand, or" in said
        assert "with a table of launches: 'NVIDIA H200'" in said
    for arch in ("sm_80", "all"):
        said = refused(*LLAMA, "--gpu", "NVIDIA H200", "--arch", arch)
        assert "explain: arch: got sm_80 for NVIDIA H200; allowed: sm_90a, which" in said


def test_the_kernel_that_the_docs_build_is_the_one_that_is_explained() -> None:
    page = (REPOSITORY / "docs" / "kernels_for_a_model.md").read_text(encoding="utf-8")
    (question,) = re.findall(r"^gqa-cutlass explain (.*)$", page, re.MULTILINE)
    (built,) = re.findall(r"^gqa-cutlass build --kernels (gqa_\w+)", page, re.MULTILINE)
    assert facts(*shlex.split(question))["kernel"] == built
