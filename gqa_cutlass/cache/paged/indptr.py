"""FlashInfer's page tables as block tables, and back.

FlashInfer says of a batch which pages it has in one list: `indices[indptr[b]:indptr[b + 1]]` are
those of sequence b, and `last_page_len[b]` tokens are in the last of them. That counts the new
token, if one was appended; `cache_seqlens` of a call that appends it does not.
"""

from __future__ import annotations

from functools import partial
from typing import NoReturn

import torch
from torch import Tensor

from gqa_cutlass.cache.guard import with_memory
from gqa_cutlass.cache.inputs import surroundings_flaw
from gqa_cutlass.errors import InputError, shown
from gqa_cutlass.tensors import flaw, is_tensor, memory_flaw
from gqa_cutlass.tracing import is_traced

_MOST = 2**31 - 1
_FROM, _TO = "block_table_from_indptr", "block_table_to_indptr"


def block_table_from_indptr(
    indptr: Tensor,
    indices: Tensor,
    last_page_len: Tensor,
    page_size: int,
    *,
    new_tokens: int = 0,
    max_pages: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Convert FlashInfer's page table to a block table and lengths.

    Does not wait for the device if `max_pages` is given. What the tensors hold is not checked, but
    for that width; no memory outside of `indices` is read, whatever that is.

    Args:
        indptr: Where each sequence's pages begin and end in `indices`, int32 [batch + 1].
        indices: Pages, int32 [pages], on the same device.
        last_page_len: Tokens in each sequence's last page, int32 [batch]; without effect for a
            sequence without pages.
        page_size: Tokens of a page.
        new_tokens: Tokens of each sequence that the table counts already, and that the call which
            gets the result appends: 1 for a decode step with k and v; 0, the default, for one
            that appends nothing.
        max_pages: Width of the block table; None: as many as the longest sequence has, for which
            the host waits.

    Returns:
        `block_table`, int32 [batch, max_pages], with -1 behind each sequence's last page, and
        `cache_seqlens`, int32 [batch], which is -1 (inactive) for a sequence of fewer than
        `new_tokens` tokens.

    Raises:
        InputError: A tensor is of another type or shape, or elsewhere; or a number is not allowed.
        CacheAllocationError: There is no memory for the table.
    """
    batch = _length(_FROM, "indptr", indptr, indptr) - 1
    if batch < 0:
        _fail(_FROM, "indptr", "no elements", "one more than there are sequences")
    _length(_FROM, "indices", indices, indptr)
    if _length(_FROM, "last_page_len", last_page_len, indptr) != batch:
        got = f"{list(last_page_len.shape)}"
        _fail(_FROM, "last_page_len", got, f"[{batch}], for indptr is {list(indptr.shape)}")
    _check_ints(_FROM, 1, page_size=page_size)
    _check_ints(_FROM, 0, new_tokens=new_tokens)
    if max_pages is not None:
        _check_ints(_FROM, 0, max_pages=max_pages)
    elif indptr.is_meta:
        _fail(_FROM, "max_pages", "None", "an int for tensors on the meta device, without values")
    convert = partial(_table, indptr, indices, last_page_len, page_size, new_tokens, max_pages)
    return convert() if is_traced() else with_memory(_FROM, indptr.device, convert)


def _table(
    indptr: Tensor,
    indices: Tensor,
    last_page_len: Tensor,
    page_size: int,
    new_tokens: int,
    max_pages: int | None,
) -> tuple[Tensor, Tensor]:
    batch, ends = len(last_page_len), indptr.long()  # whose differences int32 need not hold
    counts = ends[1:] - ends[:-1]
    if max_pages is None:
        max_pages = max(0, int(counts.max())) if batch else 0
        if max_pages > len(indices):
            got = f"a sequence of {max_pages} pages"
            _fail(_FROM, "indptr", got, f"up to {len(indices)}, as many as are in indices")
    column = torch.arange(max_pages, dtype=torch.int32, device=indptr.device)
    places = (ends[:-1, None] + column).clamp_(0, max(0, len(indices) - 1))
    table = indices.new_full((batch, max_pages), -1)
    if len(indices):
        table = torch.where(column < counts[:, None], indices[places], table)
    tokens = (counts - 1) * page_size + last_page_len
    tokens = torch.where(counts > 0, tokens, 0) - new_tokens
    return table, tokens.clamp_(-1, _MOST).int()  # too many for int32 are too many for any cache


def block_table_to_indptr(
    block_table: Tensor, cache_seqlens: Tensor, page_size: int, *, new_tokens: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Convert a block table and lengths to FlashInfer's page table. Waits for the device.

    Args:
        block_table: Pages of each sequence, int32 [batch, max_pages].
        cache_seqlens: Tokens of each sequence, int32 [batch], on the same device; a negative one
            is of an inactive row, which gets no page.
        page_size: Tokens of a page.
        new_tokens: Tokens of each sequence that are appended before FlashInfer reads the table,
            and that it counts.

    Returns:
        `indptr`, int32 [batch + 1], `indices`, int32 [pages], and `last_page_len`, int32 [batch],
        0 for a sequence without pages.

    Raises:
        InputError: A tensor is of another type or shape, or elsewhere; a number is not allowed; or
            a sequence has more tokens than its row has pages for.
        CacheAllocationError: There is no memory for the lists.
    """
    batch = _length(_TO, "cache_seqlens", cache_seqlens, cache_seqlens)
    _check(_TO, "block_table", block_table, cache_seqlens)
    if block_table.dim() != 2 or len(block_table) != batch:
        _fail(_TO, "block_table", f"{list(block_table.shape)}", f"[{batch}, max_pages]")
    _check_ints(_TO, 1, page_size=page_size)
    _check_ints(_TO, 0, new_tokens=new_tokens)
    if cache_seqlens.is_meta:
        _fail(_TO, "cache_seqlens", "a tensor on the meta device", "lengths that have values")
    convert = partial(_lists, block_table, cache_seqlens, page_size, new_tokens)
    return convert() if is_traced() else with_memory(_TO, block_table.device, convert)


def _lists(
    block_table: Tensor, cache_seqlens: Tensor, page_size: int, new_tokens: int
) -> tuple[Tensor, Tensor, Tensor]:
    batch, active = len(cache_seqlens), cache_seqlens >= 0
    tokens = torch.where(active, cache_seqlens.long() + new_tokens, 0)
    counts = (tokens + page_size - 1) // page_size
    max_pages = block_table.shape[1]
    if batch and int(counts.max()) > max_pages:
        got = f"{int(tokens.max())} tokens in pages of {page_size}"
        _fail(_TO, "cache_seqlens", got, f"up to {max_pages * page_size}: {max_pages} pages")
    indptr = torch.zeros(batch + 1, dtype=torch.int32, device=block_table.device)
    indptr[1:] = counts.cumsum(0)
    column = torch.arange(max_pages, device=block_table.device)
    indices = block_table[column < counts[:, None]]
    last = torch.where(counts > 0, tokens - (counts - 1) * page_size, 0)
    return indptr, indices, last.int()


def _length(call: str, name: str, tensor: Tensor, first: Tensor) -> int:
    """Elements of a vector of int32."""
    _check(call, name, tensor, first)
    if tensor.dim() != 1:
        _fail(call, name, f"{list(tensor.shape)}", "one dimension")
    return len(tensor)


def _check(call: str, name: str, tensor: Tensor, first: Tensor) -> None:
    if not (is_traced() and is_tensor(tensor)):  # which knows kinds by other means
        if found := surroundings_flaw():
            _fail(call, "surroundings", *found)
        if found := flaw(tensor) or (None if tensor.is_meta else memory_flaw(tensor)):
            _fail(call, name, *found)
    if tensor.dtype != torch.int32 or tensor.device != first.device:
        got = f"{tensor.dtype} on {tensor.device}"
        convert = "; convert with .int()" if tensor.dtype != torch.int32 else ""
        _fail(call, name, got, f"torch.int32 on {first.device}, like the others{convert}")


def _check_ints(call: str, least: int, **values: int) -> None:
    for name, value in values.items():
        if type(value) is not int or not least <= value <= _MOST:
            _fail(call, name, shown(value), f"an int from {least} to {_MOST}")


def _fail(call: str, what: str, got: str, allowed: str) -> NoReturn:
    raise InputError(f"{call}: {what}: got {got}; allowed: {allowed}. Nothing was converted.")
