"""The C library dispatches like Python: every kernel that ships and that dispatch may choose, on
every architecture, for thousands of problems."""

from __future__ import annotations

import ctypes
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path

import pytest
from c_build import build, dispatched, write_dummies
from c_library import NUM_MERGE_COUNTERS, Config, Library
from helpers import remodelled

from gqa_cutlass.codegen import ARCHES, DType, Schedule, shipped
from gqa_cutlass.codegen.schema import internal
from gqa_cutlass.codegen.schema.internal import feature_bits
from gqa_cutlass.codegen.schema.policies import FEATURES, Policy, named
from gqa_cutlass.codegen.schema.problem import Problem
from gqa_cutlass.codegen.schema.public import DTYPE_CODES
from gqa_cutlass.dispatch import MODELS, MOST_TILES, Device, arch_of, dispatch, model_device
from gqa_cutlass.errors import DeviceError

KERNELS = dispatched(shipped())
RANDOM_PROBLEMS = 20000
Kind = tuple[DType, int, int, tuple[Policy, ...]]  # with head_dim and group size
CAP, SINK, WINDOW = named("SoftCapped"), named("SinkInSum"), named("SlidingWindow")
MODEL, H200 = MODELS["sm_90a"], model_device(ARCHES["sm_90a"])


class CProblem(ctypes.Structure):
    """gqa_problem."""

    _fields_ = internal.PROBLEM.ctypes_fields()


class CTarget(ctypes.Structure):
    """gqa_target."""

    _fields_ = internal.TARGET.ctypes_fields()


class CKernel(ctypes.Structure):
    """gqa_kernel."""

    _fields_ = internal.KERNEL.ctypes_fields()


class CDispatch(ctypes.Structure):
    """gqa_dispatch."""

    _fields_ = internal.DISPATCH.ctypes_fields()


@dataclass(frozen=True)
class Chosen:
    """What either of the two chose."""

    kernel: str
    grid: tuple[int, ...]
    cluster: int
    block: int
    shared_bytes: int
    num_splits: int
    num_stages: int
    prefetch_first_tile: int
    num_merge_counters: int
    partial_floats: int


def workspace_bytes(chosen: Chosen) -> int:
    """What the C library wants for a launch."""
    return 4 * (NUM_MERGE_COUNTERS + chosen.partial_floats) if chosen.num_merge_counters else 0


@dataclass(frozen=True)
class Case:
    """A problem on a GPU."""

    problem: Problem
    device: Device
    ragged: bool

    def by_python(self) -> Chosen:
        """As the Python package dispatches it."""
        found = dispatch(self.problem, self.device, 0, None, self.ragged)
        return Chosen(
            found.config.name, found.shape.grid, found.shape.cluster, found.shape.block,
            found.shape.shared_bytes, found.num_splits, found.num_stages, found.prefetch_first_tile,
            found.num_merge_counters, found.partial_floats,
        )  # fmt: skip

    def by_c(self, library: Library) -> Chosen | None:
        """As the C library does; None where it has no kernel."""
        p = self.problem
        problem = CProblem(
            p.batch_size, p.num_q_heads, p.num_kv_heads, p.head_dim, p.max_seq_len,
            DTYPE_CODES[p.dtype], p.vec_width, self.ragged, feature_bits(p.policies), p.window or 0,
        )  # fmt: skip
        target = CTarget(list(ARCHES).index(self.device.arch.name), self.device.num_sms)
        found = CDispatch()
        choose = library.c.gqa_choose
        if not choose(ctypes.byref(problem), ctypes.byref(target), ctypes.byref(found)):
            return None
        values = {name: getattr(found, name) for name, _ in CDispatch._fields_[2:]}
        kernel = CKernel.from_address(found.kernel)
        return Chosen(kernel.name.decode(), tuple(found.grid), **values)

    def config(self) -> Config:
        """The C library's configuration for it."""
        p = self.problem
        return Config(
            batch_size=p.batch_size, num_q_heads=p.num_q_heads, num_kv_heads=p.num_kv_heads,
            head_dim=p.head_dim, scale=0.1, max_seq_len=p.max_seq_len, dtype=DTYPE_CODES[p.dtype],
            window=p.window or 0, softcap=30 if CAP in p.policies else 0,
            sinks=1 << 40 if SINK in p.policies else None,
        )  # fmt: skip


