"""The exported C library in tests: its functions, and a step as its arguments."""

from __future__ import annotations

import ctypes
import shutil
from collections.abc import Mapping
from functools import cache
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from c_build import build, kernels, write_dummies
from c_driver import Driver, names_of
from cases import Step
from torch import Tensor

from gqa_cutlass.call.stored import of_tokens
from gqa_cutlass.codegen.schema import public
from gqa_cutlass.dispatch import Dispatch

STATUSES = tuple(member.name for member in public.STATUS.members)
DTYPES = {
    torch.float16: public.DTYPE["GQA_FLOAT16"],
    torch.bfloat16: public.DTYPE["GQA_BFLOAT16"],
}
CACHE_TYPES = {
    torch.float8_e4m3fn: public.DTYPE["GQA_FLOAT8_E4M3FN"],
    torch.float8_e5m2: public.DTYPE["GQA_FLOAT8_E5M2"],
}
NUM_MERGE_COUNTERS = 16384  # words, the workspace's first part


class Config(ctypes.Structure):
    """GQADecodeConfig."""

    _fields_ = public.CONFIG.ctypes_fields()

    def __init__(self, **values: Any) -> None:
        super().__init__(**{"struct_size": ctypes.sizeof(self)} | values)


class Explained(ctypes.Structure):
    """gqa_launch."""

    _fields_ = public.LAUNCH.ctypes_fields()

    def __init__(self, **values: Any) -> None:
        super().__init__(**{"struct_size": ctypes.sizeof(self)} | values)


NUMBERS = {getattr(torch, n.name.lower()): code for n, code in public.NUMBER_CODES.items()}
# Of features.
POINTERS = (
    "sinks", "alibi_slopes", "cache_leftpad", "cache_batch_idx", "block_table", "slot_mapping",
)  # fmt: skip
_copies = count()
_OnLog = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_void_p)
_ADDRESS, _INT32, _TEXT = ctypes.c_void_p, ctypes.c_int32, ctypes.c_char_p
_CONFIG = ctypes.POINTER(Config)
_TENSORS = [_ADDRESS] * 6
_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "gqa_attention_decode": (ctypes.c_int, [*_TENSORS, _CONFIG, _ADDRESS]),
    "gqa_attention_decode_ragged":
        (ctypes.c_int, [*_TENSORS, _ADDRESS, _ADDRESS, _CONFIG, _ADDRESS]),
    "gqa_workspace_size": (ctypes.c_int, [_CONFIG, ctypes.POINTER(ctypes.c_size_t)]),
    "gqa_prepare": (ctypes.c_int, [_CONFIG]),
    "gqa_explain":
        (ctypes.c_int, [_CONFIG, _TEXT, _INT32, _INT32, ctypes.POINTER(Explained)]),
    "gqa_last_error": (_TEXT, []),
    "gqa_status_name": (_TEXT, [ctypes.c_int]),
    "gqa_set_log_callback": (None, [_OnLog, _ADDRESS]),
    "gqa_kernel_count": (_INT32, []),
    "gqa_kernel_name": (_TEXT, [_INT32]),
    "gqa_arch_name": (_TEXT, [_INT32]),
    "gqa_find_arch": (_INT32, [_INT32]),
    "fake_fail": (None, [_TEXT, ctypes.c_int, ctypes.c_int, ctypes.c_int]),
    "fake_function": (_TEXT, [ctypes.c_int]),
}  # fmt: skip


@cache
def _built() -> tuple[TemporaryDirectory[str], Path]:
    """The library for sm_80 and sm_90a, once per process, in a folder that goes with it."""
    folder = TemporaryDirectory(prefix="gqa_c_library_")
    bundle = write_dummies(Path(folder.name) / "bundle", kernels(), ("sm_80", "sm_90a"))
    return folder, build(bundle, Path(folder.name) / "libgqa.so")


