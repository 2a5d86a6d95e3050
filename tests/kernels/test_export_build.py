"""The C library builds anywhere: in C and in C++, without a warning, with what it declares of CUDA
as CUDA has it, and with no names but its own."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from c_build import (
    WARNINGS,
    build_fake_cuda,
    compile_with,
    includes,
    kernels,
    sources,
    write_dummies,
)
from cuda.bindings import driver
from helpers import few

from gqa_cutlass.codegen.compile import _include_paths
from gqa_cutlass.codegen.schema import internal, public
from gqa_cutlass.codegen.schema.params import PARAMS, TENSOR_MAP_ALIGN, TENSOR_MAP_BYTES
from gqa_cutlass.gpu.driver import _STREAM_OFFSET

COMPILERS = {
    "gcc": ("-std=c11",),
    "clang": ("-std=c11",),
    "g++": ("-std=c++17", "-xc++"),
    "clang++": ("-std=c++17", "-xc++"),
}
STEP = """
int main(void) {
  GQADecodeConfig config INITIAL;
  gqa_status status;
  void* at[6];
  config.batch_size = 1, config.cache_len = 10, config.num_q_heads = 4, config.num_kv_heads = 1;
  config.head_dim = 128, config.scale = 0.1f, config.max_seq_len = 64, config.dtype = GQA_FLOAT16;
  for (size_t i = 0; i < 6; ++i) at[i] = (void*)((i + 1) << 40);
  status = gqa_attention_decode(at[0], at[1], at[2], at[3], at[4], at[5], CONFIG);
  printf("%d kernels, %s, %s\\n", (int)gqa_kernel_count(), gqa_status_name(status),
         gqa_last_error());
  return 0;
}
"""
INCLUDE = '#include "gqa_attention_decode.h"\n#include <stdio.h>\n'
INITIAL = "#define INITIAL = GQA_DECODE_CONFIG_INIT\n"
C_PROGRAM = INCLUDE + INITIAL + "#define CONFIG &config, 0" + STEP
# A reference, the default stream, and nothing said of sizes.
CPP_PROGRAM = INCLUDE + "#define INITIAL\n#define CONFIG config" + STEP


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export."""
    return write_dummies(tmp_path_factory.mktemp("bundle"), kernels(), ("sm_80", "sm_90a"))


@pytest.fixture(scope="module")
def built(bundle: Path) -> Callable[[str], Path]:
    """The shared library as anyone would build it, by compiler."""

    @cache
    def build(compiler: str) -> Path:
        out = bundle / compiler / "libgqa.so"
        out.parent.mkdir()
        compile_with(
            compiler, *COMPILERS[compiler], "-O2", "-shared", "-fPIC", *WARNINGS,
            *includes(bundle), *sources(bundle), "-o", out, "-pthread", "-ldl", "-lm",
        )  # fmt: skip
        return out

    return build


def run(*command: object, **environment: object) -> str:
    """What a program that must succeed prints."""
    variables = os.environ | {name: str(value) for name, value in environment.items()}
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, env=variables
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("compiler", COMPILERS)
def test_sources_compile_without_a_warning(bundle: Path, compiler: str, tmp_path: Path) -> None:
    for source in sources(bundle):
        compile_with(
            compiler, *COMPILERS[compiler], "-O3", *WARNINGS, *includes(bundle),
            "-c", source, "-o", tmp_path / "out.o",
        )  # fmt: skip


@pytest.mark.parametrize("compiler", COMPILERS)
def test_the_header_stands_alone(bundle: Path, compiler: str, tmp_path: Path) -> None:
    for header in sorted((bundle / "include").glob("*.h")):
        source = tmp_path / "alone.c"
        source.write_text(f'#include "{header.name}"\n#include "{header.name}"\nint unused;\n')
        compile_with(
            compiler, *COMPILERS[compiler], *WARNINGS, f"-I{header.parent}", "-c", source,
            "-o", tmp_path / "out.o",
        )  # fmt: skip


