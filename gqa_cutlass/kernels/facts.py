"""What is known of a compiled kernel, as tables and reports give it."""

from __future__ import annotations

import hashlib
from collections.abc import Container, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from gqa_cutlass.codegen import ARCHES, Kernel, MergeConfig, source_digest
from gqa_cutlass.codegen.config import WARP_SIZE, Arch
from gqa_cutlass.codegen.merge import TAGS
from gqa_cutlass.codegen.schema.rounding import round_up
from gqa_cutlass.kernels.store import FailedKernel, StoredKernel

FOUND, COMPILED, FAILED, PLANNED = "found", "compiled", "failed", "to compile"
_REGISTERS_PER_SM, _REGISTERS_AT_ONCE = 65536, 8
_SYSTEM_BYTES = 1024  # of shared memory, that every block costs beside its own


@dataclass(frozen=True, kw_only=True)
class KernelFacts:
    """One kernel for one target; what is not known is None.

    Args:
        name: Its name.
        arch: The target.
        config: The name's parts that matter, for people.
        source_digest: Of its source and headers.
        state: Whether it was found, compiled, failed, or would be compiled.
        registers: Per thread.
        spill_bytes: Of spill stores per thread.
        stack_bytes: Of stack frame per thread.
        shared_bytes: Dynamic shared memory of a block, at most.
        occupancy: Warps on a multiprocessor, by registers, threads and shared memory, as a share
            of the most that it holds.
        bytes_in_flight: Of K and V that one block can have under way.
        code_bytes: Of the cubin or PTX.
        sha256: Of the same.
        seconds: That compiling took.
        error: What the compiler said, of those that failed.
    """

    name: str
    arch: str
    config: str
    source_digest: str
    state: str
    shared_bytes: int
    registers: int | None = None
    spill_bytes: int | None = None
    stack_bytes: int | None = None
    occupancy: float | None = None
    bytes_in_flight: int | None = None
    code_bytes: int | None = None
    sha256: str | None = None
    seconds: float | None = None
    error: str | None = None


def of_result(result: StoredKernel | FailedKernel) -> KernelFacts:
    """The facts of what building a kernel came to."""
    if isinstance(result, FailedKernel):
        plan = planned(result.config, result.arch, None)
        return replace(plan, state=FAILED, error=str(result.error))
    return replace(_stored(result), state=COMPILED if result.was_built else FOUND)


def planned(config: Kernel, arch: str, stored: StoredKernel | None) -> KernelFacts:
    """The facts of a kernel before it is built; those of its code if it is there already."""
    if stored is not None:
        return _stored(stored)
    return KernelFacts(
        name=config.name, arch=arch, config=described(config), source_digest=source_digest(config),
        state=PLANNED, shared_bytes=config.shared_bytes,
        bytes_in_flight=None if isinstance(config, MergeConfig) else config.bytes_in_flight,
    )  # fmt: skip


def report(
    facts: Sequence[KernelFacts],
    *,
    version: str,
    compiler: str,
    earlier: object = None,
    there: Container[tuple[str, str]] = (),
) -> dict[str, object]:
    """A report as JSON has it: nothing in it depends on when or where kernels were compiled.

    Args:
        facts: Of the kernels that were asked for.
        version: The package's.
        compiler: What compiled them.
        earlier: The report so far; its other kernels stay, if they are of the same version and
            compiler, and there or failed. Anything that is no report counts as none.
        there: Names and targets of kernels that there are.
    """
    rows = [asdict(f) | ({} if f.state == FAILED else {"state": "built"}) for f in facts]
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in rows]
    known = {_key(row): row for row in rows}
    for row in _rows_of(earlier, version, compiler):
        if row["state"] == FAILED or _key(row) in there:
            known.setdefault(_key(row), row)
    rows = [known[key] for key in sorted(known)]
    return {
        "version": version,
        "compiler": compiler,
        "built": sum(row["state"] != FAILED for row in rows),
        "failed": sum(row["state"] == FAILED for row in rows),
        "kernels": rows,
    }


def _key(row: Mapping[str, Any]) -> tuple[str, str]:
    return row["name"], row["arch"]


def _rows_of(report: object, version: str, compiler: str) -> list[dict[str, Any]]:
    """The kernels of a report of this version and compiler; none, if there is anything odd."""
    try:
        content: Any = report
        made_by, rows = (content["version"], content["compiler"]), content["kernels"]
        named = (row[name] for row in rows for name in ("name", "arch", "state"))
        right = made_by == (version, compiler) and all(isinstance(each, str) for each in named)
        return [*rows] if right else []
    except (KeyError, TypeError):
        return []


def described(config: Kernel) -> str:
    """A configuration in short."""
    if isinstance(config, MergeConfig):
        parts = [
            "merge",
            TAGS[config.dtype],
            TAGS[config.out_dtype],
            f"align{config.vec_width}",
            f"p{config.parts_at_once}",
        ]
    else:
        values = f"v{config.head_dim_v}" if config.head_dim_v else ""
        parts = [
            config.dtype,
            f"d{config.head_dim}{values}",
            f"g{config.group_size}",
            config.schedule,
            f"h{config.block_h}n{config.block_n}w{config.num_warps}s{config.num_stages}",
            *(policy.tag for policy in config.policies),
        ]
    return " ".join((*parts, "pdl") if config.pdl else parts)


def occupancy(config: Kernel, arch: Arch, registers: int) -> float:
    """Warps on a multiprocessor as a share of the most that it holds.

    After the CUDA C++ Best Practices Guide, "Calculating Occupancy".

    Args:
        config: The kernel.
        arch: Where it runs.
        registers: Per thread.
    """
    by_registers = _REGISTERS_PER_SM // (
        round_up(max(registers, 1), _REGISTERS_AT_ONCE) * config.num_threads
    )
    by_shared = arch.shared_per_sm // (config.shared_bytes + _SYSTEM_BYTES)
    by_threads = arch.max_threads_per_sm // config.num_threads
    warps = min(by_registers, by_shared, by_threads) * config.num_threads // WARP_SIZE
    return warps / (arch.max_threads_per_sm // WARP_SIZE)


def _stored(stored: StoredKernel) -> KernelFacts:
    code, arch = stored.compiled, ARCHES.get(stored.arch)
    facts = replace(
        planned(stored.config, stored.arch, None), state=FOUND, code_bytes=len(code.code),
        sha256=hashlib.sha256(code.code).hexdigest(), seconds=round(code.seconds, 2),
    )  # fmt: skip
    if arch is None:  # PTX, of which the compiler says nothing
        return facts
    return replace(
        facts, registers=code.registers, spill_bytes=code.spill_bytes, stack_bytes=code.stack_bytes,
        occupancy=round(occupancy(stored.config, arch, code.registers), 4),
    )  # fmt: skip
