"""The C library's example, examples/decode.c, with the fake driver and ptxsim."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from c_and_python import TMA_128, WIDE_64
from c_build import build, write_dummies
from c_driver import DriverLaunch, argument_of, fields_of
from c_library import Library, fresh_copy
from c_simulator import Simulator
from torch import Tensor

from gqa_cutlass.codegen import KernelConfig

EXAMPLES = {
    "multistage": ((2, 8, 2, 64, 11, 40, "f16"), WIDE_64),
    "clusters": ((1, 8, 2, 128, 140, 300, "bf16"), TMA_128),
}


@pytest.fixture(scope="module")
def built_example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library with the example, whose main is a function like others."""
    folder = tmp_path_factory.mktemp("example")
    bundle = write_dummies(folder, [kernel for _, kernel in EXAMPLES.values()], ("sm_90a",))
    source = bundle / "examples" / "decode.c"
    return build(bundle, folder / "libgqa.so", "-Dmain=example", str(source))


@pytest.fixture
def example(built_example: Path) -> Library:
    """The same as in a new process."""
    return fresh_copy(built_example)


def run_example(library: Library, arguments: tuple[object, ...]) -> int:
    """The example's exit status."""
    words = [b"decode", *(str(argument).encode() for argument in arguments)]
    status = int(library.c.example(len(words), (ctypes.c_char_p * len(words))(*words)))
    ctypes.CDLL(None).fflush(None)
    return status


def simulate_example(library: Library, arguments: tuple[Any, ...]) -> Callable[[DriverLaunch], int]:
    """Runs the example's launch in ptxsim."""
    batch, q_heads, kv_heads, head_dim, _, max_seq_len, dtype = arguments
    kind = {"f16": torch.float16, "bf16": torch.bfloat16}[dtype]
    query, token = (batch, q_heads, head_dim), (batch, kv_heads, head_dim)
    cache = (batch, max_seq_len, kv_heads, head_dim)
    shapes = {"q": query, "k_cache": cache, "v_cache": cache, "k_new": token, "v_new": token,
              "out": query}  # fmt: skip
    simulator = Simulator(library)

    def at(address: int, shape: tuple[int, ...]) -> Tensor:
        memory = (ctypes.c_char * (2 * math.prod(shape))).from_address(address)
        return torch.frombuffer(memory, dtype=kind).view(shape)

    def launch(launched: DriverLaunch) -> int:
        fields = fields_of(argument_of(launched))
        simulator.tensors = {name: at(fields[name], shape) for name, shape in shapes.items()}
        return simulator.launch(launched)

    return launch


@pytest.mark.parametrize(("arguments", "kernel"), EXAMPLES.values(), ids=EXAMPLES)
def test_the_example_decodes_and_finds_itself_right(
    example: Library, arguments: tuple[Any, ...], kernel: KernelConfig,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    example.driver.on_launch(simulate_example(example, arguments))
    assert run_example(example, arguments) == 0
    printed = dict(line.split(" ", 1) for line in capfd.readouterr().out.splitlines())
    assert printed["kernel"] == kernel.name
    error, _, allowed = printed["error"].split()
    assert 0 < float(error) <= float(allowed)


def test_the_example_finds_a_kernel_that_does_nothing(
    example: Library, capfd: pytest.CaptureFixture[str]
) -> None:
    example.driver.on_launch(lambda launch: 0)
    assert run_example(example, EXAMPLES["multistage"][0]) == 1
    assert "the caches do not hold what they should" in capfd.readouterr().err


def test_the_example_takes_seven_arguments(example: Library) -> None:
    for arguments in ((), (1, 8, 2, 64, 11, 40), (1, 8, 2, 64, 11, 40, "f32")):
        assert run_example(example, arguments) == 2


def test_the_example_says_where_there_is_no_gpu(
    example: Library, capfd: pytest.CaptureFixture[str]
) -> None:
    example.driver.remove()
    assert run_example(example, EXAMPLES["multistage"][0]) == 77
    assert "no usable GPU" in capfd.readouterr().err