@cache
def _widths() -> dict[Kind, list[int]]:
    """Vector widths for which Python chooses a kernel that ships, by what else identifies it."""
    found: dict[Kind, list[int]] = {}
    for kernel in KERNELS:
        if kernel.schedule is Schedule.MULTISTAGE:
            key = kernel.dtype, kernel.head_dim, kernel.group_size, kernel.policies
            found.setdefault(key, []).append(kernel.vec_width)
    return found


def case_of(
    kind: Kind, width: int, device: Device, *, batch: int, kv_heads: int, tokens: int,
    ragged: bool, window: int = 100,
) -> Case:  # fmt: skip
    """A problem of a kind; the window counts where there is one, and hides a token or more."""
    dtype, head_dim, group_size, policies = kind
    problem = Problem(
        batch_size=batch, num_q_heads=kv_heads * group_size, num_kv_heads=kv_heads,
        head_dim=head_dim, max_seq_len=tokens, dtype=dtype, vec_width=width, append=True,
        policies=policies, window=min(window, tokens - 1) if WINDOW in policies else None,
    )  # fmt: skip
    return Case(problem, device, ragged)


def random_cases(count: int, seed: int) -> Iterator[Case]:
    """Problems of every kind; sizes are spread evenly over their orders of magnitude."""
    chance = random.Random(seed)
    archs = [*ARCHES.values(), *[ARCHES["sm_90a"]] * len(ARCHES)]  # which has a schedule more

    def size(most: int) -> int:
        return round(math.exp(chance.uniform(0, math.log(most))))

    for _ in range(count):
        kind = chance.choice(list(_widths()))
        device = Device(index=-1, arch=chance.choice(archs), num_sms=chance.randint(46, 160))
        yield case_of(
            kind, chance.choice(_widths()[kind]), device, batch=size(300), kv_heads=size(64),
            tokens=1 + size(2**20), ragged=chance.random() < 0.5, window=size(2**17),
        )  # fmt: skip


def edge_cases() -> Iterator[Case]:
    """Both sides of every limit of the model."""
    hopper, ampere = H200, model_device(ARCHES["sm_80"])
    usual, partial_boxes = (DType.F16, 128, 4, ()), (DType.BF16, 96, 1, ())
    windowed: Kind = (DType.F16, 128, 4, (WINDOW,))
    windows = 1, 2, 16, 17, 18, 113, 128, 129, MODEL.balanced_tokens - 1, MODEL.balanced_tokens
    for device, batch, window, held, heads, ragged in product(
        (hopper, ampere), (1, 2, 64), windows, (1, 2, 2**17), (1, 8), (False, True)
    ):
        yield case_of(
            windowed, 8, device, batch=batch, kv_heads=heads, tokens=window + held, ragged=ragged,
            window=window,
        )  # fmt: skip
    batches = 1, 2, MODEL.balanced_batch - 1, MODEL.balanced_batch, MODEL.balanced_batch + 1
    tokens = (
        1,
        127,
        128,
        129,
        MODEL.balanced_tokens - 1,
        MODEL.balanced_tokens,
        MODEL.balanced_tokens + 1,
    )
    for device, width, batch, length, heads, ragged in product(
        (hopper, ampere), (8, 4), batches, tokens, (1, 2, 8, 64), (False, True)
    ):
        yield case_of(
            usual, width, device, batch=batch, kv_heads=heads, tokens=length, ragged=ragged
        )
    for batch, beyond in product((64, 128, 256), (0, 1)):
        yield case_of(
            usual, 8, ampere, batch=batch, kv_heads=1, tokens=MOST_TILES // batch + beyond,
            ragged=True,
        )  # fmt: skip
    for heads in (MODEL.tma_heads, MODEL.tma_heads + 1):
        yield case_of(usual, 8, hopper, batch=1, kv_heads=heads, tokens=256, ragged=False)
    for kind, heads, limit in (
        (usual, 8, MODEL.tma_mib),
        (partial_boxes, 32, MODEL.tma_mib_partial_boxes),
    ):
        most = limit * 2**20 // (4 * kind[1] * heads)  # tokens
        for length in (most, most + 1):
            yield case_of(kind, 8, hopper, batch=1, kv_heads=heads, tokens=length, ragged=False)
    for heads, batch, ragged in product(
        (
            1,
            MODEL.tma_few_heads,
            MODEL.tma_few_heads + 1,
            MODEL.tma_large_heads,
            MODEL.tma_large_heads + 1,
        ),
        (1, 2),
        (False, True),
    ):
        length = MODEL.tma_mib * 2**20 // (4 * 128 * heads) + 1
        yield case_of(usual, 8, hopper, batch=batch, kv_heads=heads, tokens=length, ragged=ragged)
    for batch, beyond, ragged in product((1, 4), (0, 1), (False, True)):
        most = MODEL.prefetch_mib * 2**20 // (4 * 128 * 4 * batch)
        yield case_of(
            usual, 8, ampere, batch=batch, kv_heads=4, tokens=most + beyond, ragged=ragged
        )


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Library:
    """Every kernel that ships and is dispatched, for every architecture."""
    folder = tmp_path_factory.mktemp("dispatch")
    return Library(build(write_dummies(folder, KERNELS), folder / "libgqa.so", "-O2"))


