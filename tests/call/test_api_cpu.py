"""The public calls where there is no usable GPU: every one an error with a remedy."""

from __future__ import annotations

import ctypes
import gc
import importlib.metadata
import struct
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from cuda.bindings import driver
from helpers import call_tensors

import gqa_cutlass
from gqa_cutlass import (  # fmt: skip
    GQADecodeConfig,
    check_overflow,
    decode_config,
    errors,
    gqa_attention_decode,
    gqa_decode,
    plan,
    warmup,
)
from gqa_cutlass.codegen import ARCHES, KernelConfig, Schedule, shipped
from gqa_cutlass.codegen.schema.launch import LaunchShape
from gqa_cutlass.codegen.schema.params import Params
from gqa_cutlass.dispatch import Device, arch_of
from gqa_cutlass.errors import DeviceError, GqaError, InputError, LaunchError
from gqa_cutlass.gpu import driver as module
from gqa_cutlass.tensormap import TensorMap

CONFIG = GQADecodeConfig(
    batch_size=2, cache_len=3, num_q_heads=8, num_kv_heads=2, head_dim=64, scale=0.125,
    max_seq_len=16,
)  # fmt: skip


def story_tensors() -> dict[str, Any]:
    """Valid tensors of `gqa_attention_decode` for CONFIG."""
    t = call_tensors()
    tokens = {name: t[name].unsqueeze(1) for name in ("q", "k", "v")}
    caches = {"kv_cache_k": t["k_cache"], "kv_cache_v": t["v_cache"]}
    return {"output": t["out"].view(2, 1, 512), **tokens, **caches}


@pytest.mark.parametrize("call", [gqa_decode, plan])
def test_tensors_that_are_on_no_device_are_refused(call: Callable[..., object]) -> None:
    with pytest.raises(DeviceError, match=r"got tensors on meta; allowed: an NVIDIA GPU.*\.to\("):
        call(**call_tensors(device="meta"), cache_seqlens=3)


@pytest.mark.parametrize(
    ("name", "bad", "got"),
    [
        ("output", lambda t: t["output"].view(2, 512), "shape [2, 512]"),
        ("q", lambda t: t["q"][:, 0], "shape [2, 8, 64]"),
        ("k", lambda t: None, "a NoneType"),
        ("v", lambda t: t["v"][:1], "shape [1, 1, 2, 64]"),
        ("kv_cache_k", lambda t: t["kv_cache_k"][:, :15], "shape [2, 15, 2, 64]"),
        ("kv_cache_v", lambda t: "cache", "a str"),
    ],
)
def test_tensors_that_contradict_the_storys_configuration_are_refused(
    name: str, bad: Callable[[Any], Any], got: str
) -> None:
    tensors = story_tensors()
    with pytest.raises(InputError) as raised:
        gqa_attention_decode(**tensors | {name: bad(tensors)}, config=CONFIG)
    allowed = "[2, " if got.startswith("shape") else "a torch.Tensor"
    assert f"gqa_attention_decode: {name}: got {got}; allowed: {allowed}" in str(raised.value)
    assert "Nothing was launched." in str(raised.value)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("cache_len", 16, "cache overflow: the cache holds 16 tokens"),
        ("cache_len", -1, "cache_seqlens: got -1"),
        ("scale", float("nan"), "softmax_scale: got nan"),
        ("num_kv_heads", 4, "k: got shape"),
    ],
)
def test_the_storys_configuration_is_checked(field: str, value: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        gqa_attention_decode(**story_tensors(), config=replace(CONFIG, **{field: value}))


def test_configuration_of_another_type_is_refused() -> None:
    with pytest.raises(InputError, match="config: got .*; allowed: a GQADecodeConfig"):
        gqa_attention_decode(**story_tensors(), config={"batch_size": 2})  # type: ignore[arg-type]


class FakeStream(torch.cuda.Stream):
    """Stands in for a stream where there is no GPU."""

    device = torch.device("cuda", 0)

    def __new__(cls, name: object) -> FakeStream:
        return object.__new__(cls)

    def __init__(self, name: object) -> None:
        self.name = name


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's streams: what is made current is the stream itself."""
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: FakeStream("default"))
    monkeypatch.setattr(torch.cuda, "ExternalStream", lambda handle, device: FakeStream(handle))
    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext(stream.name))


