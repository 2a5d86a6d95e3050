"""A decode step verified by hand: step by step, and each with its evidence."""

from __future__ import annotations

import importlib.metadata
import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from gqa_cutlass.api import plan
from gqa_cutlass.cache.allocation import available_bytes
from gqa_cutlass.call.plan import Plan
from gqa_cutlass.call.record import LOG, LaunchRecord, parse
from gqa_cutlass.codegen.config import KernelConfig
from gqa_cutlass.decode_config import GQADecodeConfig, gqa_attention_decode
from gqa_cutlass.errors import CacheOverflowError, DeviceError, GqaError, InputError
from gqa_cutlass.proof.reference import (
    MAX_RATIO,
    MEAN_RATIO,
    MIN_HEADS,
    SLACK,
    Errors,
    attend,
    errors,
    pooled,
    same_bits,
)
from gqa_cutlass.proof.sim import BYTES_PER_ELEMENT
from gqa_cutlass.sizes import check_room, check_sizes, enough_memory

TOLERANCE = 0.05  # that docs/spec.md asks for
_MAX_SEQ_LEN, _ROOM = 64, 16  # tokens that a cache holds at least, and behind the new one
_BYTES_ON_THE_HOST = 8  # per element of K, where random numbers for a GPU are made
_CANARY = 0x7FA5  # a NaN in float16 and in bfloat16: it shows when it is read


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step of the verification.

    Args:
        name: What was verified.
        passed: Whether it was found to be so.
        evidence: What was seen, in lines.
    """

    name: str
    passed: bool
    evidence: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Call:
    """The tensors of `gqa_attention_decode`, by the names of its arguments."""

    output: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    kv_cache_k: Tensor
    kv_cache_v: Tensor


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of a call.

    Args:
        seconds: From the call until the device was done.
        launches: The log's lines for launches.
        error: What was raised, if anything.
    """

    seconds: float
    launches: tuple[str, ...]
    error: GqaError | None


@dataclass(frozen=True, kw_only=True)
class Verification:
    """A decode step that was run in order to be verified.

    Args:
        config: Its configuration.
        kernel: The kernel that its plan names.
        call: Its tensors, as the step left them.
        k_before: kv_cache_k as it was before the step.
        v_before: kv_cache_v as it was before the step.
        outcome: What came of it.
        seconds: How long it took, everything being planned.
    """

    config: GQADecodeConfig
    kernel: KernelConfig
    call: Call
    k_before: Tensor
    v_before: Tensor
    outcome: Outcome
    seconds: float


def verify(
    *,
    cache_len: int = 10,
    batch_size: int = 2,
    num_q_heads: int = 32,
    num_kv_heads: int = 8,
    head_dim: int = 128,
    max_seq_len: int | None = None,
    dtype: torch.dtype = torch.float16,
    device: torch.device,
) -> list[Step]:
    """Run `gqa_attention_decode` once on random data, and look at all it did.

    Args:
        cache_len: Tokens in every sequence's cache before the step.
        batch_size: Sequences.
        num_q_heads: Query heads.
        num_kv_heads: KV heads; divides num_q_heads.
        head_dim: Dimension per head; a multiple of 8 from 32 to 256.
        max_seq_len: Tokens that the cache can hold per sequence; by default 64, or as many as leave
            room for 15 more behind the new one.
        dtype: Element type of every tensor, torch.float16 or torch.bfloat16.
        device: A GPU, or the CPU for ptxsim; see `choose_device`.

    Returns:
        The four steps of docs/spec.md, and one for the overflow of the cache.

    Raises:
        InputError: A size is not allowed, or does not fit into memory; there is no such device.
        DeviceError: There is no usable GPU.
        GqaError: The kernel cannot be compiled or loaded.
    """
    check_sizes("verify", batch=batch_size, q_heads=num_q_heads, kv_heads=num_kv_heads,
                head_dim=head_dim)  # fmt: skip
    capacity = max(_MAX_SEQ_LEN, cache_len + _ROOM) if max_seq_len is None else max_seq_len
    config = GQADecodeConfig(
        batch_size=batch_size, cache_len=cache_len, num_q_heads=num_q_heads,
        num_kv_heads=num_kv_heads, head_dim=head_dim, scale=head_dim**-0.5, max_seq_len=capacity,
    )  # fmt: skip
    _check_device(device)
    _check_memory(config, device, by_length=max_seq_len is None)
    check_sizes("verify", cache_len=cache_len, max_seq_len=capacity)
    if cache_len >= capacity:
        raise InputError(
            f"verify: max_seq_len: got {capacity}; allowed: more than cache_len, {cache_len}. "
            "Nothing was launched."
        )
    with enough_memory("verify"):
        ran = _decode(config, dtype, device)
        return [_ran(ran), _output(ran), _caches(ran), _logged(ran), _overflow(ran)]


