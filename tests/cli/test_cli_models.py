"""The kernels of a model: `--model` and what goes with it."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import console_script
from helpers import call_tensors

from gqa_cutlass import gqa_decode
from gqa_cutlass.cli import building
from gqa_cutlass.codegen import KernelConfig, merges, shipped
from gqa_cutlass.codegen.compile import Compiled
from gqa_cutlass.codegen.model_config import find_model
from gqa_cutlass.codegen.model_kernels import kernels_of, ranked
from gqa_cutlass.codegen.sass import disassembler
from gqa_cutlass.errors import CompileError, KernelMissingError
from gqa_cutlass.kernels import store as store_module
from gqa_cutlass.kernels.store import Store

NAMES = [k.name for k in kernels_of(ranked(find_model("gpt-oss-20b"), (1,), ()))]
SELECTED = ("--model", "gpt-oss-20b")


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory and a store of its own."""
    monkeypatch.setenv("GQA_CUTLASS_CACHE_DIR", str(tmp_path / "store"))
    monkeypatch.delenv("GQA_CUTLASS_KERNEL_DIR", raising=False)
    monkeypatch.delenv("GQA_CUTLASS_DISABLE_JIT", raising=False)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Nothing is compiled; kernels whose names are put in here fail."""
    failing: set[str] = set()

    def compile_kernel(config: KernelConfig, arch: str) -> Compiled:
        if config.name in failing:
            raise CompileError("NVRTC could not compile it; log:\nx.cu(1): error: no such thing")
        return Compiled(code=b"code", registers=90, spill_bytes=0, stack_bytes=0, seconds=1.5)

    monkeypatch.setattr(store_module, "compile_kernel", compile_kernel)
    return failing


def _json(*arguments: str, status: int = 0) -> Any:
    outcome = console_script(*arguments, "--json")
    assert outcome.status == status, outcome
    return json.loads(outcome.out)


def test_a_dry_run_says_what_would_be_built_and_writes_nothing(place: Path) -> None:
    for command in ("build", "export", "warmup", "generate"):
        out = ("--out", "out") if command != "warmup" else ()
        outcome = console_script(command, *SELECTED, *out, "--dry-run")
        assert outcome.status == 0 and "nothing was written" in outcome.out
        assert all(name[:79] in outcome.out for name in NAMES)  # of longer ones the end is cut
        *table, _ = outcome.out.splitlines()  # the last line names a folder
        assert max(map(len, table)) <= 80 or command == "generate"  # which prints names of files
        assert list(place.iterdir()) == []


def test_every_rank_and_type_is_asked_for() -> None:
    plan = _json("build", "--model", "llama2-7b", "--tp", "1,32", "--dtype", "float16,bfloat16",
                 "--arch", "sm_80,sm_90a", "--exclude-kernels", "tma", "--dry-run")  # fmt: skip
    kernels = [(row["name"].split("_")[4], row["arch"]) for row in plan["kernels"]]
    assert sorted(kernels) == [
        ("bf16", "sm_80"), ("bf16", "sm_90a"), ("f16", "sm_80"), ("f16", "sm_90a"),
    ]  # fmt: skip
    assert {row["state"] for row in plan["kernels"]} == {"to compile"}


def test_a_build_reports_what_it_built(fake: set[str], place: Path) -> None:
    outcome = console_script("build", *SELECTED, "--out", "out", "--jobs", "1")
    assert outcome.status == 0 and "6 of 6 compiled, in out" in outcome.out
    assert [line.split("]")[0] for line in outcome.err.splitlines()] == [
        "[1/6", "[2/6", "[3/6", "[4/6", "[5/6", "[6/6",
    ]  # fmt: skip
    report = json.loads((place / "out" / building.REPORT).read_text())
    assert [row["name"] for row in report["kernels"]] == sorted(NAMES)
    assert (report["built"], report["failed"]) == (6, 0)
    assert {row["state"] for row in report["kernels"]} == {"built"}
    before = {path.name: path.read_bytes() for path in (place / "out").iterdir()}
    again = _json("build", *SELECTED, "--out", "out", "--jobs", "1")
    assert {row["state"] for row in again["kernels"]} == {"found"}
    assert {path.name: path.read_bytes() for path in (place / "out").iterdir()} == before


@pytest.mark.usefixtures("fake")
def test_a_report_says_what_the_folder_holds(place: Path) -> None:
    """Whatever was built before, in whichever order, and removed since."""

    def reported(*excluded: str) -> bytes:
        left_out = ("--exclude-kernels", *excluded) if excluded else ()
        built = console_script("build", *SELECTED, "--out", "out", "--jobs", "1", *left_out)
        assert built.status == 0
        return path.read_bytes()

    path = place / "out" / building.REPORT
    multistage = json.loads(reported("tma"))
    assert multistage["built"] == 3
    both = reported("multistage")
    whole = json.loads(both)
    assert [row["name"] for row in whole["kernels"]] == sorted(NAMES)
    assert (whole["built"], whole["failed"]) == (6, 0)
    assert reported("tma") == reported() == both
    odd = {"name": ["x"], "arch": "sm_90a", "state": "built"}, {"name": "x", "arch": 1}, 1
    for damaged in ("[]", "{}", '{"kernels": 1}', json.dumps({**whole, "version": "0"}), "\0",
                    *(json.dumps({**whole, "kernels": [row]}) for row in odd)):  # fmt: skip
        path.write_text(damaged)
        assert reported() == both
    for removed in (place / "out").glob("*_tma_*"):
        removed.unlink()
    assert json.loads(reported("tma")) == multistage


def test_a_kernel_that_fails_does_not_lose_the_others(fake: set[str], place: Path) -> None:
    fake.add(NAMES[1])
    outcome = console_script("build", *SELECTED, "--out", "out", "--jobs", "1")
    assert outcome.status == 1 and "5 of 6 compiled" in outcome.out
    assert outcome.err.splitlines()[-1] == (
        f"gqa-cutlass: {NAMES[1]} for sm_90a failed: x.cu(1): error: no such thing"
    )
    assert {path.name.split(".")[0] for path in (place / "out").glob("*.cubin")} == {
        *NAMES[:1], *NAMES[2:],
    }  # fmt: skip
    report = json.loads((place / "out" / building.REPORT).read_text())
    (failed,) = (row for row in report["kernels"] if row["name"] == NAMES[1])
    assert failed["state"] == "failed" and "no such thing" in failed["error"]
    assert (report["built"], report["failed"]) == (5, 1)


def test_a_full_disk_is_one_line_and_keeps_what_is_done(
    fake: set[str], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, written = store_module.entries.write, []

    def full(folder: Path, name: str, *rest: Any) -> Path:
        if written:
            raise OSError(28, "No space left on device", str(folder / name))
        written.append(name)
        return write(folder, name, *rest)

    monkeypatch.setattr(store_module.entries, "write", full)
    outcome = console_script("build", *SELECTED, "--out", "out", "--jobs", "1")
    assert outcome.status == 2 and "cannot write to out (No space left" in outcome.err
    assert outcome.err.count("gqa-cutlass: ") == 1
    assert [path.name for path in (place / "out").iterdir() if path.suffix == ".cubin"] == [
        f"{written[0]}.cubin"
    ]
    assert {path.suffix for path in (place / "out").iterdir()} == {".cubin", ".json"}


@pytest.mark.parametrize("damage", ["cut", "changed", "another version"])
def test_a_damaged_kernel_is_not_used(
    damage: str, fake: set[str], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a compiler it is missing, and the error says why; with one it is built anew."""
    one = ("build", "--kernels", NAMES[0], "--jobs", "1")
    console_script(*one, "--out", "out")
    code, entry = (next((place / "out").glob(f"*.{kind}")) for kind in ("cubin", "sm_90a*json"))
    if damage == "another version":
        entry.write_text(json.dumps(json.loads(entry.read_text()) | {"format": 2}))
    else:
        code.write_bytes(b"cod" if damage == "cut" else b"CODE")
    monkeypatch.setenv("GQA_CUTLASS_KERNEL_DIR", str(place / "out"))
    config = KernelConfig.from_name(NAMES[0])
    with pytest.raises(KernelMissingError, match="Found, but not used: .*damaged"):
        Store.default().get(config, "sm_90a", jit=False)
    assert _json(*one)["kernels"][0]["state"] == "compiled"