@pytest.mark.usefixtures("streams")
@pytest.mark.parametrize(
    ("stream", "current"),
    [(None, None), (0, "default"), (1, "default"), (3, 3), (2**64 - 1, 2**64 - 1)],
)
def test_a_stream_is_known_by_its_handle(stream: int | None, current: object) -> None:
    with decode_config._on_stream(stream, torch.device("cuda", 0)) as entered:
        assert entered == current


@pytest.mark.usefixtures("streams")
@pytest.mark.parametrize("stream", [2, -1, 2**64, True, 3.0, "default", object()])
def test_what_names_no_stream_is_refused(stream: Any) -> None:
    with pytest.raises(InputError, match=r"stream: got .*; allowed: .*0 for the default stream"):
        decode_config._on_stream(stream, torch.device("cuda", 0))


@pytest.mark.usefixtures("streams")
def test_a_stream_of_another_gpu_is_refused() -> None:
    with pytest.raises(InputError, match=r"allowed: a torch.cuda.Stream on cuda:1"):
        decode_config._on_stream(FakeStream("other"), torch.device("cuda", 1))


@pytest.mark.parametrize("stream", [None, 0, 1])
def test_on_the_cpu_there_is_the_default_stream(stream: int | None) -> None:
    with decode_config._on_stream(stream, torch.device("cpu")) as entered:
        assert entered is None
    for other in (2, 3, FakeStream("other")):
        with pytest.raises(InputError, match="with tensors on cpu; allowed: None, or 0"):
            decode_config._on_stream(other, torch.device("cpu"))


@pytest.mark.parametrize(
    ("batch", "schedules"),
    [(1, [Schedule.TMA, Schedule.MULTISTAGE]), (2, [Schedule.TMA, Schedule.MULTISTAGE]),
     (64, [Schedule.MULTISTAGE])],
    ids=["long-or-told-to-be-short", "ragged-or-not", "many"],
)  # fmt: skip
def test_warmup_loads_what_a_step_may_take(
    batch: int, schedules: list[Schedule], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[KernelConfig] = []
    monkeypatch.setattr("gqa_cutlass.cpu.executor.program_of", loaded.append)
    step = GQADecodeConfig(
        batch_size=batch, cache_len=0, num_q_heads=32, num_kv_heads=8, head_dim=128, scale=1.0,
        max_seq_len=65536,
    )  # fmt: skip
    assert warmup([step, step], device="cpu") == loaded
    assert [config.schedule for config in loaded] == schedules


@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e4m3fn, "float16"])
def test_warmup_for_an_unsupported_type_is_refused(dtype: Any) -> None:
    with pytest.raises(InputError, match="warmup: dtype: got .*; allowed: torch.float16, torch.bf"):
        warmup([CONFIG], dtype=dtype)


@pytest.mark.parametrize("call", [lambda d: warmup([shipped()[0]], device=d), check_overflow],
                         ids=["warmup", "check_overflow"])  # fmt: skip
def test_devices_that_run_no_kernels_are_refused(call: Callable[[str], object]) -> None:
    with pytest.raises(DeviceError, match="got meta; allowed: a CUDA device"):
        call("meta")


@pytest.mark.parametrize("call", [lambda d: warmup([CONFIG], device=d), check_overflow],
                         ids=["warmup", "check_overflow"])  # fmt: skip
@pytest.mark.parametrize("device", [0, "cuda", "cuda:0"])
def test_without_a_gpu_the_remedy_is_named(
    monkeypatch: pytest.MonkeyPatch, call: Callable[[Any], object], device: int | str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError, match="no usable GPU.*; needed: .*8.0.*gqa-cutlass doctor"):
        call(device)


