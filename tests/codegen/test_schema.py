"""The schema: consistent in itself, a leaf, and in step with the headers emitted from it."""

from __future__ import annotations

import ast
import ctypes
import shutil
import sys
from pathlib import Path

import pytest
from helpers import REPOSITORY

from gqa_cutlass.codegen import DType, Math, default_config, render
from gqa_cutlass.codegen import headers as our
from gqa_cutlass.codegen.headers import Headers
from gqa_cutlass.codegen.manifest import emit, emitted_drift
from gqa_cutlass.codegen.schema import arguments, params, public, storage
from gqa_cutlass.codegen.schema.arguments import ARGUMENTS, BUFFERS, Argument, Table
from gqa_cutlass.codegen.schema.emit import (
    check_emitted,
    cpp_header,
    emitted_files,
    emitted_parts,
)
from gqa_cutlass.codegen.schema.launch import ENUMS, Documented
from gqa_cutlass.codegen.schema.params import CACHE_STRIDES, PARAMS, ROW_STRIDES, Params
from gqa_cutlass.codegen.schema.policies import POLICIES
from gqa_cutlass.codegen.schema.storage import Shared
from gqa_cutlass.codegen.schema.structs import (
    FLOAT,
    INT32,
    INT64,
    Constant,
    Enumeration,
    Field,
    Growth,
    Struct,
    own_size,
)
from gqa_cutlass.errors import ConfigError

MODULES = sorted(Path(params.__file__).parent.glob("*.py"))
OF_FEATURES = [argument for policy in POLICIES for argument in policy.arguments]
MEMORY = (*ARGUMENTS.rows, *BUFFERS.rows, *OF_FEATURES)
POINTERS = [field.name for field in PARAMS.fields if field.type.cpp.endswith("*")]
CONFIG = default_config(Math.TENSOROP, DType.F16, 128, 4, 8)


@pytest.fixture
def templates(tmp_path: Path) -> Path:
    """A folder with emitted headers, to change."""
    for name in (*emitted_files(), *emitted_parts()):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    for name in emitted_parts():
        shutil.copy(REPOSITORY / "templates" / name, tmp_path / name)
    emit(tmp_path)
    return tmp_path


@pytest.mark.parametrize("module", MODULES, ids=lambda path: path.stem)
def test_the_schema_imports_nothing_but_itself(module: Path) -> None:
    imported = set()
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module or "")
    others = {
        name
        for name in imported
        if name.partition(".")[0] not in sys.stdlib_module_names
        and not name.startswith("gqa_cutlass.codegen.schema")
    }
    assert others <= {"gqa_cutlass.errors"}


def test_committed_headers_are_what_the_schema_gives() -> None:
    assert emitted_drift() == []


@pytest.mark.parametrize("name", emitted_files())
def test_edited_and_missing_headers_are_drift_and_get_repaired(name: str, templates: Path) -> None:
    assert emit(templates) == [] == emitted_drift(templates)
    (templates / name).write_text("// mine\n")
    assert emitted_drift(templates) == [name]
    assert emit(templates) == [name]
    (templates / name).unlink()
    assert emitted_drift(templates) == [name]
    assert emit(templates) == [name]
    assert emitted_drift(templates) == []


@pytest.mark.parametrize("name", emitted_parts())
def test_an_edited_part_is_drift_and_gets_repaired_and_the_rest_is_left(
    name: str, templates: Path
) -> None:
    text = (templates / name).read_text()
    edited = text.replace(" GQA_SUCCESS = 0,", " GQA_SUCCESS = 1,")
    (templates / name).write_text(edited + "// mine\n")
    assert edited != text and emitted_drift(templates) == [name]
    assert emit(templates) == [name]
    assert (templates / name).read_text() == text + "// mine\n"
    assert emitted_drift(templates) == []


@pytest.mark.parametrize("name", emitted_parts())
def test_a_file_that_lost_its_part_is_drift_and_is_not_written(name: str, templates: Path) -> None:
    (templates / name).write_text("// mine\n")
    (templates / "bundle/src/gqa_params.h").write_text("// mine\n")
    assert set(emitted_drift(templates)) == {name, "bundle/src/gqa_params.h"}
    with pytest.raises(ConfigError, match=f"{name}: got a file without the lines .*Nothing was"):
        emit(templates)
    assert (templates / name).read_text() == "// mine\n"
    assert (templates / "bundle/src/gqa_params.h").read_text() == "// mine\n"


@pytest.mark.parametrize("name", emitted_files())
def test_emitted_headers_say_so_and_fit_on_a_line(name: str) -> None:
    text = emitted_files()[name]
    assert "Do not edit" in text.splitlines()[1]
    assert max(map(len, text.splitlines())) <= 100


def test_emitted_parts_fit_on_a_line() -> None:
    assert max(len(line) for part in emitted_parts().values() for line in part.splitlines()) <= 100


