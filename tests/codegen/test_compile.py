"""NVRTC makes cubins of every shipped kernel, for every architecture, with no GPU at hand."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextvars import Context
from dataclasses import replace
from importlib import import_module
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cuda.bindings import nvrtc
from cuda.pathfinder import load_nvidia_dynamic_lib
from helpers import THOROUGH, check_registers, compiled, diagonal, sampled

from gqa_cutlass.codegen import (
    ARCHES,
    DType,
    KernelConfig,
    Math,
    Schedule,
    default_config,
    shipped,
)
from gqa_cutlass.codegen import compile as compiler
from gqa_cutlass.codegen.compile import (
    Compiled,
    compile_kernel,
    compile_source,
    compiler_version,
    compiles_for,
    shared_headers,
)
from gqa_cutlass.codegen.headers import Headers, include_dir
from gqa_cutlass.codegen.render import source_digest
from gqa_cutlass.codegen.schema.policies import OF_TOKENS, named, tagged
from gqa_cutlass.errors import CompileError, CompilerMissingError, ConfigError, GqaError

SAMPLE = [
    default_config(Math.TENSOROP, DType.F16, 128, 4, 8),
    default_config(Math.TENSOROP, DType.BF16, 64, 32, 8),
    default_config(Math.TENSOROP, DType.BF16, 256, 16, 8),
    default_config(Math.SIMT, DType.F16, 80, 1, 2),
]
FEATURES = named("SoftCapped"), named("SinkInSum")
NOT_SHIPPED = [
    default_config(Math.TENSOROP, DType.F16, 32, 12, 8),
    default_config(Math.TENSOROP, DType.BF16, 40, 3, 4),
    default_config(Math.TENSOROP, DType.F16, 104, 32, 2),
    default_config(Math.TENSOROP, DType.BF16, 232, 12, 8),
    default_config(Math.TENSOROP, DType.F16, 256, 32, 8),
    default_config(Math.TENSOROP, DType.F16, 40, 12, 8, Schedule.TMA),
    default_config(Math.TENSOROP, DType.BF16, 248, 32, 8, Schedule.TMA),
    default_config(Math.SIMT, DType.BF16, 40, 12, 1),
    default_config(Math.SIMT, DType.F16, 256, 3, 1),
    default_config(Math.TENSOROP, DType.F16, 128, 8, 8, policies=FEATURES),
    default_config(Math.TENSOROP, DType.BF16, 128, 8, 8, Schedule.TMA, FEATURES),
    replace(default_config(Math.TENSOROP, DType.BF16, 256, 16, 8), pdl=True),
    replace(default_config(Math.TENSOROP, DType.F16, 128, 4, 8, Schedule.TMA), pdl=True),
    replace(default_config(Math.TENSOROP, DType.BF16, 256, 16, 8, Schedule.TMA), pdl=True),
]


# Caches of 8 bits with scales of tokens, by tensor copies.
NOT_SHIPPED += [
    default_config(
        Math.TENSOROP, DType.BF16, head_dim, group_size, 8, Schedule.TMA, policies, None, tokens
    )
    for policies, tokens in (
        ((OF_TOKENS[0],), 1), ((named("PagedCache"), OF_TOKENS[1]), 1),
        ((named("SeveralQueries"), OF_TOKENS[0]), 4),
    )
    for head_dim, group_size in ((128, 8), (64, 16), (256, 16))
]  # fmt: skip

# Caches of 8 bits with scales of tokens, and several of these.
OF_TOKENS_SEVERAL = [
    default_config(
        Math.TENSOROP, dtype, head_dim, group_size, 8, policies=(*others, stored), num_tokens=4
    )
    for stored, dtype in zip(OF_TOKENS, DType, strict=True)
    for others in ((named("SeveralQueries"),), (named("PagedCache"), named("TreeOfQueries")))
    for head_dim, group_size in product((128, 64, 256), (8, 4, 1))
]
TMA = default_config(Math.TENSOROP, DType.F16, 128, 4, 8, Schedule.TMA)


def fullest() -> list[KernelConfig]:
    """Of every head_dim and schedule the kernel that holds most; the GPU suite takes all."""
    found: dict[tuple[int, Schedule], KernelConfig] = {}
    for config in shipped():
        key = config.head_dim, config.schedule
        best = found.get(key, config)
        found[key] = max(best, config, key=lambda c: (c.block_h, c.vec_width, c.dtype.name))
    return list(found.values())


def by_turns(configs: list[KernelConfig]) -> list[Any]:
    """As test parameters, of which CI takes every second head_dim, schedules by turns."""
    dims = sorted({config.head_dim for config in configs})
    return [
        pytest.param(
            c, id=c.name, marks=() if dims.index(c.head_dim) % 4 == 2 * c.tma else THOROUGH
        )
        for c in configs
    ]


@pytest.mark.parametrize("config", by_turns(fullest()))
def test_shipped_kernel_compiles_without_spills(config: KernelConfig) -> None:
    result = compiled(config)
    check_registers(result, config.max_registers)
    assert config.name.encode() in result.code


@pytest.mark.parametrize(("arch", "config"), diagonal(ARCHES, SAMPLE))
def test_every_architecture_compiles_without_spills(config: KernelConfig, arch: str) -> None:
    # In a context of its own, for few share the headers of an architecture.
    check_registers(Context().run(compiled, config, arch), config.max_registers)


def kind_of(config: KernelConfig) -> object:
    """By which CI takes some: how much of its own a kernel has beside its sizes."""
    return config.schedule, config.math, len(config.policies), config.pdl


@pytest.mark.parametrize("config", sampled(NOT_SHIPPED + OF_TOKENS_SEVERAL, kind_of))
def test_kernels_outside_the_grid_compile_without_spills(config: KernelConfig) -> None:
    assert config not in shipped()
    check_registers(compiled(config), config.max_registers)


@pytest.mark.parametrize(
    ("spills", "last_registers", "kept"),
    [
        ([0], 0, 0),
        ([12, 0], 0, 0),
        ([12, 4, 0], 128, 0),
        ([12, 4, 0], 129, 4),  # too many for the blocks that are to share a multiprocessor
        ([4, 12, 8], 128, 4),
    ],
)
def test_a_kernel_that_spills_is_compiled_again(
    spills: list[int], last_registers: int, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = default_config(Math.SIMT, DType.F16, 128, 4, 4)
    assert config.max_registers == 128
    calls: list[tuple[bool, tuple[str, ...]]] = []

    def compile_source(source: str, name: str, arch: str, *options: str) -> Compiled:
        calls.append(("__launch_bounds__(256, 2)" in source, options))
        registers = last_registers if len(calls) == 3 else 128
        return Compiled(
            code=b"", registers=registers, spill_bytes=spills[len(calls) - 1], stack_bytes=0,
            seconds=0,
        )  # fmt: skip

    monkeypatch.setattr(compiler, "compile_source", compile_source)
    assert compile_kernel(config, "sm_80").spill_bytes == kept
    frugal = ("--ptxas-options=--register-usage-level=0",)
    assert calls == [(True, ()), (True, frugal), (False, ())][: len(spills)]


@pytest.mark.parametrize(
    ("config", "arch"), diagonal((SAMPLE[0], SAMPLE[3]), ("compute_80", "compute_90"))
)
def test_ptx_needs_no_driver_and_names_source_lines(config: KernelConfig, arch: str) -> None:
    result = compiled(config, arch)
    text = result.code.decode()
    assert f".target {arch.replace('compute', 'sm')}" in text
    assert f".entry {config.name}(" in text
    assert ".loc" in text and "decode.cuh" in text
    assert (result.registers, result.spill_bytes, result.stack_bytes) == (0, 0, 0)
    assert "\0" not in text


def test_ptx_is_that_of_the_configured_schedule() -> None:
    tensorop, simt = (
        compiled(config, "compute_80").code.decode() for config in (SAMPLE[0], SAMPLE[3])
    )
    assert "mma.sync.aligned.m16n8k16" in tensorop and "cp.async" in tensorop
    assert "mma.sync" not in simt and "cp.async" in simt


def test_tensor_copies_and_clusters_are_in_the_ptx_of_hopper() -> None:
    text = compiled(TMA, TMA.ptx_arch).code.decode()
    for instruction in ("cp.async.bulk.tensor.5d", "st.async", "mapa", "barrier.cluster.wait"):
        assert instruction in text
    assert "cp.async.ca" not in text


@pytest.mark.parametrize("arch", [*ARCHES, "compute_80", "compute_90"])
def test_kernels_compile_for_what_their_schedule_allows_and_nothing_else(arch: str) -> None:
    assert compiles_for(SAMPLE[0], arch)
    assert compiles_for(TMA, arch) == (arch in ("sm_90a", "compute_90"))
    if not compiles_for(TMA, arch):
        with pytest.raises(
            ConfigError, match=f"arch: got '{arch}' for {TMA.name}; allowed: sm_90a"
        ):
            compile_kernel(TMA, arch)


@pytest.mark.parametrize("arch", ["compute_80", pytest.param("sm_90a", marks=THOROUGH)])
def test_code_repeats_to_the_byte_with_shared_headers_and_without(arch: str) -> None:
    def code() -> list[bytes]:
        return [compile_kernel(config, arch).code for config in (SAMPLE[0], SAMPLE[3], featured)]

    featured = default_config(Math.TENSOROP, DType.F16, 64, 4, 8, policies=tagged("win_cap_sink"))

    alone = Context().run(code)
    with shared_headers() as folder:
        assert code() == alone
        assert len(list(folder.glob("*.pch"))) == 1  # the others took the first one's


def test_headers_that_cannot_be_shared_are_read_for_each_kernel(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tried = []

    def attempt(program: object, options: list[str]) -> tuple[bool, str]:
        tried.append("--pch" in options)
        return compile_program(program, options)

    compile_program = compiler._compile
    monkeypatch.setattr(compiler, "_compile", attempt)
    with shared_headers() as folder:
        folder.rmdir()
        for _ in range(2):
            result = compile_source('extern "C" __global__ void f() {}', "f", "compute_80")
            assert b".entry f(" in result.code
    assert tried == [True, False, False]


@pytest.mark.parametrize(("version", "keeps"), [((12, 8), False), ((12, 9), True), ((13, 0), True)])
def test_the_compiler_keeps_nothing_of_its_own(
    version: tuple[int, int], keeps: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it finds again has no figures, by which spills are known."""
    given: list[str] = []

    def refuse(_: object, options: list[str]) -> tuple[bool, str]:
        given.extend(options)
        return False, "not compiled"

    monkeypatch.setattr(compiler, "nvrtc_version", lambda: version)
    monkeypatch.setattr(compiler, "_compile", refuse)
    with pytest.raises(CompileError):
        compile_source("", "f", "sm_90a")
    assert ("--no-cache" in given) == keeps


