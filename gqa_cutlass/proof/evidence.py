"""GPU evidence: which kernel sources were tested on which GPU, and how large their errors were.

CI has no GPU, so the repository carries the record. It is written by the GPU test suite alone.
"""

from __future__ import annotations

import datetime
import json
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from gqa_cutlass.checkout import ROOT, is_checkout
from gqa_cutlass.codegen.files import read_json
from gqa_cutlass.codegen.merge import Kernel
from gqa_cutlass.codegen.render import code_digest
from gqa_cutlass.errors import InputError

FILE = ROOT / "tests" / "gpu_evidence.json"
_ALLOWED = "JSON that `make gpu-test` wrote"


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """The record.

    Args:
        run: GPU, driver, CUDA, torch and date of the run that wrote it.
        kernels: Per kernel name: the digest of its code, cases run, and the worst error as a share
            of what the error rule allows.
        known: Whether there is a record to look into: a checkout has one, an installed package not.
    """

    run: dict[str, str] = field(default_factory=dict)
    kernels: dict[str, dict[str, Any]] = field(default_factory=dict)
    known: bool = True

    @classmethod
    def shipped(cls) -> Evidence:
        """The repository's record; empty where there is none, and not known outside a checkout.

        Raises:
            InputError: The file holds something else.
        """
        if not FILE.exists():
            return cls(known=is_checkout())
        match read_json("evidence", FILE, _ALLOWED):
            case {"run": {"gpu": str(), "date": str()} as run, "kernels": dict() as kernels} if all(
                isinstance(entry, dict) for entry in kernels.values()
            ):
                return cls(run=run, kernels=kernels)
        raise InputError(f"evidence: got {FILE}, which is no record; allowed: {_ALLOWED}.")

    def is_current(self, config: Kernel) -> bool:
        """Whether the kernel's present source is what was tested, comments and layout aside."""
        return self.kernels.get(config.name, {}).get("digest") == code_digest(config)

    def missing(self, configs: Iterable[Kernel]) -> list[Kernel]:
        """Kernels whose present source was not tested."""
        return [config for config in configs if not self.is_current(config)]

    def describe(self, config: Kernel) -> str:
        """One phrase for a table."""
        if not self.known:
            return "not known here"
        if config.name not in self.kernels:
            return "none"
        return f"{self.run['gpu']}, {self.run['date']}" if self.is_current(config) else "outdated"

    def write(self) -> None:
        """Write the repository's record."""
        FILE.write_text(json.dumps({"run": self.run, "kernels": self.kernels}, indent=1) + "\n")


def provenance() -> dict[str, str]:
    """What a result on this machine's GPU depends on: GPU, driver, compiler, torch and date.

    Raises:
        DeviceError: No usable GPU.
        CompilerMissingError: NVRTC or a header is not installed.
    """
    import torch

    from gqa_cutlass.codegen.compile import compiler_version
    from gqa_cutlass.gpu.driver import driver_version

    return {
        "gpu": torch.cuda.get_device_name(),
        "driver": f"{ask_gpu('driver_version')} (CUDA {driver_version()})",
        "compiler": compiler_version(),
        "torch": str(torch.__version__),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
    }


def ask_gpu(fields: str) -> str:
    """What nvidia-smi says of torch's current GPU; "unknown" where it cannot be asked."""
    import torch

    uuid = torch.cuda.get_device_properties(torch.cuda.current_device()).uuid
    query = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", f"--id=GPU-{uuid}"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
