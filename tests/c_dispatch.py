"""Problems that the C library and Python dispatch, to compare what they choose."""

from __future__ import annotations

import ctypes
import math
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import permutations, product
from pathlib import Path
from typing import NamedTuple

import torch
from c_build import as_dependents, build, dispatched, write_dummies
from c_library import CACHE_TYPES, NUM_MERGE_COUNTERS, Config, Library

from gqa_cutlass.call.given import PAGES, Seen
from gqa_cutlass.call.layout import problem_of
from gqa_cutlass.call.stored import FP8, SCALES
from gqa_cutlass.codegen import (
    ARCHES,
    DType,
    KernelConfig,
    Math,
    Schedule,
    default_config,
    shipped,
)
from gqa_cutlass.codegen.schema import internal, public
from gqa_cutlass.codegen.schema.policies import OF_TOKENS, Policy, named, tagged
from gqa_cutlass.codegen.schema.problem import Problem
from gqa_cutlass.codegen.schema.public import DTYPE_CODES
from gqa_cutlass.dispatch import MODELS, MOST_TILES, Device, dispatch, model_device

# Problems of several tokens are drawn elsewhere, and so are those of norms and rotations.
_ELSEWHERE = {"SeveralQueries", "RmsNormed", "RotatedByTables"}
# None with scales of tokens ships.
_OF_TOKENS = [
    default_config(
        Math.TENSOROP, dtype, head_dim, group_size, width, schedule, policies=tagged(tags)
    )
    for dtype, head_dim, group_size, widths, tags in (
        (DType.F16, 128, 4, (8, 4, 2), "e4m3t"), (DType.BF16, 64, 8, (8,), "e5m2t"),
        (DType.F16, 256, 2, (8,), "paged_e4m3t"), (DType.BF16, 64, 8, (8,), "win_e5m2t"),
    )
    for width in widths
    for schedule in Schedule
    if width == 8 or schedule is not Schedule.TMA
]  # fmt: skip
KERNELS = dispatched(
    (*(k for k in shipped() if not any(policy.cpp in _ELSEWHERE for policy in k.policies)),
     *_OF_TOKENS)
)  # fmt: skip
DEPENDENTS = as_dependents(KERNELS)
TENSORS = "out", "q", "k", "v", "k_cache", "v_cache"  # in C's order
CAP, SINK, WINDOW = named("SoftCapped"), named("SinkInSum"), named("SlidingWindow")
IN_FLOAT32, PAGED, TREE = named("InFloat32"), named("PagedCache"), named("TreeOfQueries")
_CPU, _LAID_OUT = torch.device("cpu"), ctypes.create_string_buffer(4096)  # gqa_tensors
MODEL, H200 = MODELS["sm_90a"], model_device(ARCHES["sm_90a"])


class Kind(NamedTuple):
    """What kernels of all widths and schedules have in common; values of None are as keys."""

    dtype: DType
    head_dim: int
    group_size: int
    policies: tuple[Policy, ...] = ()
    head_dim_v: int | None = None


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
    pdl: int
    num_merge_counters: int
    partial_floats: int


def workspace_bytes(chosen: Chosen) -> int:
    """What the C library wants for a launch."""
    return 4 * (NUM_MERGE_COUNTERS + chosen.partial_floats) if chosen.num_merge_counters else 0


