"""FlashInfer's page tables, to block tables and back."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from gqa_cutlass import InputError, block_table_from_indptr, block_table_to_indptr


def ints(*values: int, device: str = "cpu") -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def test_a_table_by_hand() -> None:
    """Three pages with 2 tokens in the last, none, and one that is full."""
    indptr, indices, last = ints(0, 3, 3, 4), ints(7, 5, 9, 2), ints(2, 0, 4)
    table, lengths = block_table_from_indptr(indptr, indices, last, 4)
    assert table.tolist() == [[7, 5, 9], [-1, -1, -1], [2, -1, -1]]
    assert lengths.tolist() == [10, 0, 4] and lengths.dtype == table.dtype == torch.int32
    back = block_table_to_indptr(table, lengths, 4)
    assert [t.tolist() for t in back] == [[0, 3, 3, 4], [7, 5, 9, 2], [2, 0, 4]]
    assert {t.dtype for t in back} == {torch.int32}


def test_the_new_token_is_counted_there_and_not_here() -> None:
    table, lengths = block_table_from_indptr(
        ints(0, 2, 3, 3), ints(4, 6, 1), ints(1, 3, 0), 4, new_tokens=1, max_pages=3
    )
    assert table.tolist() == [[4, 6, -1], [1, -1, -1], [-1, -1, -1]]
    assert lengths.tolist() == [4, 2, -1], "without a token there is no row to decode"
    back = block_table_to_indptr(table, lengths, 4, new_tokens=1)
    assert [t.tolist() for t in back] == [[0, 2, 3, 3], [4, 6, 1], [1, 3, 0]]


@pytest.mark.parametrize("page_size", [1, 3, 16])
def test_there_and_back(page_size: int, device: str) -> None:
    rng = random.Random(page_size)
    for batch in (0, 1, 5):
        lengths = [rng.choice([-1, 0, 1, page_size, rng.randint(0, 50)]) for _ in range(batch)]
        counts = [-(-max(0, n) // page_size) for n in lengths]
        max_pages = max(counts, default=0) + 2
        table = torch.randint(0, 99, (batch, max_pages), dtype=torch.int32, device=device)
        held = ints(*lengths, device=device)
        indptr, indices, last = block_table_to_indptr(table, held, page_size)
        assert indptr.tolist() == [sum(counts[:b]) for b in range(batch + 1)]
        pages = [table[b, :count].tolist() for b, count in enumerate(counts)]
        assert indices.tolist() == sum(pages, [])
        table, held = block_table_from_indptr(indptr, indices, last, page_size, max_pages=max_pages)
        assert held.tolist() == [max(0, n) for n in lengths]
        expected = [row + [-1] * (max_pages - len(row)) for row in pages]
        assert table.tolist() == expected


def test_no_page_is_read_from_outside_of_the_list() -> None:
    """Offsets are data, which the host cannot check without waiting."""
    table, _ = block_table_from_indptr(ints(5, 99, -3), ints(1, 2), ints(1, 1), 4, max_pages=3)
    assert set(table.flatten().tolist()) <= {1, 2, -1}


FROM: dict[str, Any] = dict(
    indptr=ints(0, 1, 2), indices=ints(3, 4), last_page_len=ints(1, 1), page_size=4
)
TO: dict[str, Any] = dict(block_table=ints(1, 2)[None], cache_seqlens=ints(5), page_size=4)


@pytest.mark.parametrize(
    ("call", "right", "name", "bad"),
    [
        (block_table_from_indptr, FROM, "indptr", ints(0, 1, 2).long()),
        (block_table_from_indptr, FROM, "indptr", ints()),
        (block_table_from_indptr, FROM, "indptr", ints(0)[None]),
        (block_table_from_indptr, FROM, "indptr", [0, 1, 2]),
        (block_table_from_indptr, FROM, "indices", ints(3, 4).to("meta")),
        (block_table_from_indptr, FROM, "last_page_len", ints(1)),
        (block_table_from_indptr, FROM, "page_size", 0),
        (block_table_from_indptr, FROM, "max_pages", -1),
        (block_table_from_indptr, FROM, "new_tokens", 1.0),
        (block_table_to_indptr, TO, "block_table", ints(1, 2)),
        (block_table_to_indptr, TO, "block_table", torch.ones(2, 1, dtype=torch.int32)),
        (block_table_to_indptr, TO, "cache_seqlens", ints(5).float()),
        (block_table_to_indptr, TO, "cache_seqlens", ints(9)),
        (block_table_to_indptr, TO, "new_tokens", -1),
        (block_table_to_indptr, TO, "page_size", True),
    ],
)
def test_what_is_no_table_is_refused(call: Any, right: dict[str, Any], name: str, bad: Any) -> None:
    call(**right)
    with pytest.raises(InputError) as raised:
        call(**right | {name: bad})
    message = str(raised.value)
    assert f"{call.__name__}: {name}: got " in message and "; allowed: " in message
