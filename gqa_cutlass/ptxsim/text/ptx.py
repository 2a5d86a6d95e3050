"""PTX text to instructions. Knows the grammar (PTX ISA 4), not what an instruction does."""

from __future__ import annotations

import re

from gqa_cutlass.errors import PtxError
from gqa_cutlass.ptxsim import limits
from gqa_cutlass.ptxsim.text.scopes import Scope, named
from gqa_cutlass.ptxsim.text.syntax import (
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
from gqa_cutlass.ptxsim.text.tokens import Token, files, number, tokens, unexpected

TARGETS = range(80, 91)  # compute capabilities, times ten
_TARGET = re.compile(r"sm_([0-9]{2,3})a?")
_LOC = re.compile(
    r"\.loc[ \t]+(\d{1,9})[ \t]+(\d{1,9})[ \t]+(\d{1,9})"
    r"(?:.*\binlined_at[ \t]+(\d{1,9})[ \t]+(\d{1,9})[ \t]+(\d{1,9}))?",
    re.ASCII,
)
_SIZES = {"pred": 1} | {f"{kind}{bits}": bits for kind in "busf" for bits in (8, 16, 32, 64)} | {
    "f16x2": 32, "bf16": 16, "bf16x2": 32,
}  # fmt: skip
# Bytes of a variable, by its space; of what lies outside the kernel nobody here takes the address.
_ROOM = {"shared": limits.SHARED, "local": limits.LOCAL, "param": limits.PARAMS}
_MAX_VARIABLE = 1 << 40
_SPACES = (".global", ".shared", ".local", ".param", ".const")
_ENDS = ("ret", "exit", "bra")
_LINKAGE = (".visible", ".extern", ".weak", ".common")
_MAX_INLINED = 16
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


class _Parser:
    """Recursive descent over the tokens of a module."""

    def __init__(self, text: str) -> None:
        self._files = files(text)
        self._tokens = tokens(text)
        self._at = 0
        self._source = ""
        self._labels: dict[int, list[Token]] = {}  # by the position behind an opening brace
        self._inlined: dict[Place, Place | None] = {}  # the call that each place was inlined at

    def kernel(self, name: str) -> Kernel:
        kernel = Kernel(name=name)
        found = False
        while self._at < len(self._tokens):
            token = self._next()
            if token.text == ".entry":
                found |= self._entry(kernel, found)
            elif token.text == ".func":
                self._skip_function()
            elif token.text in _SPACES:
                self._variable(token.text, kernel)
            elif token.text == ".target":
                self._target()
            elif token.text in (".version", ".address_size"):
                self._directive()
            elif token.kind != "loc" and token.text not in _LINKAGE:
                raise unexpected(token, "a function or a variable")
        if not found:
            raise PtxError(f"PTX: got no kernel {name!r}; needed: an .entry of that name")
        return kernel

    def _peek(self) -> Token:
        if self._at >= len(self._tokens):
            line = self._tokens[-1].line if self._tokens else 1
            raise PtxError(
                f"PTX: the text ends at line {line}, inside a kernel or a statement; needed: the "
                "whole module as the compiler wrote it. Compile it again."
            )
        return self._tokens[self._at]

    def _next(self) -> Token:
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
            raise unexpected(token, repr(text))

    def _integer(self) -> int:
        token = self._next()
        found = number(token) if token.kind == "number" else None
        if found is None or found.float_bits:
            raise unexpected(token, "an integer")
        return found.value

    def _name(self, what: str) -> Token:
        token = self._next()
        if token.kind != "word" or token.text.startswith("."):
            raise unexpected(token, what)
        return token

    def _target(self) -> None:
        """Refuse architectures whose instructions this simulator does not know."""
        token = self._peek()
        match = _TARGET.fullmatch(token.text)
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

    def _entry(self, kernel: Kernel, found: bool) -> bool:
        token = self._next()
        if token.text != kernel.name:
            self._skip_function()
            return False
        if found:
            raise unexpected(token, "one kernel of that name")
        scope = Scope(None, "", kernel)
        if self._accept("("):
            while not self._accept(")"):
                self._expect(".param")
                self._variable(".param", kernel, end=(",", ")"), scope=scope)
                self._accept(",")
        while not self._accept("{"):
            self._entry_directive(kernel)
        self._find_labels()
        self._body(kernel, scope)
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
        token = self._next()
        if token.text == ".pragma":
            self._skip_pragma()
            return
        if not token.text.startswith("."):
            raise unexpected(token, "'{' or a directive")
        values: list[int] = []
        while self._peek().kind == "number":
            if len(values) == limits.DIMENSIONS:
                raise unexpected(self._peek(), f"at most {limits.DIMENSIONS} numbers")
            values.append(self._integer())
            self._accept(",")
        kernel.directives[token.text.removeprefix(".")] = tuple(values)

    def _skip_pragma(self) -> None:
        while self._next().text != ";":
            pass

    def _variable(
        self, space: str, kernel: Kernel, end: tuple[str, ...] = (";",), scope: Scope | None = None
    ) -> None:
        """What follows `.shared` and the like."""
        align, bits, count = 0, 0, 1
        name: Token | None = None
        initial: list[int] = []
        while self._peek().text not in end:
            token = self._next()
            if token.text == ".align":
                align = self._alignment()
            elif token.text == ".ptr":  # what is said of the memory that the pointer points to
                while self._peek().text.startswith("."):
                    if self._next().text == ".align":
                        self._alignment()
            elif token.text[:1] == "." and token.text[1:] in _SIZES and not bits:
                bits = _SIZES[token.text[1:]]
            elif token.text in (".v2", ".v4"):
                count *= int(token.text[2:])
            elif token.text == "[":
                count *= 0 if self._peek().text == "]" else self._integer()
                self._expect("]")
            elif token.text == "=":
                initial = self._initial(end)
            elif token.kind == "word" and not token.text.startswith(".") and name is None:
                name = token
            else:
                raise unexpected(token, "a variable")
            room = _ROOM.get(space[1:], _MAX_VARIABLE)
            if count * max(bits, 8) // 8 > room:
                raise unexpected(token, f"a variable of at most {room} bytes")
        last = self._peek()
        if name is None or not bits:
            raise unexpected(last, "the name and the type of a variable")
        if ";" in end:
            self._expect(";")
        width = max(bits, 8) // 8
        if len(initial) > count:
            raise unexpected(last, f"at most {count} values")
        data = b"".join((value % (1 << 8 * width)).to_bytes(width, "little") for value in initial)
        unique = scope.declare(name) if scope else name.text
        kernel.variables[unique] = Variable(
            space=space[1:], align=align or width, size=count * width, initial=data
        )

    def _alignment(self) -> int:
        token = self._peek()
        align = self._integer()
        if align == 0 or align & align - 1:
            raise unexpected(token, f"an alignment that is a power of two, not {align},")
        return align

    def _initial(self, end: tuple[str, ...]) -> list[int]:
        values: list[int] = []
        sign = 1
        while self._peek().text not in end:
            token = self._next()
            if token.kind == "number":
                values.append(sign * number(token).value)
            sign = -1 if token.text == "-" else 1
        return values

    def _body(self, kernel: Kernel, scope: Scope) -> None:
        """Statements up to the closing brace."""
        for label in self._labels.get(self._at, ()):
            scope.declare(label)
        while not self._accept("}"):
            token = self._next()
            if token.kind == "loc":
                self._locate(token.text)
            elif token.text == "{":
                if scope.depth == limits.BRACES:
                    raise unexpected(token, f"at most {limits.BRACES} levels of braces")
                self._body(kernel, Scope(scope, f"{token.line}.{self._at}", kernel))
            elif token.text == ".reg":
                self._registers(kernel, scope)
            elif token.text == ".param":
                raise unexpected(token, "a statement; functions cannot be called here")
            elif token.text in _SPACES:
                self._variable(token.text, kernel, scope=scope)
            elif token.text == ".pragma":
                self._skip_pragma()
            elif token.text != ";":
                self._statement(token, kernel, scope)

    def _find_labels(self) -> None:
        """Find the labels of every pair of braces in the body: branches may go forward."""
        self._labels.clear()
        inside = [self._at]
        for i in range(self._at, len(self._tokens)):
            text = self._tokens[i].text
            if text == "{":
                inside.append(i + 1)
            elif text == "}":
                inside.pop()
                if not inside:
                    return
            elif text == ":" and self._tokens[i - 1].kind == "word":
                self._labels.setdefault(inside[-1], []).append(self._tokens[i - 1])

    def _locate(self, text: str) -> None:
        """Read a `.loc`: where the next instructions come from."""
        match = _LOC.match(text)
        if match is None:
            return
        numbers = [int(digits or 0) for digits in match.groups()]
        place: Place | None = (numbers[0], numbers[1], numbers[2])
        call = (numbers[3], numbers[4], numbers[5]) if match.group(4) else None
        self._inlined[(numbers[0], numbers[1], numbers[2])] = call
        places: list[str] = []
        while place is not None and place[1] and len(places) < _MAX_INLINED:
            places.append(f"{self._files.get(place[0], '?')}:{place[1]}")
            place = self._inlined.get(place)
        self._source = ", inlined at ".join(places)

    def _registers(self, kernel: Kernel, scope: Scope) -> None:
        kind = self._next()
        width = _SIZES.get(kind.text[1:]) if kind.text.startswith(".") else None
        if width is None:
            raise unexpected(kind, "the type of registers")
        while True:
            token = self._name("the name of a register")
            many = self._accept("<")
            count = self._integer() if many else 1
            if len(kernel.registers) + count > limits.REGISTERS:
                raise unexpected(token, f"at most {limits.REGISTERS} registers")
            if many:
                self._expect(">")
            for i in range(count):
                name = token._replace(text=f"{token.text}{i}") if many else token
                kernel.registers[scope.declare(name, again=True)] = width
            if self._accept(";"):
                return
            self._expect(",")

    def _statement(self, token: Token, kernel: Kernel, scope: Scope) -> None:
        if token.kind == "word" and self._accept(":"):
            kernel.labels[scope.find(token.text)] = len(kernel.instructions)
            return
        guard, negated = None, False
        if token.text == "@":
            negated = self._accept("!")
            guard = self._register(scope)
            token = self._next()
        if token.kind != "word" or not token.text[0].isalpha():
            raise unexpected(token, "an instruction")
        if len(kernel.instructions) == limits.INSTRUCTIONS:
            raise unexpected(token, f"at most {limits.INSTRUCTIONS} instructions")
        operands: list[Operand] = []
        if not self._accept(";"):
            operands.append(self._operand(scope))
            while not self._accept(";"):
                self._expect(",")
                if len(operands) == limits.OPERANDS:
                    raise unexpected(self._peek(), f"at most {limits.OPERANDS} operands")
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

    def _register(self, scope: Scope) -> Reg:
        token = self._next()
        if token.kind != "word":
            raise unexpected(token, "a register")
        return Reg(scope.find(token.text))

    def _operand(self, scope: Scope) -> Operand:
        operand = self._simple(scope)
        return Pair(operand, self._simple(scope)) if self._accept("|") else operand

    def _simple(self, scope: Scope) -> Operand:
        token = self._next()
        if token.text == "{":
            return self._vector(scope)
        if token.text == "[":
            return self._address(scope)
        if token.text == "!":
            return Not(self._register(scope))
        if token.text == "-" and self._peek().kind == "number":
            found = number(self._next())
            if found.float_bits:
                return Imm(found.value ^ _SIGNS[found.float_bits], found.float_bits)
            return Imm(-found.value)
        if token.kind == "number":
            return number(token)
        if token.kind == "word":
            return named(scope.find(token.text), scope.kernel)
        raise unexpected(token, "an operand")

    def _vector(self, scope: Scope) -> Vector:
        items: list[Operand] = []
        while True:
            if self._peek().text in ("{", "["):
                raise unexpected(self._peek(), "an operand")
            if len(items) == limits.ITEMS:
                raise unexpected(self._peek(), f"at most {limits.ITEMS} operands in braces")
            items.append(self._simple(scope))
            if self._accept("}"):
                return Vector(tuple(items))
            self._expect(",")

    def _address(self, scope: Scope) -> Address:
        base: Reg | Symbol | None = None
        offset = 0
        if self._peek().kind == "number":
            offset = self._integer()
        else:
            token = self._name("a register or a variable")
            base = named(scope.find(token.text), scope.kernel)
        while not self._accept("]"):
            sign = self._next()
            if sign.text == ",":
                self._expect("{")
                coordinates = self._vector(scope).items
                self._expect("]")
                return Address(base, offset, coordinates)
            if sign.text not in ("+", "-"):
                raise unexpected(sign, "']' or an offset")
            negative = (sign.text == "-") ^ self._accept("-")
            offset += -self._integer() if negative else self._integer()
            if not -limits.OFFSETS <= offset < limits.OFFSETS:
                raise unexpected(sign, "an offset of at most 63 bits")
        return Address(base, offset)