@dataclass(frozen=True)
class Case:
    """A problem on a GPU.

    Args:
        problem: It.
        device: The GPU.
        ragged: Whether lengths are on the device.
        equal: Whether they are about equal.
        dependent: Whether a dependent launch is asked for.
        layout: Of the tensors; without, packed ones as aligned as the problem says.
    """

    problem: Problem
    device: Device
    ragged: bool
    equal: bool = False
    dependent: bool = False
    layout: dict[str, Seen] = field(default_factory=dict)

    def by_python(self) -> Chosen:
        """As the Python package dispatches it."""
        ragged = self.ragged and not self.equal
        found = dispatch(self.problem, self.device, 0, None, ragged, self.dependent)
        assert found.shape.pdl == found.config.pdl == bool(found.pdl)
        return Chosen(
            found.config.name, found.shape.grid, found.shape.cluster, found.shape.block,
            found.shape.shared_bytes, found.num_splits, found.num_stages, found.prefetch_first_tile,
            found.pdl, found.num_merge_counters, found.partial_floats,
        )  # fmt: skip

    def by_c(self, library: Library) -> Chosen | None:
        """As the C library does; None where it has no kernel."""
        config, width = self.config(), self.problem.vec_width
        if self.layout:
            addresses = (ctypes.c_void_p * 6)(*(self.layout[name].address for name in TENSORS))
            library.c.gqa_lay_out(ctypes.byref(config), addresses, _LAID_OUT)
            width = library.c.gqa_vector_width(_LAID_OUT)
        problem = library.c.gqa_describe(ctypes.byref(config), width, self.ragged)
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
            sinks=1 << 40 if SINK in p.policies else None, equal_lengths=self.equal,
            head_dim_v=p.head_dim_v or 0, output_float32=IN_FLOAT32 in p.policies,
            dependent=self.dependent, lse=1 << 41, num_tokens=p.num_tokens,
            num_new_tokens=p.num_new_tokens, cache_type=CACHE_TYPES.get(cache_dtype(p), 0),
            tree_mask=1 << 45 if TREE in p.policies else None, **self.strides(), **self.pages(),
            **self.scales(),
        )  # fmt: skip

    def pages(self) -> dict[str, int]:
        """What there is to say of pages."""
        p = self.problem
        if p.page_size is None:
            return {}
        return dict(
            block_table=1 << 42, page_size=p.page_size, max_pages=p.max_seq_len // p.page_size,
            num_pages=pool_pages(p),
        )  # fmt: skip

    def scales(self) -> dict[str, int]:
        """What there is to say of scales, if they are of tokens."""
        if not has_scales_of_tokens(self.problem):
            return {}
        strides = {
            f"{name}_batch_stride": self.layout[name].strides[0]
            for name in SCALES
            if name in self.layout
        }
        return dict(scales_of_tokens=1, k_scales=1 << 43, v_scales=1 << 44) | strides

    def strides(self) -> dict[str, int]:
        """Those of the layout."""
        tensors = zip(public.STRIDED.items(), self.layout.values(), strict=False)
        return {
            f"{name}_{dim}_stride": stride
            for (name, dims), t in tensors
            for dim, stride in zip(dims, t.strides, strict=False)
        }


def cache_dtype(problem: Problem) -> torch.dtype:
    """What caches hold."""
    for (dtype, policy), of_tokens in zip(FP8.items(), OF_TOKENS, strict=True):
        if {policy, of_tokens} & {*problem.policies}:
            return dtype
    return torch.float16 if problem.dtype is DType.F16 else torch.bfloat16


def has_scales_of_tokens(problem: Problem) -> bool:
    """Whether tokens have scales."""
    return bool({*OF_TOKENS} & {*problem.policies})


def pool_pages(problem: Problem) -> int:
    """As many pages as sequences, so that a pool may have a single one."""
    return problem.batch_size


def kind_of(kernel: KernelConfig) -> Kind:
    """What kernels of other widths and schedules have in common with it."""
    k = kernel
    return Kind(k.dtype, k.head_dim, k.group_size, k.policies, k.head_dim_v)


@cache
def widths_of_kinds() -> dict[Kind, list[int]]:
    """Vector widths for which Python chooses a kernel that ships, by what else identifies it."""
    found: dict[Kind, list[int]] = {}
    for kernel in KERNELS:
        if kernel.schedule is Schedule.MULTISTAGE:
            key = kind_of(kernel)
            found.setdefault(key, []).append(kernel.vec_width)
    return found


