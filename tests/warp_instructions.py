"""The warp-level instructions that ptxsim knows, each as a kernel, as in `instructions`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from instructions import MEMORY, Array, Form, Opcode, asm, kernel

from gqa_cutlass.ptxsim.warp import exchange, matrix

WARP = 32
LANES = np.arange(WARP, dtype=np.uint32)
MATRIX_WORDS = 4 * 8 * 4  # 32-bit words of four matrices of 8 x 8 elements of 16 bits
_U32 = np.dtype(np.uint32)
_ROW = np.dtype((np.uint32, 4))
REDUCTIONS = [(op, kind) for op in ("add", "min", "max") for kind in ("u32", "s32")]
REDUCTIONS += [(op, "b32") for op in ("and", "or", "xor")]
Run = Callable[..., list[Array]]


def exchanges() -> list[Form]:
    """Return shfl, vote, match, redux and elect; their last source is a membermask.

    Lanes execute that are in the mask they hold; those of a warp may hold different ones.
    """
    return [
        *(_shfl(mode) for mode in ("up", "down", "bfly", "idx")),
        *(_vote(mode) for mode in ("all", "any", "uni", "ballot")),
        *(_match(mode, width) for mode in ("any", "all") for width in (32, 64)),
        *(_redux(op, kind) for op, kind in REDUCTIONS),
        _exchange("elect.sync", "{op} %0|p, %2; selp.u32 %1, 1, 0, p;", [32], 2, _run_elect),
    ]


def executing(mask: Array) -> Array:
    """Tell which lanes are in the membermask that they hold, (w, 32)."""
    return (mask.reshape(-1, WARP) >> LANES & 1).astype(np.bool_)


def _exchange(opcode: str, text: str, sources: Sequence[int], results: int, run: Run) -> Form:
    symbol = opcode.replace(".", "_")
    names = [(f"s{i}", MEMORY[width][0]) for i, width in enumerate(sources)]
    statement = asm(
        f".reg .pred p, q; {text.format(op=opcode)}",
        [("r", f"t{i}") for i in range(results)],
        [(MEMORY[width][2], f"s{i}[i]") for i, width in enumerate(sources)],
    )
    return Form(
        opcode=tuple(opcode.split(".")),
        symbol=symbol,
        source=kernel(
            symbol,
            names,
            [(f"r{i}", "unsigned") for i in range(results)],
            f"if (s{len(sources) - 1}[i] >> (i & 31) & 1) {statement}",
        ),
        outputs=(_U32,) * results,
        run=run,
        constants={},
    )


def _by_warp(function: Callable[..., tuple[Array, ...]]) -> Run:
    """Turn a function of (w, 32) arrays, the last of them a mask, into one of arrays of threads."""

    def run(*arrays: Array) -> list[Array]:
        whole = [array.reshape(-1, WARP) for array in arrays]
        active = executing(whole[-1])
        results = function(*whole, active)
        return [np.where(active, result, 0).astype(np.uint32).reshape(-1) for result in results]

    return run


def _shfl(mode: str) -> Form:
    def run(value: Array, lane: Array, clamp: Array, mask: Array, active: Array) -> Any:
        return exchange.shfl(mode, value, lane, clamp, active)[:2]

    text = "{op} %0|p, %2, %3, %4, %5; selp.u32 %1, 1, 0, p;"
    return _exchange(f"shfl.sync.{mode}.b32", text, [32] * 4, 2, _by_warp(run))


def _vote(mode: str) -> Form:
    def run(votes: Array, mask: Array, active: Array) -> Any:
        return (exchange.vote(mode, votes != 0, mask, active),)

    if mode == "ballot":
        opcode, text = "vote.sync.ballot.b32", "setp.ne.u32 q, %1, 0; {op} %0, q, %2;"
    else:
        opcode = f"vote.sync.{mode}.pred"
        text = "setp.ne.u32 q, %1, 0; {op} p, q, %2; selp.u32 %0, 1, 0, p;"
    return _exchange(opcode, text, [32, 32], 1, _by_warp(run))


def _match(mode: str, width: int) -> Form:
    def run(value: Array, mask: Array, active: Array) -> Any:
        masks, unanimous = exchange.match(mode, value, mask, active)
        return (masks,) if mode == "any" else (masks, unanimous)

    any_text, all_text = "{op} %0, %1, %2;", "{op} %0|p, %2, %3; selp.u32 %1, 1, 0, p;"
    text, results = (any_text, 1) if mode == "any" else (all_text, 2)
    return _exchange(f"match.{mode}.sync.b{width}", text, [width, 32], results, _by_warp(run))


def _redux(op: str, kind: str) -> Form:
    def run(value: Array, mask: Array, active: Array) -> Any:
        return (exchange.redux(op, kind, value, mask, active),)

    return _exchange(f"redux.sync.{op}.{kind}", "{op} %0, %1, %2;", [32, 32], 1, _by_warp(run))


def _run_elect(mask: Array) -> list[Array]:
    return _by_warp(exchange.elect)(mask)


def matrices() -> list[Form]:
    """Return movmatrix, ldmatrix and stmatrix."""
    variants = [(num, transposed) for num in (1, 2, 4) for transposed in (False, True)]
    return [
        _movmatrix(),
        *(_ldmatrix(*variant) for variant in variants),
        *(_stmatrix(*variant) for variant in variants),
    ]


def _movmatrix() -> Form:
    name = "movmatrix.sync.aligned.m8n8.trans.b16"
    return Form(
        opcode=tuple(name.split(".")),
        symbol="movmatrix",
        source=kernel(
            "movmatrix",
            [("s0", "unsigned")],
            [("r0", "unsigned")],
            asm(f"{name} %0, %1;", [("r", "t0")], [("r", "s0[i]")]),
        ),
        outputs=(_U32,),
        run=lambda value: [matrix.movmatrix(value.reshape(-1, WARP)).reshape(-1)],
        constants={},
    )


# A warp's four matrices: a thread holds the row of its number.
_TILE = """__shared__ __align__(16) unsigned tile[4][32][4];
  unsigned const warp = threadIdx.x / 32;
  for (int k = 0; k < 4; ++k) tile[warp][i % 32][k] = rows[i * 4 + k];
  __syncwarp();
  unsigned const address = (unsigned)__cvta_generic_to_shared(tile[warp][which[i]]);
  """
_ROWS = [("rows", "unsigned"), ("which", "unsigned")]


def _moves(head: str, num: int, transposed: bool) -> Opcode:
    trans = ("trans",) if transposed else ()
    return (head, "sync", "aligned", "m8n8", f"x{num}", *trans, "shared", "b16")


def _ldmatrix(num: int, transposed: bool) -> Form:
    """Lanes name rows of the tile, any of them, and get fragments of the matrices."""
    opcode = _moves("ldmatrix", num, transposed)
    registers = ", ".join(f"%{j}" for j in range(num))
    text = f"{'.'.join(opcode)} {{{registers}}}, [%{num}];"
    load = asm(text, [("r", f"t{j}") for j in range(num)], [("r", "address")])

    def run(rows: Array, which: Array) -> list[Array]:
        tile, chosen = rows.reshape(-1, WARP, 4), which.reshape(-1, WARP)
        named = np.take_along_axis(tile, chosen[:, : 8 * num, None].astype(np.int64), axis=1)
        parts = matrix.distribute(named.reshape(-1, num, 8, 4), num, transposed)
        return [part.reshape(-1) for part in parts]

    return Form(
        opcode=opcode,
        symbol="_".join(opcode),
        source=kernel(
            "_".join(opcode), _ROWS, [(f"r{j}", "unsigned") for j in range(num)], _TILE + load
        ),
        outputs=(_U32,) * num,
        run=run,
        constants={},
    )


def _stmatrix(num: int, transposed: bool) -> Form:
    """Lanes name different rows of the tile and store fragments there."""
    opcode = _moves("stmatrix", num, transposed)
    registers = ", ".join(f"%{j + 1}" for j in range(num))
    text = f"{'.'.join(opcode)} [%0], {{{registers}}};"
    sources = [("r", "address"), *(("r", f"s{j}[i]") for j in range(num))]
    symbol = "_".join(opcode)
    store = f"{asm(text, [], sources)}\n  __syncwarp();"
    back = "\n  for (int k = 0; k < 4; ++k) r0[i * 4 + k] = tile[warp][i % 32][k];"

    def run(rows: Array, which: Array, *values: Array) -> list[Array]:
        tile, chosen = rows.reshape(-1, WARP, 4).copy(), which.reshape(-1, WARP)
        fragments = [value.reshape(-1, WARP) for value in values]
        stored = matrix.collect(fragments, num, transposed).reshape(-1, 8 * num, 4)
        places = chosen[:, : 8 * num, None].astype(np.int64)
        np.put_along_axis(tile, places, stored, axis=1)
        return [tile.reshape(-1, 4)]

    arrays = [*_ROWS, *((f"s{j}", "unsigned") for j in range(num))]
    return Form(
        opcode=opcode,
        symbol=symbol,
        source=kernel(symbol, arrays, [("r0", "unsigned")], _TILE + store + back, stored=False),
        outputs=(_ROW,),
        run=run,
        constants={},
    )


MMA_SHAPES = (
    ("m16n8k16", "f32", "f16"),
    ("m16n8k16", "f16", "f16"),
    ("m16n8k16", "f32", "bf16"),
    ("m16n8k8", "f32", "f16"),
    ("m16n8k8", "f16", "f16"),
    ("m16n8k8", "f32", "bf16"),
    ("m16n8k8", "f32", "tf32"),
    ("m16n8k4", "f32", "tf32"),
)


def products() -> list[Form]:
    """Return every mma; its sources are the registers of A, B and C."""
    return [
        _mma(("mma", "sync", "aligned", shape, "row", "col", d, ab, ab, d))
        for shape, d, ab in MMA_SHAPES
    ]


def mma_of(opcode: Opcode) -> matrix.Mma:
    found = matrix.lookup_mma(opcode)
    assert found is not None
    return found


def split(opcode: Opcode, registers: Sequence[Array]) -> list[list[Array]]:
    """Sort the sources of an mma into A, B and C, each register (w, 32)."""
    a, b, _ = mma_of(opcode).registers
    whole = [register.reshape(-1, WARP) for register in registers]
    return [whole[:a], whole[a : a + b], whole[a + b :]]


def _mma(opcode: Opcode) -> Form:
    counts = mma_of(opcode).registers
    results = counts[2]
    places = iter(range(results, results + sum(counts)))
    vectors = [f"{{{', '.join(f'%{next(places)}' for _ in range(count))}}}" for count in counts]
    targets = f"{{{', '.join(f'%{j}' for j in range(results))}}}"
    symbol = "_".join(opcode)
    return Form(
        opcode=opcode,
        symbol=symbol,
        source=kernel(
            symbol,
            [(f"s{j}", "unsigned") for j in range(sum(counts))],
            [(f"r{j}", "unsigned") for j in range(results)],
            asm(
                f"{'.'.join(opcode)} {targets}, {', '.join(vectors)};",
                [("r", f"t{j}") for j in range(results)],
                [("r", f"s{j}[i]") for j in range(sum(counts))],
            ),
        ),
        outputs=(_U32,) * results,
        run=partial(_run_mma, opcode),
        constants={},
    )


def _run_mma(opcode: Opcode, *registers: Array) -> list[Array]:
    d = mma_of(opcode).run(*split(opcode, registers))
    return [register.reshape(-1) for register in d]
