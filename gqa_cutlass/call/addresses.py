"""The second phase of a call: where its tensors lie becomes the kernel's argument.

Alignment and aliasing follow from layouts and addresses, so that all that is checked here holds for
a set of addresses as long as memory stays where it is.
"""

from __future__ import annotations

import math
import struct
import threading
from collections.abc import Mapping, Sequence
from itertools import combinations
from operator import and_, itemgetter

from torch import Tensor

from gqa_cutlass.call.executor import Executor, Task
from gqa_cutlass.call.given import ALIGNMENT, LENGTHS, PAGES, ROWS, Layout, fail
from gqa_cutlass.call.stored import SCALES, in_pairs, of_tokens
from gqa_cutlass.codegen.schema.arguments import Access
from gqa_cutlass.codegen.schema.params import CacheStrides, Params
from gqa_cutlass.codegen.schema.rounding import round_up
from gqa_cutlass.codegen.schema.storage import ELEMENT_BYTES
from gqa_cutlass.errors import CacheOverflowError, shown
from gqa_cutlass.tensormap import map_of
from gqa_cutlass.tensors import byte_reach, memory_flaw

MAX_KNOWN = 1024
_MAPPED = "k_cache", "v_cache"  # by kernels that read through tensor maps
_pack_pointer = struct.Struct("@P").pack_into