def choose_device(name: str | None) -> torch.device:
    """The device of a name; without one the GPU if there is one, else the CPU.

    Raises:
        InputError: No device that runs kernels has this name.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except (RuntimeError, ValueError, OverflowError):
        device = None
    if device is None or device.type not in ("cuda", "cpu"):
        raise InputError(f"verify: device: got {name!r}; allowed: cuda, cuda:0 and so on, cpu.")
    return device


def _check_device(device: torch.device) -> None:
    """Raise DeviceError without a usable GPU, and InputError without this one."""
    if device.type == "cpu":
        return
    if not torch.cuda.is_available():
        raise DeviceError(
            f"verify: device: got {device}; no usable GPU: torch.cuda.is_available() is False. Run "
            "`gqa-cutlass doctor` to see what was found, or take cpu (in ptxsim, slow)."
        )
    count = torch.cuda.device_count()
    if (device.index or 0) >= count:
        raise InputError(f"verify: device: got {device}; allowed: cuda:0 to cuda:{count - 1}, cpu.")


def _check_memory(c: GQADecodeConfig, device: torch.device, by_length: bool) -> None:
    """Raise InputError where a step would need more memory than there is.

    Args:
        c: The step.
        device: Where it runs.
        by_length: Whether the cache's capacity follows from its length.
    """
    per_token = c.batch_size * c.num_kv_heads * c.head_dim
    queries = c.batch_size * c.num_q_heads * c.head_dim
    places = {device: BYTES_PER_ELEMENT}
    places.setdefault(torch.device("cpu"), _BYTES_ON_THE_HOST)
    name, value, least = "max_seq_len", c.max_seq_len, c.cache_len + 1
    if by_length:
        name, value, least = "cache_len", c.cache_len, 0
    spare = c.max_seq_len - value
    for place, each in places.items():
        check_room(
            "verify", name, value, least=least, each=per_token * each,
            fixed=(queries + spare * per_token) * each, room=available_bytes(place),
            where=f"free on {place}",
        )  # fmt: skip


def provenance(device: torch.device) -> str:
    """What the evidence is of: the versions, and where the kernel ran."""
    try:
        version = importlib.metadata.version("gqa-cutlass")
    except importlib.metadata.PackageNotFoundError:
        version = "(not installed)"
    gpu = device.type == "cuda"
    where = torch.cuda.get_device_name(device) if gpu else "CPU (ptxsim)"
    return f"gqa-cutlass {version}, torch {torch.__version__}, on {where}"


def _decode(config: GQADecodeConfig, dtype: torch.dtype, device: torch.device) -> Verification:
    """Run the step."""
    call = _random_call(config, dtype, device)
    k_before, v_before = call.kv_cache_k.clone(), call.kv_cache_v.clone()
    kernel = _planned(call, config).dispatch.config
    outcome = _run(call, config)
    # A plan's first call takes longer; the step may be repeated, for it writes the same again.
    again = _run(call, config) if call.q.is_cuda else outcome
    return Verification(
        config=config, kernel=kernel, call=call, k_before=k_before, v_before=v_before,
        outcome=outcome, seconds=again.seconds,
    )  # fmt: skip


def _planned(call: Call, c: GQADecodeConfig) -> Plan:
    """The plan of the step, which alone says which kernel runs; now it is compiled and loaded."""
    out = call.output.unflatten(-1, (c.num_q_heads, c.head_dim))
    return plan(
        call.q, call.kv_cache_k, call.kv_cache_v, call.k, call.v, cache_seqlens=c.cache_len,
        softmax_scale=c.scale, out=out,
    )  # fmt: skip


def _random_call(
    c: GQADecodeConfig, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> Call:
    """Random q, k, v and cached tokens; NaN behind those, and in the output."""
    generator = torch.Generator().manual_seed(seed)

    def random(tokens: int, heads: int) -> Tensor:
        shape = c.batch_size, tokens, heads, c.head_dim
        return torch.randn(shape, generator=generator, device="cpu").to(device, dtype)

    def canaries(*shape: int) -> Tensor:
        return torch.full(shape, _CANARY, dtype=torch.int16, device=device).view(dtype)

    caches = []
    for _ in range(2):
        cache = canaries(c.batch_size, c.max_seq_len, c.num_kv_heads, c.head_dim)
        cache[:, : c.cache_len] = random(c.cache_len, c.num_kv_heads)
        caches.append(cache)
    return Call(
        output=canaries(c.batch_size, 1, c.num_q_heads * c.head_dim),
        q=random(1, c.num_q_heads),
        k=random(1, c.num_kv_heads),
        v=random(1, c.num_kv_heads),
        kv_cache_k=caches[0],
        kv_cache_v=caches[1],
    )


def _run(call: Call, config: GQADecodeConfig) -> Outcome:
    """Call `gqa_attention_decode` once, and wait for it."""
    error = None
    with _debug_lines() as lines:
        start = time.perf_counter()
        try:
            gqa_attention_decode(**vars(call), config=config)
            if call.q.is_cuda:
                torch.cuda.synchronize(call.q.device)
        except GqaError as raised:
            error = raised
        seconds = time.perf_counter() - start
    launches = tuple(line for line in lines if line.startswith("launch "))
    return Outcome(seconds=seconds, launches=launches, error=error)


class _Lines(logging.Handler):
    """Keeps what is logged at DEBUG."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a record's message."""
        if record.levelno == logging.DEBUG:
            self.lines.append(record.getMessage())