def test_two_builds_are_the_same_to_the_byte_and_run_without_a_compiler(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In ptxsim, from a folder alone, with the cache elsewhere and compiling disabled."""
    (place / "config.json").write_text(
        json.dumps({"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 40,
                    "torch_dtype": "float16", "num_hidden_layers": 1})
    )  # fmt: skip
    targets = ("--arch", "compute_80,compute_90", "--exclude-kernels", "tma", "--jobs", "1")
    for out in ("one", "two"):
        assert console_script("build", "--model", ".", "--out", out, *targets).status == 0
    first, second = (
        {path.name: path.read_bytes() for path in (place / out).iterdir()} for out in ("one", "two")
    )
    assert first == second and building.REPORT in first
    for path in (place / "one", *(place / "one").iterdir()):
        assert path.stat().st_mode & stat.S_IROTH
    monkeypatch.setenv("GQA_CUTLASS_KERNEL_DIR", str(place / "one"))
    monkeypatch.setenv("GQA_CUTLASS_CACHE_DIR", str(place / "elsewhere"))
    monkeypatch.setenv("GQA_CUTLASS_DISABLE_JIT", "1")
    tensors = call_tensors(batch=1, q_heads=4, kv_heads=2, head_dim=40, max_seq_len=64)
    gqa_decode(**tensors, cache_seqlens=3)
    assert torch.all(tensors["out"] == 1)
    assert not (place / "elsewhere").exists()


def test_generate_writes_a_models_kernels_to_a_folder_of_their_own(place: Path) -> None:
    planned = console_script("generate", *SELECTED, "--dry-run")
    assert "files for a folder that --out names; nothing was written" in planned.out
    refused = console_script("generate", *SELECTED)
    assert refused.is_refusal and "generate: --out: got none" in refused.err
    assert console_script("generate", *SELECTED, "--out", "out", "--arch", "sm_80").status == 0
    multistage = [name for name in NAMES if "multistage" in name]
    assert sorted(path.name for path in (place / "out").iterdir()) == sorted(
        [*(f"{name}.cu" for name in multistage), "manifest.json"]
    )
    listed = json.loads((place / "out" / "manifest.json").read_text())
    assert [entry["name"] for entry in listed["kernels"]] == multistage and listed["merges"] == []


def test_explain_walks_the_types_of_layers() -> None:
    found = _json("explain", *SELECTED, "--tp", "8", "--page-size", "64", "--arch", "sm_80,sm_90a")
    assert [row["for"].split(",")[0] for row in found["explanations"]] == [
        "sliding_attention", "sliding_attention", "full_attention", "full_attention",
    ]  # fmt: skip
    assert all("block_table" in row["features"] for row in found["explanations"])
    assert [row["arch"] for row in found["explanations"][:2]] == ["sm_80", "sm_90a"]
    for wrong in (["--q-heads", "8"], ["--window", "5"]):
        assert "the model says them" in console_script("explain", *SELECTED, *wrong).err


def test_warmup_fills_the_store(fake: set[str], place: Path) -> None:
    done = _json("warmup", *SELECTED, "--arch", "sm_90a", "--jobs", "1")
    assert done["folder"] == str(place / "store") and len(done["kernels"]) == 6
    assert len(list((place / "store").glob("*.cubin"))) == 6


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("build", "--model", "llama9"), "--model: got 'llama9', neither file nor preset"),
        (("build", "--tp", "2"), "--tp: got ranks, and no model"),
        (("build", *SELECTED, "--tp", "3"), "--tp: got 3 for 64 query heads"),
        (("build", *SELECTED, "--tp", "1,,2"), "--tp: got ''; allowed: whole numbers"),
        (("build", *SELECTED, "--dtype", "int8"), "dtype: got 'int8'; allowed: float16, bfloat16"),
        (
            ("build", *SELECTED, "--kernels", "d128"),
            "--kernels: got 'd128', which matches none of 6",
        ),
        (("build", *SELECTED, "--exclude-kernels", "d64"), "which leaves none of 6 kernels"),
        (("build", "--paged"), "--paged: got no model"),
        (("export", "--out", "x", "--paged"), "--paged: got no model"),
        (("build", *SELECTED, "--arch", "sm_70"), "arch: got 'sm_70'; allowed: sm_80"),
    ],
)
def test_options_that_mean_no_kernels_are_refused(arguments: tuple[str, ...], said: str) -> None:
    outcome = console_script(*arguments)
    assert outcome.is_refusal and said in outcome.err


def test_presets_are_listed_with_their_sources() -> None:
    lines = console_script("models").out.splitlines()
    assert max(map(len, lines)) <= 80
    assert any(line.startswith("gemma3-4b") and "google/gemma-3-4b-it" in line for line in lines)
    (row,) = (row for row in _json("models")["models"] if row["name"] == "gpt-oss-20b")
    assert (row["window"], row["sinks"]) == (128, True)


def test_inspect_counts_machine_code() -> None:
    if disassembler() is None:
        pytest.skip("nvdisasm is not installed")
    config = next(c for c in shipped() if "bf16_d64_g4_align8_multistage" in c.name)
    found = _json("inspect", config.name)
    sass = found["sass"]
    assert sass["tensor_core"] == sass["mix"]["HMMA"] > 0
    assert (sass["spills"], found["spill_bytes"]) == (0, 0)
    assert sass["wide_loads"] > 0 and sum(sass["mix"].values()) == sass["instructions"]
    printed = console_script("inspect", config.name).out
    assert f"{sass['tensor_core']} instructions" in printed and "HMMA" in printed


@pytest.mark.parametrize("command", [("inspect",), ("sim", "--cache-len", "3", "--kernel")])
def test_a_kernel_of_several_is_not_guessed(command: tuple[str, ...]) -> None:
    outcome = console_script(*command, "d128_g4")
    assert outcome.is_refusal and "kernels have in theirs" in outcome.err
    assert "; near: gqa_decode_" in outcome.err


def test_sim_refuses_kernels_that_merge() -> None:
    name = merges()[0].name
    outcome = console_script("sim", "--cache-len", "3", "--kernel", name)
    assert outcome.is_refusal and f"got {name}, which merges" in outcome.err


def test_the_store_is_left_alone_by_a_folder(fake: set[str], place: Path) -> None:
    console_script("build", *SELECTED, "--out", "out", "--jobs", "1")
    assert not os.path.exists(place / "store")
