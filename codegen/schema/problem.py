"""What a call asks for, and the limits of it."""

from __future__ import annotations

from dataclasses import dataclass

from gqa_cutlass.codegen.schema.kinds import DType
from gqa_cutlass.codegen.schema.policies import Policy, packed
from gqa_cutlass.codegen.schema.rounding import ceil_div
from gqa_cutlass.codegen.schema.storage import ELEMENT_BYTES

MAX_BATCH = 65535  # grid z
MAX_SEQ_LEN = 2**30  # tile arithmetic is 32-bit
MAX_SPLITS = 1024
MAX_TOKENS = 256  # query tokens of a sequence
MAX_ROWS = 2**31 - 1  # of caches whose rows are named by an index
MAX_HEADS = 2**31 - 1  # grid x
MAX_SCALE = 1e38  # times log2(e) it is still a float32
MAX_SOFTCAP = 1e37  # times log2(e), and a scale over it, are still float32
# A key's part of the softmax's scale, and a value's of an output: what float32 can hold, with room.
MIN_CACHE_SCALE, MAX_CACHE_SCALE = 1e-30, 1e30
VECTOR_WIDTHS = (8, 4, 2, 1)
WIDEST = VECTOR_WIDTHS[0]


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What a call asks for, apart from the data: the key of the dispatch table.

    Args:
        batch_size: Sequences.
        num_q_heads: Query heads.
        num_kv_heads: KV heads; divides num_q_heads.
        head_dim: Dimension per head of queries and keys.
        max_seq_len: Tokens that a sequence's cache can hold.
        dtype: Element type of every tensor, of caches unless a policy says another.
        vec_width: Widest access, in elements, that every address allows.
        append: Whether a new token comes with the call.
        policies: What the kernel must have in its slots in place of their defaults.
        head_dim_v: Dimension per head of values and outputs; None: as head_dim.
        page_size: Tokens of a page; None: every sequence's are in one piece.
        window: Tokens that a query sees, its own the last of them; None for all.
        num_tokens: Query tokens of a sequence, at most.
        num_new_tokens: Tokens that come with the call for a sequence; at least, if they may differ.
    """

    batch_size: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    max_seq_len: int
    dtype: DType
    vec_width: int
    append: bool
    policies: tuple[Policy, ...] = ()
    window: int | None = None
    head_dim_v: int | None = None
    page_size: int | None = None
    num_tokens: int = 1
    num_new_tokens: int = 1

    @property
    def value_dim(self) -> int:
        """Dimension per head of values and outputs."""
        return self.head_dim_v or self.head_dim

    @property
    def group_size(self) -> int:
        """Query heads per KV head."""
        return self.num_q_heads // self.num_kv_heads

    @property
    def appended(self) -> int:
        """Tokens that every sequence must have room for."""
        return self.num_new_tokens if self.append else 0

    @property
    def reach(self) -> int:
        """Tokens that are attended to in a full cache."""
        if self.window is None:
            return self.max_seq_len
        return min(self.window + self.num_tokens - 1, self.max_seq_len)

    def tiles(self, block_n: int) -> int:
        """Tiles of `block_n` tokens that hold them: a window may begin and end within one."""
        held = ceil_div(self.max_seq_len, block_n)
        return held if self.window is None else min(held, ceil_div(self.reach - 1, block_n) + 1)

    @property
    def cache_bytes(self) -> int:
        """Bytes of K and V that are read of full caches."""
        rows = self.batch_size * self.reach * self.num_kv_heads
        return rows * (self.head_dim + self.value_dim) * ELEMENT_BYTES // packed(self.policies)

    @property
    def cache_mib(self) -> float:
        """The same in MiB."""
        return self.cache_bytes / 2**20
