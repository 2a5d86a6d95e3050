"""The public calls: validate, then dispatch."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack, overload

import torch
from torch import Tensor

from gqa_cutlass.call import layout as inputs
from gqa_cutlass.call import options as features
from gqa_cutlass.call.layout import DTYPES
from gqa_cutlass.call.plan import Arguments, GpuPlan, Pair, Plan, Result, Settings, signature
from gqa_cutlass.codegen.config import ARCHES, KernelConfig
from gqa_cutlass.codegen.schema.problem import WIDEST, Problem
from gqa_cutlass.dispatch import Device, Dispatch, choose_config, dispatch, model_device
from gqa_cutlass.errors import DeviceError, InputError, shown
from gqa_cutlass.gpu import workspace
from gqa_cutlass.gpu.driver import describe_device, load
from gqa_cutlass.store import Store
from gqa_cutlass.tensors import Flaw, flaw
from gqa_cutlass.tracing import is_traced, untraced

_MAX_PLANS = 4096
_DEFAULT_STREAMS, _PER_THREAD_STREAM = (0, 1), 2  # names of streams, not their addresses
_MAX_HANDLE = 2**64
_Options = tuple[int, type, float | None, type, bool, bool, bool, float, type, object]
_plans: dict[object, Plan] = {}  # by signature, and the latest by the cache's shape


class Options(TypedDict, total=False):
    """What `gqa_decode` and `KVCache.decode` also take, for type checkers; see there."""

    softmax_scale: float | None
    num_splits: int
    ragged: bool
    softcap: float
    sinks: Tensor | None
    out: Tensor | None


class PlanOptions(Options, total=False):
    """As `Options`, of `plan`."""

    kernel: KernelConfig | None
    dependent: bool


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
    **options: Unpack[Options],
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
    **options: Unpack[Options],
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
    **options: Unpack[Options],
) -> Result: ...
def gqa_decode(
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
    softcap: float = 0,
    sinks: Tensor | None = None,
    out: Tensor | None = None,
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
            int32 [batch] on q's device, which the host never reads.
        softmax_scale: Factor on the scores; head_dim ** -0.5 by default.
        num_splits: Parts that each sequence is cut into; 0 leaves the choice to the dispatcher.
            Results of the same number of splits are equal to the bit from run to run.
        return_lse: Also return the logarithm of the softmax's denominator.
        ragged: Whether lengths on the device may differ much, so that long sequences get more
            blocks: up to several times faster then, up to 3% slower where all are about equal.
            Results are right either way.
        softcap: Bound of the scores: softcap * tanh(scaled score / softcap), as in Gemma 2;
            0 for none.
        sinks: One more logit per query head, as in gpt-oss: [num_q_heads], float32, float16 or
            bfloat16, contiguous, on q's device. In natural units, neither scaled nor capped; it
            is part of the softmax's denominator, and has no value. None: without.
        out: Where to write; q's shape and dtype, sharing no memory with an input.

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
    tensors = q, k_cache, v_cache, k, v, out
    if is_traced():
        return _traced(
            tensors, cache_seqlens, softmax_scale=softmax_scale, num_splits=num_splits,
            return_lse=return_lse, ragged=ragged, softcap=softcap, sinks=sinks,
        )  # fmt: skip
    # With types, for True == 1 would find the plan of 1.
    options = (
        num_splits, type(num_splits), softmax_scale, type(softmax_scale), return_lse, ragged,
        torch.is_grad_enabled(), softcap, type(softcap),
        None if sinks is None else features.identity(sinks),
    )  # fmt: skip
    found = None
    try:
        if type(return_lse) is type(ragged) is bool:
            found = _plans.get((k_cache.shape, options))
    except Exception:  # no tensor, or no options: _find_plan says what is wrong
        pass
    argument = None if found is None else found.match(tensors, cache_seqlens)
    if found is None or argument is None:
        if torch.compiler.is_compiling():  # torch.export, which Dynamo need not be part of
            return _traced(
                tensors, cache_seqlens, softmax_scale=softmax_scale, num_splits=num_splits,
                return_lse=return_lse, ragged=ragged, softcap=softcap, sinks=sinks,
            )  # fmt: skip
        found, argument = _find_plan(tensors, cache_seqlens, options, sinks)
    return found.run(tensors, cache_seqlens, argument)


def _traced(tensors: Arguments, cache_seqlens: int | Tensor, **options: Any) -> Result:
    """The call as an operator of torch; registered when torch first traces it."""
    from gqa_cutlass import ops

    return ops.traced(tensors, cache_seqlens, **options)


def _find_plan(
    tensors: Arguments, cache_seqlens: int | Tensor, options: _Options, sinks: Tensor | None
) -> tuple[Plan, bytes]:
    """The plan for a call, made if there is none, and the kernel's argument."""
    q, k_cache, v_cache, k, v, out = tensors
    num_splits, _, softmax_scale, _, return_lse, ragged, _, softcap, *_ = options
    inputs.check_kinds(tensors, cache_seqlens)
    inputs.check_options(num_splits, softmax_scale, return_lse=return_lse, ragged=ragged)
    features.check_softcap(softcap, 0)  # before it is looked for: it may be no key
    key = signature(tensors), isinstance(cache_seqlens, Tensor), options
    found = _plans.get(key)
    if found is None:
        found = plan(
            q, k_cache, v_cache, k, v, cache_seqlens=cache_seqlens, softmax_scale=softmax_scale,
            num_splits=num_splits, return_lse=return_lse, ragged=ragged, softcap=softcap,
            sinks=sinks, out=out,
        )  # fmt: skip
    argument = found.adopt(tensors, cache_seqlens)
    if len(_plans) >= _MAX_PLANS:
        _plans.clear()
    _plans[key] = _plans[k_cache.shape, options] = found
    return found, argument


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
def plan(
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
    softcap: float = 0,
    sinks: Tensor | None = None,
    out: Tensor | None = None,
    kernel: KernelConfig | None = None,
    dependent: bool = False,
) -> Plan:
    """Resolve everything about a problem once: validate, choose, compile and load the kernel.

    Launches nothing. The plan is then called as `plan(q, k_cache, v_cache, k, v, cache_seqlens,
    out)` with tensors laid out like these.

    Args:
        q: As for `gqa_decode`, as are all the others.
        k_cache: As for `gqa_decode`.
        v_cache: As for `gqa_decode`.
        k: As for `gqa_decode`.
        v: As for `gqa_decode`.
        cache_seqlens: As for `gqa_decode`; whether it is an int or a tensor is part of the plan.
        softmax_scale: As for `gqa_decode`.
        num_splits: As for `gqa_decode`.
        return_lse: As for `gqa_decode`.
        ragged: As for `gqa_decode`.
        softcap: As for `gqa_decode`.
        sinks: As for `gqa_decode`. The plan keeps them, and every call uses them.
        out: As for `gqa_decode`; whether and how it is laid out is part of the plan.
        kernel: A kernel to use instead of the dispatcher's choice.
        dependent: Programmatic dependent launch, where it pays (Hopper and newer, caches of up to
            32 MiB): the kernel may start while the kernel before it in the stream finishes. It
            reads nothing before that one is done, but may fetch its first tiles to L2. Worth
            having where that kernel lets others start early, as this one does; after one that does
            not, a call takes up to a microsecond longer. It is a kernel of its own, which is
            compiled on first use, or by name with `gqa-cutlass build`.

    Raises:
        GqaError: As for `gqa_decode`.
    """
    inputs.check_kinds((q, k_cache, v_cache, k, v, out), cache_seqlens)
    inputs.check_options(
        num_splits, softmax_scale, return_lse=return_lse, ragged=ragged, dependent=dependent
    )
    _check_kernel(kernel)
    inputs.check_mode()
    tensors = inputs.gather(q, k_cache, v_cache, k, v, out)
    problem = inputs.validate(tensors)
    device = _device_of(q)
    inputs.check_lengths(problem, cache_seqlens, q.device)
    inputs.check_memory(tensors, cache_seqlens)
    inputs.check_aliases(tensors, cache_seqlens)
    scale = problem.head_dim**-0.5 if softmax_scale is None else float(softmax_scale)
    asked = _features(softcap, sinks, scale, problem, q.device)
    problem = replace(problem, policies=asked.policies)
    device_lengths = isinstance(cache_seqlens, Tensor)
    chosen = dispatch(problem, device, num_splits, kernel, device_lengths and ragged, dependent)
    settings = Settings(
        problem=problem,
        chosen=chosen,
        arguments=(q, k_cache, v_cache, k, v, out),
        tensors=tensors,
        softmax_scale=scale,
        return_lse=return_lse,
        device_lengths=device_lengths,
        features=asked,
    )
    if device.index == workspace.CPU:
        from gqa_cutlass.cpu.executor import CpuPlan  # which only CPU tensors need

        return CpuPlan(**settings)
    return GpuPlan(load(chosen.config, device, jit=_may_compile()), **settings)


