"""Decode attention over contexts that are spread over several GPUs, by torch.distributed."""

from gqa_cutlass.distributed.cache import ShardedKVCache
from gqa_cutlass.distributed.decode import decode_context_parallel
from gqa_cutlass.distributed.paged import ShardedPagedKVCache
from gqa_cutlass.distributed.sharding import Sharding

__all__ = ["ShardedKVCache", "ShardedPagedKVCache", "Sharding", "decode_context_parallel"]