@pytest.mark.parametrize(
    ("capability", "arch"),
    [(80, "sm_80"), (86, "sm_86"), (87, "sm_86"), (89, "sm_89"), (90, "sm_90a"), (100, "sm_100f"),
     (103, "sm_100f"), (110, "sm_110f"), (120, "sm_120f"), (121, "sm_120f")],
)  # fmt: skip
def test_known_gpus_have_a_target(capability: int, arch: str) -> None:
    assert arch_of(capability) is ARCHES[arch]


@pytest.mark.parametrize("capability", [60, 70, 75])
def test_old_gpus_are_refused(capability: int) -> None:
    with pytest.raises(DeviceError, match=rf"{capability / 10}: too old; allowed: 8.0 \(Ampere\)"):
        arch_of(capability)


@pytest.mark.parametrize("capability", [99, 140])
def test_unknown_gpus_name_what_is_known(capability: int) -> None:
    with pytest.raises(DeviceError, match=rf"{capability / 10}: not known.*sm_120f.*Upgrade"):
        arch_of(capability)


@pytest.mark.parametrize("version", [13000, 13020, 14000])
def test_driver_of_the_compilers_major_version_or_newer_will_do(version: int) -> None:
    module.check_driver(version, 13)


@pytest.mark.parametrize("version", [12000, 12080, 13000])
def test_kernels_of_cuda_12s_compiler_need_a_driver_of_12(version: int) -> None:
    module.check_driver(version, 12)


def test_old_driver_names_both_remedies() -> None:
    expected = "supports CUDA 12.8; needed: CUDA 13.0 or newer.*Upgrade.*requirements-cuda12.txt"
    with pytest.raises(DeviceError, match=expected):
        module.check_driver(12080, 13)


@pytest.fixture
def unknown_devices() -> Any:
    module.describe_device.cache_clear()
    yield
    module.describe_device.cache_clear()


def _no_libcuda(*_: object) -> Any:
    raise RuntimeError("libcuda.so.1: cannot open shared object file")


@pytest.mark.usefixtures("unknown_devices")
@pytest.mark.parametrize(
    ("init", "why"),
    [
        (_no_libcuda, "libcuda.so.1"),
        (lambda flags: (driver.CUresult.CUDA_ERROR_NO_DEVICE,), "CUDA_ERROR_NO_DEVICE"),
    ],
    ids=["no-driver", "no-device"],
)
def test_machine_without_driver_or_gpu_says_so(
    monkeypatch: pytest.MonkeyPatch, init: Callable[..., Any], why: str
) -> None:
    monkeypatch.setattr(module.driver, "cuInit", init)
    monkeypatch.setattr(
        module.driver, "cuGetErrorString", lambda _: (driver.CUresult.CUDA_SUCCESS, b"none")
    )
    with pytest.raises(DeviceError, match=f"no usable GPU: .*{why}.*; needed: .*doctor"):
        module.describe_device(0)


class FakeDriver:
    """Stands in for libcuda: takes notes, and answers with the statuses it was given."""

    def __init__(self, *statuses: int) -> None:
        self.statuses = list(statuses)
        self.launches: list[dict[str, Any]] = []
        self.maps: list[tuple[Any, ...]] = []

    def cuLaunchKernelEx(self, config: Any, function: Any, arguments: Any, extra: None) -> int:  # noqa: N802
        raw = ctypes.string_at(config.value, LAUNCH_CONFIG.size)
        *shape, shared_bytes, stream, attributes, count = LAUNCH_CONFIG.unpack(raw)
        self.launches.append(
            {
                "grid": tuple(shape[:3]),
                "block": tuple(shape[3:]),
                "shared_bytes": shared_bytes,
                "stream": stream,
                "attributes": [
                    ATTRIBUTE.unpack(ctypes.string_at(attributes + 72 * i, ATTRIBUTE.size))
                    for i in range(count)
                ],
                "function": function.value,
                "argument": arguments[0],
            }
        )
        return self.statuses.pop(0) if self.statuses else 0

    def cuTensorMapEncodeTiled(self, memory: Any, *fields: Any) -> int:  # noqa: N802
        self.maps.append((memory.value, *fields))
        ctypes.memset(memory.value, 0xAB, 128)
        return self.statuses.pop(0) if self.statuses else 0


