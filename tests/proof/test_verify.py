"""`gqa-cutlass verify`: it passes where a step is right, and finds what is planted."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers import remodelled
from typer.testing import CliRunner, Result

from gqa_cutlass import GQADecodeConfig, Plan, warmup
from gqa_cutlass.call.record import LOG
from gqa_cutlass.cli import app, main
from gqa_cutlass.decode_config import gqa_attention_decode
from gqa_cutlass.errors import CacheOverflowError, InputError, KernelFault, LaunchError
from gqa_cutlass.proof import verify
from gqa_cutlass.proof.reference import attend
from gqa_cutlass.sizes import enough_memory

RAN, OUTPUT, CACHES, LOGGED, OVERFLOW = range(5)
SMALL: dict[str, Any] = {"num_q_heads": 4, "num_kv_heads": 2, "head_dim": 64}
SMALL_OPTIONS = ("--q-heads", "4", "--kv-heads", "2", "--head-dim", "64")
CPU = torch.device("cpu")


def steps_of(device: torch.device | str = CPU, **sizes: Any) -> list[verify.Step]:
    return verify.verify(**sizes, device=torch.device(device))


def failed(steps: list[verify.Step]) -> list[int]:
    """Positions of the steps that failed."""
    return [i for i, step in enumerate(steps) if not step.passed]


def run(*options: str) -> Result:
    return CliRunner().invoke(app, ["verify", "--device", "cpu", *options])


CASES: dict[str, dict[str, Any]] = {
    "the story's": {},
    "empty cache": {"cache_len": 0},
    "first token cached": {"cache_len": 1},
    "last row": {"cache_len": 63},
    "cache of one row": {"cache_len": 0, "max_seq_len": 1},
    "cache_len 100": {"cache_len": 100},
    "clusters": {"cache_len": 250, "max_seq_len": 300},
    "one sequence of many": {"batch_size": 1, "num_q_heads": 5, "num_kv_heads": 5},
    "one KV head": {"num_q_heads": 71, "num_kv_heads": 1, "head_dim": 64},
    "bfloat16": {"dtype": torch.bfloat16, "batch_size": 3, "head_dim": 72, "num_q_heads": 24},
}


@pytest.mark.parametrize("sizes", CASES.values(), ids=CASES)
def test_a_right_step_passes(sizes: dict[str, Any], device: str) -> None:
    steps = steps_of(device, **sizes)
    assert len(steps) == 5 and failed(steps) == []
    assert all(step.evidence for step in steps)


def test_the_storys_four_steps_are_printed_with_their_evidence() -> None:
    result = run("--cache-len", "10")
    assert result.exit_code == 0, result.output
    first, *lines = result.output.splitlines()
    assert re.match(r"gqa-cutlass \S+, torch \S+, on CPU \(ptxsim\)$", first)
    titles = [line for line in lines if re.match(r"\d\. ", line)]
    assert [title[:2] for title in titles] == ["1.", "2.", "3.", "4.", "5."]
    assert all(title.endswith(": passed") for title in titles)
    for evidence in (
        r"kernel gqa_decode_\w+$",
        r"\d+\.\d\d s in ptxsim, which found no fault$",
        r"shape \[2, 1, 4096\] = \[batch, 1, num_q_heads \* head_dim\]$",
        r"largest error \S+; allowed \S+, 2x PyTorch's .* less than 0\.05$",
        r"mean error \S+; allowed \S+, 1\.5x PyTorch's \+ 1e-05$",
        r"row 10 of K and V in 2 sequences: the new token, to the bit$",
        r"rows 0 to 9: as before, to the bit$",
        r"rows 11 to 63: as before, to the bit$",
        r"launch kernel=gqa_decode_\w+ grid=8,1,2 .* cache_seqlens=10 .* stream=0x0$",
        r"CacheOverflowError: .*the cache holds 64 tokens.*; max_seq_len is 64\.",
        r"output and caches: as before, to the bit$",
        r"launches: 0$",
    ):
        assert [line for line in lines if re.match(f" +{evidence}", line)], evidence
    assert lines[-1] == "5 of 5 passed"


def test_sizes_and_type_are_those_of_the_options() -> None:
    options = "--batch", "1", "--dtype", "bfloat16", "--max-seq-len", "20", "--cache-len", "19"
    result = run(*SMALL_OPTIONS, *options)
    assert result.exit_code == 0, result.output
    for part in (
        "shape [1, 1, 256]", "row 19 of K and V in 1 sequences", "rows 0 to 18",
        "cache_len 20 of 20", "_bf16_bf16_d64_g2_", " max_seq_len=20 ", " dtype=bf16 ",
    ):  # fmt: skip
        assert part in result.output
    assert "rows 20" not in result.output


@pytest.mark.parametrize(("cache_len", "capacity"), [(0, 64), (48, 64), (49, 65), (100, 116)])
def test_the_cache_leaves_room_behind_the_token(cache_len: int, capacity: int) -> None:
    steps = steps_of(cache_len=cache_len, batch_size=1, **SMALL)
    assert f"rows {cache_len + 1} to {capacity - 1}: as" in steps[CACHES].evidence[-1]


@pytest.fixture
def small_caches_count_as_large() -> Iterator[None]:
    """Which kernel runs then depends on whether lengths may differ."""
    with remodelled(tma_mib=0):
        yield


@pytest.mark.usefixtures("small_caches_count_as_large")
def test_the_kernel_is_the_one_that_runs_where_ragged_lengths_would_take_another(
    device: str,
) -> None:
    sizes: dict[str, int] = {**SMALL, "batch_size": 2, "cache_len": 10, "max_seq_len": 77}
    config = GQADecodeConfig(**sizes, scale=0.125)
    assert len(warmup([config], device=device)) == 2 or device == "cuda"  # by its architecture
    steps = steps_of(device, **sizes)
    assert failed(steps) == []
    (launch,) = steps[LOGGED].evidence
    name = steps[RAN].evidence[0].removeprefix("kernel ")
    assert f"launch kernel={name} " in launch


def test_memory_that_runs_out_after_all_is_an_error_of_ours(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(verify, "available_bytes", lambda device: 2**70)
    with pytest.raises(InputError, match="verify: the sizes: got more than there is memory for"):
        steps_of(batch_size=60000, max_seq_len=1_000_000_000)


@pytest.mark.parametrize("fault", [RuntimeError("illegal memory access"), KernelFault("a race")])
def test_other_faults_are_not_taken_for_too_little_memory(fault: Exception) -> None:
    with pytest.raises(type(fault)) as raised, enough_memory("verify"):
        raise fault
    assert raised.value is fault


@pytest.mark.parametrize(("batch", "heads", "runs"), [(1, 1, 16), (3, 5, 2), (1, 16, 1)])
def test_errors_are_those_of_at_least_16_heads(batch: int, heads: int, runs: int) -> None:
    """In other steps as many runs, of which the caches and the log say nothing."""
    steps = steps_of(batch_size=batch, num_q_heads=heads, num_kv_heads=1, head_dim=64)
    assert failed(steps) == []
    said = [line for line in steps[OUTPUT].evidence if "runs" in line]
    assert said == ([f"errors of {runs} runs, for 16 heads or more"] if runs > 1 else [])
    assert len(steps[LOGGED].evidence) == 1


def test_a_fault_of_a_later_run_fails_the_output(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[None] = []

    def fail_later(output: torch.Tensor, **_: Any) -> None:
        runs.append(None)
        if len(runs) == 2:
            output.fill_(float("nan"))

    after(fail_later)(monkeypatch)
    assert failed(steps_of(batch_size=1, **SMALL)) == [OUTPUT]


def test_the_log_is_left_as_it_was(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, logger="gqa_cutlass")
    before = LOG.level, list(LOG.handlers)
    steps_of(**SMALL)
    assert (LOG.level, LOG.handlers) == before


Arguments = dict[str, Any]
Plant = Callable[[pytest.MonkeyPatch], None]


def after(meddle: Callable[..., None]) -> Plant:
    """Meddle with the tensors when a step has run."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        def faulty(*, config: Any, **tensors: Any) -> None:
            before = {name: t.clone() for name, t in tensors.items()}
            gqa_attention_decode(**tensors, config=config)
            meddle(before=before, config=config, **tensors)

        patch.setattr(verify, "gqa_attention_decode", faulty)

    return plant


