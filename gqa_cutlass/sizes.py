"""Sizes that come as numbers: refused here, before tensors are made of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from gqa_cutlass.codegen.config import HEAD_DIM_RULE, HEAD_DIMS
from gqa_cutlass.codegen.schema.problem import MAX_BATCH, MAX_SEQ_LEN, MAX_SPLITS
from gqa_cutlass.errors import GqaError, InputError

_GRID_X = 2**31 - 1  # blocks, of which every KV head takes one or more
_ALLOWED = {
    "cache_len": range(MAX_SEQ_LEN),
    "max_seq_len": range(1, MAX_SEQ_LEN + 1),
    "max_seqlen": range(1, MAX_SEQ_LEN + 1),
    "batch": range(1, MAX_BATCH + 1),
    "q_heads": range(1, _GRID_X + 1),
    "kv_heads": range(1, _GRID_X + 1),
    "head_dim": HEAD_DIMS,
    "window": range(MAX_SEQ_LEN + 1),
    "splits": range(MAX_SPLITS + 1),
}


def check_sizes(command: str, **sizes: int) -> None:
    """Check each size by itself.

    Args:
        command: In whose name an error is.
        sizes: By the names of the command's options.

    Raises:
        InputError: There is no such size.
    """
    for name, value in sizes.items():
        allowed = _ALLOWED[name]
        if value not in allowed:
            rule = HEAD_DIM_RULE if name == "head_dim" else f"{allowed[0]} to {allowed[-1]}"
            raise InputError(f"{command}: {name}: got {value}; allowed: {rule}.")


def check_room(
    command: str, name: str, value: int, *, least: int, each: int, fixed: int, room: int, where: str
) -> None:
    """Check that what a size leads to has room.

    Args:
        command: In whose name an error is.
        name: The size that is the one to change.
        value: What was given for it.
        least: The least that may be given.
        each: Bytes for each of it.
        fixed: Bytes besides.
        room: Bytes that there are.
        where: Which they are, in words.

    Raises:
        InputError: There is too little room.
    """
    needed = fixed + value * each
    if needed > room:
        most = min((room - fixed) // each, _ALLOWED[name][-1])
        rule = f"{least} to {most}" if most >= least else "none, the other sizes being as they are"
        raise InputError(
            f"{command}: {name}: got {value}, for which about {needed} bytes "
            f"({needed / 2**30:.3g} GiB) are needed; allowed: {rule}, for {room} bytes are "
            f"{where}. Nothing was launched."
        )


@contextmanager
def enough_memory(command: str) -> Iterator[None]:
    """Turn an allocation that fails meanwhile into an error of ours.

    Raises:
        InputError: There is not enough memory.
    """
    try:
        yield
    except GqaError:
        raise
    except (MemoryError, RuntimeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        # On the CPU torch raises nothing more special.
        special = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if not (special or "DefaultCPUAllocator" in reason):
            raise
        raise InputError(
            f"{command}: the sizes: got more than there is memory for ({reason}); allowed: less. "
            "Take a shorter cache, or fewer sequences or heads."
        ) from error
