"""Arrays of other libraries, without a copy: CuPy on a GPU, NumPy without one.

`torch.from_dlpack` makes a tensor of an array's memory, and the library's own `from_dlpack` an
array of the result; both order their streams. JAX's arrays go the same way, but may only be read:
use them for q, k and v, not for caches, which are written. CuPy and NumPy have no bfloat16.
"""

from __future__ import annotations

from typing import Any

import torch

from gqa_cutlass import gqa_decode

BATCH, Q_HEADS, KV_HEADS, HEAD_DIM, ROOM, HELD = 2, 4, 1, 64, 16, 5


def main(library: Any = None) -> Any:
    """Decode on arrays; returns the output, an array as well."""
    if library is None:
        import numpy as library
    q = library.ones((BATCH, Q_HEADS, HEAD_DIM), "float16")
    k, v = (library.full((BATCH, KV_HEADS, HEAD_DIM), n, "float16") for n in (0.5, 2.0))
    k_cache, v_cache = (library.ones((BATCH, ROOM, KV_HEADS, HEAD_DIM), "float16") for _ in "kv")

    tensors = [torch.from_dlpack(array) for array in (q, k_cache, v_cache, k, v)]
    out = library.from_dlpack(gqa_decode(*tensors, cache_seqlens=HELD))

    assert (k_cache[:, HELD] == k).all() and (v_cache[:, HELD] == v).all()  # written in place
    print(type(out).__module__, out.shape, "first element", float(out[0, 0, 0]))
    return out


if __name__ == "__main__":
    if torch.cuda.is_available():
        import cupy

        main(cupy)
    else:
        main()
