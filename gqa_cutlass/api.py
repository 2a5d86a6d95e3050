"""The public calls: validate, then dispatch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal, Unpack, overload

import torch
from torch import Tensor

from gqa_cutlass.call.executor import Executor
from gqa_cutlass.call.given import see
from gqa_cutlass.call.layout import DTYPES, check_sizes, problem_of
from gqa_cutlass.call.options import (
    TENSORS,
    CallOptions,
    PlanOptions,
    check,
    check_options,
    check_softcap,
    features_of,
    listed,
)
from gqa_cutlass.call.plan import Pair, Plan, Result
from gqa_cutlass.call.plans import Plans
from gqa_cutlass.codegen.config import ARCHES, KernelConfig
from gqa_cutlass.codegen.schema.arguments import ARGUMENTS
from gqa_cutlass.codegen.schema.problem import WIDEST, Problem
from gqa_cutlass.dispatch import Device, Dispatch, choose_config, dispatch, model_device
from gqa_cutlass.errors import DeviceError, InputError, shown
from gqa_cutlass.gpu.driver import describe_device, load
from gqa_cutlass.gpu.executor import gpu_executor
from gqa_cutlass.kernels.store import Store
from gqa_cutlass.tensors import Flaw, flaw
from gqa_cutlass.tracing import is_traced, untraced

_DEFAULT_STREAMS, _PER_THREAD_STREAM = (0, 1), 2  # names of streams, not their addresses
_MAX_HANDLE = 2**64
_FEATURES, _FIRST_FEATURE = frozenset(TENSORS), len(ARGUMENTS.rows)


def _executor_of(device: torch.device) -> Executor:
    """Where the kernel for tensors on a device runs."""
    if device.type == "cuda":
        return gpu_executor(_gpu_index(device))
    if device.type == "cpu":
        from gqa_cutlass.cpu.executor import cpu_executor  # which only CPU tensors need

        return cpu_executor()
    raise DeviceError(
        f"gqa_decode: got tensors on {device}; allowed: an NVIDIA GPU of compute capability 8.0 or "
        "newer, or the CPU (simulated, slow). Move q, the cache, k and v there with .to('cuda')."
    )


_PLANS = Plans(_executor_of)


@overload
def gqa_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    cache_seqlens: int | Tensor,
    return_lse: Literal[False] = False,
    **options: Unpack[CallOptions],
) -> Tensor: ...
@overload
def gqa_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    cache_seqlens: int | Tensor,
    return_lse: Literal[True],
    **options: Unpack[CallOptions],
) -> Pair: ...
@overload
def gqa_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    cache_seqlens: int | Tensor,
    return_lse: bool,
    **options: Unpack[CallOptions],
) -> Result: ...
@listed(CallOptions)
def gqa_decode(  # noqa: D417 - the decorator completes the list
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    cache_seqlens: int | Tensor,
    softmax_scale: float | None = None,
    num_splits: int = 0,
    return_lse: bool = False,
    ragged: bool = True,
    out: Tensor | None = None,
    **features: Any,
) -> Result:
    """Run one decode step: append the new token's K and V, then attend over everything cached.

    One kernel launch on the current stream; no synchronisation. Can be captured into a CUDA graph,
    with lengths that change between replays when `cache_seqlens` is a tensor. The caller advances
    the lengths. CPU tensors run through the same dispatch and kernel in ptxsim, which interprets
    the kernel's PTX: for tests and trying things out, a fraction of a second per call and more.

    Tensors are plain and dense, parameters and views included: no wrappers of torch.func, negated
    views (call `.resolve_neg()`) or subclasses with `__torch_dispatch__`.

    Args:
        q: Queries of the new token, float16 or bfloat16, [batch, num_q_heads, head_dim] or
            [batch, 1, num_q_heads, head_dim]. head_dim is a multiple of 8 from 32 to 256.
        k_cache: [batch, max_seq_len, num_kv_heads, head_dim], dtype of q; any strides with a
            contiguous last dimension (an HND cache is a transposed view). num_kv_heads divides
            num_q_heads. Written at position cache_seqlens[b] when k is given.
        v_cache: As k_cache.
        k: The new token's keys, [batch, num_kv_heads, head_dim] or
            [batch, 1, num_kv_heads, head_dim]. None: attend only, append nothing.
        v: As k. The row of a cache that is written must not hold q, k, v or cache_seqlens; with
            lengths on the device, no row of a cache that is appended to may. This is told by
            addresses: memory that is mapped twice is not seen.
        cache_seqlens: Tokens in the cache before this call: one int for all sequences, or
            int32 [batch] on q's device, which the host never reads. A negative one there makes its
            row inactive, as the rows that pad the batch of a CUDA graph are: nothing is read of its
            cache or written to it, and it has nothing to attend to.
        return_lse: Also return the logarithm of the softmax's denominator.
        **features: `Options`.

    Returns:
        The output, shaped and typed as q; with return_lse also float32 [batch, num_q_heads], the
        natural logarithm of the sum of the exponentials of the scaled (and capped) scores, and of
        the sinks. A sequence with nothing to attend to gives zeros and minus infinity, or the sink.

    Raises:
        InputError: An argument is not allowed. Nothing was launched.
        CacheOverflowError: The new token does not fit. With lengths on the device this is found by
            the kernel: that sequence's output is NaN, its cache is untouched, and a later call (or
            `check_overflow`) raises.
        DeviceError: No usable GPU, for tensors on one.
        GqaError: Compiling, storing or launching the kernel failed; see `gqa_cutlass.errors`.

    Source: Ainslie et al., "GQA" (arXiv:2305.13245); split over the sequence as in Flash-Decoding.
    """
    given: tuple[Any, ...] = q, k_cache, v_cache, k, v, out, cache_seqlens
    quick: tuple[object, ...] | None = None
    known: Sequence[Plan] = ()
    if not is_traced():
        try:
            # With types, for True == 1 would find the plans of 1.
            quick = (
                k_cache.shape, softmax_scale, type(softmax_scale), num_splits, type(num_splits),
                return_lse, type(return_lse), ragged, type(ragged), torch.is_grad_enabled(),
            )  # fmt: skip
            if features:
                tensors = features_of(features)
                given += tensors
                quick += *map(type, tensors), *features.items(), *map(type, features.values())
            known = _PLANS.latest.get(quick, ())
        except Exception:  # no tensor, or no options: `Plans.find` says what is wrong
            quick = None
        for made in known:
            argument = made.bind_quickly(given)
            if argument is not None:
                return made.launch(given, argument)
    options = {
        "softmax_scale": softmax_scale, "num_splits": num_splits, "return_lse": return_lse,
        "ragged": ragged, **features,
    }  # fmt: skip
    if is_traced() or torch.compiler.is_compiling():  # by torch.export, which may do without Dynamo
        return _traced(given, options)
    made, argument = _PLANS.find("gqa_decode", given, options, quick)
    return made.launch(given, argument)


def _traced(given: tuple[Any, ...], options: dict[str, Any]) -> Result:
    """The call as an operator of torch; registered when torch first traces it."""
    from gqa_cutlass import ops

    *tensors, cache_seqlens = given[:_FIRST_FEATURE]
    features = dict(zip(TENSORS, given[_FIRST_FEATURE:], strict=False))
    return ops.traced(tuple(tensors), cache_seqlens, **options, **features)


@overload
def plan(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    cache_seqlens: int | Tensor,
    return_lse: Literal[False] = False,
    **options: Unpack[PlanOptions],
) -> Plan[Tensor]: ...
@overload
def plan(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    cache_seqlens: int | Tensor,
    return_lse: Literal[True],
    **options: Unpack[PlanOptions],
) -> Plan[Pair]: ...
@overload
def plan(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    cache_seqlens: int | Tensor,
    return_lse: bool,
    **options: Unpack[PlanOptions],
) -> Plan: ...
@untraced
@listed(PlanOptions)
def plan(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    cache_seqlens: int | Tensor,
    return_lse: bool = False,
    out: Tensor | None = None,
    **options: Any,
) -> Plan:
    """Resolve everything about a problem once: validate, choose, compile and load the kernel.

    Launches nothing. The plan is then called as `plan(q, k_cache, v_cache, k, v, cache_seqlens,
    out)` with tensors laid out like these; others, such as sinks, it keeps for every call.

    Args:
        q: As for `gqa_decode`, as is all that follows unless it says otherwise.
        k_cache: As for `gqa_decode`.
        v_cache: As for `gqa_decode`.
        k: As for `gqa_decode`.
        v: As for `gqa_decode`.
        cache_seqlens: As for `gqa_decode`; whether it is an int or a tensor is part of the plan.
        return_lse: As for `gqa_decode`.
        out: As for `gqa_decode`; whether and how it is laid out is part of the plan.
        **options: `PlanOptions`.

    Raises:
        GqaError: As for `gqa_decode`.
    """
    given = q, k_cache, v_cache, k, v, out, cache_seqlens, *features_of(options)
    made, _ = _PLANS.find("plan", given, options | {"return_lse": return_lse}, own=True)
    return made


@dataclass(frozen=True, kw_only=True)
class GQADecodeConfig:
    """Sizes of one decode step: its batch and heads, the tokens cached, the cache's capacity.

    Args:
        batch_size: Sequences.
        cache_len: Tokens in every sequence's cache before the call, 0 to max_seq_len - 1.
        num_q_heads: Query heads.
        num_kv_heads: KV heads; divides num_q_heads.
        head_dim: Dimension per head; a multiple of 8 from 32 to 256.
        scale: Factor on the scores, usually head_dim ** -0.5.
        max_seq_len: Tokens that the cache can hold per sequence.
    """

    batch_size: int
    cache_len: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    max_seq_len: int


def gqa_attention_decode(
    output: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_cache_k: Tensor,
    kv_cache_v: Tensor,
    config: GQADecodeConfig,
    stream: torch.cuda.Stream | int | None = None,
) -> None:
    """Run one decode step whose sizes a `GQADecodeConfig` says; same kernels as `gqa_decode`.

    Args:
        output: Written; [batch, 1, num_q_heads * head_dim].
        q: [batch, 1, num_q_heads, head_dim].
        k: The new token's keys, [batch, 1, num_kv_heads, head_dim].
        v: As k.
        kv_cache_k: [batch, max_seq_len, num_kv_heads, head_dim]; written at position cache_len.
        kv_cache_v: As kv_cache_k.
        config: Sizes, which must agree with the tensors, the cache's length and the scale.
        stream: A torch stream, a stream's handle, or None for the current stream. The handles 0
            (the null stream) and 1 (cudaStreamLegacy) mean the default stream, as torch calls it;
            2 (cudaStreamPerThread) is refused: one handle for many streams. With tensors on the
            CPU there is only the default stream.

    Raises:
        InputError: A tensor's shape differs from what the configuration says.
        GqaError: As for `gqa_decode`.
    """
    _check_config("gqa_attention_decode: config", config)
    c = config
    query = (c.batch_size, 1, c.num_q_heads, c.head_dim)
    token = (c.batch_size, 1, c.num_kv_heads, c.head_dim)
    cache = (c.batch_size, c.max_seq_len, c.num_kv_heads, c.head_dim)
    flat = (c.batch_size, 1, c.num_q_heads * c.head_dim)
    for name, tensor, shape in (
        ("output", output, flat), ("q", q, query), ("k", k, token), ("v", v, token),
        ("kv_cache_k", kv_cache_k, cache), ("kv_cache_v", kv_cache_v, cache),
    ):  # fmt: skip
        found = None if is_traced() else flaw(tensor)  # the operator sees what tracing stands for
        if found is None and tuple(tensor.shape) != shape:
            found = Flaw(f"shape {list(tensor.shape)}", f"{list(shape)}, from the configuration")
        if found:
            raise InputError(
                f"gqa_attention_decode: {name}: got {found.got}; allowed: {found.allowed}. Nothing "
                "was launched."
            )
    with _on_stream(stream, q.device):
        gqa_decode(
            q, kv_cache_k, kv_cache_v, k, v,
            cache_seqlens=c.cache_len, softmax_scale=c.scale,
            out=output.unflatten(-1, (c.num_q_heads, c.head_dim)),
        )  # fmt: skip


@untraced
def warmup(
    configs: Iterable[KernelConfig | GQADecodeConfig],
    *,
    dtype: torch.dtype = torch.float16,
    device: torch.device | int | str = "cuda",
) -> list[KernelConfig]:
    """Compile and load kernels ahead of time, so that no call and no capture compiles anything.

    Args:
        configs: Kernels, or decode steps as in `GQADecodeConfig` (contiguous tensors are assumed;
            of dependent launches, give the kernel: `plan.dispatch.config`).
        dtype: Element type for the decode steps.
        device: The GPU to load them on, or "cpu" for ptxsim.

    Returns:
        The kernels that are now loaded, each once.

    Raises:
        InputError: The dtype is not supported.
        GqaError: As for `gqa_decode`.
    """
    if not isinstance(dtype, torch.dtype) or dtype not in DTYPES:
        raise InputError(
            f"warmup: dtype: got {shown(dtype)}; allowed: torch.float16, torch.bfloat16."
        )
    wanted = _listed(configs)
    where = _device(device)
    gpu = None if where.type == "cpu" else _gpu(where)
    target = gpu or model_device(ARCHES["sm_90a"])
    kernels = list(dict.fromkeys(chain.from_iterable(_kernels(c, dtype, target) for c in wanted)))
    for config in kernels:
        if gpu is None:
            from gqa_cutlass.cpu.executor import program_of

            program_of(config)
        else:
            load(config, gpu)
    return kernels


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """What a call would run, and why. `str()` of it is a report.

    Args:
        problem: What the call asks for.
        device: The GPU that was assumed.
        dispatch: The kernel, its launch shape and the reasons.
        cubin: Where the compiled kernel is, or None when the first call would compile it.
        kv_bytes: Bytes of cache that a call with a full cache reads.
    """

    problem: Problem
    device: Device
    dispatch: Dispatch
    cubin: Path | None
    kv_bytes: int

    def __str__(self) -> str:
        shape = self.dispatch.shape
        lines = {
            "kernel": self.dispatch.config.name,
            "why": "; ".join(self.dispatch.reasons),
            "arch": f"{self.device.arch.name}, {self.device.num_sms} SMs",
            "grid": f"{shape.grid} (KV heads x head blocks, splits, batch)",
            "cluster": f"{shape.cluster} blocks, along the splits",
            "block": f"{shape.block} threads, {shape.shared_bytes} bytes of shared memory, "
            f"{self.dispatch.num_stages} stages",
            "workspace": f"{self.dispatch.workspace_bytes} bytes",
            "reads": f"{self.kv_bytes} bytes of K and V with a full cache",
            "cubin": str(self.cubin or "not built yet; the first call compiles it"),
        }
        return "\n".join(f"{key:<10} {value}" for key, value in lines.items())


@untraced
@listed(PlanOptions, without=("kernel",))
def explain(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    arch: str | None = None,
    out: Tensor | None = None,
    **options: Any,
) -> Explanation:
    """Say which kernel a call would run and why, how it is launched, and where its cubin is.

    Launches and compiles nothing. Works without a GPU: tensors on the CPU or on the meta device
    are taken to be on a GPU with an H200's number of multiprocessors.

    Args:
        q: As for `gqa_decode`, as is all that follows unless it says otherwise.
        k_cache: As for `gqa_decode`.
        v_cache: As for `gqa_decode`.
        k: As for `gqa_decode`.
        v: As for `gqa_decode`.
        arch: One of `codegen.ARCHES`, for tensors that are not on a GPU; "sm_90a" by default.
        out: As for `gqa_decode`.
        **options: `PlanOptions`.

    Raises:
        InputError: An argument is not allowed.
    """
    given = q, k_cache, v_cache, k, v, out, 0, *features_of(options)
    asked, policies = check("explain", options, given)
    problem = problem_of(see(given), policies, asked.window_size[0])
    check_softcap(asked.softcap, problem.head_dim**-0.5)
    if not (arch is None or type(arch) is str and arch in ARCHES):
        raise InputError(f"explain: arch: got {shown(arch)}; allowed: {', '.join(ARCHES)}.")
    if q.device.type == "cuda" and arch is None:
        device = _gpu(q.device)
    else:
        device = model_device(ARCHES[arch or "sm_90a"])
    chosen = dispatch(problem, device, asked.num_splits, ragged=asked.ragged, pdl=asked.dependent)
    stored = Store.default().find(chosen.config, device.arch.name)
    return Explanation(
        problem=problem,
        device=device,
        dispatch=chosen,
        cubin=None if stored is None else stored.path,
        kv_bytes=problem.cache_bytes,
    )


@untraced
def check_overflow(device: torch.device | int | str = "cuda") -> None:
    """Wait for a GPU and report a length that a kernel found not to be allowed, if any.

    Args:
        device: The GPU, or "cpu".

    Raises:
        CacheOverflowError: A call since the last report had a sequence in `cache_seqlens` that its
            cache could not hold.
        DeviceError: No usable GPU.
    """
    where = _device(device)
    if where.type != "cpu":
        torch.cuda.synchronize(_gpu_index(where))
    _executor_of(where).flag.raise_if_set()


def _listed(
    configs: Iterable[KernelConfig | GQADecodeConfig],
) -> list[KernelConfig | GQADecodeConfig]:
    """What `warmup` was given, checked."""
    try:
        found = list(iter(configs))
    except TypeError:
        raise InputError(
            f"warmup: configs: got {shown(configs)}; allowed: an iterable of KernelConfig or "
            "GQADecodeConfig; put a single one into a list."
        ) from None
    for config in found:
        if not isinstance(config, KernelConfig):
            _check_config("warmup: configs", config, "a KernelConfig or a GQADecodeConfig")
    return found


def _kernels(
    config: KernelConfig | GQADecodeConfig, dtype: torch.dtype, device: Device
) -> list[KernelConfig]:
    """The kernel, or those that a decode step may take, by what is known of its lengths."""
    if isinstance(config, KernelConfig):
        return [config]
    problem = Problem(
        batch_size=config.batch_size,
        num_q_heads=config.num_q_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        max_seq_len=config.max_seq_len,
        dtype=DTYPES[dtype],
        vec_width=WIDEST,  # of contiguous tensors
        append=True,
    )
    return [choose_config(problem, device, ragged)[0] for ragged in (False, True)]


def _check_config(what: str, config: GQADecodeConfig, allowed: str = "a GQADecodeConfig") -> None:
    """Raise InputError unless a configuration's sizes are such that a kernel can have them."""
    if not isinstance(config, GQADecodeConfig):
        raise InputError(f"{what}: got {shown(config)}; allowed: {allowed}. Nothing was launched.")
    for name in ("batch_size", "cache_len", "num_q_heads", "num_kv_heads", "head_dim",
                 "max_seq_len"):  # fmt: skip
        value = getattr(config, name)
        if type(value) is not int:
            raise InputError(
                f"{what}: {name}: got {shown(value)}; allowed: an int. Nothing was launched."
            )
    check_sizes(
        config.batch_size, config.num_q_heads, config.num_kv_heads, config.head_dim,
        config.max_seq_len,
    )  # fmt: skip
    check_options(softmax_scale=config.scale)


