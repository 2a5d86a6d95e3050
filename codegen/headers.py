"""Our own headers, `gqa/*.cuh`: where they are, and which of them a source includes."""

from __future__ import annotations

import hashlib
import posixpath
import re
from collections.abc import Callable
from functools import cache
from importlib import resources
from importlib.resources.abc import Traversable

from gqa_cutlass.errors import ConfigError

_OURS = "gqa/"
# `#include <gqa/...>` from the include path, `#include "..."` from beside the includer.
_INCLUDE = re.compile(rf'^\s*#\s*include\s+(?:<({_OURS}[^>]+)>|"([^"]+)")', re.MULTILINE)
# Comments; directives, which end with their line; literals; numbers; names; operators; all else.
_TOKEN = re.compile(
    r"""//[^\n]*|/\*.*?\*/|^[ \t]*\#(?:\\\n|(?!//)[^\n])*"""
    r"""|"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*'|\.?\d(?:[eEpP][+-]|[\w.'])*|\w+"""
    r"""|<<=|>>=|<=>|->\*|\.\.\.|\.\*|::|->|\+\+|--|<<|>>|&&|\|\||[-+*/%&|^!=<>]=|\S""",
    re.MULTILINE | re.DOTALL,
)


@cache
def code_of(text: str) -> str:
    """C++ without its comments and its layout, on which no machine code depends."""
    tokens = (found.group().strip() for found in _TOKEN.finditer(text))
    return "\n".join(
        " ".join(token.split()) if token.startswith("#") else token
        for token in tokens
        if not token.startswith(("//", "/*"))
    )


class Headers:
    """The headers below an include folder, each read once.

    Args:
        folder: What the compiler is given as include path.
    """

    def __init__(self, folder: Traversable) -> None:
        self._folder = folder
        self._texts: dict[str, str] = {}
        self._closures: dict[str, frozenset[str]] = {}

    def closure(self, source: str) -> frozenset[str]:
        """Names of all headers that a source includes, directly or not; those of others left out.

        An include counts wherever it stands, also where the preprocessor would skip it.

        Raises:
            ConfigError: A header is included that is not there.
        """
        direct = _includes(source, at="")
        return frozenset(direct).union(*map(self._closure_of, direct))

    def digest(self, source: str, seen: Callable[[str], str] = str) -> str:
        """Digest of a source and of the names and contents of the headers in its closure.

        Args:
            source: What is compiled.
            seen: What counts of a text; by default all of it.
        """
        digest = hashlib.sha256(seen(source).encode())
        for name in sorted(self.closure(source)):
            digest.update(b"\0" + name.encode() + b"\0" + seen(self.text(name)).encode())
        return digest.hexdigest()[:16]

    def text(self, name: str) -> str:
        """What a header says.

        Raises:
            ConfigError: It is not there.
        """
        if name not in self._texts:
            path = self._folder.joinpath(*name.split("/"))
            if not path.is_file():
                raise ConfigError(
                    f"header: got {name}, which a kernel includes; allowed: files below "
                    f"{self._folder}"
                )
            self._texts[name] = path.read_text(encoding="utf-8")
        return self._texts[name]

    def _closure_of(self, header: str) -> frozenset[str]:
        if header not in self._closures:
            found: set[str] = set()
            new = {header}
            while new:
                found |= new
                new = {n for h in new for n in _includes(self.text(h), at=h)} - found
            self._closures[header] = frozenset(found)
        return self._closures[header]


@cache
def our_headers() -> Headers:
    """The headers that kernels are compiled with."""
    return Headers(include_dir())


def include_dir() -> Traversable:
    """The folder that holds our own headers, `gqa/*.cuh`."""
    return resources.files("gqa_cutlass.templates") / "include"


def _includes(text: str, at: str) -> set[str]:
    """What a text includes of ours; `at` is its own name, from which quoted names count."""
    return {
        ours or posixpath.normpath(posixpath.join(posixpath.dirname(at), beside))
        for ours, beside in _INCLUDE.findall(text)
    }
