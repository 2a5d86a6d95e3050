"""Decode steps to test: tensors in many layouts, with guards around every buffer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from buffers import CANARY, GUARD, Buffer, guarded
from tokens import see_tree, take_tokens
from torch import Tensor
from turnings import Turning

from gqa_cutlass import pack_tree_mask
from gqa_cutlass.call.stored import FP8
from gqa_cutlass.codegen import DType
from gqa_cutlass.codegen.schema.policies import Policy
from gqa_cutlass.proof.reference import Errors, attend, errors, scales_of, stored

TORCH_DTYPE = {DType.F16: torch.float16, DType.BF16: torch.bfloat16}
Layout = Literal["NHD", "HND", "padded"]


@dataclass
class Step:
    """One decode step: inputs, where the output goes, and what must not change."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    k: Tensor | None
    v: Tensor | None
    out: Tensor
    lengths: list[int]
    seqlens: Tensor
    scale: float
    buffers: list[Buffer]
    before: dict[str, Tensor] = field(default_factory=dict)
    softcap: float = 0.0
    sinks: Tensor | None = None
    window_size: tuple[int, int] = (-1, -1)
    alibi_slopes: Tensor | None = None
    cache_leftpad: Tensor | None = None
    cache_batch_idx: Tensor | None = None
    block_table: Tensor | None = None
    slot_mapping: Tensor | None = None
    out_dtype: torch.dtype | None = None
    k_scale: float | Tensor | None = None
    v_scale: float | Tensor | None = None
    causal: bool = True
    tree_mask: Tensor | None = None
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k_new: Tensor | None = None
    turning: Turning = field(default_factory=Turning)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """Positional arguments of `gqa_decode`."""
        return self.q, self.k_cache, self.v_cache, self.k, self.v

    def row(self, b: int) -> int:
        """The row of the caches, or of the table, that a sequence has."""
        return b if self.cache_batch_idx is None else int(self.cache_batch_idx[b])

    def place(self, b: int, token: int) -> tuple[int, int]:
        """Where a token of a sequence is in the caches: in its row, or in which page."""
        if self.block_table is None:
            return self.row(b), token
        page, at = divmod(token, self.k_cache.shape[1])
        return int(self.block_table[self.row(b), page]), at

    def new(self, tokens: Tensor, b: int) -> Tensor:
        """A sequence's own of new tokens, or of their k or v, [tokens, heads, head_dim]."""
        if self.cu_seqlens_k_new is not None:
            return tokens[self.cu_seqlens_k_new[b] : self.cu_seqlens_k_new[b + 1]]
        return tokens[b].view(-1, *tokens.shape[-2:])

    def count(self, b: int) -> int:
        """How many new tokens a sequence has."""
        return 0 if self.k is None else len(self.new(self.k, b))

    def queries(self, b: int) -> int:
        """How many queries a sequence has."""
        if self.cu_seqlens_q is not None:
            return int(self.cu_seqlens_q[b + 1] - self.cu_seqlens_q[b])
        return self.q.shape[1] if self.q.dim() == 4 else 1

    def room(self) -> int:
        """How many tokens a sequence may have."""
        pages = 1 if self.block_table is None else self.block_table.shape[1]
        return self.k_cache.shape[1] * pages

    def positions(self) -> int:
        """How many positions it may have: those of all tokens, and of queries behind them."""
        return self.room() + max(self.queries(b) for b in range(len(self.lengths)))

    def hide(self, b: int, count: int) -> None:
        """Have NaN where a sequence's first tokens are, for they are not to be used."""
        for token in range(count):
            self.k_cache[self.place(b, token)] = self.v_cache[self.place(b, token)] = torch.nan

    def attended(self) -> tuple[Tensor, Tensor, list[int]]:
        """The caches with the new token in place, and how many tokens are attended."""
        k, v = self.before["k_cache"].clone(), self.before["v_cache"].clone()
        if self.k is None or self.v is None:
            return k, v, self.lengths
        for b, length in enumerate(self.lengths):
            keys = self.turning.keys(self.new(self.k, b), length, b).to(self.q.dtype)
            for i, (key, value) in enumerate(zip(keys, self.new(self.v, b), strict=True)):
                k[self.place(b, length + i)] = self.stored("k", key, b)
                v[self.place(b, length + i)] = self.stored("v", value, b)
        return k, v, [length + self.count(b) for b, length in enumerate(self.lengths)]

    def stored(self, name: str, row: Tensor, b: int) -> Tensor:
        """What a cache holds of a sequence's new token."""
        dtype = self.k_cache.dtype
        if dtype not in FP8:
            return row
        return stored(row, scales_of(getattr(self, f"{name}_scale"), b), dtype)

    def check_keys(self, found: Tensor, rows: Tensor, length: int, b: int) -> None:
        """Keys that were normed and turned are what they should be; of 8 bits, or next to it."""
        if found.dtype not in FP8:
            return self.turning.check(found, rows, length, b)
        right = self.stored("k", self.turning.keys(rows, length, b).to(self.q.dtype), b)
        steps = found.view(torch.uint8).int() - right.view(torch.uint8).int()
        assert steps.abs().max() <= 1 and steps.ne(0).double().mean() < 0.02

    def reference(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
        """Expected output and lse."""
        k, v, lengths = self.attended()
        asked = self.features()
        for name in ("out_dtype", "slot_mapping", "cu_seqlens_k_new", *self.turning.options()):
            asked.pop(name, None)
        asked["tree_mask"] = self.tree_mask
        return attend(self.turned_queries(), k, v, lengths, self.scale, dtype, **asked)

    def turned_queries(self) -> Tensor:
        """Queries, normed and rotated as keys are."""
        if not self.turning.options():
            return self.q
        moves = self.causal or self.window_size != (-1, -1)
        if self.cu_seqlens_q is None:
            parts = list(self.q.view(len(self.lengths), -1, *self.q.shape[-2:]))
        else:
            parts = list(self.q.split(self.cu_seqlens_q.diff().tolist()))
        turned = [
            self.turning.queries(part, self.lengths[b], b, moves) for b, part in enumerate(parts)
        ]
        return torch.cat(turned).view(self.q.shape).to(self.q.dtype)

    def features(self) -> dict[str, Any]:
        """The options of a call that ask for features."""
        names = (
            "softcap", "sinks", "window_size", "alibi_slopes", "cache_leftpad", "cache_batch_idx",
            "block_table", "out_dtype", "k_scale", "v_scale",
        )  # fmt: skip
        tensors = "slot_mapping", "cu_seqlens_q", "cu_seqlens_k_new"
        few = {name: getattr(self, name) for name in tensors if getattr(self, name) is not None}
        few |= self.turning.options() | ({} if self.causal else {"causal": False})
        if self.tree_mask is not None:
            few["tree_mask"] = pack_tree_mask(self.tree_mask)
        return {name: getattr(self, name) for name in names} | few

    def asking_for(self, policies: tuple[Policy, ...]) -> Step:
        """The same with the features that a kernel has: several tokens, a cap that bends scores,
        heavy sinks, a window of half the cache, slopes of each sequence, padding of a third, norms,
        rotation, and pages. Its rows stay."""
        wanted = {policy.feature for policy in policies}
        if wanted & {"num_tokens", "tree_mask"}:
            take_tokens(self)
            snapshot(self)
        if "tree_mask" in wanted:
            see_tree(self)
        if "q_norm_weight" in wanted:
            self.turning = self.turning.normed(self.q)
        if "rotary_cos" in wanted:
            self.turning = self.turning.rotated(self.q, self.positions())
        if "softcap" in wanted:
            self.softcap = 1.5
        if "sinks" in wanted:
            self.sinks = torch.linspace(-2, 7, self.q.shape[-2], device=self.q.device)
        if "window_size" in wanted:
            self.window_size = (self.k_cache.shape[1] // 2, 0)
        if "alibi_slopes" in wanted:
            batch, heads = len(self.lengths), self.q.shape[-2]
            slopes = torch.linspace(-0.01, 0.7, batch * heads, device=self.q.device)
            self.alibi_slopes = slopes.view(batch, heads)
        if "cache_leftpad" in wanted:
            self.cache_leftpad = self.seqlens // 3
        if "out_dtype" in wanted:
            self.in_float32()
        if "block_table" in wanted:
            self.into_pages()
        for dtype, policy in FP8.items():
            if policy.feature in wanted:
                self.into_fp8(dtype)
        return self

    def into_fp8(self, dtype: torch.dtype) -> None:
        """Have the caches in 8 bits, with scales that fill their range: of each sequence and head,
        and of heads, or one for all. Rows are where they were, and half as long."""
        if self.k_cache.dtype == dtype:
            return
        batch, heads = len(self.lengths), self.k_cache.shape[2]
        steps = torch.linspace(0.5, 2, 2 * batch * heads, device=self.q.device)
        self.k_scale = steps.view(batch, 2 * heads)[:, ::2] * 4 / torch.finfo(dtype).max
        self.v_scale = steps[: 2 * heads : 2] if batch % 2 else 0.375
        for name in ("k_cache", "v_cache"):
            cache = getattr(self, name)
            count, half = cache.untyped_storage().nbytes() // 2, cache.shape[-1] // 2
            raw = torch.full((count,), CANARY, dtype=torch.int16, device=cache.device)
            rows = raw.as_strided((*cache.shape[:-1], half), cache.stride(), cache.storage_offset())
            self.buffers.append(Buffer(raw, rows))
            scale = 4 / torch.finfo(dtype).max if name == "k_cache" else None
            setattr(self, name, rows.view(dtype).copy_(stored(cache, scale, dtype)))
        snapshot(self)

    def into_pages(self, page_size: int = 16, layout: Layout = "HND", packed: bool = True) -> None:
        """Have the caches in pages, one after the other no more.

        Pages that no sequence has hold NaN, and what the table says behind a sequence's last page
        is no page.

        Args:
            page_size: Tokens of each.
            layout: Of a page: its heads one behind the other, or its tokens.
            packed: Whether a row of K and one of V are one row.
        """
        if self.block_table is not None:
            return
        rows, room, heads, _ = self.k_cache.shape
        most, dims = -(-room // page_size), (self.k_cache.shape[-1], self.v_cache.shape[-1])
        generator = torch.Generator().manual_seed(page_size)
        order = torch.randperm(rows * most + 3, generator=generator)[: rows * most]
        order = order.to(self.k_cache.device)
        device, offset = str(order.device), (self.k_cache.storage_offset() - GUARD) % 8
        shape = (heads, page_size) if layout == "HND" else (page_size, heads)
        for widths in (dims,) if packed else ((dims[0], 0), (0, dims[1])):
            buffer = guarded((rows * most + 3, *shape, sum(widths)), self.q.dtype, device, offset)
            self.buffers.append(buffer)
            pool = buffer.tensor.fill_(torch.nan)
            if layout == "HND":
                pool = pool.transpose(1, 2)
            parts = pool.split(widths, -1)
            for name, part in zip(("k_cache", "v_cache"), parts, strict=True):
                if part.shape[-1]:
                    cache = getattr(self, name)
                    whole = cache.new_full((rows, most * page_size, *cache.shape[2:]), torch.nan)
                    whole[:, :room] = cache
                    part[order] = whole.view(rows * most, page_size, *cache.shape[2:])
                    setattr(self, name, part)
        self.block_table = self._table(order.view(rows, most), page_size)
        snapshot(self)

    def _table(self, pages: Tensor, page_size: int) -> Tensor:
        """Those pages that sequences have, among numbers that are none, in rows that lie apart."""
        rows, most = pages.shape
        none = torch.tensor([-1, 2**31 - 1, rows * most + 3, -(2**31)], dtype=torch.int32)
        table = none.repeat(rows, most).to(pages.device)
        for b, length in enumerate(self.lengths):
            held = -(-(length + self.count(b)) // page_size)
            table[self.row(b), :held] = pages[self.row(b), :held].int()
        return table[:, :most]

    def in_float32(self) -> None:
        """Ask for outputs in float32, and give room for them, aligned as for others."""
        if self.out_dtype is not None:
            return
        *shape, dim = self.out.shape
        offset, pad = self.out.storage_offset() - GUARD, self.out.stride(-2) - dim
        even = offset + offset % 2, pad + pad % 2
        buffer = guarded((*shape, 2 * dim), torch.float16, str(self.out.device), *even)
        self.buffers.append(buffer)
        self.out = buffer.tensor.view(torch.float32).fill_(torch.nan)
        self.out_dtype = torch.float32

    def asking_for_all(self, policies: tuple[Policy, ...]) -> Step:
        """The same, and with other rows if the kernel has an index of them."""
        self.asking_for(policies)
        if any(policy.feature == "cache_batch_idx" for policy in policies):
            self.turn_around()
        return self

    def turn_around(self) -> None:
        """Have sequences in other rows than their own, of caches or a table with one more."""
        batch = len(self.lengths)
        for name in ("k_cache", "v_cache") if self.block_table is None else ("block_table",):
            rows = getattr(self, name)
            none = torch.nan if rows.is_floating_point() else -1
            setattr(self, name, torch.cat([torch.full_like(rows[:1], none), rows.flip(0)]))
        order = torch.arange(batch, 0, -1, dtype=torch.int32, device=self.q.device)
        self.cache_batch_idx = order
        snapshot(self)

    def errors(self, out: Tensor) -> Errors:
        """The output's errors beside those of PyTorch in the input type."""
        expected, _ = self.reference()
        return errors(out, expected, self.reference(self.q.dtype)[0])

    def check_memory(self, rejected: tuple[int, ...] = ()) -> None:
        """Appended rows are exact, and nothing else has changed, inside the tensors or around.

        Nothing was appended to the sequences in `rejected`.
        """
        for name, new in (("k_cache", self.k), ("v_cache", self.v)):
            now = getattr(self, name).clone()
            expected = self.before[name].clone()
            for b, length in enumerate(self.lengths):
                if new is None or b in rejected:
                    continue
                rows = self.new(new, b)
                for i, row in enumerate(rows):
                    expected[self.place(b, length + i)] = self.stored(name[0], row, b)
                if name == "k_cache" and self.turning.options() and len(rows):
                    at = [self.place(b, length + i) for i in range(len(rows))]
                    found = torch.stack([now[place] for place in at])
                    self.check_keys(found, rows, length, b)
                    for place, row in zip(at, rows, strict=True):
                        now[place] = self.stored("k", row, b)
            assert _same_bits(now, expected), f"{name} differs"
        for name in ("q", "k", "v"):
            if getattr(self, name) is not None:
                assert _same_bits(getattr(self, name), self.before[name]), f"{name} was written"
        assert all(buffer.guards_intact() for buffer in self.buffers), "a guard was overwritten"


def make_step(
    *,
    dtype: DType = DType.F16,
    head_dim: int = 128,
    group_size: int = 4,
    lengths: list[int],
    max_seq_len: int,
    num_kv_heads: int = 2,
    layout: Layout = "NHD",
    vec_width: int = 8,
    append: bool = True,
    poison: bool = True,
    seed: int = 0,
    device: str = "cuda",
    head_dim_v: int | None = None,
) -> Step:
    """A step on random data; every address is aligned to `vec_width` elements and no more.

    Args:
        dtype: Element type.
        head_dim: Dimension per head of queries and keys.
        group_size: Query heads per KV head.
        lengths: Tokens in each sequence's cache.
        max_seq_len: Tokens a cache can hold.
        num_kv_heads: KV heads.
        layout: NHD or HND memory order of the caches, or NHD with gaps between all rows.
        vec_width: Widest access that the addresses allow.
        append: Whether a new token comes along.
        poison: Whether cache rows past the end hold NaN.
        seed: Of the random data.
        device: Where.
        head_dim_v: Dimension per head of values and outputs; None: as head_dim.
    """
    kind = TORCH_DTYPE[dtype]
    batch, value_dim = len(lengths), head_dim_v or head_dim
    offset = vec_width % 8
    pad = 8 + offset if layout == "padded" else 0
    generator = torch.Generator(device).manual_seed(seed)
    buffers: list[Buffer] = []

    def random(*shape: int) -> Tensor:
        buffer = guarded(shape, kind, device, offset, pad)
        data = torch.randn(shape, generator=generator, device=device, dtype=torch.float32)
        buffer.tensor.copy_(data)
        buffers.append(buffer)
        return buffer.tensor

    def cache(dim: int) -> Tensor:
        if layout == "HND":
            return random(batch, num_kv_heads, max_seq_len, dim).transpose(1, 2)
        return random(batch, max_seq_len, num_kv_heads, dim)

    q = random(batch, num_kv_heads * group_size, head_dim)
    k_cache, v_cache = cache(head_dim), cache(value_dim)
    k = random(batch, num_kv_heads, head_dim) if append else None
    v = random(batch, num_kv_heads, value_dim) if append else None
    out = random(batch, num_kv_heads * group_size, value_dim)
    out.fill_(float("nan"))
    if poison:
        for b, length in enumerate(lengths):
            k_cache[b, length:] = float("nan")
            v_cache[b, length:] = float("nan")
    step = Step(
        q, k_cache, v_cache, k, v, out, lengths,
        torch.tensor(lengths, dtype=torch.int32, device=device), head_dim**-0.5, buffers,
    )  # fmt: skip
    snapshot(step)
    return step


def snapshot(step: Step) -> None:
    """Take the present inputs as what must be unchanged later."""
    named = {name: getattr(step, name) for name in ("q", "k_cache", "v_cache", "k", "v")}
    step.before = {name: t.clone() for name, t in named.items() if t is not None}


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