@pytest.fixture(scope="module")
def random_problems() -> list[tuple[Case, Chosen]]:
    """Problems, and what Python chooses for them."""
    return [(c, c.by_python()) for c in random_cases(RANDOM_PROBLEMS, seed=20261122)]


def test_every_shipped_kernel_that_is_dispatched_is_in_the_library(library: Library) -> None:
    assert library.kernels == [kernel.name for kernel in KERNELS]
    assert library.archs == list(ARCHES)
    for index in (-1, len(KERNELS), 2**31 - 1, -(2**31)):
        assert library.c.gqa_kernel_name(index) is library.c.gqa_arch_name(index) is None
    assert library.c.gqa_arch_name(len(ARCHES)) is None


def test_c_dispatches_random_problems_like_python(
    library: Library, random_problems: list[tuple[Case, Chosen]]
) -> None:
    differing = [
        (case, found, expected)
        for case, expected in random_problems
        if (found := case.by_c(library)) != expected
    ]
    assert differing == []


def test_c_dispatches_like_python_at_the_models_limits(library: Library) -> None:
    cases = list(edge_cases())
    differing = [
        (case, found, expected)
        for case in cases
        if (found := case.by_c(library)) != (expected := case.by_python())
    ]
    assert len(cases) > 500 and differing == []


def test_ties_go_to_fewer_splits_as_in_python(
    tmp_path: Path,
) -> None:
    """Where merging costs nothing, many numbers of splits cost the same."""
    with remodelled(microseconds_per_split=0):
        library = Library(build(write_dummies(tmp_path, KERNELS), tmp_path / "libgqa.so"))
        found = [(c, c.by_c(library), c.by_python()) for c in random_cases(2000, seed=1)]
    assert [case for case in found if case[1] != case[2]] == []


def test_problems_reach_every_kernel_and_every_way_to_share_a_sequence(
    random_problems: list[tuple[Case, Chosen]],
) -> None:
    found = [chosen for _, chosen in random_problems]
    assert {c.kernel for c in found} == {kernel.name for kernel in KERNELS}
    assert {c.cluster for c in found} == {1, 2, 4, 8}
    assert {c.num_stages for c in found} == {1, 2}
    assert {c.prefetch_first_tile for c in found if c.cluster == 1} == {False, True}
    assert {c.grid[1] - c.num_splits for c in found} == {0, 1, 3}
    assert sum(c.num_merge_counters > 0 for c in found) > len(found) // 10
    assert max(c.num_splits for c in found) > 100


def test_c_explains_what_python_dispatches(
    library: Library, random_problems: list[tuple[Case, Chosen]]
) -> None:
    explained = 0
    for case, expected in random_problems:
        if case.problem.vec_width == 8:  # what is explained is for aligned tensors
            device = case.device
            found = library.explain(case.config(), device.arch.name, device.num_sms, case.ragged)
            assert expected.num_merge_counters <= NUM_MERGE_COUNTERS
            assert found.kernel.decode() == expected.kernel
            assert tuple(found.grid) == expected.grid
            assert found.workspace_size == workspace_bytes(expected)
            for name in ("cluster", "block", "shared_bytes", "num_splits", "num_stages"):
                assert getattr(found, name) == getattr(expected, name), name
            explained += 1
    assert explained > len(random_problems) // 2


