"""Dataclasses from parsed JSON that may be anything: every value against its annotation."""

from __future__ import annotations

import types
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any, get_args, get_origin, get_type_hints

_LEAST, _MOST = 1e-12, 1e12  # of a figure that makes sense, in any unit of a record


def parsed(hint: Any, value: object, where: str) -> Any:
    """What an annotation says, made of what was parsed.

    Args:
        hint: A dataclass, list, dictionary by text, text or number; or one of them or None.
        value: What was parsed.
        where: Where it was, for errors.

    Raises:
        ValueError: It is something else, or a number that is not positive or makes no sense.
    """
    if is_dataclass(hint):
        return _object(hint, value, where)
    if isinstance(hint, types.UnionType):
        return None if value is None else parsed(get_args(hint)[0], value, where)
    if get_origin(hint) is list and isinstance(value, list):
        (kind,) = get_args(hint)
        return [parsed(kind, item, f"{where}[{i}]") for i, item in enumerate(value)]
    if get_origin(hint) is dict and isinstance(value, dict):
        key, kind = get_args(hint)
        return {parsed(key, k, where): parsed(kind, v, f"{where}: {k!r}") for k, v in value.items()}
    if not _is_scalar(hint, value):
        raise ValueError(f"{where}: got {repr(value)[:80]}; allowed: {_NAMES.get(hint, hint)}")
    return value


_NAMES: dict[Any, str] = {
    str: "printable text",
    int: "a positive integer",
    float: f"a number from {_LEAST:g} to {_MOST:g}",
}


def _is_scalar(hint: Any, value: object) -> bool:
    if hint is str:
        return isinstance(value, str) and value.isprintable()
    kinds = (int, float) if hint is float else (hint,)
    return type(value) in kinds and isinstance(value, int | float) and _LEAST <= value <= _MOST


def _object(kind: Any, value: object, where: str) -> Any:
    if not isinstance(value, dict):
        raise ValueError(f"{where}: got {repr(value)[:80]}; allowed: an object")
    hints, known = get_type_hints(kind), {field.name: field for field in fields(kind)}
    lacking = [name for name, field in known.items() if _is_required(field) and name not in value]
    unknown = [name for name in value if name not in known]
    if lacking or unknown:
        reason = f"lacks {lacking[0]!r}" if lacking else f"has {unknown[0]!r}, which is not known"
        raise ValueError(f"{where}: {reason}")
    return kind(**{name: parsed(hints[name], v, f"{where}: {name}") for name, v in value.items()})


def _is_required(field: Field[Any]) -> bool:
    return field.default is MISSING and field.default_factory is MISSING
