"""Memory for caches: how much they need, how much there is, and what to say if it is too little."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from gqa_cutlass.cache.inputs import surroundings_flaw
from gqa_cutlass.cache.lengths import capturing
from gqa_cutlass.call.layout import DTYPES
from gqa_cutlass.codegen.config import HEAD_DIM_RULE, HEAD_DIMS
from gqa_cutlass.codegen.schema.problem import MAX_BATCH, MAX_SEQ_LEN
from gqa_cutlass.errors import CacheAllocationError, DeviceError, InputError, shown

_PAGE = 2**21  # torch's allocator, and the driver below it, hand out large blocks in such steps
_SPARE_SHARE = 256  # one part in so many is left to the driver's tables and to workspaces
_MOST = 2**31 - 1  # of what has no other limit; a kernel's int is no larger
_STATE_BYTES = 8  # per sequence: two int32
_MEMINFO = Path("/proc/meminfo")


@dataclass(frozen=True, kw_only=True)
class Memory:
    """What was allocated for the caches of a model's layers.

    Args:
        layers: Keys and values of each layer, not initialised.
        state: Int32 [2, batch], zeros: lengths, and whether sequences overflowed.
    """

    layers: list[tuple[Tensor, Tensor]]
    state: Tensor


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The sizes of the caches of a model's layers.

    Args:
        num_layers: Layers.
        batch_size: Sequences.
        max_seq_len: Tokens that a sequence's cache can hold.
        num_kv_heads: KV heads.
        head_dim: Dimension per head of keys.
        dtype: Element type, torch.float16 or torch.bfloat16.
        head_dim_v: Dimension per head of values; None: as head_dim.

    Raises:
        InputError: One of them is not allowed.
    """

    num_layers: int
    batch_size: int
    max_seq_len: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    head_dim_v: int | None = None

    def __post_init__(self) -> None:
        for name, most in (
            ("num_layers", _MOST), ("batch_size", MAX_BATCH), ("max_seq_len", MAX_SEQ_LEN),
            ("num_kv_heads", _MOST),
        ):  # fmt: skip
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= most:
                _fail(name, shown(value), f"an int from 1 to {most}")
        for name, dim in (("head_dim", self.head_dim), ("head_dim_v", self._dims[1])):
            if type(dim) is not int or dim not in HEAD_DIMS:
                _fail(name, shown(dim), HEAD_DIM_RULE)
        if not isinstance(self.dtype, torch.dtype) or self.dtype not in DTYPES:
            _fail("dtype", shown(self.dtype), " or ".join(map(str, DTYPES)))

    @property
    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of one layer's keys, and of its values."""
        rows = self.batch_size, self.max_seq_len, self.num_kv_heads
        k, v = self._dims
        return (*rows, k), (*rows, v)

    @property
    def total_bytes(self) -> int:
        """Bytes of K and V of all layers, and of the lengths that they share."""
        return self.num_layers * self.max_seq_len * sum(self._row_bytes) + self._state_bytes

    def longest(self, available: int) -> int:
        """The largest max_seq_len whose caches are sure to fit into so many bytes; 0 for none."""
        usable = available - available // _SPARE_SHARE - self._state_bytes
        pages = usable // _PAGE - 1  # one for the state
        pages = max(0, pages // self.num_layers)
        k, v = self._row_bytes
        of_keys = pages * k // (k + v)
        return min(of_keys * _PAGE // k, (pages - of_keys) * _PAGE // v, MAX_SEQ_LEN)

    @property
    def _dims(self) -> tuple[int, int]:
        """Of keys and of values."""
        return self.head_dim, self.head_dim if self.head_dim_v is None else self.head_dim_v

    @property
    def _row_bytes(self) -> tuple[int, int]:
        """Bytes of one token of every sequence in the keys, and in the values."""
        k, v = (self.batch_size * self.num_kv_heads * n * self.dtype.itemsize for n in self._dims)
        return k, v

    @property
    def _state_bytes(self) -> int:
        return self.batch_size * _STATE_BYTES


def sizes_of(
    num_layers: int, batch_size: int, max_seq_len: int, num_kv_heads: int, head_dim: int,
    dtype: torch.dtype, head_dim_v: int | None,
) -> Sizes:  # fmt: skip
    """The sizes, given in this order."""
    return Sizes(
        num_layers=num_layers,
        batch_size=batch_size,
        max_seq_len=max_seq_len,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        dtype=dtype,
        head_dim_v=head_dim_v,
    )


def placed(device: torch.device | int | str) -> torch.device:
    """The device that is meant, with its index.

    Raises:
        InputError: Neither a CUDA device that there is nor the CPU.
        DeviceError: No usable GPU.
    """
    allowed = "a CUDA device, such as 'cuda:0', or 'cpu' (simulated, slow)"
    try:
        meant = torch.device("cuda", device) if type(device) is int else torch.device(device)
    except (RuntimeError, TypeError, ValueError):
        _fail("device", shown(device), allowed)
    if device not in (meant, meant.index, meant.type, str(meant)):  # torch keeps 8 bits of an index
        _fail("device", shown(device), allowed)
    if meant.type == "cpu":
        return torch.device("cpu")
    if meant.type != "cuda":
        _fail("device", str(meant), allowed)
    if not torch.cuda.is_available():
        raise DeviceError(
            f"KVCache: device: got {meant}; no usable GPU: torch.cuda.is_available() is False. "
            "Run `gqa-cutlass doctor` to see what was found, or pass device='cpu' (simulated, "
            "slow). Nothing was allocated."
        )
    index = torch.cuda.current_device() if meant.index is None else meant.index
    if not 0 <= index < torch.cuda.device_count():
        _fail("device", str(meant), f"cuda:0 to cuda:{torch.cuda.device_count() - 1}, or 'cpu'")
    return torch.device("cuda", index)


def allocate(sizes: Sizes, device: torch.device | int | str) -> Memory:
    """Memory for keys, values and lengths.

    Raises:
        CacheAllocationError: There is not enough; nothing stays allocated.
        DeviceError: No usable GPU.
        InputError: No such device, a CUDA graph is being captured, or what torch would make here
            is no memory.
    """
    where = placed(device)
    if capturing(where):
        raise InputError(
            "KVCache: got a CUDA-graph capture; allowed: to allocate before it, since every replay "
            "would empty the cache. Nothing was allocated."
        )
    if found := surroundings_flaw():
        _fail("surroundings", *found)
    available = available_bytes(where)
    memory = None
    if sizes.total_bytes <= available:
        memory = _try_to_allocate(sizes, where)
        if memory is None:
            # What torch holds was in pieces too small, and it has given back what it could.
            available = available_bytes(where, held=False)
    if memory is None:  # raised here, where no frame of the traceback holds a tensor
        _raise_too_large(sizes, where, available)
    return memory


def available_bytes(device: torch.device, held: bool = True) -> int:
    """Bytes that could be allocated on a device.

    Args:
        device: A GPU, the current one if it has no index, or the CPU.
        held: Whether to count what torch's allocator holds on the GPU and does not use.
    """
    if device.type == "cpu":
        return _available_on_the_host()
    index = torch.cuda.current_device() if device.index is None else device.index
    free, total = torch.cuda.mem_get_info(index)
    reserved = torch.cuda.memory_reserved(index)
    allowed = int(torch.cuda.get_per_process_memory_fraction(index) * total)
    unused = reserved - torch.cuda.memory_allocated(index)
    return max(0, min(free, allowed - reserved)) + held * unused


def _available_on_the_host() -> int:
    try:
        for line in _MEMINFO.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _try_to_allocate(sizes: Sizes, device: torch.device) -> Memory | None:
    # On the CPU torch raises nothing more special, and for nothing else.
    refusal = RuntimeError if device.type == "cpu" else torch.OutOfMemoryError
    tensors: list[Tensor] = []
    try:
        # Normal tensors, even in inference mode: outside of it nobody may write to the others.
        with torch.inference_mode(False):
            state = torch.zeros(2, sizes.batch_size, dtype=torch.int32, device=device)
            for shape in sizes.shapes * sizes.num_layers:
                tensors.append(torch.empty(shape, dtype=sizes.dtype, device=device))
    except refusal:
        tensors.clear()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        return None
    return Memory(layers=list(zip(tensors[::2], tensors[1::2], strict=True)), state=state)


def _raise_too_large(sizes: Sizes, device: torch.device, available: int) -> NoReturn:
    longest = min(sizes.longest(available), sizes.max_seq_len - 1)
    layers = f" in each of {sizes.num_layers} layers" * (sizes.num_layers > 1)
    fits = f"max_seq_len up to {longest}" if longest else "no max_seq_len"
    raise CacheAllocationError(
        f"KVCache: memory: got a cache of {sizes.total_bytes} bytes ({gib(sizes.total_bytes)}): "
        f"{_shapes_text(sizes)} (batch_size, max_seq_len, num_kv_heads, head_dim), "
        f"{sizes.dtype}{layers}; free on {device}: {available} bytes ({gib(available)}). Nothing "
        f"was allocated. With the other sizes as they are {fits} fits: shorten the cache, take "
        "fewer sequences, or free memory."
    )


def _shapes_text(sizes: Sizes) -> str:
    k, v = map(list, sizes.shapes)
    return f"k and v of {k}" if k == v else f"k of {k} and v of {v}"


def gib(count: int) -> str:
    """A number of bytes, as messages say it."""
    return f"{count / 2**30:.2f} GiB"


def _fail(what: str, got: str, allowed: str) -> NoReturn:
    raise InputError(f"KVCache: {what}: got {got}; allowed: {allowed}. Nothing was allocated.")
