"""PTX text: what the grammar lets through, and that everything else is refused, never a crash."""

from __future__ import annotations

import random

import numpy as np
import pytest
from ptx_kernels import faults, module, refuses, run_ptx, simulate_text

from gqa_cutlass.errors import PtxError
from gqa_cutlass.ptxsim.prepare import Program
from gqa_cutlass.ptxsim.text.ptx import parse
from gqa_cutlass.ptxsim.text.syntax import (
    Address,
    Imm,
    Instruction,
    Kernel,
    Not,
    Operand,
    Pair,
    Reg,
    Symbol,
    Vector,
)


def entry(body: str, head: str = "", params: str = "", module_level: str = "") -> str:
    return (
        f".version 9.0\n.target sm_90\n.address_size 64\n{module_level}\n"
        f".visible .entry k({params})\n{head}\n{{\n{body}\n}}\n"
    )


def kernel(body: str, **more: str) -> Kernel:
    return parse(entry(body, **more), "k")


def first(body: str) -> Instruction:
    return kernel(body).instructions[0]


def operand(text: str, declare: str = "") -> Operand:
    """The second operand of an instruction."""
    return first(f"{declare} foo.b32 %d, {text};").operands[1]


@pytest.mark.parametrize(
    ("text", "expected"),
    {
        "register": ("%r1", Reg("%r1")),
        "special": ("%tid.x", Reg("%tid.x")),
        "none": ("_", Reg("_")),
        "symbol": ("smem", Symbol("smem")),
        "label": ("$L__BB0_1", Symbol("$L__BB0_1")),
        "dotted": ("_ZN1a$b1cE", Symbol("_ZN1a$b1cE")),
        "decimal": ("42", Imm(42)),
        "unsigned": ("42U", Imm(42)),
        "octal": ("017", Imm(15)),
        "binary": ("0b101", Imm(5)),
        "hex": ("0xfFU", Imm(255)),
        "negative": ("-42", Imm(-42)),
        "negative hex": ("-0x10", Imm(-16)),
        "f32 bits": ("0f3F800000", Imm(0x3F800000, 32)),
        "F32 bits": ("0F3f800000", Imm(0x3F800000, 32)),
        "f64 bits": ("0d3FF0000000000000", Imm(0x3FF0000000000000, 64)),
        "decimal float": ("1.5", Imm(0x3FC00000, 32)),
        "negative float": ("-1.5", Imm(0xBFC00000, 32)),
        "float with exponent": ("2.5e1", Imm(0x41C80000, 32)),
        "negated": ("!%p1", Not(Reg("%p1"))),
        "pair": ("%r1|%p1", Pair(Reg("%r1"), Reg("%p1"))),
        "pair without first": ("_|%p1", Pair(Reg("_"), Reg("%p1"))),
        "vector": ("{%r1, _, 3}", Vector((Reg("%r1"), Reg("_"), Imm(3)))),
        "vector of one": ("{%r1}", Vector((Reg("%r1"),))),
        "address": ("[%rd1]", Address(Reg("%rd1"), 0)),
        "address plus": ("[%rd1+16]", Address(Reg("%rd1"), 16)),
        "address plus minus": ("[%rd1+-16]", Address(Reg("%rd1"), -16)),
        "address minus": ("[ %rd1 - 16 ]", Address(Reg("%rd1"), -16)),
        "address hex": ("[%rd1+0x10]", Address(Reg("%rd1"), 16)),
        "variable": ("[smem+4]", Address(Symbol("smem"), 4)),
        "absolute": ("[1024]", Address(None, 1024)),
    }.values(),
)  # fmt: skip
def test_operands(text: str, expected: Operand) -> None:
    assert operand(text) == expected


def test_an_instruction_knows_its_parts_and_its_line() -> None:
    found = kernel("ret;\n\n@!%p3 ld.global.L1::no_allocate.v2.u32 {%r1, %r2}, [%rd1+8];")
    load = found.instructions[1]
    assert load.opcode == ("ld", "global", "L1::no_allocate", "v2", "u32")
    assert load.name == "ld.global.L1::no_allocate.v2.u32"
    assert (load.guard, load.negated) == (Reg("%p3"), True)
    assert load.operands == (Vector((Reg("%r1"), Reg("%r2"))), Address(Reg("%rd1"), 8))
    assert load.line == 10
    assert load.where == "PTX line 10"


