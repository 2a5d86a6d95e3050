"""Steps over caches of 8 bits that have a scale for every token and KV head."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from gqa_cutlass import gqa_decode, pack_tree_mask, plan
from gqa_cutlass.call.stored import FP8
from gqa_cutlass.codegen import DType, KernelConfig, Math, Schedule, default_config
from gqa_cutlass.codegen.schema.policies import OF_TOKENS, named, special
from gqa_cutlass.codegen.variants import policies_for
from gqa_cutlass.proof.reference import attend, errors, same_bits, scale_of_row, stored

FP8_TYPES = E4M3, E5M2 = tuple(FP8)
F16, BF16 = torch.float16, torch.bfloat16
_DTYPES = {F16: DType.F16, BF16: DType.BF16}
HEADS, GROUP = 2, 4
STORED = "k_cache", "v_cache", "k_scale", "v_scale"  # what appends write to
_OF_CALLS = "cu_seqlens_k_new", "slot_mapping", "num_splits"  # and not of the reference


@dataclass
class Case:
    """A step.

    Args:
        q: [batch, heads, head_dim]; [batch, tokens, heads, head_dim]; or of all sequences, [tokens,
            heads, head_dim], with cu_seqlens_q.
        k: New keys, [batch, KV heads, head_dim]; likewise.
        v: Likewise.
        k_cache: In 8 bits, as are values; in rows or pages.
        v_cache: Likewise.
        k_scale: Of its tokens.
        v_scale: Likewise.
        lengths: Tokens of each sequence.
        options: Of the call.
        kernel: That runs it; None: the one that dispatch takes.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    k_cache: Tensor
    v_cache: Tensor
    k_scale: Tensor
    v_scale: Tensor
    lengths: list[int]
    options: dict[str, Any] = field(default_factory=dict)
    kernel: KernelConfig | None = None

    def place(self, b: int, token: int) -> tuple[int, int]:
        """Where a token of a sequence is."""
        if "block_table" in self.options:
            page, at = divmod(token, self.k_cache.shape[1])
            return int(self.options["block_table"][b, page]), at
        rows = self.options.get("cache_batch_idx")
        return b if rows is None else int(rows[b]), token

    def new(self, side: str, b: int) -> Tensor:
        """A sequence's new keys or values, [tokens, KV heads, head_dim]."""
        tokens, ends = getattr(self, side), self.options.get("cu_seqlens_k_new")
        own = tokens[b] if ends is None else tokens[ends[b] : ends[b + 1]]
        return own.view(-1, *tokens.shape[-2:])  # type: ignore[no-any-return]

    def held(self) -> dict[str, Tensor]:
        """A copy of what appends write to."""
        return {name: getattr(self, name).clone() for name in STORED}

    def given(self) -> dict[str, Any]:
        """The arguments of a call, but for the lengths."""
        return {name: getattr(self, name) for name in ("q", "k", "v", *STORED)} | self.options

    def run(self, call: Callable[..., Any] = gqa_decode) -> Tensor:
        """Call, with lengths on the device."""
        lengths = torch.tensor(self.lengths, dtype=torch.int32, device=self.q.device)
        if self.kernel is None:
            out: Tensor = call(**self.given(), cache_seqlens=lengths)
            return out
        given = self.q, self.k_cache, self.v_cache, self.k, self.v
        options = self.options | {"k_scale": self.k_scale, "v_scale": self.v_scale}
        if "tree_mask" in options:
            options["tree_mask"] = pack_tree_mask(options["tree_mask"])
        made = plan(*given, cache_seqlens=lengths, kernel=self.kernel, **options)
        return made(*given, lengths)

    def attend_only(self, splits: int) -> Tensor:
        """A step of no new tokens, in so many splits."""
        lengths = torch.tensor(self.lengths, dtype=torch.int32, device=self.q.device)
        made = plan(
            self.q, self.k_cache, self.v_cache, cache_seqlens=lengths, num_splits=splits,
            k_scale=self.k_scale, v_scale=self.v_scale, kernel=self.kernel,
        )  # fmt: skip
        return made(self.q, self.k_cache, self.v_cache, None, None, lengths)

    def right(self, left_out: Collection[int] = ()) -> dict[str, Tensor]:
        """What appends are to leave, of all sequences but some."""
        right, dtype = self.held(), self.k_cache.dtype
        for b, length in enumerate(self.lengths):
            for side in "kv" if b not in left_out else "":
                for i, token in enumerate(self.new(side, b)):
                    scale, place = scale_of_row(token, dtype), self.place(b, length + i)
                    held = stored(token, scale.unsqueeze(-1), dtype)
                    right[f"{side}_scale"][place] = scale
                    right[f"{side}_cache"].view(torch.uint8)[place] = held.view(torch.uint8)
        return right

    def reference(
        self, right: dict[str, Tensor], dtype: torch.dtype, left_out: Collection[int] = ()
    ) -> Tensor:
        """The output over what appends are to leave, every step in `dtype`."""
        lengths = [
            1 if b in left_out else n + len(self.new("k", b)) for b, n in enumerate(self.lengths)
        ]
        return attend(
            self.q, right["k_cache"].to(dtype), right["v_cache"].to(dtype), lengths,
            self.q.shape[-1] ** -0.5, dtype, k_scale=right["k_scale"], v_scale=right["v_scale"],
            **{name: value for name, value in self.options.items() if name not in _OF_CALLS},
        )[0]  # fmt: skip

    def check(
        self, left_out: Collection[int] = (), call: Callable[..., Any] = gqa_decode
    ) -> Tensor:
        """Run it: rows and scales as they should be, to the bit, others as they were, and the
        output within the error rule, but of sequences that are refused or inactive."""
        right = self.right(left_out)
        out = self.run(call)
        for name in STORED:
            assert same_bits(getattr(self, name), right[name]), name
        kinds = torch.float64, self.q.dtype
        found = [out, *(self.reference(right, kind, left_out) for kind in kinds)]
        if left_out:
            others = [b for b in range(len(self.lengths)) if b not in left_out]
            found = [rows[others] for rows in found]
        assert not found[0].isnan().any(), "output"
        assert errors(*found).share <= 1, "output"
        return out


