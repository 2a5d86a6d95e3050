"""The exported C library in tests: built around images that hold no code, with the driver of
fake_cuda.c inside, and what it launches run in ptxsim."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import count, takewhile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from cases import Step
from torch import Tensor

from gqa_cutlass.codegen import ARCHES, KernelConfig, Math, select
from gqa_cutlass.codegen.bundle import Image, bundle_files
from gqa_cutlass.codegen.schema import public
from gqa_cutlass.codegen.schema.launch import LaunchShape
from gqa_cutlass.codegen.schema.params import TENSOR_MAP_BYTES, Params, TmaParams
from gqa_cutlass.codegen.schema.policies import FEATURES
from gqa_cutlass.cpu import executor as cpu
from gqa_cutlass.cpu.executor import program_of, regions_of
from gqa_cutlass.dispatch import Dispatch
from gqa_cutlass.errors import InputError
from gqa_cutlass.kernels.export import facts
from gqa_cutlass.ptxsim.simulate import Checks
from gqa_cutlass.tensormap import UNIT_BYTES, TensorMap

FAKE_CUDA = Path(__file__).with_name("fake_cuda.c")
WARNINGS = ("-Wall", "-Wextra", "-Wpedantic", "-Werror")
STATUSES = tuple(member.name for member in public.STATUS.members)
DTYPES = {
    torch.float16: public.DTYPE["GQA_FLOAT16"],
    torch.bfloat16: public.DTYPE["GQA_BFLOAT16"],
}
NUM_MERGE_COUNTERS = 16384  # words, the workspace's first part
_NAME_BYTES, _ARGUMENT_BYTES = 160, ctypes.sizeof(TmaParams)
_SIZES = (f"-DARGUMENT_BYTES={ctypes.sizeof(Params)}", f"-DTMA_ARGUMENT_BYTES={_ARGUMENT_BYTES}")
_SWIZZLE_128, _UINT16 = 3, 1
_SMS_OF_H200 = 132
# Few kernels, of each kind: (head_dim, group size). Of groups of 4 there are narrow ones too.
FAMILIES = ((64, 4), (64, 7), (96, 4), (128, 4), (128, 7))


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


class DriverLaunch(ctypes.Structure):
    """fake_launch."""

    _fields_ = [
        *((name, ctypes.c_uint32 * 3) for name in ("grid", "block", "cluster")),
        ("shared_bytes", ctypes.c_uint32),
        ("device", ctypes.c_int32),
        ("num_attributes", ctypes.c_uint32),
        ("stream", ctypes.c_uint64),
        ("kernel", ctypes.c_char * _NAME_BYTES),
        ("padding", ctypes.c_ubyte * 40),  # the argument is aligned to 64 bytes
        ("argument", ctypes.c_ubyte * _ARGUMENT_BYTES),
    ]


class DriverTensor(ctypes.Structure):
    """fake_tensor."""

    _fields_ = [
        ("address", ctypes.c_uint64),
        ("sizes", ctypes.c_uint64 * 5),
        ("strides", ctypes.c_uint64 * 4),
        ("box", ctypes.c_uint32 * 5),
        ("steps", ctypes.c_uint32 * 5),
        ("type", ctypes.c_int32),
        ("rank", ctypes.c_uint32),
        *((name, ctypes.c_int32) for name in ("interleave", "swizzle", "promotion", "fill")),
    ]


NUMBERS = {getattr(torch, n.name.lower()): code for n, code in public.NUMBER_CODES.items()}
_POINTERS = "sinks", "alibi_slopes", "cache_leftpad", "cache_batch_idx"  # of features
_copies = count()
_OnLaunch = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(DriverLaunch))
_OnEncode = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(DriverTensor), ctypes.c_void_p)
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


def write_dummies(
    folder: Path, kernels: Iterable[KernelConfig], archs: Sequence[str] = tuple(ARCHES)
) -> Path:
    """Write a bundle whose images are their kernels' names, which is what the fake driver loads."""
    images = [
        Image(config=k, code=k.name.encode() + b"\0", archs=tuple(set(k.archs) & set(archs)))
        for k in kernels
    ]
    for name, text in bundle_files(images, [ARCHES[arch] for arch in archs], facts()).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return folder