def test_comments_and_white_space_mean_nothing() -> None:
    spaced = "// ret;\n mov.u32\t%r1 , /* 7\n; */ 8 ;//\nret ; "
    assert kernel(spaced).instructions[0].operands == (Reg("%r1"), Imm(8))
    assert kernel(spaced).instructions[1].line == kernel(spaced).instructions[0].line + 1 + 1


def test_registers_have_the_width_of_their_type() -> None:
    found = kernel(".reg .pred %p<2>; .reg .b16 %h<2>; .reg .f32 %f<2>; .reg .u64 a, b; ret;")
    assert found.registers == {
        "%p0": 1, "%p1": 1, "%h0": 16, "%h1": 16, "%f0": 32, "%f1": 32, "a": 64, "b": 64,
    }  # fmt: skip


def test_variables_have_a_space_a_size_and_an_alignment() -> None:
    found = kernel(
        ".shared .align 16 .b8 tile[48]; .local .align 8 .b8 depot[24]; .shared .f64 one;\n"
        ".shared .v4 .f32 rows[2][3]; ret;",
        params=".param .align 8 .b8 params[24], .param .u64 .ptr .global .align 4 p, .param .u32 n",
        module_level=".extern .shared .align 128 .b8 dynamic[];\n"
        ".visible .const .align 4 .s32 table[2] = {1, -2};",
    )
    shape = {n: (v.space, v.size, v.align) for n, v in found.variables.items()}
    assert shape == {
        "dynamic": ("shared", 0, 128), "table": ("const", 8, 4), "params": ("param", 24, 8),
        "p": ("param", 8, 8), "n": ("param", 4, 4), "tile": ("shared", 48, 16),
        "depot": ("local", 24, 8), "one": ("shared", 8, 8), "rows": ("shared", 96, 4),
    }  # fmt: skip
    assert found.variables["table"].initial == b"\1\0\0\0\xfe\xff\xff\xff"


def test_directives_of_an_entry_are_kept() -> None:
    found = kernel("ret;", head=".maxntid 128, 1, 1\n.minnctapersm 2\n.explicitcluster")
    assert found.directives == {"maxntid": (128, 1, 1), "minnctapersm": (2,), "explicitcluster": ()}


def test_other_functions_of_the_module_are_skipped() -> None:
    text = entry(
        "ret;",
        module_level=".extern .func (.param .b32 r) vprintf (.param .b64 a, .param .b64 b);\n"
        ".func helper(.param .b32 a)\n{ { .reg .b32 x; } bogus; }\n"
        ".entry other(.param .u32 n) { .shared .b8 mine[4]; bogus.b32 x; }",
    )
    found = parse(text, "k")
    assert [i.name for i in found.instructions] == ["ret"]
    assert found.variables == {}


# Scopes


def test_inline_assembly_may_declare_the_same_names_again_and_again() -> None:
    block = """
        {{ .reg .pred p; .reg .b32 n; mov.u32 n, {start};
        LOOP: add.u32 n, n, 1; setp.lt.u32 p, n, {end}; @p bra LOOP;
        @!p bra DONE; add.u32 n, n, 1000; DONE: add.u32 %r1, %r1, n; }}
    """
    out = np.zeros(32, np.uint32)
    body = "".join(block.format(start=s, end=e) for s, e in ((0, 3), (10, 15), (5, 6)))
    run_ptx(f"mov.u32 %r1, 0; {body} st.global.u32 [%out_g], %r1;", out=out)
    assert (out == 3 + 15 + 6).all()


def test_a_forward_branch_goes_to_the_label_of_its_own_braces() -> None:
    out = np.zeros(32, np.uint32)
    run_ptx(
        """
        mov.u32 %r1, 0;
        { bra DONE; add.u32 %r1, %r1, 1;
          { bra DONE; add.u32 %r1, %r1, 2; DONE: add.u32 %r1, %r1, 4; }
          add.u32 %r1, %r1, 8; DONE: add.u32 %r1, %r1, 16;
          { bra DONE; add.u32 %r1, %r1, 32; DONE: add.u32 %r1, %r1, 64; }
        }
        bra DONE; add.u32 %r1, %r1, 128; DONE: st.global.u32 [%out_g], %r1;
        """,
        out=out,
    )
    assert (out == 16 + 64).all()


def test_a_branch_may_leave_its_braces() -> None:
    out = np.zeros(32, np.uint32)
    run_ptx(
        "mov.u32 %r1, 1; { { bra OUT; } } mov.u32 %r1, 2; OUT: st.global.u32 [%out_g], %r1;",
        out=out,
    )
    assert (out == 1).all()


