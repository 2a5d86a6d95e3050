"""PTX with something wrong in it: instructions, and whole kernels, with seeded random damage.

    python tests/ptx_fuzz.py --minutes 10

draws for so long and prints what ends otherwise than well, with a PtxError or with a KernelFault.
"""

from __future__ import annotations

import argparse
import random
import re
import secrets
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any
from unittest import mock

import numpy as np
from helpers import call_tensors
from ptx_kernels import module, simulate_text

import gqa_cutlass
from gqa_cutlass.codegen import DType, KernelConfig, Math, Schedule, default_config
from gqa_cutlass.cpu.executor import program_from
from gqa_cutlass.errors import CacheOverflowError, KernelFault, PtxError
from gqa_cutlass.kernels.store import Store
from gqa_cutlass.ptxsim.group import Group
from gqa_cutlass.ptxsim.machine import Machine
from gqa_cutlass.ptxsim.simulate import Checks
from gqa_cutlass.tensormap import TensorMap

_TOKEN = re.compile(r"0[fFdD][0-9a-fA-F]+|0x[0-9a-fA-F]+|\d+|[.%$_A-Za-z][\w$.%:]*|\S")
_EDGES = """
    0 1 2 3 4 7 8 15 16 31 32 33 63 64 127 128 255 256 1023 1024 1040 4095 65535 65536 1048575
    1048576 2147483647 2147483648 4294967295 4294967296 9223372036854775807 9223372036854775808
    18446744073709551615 18446744073709551616 0x1000000 0x2000400 0f7F800000 0fFFC00000
    0d7FF0000000000000 1.5
""".split()
# Around the ends of what a number holds, of windows, of shared memory and of a block's part.
_PLACES = [1 << n for n in (0, 10, 16, 20, 24, 31, 32, 60, 61, 62, 63, 64)] + [1024 + 227 * 1024]
_PLACES += [w + place for w in (1 << 60, 1 << 61, 1 << 62) for place in (1024, 1 << 24, 1 << 32)]
_STEPS = (0, 1, 2, 4, 8, 16, 128)
_WORDS = """
    u8 u16 u32 u64 s8 s16 s32 s64 b8 b16 b32 b64 b128 f16 f16x2 bf16 bf16x2 f32 f64 tf32 pred v2
    v4 v8 global shared shared::cta shared::cluster local param const volatile relaxed acquire
    release acq_rel weak cta cluster gpu sys rn rz rm rp rna ftz sat relu approx wide hi lo sync
    aligned any all uni ballot up down bfly idx add min max and or xor exch cas inc dec cg ca nc
    L1::no_allocate L2::128B L2::cache_hint async bulk tensor 1d 2d 5d tile prefetch commit_group
    wait_group wait_all read mbarrier::complete_tx::bytes bulk_group expect_tx noComplete parity
    init inval arrive arrive_drop test_wait try_wait proxy wait to m8n8 m16n8k16 x1 x2 x4 trans
    row col
""".split()
_TYPES = ("%r", "%rd", "%f", "%fd", "%h", "%p")