@pytest.mark.parametrize(
    ("library", "compiler", "program"),
    [("gcc", "gcc", C_PROGRAM), ("gcc", "g++", CPP_PROGRAM), ("gcc", "g++", C_PROGRAM),
     ("g++", "gcc", C_PROGRAM), ("clang", "clang++", CPP_PROGRAM)],
    ids=["C", "C++", "C++ with a pointer", "C with a library in C++", "clang"],
)  # fmt: skip
def test_a_program_links_and_opens_the_driver_of_the_machine(
    bundle: Path,
    built: Callable[[str], Path],
    library: str,
    compiler: str,
    program: str,
    tmp_path: Path,
) -> None:
    executable = build_program(bundle, built(library), compiler, program, tmp_path)
    fake = build_fake_cuda(tmp_path / "fake")
    printed = run(executable, LD_LIBRARY_PATH=fake.parent)
    assert printed == f"{len(kernels())} kernels, GQA_SUCCESS, \n"


README = """
#include "gqa_attention_decode.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
static void cudaMalloc(void** memory, size_t bytes) {{ *memory = malloc(bytes); }}
static void cudaMemset(void* memory, int value, size_t bytes) {{ memset(memory, value, bytes); }}
int main(void) {{
  void *output = (void*)(1ll << 40), *q = (void*)(2ll << 40), *k = (void*)(3ll << 40);
  void *v = (void*)(4ll << 40), *kv_cache_k = (void*)(5ll << 40), *kv_cache_v = (void*)(6ll << 40);
  gqa_stream_t stream = NULL;
  {step}
  printf("%s %d\\n", gqa_status_name(status), config.cache_len);
  free(config.workspace);
  return 0;
}}
"""


@pytest.mark.parametrize("compiler", ["gcc", "g++"])
def test_what_the_readme_shows_decodes(
    bundle: Path, built: Callable[[str], Path], compiler: str, tmp_path: Path
) -> None:
    found = re.search(r"```c\n(.*?)```", (bundle / "README.md").read_text(), re.S)
    assert found is not None
    step = found.group(1).partition('#include "gqa_attention_decode.h"\n')[2]
    if compiler == "g++":  # as the comment beside it says
        initial = re.search(r"= GQA_DECODE_CONFIG_INIT; *// in C\+\+: (.*)", step)
        assert initial is not None and initial.group(1) == "GQADecodeConfig config{};"
        step = step.replace("config = GQA_DECODE_CONFIG_INIT;", "config{};")
    program = build_program(bundle, built("gcc"), compiler, README.format(step=step), tmp_path)
    fake = build_fake_cuda(tmp_path / "fake")
    assert run(program, LD_LIBRARY_PATH=fake.parent) == "GQA_SUCCESS 1001\n"


def build_program(bundle: Path, library: Path, compiler: str, text: str, folder: Path) -> Path:
    """Build a program that uses the library."""
    source, out = folder / "program.c", folder / "program"
    source.write_text(text)
    compile_with(
        compiler, *COMPILERS[compiler], *WARNINGS, f"-I{bundle / 'include'}", source, "-xnone",
        library, "-o", out, f"-Wl,-rpath,{library.parent}",
    )  # fmt: skip
    return out


def test_a_machine_without_libcuda_is_said_so(
    bundle: Path, built: Callable[[str], Path], tmp_path: Path
) -> None:
    executable = build_program(bundle, built("gcc"), "gcc", C_PROGRAM, tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "libcuda.so.1").touch()  # found before the machine's, if it has one
    printed = run(executable, LD_LIBRARY_PATH=tmp_path / "empty")
    assert "GQA_ERROR_NO_DRIVER, no usable GPU: " in printed and "libcuda.so.1" in printed


@pytest.mark.parametrize("compiler", ["gcc", "g++"])
def test_the_library_exports_the_functions_of_its_header_alone(
    bundle: Path, built: Callable[[str], Path], compiler: str
) -> None:
    """However its files share their own functions and tables."""
    header = (bundle / "include" / "gqa_attention_decode.h").read_text()
    declared = re.findall(r"^GQA_API .*?(gqa_\w+)\(", header, re.M)
    lines = run("nm", "--dynamic", "--defined-only", built(compiler)).splitlines()
    assert sorted(line.split()[-1] for line in lines) == sorted(declared)
    assert "gqa_attention_decode" in declared


