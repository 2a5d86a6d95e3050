"""KernelConfig: every rule, the name as identity, and what follows from a configuration."""

from __future__ import annotations

import dataclasses
from contextlib import suppress
from itertools import product
from typing import Any

import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from gqa_cutlass.codegen import ARCHES, DType, KernelConfig, Math, Schedule, default_config
from gqa_cutlass.codegen.config import MAX_GROUP_SIZE
from gqa_cutlass.codegen.schema.policies import E4M3, E4M3_OF_TOKENS, POLICIES, named, special
from gqa_cutlass.codegen.schema.slots import SLOTS
from gqa_cutlass.errors import ConfigError

TENSOROP: dict[str, Any] = {
    "math": Math.TENSOROP,
    "dtype": DType.F16,
    "head_dim": 128,
    "group_size": 4,
    "vec_width": 8,
    "block_h": 8,
    "block_n": 16,
    "num_warps": 4,
    "num_stages": 2,
    "schedule": Schedule.MULTISTAGE,
    "pdl": False,
    "policies": (),
}
SIMT = TENSOROP | {"math": Math.SIMT, "block_h": 4}
TMA = TENSOROP | {"schedule": Schedule.TMA}
PDL = TENSOROP | {"pdl": True}
BASES = {"tensorop": TENSOROP, "simt": SIMT, "tma": TMA, "pdl": PDL}
IN_SLOT = {slot: [p for p in POLICIES if p.slot is slot] for slot in SLOTS}
INTEGERS = [name for name, value in TENSOROP.items() if type(value) is int]

BROKEN_RULES = [
    (TENSOROP, "math", "wgmma", "tensorop, simt"),
    (TENSOROP, "dtype", "f32", "f16, bf16"),
    (TENSOROP, "dtype", None, "f16, bf16"),
    (TENSOROP, "head_dim", 24, "multiples of 8 from 32 to 256"),
    (TENSOROP, "head_dim", 100, "multiples of 8 from 32 to 256"),
    (TENSOROP, "head_dim", 264, "multiples of 8 from 32 to 256"),
    (TENSOROP, "group_size", 0, f"1 to {MAX_GROUP_SIZE}"),
    (TENSOROP, "group_size", MAX_GROUP_SIZE + 1, f"1 to {MAX_GROUP_SIZE}"),
    (TENSOROP, "vec_width", 1, "(2, 4, 8) with tensorop"),
    (TENSOROP, "vec_width", 16, "(2, 4, 8) with tensorop"),
    (SIMT, "vec_width", 3, "(1, 2, 4, 8) with simt"),
    (TENSOROP, "block_h", 4, "8, 16, 24 or 32 with tensorop"),
    (TENSOROP, "block_h", 40, "8, 16, 24 or 32 with tensorop"),
    (SIMT, "block_h", 0, "1 to 8 with simt"),
    (SIMT, "block_h", 9, "1 to 8 with simt"),
    (TENSOROP, "block_n", 8, "16, 32 or 64 with tensorop"),
    (SIMT, "block_n", 64, "16 or 32 with simt"),
    (TENSOROP, "num_warps", 0, "1 to 16"),
    (TENSOROP, "num_warps", 17, "1 to 16"),
    (TENSOROP, "num_stages", 0, "1 to 8"),
    (TENSOROP, "num_stages", 9, "1 to 8"),
    (TENSOROP, "schedule", "wgmma", "multistage, tma"),
    (TENSOROP, "pdl", 1, "a bool"),
    (TMA, "math", Math.SIMT, "tensorop with tma"),
    (TMA, "vec_width", 4, "8 with tma (a tensor copy wants 16 bytes)"),
    (TMA, "num_warps", 2, "4, 8 or 16 with tma"),
    (TMA, "num_warps", 12, "4, 8 or 16 with tma"),
    (TMA, "num_stages", 5, "1 to 4 with tma"),
    (TMA | {"block_h": 24}, "block_n", 16, "in which a warp's partial output has room"),
]