def case_of(
    kind: Kind, width: int, device: Device, *, batch: int, kv_heads: int, tokens: int,
    ragged: bool, window: int = 100, equal: bool = False, dependent: bool = False,
    page_size: int = 16, num_tokens: int = 1, num_new_tokens: int = 1,
) -> Case:  # fmt: skip
    """A problem of a kind; the window counts where there is one, and hides a token or more. So does
    the size of pages, of which there are as many as the tokens take."""
    paged = PAGED in kind.policies
    tokens = -(-tokens // page_size) * page_size if paged else tokens
    problem = Problem(
        batch_size=batch, num_q_heads=kv_heads * kind.group_size, num_kv_heads=kv_heads,
        head_dim=kind.head_dim, head_dim_v=kind.head_dim_v, max_seq_len=tokens, dtype=kind.dtype,
        vec_width=width, append=True, policies=kind.policies,
        window=min(window, tokens - 1) if WINDOW in kind.policies else None,
        page_size=page_size if paged else None, num_tokens=num_tokens,
        num_new_tokens=num_new_tokens,
    )  # fmt: skip
    return Case(problem, device, ragged, equal, dependent)


def random_cases(count: int, seed: int) -> Iterator[Case]:
    """Problems of every kind; sizes are spread evenly over their orders of magnitude."""
    chance = random.Random(seed)
    archs = [*ARCHES.values(), *[ARCHES["sm_90a"]] * 4 * len(ARCHES)]  # which has a schedule more

    def size(most: int) -> int:
        return round(math.exp(chance.uniform(0, math.log(most))))

    kinds = list(widths_of_kinds().items())
    for _ in range(count):
        kind, widths = chance.choice(kinds)
        device = Device(index=-1, arch=chance.choice(archs), num_sms=chance.randint(46, 160))
        width = chance.choice((widths[0], *widths))
        case = case_of(
            kind, width, device, batch=size(300), kv_heads=size(64), tokens=1 + size(2**20),
            ragged=chance.random() < 0.5, window=size(2**17), equal=chance.random() < 0.3,
            dependent=chance.random() < 0.6, page_size=chance.choice((size(300), 16, 64)),
        )  # fmt: skip
        yield in_layout(case, chance.getrandbits(64)) if chance.random() < 0.5 else case


ORDERS = {rank: list(permutations(range(rank))) for rank in (2, 3)}
GAPS = 0, 0, 0, 0, 0, 0, 1, 8


def in_layout(case: Case, chance: int) -> Case:
    """The same with its tensors in any order of dimensions and with gaps between rows, as aligned
    as the problem says and often no more; strides of what there is one of are odd."""
    p, width = case.problem, case.problem.vec_width
    query, token = (p.batch_size, p.num_q_heads), (p.batch_size, p.num_kv_heads)
    cache = p.batch_size, p.max_seq_len, p.num_kv_heads
    if p.page_size:
        cache = pool_pages(p), p.page_size, p.num_kv_heads
    result = torch.float32 if IN_FLOAT32 in p.policies else None
    dtype = torch.float16 if p.dtype is DType.F16 else torch.bfloat16
    layout: dict[str, Seen] = {}
    for name, sizes in zip(TENSORS, (query, query, token, token, cache, cache), strict=True):
        dim_of = p.value_dim if name in ("out", "v", "v_cache") else p.head_dim
        orders, strides, step = ORDERS[len(sizes)], [0] * len(sizes), dim_of
        kind = result or dtype if name == "out" else dtype
        if name.endswith("_cache"):
            kind = cache_dtype(p)
        unit = width if kind.itemsize > 1 else 2 * width
        for dim in orders[chance % len(orders)]:
            step += unit * GAPS[chance & 7]
            strides[dim] = step if sizes[dim] > 1 else 2 * step + 1
            step *= sizes[dim]
            chance >>= 3
        address = (len(layout) + 1 << 56) + 2 * width * (1 if chance & 3 == 0 else 8)
        size, shape = kind.itemsize, (*sizes, dim_of)
        address = address // size * size
        layout[name] = Seen(shape, (*strides, 1), kind, _CPU, False, size, address, size * step)
    if p.page_size:
        table = p.batch_size, p.max_seq_len // p.page_size
        reach = 4 * math.prod(table)
        layout[PAGES] = Seen(table, (table[1], 1), torch.int32, _CPU, False, 4, 1 << 42, reach)
    for name in SCALES if has_scales_of_tokens(p) else ():
        row = cache[1] * cache[2] * (1 + GAPS[chance & 7])
        chance >>= 3
        strides = [row if cache[0] > 1 else 1, cache[2], 1]
        reach = 4 * cache[0] * row
        layout[name] = Seen(cache, tuple(strides), torch.float32, _CPU, False, 4, 1 << 43, reach)
    problem = problem_of(layout, p.policies, (p.window or 0) - 1, result)
    return replace(case, problem=problem, layout=layout)


def edge_cases() -> Iterator[Case]:
    """Both sides of every limit of the model."""
    hopper, ampere = H200, model_device(ARCHES["sm_80"])
    usual, partial_boxes = Kind(DType.F16, 128, 4), Kind(DType.BF16, 96, 1)
    windowed = Kind(DType.F16, 128, 4, (WINDOW,))
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
        most = limit * 2**20 // (4 * kind.head_dim * heads)  # tokens
        for length in (most, most + 1):
            yield case_of(kind, 8, hopper, batch=1, kv_heads=heads, tokens=length, ragged=False)
    for heads, batch, ragged in product(
        (
            1,
            MODEL.tma_few_heads,
            MODEL.tma_few_heads + 1,
            MODEL.tma_blocks // 3,  # that get three of those blocks, and just not four
            MODEL.tma_blocks // 4,
            MODEL.tma_large_heads,
            MODEL.tma_large_heads + 1,
        ),
        (1, 2),
        (False, True),
    ):
        length = MODEL.tma_mib * 2**20 // (4 * 128 * heads) + 1
        yield case_of(usual, 8, hopper, batch=batch, kv_heads=heads, tokens=length, ragged=ragged)
    for tokens_each, heads in product((512, 1024, 1025, 2048, 16384), (1, 8, 16)):
        wide = Kind(DType.F16, 256, 2)
        yield case_of(wide, 8, hopper, batch=1, kv_heads=heads, tokens=tokens_each, ragged=False)
    for heads, beyond, ragged in product((31, 32, 63, 64), (0, 1), (False, True)):
        length = int(MODEL.tma_pairs_mib * 2**20 // (4 * 128 * heads)) + beyond
        yield case_of(usual, 8, hopper, batch=1, kv_heads=heads, tokens=length, ragged=ragged)
        yield case_of(usual, 8, hopper, batch=heads, kv_heads=1, tokens=length, ragged=ragged)
    for batch, beyond, ragged in product((1, 4), (0, 1), (False, True)):
        most = MODEL.prefetch_mib * 2**20 // (4 * 128 * 4 * batch)
        yield case_of(
            usual, 8, ampere, batch=batch, kv_heads=4, tokens=most + beyond, ragged=ragged
        )
    # Dependent launches: by size, where there are any, and by how many blocks there are.
    for limit, beyond, device in product(
        (MODEL.pdl_whole_mib, MODEL.pdl_end_mib), (0, 1), (hopper, ampere)
    ):
        most = int(limit * 2**20 // (4 * 128 * 8))
        yield case_of(
            usual, 8, device, batch=1, kv_heads=8, tokens=most + beyond, ragged=False,
            dependent=True,
        )  # fmt: skip
    for kind, heads, ragged in product((usual, windowed), (65, 66, 67, 132, 133), (False, True)):
        yield case_of(
            kind, 8, hopper, batch=1, kv_heads=heads, tokens=100, ragged=ragged, dependent=True
        )
    paged = Kind(DType.F16, 128, 4, (PAGED,))
    for page_size, ragged in product((1, 8, 15, 16, 17, 24, 32), (False, True)):
        yield case_of(
            paged, 8, hopper, batch=1, kv_heads=2, tokens=700, ragged=ragged, page_size=page_size
        )
    for equal, batch in product((False, True), (2, 64)):
        yield case_of(
            usual, 8, hopper, batch=batch, kv_heads=8, tokens=2**14, ragged=True, equal=equal
        )


def library_of(
    folder: Path,
    *flags: str,
    kernels: Iterable[KernelConfig] = (*KERNELS, *DEPENDENTS),
    archs: Sequence[str] = tuple(ARCHES),
) -> Library:
    """A library that can be asked what it chooses."""
    built = Library(build(write_dummies(folder, kernels, archs), folder / "libgqa.so", *flags))
    built.c.gqa_describe.restype = CProblem
    return built
