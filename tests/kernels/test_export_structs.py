"""Structures of callers whose header is older or newer than the C library: read and written as far
as both know them, and refused where something would be ignored."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from c_build import FAKE_CUDA, compile_with, includes, sources, write_dummies
from c_library import (
    STATUSES,
    Config,
    Explained,
    Library,
    addresses_of,
    config_of,
    fresh_copy,
    fresh_library,
)
from cases import Step, make_step
from helpers import few

from gqa_cutlass.codegen import DType, Math, Schedule, default_config
from gqa_cutlass.codegen.schema import public

KNOWN, LEAST = ctypes.sizeof(Config), public.CONFIG.least_bytes
LAUNCH_KNOWN, LAUNCH_LEAST = ctypes.sizeof(Explained), public.LAUNCH.least_bytes
MOST = public.MOST_STRUCT_BYTES
ROOM = 2 * MOST
STEP: dict[str, Any] = dict(lengths=[3, 3], max_seq_len=30, head_dim=64, device="cpu")
# What wants a workspace: few heads in a cache that one block does not read at once.
CLUSTERS: dict[str, Any] = dict(
    lengths=[3], max_seq_len=4096, num_kv_heads=1, poison=False, device="cpu"
)
KERNELS = [
    default_config(Math.TENSOROP, DType.F16, 64, 4, 8),
    default_config(Math.TENSOROP, DType.F16, 128, 4, 8, Schedule.TMA),
]
FEATURE, INVALID = "GQA_ERROR_UNSUPPORTED_FEATURE", "GQA_ERROR_INVALID_VALUE"


def sized(structure: ctypes.Structure, size: int, beyond: int) -> Any:
    """Memory that begins with a structure, says that it is of this size, and goes on with a byte
    behind that size, and with zeros up to it."""
    structure.struct_size = size
    taken = min(size, ROOM)
    known = bytes(structure)[:taken].ljust(taken, b"\0")
    return ctypes.create_string_buffer(known + bytes([beyond]) * (ROOM - taken), ROOM)


def configured(config: Config, size: int, beyond: int = 0xFF) -> Any:
    """A configuration of another size."""
    return ctypes.cast(sized(config, size, beyond), ctypes.POINTER(Config))


def set_byte(config: Any, index: int, value: int = 1) -> Any:
    """The same with one byte set."""
    ctypes.cast(config, ctypes.POINTER(ctypes.c_ubyte))[index] = value
    return config


def statuses(library: Library, step: Step, config: Any) -> set[str]:
    """What every function that takes a configuration returns."""
    c, flag, size = library.c, torch.zeros(1, dtype=torch.int32), ctypes.c_size_t()
    tensors = addresses_of(step).values()
    lengths = step.seqlens.data_ptr(), flag.data_ptr()
    found = (
        c.gqa_attention_decode(*tensors, config, None),
        c.gqa_attention_decode_ragged(*tensors, *lengths, config, None),
        c.gqa_workspace_size(config, size),
        c.gqa_prepare(config),
        c.gqa_explain(config, b"sm_90a", 132, 0, Explained()),
    )
    return {STATUSES[status] for status in found}


def explained(library: Library, memory: Any) -> str:
    """What explaining to this memory returns."""
    config = config_of(make_step(**STEP))
    launch = ctypes.cast(memory, ctypes.POINTER(Explained))
    return STATUSES[library.c.gqa_explain(config, b"sm_90a", 132, 0, launch)]


# -- What is promised


def older_configurations_work(library: Library) -> None:
    step = make_step(**STEP)
    assert library.decode(step, Config.from_buffer_copy(config_of(step))) == "GQA_SUCCESS"
    expected = library.driver.last_launch()
    for size in range(LEAST, KNOWN + 1, 8):
        assert statuses(library, step, configured(config_of(step), size)) == {"GQA_SUCCESS"}
        assert library.decode(step, configured(config_of(step), size)) == "GQA_SUCCESS"
        assert library.driver.last_launch() == expected


def what_an_older_configuration_lacks_has_its_default(library: Library) -> None:
    step, launches = make_step(**CLUSTERS), library.driver.launches
    config = config_of(step)
    config.workspace, config.workspace_size = 1 << 40, 1 << 40
    for size, got in ((LEAST, "0 bytes at (nil)"), (LEAST + 8, f"0 bytes at {1 << 40:#x}")):
        assert library.decode(step, configured(config, size)) == "GQA_ERROR_WORKSPACE"
        assert f"workspace: got {got}; needed: " in library.error
    assert library.driver.launches == launches
    assert library.decode(step, configured(config, KNOWN)) == "GQA_SUCCESS"


def newer_configurations_work_that_ask_for_nothing_new(library: Library) -> None:
    step = make_step(**STEP)
    for size in (KNOWN + 8, KNOWN + 64, MOST):
        assert statuses(library, step, configured(config_of(step), size)) == {"GQA_SUCCESS"}


def newer_configurations_are_refused_that_ask_for_more(library: Library) -> None:
    step = make_step(**STEP)
    for size, index in ((KNOWN + 8, KNOWN), (KNOWN + 8, KNOWN + 7), (MOST, MOST - 1)):
        config = set_byte(configured(config_of(step), size, 0), index, 7)
        assert statuses(library, step, config) == {FEATURE}
        assert f"config: got {size} bytes with 7 in byte {index}; allowed: zeros " in library.error
        assert f"beyond the {KNOWN} bytes that this library knows. Nothing was l" in library.error
        assert "leave its field zero, or export the library again" in library.error
    assert library.driver.all_calls() == {}


def configurations_of_no_versions_size_are_refused(library: Library) -> None:
    step = make_step(**STEP)
    for size in (0, 4, 8, LEAST - 8, LEAST + 4, KNOWN + 1, KNOWN + 4, MOST + 8, 2**63, 2**64 - 8):
        assert statuses(library, step, configured(config_of(step), size, 0)) == {INVALID}
        assert (
            f"config: struct_size: got {size}; allowed: sizeof(GQADecodeConfig) of any version, "
            f"{LEAST} to {MOST} in steps of 8, and {KNOWN} here. Nothing was launched. Begin with "
            "GQA_DECODE_CONFIG_INIT."
        ) in library.error
    assert library.driver.all_calls() == {}


def launches_are_told_as_far_as_the_caller_knows(library: Library) -> None:
    whole = sized(Explained(), LAUNCH_KNOWN, 0)
    assert explained(library, whole) == "GQA_SUCCESS"
    for size in range(LAUNCH_LEAST, LAUNCH_KNOWN, 8):
        memory = sized(Explained(), size, 0xFF)
        assert explained(library, memory) == "GQA_SUCCESS"
        assert memory.raw[8:size] == whole.raw[8:size] and any(memory.raw[8:size])
        assert memory.raw[size:] == b"\xff" * (ROOM - size)
        assert Explained.from_buffer_copy(memory).struct_size == size


def what_a_newer_caller_would_be_told_is_zero(library: Library) -> None:
    whole = sized(Explained(), LAUNCH_KNOWN, 0)
    assert explained(library, whole) == "GQA_SUCCESS"
    for size in (LAUNCH_KNOWN + 8, MOST):
        memory = sized(Explained(), size, 0xFF)
        ctypes.memset(ctypes.addressof(memory) + 8, 0xFF, size - 8)
        assert explained(library, memory) == "GQA_SUCCESS"
        assert memory.raw[8:LAUNCH_KNOWN] == whole.raw[8:LAUNCH_KNOWN]
        assert memory.raw[LAUNCH_KNOWN:size] == bytes(size - LAUNCH_KNOWN)
        assert memory.raw[size:] == b"\xff" * (ROOM - size)
        assert Explained.from_buffer_copy(memory).struct_size == size


def launches_of_no_versions_size_are_refused_and_left_alone(library: Library) -> None:
    for size in (0, 8, LAUNCH_LEAST + 4, LAUNCH_KNOWN + 1, MOST + 8, 2**63):
        memory = sized(Explained(), size, 0)
        before = memory.raw
        assert explained(library, memory) == INVALID
        assert f"launch: struct_size: got {size}; allowed: sizeof(gqa_launch) of any version, " in (
            library.error
        )
        assert library.error.endswith("Nothing was launched. Begin with GQA_LAUNCH_INIT.")
        assert memory.raw == before


Promise = Callable[[Library], None]
PROMISES: list[Promise] = [
    older_configurations_work,
    what_an_older_configuration_lacks_has_its_default,
    newer_configurations_work_that_ask_for_nothing_new,
    newer_configurations_are_refused_that_ask_for_more,
    configurations_of_no_versions_size_are_refused,
    launches_are_told_as_far_as_the_caller_knows,
    what_a_newer_caller_would_be_told_is_zero,
    launches_of_no_versions_size_are_refused_and_left_alone,
]


@pytest.mark.parametrize("promise", PROMISES, ids=lambda promise: promise.__name__)
def test_promise(promise: Promise) -> None:
    promise(fresh_library())


# -- Planted bugs: a file, what stands in it, what stands there instead, and what finds it

CHECK, PUBLIC = "gqa_check.c", "gqa_attention_decode.c"
MUTANTS: dict[str, tuple[str, str, str, Promise]] = {
    "no least size": (
        CHECK, "got >= least && ", "", configurations_of_no_versions_size_are_refused,
    ),
    "no largest size": (
        CHECK, "got <= kGqaMostStructBytes", "got <= kGqaMostStructBytes + 8",
        configurations_of_no_versions_size_are_refused,
    ),
    "any size": (
        CHECK, " && got % step == 0", "", configurations_of_no_versions_size_are_refused,
    ),
    "what is unknown is ignored": (
        CHECK, "status = check_unknown(given)", "status = GQA_SUCCESS",
        newer_configurations_are_refused_that_ask_for_more,
    ),
    "the first unknown byte is ignored": (
        CHECK, "i = sizeof *given;", "i = sizeof *given + 1;",
        newer_configurations_are_refused_that_ask_for_more,
    ),
    "the last unknown byte is ignored": (
        CHECK, "i < given->struct_size;", "i + 1 < given->struct_size;",
        newer_configurations_are_refused_that_ask_for_more,
    ),
    "one byte too many is looked at": (
        CHECK, "i < given->struct_size;", "i < given->struct_size + 1;",
        newer_configurations_work_that_ask_for_nothing_new,
    ),
    "newer callers are refused": (
        CHECK, "got <= kGqaMostStructBytes", "got <= known",
        newer_configurations_work_that_ask_for_nothing_new,
    ),
    "older callers are refused": (
        CHECK, "got >= least", "got >= known", older_configurations_work,
    ),
    "more is read than there is": (
        CHECK, "given->struct_size < known ? given->struct_size : known", "known",
        what_an_older_configuration_lacks_has_its_default,
    ),
    "no defaults": (
        CHECK, "*config = defaults;", "memset((void*)config, 0x11, known);",
        what_an_older_configuration_lacks_has_its_default,
    ),
    "a launch of any size": (
        PUBLIC, "status = gqa_check_launch(launched);", "",
        launches_of_no_versions_size_are_refused_and_left_alone,
    ),
    "more is told than there is room": (
        PUBLIC, "memcpy(launched, &found, size)", "memcpy(launched, &found, sizeof found)",
        launches_are_told_as_far_as_the_caller_knows,
    ),
    "the caller's size is lost": (
        PUBLIC, "found.struct_size = size;", "", launches_are_told_as_far_as_the_caller_knows,
    ),
    "what is unknown keeps what it held": (
        PUBLIC, "memset((char*)launched", "if (0) memset((char*)launched",
        what_a_newer_caller_would_be_told_is_zero,
    ),
    "zeros beyond what the caller has": (
        PUBLIC, "0, size - sizeof found)", "0, size - sizeof found + 8)",
        what_a_newer_caller_would_be_told_is_zero,
    ),
}  # fmt: skip


class Workshop:
    """Builds the library with one of its files changed; the others are compiled once."""

    def __init__(self, folder: Path) -> None:
        self.bundle = write_dummies(folder, KERNELS, ("sm_90a",))
        self.objects = {
            source.name: self._compile(source) for source in (*sources(self.bundle), FAKE_CUDA)
        }

    def build(self, file: str, old: str, new: str) -> Library:
        """The library with a text in a file replaced."""
        source = self.bundle / "src" / file
        text = source.read_text()
        assert text.count(old) == 1
        changed = self.bundle / "changed.c"
        changed.write_text(text.replace(old, new))
        objects = self.objects | {file: self._compile(changed)}
        out = self.bundle / "changed.so"
        compile_with("gcc", "-shared", "-Wl,--wrap=dlopen,--wrap=dlsym", *objects.values(), "-o",
                     out, "-pthread", "-ldl", "-lm")  # fmt: skip
        return fresh_copy(out)

    def _compile(self, source: Path) -> Path:
        out = self.bundle / f"{source.stem}.o"
        compile_with("gcc", "-std=c11", "-O0", "-fPIC", "-DGQA_INTERNAL=", "-DFAKE_CUDA_INSIDE",
                     *includes(self.bundle), "-c", source, "-o", out)  # fmt: skip
        return out


@cache
def workshop(folder: Path) -> Workshop:
    """One per folder."""
    return Workshop(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where bugs are planted."""
    return tmp_path_factory.mktemp("mutants")


@pytest.mark.xdist_group("export_mutants")
@pytest.mark.parametrize("name", few(MUTANTS, 5))
def test_a_planted_bug_is_found(folder: Path, name: str) -> None:
    file, old, new, promise = MUTANTS[name]
    with pytest.raises(AssertionError):
        promise(workshop(folder).build(file, old, new))
