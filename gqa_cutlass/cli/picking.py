"""Which kernels the options of a command mean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gqa_cutlass.cli.output import print_table, say
from gqa_cutlass.cli.table import Column

if TYPE_CHECKING:
    from gqa_cutlass.codegen import DType, Kernel, KernelConfig
    from gqa_cutlass.codegen.model_kernels import Ranked
    from gqa_cutlass.codegen.models import Attention, LayerType

_DTYPES = {
    "float16": "f16", "f16": "f16", "fp16": "f16", "half": "f16", "bfloat16": "bf16",
    "bf16": "bf16",
}  # fmt: skip
_MOST_RANKS = 1024
_LAYERS = (
    Column(head="layers"),
    Column(head="count", number=True),
    Column(head="tp", number=True),
    Column(head="query", unit="heads", number=True),
    Column(head="KV", unit="heads", number=True),
    Column(head="head_dim", number=True),
    Column(head="dtype", keep=0),
    Column(head="with"),
)


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """What `--model`, `--tp` and `--dtype` mean.

    Args:
        model: The model.
        layers: Its layers by ranks and types.
    """

    model: Attention
    layers: tuple[Ranked, ...]

    def kernels(self, *, paged: bool = False, dependent: bool = False) -> list[KernelConfig]:
        """Its kernels."""
        from gqa_cutlass.codegen.model_kernels import kernels_of

        return kernels_of(self.layers, paged=paged, dependent=dependent)

    def show(self) -> None:
        """Print what it is: a row per type of layers, number of ranks and type."""
        say(" from ".join(dict.fromkeys((self.model.name, self.model.source))))
        rows = [
            [
                each.layers.name, str(each.layers.num_layers or "-"), str(each.tp),
                str(each.layers.num_q_heads), str(each.layers.num_kv_heads),
                "/".join(map(str, filter(None, (each.layers.head_dim, each.layers.head_dim_v)))),
                each.dtype, ", ".join(asked_by(each.layers)),
            ]
            for each in self.layers
        ]  # fmt: skip
        print_table(_LAYERS, rows)
        if self.model.others:
            say(f"layers of {', '.join(self.model.others)} run no kernel of these")
        say("")


def asked_by(layers: LayerType) -> list[str]:
    """What layers ask for beyond plain attention."""
    return [
        *([f"window {layers.window}"] if layers.window else []),
        *([f"softcap {layers.softcap:g}"] if layers.softcap else []),
        *(["sinks"] if layers.sinks else []),
        *(["alibi"] if layers.alibi else []),
    ]


def choose(command: str, model: str | None, tp: str | None, dtype: str | None) -> Chosen | None:
    """The model that options name; None without one.

    Raises:
        InputError: There is no such model, or its heads are not divided so.
    """
    from gqa_cutlass.codegen.model_config import find_model
    from gqa_cutlass.codegen.model_kernels import ranked
    from gqa_cutlass.errors import InputError

    types, ranks = dtypes_of(command, dtype), _ranks(tp)
    if model is None:
        if tp is not None:
            raise InputError("--tp: got ranks, and no model to divide; name one with --model.")
        return None
    found = find_model(model)
    return Chosen(model=found, layers=tuple(ranked(found, ranks, types)))


def pick(
    command: str, *, model: Chosen | None, dtype: str | None, kernels: str | None,
    exclude: str | None, paged: bool = False, dependent: bool = False,
) -> list[Kernel]:  # fmt: skip
    """The kernels that options mean: of a model, or of all that are shipped.

    Raises:
        GqaError: There are none.
    """
    from gqa_cutlass.codegen import KernelConfig, select_any
    from gqa_cutlass.errors import ConfigError, InputError

    if model is not None:
        return select_any(kernels, exclude, model.kernels(paged=paged, dependent=dependent))
    if paged:
        raise InputError("--paged: got no model; name one with --model, or kernels with --kernels.")
    picked = select_any(kernels, exclude)
    if types := dtypes_of(command, dtype):
        picked = [k for k in picked if isinstance(k, KernelConfig) and k.dtype in types]
        if not picked:
            raise ConfigError(f"--dtype: got {dtype!r}, which none of these kernels has")
    return picked


def dtypes_of(command: str, given: str | None) -> tuple[DType, ...]:
    """The types of an option, each once; none where it is not given.

    Raises:
        InputError: Kernels have no such type.
    """
    from gqa_cutlass.codegen import DType
    from gqa_cutlass.errors import InputError

    if given is None:
        return ()
    names = [entry.strip().lower() for entry in given.split(",")]
    if wrong := [name for name in names if name not in _DTYPES]:
        raise InputError(f"{command}: dtype: got {wrong[0]!r}; allowed: float16, bfloat16.")
    return tuple(dict.fromkeys(DType(_DTYPES[name]) for name in names))


def cache_dtype_of(command: str, given: str | None) -> str | None:
    """The type of 8 bits that `--cache-dtype` names; None: caches have that of queries.

    Raises:
        InputError: Caches have no such type.
    """
    from gqa_cutlass.codegen.schema.policies import FP8
    from gqa_cutlass.errors import InputError, shown

    names = [str(policy.feature) for policy in FP8]
    if given not in (None, *names):
        raise InputError(
            f"{command}: --cache-dtype: got {shown(given)}; allowed: {', '.join(names)}, or no "
            "such option for caches of 16 bits."
        )
    return given


def _ranks(given: str | None) -> tuple[int, ...]:
    """Numbers of ranks, each once; one rank where the option is not given.

    Raises:
        InputError: One is no such number.
    """
    from gqa_cutlass.errors import InputError, shown

    entries = ["1"] if given is None else [entry.strip() for entry in given.split(",")]
    for entry in entries:
        number = len(entry) < 5 and entry.isascii() and entry.isdigit()
        if not number or not 1 <= int(entry) <= _MOST_RANKS:
            raise InputError(
                f"--tp: got {shown(entry)}; allowed: whole numbers from 1 to {_MOST_RANKS}, with "
                "commas between them."
            )
    return tuple(dict.fromkeys(map(int, entries)))


def for_archs(
    kernels: Sequence[Kernel], archs: Sequence[str], given: str
) -> list[tuple[Kernel, str]]:
    """Kernels with the targets that they can be compiled for.

    Raises:
        ConfigError: A target is unknown, or none of them is for any.
    """
    from gqa_cutlass.codegen.compile import compiles_for
    from gqa_cutlass.errors import ConfigError

    wanted = [(config, arch) for arch in archs for config in kernels if compiles_for(config, arch)]
    if not wanted:
        allowed = dict.fromkeys(arch for config in kernels for arch in config.archs)
        raise ConfigError(
            f"--arch: got {given!r}, which none of these kernels is for; allowed: "
            f"{', '.join(allowed)}"
        )
    return wanted


def archs_of(given: str) -> list[str]:
    """The targets that --arch names, each once."""
    from gqa_cutlass.codegen import ARCHES

    names = ARCHES if given == "all" else [entry.strip() for entry in given.split(",")]
    return list(dict.fromkeys(names))