def compile_with(compiler: str, *arguments: object) -> None:
    """Run a compiler, which must be content; the test is skipped where there is none."""
    if shutil.which(compiler) is None:
        pytest.skip(f"needs {compiler}")
    command = [compiler, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"


def sources(bundle: Path) -> list[Path]:
    """What is to be compiled of a bundle."""
    return sorted((bundle / "src").glob("*.c"))


def includes(bundle: Path) -> tuple[str, str]:
    """Where a bundle's headers are."""
    return f"-I{bundle / 'include'}", f"-I{bundle / 'src'}"


def build(bundle: Path, out: Path, *flags: str) -> Path:
    """Build the library with the fake driver inside; what it keeps to itself can be called too."""
    compile_with(
        "gcc", "-std=c11", "-O1", "-shared", "-fPIC", "-ffp-contract=off", *WARNINGS,
        "-DGQA_INTERNAL=", "-DFAKE_CUDA_INSIDE", *_SIZES, "-Wl,--wrap=dlopen,--wrap=dlsym",
        *includes(bundle), *flags,
        *sources(bundle), FAKE_CUDA, "-o", out, "-pthread", "-ldl", "-lm",
    )  # fmt: skip
    return out


def build_fake_cuda(folder: Path, *flags: str) -> Path:
    """Build the fake driver as the file that the dynamic linker knows as libcuda.so.1."""
    folder.mkdir(parents=True, exist_ok=True)
    out = folder / "libcuda.so.1"
    compile_with("gcc", "-std=c11", "-shared", "-fPIC", *WARNINGS, *_SIZES, *flags,
                 "-Wl,-soname,libcuda.so.1", FAKE_CUDA, "-o", out, "-pthread", "-ldl")  # fmt: skip
    return out


def kernels() -> list[KernelConfig]:
    """What `fresh_library` has."""
    filters = ",".join(f"d{head_dim}_g{group_size}_" for head_dim, group_size in FAMILIES)
    return dispatched(select(filters))


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


class Driver:
    """The fake driver in a library: what a test sets and reads of it."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._c = library
        self._callbacks: dict[str, object] = {}

    def set_device(self, ordinal: int, capability: int, num_sms: int = _SMS_OF_H200) -> None:
        """Have a GPU of this kind."""
        self._c.fake_set_device(ordinal, capability, num_sms)

    def enter(self, ordinal: int) -> None:
        """Make a GPU's context current on this thread."""
        self._c.fake_enter(ordinal)

    @property
    def current(self) -> int:
        """The GPU whose context is current on this thread; -1 for none."""
        return int(self._c.fake_current())

    def fail(self, function: str, error: int, *, skip: int = 0, times: int = -1) -> None:
        """Have a function fail, after `skip` good calls, `times` times; for good by default."""
        self._c.fake_fail(function.encode(), error, skip, times)

    def remove(self) -> None:
        """Have no libcuda at all."""
        self._c.fake_remove()

    def hide(self, function: str) -> None:
        """Have a libcuda without this function."""
        self._c.fake_hide(function.encode())

    def functions(self) -> list[str]:
        """Everything that it has."""
        return _names(self._c.fake_function)

    def calls(self, *functions: str) -> int:
        """How often functions were called."""
        return sum(int(self._c.fake_calls(name.encode())) for name in functions)

    def all_calls(self) -> dict[str, int]:
        """How often every function was called that was."""
        counts = {name: self.calls(name) for name in self.functions()}
        return {name: count for name, count in counts.items() if count}

    @property
    def launches(self) -> int:
        """How many launches were asked for."""
        return self.calls("cuLaunchKernelEx")

    def loads(self, kernel: str) -> int:
        """How often a kernel's image was loaded."""
        return int(self._c.fake_loads(kernel.encode()))

    def shared_bytes(self, kernel: str, ordinal: int) -> int:
        """The dynamic shared memory that a kernel may have on a GPU."""
        return int(self._c.fake_shared_bytes(kernel.encode(), ordinal))

    def set_load_microseconds(self, time: int) -> None:
        """Have loading take so long."""
        self._c.fake_set_load_microseconds(time)

    def set_capturing(self, active: bool) -> None:
        """Have a capture in progress on some thread."""
        self._c.fake_set_capturing(int(active))

    @property
    def capture_mode(self) -> int:
        """This thread's mode of capture."""
        return int(self._c.fake_capture_mode())

    @capture_mode.setter
    def capture_mode(self, mode: int) -> None:
        self._c.fake_set_capture_mode(mode)

    def last_launch(self) -> Launched:
        """What was launched last."""
        found = DriverLaunch()
        self._c.fake_last_launch(ctypes.byref(found))
        return Launched.by_driver(found)

    def on_launch(self, callback: Callable[[DriverLaunch], int]) -> None:
        """Call this for every launch; it returns what the driver answers."""
        kept = self._callbacks["launch"] = _OnLaunch(lambda launch: callback(launch.contents))
        self._c.fake_on_launch(kept)

    def on_encode(self, callback: Callable[[DriverTensor, int], int]) -> None:
        """Call this for every tensor map, with where to write it."""
        kept = self._callbacks["encode"] = _OnEncode(lambda t, map_: callback(t.contents, map_))
        self._c.fake_on_encode(kept)


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
        return _names(self.c.gqa_arch_name)

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


def _names(function: Callable[[int], bytes | None]) -> list[str]:
    """What a function calls 0, 1 and so on, up to null."""
    return [name.decode() for name in takewhile(bool, map(function, count()))]


def addresses_of(step: Step) -> dict[str, int | None]:
    """Where a step's tensors are, by the names of the library's arguments."""
    assert step.k is not None and step.v is not None
    tensors = {"output": step.out, "q": step.q, "k": step.k, "v": step.v,
               "kv_cache_k": step.k_cache, "kv_cache_v": step.v_cache}  # fmt: skip
    assert all(t.is_contiguous() for t in tensors.values())
    return {name: t.data_ptr() for name, t in tensors.items()}


def config_of(step: Step, workspace: Tensor | None = None) -> Config:
    """A step's configuration."""
    batch, num_q_heads, head_dim = step.q.shape
    return Config(
        batch_size=batch, cache_len=step.lengths[0], num_q_heads=num_q_heads,
        num_kv_heads=step.k_cache.shape[2], head_dim=head_dim, scale=step.scale,
        max_seq_len=step.k_cache.shape[1], dtype=DTYPES[step.q.dtype],
        workspace=None if workspace is None else workspace.data_ptr(),
        workspace_size=0 if workspace is None else workspace.numel() * workspace.element_size(),
        **features_of(step),
    )  # fmt: skip


def features_of(step: Step) -> dict[str, Any]:
    """What a step asks for, by the fields of GQADecodeConfig."""
    tensors = {name: getattr(step, name) for name in _POINTERS}
    sinks, slopes = step.sinks, step.alibi_slopes
    own_slopes = slopes is not None and slopes.dim() == 2
    return {name: t.data_ptr() for name, t in tensors.items() if t is not None} | dict(
        softcap=step.softcap,
        window=step.window_size[0] + 1,
        sinks_type=0 if sinks is None else NUMBERS[sinks.dtype],
        alibi_batch_stride=step.q.shape[1] if own_slopes else 0,
        cache_rows=0 if step.cache_batch_idx is None else step.k_cache.shape[0],
    )


def workspace_of(chosen: Dispatch) -> Tensor | None:
    """As much workspace as a launch wants, zeroed, in words; None where it wants none."""
    if not chosen.num_merge_counters:
        return None
    return torch.zeros(NUM_MERGE_COUNTERS + chosen.partial_floats, dtype=torch.int32)


def float32(value: float) -> float:
    """The scale as the C library has it."""
    return ctypes.c_float(value).value


@dataclass(frozen=True)
class Launched:
    """One launch, by the C library or by Python.

    Args:
        kernel: Its name.
        shape: Grid, block, cluster and shared memory.
        argument: The kernel's one argument, by field; tensor maps decoded.
        stream: Its handle.
        device: The GPU's ordinal.
    """

    kernel: str
    shape: LaunchShape
    argument: dict[str, Any]
    stream: int = 0
    device: int = 0

    @classmethod
    def by_driver(cls, launch: DriverLaunch) -> Launched:
        """What the fake driver was given."""
        x, y, z = launch.cluster if launch.num_attributes else (1, 1, 1)
        assert (x, z) == (1, 1)
        shape = LaunchShape(
            grid=tuple(launch.grid), block=launch.block[0], shared_bytes=launch.shared_bytes,
            cluster=y,
        )  # fmt: skip
        kernel = launch.kernel.decode()
        return cls(kernel, shape, fields_of(argument_of(launch)), launch.stream, launch.device)


def argument_of(launch: DriverLaunch) -> Params | TmaParams:
    """The very bytes that a kernel was given."""
    tma = KernelConfig.from_name(launch.kernel.decode()).tma
    return (TmaParams if tma else Params).from_buffer_copy(bytes(launch.argument))


def fields_of(argument: Params | TmaParams) -> dict[str, Any]:
    """The argument's fields by name, to be compared one by one."""
    if isinstance(argument, Params):
        return _values(argument)
    maps = {name: bytes(getattr(argument, name)) for name in ("keys", "values")}
    return _values(argument.decode) | {
        name: _comparable(TensorMap.from_bytes(data)) if any(data) else None
        for name, data in maps.items()
    }


def _comparable(description: TensorMap) -> TensorMap:
    """The same map, with one stride for all dimensions of which there is but one."""
    strides = zip(description.sizes[1:], description.strides, strict=True)
    return replace(description, strides=tuple(s if n > 1 else UNIT_BYTES for n, s in strides))


def _values(structure: ctypes.Structure) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, *_ in structure._fields_:
        value = getattr(structure, name)
        if isinstance(value, ctypes.Structure):
            found |= {f"{name}.{inner}": v for inner, v in _values(value).items()}
        else:
            found[name] = bytes(value) if isinstance(value, ctypes.Array) else value
    return found


def encode(tensor: DriverTensor, map_: int) -> int:
    """Encode a tensor map for ptxsim, where the driver would; refused as the driver does."""
    usual = (tensor.type, tensor.interleave, tensor.swizzle, tensor.promotion, tensor.fill)
    rank = tensor.rank
    if usual != (_UINT16, 0, _SWIZZLE_128, 0, 0) or list(tensor.steps[:rank]) != [1] * rank:
        return 1
    try:
        description = TensorMap(
            address=tensor.address, element_bytes=2, sizes=tuple(tensor.sizes[:rank]),
            strides=tuple(tensor.strides[: rank - 1]), box=tuple(tensor.box[:rank]), swizzle=128,
        )  # fmt: skip
    except InputError:
        return 1
    ctypes.memmove(map_, description.to_bytes(), TENSOR_MAP_BYTES)
    return 0


@dataclass
class Simulator:
    """Runs in ptxsim what a library launches.

    Args:
        library: Whose launches.
        tensors: What they may touch, by the fields of `Params`.
        launches: What was launched.
        fault: What went wrong in a launch, for the test to raise: a callback from C cannot.
    """

    library: Library
    tensors: dict[str, Tensor] = field(default_factory=dict)
    launches: list[Launched] = field(default_factory=list)
    fault: BaseException | None = None

    def __post_init__(self) -> None:
        self.library.driver.on_launch(self.launch)
        self.library.driver.on_encode(encode)

    def decode(self, step: Step, workspace: Tensor | None = None) -> Launched:
        """Decode a step in ptxsim, and say what was launched."""
        self._bind(step, workspace)
        return self._launched(self.library.decode(step, config_of(step, workspace)))

    def decode_ragged(self, step: Step, flag: Tensor, workspace: Tensor | None = None) -> Launched:
        """The same, with lengths on the device."""
        self._bind(step, workspace)
        self.tensors |= {"seqlens": step.seqlens, "overflow_flag": flag}
        config = config_of(step, workspace)
        config.cache_len = -1  # ignored
        return self._launched(self.library.decode_ragged(step, flag, config))

    def _bind(self, step: Step, workspace: Tensor | None) -> None:
        """Let launches touch a step's tensors and a workspace, and nothing else."""
        assert step.k is not None and step.v is not None
        self.tensors = {
            "q": step.q, "k_cache": step.k_cache, "v_cache": step.v_cache, "k_new": step.k,
            "v_new": step.v, "out": step.out,
        }  # fmt: skip
        features = {name: getattr(step, name) for name in _POINTERS}
        self.tensors |= {name: t for name, t in features.items() if t is not None}
        if workspace is not None:
            partials = workspace[NUM_MERGE_COUNTERS:].view(torch.float32)
            self.tensors |= {
                "merge_counters": workspace[:NUM_MERGE_COUNTERS],
                "split_workspace": partials,
            }

    def _launched(self, status: str) -> Launched:
        if self.fault is not None:
            raise self.fault
        assert status == "GQA_SUCCESS", self.library.error
        return self.launches[-1]

    def launch(self, launch: DriverLaunch) -> int:
        """Run a launch; returns what the driver answers."""
        try:
            launched = Launched.by_driver(launch)
            self.launches.append(launched)
            config = KernelConfig.from_name(launched.kernel)
            program = program_of(config)
            shared = config.tma or config.head_blocks > 1
            regions = regions_of(self.tensors, append=True, overread=shared)
            cpu.run(program, launched.shape, argument_of(launch), regions, Checks())
        except BaseException as fault:
            self.fault = fault
            return 1
        return 0


@contextmanager
def recorded() -> Iterator[list[Launched]]:
    """What Python launches meanwhile on CPU tensors."""
    found: list[Launched] = []
    run = cpu.run

    def record(program: Any, shape: LaunchShape, argument: Any, *rest: Any) -> None:
        found.append(Launched(program.kernel.name, shape, fields_of(argument)))
        run(program, shape, argument, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "run", record)
        yield found


def dispatched(kernels: Iterable[KernelConfig]) -> list[KernelConfig]:
    """Those that dispatch may choose for what C can ask for."""
    usual = (k for k in kernels if k.head_dim_v is None and {*k.policies} <= {*FEATURES})
    return [k for k in usual if k.math is Math.TENSOROP or k.vec_width == 1]