def flipping(*index: int) -> Plant:
    """Flip a bit of K's cache, once, however often the step runs."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        original: list[int] = []

        def flip(kv_cache_k: torch.Tensor, **_: Any) -> None:
            element = bits(kv_cache_k)[index]
            original.append(int(element.item()))
            element.fill_(original[0] ^ 1)

        after(flip)(patch)

    return plant


def on_overflow(meddle: Callable[..., None]) -> Plant:
    """Meddle where a step should be refused, in place of it."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        def faulty(*, config: Any, **tensors: Any) -> None:
            if config.cache_len < config.max_seq_len:
                return gqa_attention_decode(**tensors, config=config)
            return meddle(config=config, **tensors)

        patch.setattr(verify, "gqa_attention_decode", faulty)

    return plant


def logging_as(log: Callable[..., None]) -> Plant:
    return lambda patch: patch.setattr(Plan, "log", log)


def _raise(error: Exception) -> None:
    raise error


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.int16)


def write_nothing(kv_cache_k: Any, kv_cache_v: Any, before: Arguments, **_: Any) -> None:
    kv_cache_k.copy_(before["kv_cache_k"])
    kv_cache_v.copy_(before["kv_cache_v"])


def write_the_neighbour(kv_cache_v: Any, before: Arguments, config: Any, **_: Any) -> None:
    at = config.cache_len
    kv_cache_v[:, at + 1] = kv_cache_v[:, at]
    kv_cache_v[:, at] = before["kv_cache_v"][:, at]


