"""Before any call: which kernel it would run, and kernels compiled and loaded."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gqa_cutlass import env
from gqa_cutlass.call.asked import Asked, check, check_softcap, features_of, rename
from gqa_cutlass.call.given import see, tokens_of
from gqa_cutlass.call.layout import DTYPES, launch_of, problem_of, tabled
from gqa_cutlass.call.options import PlanOptions, listed
from gqa_cutlass.call.stored import scale_fields
from gqa_cutlass.call.tokens import check_tree, packed_tree, with_tokens
from gqa_cutlass.call.turning import check_turning
from gqa_cutlass.codegen.config import ARCHES
from gqa_cutlass.codegen.merge import Kernel
from gqa_cutlass.codegen.schema.problem import WIDEST, Problem
from gqa_cutlass.decode_config import GQADecodeConfig, check_config
from gqa_cutlass.devices import device_of, gpu, gpu_named
from gqa_cutlass.dispatch import Device, Dispatch, choose_config, model_device
from gqa_cutlass.dispatch.compare import Term, runner_up, terms
from gqa_cutlass.dispatch.splits import counted
from gqa_cutlass.errors import InputError, shown
from gqa_cutlass.gpu.driver import load
from gqa_cutlass.kernels.store import Store
from gqa_cutlass.tracing import untraced
from gqa_cutlass.tuning.table import Answer, look_up


@untraced
def warmup(
    configs: Iterable[Kernel | GQADecodeConfig],
    *,
    dtype: torch.dtype = torch.float16,
    device: torch.device | int | str = "cuda",
) -> list[Kernel]:
    """Compile and load kernels ahead of time, so that no call and no capture compiles anything.

    Args:
        configs: Kernels, or decode steps as in `GQADecodeConfig` (contiguous tensors are assumed;
            of dependent launches, give the kernel: `plan.dispatch.config`; of caches of 8 bits and
            of options, `explain(...).dispatch.config`), which take the kernels of dispatch's model
            and of the GPU's tables of launches.
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
            f"warmup: dtype: got {shown(dtype)}; allowed: torch.float16, torch.bfloat16. For "
            "caches of 8 bits give kernels, explain(...).dispatch.config, and no dtype."
        )
    wanted = _listed(configs)
    where = device_of(device)
    found = None if where.type == "cpu" else gpu(where)
    target = found or model_device(ARCHES["sm_90a"])
    kernels = list(dict.fromkeys(chain.from_iterable(_kernels(c, dtype, target) for c in wanted)))
    for config in kernels:
        if found is None:
            from gqa_cutlass.cpu.executor import program_of

            program_of(config)
        else:
            load(config, found)
    return kernels


def _listed(
    configs: Iterable[Kernel | GQADecodeConfig],
) -> list[Kernel | GQADecodeConfig]:
    """What `warmup` was given, checked."""
    try:
        found = list(iter(configs))
    except TypeError:
        raise InputError(
            f"warmup: configs: got {shown(configs)}; allowed: an iterable of KernelConfig, "
            "MergeConfig or GQADecodeConfig; put a single one into a list."
        ) from None
    for config in found:
        if not isinstance(config, Kernel):
            check_config(
                "warmup: configs", config, "a KernelConfig, a MergeConfig or a GQADecodeConfig"
            )
    return found


