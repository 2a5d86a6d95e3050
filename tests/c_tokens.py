"""Calls of several tokens, and of what is done to rows, by the C library and by Python."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from c_and_python import Result
from c_driver import Launched
from c_library import (
    DTYPES,
    NUM_MERGE_COUNTERS,
    NUMBERS,
    STATUSES,
    Config,
    Library,
    float32,
    scales_of,
)
from c_simulator import Simulator, recorded
from torch import Tensor

import gqa_cutlass
from gqa_cutlass import CacheOverflowError, gqa_decode
from gqa_cutlass.call.given import ROWS
from gqa_cutlass.call.stored import SCALES
from gqa_cutlass.codegen import KernelConfig

_TORCH = {"f16": torch.float16, "bf16": torch.bfloat16}
_SLICED = "output", "q", "k", "v"  # what several tokens may lie apart in


@dataclass
class Call:
    """A call on the CPU.

    Args:
        q: [batch, tokens, num_q_heads, head_dim], or with an index of ends [tokens of all, ...].
        k_cache: [batch, max_seq_len, num_kv_heads, head_dim].
        v_cache: Likewise.
        k: New tokens, as q.
        v: Likewise.
        lengths: Tokens in each cache.
        options: Of `gqa_decode`.
    """

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    k: Tensor
    v: Tensor
    lengths: list[int]
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.out = torch.full_like(self.q, torch.nan)
        self.seqlens = torch.tensor(self.lengths, dtype=torch.int32)
        self.before = tuple(t.clone() for t in self.written)
        self.scale = float32(self.q.shape[-1] ** -0.5)
        tokens = self.q.shape[-3]
        shape = *self.q.shape[:1], self.q.shape[-2], tokens
        if "cu_seqlens_q" in self.options:
            shape = self.q.shape[1], tokens
        self.lse = torch.full(shape, torch.nan)

    @property
    def scales(self) -> tuple[Tensor, ...]:
        """Those of tokens, if there are any."""
        return tuple(self.options[name] for name in SCALES if name in self.options)

    @property
    def written(self) -> tuple[Tensor, ...]:
        """What tokens are appended to."""
        return self.k_cache, self.v_cache, *self.scales

    def restore(self) -> None:
        """Make memory as it was."""
        for now, before in zip(self.written, self.before, strict=True):
            now.copy_(before)
        self.out.fill_(torch.nan)
        self.lse.fill_(torch.nan)

    def by_python(self, *, ragged: bool) -> Result:
        """Decode in Python, and undo it; a sequence that does not fit is forgotten."""
        with recorded() as launches:
            _, lse = gqa_decode(
                self.q, self.k_cache, self.v_cache, self.k, self.v,
                cache_seqlens=self.seqlens if ragged else self.lengths[0],
                softmax_scale=self.scale, out=self.out, return_lse=True, **self.options,
            )  # fmt: skip
        with suppress(CacheOverflowError):
            gqa_cutlass.check_overflow("cpu")
        self.lse.copy_(lse.view(self.lse.shape))
        result = self._result(launches[-1])
        self.restore()
        return result

    def by_c(self, library: Library, *, ragged: bool, flag: Tensor | None = None) -> Result:
        """Decode in C, which must succeed."""
        simulator, config = Simulator(library), self.config()
        workspace = torch.zeros(library.workspace_size(config) // 4, dtype=torch.int32)
        config.workspace, config.workspace_size = workspace.data_ptr(), 4 * workspace.numel()
        tensors = {ROWS[n].field: t for n, t in self.options.items() if isinstance(t, Tensor)}
        tensors |= {
            "q": self.q, "k_cache": self.k_cache, "v_cache": self.v_cache, "k_new": self.k,
            "v_new": self.v, "out": self.out, "lse": self.lse,
        }  # fmt: skip
        if workspace.numel():
            tensors |= {
                "merge_counters": workspace[:NUM_MERGE_COUNTERS],
                "split_workspace": workspace[NUM_MERGE_COUNTERS:].view(torch.float32),
            }
        if ragged:
            flag = torch.zeros(1, dtype=torch.int32) if flag is None else flag
            tensors |= {"seqlens": self.seqlens, "overflow_flag": flag}
        simulator.tensors = tensors
        status = self.decode(library, config, flag)
        if simulator.fault is not None:
            raise simulator.fault
        assert status == "GQA_SUCCESS", library.error
        return self._result(simulator.launches[-1])

    def _result(self, launched: Launched) -> Result:
        k_cache, v_cache, *scales = (t.clone() for t in self.written)
        return Result(launched, self.out.clone(), k_cache, v_cache, self.lse.clone(), tuple(scales))

    def decode(self, library: Library, config: Config, flag: Tensor | None = None) -> str:
        """Call the library, with lengths on the device where there is a flag; the status' name."""
        tensors = self.out, self.q, self.k, self.v, self.k_cache, self.v_cache
        addresses = [t.data_ptr() for t in tensors]
        if flag is None:
            return STATUSES[library.c.gqa_attention_decode(*addresses, config, None)]
        lengths = self.seqlens.data_ptr(), flag.data_ptr()
        return STATUSES[library.c.gqa_attention_decode_ragged(*addresses, *lengths, config, None)]

    def config(self, **changes: Any) -> Config:
        """The library's configuration, with other fields where given."""
        outermost, room, num_kv_heads, _ = self.k_cache.shape
        table = self.options.get("block_table")
        values = dict(
            batch_size=len(self.lengths), cache_len=self.lengths[0], num_kv_heads=num_kv_heads,
            num_q_heads=self.q.shape[-2], head_dim=self.q.shape[-1], scale=self.scale,
            max_seq_len=room, dtype=DTYPES[self.q.dtype], lse=self.lse.data_ptr(),
        )  # fmt: skip
        if table is not None:
            pages = dict(page_size=room, num_pages=outermost, max_pages=table.shape[1])
            values |= pages | dict(max_seq_len=0)
        return Config(**values | self._tokens() | self._strides() | self._asked() | changes)

    def _tokens(self) -> dict[str, int]:
        found: dict[str, int] = {}
        if "cu_seqlens_q" in self.options:
            found["num_tokens"] = self.options.get("max_seqlen_q", 0)
            found["total_tokens"] = self.q.shape[0]
        else:
            found["num_tokens"] = self.q.shape[1]
        if "cu_seqlens_k_new" in self.options:
            return found | {"total_new_tokens": self.k.shape[0]}
        return found | {"num_new_tokens": self.k.shape[1]}

    def _strides(self) -> dict[str, int]:
        """Those of tensors that are not contiguous."""
        found: dict[str, int] = {}
        for name, t in zip(_SLICED, (self.out, self.q, self.k, self.v), strict=True):
            if not t.is_contiguous():
                dims = ("batch", "token", "head")[3 - t.dim() + 1 :]
                found |= {
                    f"{name}_{dim}_stride": step
                    for dim, step in zip(dims, t.stride(), strict=False)
                }
        return found

    def _asked(self) -> dict[str, Any]:
        """What options ask for, by the fields of GQADecodeConfig."""
        options = self.options
        found: dict[str, Any] = {
            name: t.data_ptr()
            for name, t in options.items()
            if isinstance(t, Tensor) and name not in SCALES
        }
        found |= scales_of(self.k_cache, *(options.get(name) for name in SCALES))
        if "cache_batch_idx" in options:
            rows: Tensor = options.get("block_table", self.k_cache)
            found["cache_rows"] = rows.shape[0]
        left, right = options.get("window_size", (-1, -1))
        found["window"] = left + 1
        if not options.get("causal", True):
            found |= {"not_causal": 1, "window_right": right + 1}
        for name in ("q_norm", "k_norm"):
            if f"{name}_weight" in options:
                found[f"{name}_type"] = NUMBERS[options[f"{name}_weight"].dtype]
        found["norm_eps"] = options.get("norm_eps", 1e-6)
        found["norm_plus_one"] = options.get("norm_plus_one", False)
        if "rotary_cos" in options:
            cos, sin = options["rotary_cos"], options["rotary_sin"]
            found |= dict(
                rotary_positions=cos.shape[0], rotary_dim=2 * cos.shape[1],
                rotary_type=NUMBERS[cos.dtype], rotary_cos_stride=cos.stride(0),
                rotary_sin_stride=0 if sin.is_contiguous() else sin.stride(0),
                rotary_interleaved=options.get("rotary_interleaved", False),
            )  # fmt: skip
        return found


def make_call(
    kernel: KernelConfig, lengths: list[int], capacity: int, tokens: int, new: int = 0,
    kv_heads: int = 1, **options: Any,
) -> Call:  # fmt: skip
    """A call on random data for a kernel.

    Args:
        kernel: It.
        lengths: Tokens in each cache.
        capacity: Tokens that they can hold.
        tokens: Query tokens of each, or with an index of ends of all.
        new: New tokens likewise; 0: as many.
        kv_heads: KV heads.
        options: Of `gqa_decode`.
    """
    generator = torch.Generator().manual_seed(sum(lengths) + tokens)
    batch, dim, kind = len(lengths), kernel.head_dim, _TORCH[str(kernel.dtype)]

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(kind)

    sides = [
        ((count,) if name in options else (batch, count))
        for name, count in (("cu_seqlens_q", tokens), ("cu_seqlens_k_new", new or tokens))
    ]
    return Call(
        random(*sides[0], kv_heads * kernel.group_size, dim),
        random(batch, capacity, kv_heads, dim), random(batch, capacity, kv_heads, dim),
        random(*sides[1], kv_heads, dim), random(*sides[1], kv_heads, dim), lengths, options,
    )  # fmt: skip