def test_headers_that_changed_since_they_were_read_are_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As by an upgrade: its kernel would have the name, and the digest, of the one before."""
    read = Headers(include_dir())
    read._texts["gqa/stage/softmax.cuh"] = read.text("gqa/stage/softmax.cuh") + "// as it was\n"
    module = import_module("gqa_cutlass.codegen.render")  # not the function of that name
    monkeypatch.setattr(module, "our_headers", lambda: read)
    source_digest.cache_clear()
    try:
        with pytest.raises(CompileError, match=f"{SAMPLE[0].name} for sm_90a: .* upgraded or edit"):
            compile_kernel(SAMPLE[0], "sm_90a")
    finally:
        source_digest.cache_clear()


@pytest.mark.parametrize("arch", ["sm_70", "compute_75", "", "sm_90"])
def test_unknown_architecture_is_refused(arch: str) -> None:
    with pytest.raises(ConfigError, match=f"arch: got '{arch}'; allowed: sm_80, .*compute_90"):
        compile_source("", "empty", arch)


@pytest.mark.parametrize("arch", ["sm_90a", "compute_90"])
def test_broken_source_raises_with_the_log_and_what_was_compiled(arch: str) -> None:
    with pytest.raises(CompileError) as raised:
        compile_source("\nint broken = ;", "planted", arch)
    message = str(raised.value)
    assert isinstance(raised.value, GqaError)
    assert f"could not compile planted for {arch}" in message
    assert "planted.cu(2): error" in message
    assert compiler_version() in message


def test_shared_memory_that_differs_from_the_configuration_does_not_compile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = compiler.render(SAMPLE[0]).replace(f"== {SAMPLE[0].shared_bytes})", "== 16)")
    monkeypatch.setattr(compiler, "render", lambda config: source)
    with pytest.raises(CompileError, match="static assertion failed"):
        compile_kernel(SAMPLE[0], "sm_90a")


@pytest.fixture
def fresh() -> Iterator[None]:
    """The compiler module knows nothing about this machine yet, and forgets what the test did."""
    remembered = [f for f in vars(compiler).values() if hasattr(f, "cache_clear")]
    remembered = [f for f in remembered if f.__module__ == compiler.__name__]
    for function in remembered:
        function.cache_clear()
    yield
    for function in remembered:
        function.cache_clear()


def _not_found(*_: object) -> None:
    raise RuntimeError("libnvrtc.so.13: cannot open shared object file")


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("ask", [lambda: compile_kernel(SAMPLE[0], "sm_90a"), compiler_version],
                         ids=["compile", "version"])  # fmt: skip
def test_missing_nvrtc_names_the_remedy(
    monkeypatch: pytest.MonkeyPatch, ask: Callable[[], object]
) -> None:
    monkeypatch.setattr(nvrtc, "nvrtcVersion", _not_found)
    with pytest.raises(CompilerMissingError, match="NVRTC: not found.*; needed: .*13.*pip install"):
        ask()


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize(
    ("function", "what"),
    [("find_spec", "headers of CuTe"), ("locate_nvidia_header_directory", "headers of ")],
)
def test_missing_headers_name_the_remedy(
    monkeypatch: pytest.MonkeyPatch, function: str, what: str
) -> None:
    monkeypatch.setattr(compiler, function, lambda name: None)
    with pytest.raises(CompilerMissingError, match=f"{what}.*not found; remedy: pip install"):
        compile_kernel(SAMPLE[0], "sm_90a")


def test_identity_of_the_compiler_names_every_part() -> None:
    parts = r"nvrtc-\d+\.\d+\+[0-9a-f]{12} cccl-\d{7} cudart-\d{5} cutlass-\d+\.\d+\.\d+"
    assert re.fullmatch(parts, compiler_version())


def test_the_library_that_is_identified_is_the_one_in_use() -> None:
    compiler_version()
    maps = Path("/proc/self/maps").read_text().split()
    loaded = {word for word in maps if re.search(r"/libnvrtc\.[^/]*$", word)}
    assert loaded == {load_nvidia_dynamic_lib("nvrtc").abs_path}


_NOTE = b"\x7fELF" + bytes(500) + bytes.fromhex("04000000 14000000 03000000") + b"GNU\0"


@pytest.mark.usefixtures("fresh")
def test_identity_changes_with_version_and_build_of_nvrtc(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def identify(version: tuple[int, int], library: bytes) -> str:
        (tmp_path / "libnvrtc.so").write_bytes(library)
        found = SimpleNamespace(abs_path=str(tmp_path / "libnvrtc.so"))
        monkeypatch.setattr(nvrtc, "nvrtcVersion", lambda: (0, *version))
        monkeypatch.setattr(compiler, "load_nvidia_dynamic_lib", lambda name: found)
        compiler.nvrtc_version.cache_clear()
        compiler_version.cache_clear()
        return compiler_version().split()[0]

    one, other = b"\xab\n" * 10, b"\n\xcd" * 10
    assert identify((13, 0), _NOTE + one) == "nvrtc-13.0+ab0aab0aab0a"
    assert identify((13, 0), _NOTE + other) == "nvrtc-13.0+0acd0acd0acd"
    assert identify((13, 5), _NOTE + one) == "nvrtc-13.5+ab0aab0aab0a"
    assert identify((13, 0), b"no note") == "nvrtc-13.0+7"
    with pytest.raises(CompilerMissingError, match="libnvrtc.so is loaded but cannot be read"):
        (tmp_path / "libnvrtc.so").unlink()
        compiler._nvrtc_build()


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize(
    ("part", "header", "text", "release"),
    [
        (
            "cutlass",
            "source/include/cutlass/version.h",
            "#define CUTLASS_MAJOR 4\n#define CUTLASS_MINOR 3\n#define CUTLASS_PATCH 7 \n",
            "cutlass-4.3.7",
        ),
        ("cudart", "cuda_runtime_api.h", "#define CUDART_VERSION  13050\n", "cudart-13050"),
        (
            "cccl",
            "cuda/std/__cccl/version.h",
            "// \xe9\n#define CCCL_VERSION 3099004 // MMMmmmppp",
            "cccl-3099004",
        ),
        ("cccl", "cuda/std/__cccl/version.h", "nothing of the kind", r"cccl-[0-9a-f]{12}"),
    ],
)
def test_identity_follows_the_headers_that_are_found(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    part: str,
    header: str,
    text: str,
    release: str,
) -> None:
    before = compiler_version().split()
    file = tmp_path / "found" / header
    file.parent.mkdir(parents=True)
    file.write_text(text, encoding="latin-1")
    locate = compiler.locate_nvidia_header_directory
    found = SimpleNamespace(abs_path=str(tmp_path / "found"))
    monkeypatch.setattr(
        compiler, "locate_nvidia_header_directory", lambda n: found if n == part else locate(n)
    )
    if part == "cutlass":
        origin = SimpleNamespace(origin=str(tmp_path / "found" / "__init__.py"))
        monkeypatch.setattr(compiler, "find_spec", lambda name: origin)
    for function in (compiler_version, compiler._include_paths):
        function.cache_clear()
    changed = set(compiler_version().split()) - set(before)
    assert len(changed) == 1 and re.fullmatch(release, changed.pop())


@pytest.mark.usefixtures("fresh")
def test_a_header_that_cannot_be_read_names_the_remedy(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "cutlass" / "version.h").mkdir(parents=True)
    for paths, why in (((tmp_path,), "Is a directory"), ((), "not found")):
        monkeypatch.setattr(compiler, "_include_paths", lambda paths=paths: paths)
        with pytest.raises(CompilerMissingError, match=f"header .*version.h: .*{why}.*pip install"):
            compiler._release("cutlass/version.h", "CUTLASS_MAJOR")