def test_cmake_compiles_every_source(bundle: Path) -> None:
    listed = re.findall(r"^  (src/\w+\.c)", (bundle / "CMakeLists.txt").read_text(), re.M)
    assert listed == [str(source.relative_to(bundle)) for source in sources(bundle)]


def test_the_library_needs_libc_alone(built: Callable[[str], Path]) -> None:
    printed = run("readelf", "--dynamic", built("gcc"))
    needed = set(re.findall(r"NEEDED.*\[(\w+)", printed))
    assert "libc" in needed and needed <= {"libc", "libm", "libdl", "libpthread", "ld"}


# -- What gqa_driver.h says of CUDA

CONSTANTS = {
    "kCuSuccess": driver.CUresult.CUDA_SUCCESS,
    "kCuCaptureRelaxed": driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED,
    "kCuComputeCapabilityMajor":
        driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
    "kCuComputeCapabilityMinor":
        driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
    "kCuMultiprocessors": driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT,
    "kCuMaxDynamicSharedBytes":
        driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
    "kCuClusterDimension": driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION,
    "kCuProgrammaticStreamSerialization":
        driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
    "kCuTensorMapUint16": driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_UINT16,
    "kCuTensorMapSwizzle128": driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
}  # fmt: skip
LAYOUT = {  # the field's name in cuda.h
    "grid[0]": "gridDimX", "grid[1]": "gridDimY", "grid[2]": "gridDimZ", "block[0]": "blockDimX",
    "block[1]": "blockDimY", "block[2]": "blockDimZ", "shared_bytes": "sharedMemBytes",
    "stream": "hStream", "attributes": "attrs", "num_attributes": "numAttrs",
}  # fmt: skip
FUNCTIONS = {  # the field's name in gqa_driver
    "cuInit": "init", "cuCtxGetCurrent": "context", "cuCtxSetCurrent": "set_context",
    "cuCtxGetDevice": "current_device", "cuDeviceGet": "device",
    "cuDevicePrimaryCtxRetain": "primary_context", "cuDeviceGetAttribute": "attribute",
    "cuLibraryLoadData": "load", "cuLibraryUnload": "unload", "cuLibraryGetKernel": "kernel",
    "cuKernelSetAttribute": "set_attribute", "cuKernelGetFunction": "function",
    "cuLaunchKernelEx": "launch", "cuTensorMapEncodeTiled": "encode",
    "cuThreadExchangeStreamCaptureMode": "capture_mode", "cuGetErrorName": "error_name",
    "cuGetErrorString": "error_text",
}  # fmt: skip


def declared(bundle: Path) -> dict[str, int]:
    """The constants of gqa_driver.h."""
    text = (bundle / "src" / "gqa_driver.h").read_text()
    return {name: int(value) for name, value in re.findall(r"\b(kCu\w+) = (\d+)", text)}


def test_constants_are_cudas(bundle: Path) -> None:
    assert declared(bundle) == {name: int(value) for name, value in CONSTANTS.items()}


def test_every_function_is_looked_up_and_kept_under_its_name(bundle: Path) -> None:
    text = (bundle / "src" / "gqa_driver.c").read_text()
    assert dict(re.findall(r'find\(library, "(\w+)", &driver\.(\w+)\)', text)) == FUNCTIONS


def cuda_headers() -> Path:
    """Where cuda.h is, with which NVRTC compiles too."""
    return next(path for path in _include_paths() if (path / "cuda.h").is_file())


LAYOUT_C = """
#include <cuda.h>
#include <stddef.h>
#include "gqa_params.h"
#define SAME(ours, theirs) _Static_assert((ours) == (theirs), #ours)
SAME(sizeof(gqa_cu_launch), sizeof(CUlaunchConfig));
SAME(sizeof(gqa_cu_attribute), sizeof(CUlaunchAttribute));
SAME(offsetof(gqa_cu_attribute, id), offsetof(CUlaunchAttribute, id));
SAME(offsetof(gqa_cu_attribute, value[0]), offsetof(CUlaunchAttribute, value.clusterDim.x));
SAME(offsetof(gqa_cu_attribute, value[1]), offsetof(CUlaunchAttribute, value.clusterDim.y));
SAME(offsetof(gqa_cu_attribute, value[2]), offsetof(CUlaunchAttribute, value.clusterDim.z));
SAME(offsetof(gqa_cu_attribute, value[0]),
     offsetof(CUlaunchAttribute, value.programmaticStreamSerializationAllowed));
SAME(sizeof(gqa_tensor_map), sizeof(CUtensorMap));
"""


