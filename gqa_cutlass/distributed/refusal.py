"""What calls over shards say of what they refuse."""

from __future__ import annotations

from typing import NoReturn

from gqa_cutlass.errors import InputError


def refuse(what: str, got: str, allowed: str) -> NoReturn:
    """Raise InputError for an argument."""
    raise InputError(
        f"decode_context_parallel: {what}: got {got}; allowed: {allowed}. Nothing was launched."
    )
