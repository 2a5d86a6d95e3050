"""The C library dispatches like Python: every kernel that ships and that dispatch may choose, on
every architecture, for thousands of problems."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
from c_dispatch import (
    DEPENDENTS,
    H200,
    KERNELS,
    WINDOW,
    Case,
    Chosen,
    Kind,
    case_of,
    edge_cases,
    library_of,
    random_cases,
    widths_of_kinds,
    workspace_bytes,
)
from c_library import NUM_MERGE_COUNTERS, Library
from helpers import remodelled

from gqa_cutlass.codegen import ARCHES, DType
from gqa_cutlass.codegen.schema.internal import feature_bits
from gqa_cutlass.codegen.schema.launch import Pdl
from gqa_cutlass.codegen.schema.policies import FEATURES
from gqa_cutlass.dispatch import arch_of, model_device
from gqa_cutlass.errors import DeviceError

RANDOM_PROBLEMS = 24000


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Library:
    """Every kernel that ships and is dispatched, for every architecture."""
    folder = tmp_path_factory.mktemp("dispatch")
    return library_of(folder, "-O2")


@pytest.fixture(scope="module")
def random_problems() -> list[tuple[Case, Chosen]]:
    """Problems, and what Python chooses for them."""
    return [(c, c.by_python()) for c in random_cases(RANDOM_PROBLEMS, seed=7)]


def test_every_shipped_kernel_that_is_dispatched_is_in_the_library(library: Library) -> None:
    assert library.kernels == [kernel.name for kernel in KERNELS + DEPENDENTS]
    assert library.archs == list(ARCHES)
    for index in (-1, len(KERNELS + DEPENDENTS), 2**31 - 1, -(2**31)):
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
        library = library_of(tmp_path)
        found = [(c, c.by_c(library), c.by_python()) for c in random_cases(2000, seed=1)]
    assert [case for case in found if case[1] != case[2]] == []


def test_problems_reach_every_kernel_and_every_way_to_share_a_sequence(
    random_problems: list[tuple[Case, Chosen]],
) -> None:
    found = [chosen for _, chosen in random_problems]
    assert {c.kernel for c in found} == {kernel.name for kernel in KERNELS + DEPENDENTS}
    assert {c.pdl for c in found} == {*Pdl}
    assert {c.cluster for c in found} == {1, 2, 4, 8}
    assert {c.num_stages for c in found} == {1, 2}
    assert {c.prefetch_first_tile for c in found if c.cluster == 1} == {False, True}
    assert {c.grid[1] - c.num_splits for c in found} == {0, 1}
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
        kind = Kind(p.dtype, p.head_dim, p.group_size, p.policies, p.head_dim_v)
        needed = {
            (width, ragged): workspace_bytes(
                replace(
                    case, problem=replace(p, vec_width=width), device=H200, ragged=ragged
                ).by_python()
            )
            for width in widths_of_kinds()[kind]
            for ragged in (False, True)
        }
        assert library.workspace_size(case.config()) == max(needed.values())
        most = max(bytes for (_, ragged), bytes in needed.items() if not ragged)
        ragged_alone += max(needed.values()) > most
    assert ragged_alone > 100


def test_c_drops_a_window_that_hides_nothing_as_python_does(library: Library) -> None:
    for kind, held in product(
        [kind for kind in widths_of_kinds() if WINDOW in kind.policies], (299, 300, 2**30)
    ):
        case = case_of(kind, 8, H200, batch=1, kv_heads=8, tokens=300, ragged=False)
        config = case.config()
        config.window = held
        without = tuple(policy for policy in kind.policies if policy is not WINDOW)
        expected = replace(case.problem, policies=kind.policies, window=held)
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
    for kind, widths in widths_of_kinds().items():
        for width in {8, 4, 2, 1} - set(widths):
            case = case_of(kind, width, device, batch=1, kv_heads=2, tokens=300, ragged=False)
            found = case.by_c(library)
            if width > min(widths):
                assert found is not None  # a narrower kernel than need be
            else:
                assert found is None


def test_a_library_without_wide_kernels_serves_aligned_rows_by_narrow_ones(tmp_path: Path) -> None:
    narrow = [k for k in KERNELS if (k.head_dim, k.group_size) == (128, 4) and k.vec_width < 8]
    library = library_of(tmp_path, kernels=narrow)
    for dtype in DType:
        for width, expected in ((8, 4), (4, 4), (2, 2), (1, 1)):
            case = case_of(
                Kind(dtype, 128, 4), width, model_device(ARCHES["sm_90a"]),
                batch=1, kv_heads=2, tokens=300, ragged=False,
            )  # fmt: skip
            found = case.by_c(library)
            assert found is not None and f"_{dtype}_d128_g4_align{expected}_" in found.kernel


def test_a_kernel_is_chosen_only_where_it_was_compiled_for(tmp_path: Path) -> None:
    kind = Kind(DType.F16, 128, 4)
    kernels = [k for k in KERNELS if (k.dtype, k.head_dim, k.group_size) == kind[:3]]
    library = library_of(tmp_path, kernels=kernels, archs=("sm_86", "sm_90a"))
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