@st.composite
def configs(draw: st.DrawFn) -> KernelConfig:
    """Any valid configuration, shipped or not."""
    schedule = draw(st.sampled_from(Schedule))
    tma = schedule is Schedule.TMA
    math = Math.TENSOROP if tma else draw(st.sampled_from(Math))
    tensorop = math is Math.TENSOROP
    widths = (8,) if tma else (2, 4, 8) if tensorop else (1, 2, 4, 8)
    least = {"block_n": 16, "num_warps": 4 if tma else 1, "num_stages": 1}
    fields = dict(
        math=math,
        dtype=draw(st.sampled_from(DType)),
        head_dim=8 * draw(st.integers(4, 32)),
        head_dim_v=draw(st.none() | st.integers(4, 32).map(lambda n: 8 * n)),
        group_size=draw(st.integers(1, MAX_GROUP_SIZE)),
        vec_width=draw(st.sampled_from(widths)),
        block_h=draw(st.sampled_from((8, 16, 24, 32)) if tensorop else st.integers(1, 8)),
        block_n=draw(st.sampled_from((16, 32, 64) if tensorop else (16, 32))),
        num_warps=draw(st.sampled_from((4, 8, 16)) if tma else st.integers(1, 16)),
        num_stages=draw(st.integers(1, 4 if tma else 8)),
        schedule=schedule,
        pdl=draw(st.booleans()),
        policies=tuple(draw(st.sampled_from(IN_SLOT[slot])) for slot in SLOTS),
    )
    for smaller in ({}, least):  # too much shared memory, or no room for a warp's partial output
        with suppress(ConfigError):
            return KernelConfig(**fields | smaller)
    reject()


@pytest.mark.parametrize("base", BASES.values(), ids=BASES)
def test_valid_configuration_is_accepted(base: dict[str, Any]) -> None:
    config = KernelConfig(**base)
    assert dataclasses.asdict(config) == base | {"head_dim_v": None}


@pytest.mark.parametrize(
    ("base", "field", "value", "allowed"),
    BROKEN_RULES,
    ids=[f"{b['math']}-{b['schedule']}-{field}-{value}" for b, field, value, _ in BROKEN_RULES],
)
def test_broken_rule_is_named_with_what_was_given_and_what_is_allowed(
    base: dict[str, Any], field: str, value: object, allowed: str
) -> None:
    with pytest.raises(ConfigError) as raised:
        KernelConfig(**base | {field: value})
    message = str(raised.value)
    assert message.startswith(f"KernelConfig: {field}: got {value!r}; allowed: ")
    assert allowed in message


@pytest.mark.parametrize("field", INTEGERS)
@pytest.mark.parametrize("kind", [float, bool, str])
def test_numbers_must_be_of_type_int(field: str, kind: type) -> None:
    value = kind(TENSOROP[field])
    with pytest.raises(ConfigError, match=rf"{field}: got .*; allowed: an int"):
        KernelConfig(**TENSOROP | {field: value})


def test_shared_memory_limit_is_that_of_the_smallest_architecture() -> None:
    smallest = min(arch.shared_per_block for arch in ARCHES.values())
    assert KernelConfig(**TENSOROP).shared_bytes <= smallest
    with pytest.raises(ConfigError, match=rf"shared memory: got \d+; .*{smallest} bytes.*fewer"):
        KernelConfig(**TENSOROP | {"num_stages": 8})


def test_shared_memory_limit_of_tensor_copies_is_that_of_hopper() -> None:
    limit = ARCHES["sm_90a"].shared_per_block
    assert KernelConfig(**TMA | {"num_warps": 8, "num_stages": 3}).shared_bytes <= limit
    with pytest.raises(ConfigError, match=rf"shared memory: got \d+; .*{limit} bytes.* sm_90a;"):
        KernelConfig(**TMA | {"num_warps": 8, "num_stages": 4})


@pytest.mark.parametrize("base", [TENSOROP, TMA], ids=["multistage", "tma"])
def test_a_lane_has_the_scales_of_one_token(base: dict[str, Any]) -> None:
    wide = base | {"block_n": 64, "num_warps": 4, "num_stages": 1}
    assert KernelConfig(**wide | {"policies": (E4M3,)}).block_n == 64
    with pytest.raises(ConfigError, match="block_n: got 64; allowed: at most 32 with scales of to"):
        KernelConfig(**wide | {"policies": (E4M3_OF_TOKENS,)})