DECLARE = """
    .shared .align 128 .b8 tile[2048]; .shared .align 8 .b64 bars[4];
    .local .align 16 .b8 own[64]; .reg .b32 %u; .reg .b64 %wide2;
"""
# What registers hold to begin with: numbers, edges, and addresses of everything.
PRELUDE = """
    setp.lt.u32 %p0, %t, 7; setp.ge.u32 %p1, %t, 0; setp.gt.u32 %p2, %t, 99;
    setp.eq.u32 %p3, %lane, 3; mov.u32 %r0, 0; mov.u32 %r1, 1; mov.u32 %r2, 16;
    mov.u32 %r3, 0xFFFFFFFF; mov.u32 %r4, 0x80000000; mov.u32 %r5, %lane; mov.u32 %r6, tile;
    mov.u32 %r7, bars; shl.b32 %r8, %t, 4; add.u32 %r9, %r8, tile; mov.u32 %r10, 1048576;
    mov.u32 %r11, 0x2000400; mov.u32 %r12, 2; mov.u32 %r13, 32; mov.u32 %r14, 7;
    mov.b32 %r15, 0x3F800000; mov.u32 %r16, -1; mov.u64 %rd0, 0; mov.u64 %rd1, %out;
    mov.u64 %rd2, %out_g; mov.u64 %rd3, %src; mov.u64 %rd4, tile; cvta.shared.u64 %rd5, %rd4;
    mov.u64 %rd6, bars; cvta.shared.u64 %rd7, %rd6; mov.u64 %rd8, %map;
    mov.u64 %rd9, 0x7FFFFFFFFFFFFFF0; mov.u64 %rd10, 0x8000000000000000; mov.u64 %rd11, -16;
    mov.u64 %rd12, own; cvta.local.u64 %rd13, %rd12; mov.u64 %rd14, 0x1000000000000;
    add.u64 %rd15, %rd1, 2; mov.f32 %f0, 0f3F800000; mov.f32 %f1, 0f7FC00000;
    mov.f32 %f2, 0fFF800000; mov.f32 %f3, 0f00000001; mov.f64 %fd0, 0d3FF0000000000000;
    mov.f64 %fd1, 0d7FF8000000000000; mov.b16 %h0, 0x3C00; mov.b16 %h1, 0x7C00; mov.b16 %h2, 1;
    setp.eq.u32 %p4, %t, 0; @%p4 mbarrier.init.shared.b64 [bars], 1;
    @%p4 mbarrier.init.shared.b64 [bars+8], 32; st.shared.v4.u32 [%r9], {%r1, %r2, %r3, %r4};
    bar.sync 0;
"""
INSTRUCTIONS = [
    " ".join(statement.split())
    for statement in """
    add.u32 %r1, %r2, %r3; mad.lo.s32 %r1, %r2, %r3, %r4; mul.wide.u32 %rd1, %r2, 4;
    div.s32 %r1, %r4, %r3; rem.u64 %rd1, %rd2, %rd0; shl.b64 %rd1, %rd2, %r3;
    shf.l.wrap.b32 %r1, %r2, %r3, %r4; lop3.b32 %r1, %r2, %r3, %r4, 0xEA;
    prmt.b32 %r1, %r2, %r3, 0x7632; bfe.u32 %r1, %r2, %r3, %r4;
    bfi.b64 %rd1, %rd2, %rd3, %r3, %r4; cvt.rn.f16.f32 %h1, %f0; cvt.u8.u32 %r1, %r3;
    cvt.rzi.s32.f32 %r1, %f1; cvt.rn.bf16x2.f32 %r1, %f0, %f1; fma.rn.f32 %f0, %f1, %f2, %f3;
    fma.rn.f16x2 %r1, %r2, %r3, %r4; ex2.approx.ftz.f32 %f0, %f2; min.f32 %f0, %f1, %f2;
    div.rn.f64 %fd0, %fd1, %fd0; setp.lt.and.f32 %p1|%p2, %f0, %f1, !%p3;
    selp.b32 %r1, %r2, %r3, %p1; set.eq.u32.f32 %r1, %f0, %f1; mov.b64 {%r1, %r2}, %rd1;
    mov.b64 %rd1, {%r1, %r2}; mov.b32 {%h0, %h1}, %r1; mov.u32 %r1, %tid.x; mov.u64 %rd1, tile;
    ld.global.u32 %r1, [%rd1];
    ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%r1, %r2, %r3, %r4}, [%rd3+16];
    ld.global.s8 %r1, [%rd1+3]; ld.volatile.global.u32 %r1, [%rd1];
    ld.acquire.gpu.global.u32 %r1, [%rd1]; ld.shared.v2.f32 {%f0, %f1}, [%r9];
    ld.shared.u32 %r1, [tile+16]; ld.u32 %r1, [%rd5]; ld.u64 %rd1, [%rd13];
    ld.local.b32 %r1, [own+8]; ld.param.u64 %rd1, [out]; ld.param.b32 %r1, [map+4];
    st.global.v2.u32 [%rd2], {%r1, %r2}; st.shared.b16 [%r9+2], %h1; st.local.b64 [own], %rd1;
    st.u32 [%rd5+4], %r1; st.release.gpu.global.u32 [%rd1], %r1;
    atom.global.add.u32 %r1, [%rd1], 1; atom.acq_rel.gpu.global.cas.b32 %r1, [%rd1], %r2, %r3;
    atom.shared.exch.b64 %rd1, [tile+8], %rd2; atom.global.add.f32 %f0, [%rd1], %f1;
    atom.global.min.s64 %rd1, [%rd3], %rd2; red.global.inc.u32 [%rd1], %r1;
    cvta.to.global.u64 %rd1, %rd1; cvta.shared.u64 %rd1, %rd4;
    shfl.sync.bfly.b32 %r1|%p1, %r2, 1, 0x1f, -1; shfl.sync.idx.b32 %r1, %r2, %r5, %r3, %r3;
    vote.sync.ballot.b32 %r1, %p1, -1; vote.sync.any.pred %p1, !%p2, %r3;
    match.any.sync.b64 %r1, %rd1, -1; match.all.sync.b32 %r1|%p1, %r2, -1;
    redux.sync.add.s32 %r1, %r2, %r3; elect.sync %r1|%p1, -1; activemask.b32 %r1; bar.sync 0;
    bar.sync %r1, 32; bar.arrive 1, 64; bar.warp.sync -1; barrier.cluster.arrive.aligned;
    barrier.cluster.wait.acquire; fence.acq_rel.gpu; fence.proxy.async.shared::cta;
    fence.mbarrier_init.release.cluster; membar.gl;
    ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r1, %r2, %r3, %r4}, [%r9];
    ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%r1, %r2}, [%r9+16];
    stmatrix.sync.aligned.m8n8.x1.shared.b16 [%r9], {%r1};
    movmatrix.sync.aligned.m8n8.trans.b16 %r1, %r2;
    mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%f0, %f1, %f2, %f3}, {%r1, %r2, %r3,
      %r4}, {%r5, %r6}, {%f0, %f1, %f2, %f3};
    mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%f0, %f1, %f2, %f3}, {%r1, %r2, %r3,
      %r4}, {%r5, %r6}, {%f0, %f1, %f2, %f3};
    cp.async.cg.shared.global.L2::128B [%r9], [%rd3], 16;
    cp.async.ca.shared.global [%r9], [%rd3], 8, %r1;
    cp.async.ca.shared.global [%r9], [%rd3], 4, %p1; cp.async.commit_group;
    cp.async.wait_group 1; cp.async.wait_all; mbarrier.init.shared.b64 [bars+16], %r1;
    mbarrier.inval.shared.b64 [bars]; mbarrier.arrive.shared.b64 %rd1, [bars];
    mbarrier.arrive.release.cta.shared::cta.b64 _, [bars+8], %r1;
    mbarrier.arrive.expect_tx.shared.b64 %rd1, [bars], 64;
    mbarrier.arrive_drop.shared.b64 %rd1, [bars];
    mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [bars], 16;
    mbarrier.complete_tx.relaxed.cta.shared::cta.b64 [bars], 16;
    mbarrier.test_wait.shared.b64 %p1, [bars], %rd1;
    mbarrier.try_wait.parity.shared.b64 %p1, [bars], 0;
    cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [tile], [%rd3], 64,
      [bars];
    cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%r6], [tile+64],
      %r2, [%r7];
    cp.async.bulk.global.shared::cta.bulk_group [%rd1], [tile], 32; cp.async.bulk.commit_group;
    cp.async.bulk.wait_group 0; cp.async.bulk.prefetch.L2.global [%rd3], 64;
    cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [tile],
      [%rd8, {%r0, %r1}], [bars];
    cp.async.bulk.prefetch.tensor.2d.L2.global.tile [%rd8, {%r0, %r5}];
    st.async.shared::cluster.mbarrier::complete_tx::bytes.u32 [%r11], %r1, [%r7];
    st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%r6], {%r1, %r2, %r3,
      %r4}, [%r7];
    mapa.shared::cluster.u32 %r1, %r6, %r1; mapa.u64 %rd1, %rd5, 0;
    getctarank.shared::cluster.u32 %r1, %r11;
    createpolicy.fractional.L2::evict_last.b64 %rd1, 1.0; griddepcontrol.wait;
    griddepcontrol.launch_dependents; prefetch.global.L2 [%rd1]; nanosleep.u32 20;
    setmaxnreg.inc.sync.aligned.u32 64; bra END; @%p0 bra AGAIN; @!%p1 exit; @%p0 ret; trap;
    """.split(";")
    if statement.strip()
]


