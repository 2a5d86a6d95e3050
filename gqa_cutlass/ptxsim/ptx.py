"""PTX text to instructions. Knows the grammar (PTX ISA 4), not what an instruction does."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePath

from gqa_cutlass.errors import PtxError
from gqa_cutlass.ptxsim.syntax import (
    Address,
    Imm,
    Instruction,
    Kernel,
    Not,
    Operand,
    Pair,
    Reg,
    Symbol,
    Variable,
    Vector,
)

TARGETS = range(80, 91)  # compute capabilities, times ten
_TOKEN = re.compile(
    r"""(?P<skip>[ \t\r]+|//[^\n]*|/\*.*?\*/)
      | (?P<newline>\n)
      | (?P<loc>\.(?:loc|file)\b[^\n]*)
      | (?P<string>"[^"\n]*")
      | (?P<number>0[fF][0-9a-fA-F]{8}\b|0[dD][0-9a-fA-F]{16}\b|0[xX][0-9a-fA-F]+U?
                   |0[bB][01]+U?\b|\d+\.\d*(?:[eE][+-]?\d+)?\b|\d+U?\b)
      | (?P<word>[.%$_A-Za-z](?:[\w$.%]|::)*)
      | (?P<mark>[{}()\[\],;@!|+=<>:-])""",
    re.VERBOSE | re.DOTALL,
)
_LOC = re.compile(r"\.loc\s+(\d+)\s+(\d+)\s+(\d+)(?:.*\binlined_at\s+(\d+)\s+(\d+)\s+(\d+))?")
_FILE = re.compile(r'^\s*\.file\s+(\d+)\s+"([^"]*)"', re.MULTILINE)
_SIZES = {"pred": 1} | {f"{kind}{bits}": bits for kind in "busf" for bits in (8, 16, 32, 64)} | {
    "f16x2": 32, "bf16": 16, "bf16x2": 32, "b128": 128,
}  # fmt: skip
_SPACES = (".global", ".shared", ".local", ".param", ".const")
_ENDS = ("ret", "exit", "bra")
_LINKAGE = (".visible", ".extern", ".weak", ".common")
_MAX_DEPTH, _MAX_REGISTERS, _MAX_INLINED = 64, 1 << 20, 16
_SIGNS = {32: 1 << 31, 64: 1 << 63}

Place = tuple[int, int, int]  # number of a source file, line, column


def parse(text: str, name: str) -> Kernel:
    """Read one kernel.

    Args:
        text: A PTX module.
        name: The kernel's symbol.

    Raises:
        PtxError: The text is not complete or not PTX, or has no such kernel.
    """
    return _Parser(text).kernel(name)


@dataclass(frozen=True)
class _Token:
    kind: str
    text: str
    line: int


def _tokens(text: str) -> Iterator[_Token]:
    line, at = 1, 0
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None:
            raise PtxError(f"PTX line {line}: got {text[at]!r}; allowed: the tokens of PTX")
        kind = match.lastgroup or ""
        if kind not in ("skip", "newline"):
            yield _Token(kind, match.group(), line)
        line += match.group().count("\n")
        at = match.end()


class _Parser:
    """Recursive descent over the tokens of a module."""

    def __init__(self, text: str) -> None:
        self._files = {int(number): PurePath(path).name for number, path in _FILE.findall(text)}
        # Debug sections come last and are most of the text.
        self._tokens = list(_tokens(re.split(r"^\s*\.section\b", text, maxsplit=1, flags=re.M)[0]))
        self._at = 0
        self._source = ""
        self._inlined: dict[Place, Place | None] = {}  # the call that each place was inlined at

    def kernel(self, name: str) -> Kernel:
        kernel = Kernel(name=name)
        found = False
        while self._at < len(self._tokens):
            token = self._next()
            if token.text == ".entry":
                found |= self._entry(kernel)
            elif token.text == ".func":
                self._skip_function()
            elif token.text in _SPACES:
                self._variable(token.text, kernel)
            elif token.text == ".target":
                self._target()
            elif token.text in (".version", ".address_size"):
                self._directive()
            elif token.kind != "loc" and token.text not in _LINKAGE:
                raise _unexpected(token, "a function or a variable")
        if not found:
            raise PtxError(f"PTX: got no kernel {name!r}; needed: an .entry of that name")
        return kernel

    def _peek(self) -> _Token:
        if self._at >= len(self._tokens):
            line = self._tokens[-1].line if self._tokens else 1
            raise PtxError(
                f"PTX: the text ends at line {line}, inside a kernel or a statement; needed: the "
                "whole module as the compiler wrote it. Compile it again."
            )
        return self._tokens[self._at]

    def _next(self) -> _Token:
        token = self._peek()
        self._at += 1
        return token

    def _accept(self, text: str) -> bool:
        if self._peek().text == text:
            self._at += 1
            return True
        return False

    def _expect(self, text: str) -> None:
        token = self._next()
        if token.text != text:
            raise _unexpected(token, repr(text))

    def _integer(self) -> int:
        token = self._next()
        number = _number(token) if token.kind == "number" else None
        if number is None or number.float_bits:
            raise _unexpected(token, "an integer")
        return number.value

    def _target(self) -> None:
        """Refuse architectures whose instructions this simulator does not know."""
        token = self._peek()
        match = re.fullmatch(r"sm_(\d+)a?", token.text)
        if match is None or int(match.group(1)) not in TARGETS:
            raise PtxError(
                f"PTX line {token.line}: got code for {token.text}; allowed: sm_{TARGETS[0]} to "
                f"sm_{TARGETS[-1]}. Compile for compute_80 or compute_90."
            )
        self._directive()

    def _directive(self) -> None:
        """Skip a directive that ends with its line."""
        line = self._tokens[self._at - 1].line
        while self._at < len(self._tokens) and self._tokens[self._at].line == line:
            self._at += 1

    def _skip_function(self) -> None:
        """Skip a device function or its declaration; a call of it is an error when executed."""
        while self._peek().text not in ("{", ";"):
            self._at += 1
        depth = 0
        while True:
            text = self._next().text
            depth += (text == "{") - (text == "}")
            if depth == 0 and text in ("}", ";"):
                return

    def _entry(self, kernel: Kernel) -> bool:
        if self._next().text != kernel.name:
            self._skip_function()
            return False
        if self._accept("("):
            while not self._accept(")"):
                self._expect(".param")
                self._variable(".param", kernel, end=(",", ")"))
                self._accept(",")
        while self._peek().text != "{":
            self._entry_directive(kernel)
        self._at += 1
        self._body(kernel, _Scope(None, "", kernel))
        self._close(kernel)
        return True

    def _close(self, kernel: Kernel) -> None:
        """Let the end of the body exit, if it can be reached."""
        code = kernel.instructions
        ends = bool(code) and code[-1].guard is None and code[-1].opcode[0] in _ENDS
        if not ends or len(code) in kernel.labels.values():
            line = self._tokens[self._at - 1].line
            code.append(
                Instruction(opcode=("ret",), operands=(), guard=None, negated=False, line=line)
            )

    def _entry_directive(self, kernel: Kernel) -> None:
        name = self._next().text.removeprefix(".")
        values = []
        while self._peek().kind == "number":
            values.append(self._integer())
            self._accept(",")
        kernel.directives[name] = tuple(values)

    def _variable(
        self, space: str, kernel: Kernel, end: tuple[str, ...] = (";",), scope: _Scope | None = None
    ) -> None:
        """What follows `.shared` and the like."""
        align, bits, count, name = 0, 0, 1, ""
        initial: list[int] = []
        while self._peek().text not in end:
            token = self._next()
            if token.text == ".align":
                align = self._integer()
            elif token.text == ".ptr":  # what is said of the memory that the pointer points to
                while self._peek().text.startswith("."):
                    if self._next().text == ".align":
                        self._integer()
            elif token.text[:1] == "." and token.text[1:] in _SIZES and not bits:
                bits = _SIZES[token.text[1:]]
            elif token.text in (".v2", ".v4"):
                count *= int(token.text[2:])
            elif token.text == "[":
                count *= 0 if self._peek().text == "]" else self._integer()
                self._expect("]")
            elif token.text == "=":
                initial = self._initial(end)
            elif token.kind == "word" and not token.text.startswith(".") and not name:
                name = token.text
            else:
                raise _unexpected(token, "a variable")
        last = self._peek()
        if not name or not bits:
            raise _unexpected(last, "the name and the type of a variable")
        if ";" in end:
            self._expect(";")
        width = max(bits, 8) // 8
        data = b"".join((value % (1 << 8 * width)).to_bytes(width, "little") for value in initial)
        unique = scope.declare(name) if scope else name
        align = align or width
        if align & align - 1:
            raise _unexpected(last, f"an alignment that is a power of two, not {align},")
        kernel.variables[unique] = Variable(
            space=space[1:], align=align, size=count * width, initial=data
        )

    def _initial(self, end: tuple[str, ...]) -> list[int]:
        values: list[int] = []
        sign = 1
        while self._peek().text not in end:
            token = self._next()
            if token.kind == "number":
                values.append(sign * _number(token).value)
            sign = -1 if token.text == "-" else 1
        return values

    def _body(self, kernel: Kernel, scope: _Scope) -> None:
        """Statements up to the closing brace."""
        self._declare_labels(scope)
        while not self._accept("}"):
            token = self._next()
            if token.kind == "loc":
                self._locate(token.text)
            elif token.text == "{":
                if scope.depth == _MAX_DEPTH:
                    raise _unexpected(token, f"at most {_MAX_DEPTH} levels of braces")
                self._body(kernel, _Scope(scope, f"{token.line}.{self._at}", kernel))
            elif token.text == ".reg":
                self._registers(kernel, scope)
            elif token.text in _SPACES:
                self._variable(token.text, kernel, scope=scope)
            elif token.text == ".pragma":
                while self._next().text != ";":
                    pass
            elif token.text != ";":
                self._statement(token, kernel, scope)

    def _declare_labels(self, scope: _Scope) -> None:
        """Name the labels of a scope in advance: branches may go forward."""
        depth = 0
        for i in range(self._at, len(self._tokens)):
            text = self._tokens[i].text
            depth += (text == "{") - (text == "}")
            if depth < 0:
                return
            if text == ":" and depth == 0 and self._tokens[i - 1].kind == "word":
                scope.declare(self._tokens[i - 1].text)

    def _locate(self, text: str) -> None:
        """Read a `.loc`: where the next instructions come from."""
        match = _LOC.match(text)
        if match is None:
            return
        numbers = [int(number or 0) for number in match.groups()]
        place: Place | None = (numbers[0], numbers[1], numbers[2])
        call = (numbers[3], numbers[4], numbers[5]) if match.group(4) else None
        self._inlined[(numbers[0], numbers[1], numbers[2])] = call
        places: list[str] = []
        while place is not None and place[1] and len(places) < _MAX_INLINED:
            places.append(f"{self._files.get(place[0], '?')}:{place[1]}")
            place = self._inlined.get(place)
        self._source = ", inlined at ".join(places)

    def _registers(self, kernel: Kernel, scope: _Scope) -> None:
        kind = self._next()
        width = _SIZES.get(kind.text[1:]) if kind.text.startswith(".") else None
        if width is None:
            raise _unexpected(kind, "the type of registers")
        while True:
            token = self._next()
            if token.kind != "word":
                raise _unexpected(token, "the name of a register")
            names = [token.text]
            if self._accept("<"):
                count = self._integer()
                if count > _MAX_REGISTERS:
                    raise _unexpected(token, f"at most {_MAX_REGISTERS} registers")
                names = [f"{token.text}{i}" for i in range(count)]
                self._expect(">")
            for name in names:
                kernel.registers[scope.declare(name)] = width
            if self._accept(";"):
                return
            self._expect(",")

    def _statement(self, token: _Token, kernel: Kernel, scope: _Scope) -> None:
        if token.kind == "word" and self._accept(":"):
            label = scope.find(token.text)
            if label in kernel.labels:
                raise _unexpected(token, "a label that is not there yet")
            kernel.labels[label] = len(kernel.instructions)
            return
        guard, negated = None, False
        if token.text == "@":
            negated = self._accept("!")
            guard = self._register(scope)
            token = self._next()
        if token.kind != "word":
            raise _unexpected(token, "an instruction")
        operands: list[Operand] = []
        if not self._accept(";"):
            operands.append(self._operand(scope))
            while not self._accept(";"):
                self._expect(",")
                operands.append(self._operand(scope))
        instruction = Instruction(
            opcode=tuple(token.text.split(".")),
            operands=tuple(operands),
            guard=guard,
            negated=negated,
            line=token.line,
            source=self._source,
        )
        kernel.instructions.append(instruction)

    def _register(self, scope: _Scope) -> Reg:
        token = self._next()
        if token.kind != "word":
            raise _unexpected(token, "a register")
        return Reg(scope.find(token.text))

    def _operand(self, scope: _Scope) -> Operand:
        operand = self._simple(scope)
        return Pair(operand, self._simple(scope)) if self._accept("|") else operand

    def _simple(self, scope: _Scope) -> Operand:
        token = self._next()
        if token.text == "{":
            return self._vector(scope)
        if token.text == "[":
            return self._address(scope)
        if token.text == "!":
            return Not(self._register(scope))
        if token.text == "-" and self._peek().kind == "number":
            number = _number(self._next())
            if number.float_bits:
                return Imm(number.value ^ _SIGNS[number.float_bits], number.float_bits)
            return Imm(-number.value)
        if token.kind == "number":
            return _number(token)
        if token.kind == "word":
            return _named(scope.find(token.text), scope.kernel)
        raise _unexpected(token, "an operand")

    def _vector(self, scope: _Scope) -> Vector:
        items = []
        while True:
            if self._peek().text == "{":
                raise _unexpected(self._peek(), "an operand")
            items.append(self._operand(scope))
            if self._accept("}"):
                return Vector(tuple(items))
            self._expect(",")

    def _address(self, scope: _Scope) -> Address:
        base: Reg | Symbol | None = None
        offset = 0
        if self._peek().kind == "number":
            offset = self._integer()
        else:
            token = self._next()
            if token.kind != "word":
                raise _unexpected(token, "a register or a variable")
            base = _named(scope.find(token.text), scope.kernel)
        while not self._accept("]"):
            sign = self._next()
            if sign.text == ",":
                self._expect("{")
                coordinates = self._vector(scope).items
                self._expect("]")
                return Address(base, offset, coordinates)
            if sign.text not in ("+", "-"):
                raise _unexpected(sign, "']' or an offset")
            negative = (sign.text == "-") ^ self._accept("-")
            offset += -self._integer() if negative else self._integer()
        return Address(base, offset)


class _Scope:
    """Names declared between braces; inline assembly declares the same ones over and over."""

    def __init__(self, parent: _Scope | None, tag: str, kernel: Kernel) -> None:
        self.kernel = kernel
        self.depth: int = parent.depth + 1 if parent else 0
        self._parent = parent
        self._tag = tag
        self._names: dict[str, str] = {}

    def declare(self, name: str) -> str:
        self._names[name] = f"{name}@{self._tag}" if self._tag else name
        return self._names[name]

    def find(self, name: str) -> str:
        scope: _Scope | None = self
        while scope is not None:
            if name in scope._names:
                return scope._names[name]
            scope = scope._parent
        return name


def _named(name: str, kernel: Kernel) -> Reg | Symbol:
    is_register = name in kernel.registers or name.startswith("%") or name == "_"
    return Reg(name) if is_register else Symbol(name)


def _number(token: _Token) -> Imm:
    text = token.text
    if text[:2] in ("0f", "0F"):
        return Imm(int(text[2:], 16), 32)
    if text[:2] in ("0d", "0D"):
        return Imm(int(text[2:], 16), 64)
    try:
        if "." in text:
            return Imm(int.from_bytes(struct.pack("<f", float(text)), "little"), 32)
        digits = text.removesuffix("U")
        return Imm(int(digits, 8 if re.fullmatch("0[0-7]+", digits) else 0))
    except (ValueError, OverflowError) as error:
        raise _unexpected(token, "a number") from error


def _unexpected(token: _Token, needed: str) -> PtxError:
    return PtxError(f"PTX line {token.line}: got {token.text!r}; needed: {needed}")