def test_choices_may_be_given_as_text() -> None:
    config = KernelConfig(**TMA | {"math": "tensorop", "dtype": "f16", "schedule": "tma"})
    assert config == KernelConfig(**TMA)
    assert config.math is Math.TENSOROP and config.dtype is DType.F16
    assert config.schedule is Schedule.TMA


def test_tensor_copies_are_for_hopper_alone() -> None:
    multistage, tma = KernelConfig(**TENSOROP), KernelConfig(**TMA)
    assert (multistage.tma, multistage.archs, multistage.ptx_arch) == (
        False, tuple(ARCHES), "compute_80",
    )  # fmt: skip
    assert (tma.tma, tma.archs, tma.ptx_arch) == (True, ("sm_90a",), "compute_90")


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_launches_with_fewer_stages_take_a_ring_that_is_shorter(stages: int) -> None:
    config = KernelConfig(**TMA | {"num_stages": 3})
    slot = config.block_n * 128 * 2
    one, many = config.shared_bytes_with(1), config.shared_bytes_with(stages)
    assert many - one == (stages - 1) * config.num_warps * 2 * slot
    assert config.shared_bytes == config.shared_bytes_with(3)


@pytest.mark.parametrize(("head_dim", "boxes"), [(32, 1), (64, 1), (72, 2), (128, 2), (136, 3)])
def test_tiles_of_tensor_copies_are_whole_boxes_of_64_dims(head_dim: int, boxes: int) -> None:
    config = KernelConfig(**TMA | {"head_dim": head_dim})
    ring = config.shared_bytes_with(2) - config.shared_bytes_with(1)
    assert ring == config.num_warps * 2 * boxes * 64 * config.block_n * 2


def test_configuration_is_immutable() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        KernelConfig(**TENSOROP).head_dim = 64  # type: ignore[misc]


def test_name_spells_the_configuration_most_significant_first() -> None:
    expected = "gqa_decode_sm80_tensorop_f16_f16_d128_g4_align8_multistage_h8n16w4s2"
    assert KernelConfig(**TENSOROP).name == expected
    expected = "gqa_decode_sm90_tensorop_f16_f16_d128_g4_align8_tma_h8n16w4s2"
    assert KernelConfig(**TMA).name == expected
    expected = "gqa_decode_sm90_tensorop_f16_f16_d128_g4_align8_multistage_h8n16w4s2_pdl"
    assert KernelConfig(**PDL).name == expected


def test_dependent_kernels_are_for_hopper_and_newer() -> None:
    config = KernelConfig(**PDL)
    assert config.archs == ("sm_90a", "sm_100f", "sm_110f", "sm_120f")
    assert config.ptx_arch == "compute_90"


@settings(deadline=None)
@given(configs())
def test_name_round_trips(config: KernelConfig) -> None:
    assert KernelConfig.from_name(config.name) == config


@settings(deadline=None)
@given(configs(), configs())
def test_configurations_are_equal_exactly_when_their_names_are(
    a: KernelConfig, b: KernelConfig
) -> None:
    assert (a == b) == (a.name == b.name)
    assert a != b or hash(a) == hash(b)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "gqa_decode",
        "gqa_decode_sm80_tensorop_f16_bf16_d128_g4_align8_multistage_h8n16w4s2",
        "gqa_decode_sm80_tensorop_f16_f16_d0128_g4_align8_multistage_h8n16w4s2",
        "gqa_decode_sm80_tensorop_f16_f16_d128_g4_align8_multistage_h8n16w4s2.cu",
        f"gqa_decode_sm80_tensorop_f16_f16_d1{'0' * 5000}_g4_align8_multistage_h8n16w4s2",
    ],
    ids=["nothing", "a part", "two types", "a leading zero", "a file", "thousands of digits"],
)
def test_what_is_not_a_name_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="kernel name: got .*; allowed: names as `gqa-cutlass"):
        KernelConfig.from_name(name)


@pytest.mark.parametrize(
    ("base", "wrong"),
    [(TENSOROP, "sm90"), (TMA, "sm80"), (PDL, "sm80")],
    ids=["multistage", "tma", "pdl"],
)
def test_name_that_gives_a_schedule_another_architecture_is_corrected(
    base: dict[str, Any], wrong: str
) -> None:
    right = KernelConfig(**base).name
    name = "_".join(wrong if word.startswith("sm") else word for word in right.split("_"))
    with pytest.raises(ConfigError, match=f"kernel name: got '{name}'; allowed: '{right}'"):
        KernelConfig.from_name(name)