def fresh_library() -> Library:
    """The library as in a new process."""
    return fresh_copy(_built()[1])


def fresh_copy(library: Path) -> Library:
    """A library as in a new process: each copy of the file has variables of its own."""
    copy = library.with_name(f"{next(_copies)}.so")
    shutil.copy(library, copy)
    return Library(copy)


class Library:
    """A library built with the fake driver inside.

    Args:
        path: Its file.
    """

    def __init__(self, path: Path) -> None:
        self.c = ctypes.CDLL(str(path))
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(self.c, name)
            function.restype, function.argtypes = result, arguments
        self.driver = Driver(self.c)
        self._log: object = None

    @property
    def error(self) -> str:
        """This thread's last error."""
        return str(self.c.gqa_last_error().decode())

    @property
    def kernels(self) -> list[str]:
        """Names of the kernels in it."""
        return [self.c.gqa_kernel_name(i).decode() for i in range(self.c.gqa_kernel_count())]

    @property
    def archs(self) -> list[str]:
        """Names of the architectures that it was exported for."""
        return names_of(self.c.gqa_arch_name)

    def decode(
        self,
        step: Step,
        config: Config | None = None,
        stream: int | None = None,
        **changes: int | None,
    ) -> str:
        """Call gqa_attention_decode, with other addresses where given; returns the status' name."""
        return self._decode(self.c.gqa_attention_decode, step, config, stream, changes)

    def decode_ragged(
        self,
        step: Step,
        flag: Tensor,
        config: Config | None = None,
        stream: int | None = None,
        **changes: int | None,
    ) -> str:
        """Call gqa_attention_decode_ragged, with the step's lengths on the device."""
        lengths = {"cache_seqlens": step.seqlens.data_ptr(), "overflow": flag.data_ptr()}
        function = self.c.gqa_attention_decode_ragged
        return self._decode(function, step, config, stream, changes, lengths)

    def _decode(
        self,
        function: Any,
        step: Step,
        config: Config | None,
        stream: int | None,
        changes: Mapping[str, int | None],
        more: Mapping[str, int | None] | None = None,
    ) -> str:
        given = addresses_of(step) | dict(more or {})
        assert set(changes) <= set(given)
        return STATUSES[function(*(given | changes).values(), config or config_of(step), stream)]

    def workspace_size(self, config: Config) -> int:
        """Bytes of workspace that a configuration wants."""
        size = ctypes.c_size_t(1)
        assert self.c.gqa_workspace_size(config, size) == 0, self.error
        return size.value

    def explain(self, config: Config, arch: str, num_sms: int, ragged: bool = False) -> Explained:
        """What would be launched."""
        found = Explained()
        status = self.c.gqa_explain(config, arch.encode(), num_sms, ragged, found)
        assert status == 0, self.error
        return found

    def log_to(self, lines: list[str] | None) -> None:
        """Collect a line per launch; None: no more."""
        self._log = (
            _OnLog() if lines is None else _OnLog(lambda line, _: lines.append(line.decode()))
        )
        self.c.gqa_set_log_callback(self._log, None)


def addresses_of(step: Step) -> dict[str, int | None]:
    """Where a step's tensors are, by the names of the library's arguments."""
    assert step.k is not None and step.v is not None
    tensors = {"output": step.out, "q": step.q, "k": step.k, "v": step.v,
               "kv_cache_k": step.k_cache, "kv_cache_v": step.v_cache}  # fmt: skip
    return {name: t.data_ptr() for name, t in tensors.items()}


def strides_of(step: Step) -> dict[str, int]:
    """Strides by the fields of GQADecodeConfig, of the tensors that are not contiguous."""
    assert step.k is not None and step.v is not None
    tensors = step.out, step.q, step.k, step.v, step.k_cache, step.v_cache
    return {
        f"{name}_{dim}_stride": stride
        for (name, dims), t in zip(public.STRIDED.items(), tensors, strict=True)
        for dim, stride in zip(dims, t.stride(), strict=False)
        if not t.is_contiguous()
    }