def _device(device: torch.device | int | str) -> torch.device:
    """A device by its name or its index.

    Raises:
        DeviceError: No such name.
    """
    try:
        if isinstance(device, torch.device):
            return device
        if type(device) is int or isinstance(device, str):
            name = device if isinstance(device, str) else f"cuda:{device}"
            found = torch.device(name)
            if str(found) == name:  # torch keeps eight bits of an index
                return found
    except (RuntimeError, OverflowError, TypeError, ValueError):
        pass  # as for any other value
    raise DeviceError(
        f"device: got {shown(device)}; allowed: a CUDA device, such as 'cuda:0', or 'cpu'."
    )


def _gpu(device: torch.device) -> Device:
    return describe_device(_gpu_index(device))


def _gpu_index(device: torch.device) -> int:
    """The index of a GPU that can be used.

    Raises:
        DeviceError: There is none.
    """
    if device.type != "cuda":
        raise DeviceError(f"device: got {device}; allowed: a CUDA device, such as 'cuda:0'.")
    if not torch.cuda.is_available():
        raise DeviceError(
            "no usable GPU: torch.cuda.is_available() is False; needed: an NVIDIA GPU of compute "
            "capability 8.0 or newer, its driver, and a torch built with CUDA. Run "
            "`gqa-cutlass doctor` to see what was found."
        )
    try:
        index = torch.cuda.current_device() if device.index is None else device.index
        torch.cuda.init()
    except RuntimeError as error:  # after a fork, for one
        raise DeviceError(f"no usable GPU: {error}; needed: CUDA in this process.") from error
    return index


def _on_stream(
    stream: torch.cuda.Stream | int | None, device: torch.device
) -> AbstractContextManager[object]:
    """Make a stream current; None keeps the one that is."""
    on_gpu, given = device.type == "cuda", stream
    if type(stream) is int and stream in _DEFAULT_STREAMS:
        stream = torch.cuda.default_stream(device) if on_gpu else None
    elif type(stream) is int and on_gpu and _PER_THREAD_STREAM < stream < _MAX_HANDLE:
        stream = torch.cuda.ExternalStream(stream, device=device)
    if stream is None:
        return nullcontext()
    if not on_gpu:
        raise InputError(
            f"gqa_attention_decode: stream: got {shown(given)} with tensors on {device}; allowed: "
            "None, or 0. Nothing was launched."
        )
    if not isinstance(stream, torch.cuda.Stream) or stream.device != device:
        raise InputError(
            f"gqa_attention_decode: stream: got {shown(given)}; allowed: a torch.cuda.Stream on "
            f"{device}, the handle of one that cudaStreamCreate made, 0 for the default stream, or "
            "None for the current stream. Nothing was launched."
        )
    return torch.cuda.stream(stream)