@contextmanager
def watched_registers() -> Iterator[None]:
    """Registers always hold their own type, for all lanes or one value for all of them."""
    assign, assign_lanes = Machine.assign, Machine.assign_lanes

    def watched(write: Callable[..., None]) -> Callable[..., None]:
        def checked(machine: Machine, slot: int, value: Any, group: Group) -> None:
            write(machine, slot, value, group)
            held, dtype = machine.regs[slot], machine.context.program.dtype(slot)
            assert held is not None and held.dtype == dtype, (machine.pc, slot, held, dtype)
            assert held.shape in ((1,), (machine.num_lanes,)), (machine.pc, slot, held.shape)

        return checked

    with (
        mock.patch.object(Machine, "assign", watched(assign)),
        mock.patch.object(Machine, "assign_lanes", watched(assign_lanes)),
    ):
        yield


def outcome(run: Callable[[], object]) -> str:
    """How a run ended: "ran", "refused" or "fault".

    Raises:
        Exception: Otherwise than it may.
    """
    try:
        run()
    except PtxError:
        return "refused"
    except KernelFault:
        return "fault"
    return "ran"


def damaged(rng: random.Random, statement: str) -> str:
    """A statement with one or two things changed: a number, a register, a word, an operand."""
    tokens = _TOKEN.findall(statement)
    for _ in range(rng.choice((1, 1, 1, 2))):
        at = rng.randrange(len(tokens))
        if "." in tokens[at] and rng.random() < 0.5:  # most other words are refused
            at = rng.randrange(len(tokens))
        tokens[at : at + 1] = _changed(rng, tokens[at], tokens)
        tokens = tokens or ["ret"]
    return " ".join(tokens)