def test_structures_are_laid_out_as_in_cuda_h(bundle: Path, tmp_path: Path) -> None:
    same = [
        *(f"offsetof(gqa_cu_launch, {ours}), offsetof(CUlaunchConfig, {theirs})"
          for ours, theirs in LAYOUT.items()),
        # What the Python package and its kernels say.
        f"offsetof(gqa_cu_launch, stream), {_STREAM_OFFSET}",
        f"sizeof(gqa_tensor_map), {TENSOR_MAP_BYTES}",
        f"_Alignof(gqa_tensor_map) % {TENSOR_MAP_ALIGN}, 0",
    ]  # fmt: skip
    source = tmp_path / "layout.c"
    source.write_text(LAYOUT_C + "".join(f"SAME({pair});\n" for pair in same))
    compile_with("gcc", "-std=c11", *WARNINGS, *includes(bundle), "-isystem", cuda_headers(), "-c",
                 source, "-o", tmp_path / "layout.o")  # fmt: skip


@pytest.mark.parametrize("compiler", ["gcc", "g++"])
def test_structures_of_the_schema_are_laid_out_as_in_python(
    bundle: Path, compiler: str, tmp_path: Path
) -> None:
    lines = ["#include <stddef.h>", '#include "gqa_internal.h"', '#include "gqa_params.h"',
             "#ifndef __cplusplus", "#define static_assert _Static_assert", "#endif"]  # fmt: skip
    for struct in (*public.STRUCTS, *internal.STRUCTS, PARAMS):
        kind = type(struct.c, (ctypes.Structure,), {"_fields_": struct.ctypes_fields()})
        lines.append(f'static_assert(sizeof({struct.c}) == {ctypes.sizeof(kind)}, "{struct.c}");')
        for name in (field.name for field in struct.fields):
            offset, where = getattr(kind, name).offset, f"offsetof({struct.c}, {name})"
            lines.append(f'static_assert({where} == {offset}, "{struct.c}.{name}");')
    source = tmp_path / "structures.c"
    source.write_text("\n".join(lines) + "\n")
    compile_with(compiler, *COMPILERS[compiler], *WARNINGS, *includes(bundle), "-c", source, "-o",
                 tmp_path / "structures.o")  # fmt: skip


ALIKE = """
#include <cuda.h>
#include <cstdio>
#include <type_traits>
#include "gqa_driver.h"

template <class Ours, class Theirs>
constexpr bool kAlikeValue = sizeof(Ours) == sizeof(Theirs) &&
                             std::is_pointer_v<Ours> == std::is_pointer_v<Theirs> &&
                             std::is_floating_point_v<Ours> == std::is_floating_point_v<Theirs>;

template <class Ours, class Theirs>
struct Alike : std::false_type {};

template <class R, class... A, class S, class... B>
struct Alike<R (*)(A...), S (*)(B...)> {
  static constexpr bool all() {
    if constexpr (sizeof...(A) == sizeof...(B)) {
      return kAlikeValue<R, S> && (kAlikeValue<A, B> && ...);
    } else {
      return false;
    }
  }
  static constexpr bool value = all();
};

#define TEXT(x) #x
#define NAME(x) TEXT(x)
"""


def test_functions_have_the_signatures_of_cuda_h_under_the_names_that_it_links(
    bundle: Path, tmp_path: Path
) -> None:
    """Where cuda.h means another version by a name (`_v2`), that is what must be looked up."""
    lines = [
        f"static_assert(Alike<decltype(gqa_driver::{field}), decltype(&{name})>::value);"
        for name, field in FUNCTIONS.items()
    ]
    names = "".join(f"  std::puts(NAME({name}));\n" for name in FUNCTIONS)
    source = tmp_path / "alike.cpp"
    source.write_text(ALIKE + "\n".join(lines) + f"\nint main() {{\n{names}}}\n")
    compile_with("g++", "-std=c++17", *includes(bundle), "-isystem", cuda_headers(), source, "-o",
                 tmp_path / "alike")  # fmt: skip
    assert run(tmp_path / "alike").split() == list(FUNCTIONS)


