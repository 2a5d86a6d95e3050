"""The instructions of compiled kernels: wide asynchronous copies, tensor cores, no local memory."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
from helpers import by_name, compiled

from gqa_cutlass.codegen import DType, KernelConfig, Math, Schedule, default_config

TENSOROP = [
    default_config(Math.TENSOROP, DType.F16, 128, 4, 8),
    default_config(Math.TENSOROP, DType.BF16, 64, 7, 8),
    default_config(Math.TENSOROP, DType.BF16, 256, 8, 8),
    default_config(Math.TENSOROP, DType.F16, 128, 4, 4),
    default_config(Math.TENSOROP, DType.F16, 128, 4, 2),
]
SIMT = [
    default_config(Math.SIMT, DType.F16, 128, 1, 8),
    default_config(Math.SIMT, DType.BF16, 64, 4, 4),
    default_config(Math.SIMT, DType.BF16, 80, 1, 2),
    default_config(Math.SIMT, DType.F16, 64, 4, 1),
]
TMA = [
    default_config(Math.TENSOROP, DType.F16, 128, 4, 8, Schedule.TMA),
    default_config(Math.TENSOROP, DType.BF16, 64, 32, 8, Schedule.TMA),
    default_config(Math.TENSOROP, DType.BF16, 256, 8, 8, Schedule.TMA),
]


def _nvdisasm() -> Path:
    try:
        files = importlib.metadata.files("nvidia-cuda-nvdisasm") or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("needs nvdisasm: pip install nvidia-cuda-nvdisasm")
    return Path(str(next(file for file in files if file.stem == "nvdisasm").locate()))


@cache
def _disassemble(config: KernelConfig, folder: Path) -> Counter[str]:
    cubin = folder / f"{config.name}.cubin"
    cubin.write_bytes(compiled(config).code)
    text = subprocess.run(
        [_nvdisasm(), "-c", cubin], check=True, capture_output=True, text=True
    ).stdout
    return Counter(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", text, re.M))


@pytest.fixture
def opcodes(config: KernelConfig, tmp_path_factory: pytest.TempPathFactory) -> Counter[str]:
    """How often each instruction occurs in a kernel for sm_90a."""
    return _disassemble(config, tmp_path_factory.getbasetemp())


def _starting(opcodes: Counter[str], *prefixes: str) -> set[str]:
    return {opcode for opcode in opcodes if opcode.startswith(prefixes)}


@pytest.mark.parametrize("config", by_name(TENSOROP + SIMT + TMA))
def test_nothing_lives_in_local_memory(opcodes: Counter[str]) -> None:
    assert opcodes["EXIT"] > 0
    assert _starting(opcodes, "LDL", "STL") == set()


@pytest.mark.parametrize("config", by_name(TENSOROP + TMA))
def test_tensorop_multiplies_on_tensor_cores(opcodes: Counter[str]) -> None:
    assert _starting(opcodes, "HMMA.16816.F32")
    assert _starting(opcodes, "LDSM.16.M88.4")  # fragments by ldmatrix
    assert _starting(opcodes, "LDSM.16.MT88.4")


@pytest.mark.parametrize("config", by_name(SIMT))
def test_simt_uses_no_tensor_core(opcodes: Counter[str]) -> None:
    assert opcodes["FFMA"] > 0
    assert _starting(opcodes, "HMMA", "LDSM") == set()


@pytest.mark.parametrize("config", by_name(c for c in TENSOROP + SIMT if c.vec_width > 1))
def test_the_cache_is_copied_asynchronously_and_at_full_width(
    config: KernelConfig, opcodes: Counter[str]
) -> None:
    copies = _starting(opcodes, "LDGSTS")  # cp.async
    assert {_bits(copy) for copy in copies} == {16 * config.vec_width}


@pytest.mark.parametrize("config", by_name(TMA))
def test_the_copy_engine_loads_and_barriers_count(opcodes: Counter[str]) -> None:
    assert _starting(opcodes, "UTMALDG")  # cp.async.bulk.tensor
    assert _starting(opcodes, "SYNCS")  # mbarrier
    assert _starting(opcodes, "UCGABAR")  # barrier.cluster
    assert _starting(opcodes, "LDGSTS") == set()


def _bits(opcode: str) -> int:
    """Width of an access, which is the last part of its name unless it is 32 bits."""
    match = re.search(r"\.(64|128)$", opcode)
    return int(match.group(1)) if match else 32


@pytest.mark.parametrize("config", by_name(c for c in SIMT if c.vec_width == 1))
def test_single_elements_are_copied_through_registers(opcodes: Counter[str]) -> None:
    assert _starting(opcodes, "LDGSTS") == set()
    assert opcodes["LDG.E.U16"] > 0


@pytest.mark.parametrize("config", by_name(TENSOROP[:1] + SIMT[:1]))
def test_new_token_is_appended_at_full_width(opcodes: Counter[str]) -> None:
    assert opcodes["LDG.E.128"] > 0 and opcodes["STG.E.128"] > 0