def _kernels(config: Kernel | GQADecodeConfig, dtype: torch.dtype, device: Device) -> list[Kernel]:
    """The kernel, or those that a decode step may take, by what is known of its lengths.

    Those of the model, which calls that say more than their lengths have, and of the GPU's tables.
    """
    if isinstance(config, Kernel):
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
    told = [1 << n for n in range(problem.max_seq_len.bit_length())]  # by max_seqlen
    rooms = [replace(problem, max_seq_len=room) for room in (problem.max_seq_len, *told)]
    modelled = [choose_config(r, device, ragged)[0] for r in rooms for ragged in (False, True)]
    answers = [
        look_up(problem, device, ragged=ragged, longest=longest)
        for longest in (None, *told, 2 * told[-1])  # which counts as a power of two
        for ragged in (False, True)
    ]
    for answer in answers:
        answer.warn()
    return [*modelled, *(answer.choice.config for answer in answers if answer.choice)]


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """What a call would run, and why. `str()` of it is a report.

    Args:
        problem: What the call asks for.
        device: The GPU that was assumed.
        dispatch: The kernel, its launch shape and the reasons.
        decided: Who decided for them: a table of launches, with its GPU and date, or the model.
        by_table: Whether a table did.
        left_out: What tables have for it that cannot be launched, and why.
        cubin: Where the compiled kernel is, or None when the first call would compile it.
        kv_bytes: Bytes of cache that a call with a full cache reads.
        terms: The model's figures for it.
        runner_up: What would have been next, if there is anything.
        runner_up_terms: The figures for that.
    """

    problem: Problem
    device: Device
    dispatch: Dispatch
    decided: str
    by_table: bool
    cubin: Path | None
    kv_bytes: int
    terms: tuple[Term, ...] = ()
    runner_up: Dispatch | None = None
    runner_up_terms: tuple[Term, ...] = ()
    left_out: tuple[str, ...] = ()

    def facts(self) -> dict[str, Any]:
        """The same for programs: what JSON has."""
        shape, config, other = self.dispatch.shape, self.dispatch.config, self.runner_up
        return {
            "kernel": config.name,
            "decided": self.decided,
            "by_table": self.by_table,
            "left_out": list(self.left_out),
            "reasons": list(self.dispatch.reasons),
            "features": [policy.feature for policy in config.policies],
            "gpu": self.device.name or None,
            "arch": self.device.arch.name,
            "num_sms": self.device.num_sms,
            "grid": list(shape.grid),
            "cluster": shape.cluster,
            "block": shape.block,
            "shared_bytes": shape.shared_bytes,
            "num_stages": self.dispatch.num_stages,
            "num_splits": self.dispatch.num_splits,
            "workspace_bytes": self.dispatch.workspace_bytes,
            "kv_bytes": self.kv_bytes,
            "cubin": None if self.cubin is None else str(self.cubin),
            "terms": [asdict(term) for term in self.terms],
            "runner_up": None if other is None else {
                "kernel": other.config.name,
                "grid": list(other.shape.grid),
                "cluster": other.shape.cluster,
                "num_splits": other.num_splits,
                "terms": [asdict(term) for term in self.runner_up_terms],
            },
        }  # fmt: skip

    def __str__(self) -> str:
        shape, policies = self.dispatch.shape, self.dispatch.config.policies
        name = f", {self.device.name}" if self.device.name else ""
        lines = {
            "kernel": self.dispatch.config.name,
            "decided": self.decided,
            **({"left out": "; ".join(self.left_out)} if self.left_out else {}),
            "why": "; ".join(self.dispatch.reasons),
            "model": "; ".join(map(str, self.terms)) or "nothing was weighed",
            "runner-up": self._next(),
            "features": ", ".join(policy.feature for policy in policies) or "none",
            "arch": f"{self.device.arch.name}, {self.device.num_sms} SMs{name}",
            "grid": f"{shape.grid} (KV heads x head blocks, splits, batch)",
            "cluster": f"{shape.cluster} blocks, along the splits" if shape.cluster > 1 else "none",
            "block": f"{shape.block} threads, {shape.shared_bytes} bytes of shared memory, "
            f"{counted(self.dispatch.num_stages, 'stage')}",
            "workspace": f"{self.dispatch.workspace_bytes} bytes",
            "reads": f"{self.kv_bytes} bytes of K and V with a full cache",
            "cubin": str(self.cubin or f"not built yet; {_first_call()}"),
        }
        return "\n".join(f"{key:<10} {value}" for key, value in lines.items())

    def _next(self) -> str:
        """The runner-up, in a line."""
        if self.runner_up is None:
            return "none: nothing else can do this"
        figures = "; ".join(map(str, self.runner_up_terms))
        grid = f"grid {self.runner_up.shape.grid}, {counted(self.runner_up.num_splits, 'split')}"
        return f"{self.runner_up.config.name}; {grid}; {figures}"


