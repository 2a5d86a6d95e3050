"""The instructions of compiled kernels: wide asynchronous copies, tensor cores, no local memory;
and of a few kernels all instructions, as they are recorded."""

from __future__ import annotations

import re
from collections import Counter

import pytest
from helpers import by_name
from sass import (
    BASE,
    disassemble,
    figures,
    instructions,
    normalised,
    nvdisasm,
    recorded,
    tools,
)

from gqa_cutlass.codegen import DType, KernelConfig, Math, Schedule, default_config
from gqa_cutlass.codegen.schema.policies import Policy, named, special

_OPCODE = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", re.MULTILINE)
# Those of the record, and one of every narrower copy; in bfloat16 too, and with wide groups.
TMA = [config for config in BASE if config.tma and not config.pdl]
TENSOROP = [
    *(c for c in BASE if c.math is Math.TENSOROP and not c.tma),
    default_config(Math.TENSOROP, DType.F16, 128, 4, 4),
    default_config(Math.TENSOROP, DType.BF16, 64, 8, 2),
]
SIMT = [
    *(c for c in BASE if c.math is Math.SIMT),
    default_config(Math.SIMT, DType.BF16, 64, 4, 4),
    default_config(Math.SIMT, DType.BF16, 80, 1, 2),
    default_config(Math.SIMT, DType.F16, 64, 4, 1),
]


@pytest.fixture
def opcodes(config: KernelConfig) -> Counter[str]:
    """How often each instruction occurs in a kernel for sm_90a."""
    return Counter(_OPCODE.findall(text_of(config)))


def text_of(config: KernelConfig) -> str:
    if nvdisasm() is None:
        pytest.skip("needs nvdisasm: pip install nvidia-cuda-nvdisasm")
    return disassemble(config)


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


@pytest.mark.parametrize("config", by_name(BASE))
def test_machine_code_is_as_recorded(config: KernelConfig) -> None:
    text_of(config)  # or skips
    made_with, kernels = recorded()
    if made_with != tools():
        pytest.skip(f"recorded with {made_with}; here are {tools()}")
    assert figures(config) == kernels[config.name], (
        "the machine code of a kernel has changed. To see how, run `make sass` here and in a "
        "checkout of the commit before, and compare the two folders build/listings with diff -r. "
        "If it is meant to change, `make sass ARGS=--record`, and say in the commit what moved."
    )


@pytest.mark.parametrize("config", by_name(c for c in BASE if c.tma))
def test_tma_waits_for_the_length_before_it_asks_for_the_queries(config: KernelConfig) -> None:
    """Both are counted by one scoreboard, and the queries come behind the tiles: 0.3 us."""
    code = instructions(text_of(config))
    loads = [i for i, each in enumerate(code) if each.text.startswith(("@P0 LDG", "LDG"))]
    length, queries = loads[:2]
    assert code[length].sets == code[queries].sets  # or they could not hold each other up
    assert any(code[length].sets in each.awaits for each in code[length + 1 : queries])


def test_tma_divides_by_constants() -> None:
    """The dims that a block of a cluster owns are a constant of every size of it: divisions by what
    they are in a launch took 1.1 us of a step of 8. Rows of several queries divide by their heads,
    in the other schedule as well."""
    several = (named("SeveralQueries"),)
    assert _divisions(Schedule.TMA, ()) == 0
    assert _divisions(Schedule.TMA, several) <= _divisions(Schedule.MULTISTAGE, several)


def _divisions(schedule: Schedule, features: tuple[Policy, ...]) -> int:
    config = default_config(Math.TENSOROP, DType.F16, 128, 4, 8, schedule, special(features))
    return text_of(config).count("F2I")


def test_every_base_kernel_is_recorded_and_no_other() -> None:
    assert set(recorded()[1]) == {config.name for config in BASE}


LISTING = """
.text.k:
        /*0000*/               @P0 LDC R1, c[0x0][0x28] ;       /* 0x00000a00ff017b82 */
                                                                /* 0x{control:016x} */
.L_x_7:
        /*0010*/                   BRA `(.L_x_7) ;              /* 0x0000840000047ab9 */
                                                                /* 0x000fe20000000a00 */
        /*0020*/                   NOP;                         /* 0x0000000000007918 */
                                                                /* 0x000fc00000000000 */
.L_x_8:
"""


def test_listings_differ_by_instructions_and_by_their_scheduling() -> None:
    text = normalised(LISTING.format(control=0x000FE20000000800), "k")
    assert text == "  0007f1 @P0 LDC R1, c[0x0][0x28]\n.L0:\n  0007f1 BRA `(.L0)\n"
    assert normalised(LISTING.format(control=0x000FCA0000000800), "k") != text  # stalls longer
    assert normalised(LISTING.replace("R1", "R2").format(control=0x000FE20000000800), "k") != text


def test_listings_are_equal_whatever_addresses_and_names() -> None:
    text = LISTING.format(control=0)
    moved = text.replace(".L_x_7", ".L_x_70").replace("*00", "*0f")
    assert normalised(moved, "k") == normalised(text, "k")
    call = text.replace("`(.L_x_7)", "`(my_kernel)")
    assert normalised(call, "my_kernel") == normalised(call.replace("my_kernel", "k2"), "k2")
