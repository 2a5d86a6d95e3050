"""What a cache of 8 bits costs in accuracy: attention over what it holds, beside one of 16 bits.

`python3 -m bench.accuracy` prints the tables, `--write` puts them into docs/accuracy.md. The caches
are multiplied out exactly and attended to in float64, so that what is shown is the error of what is
stored, whatever computes with it; kernels come under the error rule of proof/reference.py on top.
Needs no GPU and no kernel.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gqa_cutlass.proof.reference import attend

DOCUMENT = Path(__file__).parent.parent / "docs" / "accuracy.md"
BEGIN, END = "<!-- accuracy -->", "<!-- /accuracy -->"
GROUP, HEADS = 4, 4  # query heads of a KV head, KV heads
E4M3, E5M2, INT8 = torch.float8_e4m3fn, torch.float8_e5m2, torch.int8
MOST = {E4M3: 448.0, E5M2: 57344.0, INT8: 127.0}
NAMES = {E4M3: "e4m3", E5M2: "e5m2", INT8: "int8"}
# The dimensions of [batch, tokens, heads, dim] that have one scale together.
GRAINS = {"per tensor": (0, 1, 2, 3), "per KV head": (0, 1, 3), "per token and head": (3,)}
SCALED = ("normal", "heavy tails (Student t, 3)", "heads of unlike sizes")  # by such scales:
MISSED = (1 / 8, 1 / 4, 1 / 2, 1, 4, 16, 64, 256, 1024)  # over that of the largest number


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much is drawn.

    Args:
        batch: Sequences.
        tokens: In each cache.
        head_dim: Of queries, keys and values.
    """

    batch: int = 4
    tokens: int = 2048
    head_dim: int = 128


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """A step's data in float16: the newest token's queries, and caches.

    Args:
        q: [batch, heads, head_dim].
        k: [batch, tokens, KV heads, head_dim].
        v: As k.
    """

    q: Tensor
    k: Tensor
    v: Tensor


def _normal(sizes: Sizes, generator: torch.Generator) -> Drawn:
    cache = sizes.batch, sizes.tokens, HEADS, sizes.head_dim
    q = torch.randn(sizes.batch, HEADS * GROUP, sizes.head_dim, generator=generator)
    k, v = (torch.randn(cache, generator=generator) for _ in range(2))
    return Drawn(q=q.half(), k=k.half(), v=v.half())


def _heavy(sizes: Sizes, generator: torch.Generator) -> Drawn:
    """Student's t with three degrees of freedom, of variance 1."""
    drawn = _normal(sizes, generator)

    def tailed(normal: Tensor) -> Tensor:
        squares = torch.randn(3, *normal.shape, generator=generator).square().sum(0)
        return (normal.float() / squares.sqrt()).half()

    return Drawn(q=drawn.q, k=tailed(drawn.k), v=tailed(drawn.v))


def _channels(sizes: Sizes, generator: torch.Generator) -> Drawn:
    """Two dims of every 64 of the keys are 20 times as large, and queries there a twentieth."""
    drawn = _normal(sizes, generator)
    factors = torch.ones(sizes.head_dim)
    factors[5::64] = factors[37::64] = 20
    queries = (drawn.q.float() / factors).half()
    return Drawn(q=queries, k=(drawn.k.float() * factors).half(), v=drawn.v)


def _heads(sizes: Sizes, generator: torch.Generator) -> Drawn:
    """Each KV head's keys and values are 16 times as large as those of the one before."""
    drawn = _normal(sizes, generator)
    factors = (16.0 ** torch.arange(HEADS) / 64).view(HEADS, 1)
    queries = drawn.q.view(sizes.batch, HEADS, GROUP, -1).float() / factors.unsqueeze(-1)
    return Drawn(
        q=queries.view(drawn.q.shape).half(), k=(drawn.k.float() * factors).half(),
        v=(drawn.v.float() * factors).half(),
    )  # fmt: skip


def _tokens(sizes: Sizes, generator: torch.Generator) -> Drawn:
    """One value in 64 tokens is 100 times as large, as are a few of models' first tokens."""
    drawn = _normal(sizes, generator)
    factors = torch.ones(sizes.tokens, 1, 1)
    factors[::64] = 100
    return Drawn(q=drawn.q, k=drawn.k, v=(drawn.v.float() * factors).half())