def config_of(
    step: Step, workspace: Tensor | None = None, lse: Tensor | None = None, **options: int
) -> Config:
    """A step's configuration, with other fields where given."""
    batch, num_q_heads, head_dim = step.q.shape
    return Config(
        batch_size=batch, cache_len=step.lengths[0], num_q_heads=num_q_heads,
        num_kv_heads=step.k_cache.shape[2], head_dim=head_dim, scale=step.scale,
        dtype=DTYPES[step.q.dtype],
        workspace=None if workspace is None else workspace.data_ptr(),
        workspace_size=0 if workspace is None else workspace.numel() * workspace.element_size(),
        lse=None if lse is None else lse.data_ptr(), **strides_of(step), **features_of(step),
        **pages_of(step), **scales_of(step.k_cache, step.k_scale, step.v_scale), **options,
    )  # fmt: skip


def scales_of(
    cache: Tensor, k_scale: float | Tensor | None, v_scale: float | Tensor | None
) -> dict[str, Any]:
    """What is said of caches of 8 bits, by the fields of GQADecodeConfig."""
    if cache.dtype not in CACHE_TYPES:
        return {}
    found: dict[str, Any] = {"cache_type": CACHE_TYPES[cache.dtype]}
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if isinstance(scale, Tensor):
            batch, head = (0, 0, *scale.stride())[-2:]
            if of_tokens(scale.shape):
                batch, head, found["scales_of_tokens"] = scale.stride(0), 0, 1
            found |= {
                f"{name}s": scale.data_ptr(), f"{name}_batch_stride": batch,
                f"{name}_head_stride": head,
            }  # fmt: skip
        elif scale is not None:
            found[name] = scale
    return found


def scale_tensors(k_scale: object, v_scale: object) -> dict[str, Tensor]:
    """Those on the device, by the fields of `Params`."""
    scales = {"k_scales": k_scale, "v_scales": v_scale}
    return {name: scale for name, scale in scales.items() if isinstance(scale, Tensor)}


def pages_of(step: Step) -> dict[str, int]:
    """How long a step's sequences can be: what caches hold, or pages."""
    outermost, room, *_ = step.k_cache.shape
    table = step.block_table
    if table is None:
        return dict(max_seq_len=room)
    pages = dict(page_size=room, num_pages=outermost, max_pages=table.shape[1])
    return pages if table.is_contiguous() else pages | dict(block_table_stride=table.stride(0))


def features_of(step: Step) -> dict[str, Any]:
    """What a step asks for, by the fields of GQADecodeConfig."""
    tensors = {name: getattr(step, name) for name in POINTERS}
    sinks, slopes = step.sinks, step.alibi_slopes
    value_dim = step.v_cache.shape[-1]
    rows = step.k_cache if step.block_table is None else step.block_table
    own_slopes = slopes is not None and slopes.dim() == 2
    return {name: t.data_ptr() for name, t in tensors.items() if t is not None} | dict(
        softcap=step.softcap,
        window=step.window_size[0] + 1,
        sinks_type=0 if sinks is None else NUMBERS[sinks.dtype],
        alibi_batch_stride=step.q.shape[1] if own_slopes else 0,
        head_dim_v=0 if value_dim == step.q.shape[-1] else value_dim,
        output_float32=int(step.out_dtype is torch.float32),
        cache_rows=0 if step.cache_batch_idx is None else rows.shape[0],
    )


def workspace_of(chosen: Dispatch) -> Tensor | None:
    """As much workspace as a launch wants, zeroed, in words; None where it wants none."""
    if not chosen.num_merge_counters:
        return None
    return torch.zeros(NUM_MERGE_COUNTERS + chosen.partial_floats, dtype=torch.int32)


def float32(value: float) -> float:
    """The scale as the C library has it."""
    return ctypes.c_float(value).value
