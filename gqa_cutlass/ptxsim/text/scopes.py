"""Which name means what where: names between braces, and what they are names of."""

from __future__ import annotations

from gqa_cutlass.ptxsim.text.syntax import Kernel, Reg, Symbol
from gqa_cutlass.ptxsim.text.tokens import Token, unexpected


class Scope:
    """Names declared between braces; inline assembly declares the same ones over and over."""

    def __init__(self, parent: Scope | None, tag: str, kernel: Kernel) -> None:
        self.kernel = kernel
        self.depth: int = parent.depth + 1 if parent else 0
        self._parent = parent
        self._tag = tag
        self._names: dict[str, str] = {}

    def declare(self, token: Token, *, again: bool = False) -> str:
        """The name by which the kernel knows what is declared here.

        Args:
            token: The name here.
            again: Whether it may be declared already.

        Raises:
            PtxError: There is something of that name between these braces.
        """
        name = token.text
        if name in self._names and not again:
            raise unexpected(token, "a name that is not declared yet")
        self._names[name] = f"{name}@{self._tag}" if self._tag else name
        return self._names[name]

    def find(self, name: str) -> str:
        """The name by which the kernel knows what is called so here."""
        scope: Scope | None = self
        while scope is not None:
            if name in scope._names:
                return scope._names[name]
            scope = scope._parent
        return name


def named(name: str, kernel: Kernel) -> Reg | Symbol:
    """A register, or a symbol, by what its name is."""
    is_register = name in kernel.registers or name.startswith("%") or name == "_"
    return Reg(name) if is_register else Symbol(name)