def test_the_workspace_suffices_for_every_alignment_and_for_ragged_lengths(
    library: Library, random_problems: list[tuple[Case, Chosen]]
) -> None:
    """On the driver's GPU, an H200."""
    ragged_alone = 0
    for case, _ in random_problems[:2000]:
        p = case.problem
        needed = {
            (width, ragged): workspace_bytes(
                replace(
                    case, problem=replace(p, vec_width=width), device=H200, ragged=ragged
                ).by_python()
            )
            for width in _widths()[p.dtype, p.head_dim, p.group_size, p.policies]
            for ragged in (False, True)
        }
        assert library.workspace_size(case.config()) == max(needed.values())
        most = max(bytes for (_, ragged), bytes in needed.items() if not ragged)
        ragged_alone += max(needed.values()) > most
    assert ragged_alone > 100


def test_c_drops_a_window_that_hides_nothing_as_python_does(library: Library) -> None:
    for kind, held in product([kind for kind in _widths() if WINDOW in kind[3]], (299, 300, 2**30)):
        case = case_of(kind, 8, H200, batch=1, kv_heads=8, tokens=300, ragged=False)
        config = case.config()
        config.window = held
        without = tuple(policy for policy in kind[3] if policy is not WINDOW)
        expected = replace(case.problem, policies=kind[3], window=held)
        if held >= 300:
            expected = replace(case.problem, policies=without, window=None)
        found = library.explain(config, "sm_90a", H200.num_sms)
        assert found.kernel.decode() == Case(expected, H200, False).by_python().kernel


def test_features_are_told_apart_by_a_bit_each() -> None:
    bits = [feature_bits([policy]) for policy in FEATURES]
    assert bits == [1 << i for i in range(len(FEATURES))]
    assert feature_bits(FEATURES) == sum(bits) and feature_bits(()) == 0


def test_where_no_kernel_is_narrow_enough_there_is_none(library: Library) -> None:
    device = model_device(ARCHES["sm_80"])
    for kind, widths in _widths().items():
        for width in {8, 4, 2, 1} - set(widths):
            case = case_of(kind, width, device, batch=1, kv_heads=2, tokens=300, ragged=False)
            found = case.by_c(library)
            if width > min(widths):
                assert found is not None  # a narrower kernel than need be
            else:
                assert found is None


def test_a_library_without_wide_kernels_serves_aligned_rows_by_narrow_ones(tmp_path: Path) -> None:
    narrow = [k for k in KERNELS if (k.head_dim, k.group_size) == (128, 4) and k.vec_width < 8]
    library = Library(build(write_dummies(tmp_path, narrow), tmp_path / "libgqa.so"))
    for dtype in DType:
        for width, expected in ((8, 4), (4, 4), (2, 2), (1, 1)):
            case = case_of(
                (dtype, 128, 4, ()), width, model_device(ARCHES["sm_90a"]),
                batch=1, kv_heads=2, tokens=300, ragged=False,
            )  # fmt: skip
            found = case.by_c(library)
            assert found is not None and f"_{dtype}_d128_g4_align{expected}_" in found.kernel


def test_a_kernel_is_chosen_only_where_it_was_compiled_for(tmp_path: Path) -> None:
    kind: Kind = DType.F16, 128, 4, ()
    kernels = [k for k in KERNELS if (k.dtype, k.head_dim, k.group_size) == kind[:3]]
    bundle = write_dummies(tmp_path, kernels, ("sm_86", "sm_90a"))
    library = Library(build(bundle, tmp_path / "libgqa.so"))
    names = "sm_86", "sm_90a"
    assert [library.c.gqa_find_arch(c) for c in (80, 86, 89, 90, 100)] == [-1, 0, 0, 1, -1]
    for arch, schedule in zip(names, ("multistage", "tma"), strict=True):
        config = case_of(
            kind, 8, model_device(ARCHES[arch]), batch=1, kv_heads=2, tokens=300, ragged=False
        ).config()
        assert schedule in library.explain(config, arch, 132).kernel.decode()


def test_architectures_serve_the_same_compute_capabilities_as_in_python(library: Library) -> None:
    def by_python(capability: int) -> str | None:
        try:
            return arch_of(capability).name
        except DeviceError:
            return None

    def by_c(capability: int) -> str | None:
        index = library.c.gqa_find_arch(capability)
        return None if index < 0 else list(ARCHES)[index]

    expected = {capability: by_python(capability) for capability in range(70, 131)}
    assert {capability: by_c(capability) for capability in expected} == expected
    assert set(expected.values()) == {None, *ARCHES}