@dataclass(frozen=True, kw_only=True)
class GQADecodeConfig:
    """The story's configuration of a decode step, plus the cache's capacity.

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
    """Run one decode step in the story's form; the same kernels as `gqa_decode`.

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
def explain(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    num_splits: int = 0,
    ragged: bool = True,
    softcap: float = 0,
    sinks: Tensor | None = None,
    out: Tensor | None = None,
    dependent: bool = False,
    arch: str | None = None,
) -> Explanation:
    """Say which kernel a call would run and why, how it is launched, and where its cubin is.

    Launches and compiles nothing. Works without a GPU: tensors on the CPU or on the meta device
    are taken to be on a GPU with an H200's number of multiprocessors.

    Args:
        q: As for `gqa_decode`, as are the other tensors.
        k_cache: As for `gqa_decode`.
        v_cache: As for `gqa_decode`.
        k: As for `gqa_decode`.
        v: As for `gqa_decode`.
        num_splits: As for `gqa_decode`.
        ragged: As for `gqa_decode`.
        softcap: As for `gqa_decode`.
        sinks: As for `gqa_decode`.
        out: As for `gqa_decode`.
        dependent: As for `plan`.
        arch: One of `codegen.ARCHES`, for tensors that are not on a GPU; "sm_90a" by default.

    Raises:
        InputError: An argument is not allowed.
    """
    inputs.check_options(num_splits, ragged=ragged, dependent=dependent)
    problem = inputs.validate(inputs.gather(q, k_cache, v_cache, k, v, out))
    asked = _features(softcap, sinks, problem.head_dim**-0.5, problem, q.device)
    problem = replace(problem, policies=asked.policies)
    if not (arch is None or type(arch) is str and arch in ARCHES):
        raise InputError(f"explain: arch: got {shown(arch)}; allowed: {', '.join(ARCHES)}.")
    if q.device.type == "cuda" and arch is None:
        device = _device_of(q)
    else:
        device = model_device(ARCHES[arch or "sm_90a"])
    chosen = dispatch(problem, device, num_splits, ragged=ragged, dependent=dependent)
    stored = Store.default().find(chosen.config, device.arch.name)
    return Explanation(
        problem=problem,
        device=device,
        dispatch=chosen,
        cubin=None if stored is None else stored.path,
        kv_bytes=problem.cache_bytes,
    )


