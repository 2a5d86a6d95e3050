"""What launches may touch of a paged cache: rows of their own sequences' tokens, and no others."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from cases import make_step
from featured import kernel_of
from torch import Tensor

import gqa_cutlass
from gqa_cutlass.codegen.schema.params import Params, TmaParams
from gqa_cutlass.cpu.executor import regions_of
from gqa_cutlass.cpu.pages import by_page
from gqa_cutlass.errors import KernelFault
from gqa_cutlass.ptxsim.memory.spaces import OVERREAD, READ, WRITE, AccessError, GlobalMemory
from gqa_cutlass.tensormap import map_of

PROCESS = "features"  # has these kernels
HEADS, DIM = 2, 8


def pools(num_pages: int, page_size: int, form: str) -> tuple[Tensor, Tensor]:
    """Keys and values, [pages, tokens, heads, dim], in memory of one or of two, in any order."""
    if form == "packed":
        both = torch.zeros(num_pages, HEADS, page_size, 2 * DIM).half().transpose(1, 2)
        return both[..., :DIM], both[..., DIM:]
    k, v = torch.zeros(2, num_pages, page_size, HEADS, DIM).half()
    return k, v


class Launch:
    """A launch at random, and what it may touch, found token by token."""

    def __init__(self, seed: int) -> None:
        r = random.Random(seed)
        self.box, self.form = r.choice([1, 16]), r.choice(["packed", "apart"])
        self.page_size = r.choice([16, 48] if self.box > 1 else [1, 3, 16])
        self.pages, width = r.randint(1, 12), r.randint(1, 5)
        self.batch, rows, self.append = r.randint(1, 5), r.randint(1, 6), r.random() < 0.7
        indexed = r.random() < 0.5
        rows = rows if indexed else self.batch
        most = width * self.page_size
        self.k, self.v = pools(self.pages, self.page_size, self.form)
        ints = {
            "block_table": [[r.randint(-1, self.pages) for _ in range(width)] for _ in range(rows)],
            "seqlens": [r.randint(-1, most + 1) for _ in range(self.batch)],
            "cache_batch_idx": [r.randint(-1, rows) for _ in range(self.batch)]
            if indexed
            else None,
            "cache_leftpad": r.choice([None, [r.randint(-2, most) for _ in range(self.batch)]]),
        }
        slots = [r.randint(-2, self.pages * self.page_size + 1) for _ in range(self.batch)]
        self.ints = {name: values for name, values in ints.items() if values is not None}
        self.slots = r.choice([None, slots])
        self.window, self.most = r.choice([-1, 0, r.randint(0, most)]), most
        tensors = {name: torch.tensor(v, dtype=torch.int32) for name, v in self.ints.items()}
        if self.slots:
            tensors["slot_mapping"] = torch.tensor(self.slots)
        self.tensors = tensors | {"k_cache": self.k, "v_cache": self.v}
        params = Params(max_seq_len=most, window_left=self.window, num_pages=self.pages,
                        page_size=self.page_size, k_new=int(self.append))  # fmt: skip
        for name, tensor in self.tensors.items():
            setattr(params, name, tensor.data_ptr())
        maps = b"".join(map_of(t.data_ptr(), t.shape, t.stride(), t.itemsize, 16).to_bytes()
                        for t in (self.k, self.v))  # fmt: skip
        tma = TmaParams.from_buffer_copy(bytes(params) + maps)
        self.argument = tma if self.box > 1 else params

    def touched(self) -> dict[int, set[int]]:
        """Rows that are used, that boxes reach besides, and that are written."""
        used, boxes, new = set[int](), set[int](), set[int]()
        table, size = self.ints["block_table"], self.page_size

        def row(b: int, token: int) -> list[int]:
            page = table[index[b]][token // size]
            return [page * size + token % size] if 0 <= page < self.pages else []

        index: Sequence[int] = self.ints.get("cache_batch_idx", range(self.batch))
        padding = self.ints.get("cache_leftpad", [0] * self.batch)
        for b, length in enumerate(self.ints["seqlens"]):
            if not 0 <= length <= self.most - self.append or not 0 <= index[b] < len(table):
                continue
            query = length - 1 + self.append
            seen = [
                t for t in range(length)
                if t >= padding[b] and (self.window < 0 or t >= query - self.window)
            ]  # fmt: skip
            first = max(padding[b], query - self.window if self.window >= 0 else 0, 0)
            used.update(i for t in seen for i in row(b, t))
            for start in range(0, length, self.box):
                if start + self.box > first:
                    boxes.update(i for t in range(start, start + self.box) for i in row(b, t))
            if self.append and self.slots is None:
                new.update(row(b, length))
            elif self.append and self.slots is not None:
                new.update({self.slots[b]} & set(range(self.pages * size)))
        return {READ: used, READ | OVERREAD: boxes - used, WRITE: new}


def test_rows_are_those_that_launches_have_business_with() -> None:
    for seed in range(150):
        launch = Launch(seed)
        regions = regions_of(launch.tensors, launch.append, launch.box > 1)
        found = by_page(regions, launch.argument, launch.batch)
        assert [r.rows is not None for r in found] == [r.name[1:] == "_cache" for r in found]
        right = launch.touched()
        rows = found[-1].rows
        assert rows is not None and {f: set(r.tolist()) for f, r in rows.items()} == right, seed
        if seed < 25:
            check_memory(launch, GlobalMemory(found), right)


def check_memory(launch: Launch, memory: GlobalMemory, right: dict[int, set[int]]) -> None:
    """Every row of every head can be read, written and overread as it is said, and no further."""
    reads, writes = right[READ] | right[READ | OVERREAD], right[WRITE]
    for pool in (launch.k, launch.v):
        for row in range(launch.pages * launch.page_size):
            page, token = divmod(row, launch.page_size)
            where = np.array([pool[page, token, h].data_ptr() for h in range(HEADS)])
            for size in (2, 4, 8, 16):
                ends = where + 2 * DIM - size
                assert allowed(lambda at=ends, n=size: memory.check_read(at, n)) == (row in reads)
            zeros = np.zeros((HEADS, 2), dtype=np.uint64)
            assert allowed(lambda at=where, z=zeros: memory.store(at, z)) == (row in writes)
            overread = memory.overread(where).tolist()
            over = launch.box > 1 and row in right[READ | OVERREAD]
            assert overread == [over] * HEADS


def allowed(access: object) -> bool:
    try:
        access()  # type: ignore[operator]
    except AccessError as error:
        assert "that this launch may" in str(error) or "not to be written" in str(error)
        return False
    return True


@pytest.mark.parametrize("kind", ["tensorop", "tma"])
def test_who_appends_where_another_sequence_reads_races(kind: str) -> None:
    """In a page of both; a box that reaches into that row and does not use it is no race."""
    config = kernel_of(kind, "paged")
    for other, races in ((66, False), (72, True)):
        step = make_step(
            dtype=config.dtype, lengths=[70, other, 7], max_seq_len=80, head_dim=64,
            num_kv_heads=1, vec_width=config.vec_width, device="cpu",
        )  # fmt: skip
        step.into_pages(16)
        assert step.block_table is not None
        page = step.block_table[1] = step.block_table[0]
        slots = torch.tensor([int(page[4]) * 16 + 6, -1, -1])
        plan = gqa_cutlass.plan(
            *step.tensors(), cache_seqlens=step.seqlens, kernel=config, num_splits=2,
            block_table=step.block_table, slot_mapping=slots,
        )  # fmt: skip
        if races:
            with pytest.raises(KernelFault, match=r"race in global memory: .* in row 6 of page "):
                plan(*step.tensors(), step.seqlens)
        else:
            plan(*step.tensors(), step.seqlens)
            assert torch.equal(step.k_cache[page[4], 6], step.k[0])  # type: ignore[index]
