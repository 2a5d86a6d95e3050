"""The documentation: it builds without a warning, and says what the code says."""

from __future__ import annotations

import ast
import logging
import re
from pathlib import Path

import pytest
import torch
from compiling import GROUP
from helpers import REPOSITORY

DOCS = REPOSITORY / "docs"
PYTHON = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# Pages with pieces of programs, around names that a reader has. On others, programs are whole, and
# what follows one on a page goes on from it.
PIECES = {"context_parallel", "paged", "ptxsim", "pytorch"}
REFERENCE = {
    "gqa_cutlass/__init__.py": "gqa_cutlass",
    "codegen/__init__.py": "gqa_cutlass.codegen",
    "gqa_cutlass/distributed/__init__.py": "gqa_cutlass.distributed",
    "gqa_cutlass/integrations/transformers.py": "gqa_cutlass.integrations.transformers",
}
TOY = {r'"cuda"': '"cpu"', r"\b\d{4}\b": "64", r"\b32, 8, 128\b": "4, 1, 64"}


def test_the_site_builds_without_warnings_and_has_what_the_code_says(tmp_path: Path) -> None:
    pytest.importorskip("material")
    pytest.importorskip("mkdocstrings")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    build(load_config(str(REPOSITORY / "mkdocs.yml"), strict=True, site_dir=str(tmp_path)))
    pages = {
        path.relative_to(tmp_path).with_suffix("").as_posix(): path.read_text()
        for path in tmp_path.rglob("*.html")
    }
    written = {path.relative_to(DOCS).with_suffix("").as_posix() for path in DOCS.rglob("*.md")}
    assert written and written - pages.keys() == set()
    texts = {name: re.sub("<[^>]*>", "", page) for name, page in pages.items()}

    # What other files hold is there, and links to them lead to their pages.
    assert "KVCache.for_layers(LAYERS" in texts["cuda_graphs"]
    assert 'href="repository/examples/continuous_batching.py.html"' in pages["paged"]
    # Options that a decorator adds, commands, presets.
    assert re.search(r"softcap:\s*float", texts["api/decode"])
    assert "as in Gemma 2" in texts["api/decode"]
    assert "--exclude-kernels" in texts["cli"] and "gpt-oss-20b" in texts["models"]
    # A docstring whose sections were not understood has their heads in its text.
    for name, page in pages.items():
        assert not re.search("<p>(Args|Returns|Raises):", page), name


@pytest.mark.parametrize("module", REFERENCE)
def test_every_public_name_is_in_the_reference(module: str) -> None:
    """But for what is no object: the name that transformers knows, and the version."""
    (listed,) = (
        node.value
        for node in ast.parse((REPOSITORY / module).read_text()).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    )
    text = "".join(path.read_text() for path in (DOCS / "api").glob("*.md"))
    found = set(re.findall(rf"^::: {re.escape(REFERENCE[module])}\.(\w+)$", text, re.MULTILINE))
    assert found == set(ast.literal_eval(listed)) - {"__version__", "NAME"}


def test_every_example_is_on_its_page() -> None:
    named = set(re.findall(r"\.\./examples/(\w+)\.py", (DOCS / "examples.md").read_text()))
    assert named == {path.stem for path in (REPOSITORY / "examples").glob("*.py")}


def _blocks(path: Path) -> list[str]:
    return PYTHON.findall(path.read_text())


def _whole() -> list[str]:
    pages = {path.stem for path in DOCS.glob("*.md") if _blocks(path)}
    assert pages > PIECES
    return sorted(pages - PIECES)


@pytest.mark.parametrize("page", _whole())
@pytest.mark.xdist_group(GROUP)
def test_programs_on_pages_run(page: str, caplog: pytest.LogCaptureFixture) -> None:
    """On the CPU, at toy sizes."""
    caplog.set_level(logging.INFO, logger="gqa_cutlass")  # which some change, and this sets back
    _run(DOCS / f"{page}.md", _blocks(DOCS / f"{page}.md"))


@pytest.mark.xdist_group(GROUP)
def test_programs_in_the_readme_run(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that are whole; `test_examples` has that of transformers."""
    monkeypatch.chdir(tmp_path)  # where they write files
    path = REPOSITORY / "README.md"
    whole = [b for b in _blocks(path) if b.startswith("import torch") and "GqaCache" not in b]
    assert len(whole) >= 3
    for block in whole:
        _run(path, [block])
    said = capsys.readouterr().out
    assert "[9, 6, 2, 8]" in said and "[9, 9, 8, 0]" in said  # as its comments say


def _run(path: Path, blocks: list[str]) -> None:
    names: dict[str, object] = {}
    torch.manual_seed(0)
    for block in blocks:
        for large, small in TOY.items():
            block = re.sub(large, small, block)
        exec(compile(block, str(path), "exec"), names)