# CUlaunchConfig: grid, block, shared memory, stream, attributes, their number. Of a
# CUlaunchAttribute of 72 bytes: its name, and the first words of its value.
LAUNCH_CONFIG, ATTRIBUTE = struct.Struct("@7IQQI"), struct.Struct("@I4x3I")


@pytest.fixture
def contexts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Contexts that the launcher entered, with a driver that has one for every GPU."""
    entered: list[str] = []
    success = (driver.CUresult.CUDA_SUCCESS,)
    monkeypatch.setattr(module, "_primary_context", lambda index: f"GPU {index}")
    monkeypatch.setattr(module.driver, "cuGetErrorString", lambda _: (*success, b"as it says"))
    for enter in ("cuCtxSetCurrent", "cuCtxPushCurrent"):
        monkeypatch.setattr(module.driver, enter, lambda c: entered.append(c) or success)
    monkeypatch.setattr(module.driver, "cuCtxPopCurrent", lambda: (*success, None))
    return entered


def prepared(
    monkeypatch: pytest.MonkeyPatch, fake: FakeDriver, **shape: Any
) -> tuple[module.Launch, Params]:
    """A launch by way of the fake driver, and its argument."""
    monkeypatch.setattr(module, "_library", lambda: fake)
    device = Device(index=3, arch=ARCHES["sm_80"], num_sms=1)
    kernel = module.LoadedKernel(shipped()[0], device, driver.CUfunction(0xF00))
    argument = Params()
    sizes: dict[str, Any] = {"grid": (1, 2, 3), "block": 128, "shared_bytes": 4096}
    return kernel.prepare(LaunchShape(**sizes | shape), argument), argument


@pytest.mark.parametrize(
    ("shape", "attributes"),
    [
        ({}, []),
        ({"cluster": 2}, [("CLUSTER_DIMENSION", (1, 2, 1))]),
        ({"pdl": True}, [("PROGRAMMATIC_STREAM_SERIALIZATION", (1, 0, 0))]),
        (
            {"cluster": 4, "pdl": True},
            [("CLUSTER_DIMENSION", (1, 4, 1)), ("PROGRAMMATIC_STREAM_SERIALIZATION", (1, 0, 0))],
        ),
    ],
    ids=["plain", "cluster", "pdl", "both"],
)
def test_a_launch_asks_for_its_shape(
    monkeypatch: pytest.MonkeyPatch,
    shape: dict[str, Any],
    attributes: list[tuple[str, tuple[int, int, int]]],
) -> None:
    fake = FakeDriver()
    launch, argument = prepared(monkeypatch, fake, **shape)
    gc.collect()  # what the driver reads is kept alive
    for stream in (0, 7, 1 << 47):
        launch(stream)
    assert [found["stream"] for found in fake.launches] == [0, 7, 1 << 47]
    names = driver.CUlaunchAttributeID
    for found in fake.launches:
        assert found["grid"] == (1, 2, 3) and found["block"] == (128, 1, 1)
        assert found["shared_bytes"] == 4096 and found["function"] == 0xF00
        assert found["argument"] == ctypes.addressof(argument)
        assert found["attributes"] == [
            (int(getattr(names, f"CU_LAUNCH_ATTRIBUTE_{name}")), *value)
            for name, value in attributes
        ]


def test_the_stream_has_its_place_in_the_drivers_structure() -> None:
    config = driver.CUlaunchConfig()
    config.hStream = driver.CUstream(0x123456789AB)
    raw = ctypes.string_at(config.getPtr() + module._STREAM_OFFSET, 8)
    assert int.from_bytes(raw, "little") == 0x123456789AB


def test_refusal_of_the_driver_names_the_kernel_and_the_reason(
    monkeypatch: pytest.MonkeyPatch, contexts: list[str]
) -> None:
    launch, _ = prepared(monkeypatch, FakeDriver(driver.CUresult.CUDA_ERROR_INVALID_VALUE))
    reason = rf"launching {shipped()[0].name}: CUDA_ERROR_INVALID_VALUE \(as it says\)"
    with pytest.raises(LaunchError, match=reason):
        launch(0)
    assert contexts == []
    launch(0)


def test_a_thread_new_to_cuda_enters_the_kernels_gpu(
    monkeypatch: pytest.MonkeyPatch, contexts: list[str]
) -> None:
    new = int(driver.CUresult.CUDA_ERROR_INVALID_CONTEXT)
    fake = FakeDriver(new, 0, 0, new, new)
    launch, _ = prepared(monkeypatch, fake)
    launch(7)
    launch(7)
    assert contexts == ["GPU 3"] and [found["stream"] for found in fake.launches] == [7, 7, 7]
    with pytest.raises(LaunchError, match="CUDA_ERROR_INVALID_CONTEXT"):
        launch(7)


CACHE_MAP = TensorMap(
    address=1 << 40, element_bytes=2, sizes=(128, 4096, 8, 3), strides=(2048, 256, 1 << 23),
    box=(64, 32, 1, 1), swizzle=128,
)  # fmt: skip


def test_tensor_maps_are_encoded_into_aligned_memory(
    monkeypatch: pytest.MonkeyPatch, contexts: list[str]
) -> None:
    fake = FakeDriver()
    monkeypatch.setattr(module, "_library", lambda: fake)
    for _ in range(20):
        assert module.encode_tensor_map(CACHE_MAP, 3) == b"\xab" * 128
    assert set(contexts) == {"GPU 3"}
    for memory, kind, rank, address, sizes, strides, box, steps, *modes in fake.maps:
        assert memory % 64 == 0 and address.value == 1 << 40 and rank == 4
        assert kind == int(driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_UINT16)
        assert tuple(sizes) == CACHE_MAP.sizes and tuple(strides) == CACHE_MAP.strides
        assert tuple(box) == CACHE_MAP.box and tuple(steps) == (1, 1, 1, 1)
        assert modes == [0, int(driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B), 0, 0]


@pytest.mark.parametrize(
    ("status", "error", "message"),
    [
        ("INVALID_VALUE", InputError, r"address=1099511627776.*Nothing was launched.*contiguous"),
        ("NOT_INITIALIZED", LaunchError, "encoding a tensor map: CUDA_ERROR_NOT_INITIALIZED"),
    ],
)
def test_tensor_maps_that_the_driver_refuses_are_errors(
    monkeypatch: pytest.MonkeyPatch, contexts: list[str], status: str, error: Any, message: str
) -> None:
    fake = FakeDriver(int(getattr(driver.CUresult, f"CUDA_ERROR_{status}")))
    monkeypatch.setattr(module, "_library", lambda: fake)
    with pytest.raises(error, match=message):
        module.encode_tensor_map(CACHE_MAP, 3)


def test_every_error_of_the_package_is_a_gqa_error() -> None:
    own = [e for e in vars(errors).values() if isinstance(e, type)]
    assert len(own) > 8
    assert all(issubclass(error, GqaError) for error in own)


def test_every_error_is_in_the_package() -> None:
    names = {name for name, e in vars(errors).items() if isinstance(e, type)}
    assert names <= set(gqa_cutlass.__all__)
    assert all(getattr(gqa_cutlass, name) is getattr(errors, name) for name in names)


def test_everything_public_is_there() -> None:
    assert all(getattr(gqa_cutlass, name) is not None for name in gqa_cutlass.__all__)
    assert set(gqa_cutlass.__all__) <= set(dir(gqa_cutlass))
    assert [n for n in dir(gqa_cutlass) if not n.startswith("_")] == [
        n for n in sorted(gqa_cutlass.__all__) if not n.startswith("_")
    ]
    assert gqa_cutlass.__version__ == importlib.metadata.version("gqa-cutlass")
    with pytest.raises(AttributeError, match="has no attribute 'gqa_prefill'"):
        gqa_cutlass.gqa_prefill  # noqa: B018