DATA: dict[str, Callable[[Sizes, torch.Generator], Drawn]] = {
    "normal": _normal,
    "heavy tails (Student t, 3)": _heavy,
    "outlier channels in keys": _channels,
    "heads of unlike sizes": _heads,
    "tokens of unlike sizes": _tokens,
}


def draw(name: str, sizes: Sizes) -> Drawn:
    """The data of this name, the same in every run."""
    return DATA[name](sizes, torch.Generator().manual_seed(list(DATA).index(name)))


def stored(cache: Tensor, kind: torch.dtype, grain: tuple[int, ...], missed: float = 1) -> Tensor:
    """What a cache holds, as it counts.

    Args:
        cache: [batch, tokens, KV heads, head_dim] in 16 bits.
        kind: What it is stored as.
        grain: The dimensions that have one scale together, by which the largest number becomes
            that of `kind`.
        missed: Factor on the scales, as of calibration on other data.

    Returns:
        As the cache, in float64.
    """
    most = MOST[kind]
    largest = cache.float().abs().amax(grain, keepdim=True)
    scale = torch.where(largest > 0, largest / most, 1.0) * missed
    quotient = (cache.float() / scale).clamp(-most, most)
    held = quotient.round() if kind is INT8 else quotient.to(kind)
    return held.double() * scale.double()


def attended(drawn: Drawn, k: Tensor, v: Tensor) -> Tensor:
    """Attention of the newest token over caches, in float64, [batch, heads, head_dim]."""
    batch, tokens = k.shape[:2]
    scale = drawn.q.shape[-1] ** -0.5
    return attend(drawn.q, k, v, [tokens] * batch, scale, torch.float64)[0]


def error(out: Tensor, right: Tensor) -> float:
    """Root of the mean, over heads, of squared errors relative to the head's output."""
    squares = (out - right).square().sum(-1) / right.square().sum(-1)
    return float(squares.mean().sqrt())


def grains(sizes: Sizes) -> list[list[str]]:
    """Rows: data, what is stored, and the error with each grain."""
    rows = []
    for name in DATA:
        drawn = draw(name, sizes)
        right = attended(drawn, drawn.k, drawn.v)
        for kind in MOST:
            found = [
                error(attended(drawn, stored(drawn.k, kind, g), stored(drawn.v, kind, g)), right)
                for g in GRAINS.values()
            ]
            rows.append([name, NAMES[kind], *map(percent, found)])
    return rows


def misses(sizes: Sizes) -> list[list[str]]:
    """Rows: a scale over that of the largest number, and the errors that it gives."""
    drawn = {name: draw(name, sizes) for name in SCALED}
    right = {name: attended(d, d.k, d.v) for name, d in drawn.items()}
    rows = []
    for missed in MISSED:
        found = [
            error(
                attended(d, *(stored(t, kind, GRAINS["per tensor"], missed) for t in (d.k, d.v))),
                right[name],
            )
            for kind in (E4M3, E5M2)
            for name, d in drawn.items()
        ]
        rows.append([f"{missed:g}", *map(percent, found)])
    return rows


def rounding(sizes: Sizes) -> float:
    """The error of an output that is right, and rounded to bfloat16."""
    drawn = draw("normal", sizes)
    right = attended(drawn, drawn.k, drawn.v)
    return error(right.to(torch.bfloat16).double(), right)


def percent(share: float) -> str:
    """A share of 1 with two digits that count."""
    return f"{100 * share:.2g} %"


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Markdown."""
    titles = list(head)
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def report(sizes: Sizes) -> str:
    """Both tables."""
    kinds = [f"{NAMES[kind]}, {name}" for kind in (E4M3, E5M2) for name in SCALED]
    return "\n\n".join(
        (
            f"{sizes.batch} sequences of {sizes.tokens} tokens, {HEADS} KV heads, {GROUP} query "
            f"heads each, {sizes.head_dim} dims, float16. Rounding the output to bfloat16 alone is "
            f"{percent(rounding(sizes))}.",
            table(("data", "stored as", *GRAINS), grains(sizes)),
            "One scale for all, that of the largest number times:",
            table(("scale", *kinds), misses(sizes)),
        )
    )


def main() -> None:
    """Print the tables, or write them."""
    parser = argparse.ArgumentParser(prog="python3 -m bench.accuracy", description=__doc__)
    parser.add_argument("--write", action="store_true", help="into docs/accuracy.md")
    found = report(Sizes())
    if not parser.parse_args().write:
        print(found)
        return
    before, _, rest = DOCUMENT.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    DOCUMENT.write_text(f"{before}{BEGIN}\n{found}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
