"""The C library dispatches several tokens of a sequence like Python: to blocks of as many rows."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator

import pytest
from c_build import as_dependents
from c_dispatch import PAGED, WINDOW, Case, Kind, case_of, library_of
from c_library import Library

from gqa_cutlass.codegen import ARCHES, DType, KernelConfig, Math, Schedule, default_config
from gqa_cutlass.codegen.schema.policies import OF_TOKENS, named, special, tagged
from gqa_cutlass.codegen.schema.problem import MAX_TOKENS
from gqa_cutlass.dispatch import Device
from gqa_cutlass.kernels.export import plan_export

MULTI = named("SeveralQueries")
KINDS = [
    Kind(DType.F16, 128, 4, (MULTI,)),
    Kind(DType.BF16, 64, 7, (WINDOW, MULTI)),
    Kind(DType.F16, 256, 2, (PAGED, MULTI)),
    Kind(DType.BF16, 96, 1, (MULTI,)),
    Kind(DType.BF16, 128, 4, special((MULTI, named("E4m3Operands")))),
    Kind(DType.F16, 128, 4, tagged("multi_e4m3t")),
    Kind(DType.BF16, 256, 2, tagged("paged_multi_e5m2t")),
    Kind(DType.BF16, 64, 8, tagged("tree_e4m3t")),
]
WIDTHS = 8, 2, 1
PROBLEMS = 4000


def widths_of(kind: Kind, schedule: Schedule) -> tuple[int, ...]:
    """Those that kernels of a schedule have; none with scales of tokens is narrow."""
    of_tokens = bool({*OF_TOKENS} & {*kind.policies})
    if schedule is Schedule.TMA:
        return WIDTHS[:1]
    return WIDTHS[: len(WIDTHS) - of_tokens]


def kernels_of(kind: Kind) -> list[KernelConfig]:
    """All that Python takes for a kind, whatever the number of tokens."""
    found = [
        default_config(
            Math.TENSOROP if width > 1 else Math.SIMT, kind.dtype, kind.head_dim, kind.group_size,
            width, schedule, kind.policies, None, tokens,
        )
        for schedule in Schedule
        for width in widths_of(kind, schedule)
        for tokens in range(1, MAX_TOKENS + 1)
    ]  # fmt: skip
    return list(dict.fromkeys(found))


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Library:
    """All kernels of a few kinds, for every architecture."""
    kernels = [kernel for kind in KINDS for kernel in kernels_of(kind)]
    folder = tmp_path_factory.mktemp("dispatch_tokens")
    return library_of(folder, kernels=(*kernels, *as_dependents(kernels)))


def random_cases(count: int) -> Iterator[Case]:
    """Problems of these kinds; half are of up to 16 tokens, as speculation has them."""
    chance = random.Random(20261130)
    archs = [*ARCHES.values(), *[ARCHES["sm_90a"]] * len(ARCHES)]  # which has a schedule more

    def size(most: int) -> int:
        return round(math.exp(chance.uniform(0, math.log(most))))

    for _ in range(count):
        tokens = chance.randint(1, 16) if chance.random() < 0.5 else size(MAX_TOKENS)
        kind = chance.choice(KINDS)
        yield case_of(
            kind, chance.choice(widths_of(kind, Schedule.MULTISTAGE)),
            Device(index=-1, arch=chance.choice(archs), num_sms=chance.randint(46, 160)),
            batch=size(100), kv_heads=size(16), tokens=MAX_TOKENS + size(2**18),
            ragged=chance.random() < 0.5, window=size(2**12), dependent=chance.random() < 0.5,
            page_size=chance.choice((16, 24)), num_tokens=tokens,
            num_new_tokens=chance.randint(2, MAX_TOKENS),
        )  # fmt: skip


def test_c_dispatches_several_tokens_like_python(library: Library) -> None:
    found = [(case, case.by_c(library), case.by_python()) for case in random_cases(PROBLEMS)]
    assert [case for case in found if case[1] != case[2]] == []
    rows = {KernelConfig.from_name(chosen.kernel).block_h for _, _, chosen in found}
    assert rows >= {2, 8, 16, 24, 32}
    assert {chosen.cluster for _, _, chosen in found} == {1, 2, 4, 8}
    assert max(chosen.grid[0] // case.problem.num_kv_heads for case, _, chosen in found) > 16


def test_kernels_of_any_number_of_tokens_can_be_exported() -> None:
    kernels = kernels_of(KINDS[0])
    names = ",".join(kernel.name for kernel in kernels)
    assert set(plan_export(names, list(ARCHES)).kernels) == set(kernels)