def _first_call() -> str:
    """What a call does whose kernel was not built."""
    if env.jit_disabled():
        return "calls raise KernelMissingError, for GQA_CUTLASS_DISABLE_JIT is set"
    return "the first call compiles it"


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
    gpu: str | None = None,
    out: Tensor | None = None,
    **options: Any,
) -> Explanation:
    """Say which kernel a call would run and why, how it is launched, and where its cubin is.

    Launches and compiles nothing. Works without a GPU: tensors on the CPU or on the meta device
    are taken to be on `gpu`, whose table of launches then counts, or else on one with an H200's
    number of multiprocessors and no table. Lengths are taken to be on the device; a call that has
    one int for all runs what `ragged=False` says.

    Args:
        q: As for `gqa_decode`, as is all that follows unless it says otherwise.
        k_cache: As for `gqa_decode`.
        v_cache: As for `gqa_decode`.
        k: As for `gqa_decode`.
        v: As for `gqa_decode`.
        arch: One of `codegen.ARCHES`, for tensors that are not on a GPU; by default that of `gpu`,
            or "sm_90a".
        gpu: The name of a GPU, "NVIDIA H200" for instance: say what a call there would run. One at
            hand, or one with a table of launches, which came with the package or was made by
            `gqa-cutlass tune`. None, the default: the one that the tensors are on, if they are.
        out: As for `gqa_decode`.
        **options: `PlanOptions`.

    Returns:
        What can be printed, or asked for its `dispatch` (kernel and launch), who `decided` for it,
        what was `left_out` of tables because it cannot be launched, `problem`, `device`, `cubin`
        (None: not compiled yet), `kv_bytes`, the model's `terms`, and the `runner_up`.

    Raises:
        InputError: An argument is not allowed, or there is no table of such a GPU.
    """
    rename(options)
    if "tree_mask" in options:
        options["tree_mask"] = packed_tree(options["tree_mask"])
    given = q, k_cache, v_cache, k, v, out, 0, *features_of(options)
    asked, policies = check("explain", options, given)
    layout = see(given)
    tokens = tokens_of(layout, asked.max_seqlen_q)
    if tokens.several:
        policies = with_tokens(policies)
    check_tree(tokens, layout)
    check_turning(layout, tokens)
    problem = problem_of(layout, policies, asked.window_size[0], asked.out_dtype, tokens)
    check_softcap(asked.softcap, problem.head_dim**-0.5)
    scale_fields(asked, layout)
    device = _device(q, arch, gpu)
    found = tabled(problem, device, asked, ragged=asked.ragged)
    chosen = launch_of(problem, device, asked, ragged=asked.ragged, found=found)
    stored = Store.default().find(chosen.config, device.arch.name)
    longest = min(asked.max_seqlen or problem.max_seq_len, problem.max_seq_len)
    sized = replace(problem, max_seq_len=longest)  # as the model weighed it
    other = runner_up(sized, device, chosen, ragged=asked.ragged)
    return Explanation(
        problem=problem,
        device=device,
        dispatch=chosen,
        decided=_decided(found, device, asked),
        by_table=found.choice is not None,
        cubin=None if stored is None else stored.path,
        kv_bytes=problem.cache_bytes,
        terms=terms(sized, device, chosen),
        runner_up=other,
        runner_up_terms=() if other is None else terms(sized, device, other),
        left_out=found.left_out,
    )


def _device(q: Tensor, arch: str | None, name: str | None) -> Device:
    """The GPU that a call is taken to be on.

    Raises:
        InputError: There is no such architecture, or no such GPU, or it has another one.
    """
    if not (arch is None or type(arch) is str and arch in ARCHES):
        raise InputError(f"explain: arch: got {shown(arch)}; allowed: {', '.join(ARCHES)}.")
    if name is not None:
        found = gpu_named(name)
        if arch not in (None, found.arch.name):
            raise InputError(
                f"explain: arch: got {arch} for {name}; allowed: {found.arch.name}, which that is, "
                "or nothing."
            )
        return found
    if q.device.type == "cuda" and arch is None:
        return gpu(q.device)
    return model_device(ARCHES[arch or "sm_90a"])


def _decided(found: Answer, device: Device, asked: Asked) -> str:
    """Who decided for a launch."""
    if found.choice is not None:
        return f"by the table of {found.table}"
    if asked.num_splits or asked.batch_invariant:
        return "by the model, within what was asked for"
    if found.left_out:
        return f"by the model: what a table of {device.name} has cannot be launched"
    if device.name:
        return f"by the model: no table of {device.name} has this"
    return "by the model: no GPU is named, so no table is looked into"