@pytest.mark.parametrize("enum", ENUMS, ids=lambda enum: enum.__name__)
def test_enumerations_mean_the_same_in_every_language(enum: type[Documented]) -> None:
    _, _, body = cpp_header().partition(f"enum class {enum.__name__} : int32_t {{\n")
    lines = body.partition("};")[0].splitlines()
    assert [line.split()[0] for line in lines] == [f"k{m.name.title()}," for m in enum]
    assert [int(m) for m in enum] == list(range(len(enum)))  # as C++ counts them
    assert all(line.endswith(m.doc) for m, line in zip(enum, lines, strict=True))
    assert all(enum(int(m)) is m for m in enum)


def test_a_field_out_of_order_with_what_was_emitted_is_named() -> None:
    lines = cpp_header().splitlines()
    place = next(i for i, line in enumerate(lines) if "num_splits;" in line)
    lines[place - 1], lines[place] = lines[place], lines[place - 1]
    with pytest.raises(ConfigError, match=r"line \d+: got 'int32_t num_splits;'.*max_seq_len"):
        check_emitted("include/gqa/params.cuh", "\n".join(lines))
    check_emitted("include/gqa/params.cuh", cpp_header())


def test_no_kernel_is_rendered_for_a_header_that_is_out_of_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(str(our.include_dir()), tmp_path / "include")
    header = tmp_path / "include" / "gqa" / "params.cuh"
    header.write_text(header.read_text().replace("int32_t max_seq_len", "int64_t max_seq_len"))
    module = sys.modules["gqa_cutlass.codegen.render"]
    monkeypatch.setattr(module, "our_headers", lambda: Headers(tmp_path / "include"))
    module._check_params.cache_clear()
    try:
        with pytest.raises(ConfigError, match=r"int64_t max_seq_len.*Run `gqa-cutlass generate`"):
            render.__wrapped__(CONFIG)
    finally:
        module._check_params.cache_clear()


def test_every_address_that_a_kernel_is_told_is_a_row_of_memory() -> None:
    assert sorted(row.field for row in MEMORY) == sorted(POINTERS)


@pytest.mark.parametrize("row", [r for r in MEMORY if r.stride], ids=lambda row: row.name)
def test_strides_are_those_of_the_dimensions(row: Argument) -> None:
    (kind,) = [field.type for field in PARAMS.fields if field.name == row.stride]
    (struct,) = [s for s in (ROW_STRIDES, CACHE_STRIDES) if s.cpp == kind.cpp]
    assert len(struct.fields) == len(row.dims) - 1  # the last one's are 1


def test_the_argument_leaves_room_for_tensor_maps_to_follow() -> None:
    assert ctypes.sizeof(Params) % params.TENSOR_MAP_ALIGN == 0


def test_features_bring_no_name_and_no_field_that_others_have() -> None:
    Table(rows=MEMORY)


def test_two_arguments_of_one_name_are_refused() -> None:
    row = Argument(name="k", dims=("batch",), field="k_new")
    other = Argument(name="k", dims=("batch",), field="v_new")
    with pytest.raises(ConfigError, match=r"arguments: got k twice.*No kernel was generated"):
        Table(rows=(row, other))


def test_two_arguments_in_one_field_are_refused() -> None:
    rows = [Argument(name=name, dims=("batch",), field="k_new") for name in "kv"]
    with pytest.raises(ConfigError, match="arguments: got k_new twice"):
        Table(rows=tuple(rows))


def test_two_fields_of_one_name_are_refused() -> None:
    fields = (Field(name="scale", type=FLOAT), Field(name="scale", type=INT32))
    with pytest.raises(ConfigError, match="S: got scale twice"):
        Struct(cpp="S", c="s", doc="", fields=fields)


def test_two_members_of_one_name_or_value_are_refused() -> None:
    for values, names, twice in (((1, 1), "ab", "got 1 twice"), ((1, 2), "aa", "got a")):
        members = [Constant(name=n, value=v) for n, v in zip(names, values, strict=True)]
        with pytest.raises(ConfigError, match=twice):
            Enumeration(c="e", members=tuple(members))


@pytest.mark.parametrize(("count", "reserved"), [(1, 56), (7, 8), (8, 0), (9, 56)])
def test_a_structure_grows_with_its_fields(count: int, reserved: int) -> None:
    fields = tuple(Field(name=f"f{i}", type=INT64) for i in range(count))
    grown = Struct(cpp="S", c="s", doc="", fields=fields, multiple=64)
    assert grown.reserved == reserved
    kind = type("S", (ctypes.Structure,), {"_fields_": grown.ctypes_fields()})
    assert ctypes.sizeof(kind) == 8 * count + reserved
    assert Struct(cpp="S", c="s", doc="", fields=fields).reserved == 0


