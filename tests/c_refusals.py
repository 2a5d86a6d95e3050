"""What the C library is refused with: valid arguments to change, and that nothing happened."""

from __future__ import annotations

from typing import Any

from c_library import Library, addresses_of
from cases import Step

VALID: dict[str, Any] = dict(
    batch_size=2, cache_len=3, num_q_heads=8, num_kv_heads=2, head_dim=64, scale=0.125,
    max_seq_len=30, dtype=0,
)  # fmt: skip
STEP: dict[str, Any] = dict(lengths=[3, 3], max_seq_len=30, head_dim=64, device="cpu")
# Few heads in a cache that one block does not read at once: tensor copies, clusters that meet.
CLUSTERS: dict[str, Any] = dict(
    lengths=[3], max_seq_len=4096, num_kv_heads=1, poison=False, device="cpu"
)
PAGES: dict[str, Any] = dict(page_size=15, max_pages=2, num_pages=4)  # as large as the caches
ROTARY: dict[str, Any] = dict(rotary_positions=31, rotary_dim=16)
SHARING: dict[
    str, tuple[dict[str, Any], int]
] = {  # bytes that features read, for two sequences of eight heads
    "sinks": (dict(sinks_type=2), 32),
    "alibi_slopes": (dict(alibi_batch_stride=8), 64),
    "cache_leftpad": ({}, 8),
    "cache_batch_idx": ({}, 8),
    "block_table": (PAGES, 16),
    "slot_mapping": (PAGES | dict(block_table=1 << 52), 16),
    "cu_seqlens_q": (dict(total_tokens=2, num_new_tokens=1), 12),
    "cu_seqlens_k_new": (dict(total_new_tokens=2), 12),
    "tree_mask": (dict(num_tokens=1), 8),
    "q_norm_weight": ({}, 128),
    "k_norm_weight": (dict(k_norm_type=2), 256),
    "rotary_cos": (ROTARY | dict(rotary_sin=1 << 52), 31 * 16),
    "rotary_sin": (ROTARY | dict(rotary_cos=1 << 52, rotary_sin_stride=10), (30 * 10 + 8) * 2),
    "rotary_seqlens": (ROTARY | dict(rotary_cos=1 << 52, rotary_sin=1 << 53), 8),
    "k_scales": (dict(cache_type=3, k_scale_batch_stride=2, k_scale_head_stride=1), 16),
    "v_scales": (dict(cache_type=4, v_scale_head_stride=3), 16),
}
NOTHING = ("Nothing was launched.", "Nothing was written.")


def nothing_happened(library: Library, *fragments: str, launches: int = 0) -> bool:
    """The message holds these fragments and says that nothing happened, and nothing did."""
    assert [part for part in fragments if part not in library.error] == [], library.error
    assert any(text in library.error for text in NOTHING), library.error
    return library.driver.launches == launches


def far_apart(step: Step) -> dict[str, Any]:
    """Addresses that nobody has, of the step's tensors: nothing is run."""
    return {name: (i + 1) << 40 for i, name in enumerate(addresses_of(step))}


def sizes_of(step: Step, *, in_8_bits: bool = False) -> dict[str, int]:
    """Bytes of a step's tensors, whose caches may have half as many."""
    query, cache = 2 * step.q.numel(), 2 * step.k_cache.numel()
    token = cache // step.k_cache.shape[1]
    cache = cache // 2 if in_8_bits else cache
    return dict(output=query, q=query, k=token, v=token, kv_cache_k=cache, kv_cache_v=cache)
