//! How tensors lie in memory, and how many elements they then have.

use crate::error::GqaError;

/// Elements from a sequence, token or head of each tensor to the next.
///
/// 0 is what a stride is in contiguous memory, and all of them by default. A head's elements are
/// contiguous. Caches may have any order of heads and tokens; `q`, `k` and `v` may be slices of one
/// projection, and keys and values of one buffer. Elements do not share memory; what lies between
/// them is neither read nor written.
///
/// Where a stride or an address is no multiple of 16 bytes, a kernel of narrower accesses is wanted.
///
/// ```
/// use gqa_attention_decode::{CacheStrides, Config, Strides};
///
/// let (max_seq_len, head_dim) = (4096, 128);
/// let heads_first = CacheStrides {
///     token: head_dim,
///     head: max_seq_len * head_dim,
///     ..CacheStrides::PACKED
/// };
/// let config = Config {
///     max_seq_len,
///     head_dim,
///     strides: Strides {
///         kv_cache_k: heads_first,
///         kv_cache_v: heads_first,
///         ..Strides::PACKED
///     },
///     ..Config::default()
/// };
/// assert_eq!(config.strides.q.head, 0);
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Strides {
    /// Of the output.
    pub output: RowStrides,
    /// Of the queries.
    pub q: RowStrides,
    /// Of the new tokens' keys.
    pub k: RowStrides,
    /// Of their values.
    pub v: RowStrides,
    /// Of the cache of keys.
    pub kv_cache_k: CacheStrides,
    /// Of that of values.
    pub kv_cache_v: CacheStrides,
    /// From a token to the next, where there are several.
    pub tokens: TokenStrides,
}

/// Distances between the tokens of a sequence, in elements.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TokenStrides {
    /// Of the output.
    pub output: usize,
    /// Of the queries.
    pub q: usize,
    /// Of the new keys.
    pub k: usize,
    /// Of the new values.
    pub v: usize,
}

/// Strides of a tensor of tokens, in elements.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RowStrides {
    /// From a sequence to the next.
    pub batch: usize,
    /// From a head to the next.
    pub head: usize,
}

/// Strides of a cache, in elements.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CacheStrides {
    /// From a sequence to the next, or from a page to the next.
    pub batch: usize,
    /// From a token to the next.
    pub token: usize,
    /// From a head to the next.
    pub head: usize,
}

impl Strides {
    /// Those of contiguous memory.
    pub const PACKED: Strides = Strides {
        output: RowStrides::PACKED,
        q: RowStrides::PACKED,
        k: RowStrides::PACKED,
        v: RowStrides::PACKED,
        kv_cache_k: CacheStrides::PACKED,
        kv_cache_v: CacheStrides::PACKED,
        tokens: TokenStrides::PACKED,
    };

    /// Of sequences, tokens and heads, for output, q, k, v and the caches.
    pub(crate) fn of_tensors(&self) -> [[usize; 3]; 6] {
        let row = |it: RowStrides, token: usize| [it.batch, token, it.head];
        let cache = |it: CacheStrides| [it.batch, it.token, it.head];
        [
            row(self.output, self.tokens.output),
            row(self.q, self.tokens.q),
            row(self.k, self.tokens.k),
            row(self.v, self.tokens.v),
            cache(self.kv_cache_k),
            cache(self.kv_cache_v),
        ]
    }
}

impl TokenStrides {
    /// Those of contiguous memory.
    pub const PACKED: TokenStrides = TokenStrides {
        output: 0,
        q: 0,
        k: 0,
        v: 0,
    };
}

impl RowStrides {
    /// Those of contiguous memory.
    pub const PACKED: RowStrides = RowStrides { batch: 0, head: 0 };
}

impl CacheStrides {
    /// Those of contiguous memory.
    pub const PACKED: CacheStrides = CacheStrides {
        batch: 0,
        token: 0,
        head: 0,
    };
}

/// Checks the elements of a contiguous tensor.
pub(crate) fn check_len(name: &str, got: usize, needed: usize, rule: &str) -> Result<(), GqaError> {
    if got == needed {
        return Ok(());
    }
    Err(GqaError::InvalidValue(format!(
        "{name}: got {got} elements; needed: {needed}, {rule}. Nothing was launched."
    )))
}

/// Checks the elements of one with strides, of which those of 0 are as in contiguous memory.
pub(crate) fn check_reach(
    name: &str,
    got: usize,
    sizes: [usize; 4],
    strides: [usize; 3],
) -> Result<(), GqaError> {
    let needed = reach(sizes, strides);
    if needed.map_or(false, |needed| got >= needed) {
        return Ok(());
    }
    let needed = needed.map_or("more than memory holds".to_string(), |it| it.to_string());
    Err(GqaError::InvalidValue(format!(
        "{name}: got {got} elements; needed: {needed} or more, from the first to the last by its \
         strides. Nothing was launched."
    )))
}

/// Elements from the first to the last, both counted.
fn reach(sizes: [usize; 4], strides: [usize; 3]) -> Option<usize> {
    let mut packed = sizes[3];
    let mut last = sizes[3];
    for dim in (0..3).rev() {
        let stride = match strides[dim] {
            0 => packed,
            stride => stride,
        };
        last = last.checked_add(sizes[dim].saturating_sub(1).checked_mul(stride)?)?;
        packed = packed.checked_mul(sizes[dim])?;
    }
    Some(last)
}