def case(
    device: str, dtype: torch.dtype = E4M3, queries: torch.dtype = F16, *,
    lengths: tuple[int, ...] = (37, 300), capacity: int = 320, head_dim: int = 64, seed: int = 0,
    tail: float = 1.0, group: int = GROUP, tokens: tuple[int, int] | None = None,
) -> Case:  # fmt: skip
    """Random tokens whose sizes differ, as a prompt stores them; `tail` is by how much. One per
    sequence, or so many queries and new ones."""
    generator = torch.Generator().manual_seed(seed)
    batch = len(lengths)

    def random(*shape: int) -> Tensor:
        sizes = torch.randn(*shape[:-1], 1, generator=generator).mul(tail).exp()
        return (torch.randn(shape, generator=generator) * sizes).to(queries).to(device)

    asking, new = ((), ()) if tokens is None else ((tokens[0],), (tokens[1],))
    k, v = random(batch, *new, HEADS, head_dim), random(batch, *new, HEADS, head_dim)
    caches, scales = [], []
    for _ in range(2):
        rows = random(batch, capacity, HEADS, head_dim)
        scales.append(scale_of_row(rows, dtype))
        caches.append(stored(rows, scales[-1].unsqueeze(-1), dtype))
    q = torch.randn(batch, *asking, HEADS * group, head_dim, generator=generator).to(queries)
    made = Case(q.to(device), k, v, *caches, *scales, list(lengths))
    for b, length in enumerate(lengths):  # nobody reads what is behind
        for name in ("k_cache", "v_cache"):
            getattr(made, name)[b, max(length, 0) :].view(torch.uint8).fill_(0x7F)
        made.k_scale[b, max(length, 0) :] = made.v_scale[b, max(length, 0) :] = torch.nan
    return made


