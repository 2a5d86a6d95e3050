"""PTX text to tokens, numbers and source places (PTX ISA 4), in time that is linear in it."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from pathlib import PurePath
from typing import NamedTuple

from gqa_cutlass.errors import PtxError
from gqa_cutlass.ptxsim import limits
from gqa_cutlass.ptxsim.text.syntax import Imm

# Parts of a pattern that follow one another match different characters: nothing is tried twice.
_TOKEN = re.compile(
    r"""(?P<skip>[ \t\r\n]+|//[^\n]*|/\*(?s:.*?)\*/)
      | (?P<loc>\.(?:loc|file)\b[^\n]*)
      | (?P<string>"[^"\n]*")
      | (?P<number>0[fF][0-9a-fA-F]{8}\b|0[dD][0-9a-fA-F]{16}\b|0[xX][0-9a-fA-F]+U?
                   |0[bB][01]+U?\b|\d+\.\d*(?:[eE][+-]?\d+)?\b|\d+U?\b)
      | (?P<word>[.%$_A-Za-z](?:[\w$.%]|::)*)
      | (?P<mark>[{}()\[\],;@!|+=<>:-])""",
    re.VERBOSE | re.ASCII,
)
_FILE = re.compile(r'^[ \t]*\.file[ \t]+(\d{1,9})[ \t]+"([^"\n]*)"', re.MULTILINE | re.ASCII)
_SECTION = re.compile(r"^[ \t]*\.section\b", re.MULTILINE)
_LONGEST = {"word": limits.NAME, "number": 70}  # characters; 64 binary digits are the longest
_SHOWN = 80  # characters of a token in a message
_FILE_NAME = 255  # characters, as file systems have it


class Token(NamedTuple):
    """A piece of text, what kind it is, and its line."""

    kind: str
    text: str
    line: int


def tokens(text: str) -> list[Token]:
    """Take a module apart, without its debug sections: they come last and are most of the text.

    Raises:
        PtxError: There is something that is no token, one that is too long, or too many of them.
    """
    section = _SECTION.search(text)
    return list(_tokens(text, len(text) if section is None else section.start()))


def _tokens(text: str, end: int) -> Iterator[Token]:
    line, at, count = 1, 0, 0
    while at < end:
        match = _TOKEN.match(text, at, end)
        if match is None:
            raise PtxError(f"PTX line {line}: got {text[at]!r}; allowed: the tokens of PTX")
        kind, piece = match.lastgroup or "", match.group()
        if kind == "skip":
            line += piece.count("\n")
        else:
            token = Token(kind, piece, line)
            count += 1
            if len(piece) > _LONGEST.get(kind, len(piece)):
                raise unexpected(token, f"at most {_LONGEST[kind]} characters")
            if count > limits.TOKENS:
                raise unexpected(token, f"at most {limits.TOKENS} tokens")
            yield token
        at = match.end()


def files(text: str) -> dict[int, str]:
    """Names of the source files, without folders, by the numbers that `.loc` gives them."""
    return {int(number): PurePath(path).name[:_FILE_NAME] for number, path in _FILE.findall(text)}


def number(token: Token) -> Imm:
    """The value of a number.

    Raises:
        PtxError: It is none, or one that 64 bits do not hold.
    """
    text = token.text
    if text[:2] in ("0f", "0F"):
        return Imm(int(text[2:], 16), 32)
    if text[:2] in ("0d", "0D"):
        return Imm(int(text[2:], 16), 64)
    try:
        if "." in text:
            return Imm(int.from_bytes(struct.pack("<f", float(text)), "little"), 32)
        digits = text.removesuffix("U")
        value = int(digits, 8 if re.fullmatch("0[0-7]+", digits) else 0)
    except (ValueError, OverflowError) as error:
        raise unexpected(token, "a number") from error
    if value >> 64:
        raise unexpected(token, "a number of at most 64 bits")
    return Imm(value)


def unexpected(token: Token, needed: str) -> PtxError:
    """The error for a token that does not belong where it is."""
    text = token.text if len(token.text) <= _SHOWN else f"{token.text[:_SHOWN]}..."
    return PtxError(f"PTX line {token.line}: got {text!r}; needed: {needed}")