# -- CMake

CONSUMER = """
cmake_minimum_required(VERSION 3.16)
project(consumer LANGUAGES C CXX)
find_package(gqa_attention_decode 9.0 QUIET)
if(gqa_attention_decode_FOUND)
  message(FATAL_ERROR "another version was taken")
endif()
find_package(gqa_attention_decode 0.1 REQUIRED)
add_executable(in_c program.c)
target_link_libraries(in_c PRIVATE gqa::gqa_attention_decode)
add_executable(in_cpp program.cpp)
target_link_libraries(in_cpp PRIVATE gqa::gqa_attention_decode)
"""


def cmake(*arguments: object) -> None:
    """Run CMake, which must succeed; the test is skipped where there is none."""
    if shutil.which("cmake") is None:
        pytest.skip("needs cmake")
    run("cmake", *arguments, CFLAGS=" ".join(WARNINGS), CXXFLAGS=" ".join(WARNINGS))


@pytest.mark.slow
@pytest.mark.parametrize("shared", few(["ON", "OFF"]), ids=["shared", "static"])
def test_cmake_builds_installs_and_finds_the_library(
    bundle: Path, shared: str, tmp_path: Path
) -> None:
    build, prefix = tmp_path / "build", tmp_path / "prefix"
    cmake("-S", bundle, "-B", build, f"-DBUILD_SHARED_LIBS={shared}", "-DCMAKE_BUILD_TYPE=Release",
          f"-DCMAKE_INSTALL_PREFIX={prefix}")  # fmt: skip
    cmake("--build", build)
    cmake("--install", build)
    consumer = tmp_path / "consumer"
    consumer.mkdir()
    for name, text in (
        ("CMakeLists.txt", CONSUMER), ("program.c", C_PROGRAM), ("program.cpp", CPP_PROGRAM),
    ):  # fmt: skip
        (consumer / name).write_text(text)
    cmake("-S", consumer, "-B", consumer / "build", f"-DCMAKE_PREFIX_PATH={prefix}")
    cmake("--build", consumer / "build")
    fake = build_fake_cuda(tmp_path / "fake")
    for program in ("in_c", "in_cpp"):
        printed = run(consumer / "build" / program, LD_LIBRARY_PATH=fake.parent)
        assert printed == f"{len(kernels())} kernels, GQA_SUCCESS, \n"
    licenses = prefix / "share" / "licenses" / "gqa_attention_decode"
    assert (licenses / "LICENSE").read_text() == (bundle / "LICENSE").read_text()
    check_pkg_config(prefix, consumer / "program.c", shared == "OFF", tmp_path / "by_pkg_config")
    assert run(tmp_path / "by_pkg_config", LD_LIBRARY_PATH=fake.parent) == printed


def check_pkg_config(prefix: Path, program: Path, static: bool, out: Path) -> None:
    """Build a program by what pkg-config says; skipped where there is none."""
    if shutil.which("pkg-config") is None:
        pytest.skip("needs pkg-config")
    (file,) = prefix.rglob("gqa_attention_decode.pc")

    def asked(*options: str) -> list[str]:
        name = "gqa_attention_decode"
        return run("pkg-config", *options, name, PKG_CONFIG_PATH=file.parent).split()

    assert asked("--modversion") == [importlib.metadata.version("gqa-cutlass")]
    asked("--atleast-version=0.1")
    flags = asked("--cflags", "--libs", *(["--static"] if static else []))
    where = "" if static else f"-Wl,-rpath,{file.parent.parent}"
    run("gcc", program, "-o", out, *flags, *filter(None, [where]))


@pytest.mark.parametrize("compiler", COMPILERS)
def test_examples_compile_without_a_warning(bundle: Path, compiler: str, tmp_path: Path) -> None:
    examples = sorted((bundle / "examples").glob("*.c"))
    assert examples
    for example in examples:
        compile_with(
            compiler, *COMPILERS[compiler], "-O2", *WARNINGS, f"-I{bundle / 'include'}",
            "-c", example, "-o", tmp_path / "out.o",
        )  # fmt: skip