def in_pages(made: Case, page_size: int = 16) -> None:
    """The same in pages, of which no sequence has the first."""
    batch, room, *_ = made.k_cache.shape
    most = -(-room // page_size)
    order = torch.randperm(batch * most, generator=torch.Generator().manual_seed(1)) + 1
    table = order.view(batch, most).to(torch.int32).to(made.q.device)
    for name in ("k_cache", "v_cache", "k_scale", "v_scale"):
        rows = getattr(made, name)
        raw = rows.view(torch.uint8) if rows.dtype in FP8 else rows
        pool = torch.zeros(batch * most + 1, page_size, *raw.shape[2:], dtype=raw.dtype)
        pool = pool.to(made.q.device)
        for b in range(batch):
            for token in range(room):
                pool[order[b * most + token // page_size], token % page_size] = raw[b, token]
        setattr(made, name, pool.view(rows.dtype))
    made.options["block_table"] = table


def by_tma(made: Case, num_warps: int = 4) -> Case:
    """The same by a kernel of the tma schedule, whose blocks have few warps: its features are asked
    for already."""
    made.kernel = replace(_kernel_for(made, Schedule.TMA), num_warps=num_warps)
    return made


def by_multistage(made: Case) -> Case:
    """Likewise, by one of the other schedule."""
    made.kernel = _kernel_for(made, Schedule.MULTISTAGE)
    return made


def _kernel_for(made: Case, schedule: Schedule) -> KernelConfig:
    policies = {*policies_for(made.options), OF_TOKENS[FP8_TYPES.index(made.k_cache.dtype)]}
    tokens = made.q.shape[1] if made.q.dim() == 4 else 1
    if made.q.dim() == 4 and "tree_mask" not in made.options:
        policies.add(named("SeveralQueries"))
    return default_config(
        Math.TENSOROP, _DTYPES[made.q.dtype], made.q.shape[-1], made.q.shape[-2] // HEADS, 8,
        schedule, special(tuple(policies)), num_tokens=tokens,
    )  # fmt: skip


def windowed(made: Case) -> None:
    made.options |= {"window_size": (100, 0), "softcap": 1.5}


def with_sinks_and_slopes(made: Case) -> None:
    slopes = torch.linspace(0, 0.3, HEADS * GROUP, device=made.q.device)
    made.options |= {"sinks": slopes * 10, "alibi_slopes": slopes}


def padded_rows(made: Case) -> None:
    """And rows by an index, of which there are more."""
    for name in ("k_cache", "v_cache", "k_scale", "v_scale"):
        rows = getattr(made, name)
        raw = rows.view(torch.uint8) if rows.dtype in FP8 else rows
        setattr(made, name, torch.cat([raw, raw[:1]]).flip(0).contiguous().view(rows.dtype))
    device = made.q.device
    made.options["cache_leftpad"] = torch.tensor([5, 20], dtype=torch.int32, device=device)
    made.options["cache_batch_idx"] = torch.tensor([2, 1], dtype=torch.int32, device=device)


def growing(device: str, growth: float) -> Case:
    """All tokens count alike, and values' scales are so many times as large from the middle on.
    Warps have several tiles each."""
    made = case(device, lengths=(600,), capacity=640)
    made.options["num_splits"] = 1
    made.q.zero_()
    made.v /= 100
    made.v_scale[:, :300], made.v_scale[:, 300:600] = 0.01, 0.01 * growth
    return made


def seen_alone(device: str, length: int, tokens: tuple[int, int] | None = None) -> Case:
    """One cached token of each KV head has all weight, which another one had before. Its scale is
    not the largest, and float16 rounds it worst; numbers of float16 are near its values."""
    made = case(device, lengths=(length,), capacity=length + 8, tokens=tokens)
    made.options["num_splits"] = 1
    made.q.fill_(1)
    made.k.fill_(-8 * 448)
    made.k_cache.view(torch.uint8)[:, :length] = 0x38  # 1
    values = made.v_cache.view(torch.uint8)[:, :length]
    values.bitwise_and_(0xF8).bitwise_or_(0x06)  # 1.75 times a power of two
    made.k_scale[:, :length], made.v_scale[:, :length] = -8.0, 2.0**-8
    for head, seen in enumerate(alone(length)):
        before = seen - 512 if seen >= 512 else 5  # of the same warp
        for token, key in (before, -2.0), (seen, 1.0):
            made.k_scale[:, token, head] = key
            made.v_scale[:, token, head] = 2.0**-9 * (1 + 0.98 * 2**-11)
    return made


def alone(length: int) -> list[int]:
    """The tokens that KV heads see so."""
    return [length // 2 + 7, length - 1]


def is_seen_alone(made: Case) -> bool:
    """Whether outputs are the values of these, to the bit, and sums of exponentials those of their
    scores."""
    made.options["return_lse"] = True
    out, lse = made.run()
    (length,) = made.lengths
    seen = alone(length)
    values = made.v_cache[0, seen, range(HEADS)].float() * made.v_scale[0, seen, range(HEADS), None]
    right = values.repeat_interleave(GROUP, 0).to(F16)
    score = made.q.shape[-1] ** 0.5
    return torch.equal(out, right.expand_as(out)) and bool((lse - score).abs().max() < 1e-5)


def unlike_sizes(device: str, tokens: tuple[int, int] | None = None) -> Case:
    """Sizes of rows are e^4 apart, as often as not, and warps have several tiles each."""
    made = case(device, queries=BF16, lengths=(37, 600), capacity=640, tokens=tokens, tail=4.0)
    made.options["num_splits"] = 1
    return made


def of_values_scaled(
    device: str, scale: float, until: int, tokens: tuple[int, int] | None = None
) -> Case:
    """Values up to a token have one scale, all others, and new ones, theirs; or as many as there
    are, new ones then being of that size."""
    made = case(device, queries=BF16, lengths=(300,), tokens=tokens)
    made.options["num_splits"] = 1
    made.v_scale[:, :until] = scale
    if until == 300:
        made.v *= abs(scale)
    return made


# Zero, as of a cache that is all zeros; less than what appends make of normal numbers; negative;
# what float16 rounds to a power of two; so large that what was before counts nothing.
ODD_SCALES = [
    (0.0, 300), (0.0, 64), (1e-36, 300), (-0.5, 300), (-0.5, 64), (1 - 2.0**-14, 300), (2e5, 300),
]  # fmt: skip

NO_NUMBERS = [0x7FC00000, 0x7FFFFFFF, 0x7F800000]  # NaN, as GPUs make it, infinity


def check_no_number(made: Case, bits: int) -> None:
    """A value's scale that is no number leaves none to its KV head, whatever its weight."""
    made.v_scale.view(torch.int32)[0, 40, 1] = bits
    made.v_cache.view(torch.uint8)[0, 40, 1, ::2] = 0  # infinity times zero
    out = made.run().view(HEADS, -1, 64)
    assert out[0].isfinite().all()
    assert out[1, :, ::2].isnan().all() and not out[1].isfinite().any()


FEATURES = {
    "pages": in_pages, "pages of 7": lambda c: in_pages(c, 7), "window and cap": windowed,
    "sinks and slopes": with_sinks_and_slopes, "padding and an index": padded_rows,
}  # fmt: skip


def _apart(scale: Tensor) -> Tensor:
    """With room between the rows of heads."""
    return torch.cat([scale, scale], -1)[..., : scale.shape[-1]]


# What is refused, of a step of one sequence, in a room of 64: what is given in its place, and why.
BAD: dict[str, tuple[Callable[[Case], dict[str, Any]], str]] = {
    "one alone": (lambda c: {"v_scale": 0.5}, "v_scale: got none of tokens; allowed: as k_scale"),
    "and one of heads": (lambda c: {"k_scale": c.k_scale[0, 0]}, "k_scale: got none of tokens"),
    "too few": (
        lambda c: {"k_scale": c.k_scale[:, 1:]},
        r"k_scale: got shape \[1, 63, 2\]; allowed: \[1, 64, 2\], those of the cache without head",
    ),
    "heads apart": (
        lambda c: {"v_scale": _apart(c.v_scale)},
        r"v_scale: got strides \[256, 4, 1\]; allowed: \[128 or more, 2, 1\]; allocate it so, for",
    ),
    "in half": (lambda c: {"k_scale": c.k_scale.half()}, "k_scale: got torch.float16; allowed: t"),
    "one for both": (lambda c: {"v_scale": c.k_scale}, "v_scale: got memory that k_scale also us"),
    "of the cache": (
        lambda c: {"k_scale": c.k_cache.view(torch.float32).flatten()[:128].view(1, 64, 2)},
        "k_scale: got memory that k_cache also uses|k_cache: got memory that k_scale also uses",
    ),
    "narrow rows": (
        lambda c: {"q": torch.zeros(8 * 65, dtype=F16, device=c.q.device)[1:513].view(1, 8, 64)},
        "k_scale: got scales of tokens with narrow rows; allowed: rows of q, k, v and caches at",
    ),
}  # fmt: skip
