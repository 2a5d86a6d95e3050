"""The first phase of a call: shapes, types, devices and strides become a problem.

A tensor is told what it must be by its row of the table of arguments; what is said here of one
tensor alone is what no other may be.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from gqa_cutlass.call.given import (
    LENGTHS,
    PAGES,
    ROWS,
    SLOTS,
    Layout,
    Seen,
    Tokens,
    fail,
    shape_text,
    tokens_of,
)
from gqa_cutlass.call.stored import (
    SCALES,
    check_of_tokens,
    check_pairs,
    check_scale_shape,
    in_pairs,
    of_tokens,
    stored_policy,
)
from gqa_cutlass.call.tokens import TREE
from gqa_cutlass.codegen.config import HEAD_DIM_RULE, HEAD_DIMS, MAX_GROUP_SIZE
from gqa_cutlass.codegen.schema.arguments import Access, Argument, Elements
from gqa_cutlass.codegen.schema.kinds import DType
from gqa_cutlass.codegen.schema.launch import NumberType
from gqa_cutlass.codegen.schema.policies import Policy, special
from gqa_cutlass.codegen.schema.problem import (
    MAX_BATCH,
    MAX_HEADS,
    MAX_ROWS,
    MAX_SEQ_LEN,
    VECTOR_WIDTHS,
    Problem,
)
from gqa_cutlass.codegen.schema.storage import ELEMENT_BYTES
from gqa_cutlass.dispatch import Device, Dispatch, dispatch
from gqa_cutlass.errors import shown
from gqa_cutlass.tuning.table import Answer, look_up

if TYPE_CHECKING:
    from gqa_cutlass.call.asked import Asked

DTYPES = {torch.float16: DType.F16, torch.bfloat16: DType.BF16}
_EXACT = {
    Elements.FLOAT32: torch.float32, Elements.INT32: torch.int32, Elements.INT64: torch.int64,
    Elements.UINT32: torch.uint32,
}  # fmt: skip
# Whose sizes are looked at where it is known what they mean.
_SEVERAL_FORMS = (SLOTS, TREE, "rotary_cos", "rotary_sin")
NUMBER_TYPES = {
    torch.float32: NumberType.FLOAT32,
    torch.float16: NumberType.FLOAT16,
    torch.bfloat16: NumberType.BFLOAT16,
}


def problem_of(
    layout: Layout,
    policies: tuple[Policy, ...] = (),
    window_left: int = -1,
    out_dtype: torch.dtype | None = None,
    tokens: Tokens | None = None,
) -> Problem:
    """Check a layout, and name the problem that it poses.

    Args:
        layout: What `see` saw.
        policies: What the kernel must have in its slots, which tensors do not say.
        window_left: Tokens before the newest that are seen; -1 for all.
        out_dtype: Of the output; None for that of q.
        tokens: What `tokens_of` says of the layout; None: to be asked.

    Raises:
        InputError: A rule is broken; the message says which, what was given and what to do.
    """
    tokens = tokens or tokens_of(layout)
    q, cache = layout["q"], layout["k_cache"]
    for name, t in layout.items():
        _check_rank(ROWS[name], t, paged=PAGES in layout)
    for name, t in layout.items():
        if name != LENGTHS:
            _check_placement(ROWS[name], t, q)
    plain = q.dtype == cache.dtype == layout["v_cache"].dtype
    if not plain or any(name in layout for name in SCALES):
        policies = special((*policies, *stored_policy(layout)))
    check_result(layout, out_dtype)
    batch = tokens.batch
    *_, num_q_heads, head_dim = q.shape
    rows, room, num_kv_heads, _ = cache.shape
    table = layout.get(PAGES)
    max_seq_len = room if table is None else check_pages(rows, room, table)
    if SLOTS in layout and (table is None or "k" not in layout):
        missing = "k" if "k" not in layout else PAGES
        fail(SLOTS, f"one without {missing}", f"{SLOTS} with {missing}: it says where k and v go")
    head_dim_v = layout["v_cache"].shape[-1]
    check_sizes(batch, num_q_heads, num_kv_heads, head_dim, max_seq_len, head_dim_v)
    sizes = {
        "batch": batch, "num_q_heads": num_q_heads, "num_kv_heads": num_kv_heads,
        "head_dim": head_dim, "head_dim_v": head_dim_v, "max_seq_len": max_seq_len,
        "rows": batch, "batch_ends": batch + 1,
    }  # fmt: skip
    pool = sizes
    if table is not None:
        pool = sizes | {"rows": rows, "max_seq_len": room}
        rows, sizes["max_pages"] = table.shape
    if "cache_batch_idx" in layout:
        sizes["rows"] = rows
        if not 1 <= rows <= MAX_ROWS:
            what = "k_cache" if table is None else PAGES
            fail(f"rows of {what}", shown(rows), f"1 to {MAX_ROWS}")
    for name, t in layout.items():
        if name != LENGTHS:
            row = ROWS[name]
            of_cache = row.access is Access.APPEND or name in SCALES and of_tokens(t.shape)
            _check_shape(row, t, pool if of_cache else sizes, tokens)
    append = "k" in layout
    if SLOTS in layout:
        _check_slots(layout[SLOTS], tokens)
    if append and tokens.new > max_seq_len:
        fail("tokens of k", shown(tokens.new), f"at most max_seq_len, {max_seq_len}")
    for name, t in layout.items():
        if name != LENGTHS:
            _check_strides(ROWS[name], t, append)
    check_lengths(layout, batch)
    hides = 0 <= window_left < max_seq_len - 1  # a window that hides no token is none
    problem = Problem(
        batch_size=batch,
        num_q_heads=num_q_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        head_dim_v=head_dim_v if head_dim_v != head_dim else None,
        max_seq_len=max_seq_len,
        page_size=None if table is None else room,
        dtype=DTYPES[q.dtype],
        vec_width=min([_vector_width(t) for name, t in layout.items() if ROWS[name].stride]),
        append=append,
        num_tokens=tokens.queries,
        num_new_tokens=tokens.new if append else 1,
        policies=policies if hides else tuple([p for p in policies if p.feature != "window_size"]),
        window=window_left + 1 if hides else None,
    )
    if policies:
        check_of_tokens(problem)
    return problem


def launch_of(
    problem: Problem, device: Device, asked: Asked, *, ragged: bool, found: Answer | None = None
) -> Dispatch:
    """The kernel and the launch of a call: what it asks for, or a table, or the model says.

    Args:
        problem: What is asked for.
        device: The GPU, or what stands in for one, which has no name and no table.
        asked: The call's options.
        ragged: As for `dispatch`.
        found: What `tabled` says of it; None: to be asked.

    Raises:
        InputError: The kernel that the call asks for cannot solve the problem.
    """
    if found is None:
        found = tabled(problem, device, asked, ragged=ragged)
        if found.left_out:
            found.warn()
    kernel = asked.kernel or found.choice
    return dispatch(
        problem, device, asked.num_splits, kernel, ragged, asked.dependent, asked.max_seqlen,
        asked.batch_invariant,
    )  # fmt: skip


def tabled(problem: Problem, device: Device, asked: Asked, *, ragged: bool) -> Answer:
    """What the tables of the GPU say, unless the call itself asks for a kernel or splits.

    Args:
        problem: As for `launch_of`.
        device: As for `launch_of`.
        asked: As for `launch_of`.
        ragged: As for `dispatch`.
    """
    if not device.name or asked.kernel or asked.num_splits or asked.batch_invariant:
        return Answer()
    return look_up(
        problem, device, ragged=ragged, longest=asked.max_seqlen, dependent=asked.dependent
    )


def check_pages(num_pages: int, page_size: int, table: Seen) -> int:
    """The tokens that a row of a table has pages for.

    Args:
        num_pages: Pages of the pools.
        page_size: Tokens of each.
        table: `block_table`.

    Raises:
        InputError: There are none, or too many.
    """
    most = table.shape[1]
    if not 1 <= num_pages <= MAX_ROWS:
        fail("pages of k_cache", shown(num_pages), f"1 to {MAX_ROWS}")
    if page_size < 1:
        fail("tokens of a page in k_cache", shown(page_size), "1 or more")
    if not 1 <= most <= MAX_SEQ_LEN // page_size:
        fail(
            PAGES,
            f"{shown(most)} pages per sequence, of {shown(page_size)} tokens",
            f"1 to {MAX_SEQ_LEN} tokens per sequence; pass the columns that are in use",
        )
    return most * page_size


def _check_rank(row: Argument, t: Seen, *, paged: bool) -> None:
    """One dimension per name in the row; those of tokens were looked at with them."""
    if row.single_token or row.name in _SEVERAL_FORMS:
        return
    if (
        len(row.dims) - row.any_first <= len(t.shape) <= len(row.dims)
        or row.spread
        or row.name == LENGTHS
        or row.elements is Elements.NUMBER
    ):
        return
    # Rows of a cache are those of the batch, but for `cache_batch_idx`.
    names, hint = {"rows": "batch", "batch_ends": "batch + 1"}, ""
    if paged and row.access is Access.APPEND:
        names = {"rows": "num_pages", "max_seq_len": "page_size"}
        hint = "; pages of one token are pool.unsqueeze(1)"
    dims = [names.get(dim, dim) for dim in row.dims]
    fail(row.name, shape_text(t.shape), f"[{', '.join(dims)}]{hint}")


def _check_placement(row: Argument, t: Seen, q: Seen) -> None:
    """Type, device and grad."""
    if q.dtype not in DTYPES:
        fail("q", str(q.dtype), "torch.float16 or torch.bfloat16; convert with .to(...)")
    if row.elements is Elements.NUMBER and t.dtype not in NUMBER_TYPES:
        fail(row.name, str(t.dtype), ", ".join(map(str, NUMBER_TYPES)))
    if row.elements in _EXACT and t.dtype != _EXACT[row.elements]:
        wanted = _EXACT[row.elements]
        fail(row.name, str(t.dtype), f"{wanted}; convert with .to({wanted})")
    if row.elements is Elements.ELEMENT and t.dtype != q.dtype:
        fail(row.name, str(t.dtype), f"q's dtype, {q.dtype}")
    if t.device != q.device:
        fail(row.name, f"a tensor on {t.device}", f"q's device, {q.device}")
    if t.requires_grad and torch.is_grad_enabled():
        fail(
            row.name,
            "a tensor that requires grad (decode has no backward pass)",
            "tensors without grad; call it under torch.inference_mode() or torch.no_grad()",
        )


def check_result(layout: Layout, out_dtype: torch.dtype | None) -> None:
    """Raise InputError unless outputs may have this type, and the given one has it."""
    of_q = layout["q"].dtype
    if out_dtype not in (None, of_q, torch.float32):
        fail("out_dtype", str(out_dtype), f"None, q's dtype, {of_q}, or torch.float32")
    wanted = out_dtype or of_q
    if "out" in layout and layout["out"].dtype != wanted:
        allowed = "q's dtype" if out_dtype is None else "out_dtype"
        fail("out", str(layout["out"].dtype), f"{allowed}, {wanted}")


def check_sizes(
    batch: int,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    max_seq_len: int,
    head_dim_v: int | None = None,
) -> None:
    """Raise InputError for sizes that no kernel takes."""
    if not 1 <= batch <= MAX_BATCH:
        fail("batch size", shown(batch), f"1 to {MAX_BATCH}")
    if head_dim not in HEAD_DIMS:
        allowed = f"{HEAD_DIM_RULE}; pad q, k, v and the cache with zeros"
        fail("head_dim", shown(head_dim), allowed)
    if head_dim_v is not None and head_dim_v not in HEAD_DIMS:
        fail(
            "head_dim of v_cache",
            shown(head_dim_v),
            f"{HEAD_DIM_RULE}; pad v and v_cache with zeros",
        )
    if not 1 <= max_seq_len <= MAX_SEQ_LEN:
        fail("max_seq_len", shown(max_seq_len), f"1 to {MAX_SEQ_LEN}")
    if num_kv_heads < 1 or num_q_heads < 1 or num_q_heads % num_kv_heads:
        fail(
            "head counts",
            f"{shown(num_q_heads)} query heads and {shown(num_kv_heads)} KV heads",
            "a number of query heads that is a multiple of the number of KV heads (HND caches are "
            "passed as cache.transpose(1, 2))",
        )
    if num_q_heads // num_kv_heads > MAX_GROUP_SIZE:
        fail("group size", shown(num_q_heads // num_kv_heads), f"1 to {MAX_GROUP_SIZE}")
    if num_q_heads > MAX_HEADS:
        fail("number of query heads", shown(num_q_heads), f"1 to {MAX_HEADS}")


def _check_shape(row: Argument, t: Seen, sizes: dict[str, int], tokens: Tokens) -> None:
    if row.spread:
        cache = [sizes[dim] for dim in ("rows", "max_seq_len", "num_kv_heads")]
        return check_scale_shape(row.name, t, [sizes[dim] for dim in row.dims], cache)
    shape = list(t.shape)
    if row.name in _SEVERAL_FORMS:
        return
    if row.single_token:
        expected = [sizes[dim] for dim in row.dims]
        is_new = row.name in ("k", "v")
        count = tokens.new if is_new else tokens.queries
        if row.name in tokens.flat:
            expected[0] = tokens.all_new if is_new else tokens.all_queries
        elif count > 1 or len(shape) == 4:
            expected.insert(1, count)
    else:
        expected = [sizes[dim] for dim in row.dims[len(row.dims) - len(shape) :]]
    if shape != expected:
        rule = "from the shapes of q and the caches"
        if row.access is Access.APPEND and shape[1:] == expected[1:]:
            rule += f"; pages go with {PAGES}, and other rows with cache_batch_idx"
        fail(row.name, shape_text(shape), f"{expected}, {rule}")


def _check_slots(t: Seen, tokens: Tokens) -> None:
    """A slot per new token."""
    if tokens.ragged_new:
        expected: tuple[int, ...] = (tokens.all_new,)
    else:
        expected = (tokens.batch, tokens.new) if tokens.new > 1 else (tokens.batch,)
    if t.shape != expected and t.shape != (tokens.batch, tokens.new):
        fail(SLOTS, shape_text(t.shape), f"{list(expected)}, one per new token")


def _check_strides(row: Argument, t: Seen, append: bool) -> None:
    """Alignment to elements, a contiguous last dimension or all of them, and no overlap."""
    if row.stride and t.address % t.itemsize:
        fail(row.name, f"address {t.address:#x}", f"an address that is a multiple of {t.itemsize}")
    if row.spread:
        return
    if row.stride or row.rows_apart:
        right = t.strides[-1] == 1 or (row.rows_apart and t.shape[-1] == 1)
        rule = "a contiguous last dimension (stride 1)"
    else:
        right, rule = _is_contiguous(t), "contiguous memory"
    written = row.access is Access.WRITE or append and row.access is Access.APPEND
    if not right:
        remedy = "allocate it so, for a copy would be written" if written else "call .contiguous()"
        fail(row.name, f"strides {list(t.strides)}", f"{rule}; {remedy}")
    if t.itemsize < ELEMENT_BYTES:  # a cache of 8 bits
        check_pairs(row.name, t)
    if written and _overlaps_itself(t):
        fail(row.name, f"strides {list(t.strides)}", "elements that do not share memory")


def check_lengths(layout: Layout, batch: int) -> None:
    """Check lengths on the device, if there are, but for their values.

    Args:
        layout: The tensors.
        batch: Sequences.

    Raises:
        InputError: They are of another type or shape, or elsewhere.
    """
    if LENGTHS not in layout:
        return
    t, device = layout[LENGTHS], layout["q"].device
    right = t.dtype == torch.int32 and t.device == device and _is_contiguous(t)
    if not right or t.shape != (batch,):
        convert = "; convert with .int()" if t.dtype != torch.int32 else ""
        fail(
            LENGTHS,
            f"{t.dtype} {shape_text(t.shape)} on {t.device}",
            f"an int, or contiguous torch.int32 [{batch}] on {device}{convert}",
        )


def _vector_width(t: Seen) -> int:
    """Widest access (8, 4, 2 or 1 times 16 bits) to which every row of a tensor is aligned."""
    bits = t.address // ELEMENT_BYTES
    if t.itemsize < ELEMENT_BYTES:  # rows of pairs may be no multiple of the widest
        bits |= in_pairs(t)[0][-1]
    for size, stride in zip(t.shape[:-1], t.strides[:-1], strict=True):
        bits |= stride * t.itemsize // ELEMENT_BYTES if size > 1 else 0
    return next(width for width in VECTOR_WIDTHS if bits % width == 0)


def _is_contiguous(t: Seen) -> bool:
    """Whether elements follow one another without gaps."""
    step = 1
    for size, stride in zip(reversed(t.shape), reversed(t.strides), strict=True):
        if size > 1 and stride != step:
            return False
        step *= size
    return True


def _overlaps_itself(t: Seen) -> bool:
    """Whether two elements share an address, for layouts where one dimension nests in the next."""
    reach = 1
    for stride, size in sorted(zip(t.strides, t.shape, strict=True)):
        if size > 1:
            if stride < reach:
                return True
            reach = stride * (size - 1) + reach
    return False
