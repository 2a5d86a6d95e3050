"""Arrays of other libraries, by DLPack and `__cuda_array_interface__`: the same memory, no copy."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from cases import Step, make_step
from helpers import check
from torch import Tensor

from gqa_cutlass import gqa_decode

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("way", ["DLPack", "__cuda_array_interface__"])
def test_cupys_streams_are_waited_for(way: str) -> None:
    """What CuPy still writes when it hands an array over is there when the kernel reads it."""
    cupy = pytest.importorskip("cupy")
    step = make_step(lengths=[500, 3], max_seq_len=512)
    stream = cupy.cuda.Stream(non_blocking=True)
    torch.cuda.synchronize()
    with stream:
        spin = cupy.ones((4096, 4096), "float32")
        for _ in range(20):
            spin = spin @ spin * 0
        q = cupy.from_dlpack(step.q) + spin[0, 0].astype("float16")
        if way == "DLPack":
            tensor = torch.from_dlpack(q)
        else:  # by this one nobody waits: the caller orders the streams
            tensor = torch.as_tensor(q, device="cuda")
            torch.cuda.current_stream().wait_stream(torch.cuda.ExternalStream(stream.ptr))
    assert tensor.data_ptr() == q.data.ptr
    out = decode(step, tensor)
    check(step, out)


def test_jaxs_arrays_are_read_in_place() -> None:
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    jax = pytest.importorskip("jax")
    step = make_step(lengths=[500, 3], max_seq_len=512)
    arrays = [jax.dlpack.from_dlpack(t.contiguous()) + 0 for t in (step.q, step.k, step.v)]
    q, k, v = (torch.from_dlpack(array) for array in arrays)
    assert q.data_ptr() == arrays[0].unsafe_buffer_pointer()
    out = gqa_decode(q, step.k_cache, step.v_cache, k, v, cache_seqlens=step.seqlens)
    back = jax.dlpack.from_dlpack(out)
    assert back.unsafe_buffer_pointer() == out.data_ptr()
    check(step, torch.from_dlpack(back))


def decode(step: Step, q: Any) -> Tensor:
    out = gqa_decode(q, *step.tensors()[1:], cache_seqlens=step.seqlens)
    assert isinstance(out, Tensor)
    return out