@contextmanager
def _debug_lines() -> Iterator[list[str]]:
    """What the package logs at DEBUG meanwhile, whatever its level is otherwise."""
    handler, level = _Lines(), LOG.level
    LOG.addHandler(handler)
    LOG.setLevel(logging.DEBUG)
    try:
        yield handler.lines
    finally:
        LOG.setLevel(level)
        LOG.removeHandler(handler)


def _ran(v: Verification) -> Step:
    error = v.outcome.error
    spent = (
        f"{v.seconds * 1e6:.0f} us from the call until the GPU was done"
        if v.call.q.is_cuda
        else f"{v.seconds:.2f} s in ptxsim, which found no fault"
    )
    return Step(
        name=f"a decode step runs with cache_len {v.config.cache_len}",
        passed=error is None,
        evidence=(f"kernel {v.kernel.name}", spent if error is None else _named(error)),
    )


def _output(v: Verification) -> Step:
    """Shape, and errors against float64 beside those of PyTorch in the same type."""
    c, call = v.config, v.call
    shape = [c.batch_size, 1, c.num_q_heads * c.head_dim]
    runs = math.ceil(MIN_HEADS / (c.batch_size * c.num_q_heads))
    others = [_errors_of_another(v, seed) for seed in range(1, runs)]
    found = pooled([_errors(c, call, v.k_before, v.v_before), *others])
    return Step(
        name=f"the output is attention, {shape}",
        passed=list(call.output.shape) == shape and found.share <= 1 and found.max < TOLERANCE,
        evidence=(
            f"shape {list(call.output.shape)} = [batch, 1, num_q_heads * head_dim]",
            f"largest error {found.max:.2e}; allowed {found.most:.2e}, {MAX_RATIO:g}x PyTorch's in "
            f"the same type + {SLACK:g}, and less than {TOLERANCE:g}",
            f"mean error {found.mean:.2e}; allowed {found.most_mean:.2e}, {MEAN_RATIO:g}x "
            f"PyTorch's + {SLACK:g}",
            *([f"errors of {runs} runs, for {MIN_HEADS} heads or more"] if runs > 1 else []),
        ),
    )


def _errors(c: GQADecodeConfig, call: Call, k_before: Tensor, v_before: Tensor) -> Errors:
    """Errors of an output, beside PyTorch's."""
    k = torch.cat([k_before[:, : c.cache_len], call.k], dim=1)
    values = torch.cat([v_before[:, : c.cache_len], call.v], dim=1)
    step = call.q.squeeze(1), k, values, [c.cache_len + 1] * c.batch_size, c.scale
    (exact, _), (typed, _) = (attend(*step, dtype) for dtype in (torch.float64, call.q.dtype))
    return errors(call.output.view(exact.shape), exact, typed)