def _changed(rng: random.Random, token: str, tokens: list[str]) -> list[str]:
    """What takes a token's place."""
    if rng.random() < 0.06:
        return rng.choice(
            ([], [token, token], [rng.choice(tokens)], ["-", token], ["_"], ["!", token],
             [token, ",", rng.choice(tokens)], ["[", token, "]"], ["{", token, "}"],
             [rng.choice("{}[](),;:@!|+=<>-.%")])
        )  # fmt: skip
    if token[0].isdigit():
        return [rng.choice(_EDGES)]
    if token[0] == "%":
        kind = rng.choice(_TYPES) if rng.random() < 0.1 else token.rstrip("0123456789")
        known = kind in _TYPES and rng.random() < 0.97
        return [f"{kind}{rng.randrange(17)}" if known else rng.choice(("%tid.x", "%laneid", "%zz"))]
    if "." in token:
        return [_reworded(rng, token)]
    if token == "]":
        return ["+", rng.choice(("", "-")) + rng.choice(_EDGES), token]
    if token == "[":
        return [token]
    return [rng.choice((token, rng.choice(_EDGES), "tile", "bars", "own", "out", "map", "nowhere"))]


def _reworded(rng: random.Random, opcode: str) -> str:
    words = opcode.split(".")
    at = rng.randrange(len(words))
    match rng.randrange(4):
        case 0:
            words[at] = rng.choice(_WORDS)
        case 1:
            words.insert(at, rng.choice(_WORDS))
        case 2 if len(words) > 1:
            del words[at]
        case _:
            words[at] = rng.choice((*words, *rng.choice(INSTRUCTIONS).split()[0].split(".")))
    return ".".join(words)


def _odd_value(rng: random.Random, statement: str) -> str:
    """A statement before one, that gives some lanes an odd value of a register that it names."""
    names = re.findall(r"%(?:rd|r)\d+\b", statement)
    if not names:
        return ""
    name = rng.choice(names)
    bits = 64 if name.startswith("%rd") else 32
    value = (rng.choice(_PLACES) + rng.choice((-1, 1)) * rng.choice(_STEPS)) % (1 << bits)
    return f"{rng.choice(('', '', '@%p0 ', '@%p3 '))}mov.u{bits} {name}, {value}; "