def forget_the_new_token(output: Any, q: Any, before: Arguments, config: Any, **_: Any) -> None:
    keys, values = (before[f"kv_cache_{x}"][:, : config.cache_len] for x in "kv")
    lengths = [config.cache_len] * config.batch_size
    attended, _ = attend(q.squeeze(1), keys, values, lengths, config.scale, q.dtype)
    output.copy_(attended.flatten(1).unsqueeze(1))


def log_twice(plan: Plan, *launch: Any) -> None:
    log_of_plan(plan, *launch)
    log_of_plan(plan, *launch)


log_of_plan = Plan.log

FAULTS: dict[str, tuple[int, Plant, str]] = {
    "the step raises": (
        RAN, after(lambda **_: _raise(LaunchError("the driver refused"))),
        "LaunchError: the driver refused",
    ),
    "no output": (OUTPUT, after(lambda output, before, **_: output.copy_(before["output"])), "nan"),
    "random output": (OUTPUT, after(lambda output, **_: output.normal_()), "largest error"),
    "one element of the output": (
        OUTPUT, after(lambda output, **_: output[0, 0, 7].add_(0.01)), "largest error"
    ),
    "heads in another order": (
        OUTPUT, after(lambda output, **_: output.copy_(output.flip(2))), "largest error"
    ),
    "output without the new token": (OUTPUT, after(forget_the_new_token), "largest error"),
    "no append": (CACHES, after(write_nothing), "row 10 of K and V in 2 sequences: NOT"),
    "append to the neighbour": (CACHES, after(write_the_neighbour), "11 to 63: WRITTEN at 11"),
    "append to one sequence": (
        CACHES, after(lambda kv_cache_k, **_: kv_cache_k[1, 10].zero_()), "sequences: NOT"
    ),
    "a bit of an old row": (CACHES, flipping(1, 3, 1, 63), "rows 0 to 9: WRITTEN at 3"),
    "another NaN in a free row": (
        CACHES, after(lambda kv_cache_v, **_: bits(kv_cache_v)[0, 63, 0, 0].fill_(0x7E5B)),
        "rows 11 to 63: WRITTEN at 63",
    ),
    "no log": (LOGGED, logging_as(lambda *_: None), "0 lines for one launch"),
    "two lines": (LOGGED, logging_as(log_twice), "2 lines for one launch"),
    "few keys": (
        LOGGED, logging_as(lambda *_: LOG.debug("launch kernel=%s", "k")), "absent: grid, cluster,"
    ),
    "another length": (
        LOGGED, logging_as(lambda plan, _, *where: log_of_plan(plan, 9, *where)),
        "cache_seqlens is 9, not 10",
    ),
    "at INFO": (LOGGED, logging_as(lambda *_: LOG.info("launch kernel=k")), "0 lines"),
    "overflow without an error": (OVERFLOW, on_overflow(lambda **_: None), "NO error was raised"),
    "overflow with another error": (
        OVERFLOW, on_overflow(lambda **_: _raise(InputError("too long"))), "InputError: too long"
    ),
    "overflow that writes": (
        OVERFLOW, on_overflow(lambda kv_cache_k, **_: (
            kv_cache_k[0, 63].zero_(), _raise(CacheOverflowError("too long"))
        )),
        "output and caches: WRITTEN",
    ),
    "overflow that launches": (
        OVERFLOW, on_overflow(lambda **_: (
            LOG.debug("launch kernel=k"), _raise(CacheOverflowError("too long"))
        )),
        "launches: 1",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("position", "plant", "evidence"), FAULTS.values(), ids=FAULTS)
def test_a_planted_fault_fails_its_step_and_no_other(
    position: int, plant: Plant, evidence: str, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    plant(monkeypatch)
    steps = steps_of(device, **SMALL)
    assert failed(steps) == [position]
    assert evidence in "\n".join(steps[position].evidence)


def test_the_mean_error_counts_where_the_largest_is_allowed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    after(lambda output, **_: output.add_(2e-4))(monkeypatch)
    steps = steps_of(**SMALL)
    assert failed(steps) == [OUTPUT]
    _, *lines = steps[OUTPUT].evidence
    largest, mean = (re.findall(r"\d\.\d\de-\d\d", line) for line in lines[:2])
    assert float(largest[0]) <= float(largest[1]) and float(mean[0]) > float(mean[1])


def test_the_storys_tolerance_counts_where_the_rule_allows_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(verify, "TOLERANCE", 1e-6)
    assert failed(steps_of(**SMALL)) == [OUTPUT]


ONE_OF_EACH = (
    "the step raises", "random output", "append to the neighbour", "no log", "overflow that writes",
)  # fmt: skip


@pytest.mark.parametrize("fault", ONE_OF_EACH)
def test_a_failed_step_is_named_and_the_status_is_1(
    fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    position, plant, evidence = FAULTS[fault]
    plant(monkeypatch)
    result = run(*SMALL_OPTIONS)
    assert result.exit_code == 1
    ends = re.findall(r"^(\d)\. .*: (passed|FAILED)$", result.output, re.M)
    assert [int(n) - 1 for n, end in ends if end == "FAILED"] == [position] and len(ends) == 5
    assert evidence in result.output and result.output.endswith("4 of 5 passed\n")


def test_a_call_that_does_nothing_fails_all_but_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "gqa_attention_decode", lambda **_: None)
    assert failed(steps_of(**SMALL)) == [OUTPUT, CACHES, LOGGED, OVERFLOW]


BAD: dict[str, tuple[list[str], str]] = {
    "negative length": (["--cache-len", "-1"], "cache_len: got -1; allowed: 0 to 1073741823"),
    "10^20 tokens": (
        ["--cache-len", f"{10**20}"],
        "verify: cache_len: got 100000000000000000000, for which about 13107200000000000002621440 "
        "bytes (1.22e+16 GiB) are needed; allowed: 0 to ",
    ),
    "10^20 rows": (["--max-seq-len", f"{10**20}"], "(1.22e+16 GiB) are needed; allowed: 11 to "),
    "10^20 sequences": (["--batch", f"{10**20}"], f"batch: got {10**20}; allowed: 1 to 65535"),
    "overflow": (
        ["--cache-len", "64", "--max-seq-len", "64"],
        "verify: max_seq_len: got 64; allowed: more than cache_len, 64",
    ),
    "no cache": (["--cache-len", "0", "--max-seq-len", "0"], "verify: max_seq_len: got 0"),
    "batch": (["--batch", "0"], "verify: batch: got 0; allowed: 1 to 65535"),
    "heads": (["--q-heads", "-8"], "verify: q_heads: got -8"),
    "group": (["--q-heads", "30"], "head counts: got 30 query heads and 8 KV heads"),
    "head_dim": (["--head-dim", "100"], "head_dim: got 100; allowed: multiples of 8"),
    "negative head_dim": (["--head-dim", "-8"], "verify: head_dim: got -8"),
    "dtype": (["--dtype", "float32"], "verify: dtype: got 'float32'; allowed: float16, bfloat16"),
    "device": (["--device", "abacus"], "verify: device: got 'abacus'; allowed: cuda, cuda:0"),
    "device without kernels": (["--device", "meta"], "verify: device: got 'meta'; allowed: cuda"),
    "memory": (
        ["--batch", "60000", "--max-seq-len", "1000000000", "--device", "cpu"],
        "max_seq_len: got 1000000000, for which about 3932160015728640000 bytes (3.66e+09 GiB) are "
        "needed; allowed: none, the other sizes being as they are",
    ),
    "no GPU": (["--device", "cuda"], "no usable GPU"),
    "no number of a GPU": (["--device", "cuda:\udcff"], r"device: got 'cuda:\udcff'; allowed"),
    "no such number": (["--device", "cuda:99999999999999999999"], "device: got 'cuda:9999"),
}  # fmt: skip


@pytest.mark.parametrize(("options", "message"), BAD.values(), ids=BAD)
def test_bad_arguments_are_one_line_and_status_2(
    options: list[str], message: str,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gqa-cutlass", "verify", *options])
    with pytest.raises(SystemExit) as stopped:
        main()
    captured = capsys.readouterr()
    assert stopped.value.code == 2 and captured.out == ""
    assert captured.err.startswith("gqa-cutlass: ") and message in captured.err
    assert captured.err.count("\n") == 1


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(InputError, match=r"device: got cuda:2; allowed: cuda:0 to cuda:1, cpu\."):
        steps_of("cuda:2", **SMALL)


@pytest.mark.parametrize("gpu", [False, True])
def test_a_gpu_is_taken_where_there_is_one(gpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    assert verify.choose_device(None).type == ("cuda" if gpu else "cpu")
    assert verify.choose_device("cpu") == CPU


def test_provenance_names_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")
    assert verify.provenance(torch.device("cuda:1")).endswith(", on GPU 1")
