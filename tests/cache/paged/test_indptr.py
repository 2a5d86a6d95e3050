"""FlashInfer's page tables, to block tables and back."""

from __future__ import annotations

import random
from contextlib import suppress
from typing import Any

import pytest
import torch
from compiling import GROUP
from tensor_kinds import kinds_for
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from gqa_cutlass import (
    CacheAllocationError,
    InputError,
    block_table_from_indptr,
    block_table_to_indptr,
)


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


def test_offsets_that_fall_are_of_sequences_without_pages() -> None:
    table, lengths = block_table_from_indptr(ints(5, 3, -(2**31)), ints(1, 2), ints(1, 1), 4)
    assert table.shape == (2, 0) and lengths.tolist() == [0, 0]


def test_more_pages_than_are_in_the_list_are_no_width() -> None:
    with pytest.raises(InputError, match="indptr: got a sequence of 2147483647 pages; allowed: up"):
        block_table_from_indptr(ints(0, 2**31 - 1), ints(1, 2), ints(1), 4)


def test_more_tokens_than_int32_counts_are_as_many_as_it_does() -> None:
    """Which no cache holds, so that a call finds it out; and not a negative number."""
    given = ints(0, 3, 5), ints(1, 2, 3, 4, 5), ints(7, 9)
    _, lengths = block_table_from_indptr(*given, 2**30)
    assert lengths.tolist() == [2**31 - 1, 2**30 + 9]


def test_a_table_as_large_as_memory_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*given: object, **options: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(torch, "where", none)
    with pytest.raises(CacheAllocationError, match="block_table_from_indptr: memory: got none"):
        block_table_from_indptr(**FROM)
    with pytest.raises(CacheAllocationError, match="block_table_to_indptr: memory: got none"):
        block_table_to_indptr(**TO)


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


VECTORS = [
    (call, right, name)
    for call, right in ((block_table_from_indptr, FROM), (block_table_to_indptr, TO))
    for name, value in right.items()
    if isinstance(value, Tensor)
]


@pytest.mark.parametrize(("call", "right", "name"), VECTORS)
def test_every_kind_of_tensor_that_is_no_plain_one_is_refused(
    call: Any, right: dict[str, Any], name: str
) -> None:
    wrong: dict[str, str] = {}
    kinds = kinds_for(torch.int32, slow=True)
    kinds["freed"] = lambda plain, use: use(shrunk(plain, 0))
    kinds["shrunk"] = lambda plain, use: use(shrunk(plain, 2))
    for kind_name, kind in kinds.items():

        def use(tensor: Tensor, kind_name: str = kind_name) -> None:
            wrong[kind_name] = "accepted"
            try:
                call(**right | {name: tensor})
            except InputError as error:
                assert f"{call.__name__}: " in str(error)
                del wrong[kind_name]
            except Exception as error:
                wrong[kind_name] = repr(error)

        with suppress(RuntimeError):  # of a function transform, which gets no result
            kind(right[name], use)
    assert not wrong


def shrunk(plain: Tensor, size: int) -> Tensor:
    """A copy, whose storage ends before it does."""
    copy = plain.clone()
    copy.untyped_storage().resize_(size)
    return copy


BOTH = [(block_table_from_indptr, FROM), (block_table_to_indptr, TO)]


@pytest.mark.parametrize(("call", "right"), BOTH)
def test_tensors_without_values_have_no_table(call: Any, right: dict[str, Any]) -> None:
    """Unless it is known how wide that is."""
    without = {n: t.to("meta") if isinstance(t, Tensor) else t for n, t in right.items()}
    with pytest.raises(InputError, match="meta device"):
        call(**without)
    if call is block_table_from_indptr:
        table, lengths = call(**without, max_pages=3)
        assert (table.shape, lengths.shape) == ((2, 3), (2,)) and table.is_meta
    with FakeTensorMode(), pytest.raises(InputError, match="surroundings: got torch.empty making"):
        call(**right)


@pytest.mark.xdist_group(GROUP)
def test_a_conversion_can_be_compiled() -> None:
    torch._dynamo.reset()
    convert = torch.compile(block_table_from_indptr, backend="eager", fullgraph=True)
    right = block_table_from_indptr(**FROM, max_pages=3)
    assert all(map(torch.equal, convert(**FROM, max_pages=3), right))
    torch._dynamo.reset()
