"""The command that says which kernel a decode step would run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from gqa_cutlass.cli.options import CacheDType, Json, Model, Tp, fraction, number
from gqa_cutlass.cli.output import say, say_json, say_labelled
from gqa_cutlass.cli.picking import archs_of, cache_dtype_of, choose, dtypes_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from gqa_cutlass.ahead import Explanation
    from gqa_cutlass.codegen.models import LayerType
    from gqa_cutlass.codegen.schema.kinds import DType

_INDENT = 11  # of the text behind the labels
_ADDRESSES = 2**63 - 1  # bytes, more than which no tensor has


@dataclass(frozen=True, kw_only=True)
class _Call:
    """What a call adds to the layers."""

    batch: int
    max_seq_len: int
    max_seqlen: int | None
    page_size: int
    cache_dtype: str | None
    token_scales: bool
    ragged: bool
    dependent: bool


def explain(
    q_heads: Annotated[int | None, number("Query heads.")] = None,
    kv_heads: Annotated[int | None, number("KV heads.")] = None,
    head_dim: Annotated[int | None, number("Dimension per head.")] = None,
    model: Model = None,
    tp: Tp = None,
    batch: Annotated[int, number("Sequences.")] = 1,
    max_seq_len: Annotated[int, number("Tokens that the cache holds.")] = 4096,
    max_seqlen: Annotated[
        int | None, number("Tokens of the longest sequence after the step. Default: any number.")
    ] = None,
    page_size: Annotated[int, number("Tokens of a page. 0: caches in one piece.")] = 0,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="float16, bfloat16 or both, with a comma. Default: the model's; of sizes float16."
        ),
    ] = None,
    cache_dtype: CacheDType = None,
    token_scales: Annotated[
        bool,
        typer.Option(
            "--token-scales", help="With --cache-dtype: a scale for every token and KV head."
        ),
    ] = False,
    arch: Annotated[
        str | None,
        typer.Option(
            "--arch",
            help="Comma-separated targets, or `all`. Default: sm_90a, or that of --gpu.",
        ),
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option(
            help="Name of a GPU whose table of launches counts: 'NVIDIA H200'. Default: the one "
            "at hand, if it is of the target."
        ),
    ] = None,
    ragged: Annotated[
        bool,
        typer.Option(help="Whether lengths may differ much. Not where calls have one for all."),
    ] = True,
    dependent: Annotated[
        bool, typer.Option(help="Start while the kernel before finishes, where it pays.")
    ] = False,
    window: Annotated[int, number("Tokens attended to, the new one included. 0: all.")] = 0,
    softcap: Annotated[float, fraction("Bound of the scores. 0: none.")] = 0,
    sinks: Annotated[bool, typer.Option("--sinks", help="One more logit per query head.")] = False,
    alibi: Annotated[bool, typer.Option("--alibi", help="A bias by distance.")] = False,
    as_json: Json = False,
) -> None:
    """Say which kernel a decode step would run, why, and how it is launched.

    Of sizes (--q-heads, --kv-heads, --head-dim), or of every type of layers of a --model. Calls
    take what a table of launches of their GPU (`gqa-cutlass tune`) says of them, or else what the
    model says; `decided` says which it was, and `left out` why a launch of a table cannot be.
    """
    from gqa_cutlass.codegen.models import LayerType
    from gqa_cutlass.codegen.schema.kinds import DType
    from gqa_cutlass.errors import InputError

    chosen = choose("explain", model, tp, dtype)
    if token_scales and cache_dtype is None:
        raise InputError("explain: --token-scales: got caches of 16 bits; allowed: --cache-dtype.")
    call = _Call(
        batch=batch, max_seq_len=max_seq_len, max_seqlen=max_seqlen, page_size=page_size,
        cache_dtype=cache_dtype_of("explain", cache_dtype), token_scales=token_scales,
        ragged=ragged, dependent=dependent,
    )  # fmt: skip
    asked: dict[str, tuple[LayerType, DType]]
    if chosen is None:
        if q_heads is None or kv_heads is None or head_dim is None:
            raise InputError(
                "explain: Missing option --model, or all of --q-heads, --kv-heads and --head-dim."
            )
        layers = LayerType(
            name="", num_q_heads=q_heads, num_kv_heads=kv_heads, head_dim=head_dim, window=window,
            softcap=softcap, sinks=sinks, alibi=alibi,
        )  # fmt: skip
        types = dtypes_of("explain", dtype) or (DType.F16,)
        asked = {f"{kind}": (layers, kind) for kind in types}
    elif q_heads or kv_heads or head_dim or window or softcap or sinks or alibi:
        raise InputError(
            "explain: --model: got sizes or features as well; the model says them. Leave them out."
        )
    else:
        asked = {
            f"{each.layers.name}, tp {each.tp}, {each.dtype}": (each.layers, each.dtype)
            for each in chosen.layers
        }
    places = list(_places(arch, gpu))
    found = [
        (what, _explain(layers, kind, call, *place))
        for what, (layers, kind) in asked.items()
        for place in places
    ]
    if as_json:
        rows = [{"for": what, **each.facts()} for what, each in found]
        say_json({"model": chosen.model.source if chosen else None, "explanations": rows})
        return
    for position, (what, each) in enumerate(found):
        if len(found) > 1:
            say("\n" * (position > 0) + f"{what}, {each.device.arch.name}")
        say_labelled(str(each), _INDENT)


def _places(arch: str | None, gpu: str | None) -> Iterator[tuple[str | None, str | None]]:
    """Targets, and names of GPUs whose tables count there."""
    from gqa_cutlass.devices import at_hand

    if gpu is not None and arch is None:
        yield None, gpu
        return
    here = {} if gpu else {device.arch.name: device.name for device in reversed(at_hand())}
    for target in archs_of(arch or "sm_90a"):
        yield target, gpu or here.get(target)


def _explain(
    layers: LayerType, dtype: DType, call: _Call, arch: str | None, gpu: str | None
) -> Explanation:
    """What a call of such sizes would run."""
    import torch

    from gqa_cutlass.ahead import explain as explain_call
    from gqa_cutlass.sizes import check_room, check_sizes

    batch, kv_heads, head_dim = call.batch, layers.num_kv_heads, layers.head_dim
    check_sizes("explain", batch=batch, max_seq_len=call.max_seq_len, q_heads=layers.num_q_heads,
                kv_heads=kv_heads, head_dim=head_dim, window=layers.window)  # fmt: skip
    if call.max_seqlen is not None:
        check_sizes("explain", max_seqlen=call.max_seqlen)
    check_room(
        "explain", "max_seq_len", call.max_seq_len, least=1, each=4 * batch * kv_heads * head_dim,
        fixed=0, room=_ADDRESSES, where="what can be addressed",
    )  # fmt: skip
    kind = getattr(torch, {"f16": "float16", "bf16": "bfloat16"}[dtype])
    stored = getattr(torch, call.cache_dtype) if call.cache_dtype else kind
    value_dim = layers.head_dim_v or head_dim

    def empty(*shape: int, dtype: torch.dtype = kind) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    rows, length, table = batch, call.max_seq_len, None
    if call.page_size:
        pages, length = _pages(call), call.page_size
        rows, table = batch * pages, empty(batch, pages, dtype=torch.int32)
    per_head = empty(layers.num_q_heads, dtype=torch.float32)
    scales = empty(rows, length, kv_heads, dtype=torch.float32) if call.token_scales else None
    return explain_call(
        empty(batch, layers.num_q_heads, head_dim),
        empty(rows, length, kv_heads, head_dim, dtype=stored),
        empty(rows, length, kv_heads, value_dim, dtype=stored),
        empty(batch, kv_heads, head_dim), empty(batch, kv_heads, value_dim),
        ragged=call.ragged, dependent=call.dependent, max_seqlen=call.max_seqlen, arch=arch,
        gpu=gpu,
        window_size=(layers.window - 1, 0), softcap=layers.softcap,
        sinks=per_head if layers.sinks else None, alibi_slopes=per_head if layers.alibi else None,
        block_table=table, k_scale=scales, v_scale=scales,
    )  # fmt: skip


def _pages(call: _Call) -> int:
    """Pages of a sequence.

    Raises:
        InputError: The page size is no such.
    """
    from gqa_cutlass.errors import InputError

    if not 0 < call.page_size <= call.max_seq_len:
        raise InputError(
            f"explain: page_size: got {call.page_size}; allowed: 0 (caches in one piece) to "
            f"max_seq_len, which is {call.max_seq_len}."
        )
    return -(-call.max_seq_len // call.page_size)