def test_an_inner_register_hides_an_outer_one() -> None:
    out = np.zeros(32, np.uint32)
    run_ptx(
        "{ .reg .b32 x; mov.u32 x, 1; { .reg .b32 x; mov.u32 x, 2; } st.global.u32 [%out_g], x; }",
        out=out,
    )
    assert (out == 1).all()


@pytest.mark.parametrize("end", ["END:", "ret; END:", "bra END; END:", "{ bra IN; IN: } END:"])
def test_the_end_of_the_body_exits(end: str) -> None:
    out = np.zeros(32, np.uint32)
    body = "setp.lt.u32 %p1, %t, 4; @%p1 bra END; st.global.u32 [%out_g], 1;"
    text = module(f"{body} {end}", out=out)
    simulate_text(text.replace("\nret;\n}", "\n}"), out=out)
    assert out.tolist() == [0] * 4 + [1] * 28


# Line information


LOCATED = """
.file 1 "/src/include/load.cuh"
.file 2 "/src/include/ptx.cuh"
.file 3 "/src/kernel.cu"
"""


def source(locations: str) -> str:
    """Source of an instruction behind some `.loc`s."""
    return parse(entry(f"{locations}\nret;") + LOCATED, "k").instructions[0].source


def test_source_names_file_and_line() -> None:
    assert source(".loc\t2 30 5") == "ptx.cuh:30"


def test_source_names_where_it_was_inlined() -> None:
    locations = ".loc 1 88 3\n.loc 2 30 5, function_name $L__info_string0, inlined_at 1 88 3"
    assert source(locations) == "ptx.cuh:30, inlined at load.cuh:88"


def test_source_names_all_levels_of_inlining() -> None:
    locations = """
        .loc 3 7 1
        .loc 1 88 3, function_name $L__info_string0, inlined_at 3 7 1
        .loc 2 30 5, function_name $L__info_string1, inlined_at 1 88 3
    """
    assert source(locations) == "ptx.cuh:30, inlined at load.cuh:88, inlined at kernel.cu:7"


def test_source_is_where_the_code_was_inlined_last() -> None:
    locations = """
        .loc 3 7 1
        .loc 1 88 3, function_name $L__info_string0, inlined_at 3 7 1
        .loc 1 88 3
        .loc 2 30 5, function_name $L__info_string1, inlined_at 1 88 3
    """
    assert source(locations) == "ptx.cuh:30, inlined at load.cuh:88"


def test_source_of_a_circle_ends() -> None:
    assert source(".loc 2 30 5, function_name $L, inlined_at 2 30 5").startswith("ptx.cuh:30, inl")


@pytest.mark.parametrize(
    ("locations", "expected"), [("", ""), (".loc 1 0 3", ""), (".loc 9 5 1", "?:5")]
)
def test_source_without_line_information(locations: str, expected: str) -> None:
    assert source(locations) == expected


def test_faults_name_the_source() -> None:
    out = np.zeros(4, np.uint32)
    body = (
        ".loc 1 88 3\n.loc 2 30 5, function_name $L, inlined_at 1 88 3\nst.global.u32 [%out_g], 1;"
    )
    with faults("st.global.u32", r"at ptx.cuh:30, inlined at load.cuh:88 \(PTX line \d+\)"):
        simulate_text(module(body, out=out) + LOCATED, out=out)


# What is refused


def test_refuses_a_module_without_the_kernel() -> None:
    with refuses("no kernel 'k'", "needed: an .entry of that name"):
        parse(entry("ret;").replace("entry k", "entry j"), "k")


@pytest.mark.parametrize("target", ["sm_75", "sm_100a", "sm_120", "compute_90", "x"])
def test_refuses_code_for_other_architectures(target: str) -> None:
    text = f".version 9.0\n.target {target}\n.visible .entry k()\n{{\nret;\n}}\n"
    with pytest.raises(PtxError, match=f"line 2: got code for {target}; allowed: sm_80 to sm_90"):
        parse(text, "k")


@pytest.mark.parametrize(
    "target", ["sm_80", "sm_89", "sm_90", "sm_90a", "sm_80, texmode_independent"]
)
def test_reads_code_for_these_architectures(target: str) -> None:
    text = f".version 9.0\n.target {target}\n.address_size 64\n.visible .entry k()\n{{\nret;\n}}\n"
    assert parse(text, "k").name == "k"


def test_refuses_nothing_at_all() -> None:
    with refuses("no kernel 'k'"):
        parse("", "k")