GROWTH = Growth(required="a", least="kLeast", initial="INIT")
CLOSED: dict[str, tuple[tuple[Field, ...], str]] = {
    "no size": ((Field(name="a", type=INT64),), "got a as its first field; needed: struct_size"),
    "a gap": (
        (own_size("s"), Field(name="a", type=INT64), Field(name="b", type=INT32),
         Field(name="c", type=INT64)), "got 28 bytes of fields in 32",
    ),
    "room behind": (
        (own_size("s"), Field(name="a", type=INT64), Field(name="b", type=INT32)),
        "got 20 bytes of fields in 24",
    ),
    "half a step": (
        (own_size("s"), Field(name="a", type=INT32), Field(name="b", type=INT32)),
        "got 16 bytes of fields in 16, of which the first 12 are required; needed: no gaps, and",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("fields", "message"), CLOSED.values(), ids=CLOSED)
def test_a_structure_that_cannot_grow_is_refused(fields: tuple[Field, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=f"schema: S: {message}"):
        Struct(cpp="S", c="s", doc="", fields=fields, growth=GROWTH)
    assert Struct(cpp="S", c="s", doc="", fields=fields).growth is None


def offsets(struct: Struct) -> list[tuple[str, int]]:
    kind = type(struct.c, (ctypes.Structure,), {"_fields_": struct.ctypes_fields()})
    return [(field.name, getattr(kind, field.name).offset) for field in struct.fields]


def test_what_programs_were_built_with_stays_where_it_is() -> None:
    """Add fields and statuses at the end; these do not change."""
    assert offsets(public.CONFIG)[:22] == [
        ("struct_size", 0), ("batch_size", 8), ("cache_len", 12), ("num_q_heads", 16),
        ("num_kv_heads", 20), ("head_dim", 24), ("scale", 28), ("max_seq_len", 32), ("dtype", 36),
        ("workspace", 40), ("workspace_size", 48), ("softcap", 56), ("window", 60), ("sinks", 64),
        ("sinks_type", 72), ("alibi_batch_stride", 76), ("alibi_slopes", 80), ("cache_leftpad", 88),
        ("cache_batch_idx", 96), ("cache_rows", 104), ("equal_lengths", 108),
        ("lse", 112),
    ]  # fmt: skip
    assert offsets(public.CONFIG)[22:45] == [
        ("output_batch_stride", 120), ("output_head_stride", 128), ("q_batch_stride", 136),
        ("q_head_stride", 144), ("k_batch_stride", 152), ("k_head_stride", 160),
        ("v_batch_stride", 168), ("v_head_stride", 176), ("kv_cache_k_batch_stride", 184),
        ("kv_cache_k_token_stride", 192), ("kv_cache_k_head_stride", 200),
        ("kv_cache_v_batch_stride", 208), ("kv_cache_v_token_stride", 216),
        ("kv_cache_v_head_stride", 224), ("dependent", 232), ("head_dim_v", 236),
        ("output_float32", 240), ("page_size", 244), ("block_table", 248),
        ("block_table_stride", 256), ("slot_mapping", 264), ("max_pages", 272), ("num_pages", 276),
    ]  # fmt: skip
    assert offsets(public.LAUNCH)[:9] == [
        ("struct_size", 0), ("kernel", 8), ("grid", 16), ("cluster", 28), ("block", 32),
        ("shared_bytes", 36), ("num_splits", 40), ("num_stages", 44), ("workspace_size", 48),
    ]  # fmt: skip
    assert [member.name.removeprefix("GQA_ERROR_") for member in public.STATUS.members][:10] == [
        "GQA_SUCCESS", "NULL_POINTER", "INVALID_VALUE", "CACHE_OVERFLOW", "UNSUPPORTED",
        "WORKSPACE", "NO_DRIVER", "DEVICE", "LAUNCH", "UNSUPPORTED_FEATURE",
    ]  # fmt: skip
    assert [member.value for member in public.STATUS.members] == list(
        range(len(public.STATUS.members))
    )
    assert (public.CONFIG.least_bytes, public.LAUNCH.least_bytes) == (40, 16)


@pytest.mark.parametrize("asked_by", [{}, public.ASKED_BY | {"sinks": "none"}], ids=["all", "one"])
def test_a_feature_that_no_field_asks_for_is_refused(asked_by: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="GQADecodeConfig: got no field for .*sinks.*; needed: "):
        public.check_asked(asked_by, public.CONFIG)


def test_parts_of_shared_memory_lie_one_behind_the_other_as_aligned() -> None:
    parts = (
        Shared(name="a", bytes=3, align=1),
        Shared(name="b", bytes=4),
        Shared(name="c", bytes=16, align=16),
        Shared(name="d", bytes=1, align=1),
    )
    assert storage.total(parts) == 48  # 0-3, 4-8, 16-32, 32-33, rounded up to 16


def test_access_says_what_a_kernel_writes() -> None:
    written = {row.name for row in MEMORY if row.access is not arguments.Access.READ}
    assert written == {
        "k_cache",
        "v_cache",
        "out",
        "lse",
        "split_workspace",
        "merge_counters",
        "overflow_flag",
    }
