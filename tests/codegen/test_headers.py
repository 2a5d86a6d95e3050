"""A kernel's digest covers the headers that it includes, and no others; its name says all of it."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
from helpers import by_name

from gqa_cutlass.codegen import (
    DType,
    KernelConfig,
    Math,
    Schedule,
    carried,
    default_config,
    shipped,
)
from gqa_cutlass.codegen.headers import Headers, code_of, include_dir
from gqa_cutlass.codegen.render import render
from gqa_cutlass.codegen.schema.policies import POLICIES, named
from gqa_cutlass.errors import ConfigError

SHIPPED = shipped()
CONFIG = dataclasses.replace(default_config(Math.TENSOROP, DType.F16, 128, 4, 8), num_warps=4)
# Another value of every field, with which the configuration stays valid.
OTHERS = {
    "math": Math.SIMT, "dtype": DType.BF16, "head_dim": 64, "group_size": 2, "vec_width": 4,
    "block_h": 16, "block_n": 32, "num_warps": 2, "num_stages": 2, "schedule": Schedule.TMA,
    "pdl": True, "head_dim_v": 64, "policies": (named("SoftCapped"),),
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of our headers, to change."""
    shutil.copytree(str(include_dir()), tmp_path / "include")
    return tmp_path / "include"


def digests(folder: Path) -> dict[KernelConfig, str]:
    headers = Headers(folder)
    return {config: headers.digest(render(config)) for config in SHIPPED}


def outdated_by(folder: Path, header: str) -> set[KernelConfig]:
    """The kernels whose digest changes with a header; what it says is as before afterwards."""
    path = next(folder.rglob(header))
    text, before = path.read_text(), digests(folder)
    path.write_text(text + "// changed\n")
    after = digests(folder)
    path.write_text(text)
    return {config for config in SHIPPED if before[config] != after[config]}


def test_a_header_that_nobody_includes_outdates_nothing(folder: Path) -> None:
    before = digests(folder)
    (folder / "gqa" / "nobody.cuh").write_text("#pragma once\n")
    assert digests(folder) == before


def test_a_change_of_a_header_outdates_the_kernels_that_include_it(folder: Path) -> None:
    tma = {config for config in SHIPPED if config.tma}
    assert 0 < len(tma) < len(SHIPPED)
    assert outdated_by(folder, "load_tma.cuh") == tma
    assert outdated_by(folder, "load.cuh") == set(SHIPPED) - tma
    assert outdated_by(folder, "score.cuh") == set(SHIPPED)


def test_every_header_that_comes_with_the_package_is_included_by_a_kernel() -> None:
    headers = Headers(include_dir())
    features = {p.slot: p for p in POLICIES if p.tag}.values()
    everything = [
        default_config(Math.TENSOROP, DType.F16, 64, 4, 8, schedule, tuple(features))
        for schedule in Schedule
    ]
    kernels = [*carried(), *everything]
    used = frozenset().union(*(headers.closure(render(config)) for config in kernels))
    root = Path(str(include_dir()))
    assert used == {path.relative_to(root).as_posix() for path in root.rglob("*.cuh")}


def test_a_header_that_moves_changes_digests(folder: Path) -> None:
    """Names count, not only contents: a kernel's source says them."""
    includer, moved = folder / "gqa" / "a.cuh", folder / "gqa" / "b.cuh"
    includer.write_text('#include "b.cuh"\n')
    moved.write_text("int b;\n")
    source = "#include <gqa/a.cuh>\n"
    before = Headers(folder).digest(source)
    includer.write_text('#include "c.cuh"\n')
    moved.rename(folder / "gqa" / "c.cuh")
    assert Headers(folder).digest(source) != before


def test_quoted_names_count_from_the_includer_and_circles_end(folder: Path) -> None:
    deep = folder / "gqa" / "deep"
    deep.mkdir()
    (deep / "one.cuh").write_text('  #  include "two.cuh"\n#include <cute/layout.hpp>\n')
    (deep / "two.cuh").write_text('#include "../three.cuh"\n// #include "absent.cuh"\n')
    (folder / "gqa" / "three.cuh").write_text("#include <gqa/deep/one.cuh>\n")
    found = Headers(folder).closure("#include <gqa/deep/one.cuh>\n")
    assert found == {"gqa/deep/one.cuh", "gqa/deep/two.cuh", "gqa/three.cuh"}


def test_a_header_that_is_not_there_is_named(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"header: got gqa/absent\.cuh.*allowed: files below"):
        Headers(folder).digest("#include <gqa/absent.cuh>\n")


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(KernelConfig)])
def test_configurations_that_render_differently_have_different_names(field: str) -> None:
    other = dataclasses.replace(CONFIG, **{field: OTHERS[field]})
    assert other.name != CONFIG.name
    assert render(other).replace(other.name, "") != render(CONFIG).replace(CONFIG.name, "")


@pytest.mark.parametrize("config", by_name(SHIPPED[::29]))
def test_a_kernel_is_what_its_name_says(config: KernelConfig) -> None:
    """Rendered anew: `render` keeps what it made of equal configurations."""
    rebuilt = KernelConfig.from_name(config.name)
    assert render.__wrapped__(rebuilt) == render.__wrapped__(config)


@pytest.mark.parametrize(
    "same",
    [
        "int  a;\nint b = 'x';",
        "int a; // why\nint b /* of\n what */ = 'x';",
        "int a;\n\n\n  int\nb='x' ;",
    ],
)
def test_comments_and_layout_are_no_code(same: str) -> None:
    assert code_of(same) == code_of("int a; int b = 'x';")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("int a;", "int b;"),
        ("int a;", "inta;"),
        ("a + +b;", "a ++b;"),
        ("a < < b", "a << b"),
        ("a - > b", "a -> b"),
        ("a = = b", "a == b"),
        ("x < 1e-3", "x < 1e - 3"),
        ("f(1'000);", "f(1'00 0);"),
        ('f("a b");', 'f("a  b");'),
        ('f("// a");', 'f("");'),
        ("f('\"'); // a", "f('\"'); g();"),
        ("#define A 1\nint b;", "#define A 1 int b;"),
        ("#define A 1  \\\n  + 2\nb", "#define A 1\n+ 2\nb"),
    ],
)
def test_what_the_compiler_sees_is_code(one: str, other: str) -> None:
    assert code_of(one) != code_of(other)


def test_directives_end_with_their_line() -> None:
    assert code_of("#include <a>  // why\nint b;") == code_of("#include  <a>\n\n int b;")
