//! The sizes of a step, and what follows from them.

use std::ffi::c_void;
use std::mem::size_of;

use crate::device::Workspace;
use crate::element::Element;
use crate::error::GqaError;
use crate::ffi;

/// The sizes of a step. The element type is that of the tensors.
///
/// A program that takes the fields which it does not name from the default goes on compiling when a
/// later version has more of them:
///
/// ```
/// use gqa_attention_decode::Config;
///
/// let config = Config {
///     batch_size: 1,
///     num_q_heads: 32,
///     num_kv_heads: 8,
///     head_dim: 128,
///     scale: 1.0 / 128f32.sqrt(),
///     max_seq_len: 4096,
///     ..Config::default()
/// };
/// assert_eq!(config.cache_len, 0);
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Config {
    /// Sequences, 1 to 65535.
    pub batch_size: usize,
    /// Tokens in every sequence's cache before the step, 0 to `max_seq_len - 1`.
    pub cache_len: usize,
    /// Query heads, a multiple of `num_kv_heads`.
    pub num_q_heads: usize,
    /// KV heads.
    pub num_kv_heads: usize,
    /// Elements per head, a multiple of 8 from 32 to 256.
    pub head_dim: usize,
    /// Factor on the scores, usually `1 / sqrt(head_dim)`.
    pub scale: f32,
    /// Tokens that the cache can hold per sequence.
    pub max_seq_len: usize,
}

impl Default for Config {
    /// An empty cache, of one sequence. Sizes are 0 and the scale is no number until they are set:
    /// calls refuse both.
    fn default() -> Self {
        Self {
            batch_size: 1,
            cache_len: 0,
            num_q_heads: 0,
            num_kv_heads: 0,
            head_dim: 0,
            scale: f32::NAN,
            max_seq_len: 0,
        }
    }
}

/// Elements that tensors have.
pub(crate) struct Sizes {
    query: usize,
    token: usize,
    cache: usize,
}

impl Config {
    /// What C takes.
    pub(crate) fn to_c<T: Element>(
        self,
        workspace: &mut Workspace<'_>,
    ) -> Result<ffi::GQADecodeConfig, GqaError> {
        let (memory, workspace_size) = workspace.parts();
        Ok(ffi::GQADecodeConfig {
            struct_size: size_of::<ffi::GQADecodeConfig>(),
            batch_size: to_int("config: batch_size", self.batch_size)?,
            cache_len: to_int("config: cache_len", self.cache_len)?,
            num_q_heads: to_int("config: num_q_heads", self.num_q_heads)?,
            num_kv_heads: to_int("config: num_kv_heads", self.num_kv_heads)?,
            head_dim: to_int("config: head_dim", self.head_dim)?,
            scale: self.scale,
            max_seq_len: to_int("config: max_seq_len", self.max_seq_len)?,
            dtype: T::DTYPE,
            workspace: memory.cast::<c_void>(),
            workspace_size,
        })
    }

    /// How many elements tensors have.
    pub(crate) fn sizes(&self) -> Result<Sizes, GqaError> {
        let query = self.elements(&[self.batch_size, self.num_q_heads, self.head_dim])?;
        let token = self.elements(&[self.batch_size, self.num_kv_heads, self.head_dim])?;
        let cache = self.elements(&[token, self.max_seq_len])?;
        Ok(Sizes {
            query,
            token,
            cache,
        })
    }

    fn elements(&self, factors: &[usize]) -> Result<usize, GqaError> {
        let product = factors
            .iter()
            .try_fold(1usize, |product, it| product.checked_mul(*it));
        product.ok_or_else(|| {
            GqaError::InvalidValue(format!(
                "config: sizes: got {self:?}; allowed: tensors that memory can hold. Nothing was \
                 launched."
            ))
        })
    }
}

impl Sizes {
    /// Checks the elements that output, q, k, v and the caches have.
    pub(crate) fn check(&self, lens: [usize; 6]) -> Result<(), GqaError> {
        const QUERY: &str = "batch_size * num_q_heads * head_dim";
        const TOKEN: &str = "batch_size * num_kv_heads * head_dim";
        const CACHE: &str = "batch_size * max_seq_len * num_kv_heads * head_dim";
        let [output, q, k, v, kv_cache_k, kv_cache_v] = lens;
        check_len("output", output, self.query, QUERY)?;
        check_len("q", q, self.query, QUERY)?;
        check_len("k", k, self.token, TOKEN)?;
        check_len("v", v, self.token, TOKEN)?;
        check_len("kv_cache_k", kv_cache_k, self.cache, CACHE)?;
        check_len("kv_cache_v", kv_cache_v, self.cache, CACHE)
    }
}

pub(crate) fn check_len(name: &str, got: usize, needed: usize, rule: &str) -> Result<(), GqaError> {
    if got == needed {
        return Ok(());
    }
    Err(GqaError::InvalidValue(format!(
        "{name}: got {got} elements; needed: {needed}, {rule}. Nothing was launched."
    )))
}

pub(crate) fn to_int(what: &str, value: usize) -> Result<i32, GqaError> {
    i32::try_from(value).map_err(|_| {
        let allowed = i32::MAX;
        let message =
            format!("{what}: got {value}; allowed: at most {allowed}. Nothing was launched.");
        GqaError::InvalidValue(message)
    })
}