class Addresses:
    """What becomes of the addresses of calls of one layout; they are in the table's order.

    Args:
        task: The layout, and what came of it.
        executor: Where the kernel runs.

    Attributes:
        known: What kernels are told, by the addresses that were checked.
    """

    def __init__(self, task: Task, executor: Executor) -> None:
        layout, problem = task.layout, task.problem
        self.known: dict[tuple[int, ...], bytes] = {}
        self._appended, self._max_seq_len = problem.appended, problem.max_seq_len
        self._positions = task.positions
        self._paged = PAGES in layout
        self._names = tuple(layout)
        self._sizes = [(t.itemsize, t.reach) for t in layout.values()]
        self._offsets = [getattr(Params, ROWS[name].field).offset for name in layout]
        # The kernel was chosen for the alignment of rows; all else is aligned to its elements.
        alignments = [ALIGNMENT if ROWS[n].stride else t.itemsize for n, t in layout.items()]
        self._masks = [alignment - 1 for alignment in alignments]
        self._residues = [t.address % ALIGNMENT * bool(ROWS[n].stride) for n, t in layout.items()]
        self._may_meet = _may_meet(layout)
        self._constants = bytes(constants(task, executor.flag.address))
        self.maps = Maps(task, executor) if task.dispatch.config.tma else None

    def _aligned(self, addresses: Sequence[int]) -> list[int]:
        return list(map(and_, addresses, self._masks))

    def fit(self, addresses: Sequence[int]) -> bool:
        """Whether addresses are aligned as those that the kernel was chosen for."""
        return self._aligned(addresses) == self._residues

    def bind(self, tensors: Sequence[Tensor], lengths: object, addresses: tuple[int, ...]) -> bytes:
        """Check where tensors of this layout lie, and the length if it is an int.

        Args:
            tensors: Those that are given.
            lengths: `cache_seqlens`, of the right kind.
            addresses: Of the tensors.

        Returns:
            What the kernel is told, but for what is of a single call. From then on it is `known`,
            unless it is right for this length only.

        Raises:
            InputError: A length is not allowed; memory is shared that must not be, or missing.
            CacheOverflowError: The new token does not fit.
        """
        if type(lengths) is int:
            check_length(lengths, self._max_seq_len, self._appended, self._paged)
            if self._positions is not None and lengths > self._positions:
                fail(
                    LENGTHS,
                    shown(lengths),
                    f"at most {self._positions}, for which rotary_cos and rotary_sin have the "
                    "positions of all tokens of the call; pass longer tables",
                )
        argument = self.known.get(addresses)
        if argument is None:
            lasting = self._check(tensors, lengths, addresses)
            argument = self._argument(addresses)
            if lasting:
                if len(self.known) >= MAX_KNOWN:
                    self.known.clear()
                self.known[addresses] = argument
        return argument

    def _check(self, tensors: Sequence[Tensor], lengths: object, addresses: Sequence[int]) -> bool:
        """Whether all is well for every length, if it is well for this one.

        It is not when a row of a cache is read that is another one than the row which is written,
        and will be that one at another length.
        """
        for tensor, (itemsize, reach) in zip(tensors, self._sizes, strict=True):
            end = tensor.storage_offset() * itemsize + reach
            if end > tensor.untyped_storage().nbytes():
                check_memory(self._named(tensors))
        if not all(addresses):
            check_memory(self._named(tensors))
        if not self.fit(addresses):
            check_alignments(self._named(tensors))
        for a, a_reach, b, b_reach in self._may_meet:  # spans first, which is cheap
            if addresses[a] < addresses[b] + b_reach and addresses[b] < addresses[a] + a_reach:
                return check_aliases(self._named(tensors), lengths, self._appended)
        return True

    def _named(self, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        return dict(zip(self._names, tensors, strict=True))

    def _argument(self, addresses: Sequence[int]) -> bytes:
        """What the kernel is told, but for what is of a single call."""
        memory = bytearray(self._constants)
        for offset, address in zip(self._offsets, addresses, strict=True):
            _pack_pointer(memory, offset, address)
        return bytes(memory) if self.maps is None else bytes(memory) + self.maps.of(addresses)

    def enter_child(self) -> None:
        """As `Plan.enter_child`."""
        if self.maps is not None:
            self.maps.enter_child()


class Maps:
    """Encoded tensor maps of caches, which are kept: encoding takes microseconds.

    Args:
        task: The layout of the caches, and the kernel.
        executor: Encodes them.

    Attributes:
        known: By the caches' addresses.
    """

    def __init__(self, task: Task, executor: Executor) -> None:
        self.known: dict[tuple[int, ...], bytes] = {}
        caches = [task.layout[name] for name in _MAPPED]
        self._caches = [
            in_pairs(t) if t.itemsize < ELEMENT_BYTES else (t.shape, t.strides, t.itemsize)
            for t in caches
        ]
        names = list(task.layout)
        self._pick = itemgetter(*map(names.index, _MAPPED))
        self._tokens = task.dispatch.config.box_tokens
        self._encode = executor.encode
        self._lock = threading.Lock()

    def of(self, addresses: Sequence[int]) -> bytes:
        """The maps of the caches at their places among addresses."""
        picked = self._pick(addresses)
        with self._lock:
            maps = self.known.get(picked)
            if maps is None:
                maps = b"".join(
                    [
                        self._encode(map_of(at, *cache, self._tokens))
                        for at, cache in zip(picked, self._caches, strict=True)
                    ]
                )
                if len(self.known) >= MAX_KNOWN:
                    del self.known[next(iter(self.known))]  # the oldest
                self.known[picked] = maps
            return maps

    def enter_child(self) -> None:
        """As `Plan.enter_child`."""
        self._lock = threading.Lock()


def check_length(length: int, max_seq_len: int, appended: int, paged: bool = False) -> None:
    """Check one length for all sequences.

    Args:
        length: Tokens that are there.
        max_seq_len: Tokens for which there is room.
        appended: How many more are to come.
        paged: Whether there is a table of pages, whose width says so.

    Raises:
        CacheOverflowError: The new token does not fit.
        InputError: It is negative.
    """
    if length < 0:
        fail(LENGTHS, shown(length), f"0 to {max_seq_len - appended}")
    if length > max_seq_len - appended:
        are = "one is" if appended == 1 else f"{appended} are"
        remedy = "pass a wider table" if paged else "allocate a larger cache"
        raise CacheOverflowError(
            f"gqa_decode: cache overflow: the cache holds {shown(length)} tokens"
            f"{f' and {are} to be appended' * bool(appended)}; max_seq_len is "
            f"{max_seq_len}{', of all pages in a row of block_table' * paged}. Nothing was "
            f"written. Evict tokens, or {remedy}."
        )


def check_memory(given: Mapping[str, Tensor]) -> None:
    """Raise InputError for a tensor whose memory is not all there.

    A storage that is shrunk later, under a tensor that was checked, gets memory elsewhere: then the
    address is new, and the tensor is checked again. Not seen is one that comes back to an address
    where it was seen whole, after it was resized twice.
    """
    for name, tensor in given.items():
        if found := memory_flaw(tensor):
            fail(name, *found)


def check_alignments(given: Mapping[str, Tensor]) -> None:
    """Raise InputError for a tensor that is not aligned to its elements."""
    for name, tensor in given.items():
        size = tensor.element_size()
        if tensor.data_ptr() % size:
            allowed = f"an address that is a multiple of {size}"
            fail(name, f"address {tensor.data_ptr():#x}", allowed)


def check_aliases(given: Mapping[str, Tensor], lengths: object, appended: int = 1) -> bool:
    """Raise InputError when what is written shares memory with what it must not.

    Args:
        given: The tensors of a call, by name.
        lengths: `cache_seqlens`.
        appended: Tokens that are appended; 0 where sequences differ in them.

    Returns:
        Whether all is well for every length; see `Addresses`.
    """
    lasting = True
    for target, other in _apart(given):
        if not _overlap(given[target], given[other]):
            continue
        if access_of(target, given[target].shape) is Access.WRITE:
            fail(target, f"memory that {other} also uses", f"memory of its own; pass {target}=None")
        if access_of(other, given[other].shape) is Access.APPEND:
            if PAGES in given and _in_whole_pages(given[target], given[other]):
                continue
            allowed = "two caches that do not share memory"
            fail(other, f"memory that {target} also uses", allowed)
        # Where the token goes in pages, only the device knows.
        if (
            type(lengths) is not int
            or PAGES in given
            or not appended
            or _overlap(given[target][:, lengths : lengths + appended], given[other])
        ):
            fail(
                other,
                f"memory of {target}, to which this call writes the new token",
                f"memory of its own; pass {other}.clone()",
            )
        lasting = False
    return lasting


def access_of(name: str, shape: Sequence[int]) -> Access:
    """What kernels do with a tensor of a call."""
    return Access.APPEND if name in SCALES and of_tokens(shape) else ROWS[name].access


def _apart(given: Mapping[str, Tensor] | Layout) -> list[tuple[str, str]]:
    """What must not share memory: pairs of what is written with what is not to be written over."""
    names = tuple(given)
    access = {name: access_of(name, given[name].shape) for name in names}
    pairs = [(a, b) for a in names for b in names if access[a] is Access.WRITE and a != b]
    if "k" in names:  # which is appended
        caches = [name for name in names if access[name] is Access.APPEND]
        pairs += combinations(caches, 2)
        read = [name for name in names if access[name] is Access.READ]
        pairs += [(cache, name) for name in read for cache in caches]
    return pairs


def _may_meet(layout: Layout) -> list[tuple[int, int, int, int]]:
    """The same by positions among the addresses, each with its reach in bytes."""
    position = {name: i for i, name in enumerate(layout)}
    return [(position[a], layout[a].reach, position[b], layout[b].reach) for a, b in _apart(layout)]


def _in_whole_pages(a: Tensor, b: Tensor) -> bool:
    """Whether two pools are the same pages, counted from another one on.

    Then the table can name pages of keys whose numbers are values' pages under no number that it
    names, as transformers' does; which it names, only the device knows.
    """
    if a.shape[1:] != b.shape[1:] or a.stride() != b.stride():
        return False
    pitch = a.stride(0) * a.element_size()
    whole = bool(pitch) and 0 < _reach_within(a, pitch)
    return whole and a.data_ptr() != b.data_ptr() and (a.data_ptr() - b.data_ptr()) % pitch == 0


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors may share an address.

    Tensors that interleave are told apart by a common pitch: if each lies, modulo some stride, in
    an interval of its own, they do not touch (slices of a fused projection, K and V in one buffer).
    """
    a_start, b_start = a.data_ptr(), b.data_ptr()
    if a_start + byte_reach(a) <= b_start or b_start + byte_reach(b) <= a_start:
        return False
    for pitch in {s * a.element_size() for s, n in zip(a.stride(), a.shape, strict=True) if n > 1}:
        if pitch:
            offset = (b_start - a_start) % pitch
            a_reach, b_reach = _reach_within(a, pitch), _reach_within(b, pitch)
            if a_reach and b_reach and a_reach <= offset and offset + b_reach <= pitch:
                return False
    return True


def _reach_within(tensor: Tensor, pitch: int) -> int:
    """Length of the interval of bytes, modulo pitch, that holds all elements; 0 for none."""
    reach = tensor.element_size()
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        step = stride * tensor.element_size()
        if size > 1 and step % pitch:
            reach += (size - 1) * step if step < pitch else pitch
    return reach if reach <= pitch else 0


def _read_early(task: Task) -> int:
    """Tokens that may be read before lengths are known: whole tiles, or all that there is."""
    chosen, room, bound = task.dispatch, task.problem.max_seq_len, task.asked.max_seqlen
    if not chosen.prefetch_first_tile:
        return 0
    return room if bound is None else min(room, round_up(bound, chosen.config.block_n))


def constants(task: Task, overflow_flag: int) -> Params:
    """The kernel's argument, with everything set that does not change from call to call."""
    problem, chosen = task.problem, task.dispatch
    params = Params(
        prefetch_limit=_read_early(task),
        max_seq_len=problem.max_seq_len,
        num_kv_heads=problem.num_kv_heads,
        num_splits=chosen.num_splits,
        num_stages=chosen.num_stages,
        pdl=chosen.pdl,
        row_blocks=chosen.config.row_blocks(problem.num_tokens),
        scale_log2=task.softmax_scale * math.log2(math.e),
        overflow_flag=overflow_flag,
        **task.fields,
    )
    tokens, row = task.tokens, problem.num_q_heads * problem.value_dim
    if "out" not in task.layout:  # of the out that calls make
        params.out_stride.batch = 0 if tokens.ragged_q else tokens.queries * row
        params.out_stride.head = problem.value_dim
        params.out_token_stride = row
    for name, t in task.layout.items():
        if field := ROWS[name].stride:
            strides = getattr(params, field)
            steps = in_pairs(t)[1] if t.itemsize < ELEMENT_BYTES else t.strides
            strides.batch = 0 if name in tokens.flat else steps[0]
            strides.head = steps[-2]
            if isinstance(strides, CacheStrides):
                strides.token = steps[1]
    return params
