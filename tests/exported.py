"""Steps of the exported C library on a GPU, beside torch in the same process."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from c_library import Config
from torch import Tensor

from gqa_cutlass import GQADecodeConfig, gqa_attention_decode

DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16}
_OnLog = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_void_p)


@dataclass(frozen=True)
class Shape:
    """Sizes of a step, in the order in which the example program takes them."""

    batch: int
    q_heads: int
    kv_heads: int
    head_dim: int
    cache_len: int
    max_seq_len: int
    dtype: str

    def words(self) -> list[str]:
        """Arguments of the example program."""
        return [str(value) for value in vars(self).values()]

    @property
    def scale(self) -> float:
        """As float32 has it, which is what C is given."""
        return float(np.float32(1.0 / np.sqrt(float(self.head_dim))))

    def config(self, workspace: Tensor | None = None) -> Config:
        """The C library's configuration."""
        return Config(
            batch_size=self.batch, cache_len=self.cache_len, num_q_heads=self.q_heads,
            num_kv_heads=self.kv_heads, head_dim=self.head_dim, scale=self.scale,
            max_seq_len=self.max_seq_len, dtype=int(self.dtype == "bf16"),
            workspace=0 if workspace is None else workspace.data_ptr(),
            workspace_size=0 if workspace is None else workspace.numel(),
        )  # fmt: skip


@dataclass(frozen=True)
class Step:
    """Tensors of a step."""

    out: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    k_cache: Tensor
    v_cache: Tensor

    def addresses(self) -> list[int]:
        """In the order of the C function."""
        return [t.data_ptr() for t in vars(self).values()]

    def copy(self) -> Step:
        """The same data elsewhere."""
        return Step(*(t.clone() for t in vars(self).values()))

    def bits(self) -> list[Tensor]:
        """What a step writes."""
        return [t.view(torch.int16) for t in (self.out, self.k_cache, self.v_cache)]


def step_of(shape: Shape, filled: int | None = None) -> Step:
    """Random tensors; NaN from a position on."""
    kind: Any = {"dtype": DTYPES[shape.dtype], "device": "cuda"}
    cache = shape.batch, shape.max_seq_len, shape.kv_heads, shape.head_dim
    token = shape.batch, 1, shape.kv_heads, shape.head_dim
    k_cache, v_cache = (torch.randn(*cache, **kind) for _ in range(2))
    for tensor in (k_cache, v_cache):
        tensor[:, shape.cache_len if filled is None else filled :] = float("nan")
    return Step(
        torch.zeros(shape.batch, 1, shape.q_heads * shape.head_dim, **kind),
        torch.randn(shape.batch, 1, shape.q_heads, shape.head_dim, **kind),
        torch.randn(*token, **kind), torch.randn(*token, **kind), k_cache, v_cache,
    )  # fmt: skip


def by_python(step: Step, shape: Shape) -> None:
    """The step in the story's form."""
    config = GQADecodeConfig(
        batch_size=shape.batch, cache_len=shape.cache_len, num_q_heads=shape.q_heads,
        num_kv_heads=shape.kv_heads, head_dim=shape.head_dim, scale=shape.scale,
        max_seq_len=shape.max_seq_len,
    )  # fmt: skip
    gqa_attention_decode(*vars(step).values(), config)


def current_stream() -> int:
    return torch.cuda.current_stream().cuda_stream


class Library:
    """The library, loaded into this process beside torch."""

    def __init__(self, path: Path) -> None:
        self.c = ctypes.CDLL(str(path))
        self.c.gqa_last_error.restype = ctypes.c_char_p
        self.lines: list[str] = []
        self._log = _OnLog(lambda line, _: self.lines.append(line.decode()))
        self.c.gqa_set_log_callback(self._log, None)

    def call(self, name: str, *arguments: Any) -> int:
        """Call a function; addresses, None and structures become pointers."""
        pointers = [
            ctypes.byref(a) if isinstance(a, ctypes.Structure) else ctypes.c_void_p(a)
            for a in arguments
        ]
        status = int(getattr(self.c, name)(*pointers))
        if status:
            self.lines.append(self.c.gqa_last_error().decode())
        return status

    def workspace(self, asked: Config) -> Tensor:
        """Zeroed memory, as much as the library asks for."""
        size = ctypes.c_size_t()
        assert self.c.gqa_workspace_size(ctypes.byref(asked), ctypes.byref(size)) == 0
        return torch.zeros(size.value, dtype=torch.uint8, device="cuda")

    def decode(self, step: Step, config: Config, times: int = 1) -> None:
        """Launch a step, with a workspace that every launch finds as the one before left it."""
        workspace = self.workspace(config)
        config.workspace, config.workspace_size = workspace.data_ptr(), workspace.numel()
        for _ in range(times):
            status = self.call("gqa_attention_decode", *step.addresses(), config, current_stream())
            assert status == 0, self.lines[-1]


def element(seed: int, count: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The examples' data: multiples of 1/128 in [-1, 1)."""
    z = (np.arange(count, dtype=np.uint64) + np.uint64((seed << 40) + 1)) * np.uint64(
        0x9E3779B97F4A7C15
    )
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return ((z >> np.uint64(56)).astype(np.float32) - 128) / 128


def fnv(*tensors: Tensor) -> str:
    """The examples' hash."""
    state = 0xCBF29CE484222325
    for tensor in tensors:
        for byte in tensor.contiguous().view(torch.uint8).cpu().numpy().tobytes():
            state = (state ^ byte) * 0x100000001B3 % 2**64
    return f"{state:016x}"


def example_by_python(shape: Shape) -> tuple[str, str]:
    """Hashes of the output and of the caches when Python runs the examples' step."""

    def tensor(seed: int, *sizes: int) -> Tensor:
        data = torch.from_numpy(element(seed, int(np.prod(sizes)))).view(*sizes)
        return data.to(DTYPES[shape.dtype]).cuda()

    cache = shape.batch, shape.max_seq_len, shape.kv_heads, shape.head_dim
    token = shape.batch, 1, shape.kv_heads, shape.head_dim
    q = tensor(1, shape.batch, 1, shape.q_heads, shape.head_dim)
    step = Step(torch.zeros_like(q).flatten(2), q, tensor(2, *token), tensor(3, *token),
                tensor(4, *cache), tensor(5, *cache))  # fmt: skip
    by_python(step, shape)
    return fnv(step.out), fnv(step.k_cache, step.v_cache)
