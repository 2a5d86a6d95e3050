"""Plants a bug in the kernels' own source, and compiles what comes of it."""

from __future__ import annotations

import re
from functools import cache

from gqa_cutlass.codegen import Kernel, render
from gqa_cutlass.codegen.compile import compile_source
from gqa_cutlass.codegen.headers import include_dir
from gqa_cutlass.cpu.executor import program_from
from gqa_cutlass.ptxsim.prepare import Program

_INCLUDE = re.compile(r"#include <gqa/([\w/]+\.cuh)>\n")
_FOREIGN_INCLUDE = re.compile(r"#include <(?!gqa/).*>\n")


@cache
def headers(source: str) -> dict[str, str]:
    """The headers that a source includes, by file name, each behind those that it includes."""
    folder = include_dir() / "gqa"
    found: dict[str, str] = {}

    def visit(text: str) -> None:
        for path in _INCLUDE.findall(text):
            name = path.rpartition("/")[2]
            if name not in found:
                header = folder.joinpath(*path.split("/")).read_text(encoding="utf-8")
                visit(header)
                found[name] = header

    visit(source)
    return found


@cache
def program(config: Kernel, header: str = "", old: str = "", new: str = "") -> Program:
    """A kernel compiled from one text, in which one place of one header is replaced.

    Headers that are not ours come first, so that all texts can share them.
    """
    source = render(config)
    foreign = _FOREIGN_INCLUDE.findall("".join(headers(source).values()))
    parts = [*dict.fromkeys(foreign), "#pragma nv_hdrstop\n"]
    assert not header or header in headers(source)
    for name, text in headers(source).items():
        if name == header:
            assert text.count(old) == 1, f"{old!r} must occur once in {name}"
            text = text.replace(old, new)
        text = _INCLUDE.sub("\n", text.replace("#pragma once", ""))
        parts.append(f'#line 1 "{name}"\n{text}')
    own = f'#line 1 "{config.name}.cu"\n' + _INCLUDE.sub("\n", source)
    ptx = compile_source("".join(parts) + own, config.name, config.ptx_arch).code.decode()
    return program_from(ptx, config.name)
