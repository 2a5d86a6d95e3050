"""Kernels picked by name, in the syntax of CUTLASS' `--kernels`, of whole parts of a name.

CUTLASS looks for substrings, by which `g1` is also in `g16`, and `f16` in `bf16`. Here what stands
between underscores counts as a whole.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from itertools import pairwise
from typing import TypeVar

from gqa_cutlass.codegen.config import KernelConfig
from gqa_cutlass.codegen.merge import Kernel, MergeConfig
from gqa_cutlass.codegen.variants import carried, shipped
from gqa_cutlass.errors import ConfigError, shown

_K = TypeVar("_K", bound=Kernel)
_TILE = re.compile(r"_h(\d+)n(\d+)w(\d+)s(\d+)")
_NEAR = 3  # suggestions for what matches nothing
_LONGEST = 200  # characters of a name; of what is longer the beginning is compared


def select(
    filters: str | None,
    configs: Iterable[KernelConfig] | None = None,
    exclude: str | None = None,
) -> list[KernelConfig]:
    """Pick kernels that decode by name.

    Args:
        filters: Comma-separated entries; each is a `*`-separated list of parts of a name that must
            occur in this order, or a kernel's whole name, which need not be shipped. A part is what
            stands between underscores, or several of them (`d128_g1`); of a tile's shape it may be
            one letter with its number (`w8`), and of others the word alone (`align`). None or
            empty picks everything.
        configs: What to pick from; the shipped kernels by default.
        exclude: The same of what to leave out again.

    Raises:
        ConfigError: Nothing matches, or nothing is left.
    """
    pool = shipped() if configs is None else configs
    return _pick(filters, exclude, pool, _named if configs is None else lambda _: None)


def select_any(
    filters: str | None, exclude: str | None = None, configs: Sequence[Kernel] | None = None
) -> list[Kernel]:
    """The same of all kernels, those that merge among them."""
    if configs is not None:
        return _pick(filters, exclude, configs, lambda _: None)
    return _pick(filters, exclude, carried(), lambda name: _named(name) or _merge_named(name))


def kernel_named(name: str) -> Kernel:
    """The kernel of a whole name, shipped or not, or of parts that one shipped kernel alone has.

    Raises:
        ConfigError: It is the name of none, or of several; those that are like it are suggested.
    """
    found = _named(name) or _merge_named(name)
    if found is not None:
        return found
    names = {config.name: config for config in carried()}
    like = [each for each in names if _finds(name[:_LONGEST], each)]
    if len(like) == 1:
        return names[like[0]]
    near = like[:_NEAR] or difflib.get_close_matches(name[:_LONGEST], names, _NEAR)
    raise ConfigError(
        f"kernel name: got {shown(name)}"
        + (f", which {len(like)} kernels have in theirs" if like else "")
        + "; allowed: names as `gqa-cutlass list` prints them, or parts that only one has"
        + (f"; near: {', '.join(near)}" if near else "")
    )


def _pick(
    filters: str | None,
    exclude: str | None,
    configs: Iterable[_K],
    named: Callable[[str], _K | None],
) -> list[_K]:
    pool = list(configs)
    entries = _entries(filters)
    pool += [config for config in map(named, entries) if config and config not in pool]
    picked = _matching("--kernels", filters, entries, pool) if entries else pool
    if not (left_out := _entries(exclude)):
        return picked
    without = _matching("--exclude-kernels", exclude, left_out, pool)
    kept = [config for config in picked if config not in without]
    if not kept:
        raise ConfigError(
            f"--exclude-kernels: got {exclude!r}, which leaves none of {len(picked)} kernels; "
            "allowed: what leaves some"
        )
    return kept


def _entries(filters: str | None) -> list[str]:
    return [entry.strip() for entry in (filters or "").split(",") if entry.strip()]


def _matching(option: str, given: str | None, entries: list[str], pool: list[_K]) -> list[_K]:
    names = {config.name for config in pool}
    whole = names.intersection(entries)  # which may be the beginning of others
    parts = [entry for entry in entries if entry not in whole]
    found = [
        config
        for config in pool
        if config.name in whole or any(_finds(entry, config.name) for entry in parts)
    ]
    if not found:
        near = _near(entries, pool)
        raise ConfigError(
            f"{option}: got {given!r}, which matches none of {len(pool)} kernels; "
            + (f"near: {', '.join(near)}; " if near else "")
            + "`gqa-cutlass list` prints the names"
        )
    return found


def _finds(entry: str, name: str) -> bool:
    """Whether a name has the parts of an entry, in their order."""
    return any(_pattern(entry).search(text) for text in _texts(name))


@cache
def _texts(name: str) -> tuple[str, ...]:
    """A name, and the same with the parts of its tile's shape apart."""
    return tuple(dict.fromkeys((name, _TILE.sub(r"_h\1_n\2_w\3_s\4", name))))


@cache
def _pattern(entry: str) -> re.Pattern[str]:
    """What finds an entry in a name."""
    parts = [part.strip("_") for part in entry.split("*")]
    return re.compile(".*".join(map(_whole, filter(None, parts))))


def _whole(part: str) -> str:
    number = r"\d*" if part[-1].isalpha() else ""
    return rf"(?<![a-z0-9]){re.escape(part)}{number}(?![a-z0-9])"


def _near(entries: list[str], pool: Sequence[Kernel]) -> list[str]:
    """Parts of names, or names, that are like what was not found."""
    parts: dict[str, None] = {}
    for config in pool:
        own = config.name.split("_")
        parts |= dict.fromkeys((*own, *map("_".join, pairwise(own)), config.name))
    found: dict[str, None] = {}
    for entry in entries:
        for part in (part.strip("_") for part in entry.split("*")):
            if part and part not in parts:
                found |= dict.fromkeys(difflib.get_close_matches(part, parts, _NEAR, 0.6))
    return list(found)[:_NEAR]


def _named(name: str) -> KernelConfig | None:
    """The kernel of this name, if it is one."""
    try:
        return KernelConfig.from_name(name)
    except ConfigError:
        return None


def _merge_named(name: str) -> MergeConfig | None:
    """The same of kernels that merge."""
    try:
        return MergeConfig.from_name(name)
    except ConfigError:
        return None