@dataclass(frozen=True, kw_only=True)
class Snippet:
    """A few instructions behind a prelude, as a kernel of one to four blocks."""

    statements: tuple[str, ...]
    grid: int
    block: int
    cluster: int
    races: bool

    @classmethod
    def random(cls, rng: random.Random) -> Snippet:
        """Draw one, mostly with damage or with odd values."""
        statements = [rng.choice(INSTRUCTIONS) for _ in range(rng.randint(1, 4))]
        for i, statement in enumerate(statements):
            if rng.random() < 0.4:
                statement = damaged(rng, statement)
            if rng.random() < 0.15:
                statement = f"@{rng.choice(('', '!'))}%p{rng.randrange(5)} {statement}"
            if rng.random() < 0.6:
                statement = f"{_odd_value(rng, statement)}{statement}"
            statements[i] = statement
        cluster = rng.choice((1, 1, 2))
        return cls(
            statements=tuple(statements), grid=cluster * rng.choice((1, 2)),
            block=rng.choice((32, 64)), cluster=cluster, races=rng.random() < 0.7,
        )  # fmt: skip

    def run(self) -> None:
        """Run it.

        Raises:
            PtxError: It is not PTX.
            KernelFault: It did what it may not.
        """
        out, source = np.zeros(128, np.uint32), np.arange(256, dtype=np.uint32)
        tensor = TensorMap(
            address=source.ctypes.data, element_bytes=4, sizes=(16, 16), strides=(64,), box=(8, 4),
            swizzle=32,
        )  # fmt: skip
        arguments = {"out": out, "src": source, "map": tensor.to_bytes()}
        body = "".join(f"{s};\n" for s in self.statements)
        simulate_text(
            module(f"{PRELUDE}\nAGAIN:\n{body}END:", DECLARE, **arguments),
            grid=self.grid, block=self.block, cluster=self.cluster, races=self.races,
            max_steps=600, **arguments,
        )  # fmt: skip


class Kernel:
    """A compiled kernel and a small launch of it, to be run with other texts.

    Args:
        config: Which.
        num_splits: Blocks per KV head.
    """

    def __init__(self, config: KernelConfig, num_splits: int = 1) -> None:
        self.name = config.name
        self._tensors = call_tensors(
            batch=1, q_heads=config.group_size, kv_heads=1, head_dim=config.head_dim, max_seq_len=64
        )
        self._plan: Any = gqa_cutlass.plan(
            **self._tensors, cache_seqlens=40, kernel=config, num_splits=num_splits
        )
        self._plan.checks = Checks(max_steps=10_000)
        text = Store.default().get(config, config.ptx_arch).compiled.code.decode()
        self._lines = text[: text.find("\t.section")].split("\n")
        first = text[: text.index("{", text.index(f".entry {self.name}"))].count("\n") + 1
        self._code = [
            i
            for i, line in enumerate(self._lines)
            if i >= first and line.rstrip().endswith(";") and ".reg" not in line
        ]

    def mutant(self, rng: random.Random) -> str:
        """Its text with one to three statements damaged."""
        lines = list(self._lines)
        for i in rng.choices(self._code, k=rng.randint(1, 3)):
            lines[i] = damaged(rng, self._lines[i].strip().rstrip(";")) + ";"
        return "\n".join(lines)

    def run(self, text: str) -> None:
        """Run another text in its place.

        Raises:
            PtxError: It is not PTX.
            KernelFault: It did what it may not.
        """
        self._plan.program = program_from(text, self.name)
        try:
            self._plan(**self._tensors, cache_seqlens=40)
        finally:
            with suppress(CacheOverflowError):  # it may have raised the flag
                gqa_cutlass.check_overflow("cpu")


def kernels() -> list[Kernel]:
    """One of each schedule, that other tests compile as well."""
    tma, multistage = (
        default_config(Math.TENSOROP, DType.F16, 128, 4, 8, schedule)
        for schedule in (Schedule.TMA, Schedule.MULTISTAGE)
    )
    return [Kernel(tma, 2), Kernel(multistage)]


def main() -> int:
    """Draw until the time is over, and print what ends otherwise than it may."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=1)
    parser.add_argument("--seed", type=int, default=secrets.randbits(32))
    given = parser.parse_args()
    print(f"seed {given.seed}")
    real, found, seen = kernels(), Counter[str](), set[str]()
    end = time.monotonic() + 60 * given.minutes
    with watched_registers():
        for i in count():
            rng = random.Random(f"{given.seed} {i}")
            if i % 40:
                snippet = Snippet.random(rng)
                what, run = str(snippet), snippet.run
            else:
                kernel = rng.choice(real)
                what, run = kernel.name, partial(kernel.run, kernel.mutant(rng))
            try:
                found[outcome(run)] += 1
            except Exception:
                trace = traceback.format_exc()
                found["BUG"] += 1
                if (place := "\n".join(trace.splitlines()[-4:])) not in seen:
                    seen.add(place)
                    print(f"draw {i}: {what}\n{trace}", flush=True)
            if time.monotonic() > end:
                break
    print(dict(found))
    return int("BUG" in found)


if __name__ == "__main__":
    sys.exit(main())
