"""`gqa-cutlass`: what each command prints, and its exit codes."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from command_line import console_script
from typer.testing import CliRunner, Result

from gqa_cutlass import checkout
from gqa_cutlass.cli import app, main
from gqa_cutlass.codegen import ARCHES, carried, manifest, select, shipped
from gqa_cutlass.codegen.compile import Compiled
from gqa_cutlass.codegen.render import code_digest
from gqa_cutlass.errors import CompilerMissingError, DeviceError
from gqa_cutlass.kernels import export as export_module
from gqa_cutlass.kernels import store as store_module
from gqa_cutlass.proof import evidence as evidence_module
from gqa_cutlass.tuning.run import name_of
from gqa_cutlass.tuning.table import SHIPPED, Table

ONE = shipped()[0]
TMA = next(config for config in shipped() if config.tma)


@pytest.fixture(autouse=True)
def store_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test has a store of its own, and a working directory that is not the repository."""
    monkeypatch.setenv("GQA_CUTLASS_CACHE_DIR", str(tmp_path / "store"))
    monkeypatch.delenv("GQA_CUTLASS_KERNEL_DIR", raising=False)
    monkeypatch.delenv("GQA_CUTLASS_DISABLE_JIT", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "store"


@pytest.fixture
def proven(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An evidence file by which every shipped kernel was tested."""
    file = tmp_path / "gpu_evidence.json"
    kernels = {config.name: {"digest": code_digest(config)} for config in carried()}
    run = {"gpu": "Testing GPU", "date": "2026-01-01"}
    file.write_text(json.dumps({"run": run, "kernels": kernels}))
    monkeypatch.setattr(evidence_module, "FILE", file)
    return file


def _edit(file: Path, name: str, entry: dict[str, str] | None) -> None:
    record = json.loads(file.read_text())
    record["kernels"][name] = entry
    if entry is None:
        del record["kernels"][name]
    file.write_text(json.dumps(record))


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def words(result: Result) -> str:
    """What a command printed, wherever the terminal's width made it break lines."""
    return " ".join(result.output.split())


def fail(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    """Run the console script, which must exit; returns the status."""
    monkeypatch.setattr(sys, "argv", ["gqa-cutlass", *map(str, arguments)])
    with pytest.raises(SystemExit) as raised:
        main()
    assert isinstance(raised.value.code, int)
    return raised.value.code


def test_generate_writes_once_and_then_changes_nothing(tmp_path: Path) -> None:
    first, second = run("generate", "--out", tmp_path / "out"), run("generate", "--out", "out")
    total = len(manifest.generated_files())
    assert (first.exit_code, second.exit_code) == (0, 0)
    assert f"{total} files in" in words(first) and words(first).endswith(f", {total} changed")
    assert words(second).endswith(", 0 changed")
    assert manifest.drift(tmp_path / "out") == []


def test_list_names_every_shipped_kernel_on_a_line_of_its_own() -> None:
    result = run("list")
    assert result.exit_code == 0
    for config in carried():
        assert re.search(rf"\b{config.name}\b.*\b{config.num_threads}\b", result.output)


def test_list_filters() -> None:
    output = run("list", "--kernels", "simt*d128*align1").output
    names = set(re.findall(r"gqa_decode_\w+", output))
    assert names == {config.name for config in select("simt*d128*align1")}


def test_list_shows_evidence(proven: Path) -> None:
    outdated, absent = shipped()[1].name, shipped()[2].name
    _edit(proven, outdated, {"digest": "of an older source"})
    _edit(proven, absent, None)
    lines = {match: line for line in run("list").output.splitlines()
             for match in re.findall(r"gqa_decode_\w+", line)}  # fmt: skip
    assert "Testing GPU, 2026-01-01" in lines[ONE.name]
    assert "outdated" in lines[outdated]
    assert "none" in lines[absent]


def test_list_does_not_know_evidence_outside_a_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evidence_module, "FILE", tmp_path / "tests" / "gpu_evidence.json")
    (line,) = (line for line in run("list").output.splitlines() if ONE.name in line)
    assert "none" in line
    monkeypatch.setattr(checkout, "ROOT", tmp_path)
    (line,) = (line for line in run("list").output.splitlines() if ONE.name in line)
    assert "not known here" in line


def test_check_works_in_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkout, "ROOT", tmp_path)
    outcome = console_script("check")
    assert (
        outcome.is_refusal
        and f"check: got the installed package in {tmp_path}; needed: " in outcome.err
    )


@pytest.mark.parametrize("command", ["list", "check"])
@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"run": {}, "kernels": {}}', "[" * 100_000,
     '{"run": {"gpu": "g", "date": "d"}, "kernels": {"k": 1}}'],
    ids=["empty", "a list", "nothing in it", "no run", "deep", "no digests"],
)  # fmt: skip
def test_evidence_that_is_none_is_an_error_in_one_line(
    proven: Path, command: str, content: str
) -> None:
    proven.write_text(content)
    outcome = console_script(command)
    assert outcome.is_refusal and "evidence: got " in outcome.err, outcome


