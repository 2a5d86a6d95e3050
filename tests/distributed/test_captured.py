"""Captured steps over shards on two GPUs, which NCCL connects, against one GPU that has all."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import REPOSITORY

RANKS = 2


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < RANKS, reason="needs two GPUs")
def test_captured_steps_are_those_of_one_gpu(tmp_path: Path) -> None:
    program = REPOSITORY / "tests" / "captured_ranks.py"
    ranks = [
        subprocess.Popen(
            [sys.executable, program, str(rank), str(RANKS), tmp_path],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(RANKS)
    ]  # fmt: skip
    try:
        told = [rank.communicate(timeout=300)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0] * RANKS, "\n".join(told)
