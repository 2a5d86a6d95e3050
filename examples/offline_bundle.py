"""Kernels built on one machine and used on another, where nothing may be compiled.

    python offline_bundle.py build FOLDER    where there is a compiler; needs no GPU
    python offline_bundle.py serve FOLDER    where there is none, or it must not run

The command line does the first as well: gqa-cutlass build --kernels NAME --arch sm_90a --out FOLDER
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import gqa_cutlass
from gqa_cutlass.gpu.driver import describe_device
from gqa_cutlass.kernels.store import Store, build_all

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
Q_HEADS, KV_HEADS, HEAD_DIM, ROOM = (32, 8, 128, 4096) if GPU else (4, 1, 64, 32)


def tensors(device: str) -> list[torch.Tensor]:
    """A decode step of the model that is to be served."""
    kind = {"dtype": torch.float16, "device": device}
    cache = 1, ROOM, KV_HEADS, HEAD_DIM
    return [
        torch.zeros(1, Q_HEADS, HEAD_DIM, **kind), torch.zeros(cache, **kind),
        torch.zeros(cache, **kind), *torch.zeros(2, 1, KV_HEADS, HEAD_DIM, **kind),
    ]  # fmt: skip


def build(folder: Path) -> None:
    """Compile the kernels that the step may take, with lengths that are about equal or not."""
    for ragged in (False, True):
        kernel = gqa_cutlass.explain(*tensors("meta"), ragged=ragged).dispatch.config
        target = describe_device(0).arch.name if GPU else kernel.ptx_arch  # what the simulator runs
        for stored in build_all(Store(root=folder), [(kernel, target)], jobs=1):
            print("built", stored.path.name)


def serve() -> None:
    """Decode, as a program would that knows nothing of all this."""
    lengths = torch.tensor([5], dtype=torch.int32, device=DEVICE)
    out = gqa_cutlass.gqa_decode(*tensors(DEVICE), cache_seqlens=lengths)
    print("served", list(out.shape))


def main() -> str:
    """Build, then serve in a process that has nothing but the folder; returns what it printed."""
    with tempfile.TemporaryDirectory() as name:
        folder, empty = Path(name) / "kernels", Path(name) / "store"
        build(folder)
        environment = {
            "GQA_CUTLASS_KERNEL_DIR": str(folder),  # read, never written
            "GQA_CUTLASS_DISABLE_JIT": "1",  # a kernel that is missing is an error
            "GQA_CUTLASS_CACHE_DIR": str(empty),
        }
        served = subprocess.run(
            [sys.executable, __file__, "serve", str(folder)],
            env=os.environ | environment, check=True, capture_output=True, text=True,
        ).stdout  # fmt: skip
        assert not empty.exists(), "something was compiled"
    print(served, end="")
    return served


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["build", folder]:
            build(Path(folder))
        case ["serve", _]:
            serve()
        case _:
            main()