def test_name_of_an_invalid_configuration_names_the_rule() -> None:
    name = KernelConfig(**TENSOROP).name.replace("_d128_", "_d100_")
    with pytest.raises(ConfigError, match="head_dim: got 100"):
        KernelConfig.from_name(name)


@pytest.mark.parametrize("head_dim", range(32, 257, 8))
def test_every_head_dim_group_and_alignment_has_a_kernel(head_dim: int) -> None:
    widths = [(Math.TENSOROP, width) for width in (8, 4, 2)]
    widths += [(Math.SIMT, width) for width in (8, 4, 2, 1)]
    for (math, width), group_size, dtype in product(widths, (*range(1, 17), 32, 64), DType):
        config = default_config(math, dtype, head_dim, group_size, width)
        assert (config.math, config.dtype, config.head_dim) == (math, dtype, head_dim)
        assert (config.group_size, config.vec_width) == (group_size, width)
        assert (config.head_blocks - 1) * config.block_h < group_size
        assert config.head_blocks * config.block_h >= group_size


@pytest.mark.parametrize("head_dim", range(32, 257, 8))
def test_every_head_dim_and_group_has_a_kernel_with_tensor_copies(head_dim: int) -> None:
    for group_size, dtype in product((*range(1, 17), 32, 64), DType):
        config = default_config(Math.TENSOROP, dtype, head_dim, group_size, 8, Schedule.TMA)
        assert (config.schedule, config.dtype, config.head_dim) == (Schedule.TMA, dtype, head_dim)
        assert (config.head_blocks - 1) * config.block_h < group_size
        assert config.head_blocks * config.block_h >= group_size


@pytest.mark.parametrize("schedule", Schedule)
@pytest.mark.parametrize("element", [None, E4M3, E4M3_OF_TOKENS], ids=str)
@pytest.mark.parametrize("paged", [False, True], ids=["rows", "pages"])
def test_values_of_every_head_dim_have_a_kernel_whatever_the_keys(
    element: Any, paged: bool, schedule: Schedule
) -> None:
    """But with tensor copies of pages: their tiles of values so wide lack room for outputs."""
    elements = [] if element is None else [element]
    paging = [named("PagedCache")] if paged else []
    for count in (1, 8):
        several = [named("SeveralQueries")] if count > 1 else []
        policies = special((*elements, *paging, *several))
        dims = range(32, 257, 16)
        for head_dim, head_dim_v, group_size in product(dims, dims, (1, 8, 16)):
            narrow = head_dim <= 128 and head_dim_v > 192
            if paged and elements and schedule is Schedule.TMA and narrow:
                with pytest.raises(ConfigError, match="warp's partial output has room"):
                    _with_values(schedule, head_dim, head_dim_v, group_size, policies, count)
                continue
            config = _with_values(schedule, head_dim, head_dim_v, group_size, policies, count)
            assert config.value_dim == head_dim_v
            assert config.row_blocks(count) * config.block_h >= group_size * count


def _with_values(
    schedule: Schedule, head_dim: int, head_dim_v: int, group_size: int, policies: Any, count: int
) -> KernelConfig:
    return default_config(
        Math.TENSOROP, DType.F16, head_dim, group_size, 8, schedule, policies, head_dim_v, count
    )


@settings(deadline=None)
@given(configs(), st.sampled_from(list(ARCHES.values())))
def test_blocks_that_are_promised_fit_on_a_multiprocessor(config: KernelConfig, arch: Any) -> None:
    blocks = config.blocks_per_sm(arch)
    assert blocks >= 1
    assert blocks * config.num_threads <= max(arch.max_threads_per_sm, config.num_threads)
    assert blocks == 1 or blocks * (config.shared_bytes + 1024) <= arch.shared_per_sm
    assert config.min_blocks * config.num_threads <= 2048


@pytest.mark.parametrize(("name", "capability"), [("sm_80", 80), ("sm_90a", 90), ("sm_120f", 120)])
def test_architecture_states_its_capability(name: str, capability: int) -> None:
    assert ARCHES[name].capability == capability
