"""Bugs of pages."""

from __future__ import annotations

from mutants.cases import PAGED, PAGED_CLUSTER, PAGED_CLUSTERS, PAGED_LONG
from mutants.mutant import Mutant

NOT_OF_THE_LAUNCH = "in no row of its pages that this launch may"

PAGES = (
    Mutant(
        name="tokens of a page counted from the sequence's first",
        header="cache_paged.cuh",
        old="return token - page_of(p, token) * p.page_size;",
        new="return token;",
        fault=f"{NOT_OF_THE_LAUNCH} read; .* at load.cuh",
        case=PAGED,
    ),
    Mutant(
        name="a division by the size of a page that is rounded wrongly",
        header="cache_paged.cuh",
        old="uint64_t(uint32_t(token)) * p.page_magic",
        new="uint64_t(uint32_t(token)) * (p.page_magic - 1)",
        fault=f"{NOT_OF_THE_LAUNCH} read; .* at load.cuh",
        case=PAGED,
    ),
    Mutant(
        name="the table of another sequence",
        header="cache_paged.cuh",
        old="p.block_table + row * p.block_table_stride",
        new="p.block_table + (row ^ 1) * p.block_table_stride",
        fault=f"{NOT_OF_THE_LAUNCH} read; .* at load.cuh",
        case=PAGED,
    ),
    Mutant(
        name="rows of the table without the gap between them",
        header="cache_paged.cuh",
        old="row * p.block_table_stride",
        new="row * (p.max_seq_len / p.page_size)",
        fault="outside all tensors; at byte .* of block_table .* at cache_paged.cuh",
        case=PAGED,
    ),
    Mutant(
        name="an entry behind the last page that counts",
        header="cache_paged.cuh",
        old="        lost_ |= is_read && !exists;\n        page[i]",
        new="        lost_ |= !exists;\n        page[i]",
        wrong="output",
        case=PAGED,
    ),
    Mutant(
        name="a page that is read through whatever it is",
        header="cache_paged.cuh",
        old="page[i] = is_read && exists ? ahead_[i] : -1;",
        new="page[i] = ahead_[i];",
        fault="outside all tensors",
        case=PAGED,
    ),
    Mutant(
        name="rows behind a sequence's last token",
        header="cache_paged.cuh",
        old="is_row(i) && token < w.num_cached && ",
        new="is_row(i) && token < w.num_cached + 3 && ",
        fault=f"{NOT_OF_THE_LAUNCH} read; .* at load.cuh",
        case=PAGED,
    ),
    Mutant(
        name="the page beside in the pool",
        header="cache_paged.cuh",
        old="pages.page[i] * stride.batch",
        new="(pages.page[i] + 1) * stride.batch",
        fault=f"{NOT_OF_THE_LAUNCH} read; .* at load.cuh",
        case=PAGED,
    ),
    Mutant(
        name="boxes further on in their page",
        header="cache_paged.cuh",
        old="return {place_in_page(params_, token), kv",
        new="return {place_in_page(params_, token + kTokens), kv",
        fault=f"{NOT_OF_THE_LAUNCH} read; .*, in row 16 of page ",
        case=PAGED_CLUSTER,
    ),
    Mutant(
        name="appended to the page of the token before",
        header="cache_paged.cuh",
        old="[page_of(p, token)];",
        new="[page_of(p, token - 1)];",
        fault=f"{NOT_OF_THE_LAUNCH} write; .* at row.cuh",
        case=PAGED,
    ),
    Mutant(
        name="entries of the tile beside instead of the next",
        header="cache_paged.cuh",
        old="look_ahead(tile + w.tile_step());",
        new="look_ahead(tile + 1);",
        wrong="output",
        case=PAGED,
    ),
    Mutant(
        name="boxes from the start of their page",
        header="cache_paged.cuh",
        old="return {place_in_page(params_, token), kv_head",
        new="return {0, kv_head",
        wrong="output",
        case=PAGED_CLUSTER,
    ),
    Mutant(
        name="a sequence of fewer splits in the steps of a longer one",
        header="cache_paged.cuh",
        old="if (w.tile_step() != params_.num_splits * T::kNumWarps) right = 1;",
        new="",
        wrong="output",
        case=PAGED_CLUSTERS,
    ),
    Mutant(
        name="entries that are used again when all have been",
        header="cache_paged.cuh",
        old="        held_ = ahead_;\n",
        new="",
        wrong="output",
        case=PAGED_LONG,
    ),
)