@pytest.mark.parametrize("name", ["[red]x[/red]", "[/x]", "[bold", ":warning:", "x" * 180])
def test_folders_are_printed_as_they_are(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = Compiled(code=b"cubin", registers=1, spill_bytes=0, stack_bytes=0, seconds=0.1)
    monkeypatch.setattr(store_module, "compile_kernel", lambda config, arch: compiled)
    monkeypatch.setattr(export_module, "pack", lambda name, found: name.encode())
    monkeypatch.setattr(manifest, "shipped", lambda: [ONE])
    monkeypatch.setattr(manifest, "merges", lambda: [])
    monkeypatch.setenv("GQA_CUTLASS_CACHE_DIR", str(tmp_path / name / "store"))
    one = ("--kernels", ONE.name, "--jobs", "1", "--out")
    for said, arguments in {
        f"2 files in {name}/made, 2 changed": ("generate", "--out", f"{name}/made"),
        f"1 of 1 compiled, in {name}/built": ("build", *one, f"{name}/built"),
        f"files in {name}/exported: 1 kernels": ("export", *one, f"{name}/exported"),
        f"files in {name}/twins: 2 kernels": ("export", "--dependent", *one, f"{name}/twins"),
        f"store                  {tmp_path / name}/store\n": ("doctor",),
        f"files removed from {tmp_path / name}/store\n": ("clean",),
    }.items():
        assert said in console_script(*arguments).out


def test_build_compiles_one_kernel_once_into_a_folder(tmp_path: Path, store_root: Path) -> None:
    arguments = ("build", "--kernels", ONE.name, "--arch", "sm_80,sm_90a", "--out", "built")
    first, second = run(*arguments), run(*arguments)
    assert (first.exit_code, second.exit_code) == (0, 0), first.output
    assert "2 of 2 compiled" in first.output and "0 of 2 compiled" in second.output
    assert first.stdout.count(ONE.name) == 2  # and as often on stderr, as each is done
    assert {"registers", "shared", "spills", "seconds", "cubin"} <= set(first.output.split())
    cubins = sorted(path.name for path in (tmp_path / "built").glob("*.cubin"))
    assert [name.split(".")[:2] for name in cubins] == [[ONE.name, "sm_80"], [ONE.name, "sm_90a"]]
    assert not store_root.exists()


def test_build_goes_to_the_users_store_by_default(
    store_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = Compiled(code=b"cubin", registers=1, spill_bytes=0, stack_bytes=0, seconds=0.1)
    monkeypatch.setattr(store_module, "compile_kernel", lambda config, arch: compiled)
    assert run("build", "--kernels", ONE.name, "--jobs", "1").exit_code == 0
    assert len(list(store_root.glob("*.cubin"))) == 1


def test_build_leaves_out_kernels_that_need_another_architecture(
    store_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = Compiled(code=b"code", registers=1, spill_bytes=0, stack_bytes=0, seconds=0.1)
    monkeypatch.setattr(store_module, "compile_kernel", lambda config, arch: compiled)
    kernels = ("build", "--jobs", "1", "--kernels", f"{ONE.name},{TMA.name}", "--arch")
    assert run(*kernels, "all").exit_code == run(*kernels, "compute_80,compute_90").exit_code == 0
    built = {tuple(path.name.split(".")[:2]) for path in store_root.glob("*.json")}
    assert built == {(ONE.name, arch) for arch in (*ARCHES, "compute_80", "compute_90")} | {
        (TMA.name, "sm_90a"), (TMA.name, "compute_90"),
    }  # fmt: skip


def test_check_passes_without_drift_and_with_evidence(
    proven: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifest, "drift", lambda _: [])
    result = run("check")
    assert result.exit_code == 0
    assert "0 files drifted, 0 kernels without GPU evidence" in words(result)


def test_check_fails_on_drift(proven: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest, "drift", lambda _: ["edited.cu"])
    result = run("check")
    assert result.exit_code == 1
    assert "drift: generated/edited.cu; run `gqa-cutlass generate`" in result.output


@pytest.mark.parametrize("entry", [None, {"digest": "of an older source"}])
def test_check_fails_on_a_kernel_without_current_evidence(
    proven: Path, monkeypatch: pytest.MonkeyPatch, entry: dict[str, str] | None
) -> None:
    monkeypatch.setattr(manifest, "drift", lambda _: [])
    _edit(proven, ONE.name, entry)
    result = run("check")
    assert result.exit_code == 1
    assert f"no current GPU evidence: {ONE.name}" in words(result)
    assert "1 kernels without GPU evidence" in words(result)


def test_doctor_reports_every_part(store_root: Path) -> None:
    output = run("doctor").output
    for what in ("package", "dependencies", "compiler and headers", "disassembler", "torch",
                 "driver", "GPU", "store", "kernel folders", "compiling"):  # fmt: skip
        assert re.search(rf"^{what}", output, re.M)
    assert re.search(r"nvrtc-\d+", output)


def test_doctor_is_content_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> str:
        raise DeviceError("no usable GPU: no driver; needed: one. Run `gqa-cutlass doctor`.")

    monkeypatch.setattr("gqa_cutlass.gpu.driver.driver_version", absent)
    result = run("doctor")
    assert "none, so that kernels run in ptxsim (no usable GPU: no driver)" in result.output
    assert (result.exit_code, "MISSING" in result.output) == (0, False)


@pytest.mark.parametrize(
    "error",
    [ImportError("No module named 'torch'"), OSError("libtorch.so: too\n short"), MemoryError()],
)
def test_doctor_reports_what_is_broken(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> str:
        raise error

    monkeypatch.setattr("gqa_cutlass.doctor._torch", broken)
    outcome = console_script("doctor")
    said = " ".join(str(error).split()) or "MemoryError"
    assert f"\ntorch                  MISSING: {said}\n" in outcome.out
    assert (outcome.status, outcome.err) == (1, "")


def test_doctor_reports_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> str:
        raise CompilerMissingError("NVRTC: not found; remedy: pip install nvidia-cuda-nvrtc")

    monkeypatch.setattr("gqa_cutlass.codegen.compile.compiler_version", missing)
    result = run("doctor")
    assert result.exit_code == 1
    assert "MISSING: NVRTC: not found" in result.output


def test_clean_empties_the_store(store_root: Path) -> None:
    assert "0 files removed" in run("clean").output
    store_root.mkdir()
    entry = store_root / f"{ONE.name}.sm_90a.0123.cubin"
    entry.write_bytes(b"")
    assert "1 files removed" in run("clean").output
    assert not entry.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["list", "--kernels", "fp8"], "--kernels: got 'fp8', which matches none"),
        (["build", "--kernels", "fp8"], "--kernels: got 'fp8', which matches none"),
        (["build", "--kernels", ONE.name, "--arch", "sm_70"], "arch: got 'sm_70'; allowed: sm_80"),
        (["build", "--kernels", TMA.name, "--arch", "sm_80"],
         "--arch: got 'sm_80', which none of these kernels is for; allowed: sm_90a"),
        (["explain", "--q-heads", "30", "--kv-heads", "8", "--head-dim", "128"],
         "head counts: got 30 query heads and 8 KV heads"),
        (["explain", "--q-heads", "32", "--kv-heads", "8", "--head-dim", "128", "--dtype", "int8"],
         "explain: dtype: got 'int8'; allowed: float16, bfloat16"),
        (["tune", "--heads", "8/8/64,8/8/40", "--cache-dtype", "float8_e5m2", "--dry-run"],
         "--cache-dtype: got float8_e5m2 with head_dim 40; allowed: multiples of 16, whose rows"),
        (["tune", "--heads", "32/8/128", "--batch", "64", "--room", "131072", "--dry-run"],
         "--most-gib: got 8, which leaves out all that was asked for; allowed: 32 and more"),
        (["tune", "--again", "--room", "64"],
         "--again: got --room 64 without heads; allowed: with --heads or --model, or without it"),
    ],
    ids=["list", "build", "build-arch", "build-arch-of-none", "explain", "explain-dtype", "tune",
         "tune-too-large", "tune-again"],
)  # fmt: skip
def test_error_is_one_line_and_status_2(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    assert fail(monkeypatch, *arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("gqa-cutlass: ") and message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out.strip() == ""


def test_tune_says_what_it_leaves_out() -> None:
    result = run("tune", "--heads", "32/8/128", "--batch", "1,64", "--room", "65536", "--dry-run")
    assert result.stdout == "32/8/128 1x65536\n"
    assert result.stderr == "tune: 1 of 2 problems are left out, of more than 8 GiB\n"


def test_tune_again_searches_what_the_table_has() -> None:
    table = SHIPPED / "nvidia-h200.json"
    problems = [name_of(tuned.problem) for tuned in Table.load(table).found]
    asked = "tune", "--again", "--out", str(table), "--dry-run"
    assert run(*asked).stdout.splitlines() == problems
    of_8_bits = [name for name in problems if "float8_e4m3fn" in name]
    assert 0 < len(of_8_bits) < len(problems)
    assert run(*asked, "--cache-dtype", "float8_e4m3fn").stdout.splitlines() == of_8_bits
    named = run(*asked, "--heads", "4/2/64", "--batch", "1", "--room", "64").stdout
    assert named == "4/2/64 1x64\n"


def test_tune_again_needs_a_table_with_problems(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    table = tmp_path / "x.json"
    assert fail(monkeypatch, "tune", "--again", "--out", str(table)) == 2
    assert f"tune: table: got {table}" in capsys.readouterr().err
    Table(run={"gpu": "NVIDIA X1"}).save(table)
    assert fail(monkeypatch, "tune", "--again", "--out", str(table)) == 2
    assert f"--again: got {table}, which has no problem; allowed" in capsys.readouterr().err


@pytest.mark.parametrize("again", [(), ("--again",)], ids=["", "again"])
def test_tune_without_a_gpu_says_what_can_be_done(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], again: tuple[str, ...]
) -> None:
    """Nothing that it has no option for."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert fail(monkeypatch, "tune", *(again or ("--heads", "32/8/128"))) == 2
    said = capsys.readouterr().err
    assert "tune: measures on a GPU, and torch finds none" in said and "--dry-run" in said
    assert "device=" not in said


def test_no_command_prints_the_commands() -> None:
    output = run().output
    for command in ("generate", "list", "build", "check", "clean", "explain", "doctor"):
        assert command in output


SIM = ("sim", "--kernel", ONE.name, "--cache-len", "20")


def test_sim_reports_the_result_and_what_was_moved() -> None:
    result = run(*SIM, "--batch", "2", "--kv-heads", "2", "--splits", "1")
    assert result.exit_code == 0, result.output
    text = words(result)
    assert "no fault" in text and "exact to the bit" in text
    assert "instruction mix" in text and "shared memory" in text and "global memory" in text
    for part in (r"grid \(2, 1, 2\)", r"output error \d", r"lse error \d", r"bytes, 1\.\d+x",
                 r"load\.cuh:\d+"):  # fmt: skip
        assert re.search(part, text), part


def test_sim_runs_clusters() -> None:
    result = run("sim", "--kernel", TMA.name, "--cache-len", "300", "--splits", "2")
    assert result.exit_code == 0, result.output
    text = words(result)
    assert "no fault" in text and "exact to the bit" in text
    assert re.search(r"grid \(1, 2, 1\) in clusters of 2", text)


def test_sim_traces_every_instruction() -> None:
    lines = run(*SIM, "--trace", "--no-races").output.splitlines()
    steps = [line for line in lines if re.match(r" *\d+ +\d+ warps +\d+ lanes ", line)]
    assert len(steps) > 500
    assert any("cp.async" in step and "load.cuh" in step for step in steps)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--kernel", "nonsense", "--cache-len", "5"), "kernel name: got 'nonsense'"),
        (("--kernel", ONE.name, "--cache-len", "-5"), "sim: cache_len: got -5"),
    ],
)
def test_sim_refuses_what_it_cannot_run(
    options: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["gqa-cutlass", "sim", *options])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