def _features(
    softcap: float, sinks: Tensor | None, scale: float, problem: Problem, device: torch.device
) -> features.Features:
    """The features of a call, checked."""
    return features.Features(
        softcap=features.check_softcap(softcap, scale),
        sinks=features.check_sinks(sinks, problem.num_q_heads, device),
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
    index, where = workspace.CPU, _device(device)
    if where.type != "cpu":
        index = _gpu(where).index
        torch.cuda.synchronize(index)
    workspace.overflow_flag(index).raise_if_set()


def _may_compile() -> bool | None:
    """False while a CUDA graph is being captured; None where the environment decides."""
    return False if torch.cuda.is_current_stream_capturing() else None


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
    inputs.check_sizes(
        config.batch_size, config.num_q_heads, config.num_kv_heads, config.head_dim,
        config.max_seq_len,
    )  # fmt: skip
    inputs.check_options(softmax_scale=config.scale)


def _check_kernel(kernel: object) -> None:
    """Raise InputError unless a kernel is a configuration, or None."""
    if kernel is not None and not isinstance(kernel, KernelConfig):
        raise InputError(
            f"plan: kernel: got {shown(kernel)}; allowed: a KernelConfig (another plan's "
            "`dispatch.config`, for instance), or None. Nothing was launched."
        )


def _device_of(tensor: Tensor) -> Device:
    """Where a tensor's kernel runs; for CPU tensors, the GPU whose dispatch ptxsim follows."""
    if tensor.device.type == "cpu":
        return model_device(ARCHES["sm_90a"])
    if tensor.device.type != "cuda":
        raise DeviceError(
            f"gqa_decode: got tensors on {tensor.device}; allowed: an NVIDIA GPU of compute "
            "capability 8.0 or newer, or the CPU (simulated, slow). Move q, the cache, k and v "
            "there with .to('cuda')."
        )
    return _gpu(tensor.device)


def _device(device: torch.device | int | str) -> torch.device:
    """A device by its name or its index.

    Raises:
        DeviceError: No such name.
    """
    try:
        if type(device) is int:
            return torch.device("cuda", device)
        if isinstance(device, (str, torch.device)):
            return torch.device(device)
    except (RuntimeError, OverflowError, TypeError, ValueError):
        pass  # as for any other value
    raise DeviceError(
        f"device: got {shown(device)}; allowed: a CUDA device, such as 'cuda:0', or 'cpu'."
    )


def _gpu(device: torch.device) -> Device:
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
    return describe_device(index)


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
