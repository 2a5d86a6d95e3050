"""Block tables and lengths on the device, as kernels read them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gqa_cutlass.cache.paged.host import on_host
from gqa_cutlass.cache.paged.sequences import NONE, Held
from gqa_cutlass.codegen.schema.problem import MAX_SEQ_LEN


@dataclass(frozen=True, kw_only=True)
class Table:
    """What a kernel must know of a batch of sequences.

    Args:
        block_table: Their pages, int32 [batch, max_pages], -1 behind each sequence's last one
            and for those that it has no more.
        before: Their tokens before the step, int32 [batch].
        after: Their tokens after it.
    """

    block_table: Tensor
    before: Tensor
    after: Tensor


class Tables:
    """Memory for the tables of one step at a time: those of equal shape have equal addresses.

    So plans, which know addresses, go on to fit. A stream does one step after the other, and so may
    overwrite a table that kernels before it read.

    Args:
        device: Where they are.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._memory = _integers(0, device)

    @on_host
    def fill(self, given: Sequence[Held], tokens: Sequence[int], page_size: int) -> Table:
        """The table of a step, without waiting for the device.

        Its width is a power of two, so that there are few.

        Args:
            given: The sequences.
            tokens: What the step adds to each.
            page_size: Tokens of a page.
        """
        batch, most = len(given), max(len(held.pages) for held in given)
        width = min(1 << max(0, most - 1).bit_length(), MAX_SEQ_LEN // page_size)
        entries = batch * width
        size = entries + 2 * batch
        if len(self._memory) < size:
            self._memory = _integers(1 << size.bit_length(), self._device)
        host = torch.empty(size, dtype=torch.int32, pin_memory=self._device.type == "cuda")
        values = host.numpy()
        fill_rows(values[:entries].reshape(batch, width), given)
        before, after = values[entries:].reshape(2, batch)
        before[:] = [held.length for held in given]
        np.add(before, np.asarray(tokens, dtype=np.int32), out=after)
        filled = self._memory[:size].copy_(host, non_blocking=True)
        lengths = filled[entries:].view(2, batch)
        return Table(
            block_table=filled[:entries].view(batch, width), before=lengths[0], after=lengths[1]
        )


def fill_rows(table: np.ndarray, given: Sequence[Held]) -> None:
    """Write the pages of sequences to the rows of a table, as many as it is wide, and no others."""
    table.fill(NONE)
    for row, held in zip(table, given, strict=False):
        pages = held.pages[: len(row)]  # of those ahead there may be more
        row[: len(pages)] = pages


def _integers(count: int, device: torch.device) -> Tensor:
    # A normal tensor, even in inference mode: outside of it nobody may write to the others.
    with torch.inference_mode(False):
        return torch.empty(count, dtype=torch.int32, device=device)