def _errors_of_another(v: Verification, seed: int) -> Errors:
    """The same of the step on other random data."""
    call = _random_call(v.config, v.call.q.dtype, v.call.q.device, seed)
    before = call.kv_cache_k.clone(), call.kv_cache_v.clone()
    _run(call, v.config)  # where it fails, the output stays NaN, and the rule is broken
    return _errors(v.config, call, *before)


def _caches(v: Verification) -> Step:
    """The new token's rows, and all others."""
    position, last = v.config.cache_len, v.config.max_seq_len - 1
    wrong = sorted(
        _rows_unlike(v.call.kv_cache_k, v.k_before, v.call.k, position)
        | _rows_unlike(v.call.kv_cache_v, v.v_before, v.call.v, position)
    )
    token = "NOT the new token" if position in wrong else "the new token, to the bit"
    others = [(0, position - 1), (position + 1, last)]
    return Step(
        name=f"the KV cache is updated at position {position}, and nowhere else",
        passed=not wrong,
        evidence=(
            f"row {position} of K and V in {v.config.batch_size} sequences: {token}",
            *(_unchanged(first, end, wrong) for first, end in others if first <= end),
        ),
    )


def _rows_unlike(cache: Tensor, before: Tensor, token: Tensor, position: int) -> set[int]:
    """Positions at which a cache is not what it was, with the token in its place."""
    expected = before.clone()
    expected[:, position] = token.squeeze(1)
    differs = cache.view(torch.int16) != expected.view(torch.int16)
    return set(differs.flatten(2).any(2).any(0).nonzero().flatten().tolist())


def _unchanged(first: int, last: int, wrong: list[int]) -> str:
    hit = ", ".join(str(row) for row in wrong if first <= row <= last)
    return f"rows {first} to {last}: {f'WRITTEN at {hit}' if hit else 'as before, to the bit'}"


def _logged(v: Verification) -> Step:
    """The line of the one launch, against what was asked for."""
    c = v.config
    found = parse(v.outcome.launches[0]) if v.outcome.launches else {}
    missing = [field.name for field in fields(LaunchRecord) if field.name not in found]
    expected = {
        "kernel": v.kernel.name, "batch_size": c.batch_size, "num_q_heads": c.num_q_heads,
        "num_kv_heads": c.num_kv_heads, "head_dim": c.head_dim, "max_seq_len": c.max_seq_len,
        "cache_seqlens": c.cache_len, "softmax_scale": c.scale, "dtype": v.kernel.dtype,
        "append": True, "device": v.call.q.device.index if v.call.q.is_cuda else "cpu",
    }  # fmt: skip
    wrong = [
        f"{key} is {found[key]}, not {value}"
        for key, value in expected.items()
        if key in found and found[key] != str(value)
    ]
    count = len(v.outcome.launches)
    complaints = [f"{count} lines for one launch"] if count != 1 else []
    complaints += [f"absent: {', '.join(missing)}"] if missing else []
    return Step(
        name="the log shows the launch's parameters at DEBUG",
        passed=not (complaints or wrong),
        evidence=(*v.outcome.launches, *complaints, *wrong),
    )


def _overflow(v: Verification) -> Step:
    """The same step once more, with no room for its token."""
    call, full = v.call, v.config.max_seq_len
    written = call.output, call.kv_cache_k, call.kv_cache_v
    before = [tensor.clone() for tensor in written]
    outcome = _run(call, replace(v.config, cache_len=full))
    raised = isinstance(outcome.error, CacheOverflowError)
    untouched = all(same_bits(*pair) for pair in zip(written, before, strict=True))
    return Step(
        name=f"cache_len {full} of {full} overflows the cache: an error, and nothing is written",
        passed=raised and untouched and not outcome.launches,
        evidence=(
            _named(outcome.error) if outcome.error else "NO error was raised",
            f"output and caches: {'as before, to the bit' if untouched else 'WRITTEN'}",
            f"launches: {len(outcome.launches)}",
        ),
    )


def _named(error: GqaError) -> str:
    return f"{type(error).__name__}: {error}"
