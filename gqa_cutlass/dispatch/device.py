"""GPUs, as far as dispatch needs to know them."""

from __future__ import annotations

from dataclasses import dataclass

from gqa_cutlass.codegen.config import ARCHES, Arch
from gqa_cutlass.errors import DeviceError

MIN_CAPABILITY = 80


@dataclass(frozen=True, kw_only=True)
class Device:
    """What dispatch and launch need to know of a GPU.

    Args:
        index: CUDA ordinal.
        arch: Its compilation target.
        num_sms: Multiprocessors.
        name: What the driver calls it; empty for a stand-in.
    """

    index: int
    arch: Arch
    num_sms: int
    name: str = ""


def model_device(arch: Arch) -> Device:
    """A stand-in for a GPU that is not there: an H200's 132 multiprocessors."""
    return Device(index=-1, arch=arch, num_sms=132)


def arch_of(capability: int) -> Arch:
    """The compilation target for a compute capability (90 for 9.0).

    A GPU between two targets of one major version takes the lower one: cubins run on later minor
    versions (except those of architecture-specific targets, which run on theirs alone).

    Raises:
        DeviceError: Older than 8.0, or not known.
    """
    if capability < MIN_CAPABILITY:
        raise DeviceError(
            f"GPU of compute capability {capability / 10:.1f}: too old; allowed: 8.0 (Ampere) and "
            "newer, for mma.sync m16n8k16 and cp.async. Nothing was launched."
        )
    fits = [arch for arch in ARCHES.values() if _runs_on(arch, capability)]
    if not fits:
        raise DeviceError(
            f"GPU of compute capability {capability / 10:.1f}: not known to this version; known: "
            f"{', '.join(ARCHES)}. Upgrade gqa-cutlass."
        )
    return max(fits, key=lambda arch: arch.capability)


def _runs_on(arch: Arch, capability: int) -> bool:
    if arch.exact:
        return arch.capability == capability
    return arch.capability <= capability < (arch.capability // 10 + 1) * 10