@pytest.mark.parametrize(
    ("body", "line", "essential"),
    [
        ("ret", 9, "got '}'"),
        ("mov.u32 %r1 %r2;", 8, "got '%r2'"),
        ("mov.u32 %r1, ;", 8, "got ';'"),
        ("mov.u32 %r1, (%r2);", 8, "got '\\('"),
        ("mov.u32 %r1, {{%r2}};", 8, "got '{'"),
        ("mov.u32 %r1, {%r2;", 8, "got ';'"),
        ("mov.u32 %r1, -%r2;", 8, "got '-'"),
        ("mov.u32 %r1, 08;", 8, "got '08'; needed: a number"),
        ("ld.u32 %r1, [%r2*4];", 8, r"got '\*'"),
        ("ld.u32 %r1, [%r2+x];", 8, "got 'x'; needed: an integer"),
        ("ld.u32 %r1, [];", 8, "got ']'"),
        ("ld.u32 %r1, [1.5];", 8, "got '1.5'"),
        ("@7 ret;", 8, "got '7'; needed: a register"),
        ("7;", 8, "got '7'; needed: an instruction"),
        (".reg .b31 %r<2>;", 8, "got '.b31'"),
        (".reg .b32 %r<x>;", 8, "got 'x'"),
        (".reg .b32 %r<4294967295>;", 8, "at most"),
        (".reg .b32 4;", 8, "got '4'"),
        (".shared .align 3 .b8 x[4];", 8, "power of two, not 3"),
        (".shared .align y .b8 x[4];", 8, "got 'y'"),
        (".shared x[4];", 8, "needed: the name and the type"),
        (".shared .b8 x[-4];", 8, "got '-'"),
        ("L: L: ret;", 8, "got 'L'"),
        ("ret; ?", 8, r"got '\?'; allowed: the tokens of PTX"),
        ("\nret; /* never closed", 9, "got '/'"),
        ("{" * 5000, 8, "levels of braces"),
        ("ret; } }", 8, "got '}'; needed: a function or a variable"),
    ],
)
def test_refuses_what_is_not_ptx(body: str, line: int, essential: str) -> None:
    with refuses(essential, f"line {line}:"):
        kernel(body)


SAMPLE = (
    module(
        """
        .loc 1 88 3
        { .reg .pred p; .reg .b32 n; mov.u32 n, 0;
        LOOP: add.u32 n, n, 1; setp.lt.u32 p, n, 4; @p bra LOOP; }
        mov.f32 %f1, 0f3F800000; mov.b64 {%r1, %r2}, %rd1; ld.global.u32 %r3, [%out_g+-4];
        @!%p1 bra END; shfl.sync.idx.b32 %r4|%p2, %r1, 0, 0x1f, -1; bar.sync 0;
        cp.async.cg.shared.global [tile+16], [%out], 16;
        END: st.global.v2.u32 [%out_g], {%r3, %r4};
        """,
        declare=".shared .align 16 .b8 tile[64];",
        out=np.zeros(32, np.uint32),
    )
    + LOCATED
)


def test_the_complete_text_is_read() -> None:
    assert len(Program(parse(SAMPLE, "k")).code) == SAMPLE.count(";") - SAMPLE.count(".reg") - 1


@pytest.mark.parametrize("part", range(8))
def test_text_cut_short_is_refused(part: int) -> None:
    """At every position, of which each case takes an eighth."""
    for end in range(part, SAMPLE.index("\nret;\n}") + len("\nret;\n"), 8):
        with pytest.raises(PtxError):
            Program(parse(SAMPLE[:end], "k"))


def _damage(rng: random.Random) -> str:
    """The sample with some characters lost, doubled, swapped or made up."""
    text = list(SAMPLE)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(text) - 1)
        match rng.randrange(4):
            case 0:
                del text[at : at + rng.randint(1, 30)]
            case 1:
                text[at:at] = text[at : at + rng.randint(1, 30)]
            case 2:
                text[at], text[at + 1] = text[at + 1], text[at]
            case 3:
                text[at] = chr(
                    rng.choice([0, 9, 36, 40, 46, 59, 64, 91, 93, 123, 125, 233, 0x2028])
                )
    return "".join(text)


@pytest.mark.parametrize("seed", range(8))
def test_damaged_text_is_refused_or_read_but_never_a_crash(seed: int) -> None:
    rng = random.Random(seed)
    refused = 0
    for _ in range(60):
        try:
            Program(parse(_damage(rng), "k"))
        except PtxError:
            refused += 1
    assert refused > 20
