//! The sizes of a step, and what follows from them.

use std::ffi::c_void;
use std::mem::size_of;
use std::ptr::{null, null_mut};

use crate::device::{DeviceSlice, Lse, Workspace};
use crate::element::{Element, Output};
use crate::error::GqaError;
use crate::ffi;
use crate::layout::{check_len, check_reach, Strides};
use crate::stored::{CacheType, Scale};
use crate::turning::{Numbers, Rotary};

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
///
/// What is asked for beyond plain attention follows the sizes, and its default is none of it. A
/// library that was exported without a kernel for it says so: [`GqaError::Unsupported`]. What comes
/// after `dependent` every library has.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Config<'a> {
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
    /// Tokens that the cache can hold per sequence. With `block_table`, 0 or `max_pages * page_size`.
    pub max_seq_len: usize,
    /// Bound of the scores, `softcap * tanh(scaled score / softcap)`, as in Gemma 2; 0: none.
    pub softcap: f32,
    /// A sliding window: tokens that a query sees, its own the last of them; 0: all. The
    /// `sliding_window` of Hugging Face.
    pub window: usize,
    /// One more logit per query head, as in gpt-oss: `[num_q_heads]`, in natural units, neither scaled
    /// nor capped.
    pub sinks: Option<Numbers<'a>>,
    /// ALiBi: what the score of a key loses per token that it is older than the newest, by query
    /// head: `[num_q_heads]`, or `[batch_size, num_q_heads]`.
    pub alibi_slopes: Option<DeviceSlice<'a, f32>>,
    /// Tokens of padding at the start of each sequence's cache, `[batch_size]`. They count in the
    /// length, and are not attended to.
    pub cache_leftpad: Option<DeviceSlice<'a, i32>>,
    /// Which row of the caches, or of `block_table`, each sequence has, `[batch_size]`; with
    /// [`decode_ragged`](crate::decode_ragged) alone. Sequences do not share one.
    pub cache_batch_idx: Option<DeviceSlice<'a, i32>>,
    /// How many there are, with `cache_batch_idx`; 0: `batch_size`.
    pub cache_rows: usize,
    /// Elements per head of values and output, where they are others than those of queries and keys, as
    /// in DeepSeek: 192 and 128. What is allowed is the same; 0: as `head_dim`.
    pub head_dim_v: usize,
    /// Whether the output is of `f32`, as it was computed, before it is rounded: a part to be merged
    /// with others.
    pub output_float32: bool,
    /// Caches in pages: which page holds which tokens of a sequence, `[batch_size, max_pages]`, or
    /// `cache_rows` rows; with [`decode_ragged`](crate::decode_ragged) alone. The caches are then
    /// `[num_pages, page_size, num_kv_heads, head_dim]`, and the `batch` of their strides is from a page
    /// to the next. What lies behind a sequence's last page may be anything. A page that the caches do
    /// not have counts like a length that does not fit. Sequences do not append to the same page.
    pub block_table: Option<DeviceSlice<'a, i32>>,
    /// Elements from a row of `block_table` to the next; 0: `max_pages`.
    pub block_table_stride: usize,
    /// Pages that a sequence can have: columns of `block_table`.
    pub max_pages: usize,
    /// Tokens of a page, any number.
    pub page_size: usize,
    /// Pages of the caches.
    pub num_pages: usize,
    /// Where new tokens go, if `block_table` is not to say: `page * page_size + token`, `[batch_size]`.
    /// A negative one: nowhere. Several new tokens have one each.
    pub slot_mapping: Option<DeviceSlice<'a, i64>>,
    /// Query tokens of a sequence, up to 256, the last ones of it: drafts of speculative decoding, or a
    /// part of a prompt; 0: one. `q` and output are `[batch_size, num_tokens, num_q_heads, head_dim]`,
    /// and `lse` is `[batch_size, num_q_heads, num_tokens]`. Each query sees the keys up to its own, the
    /// last one's being the newest of all.
    pub num_tokens: usize,
    /// New tokens of a sequence, all of which are appended, or none; 0: as `num_tokens`. `k` and `v` are
    /// `[batch_size, num_new_tokens, num_kv_heads, head_dim]`.
    pub num_new_tokens: usize,
    /// Whether every query sees all tokens behind its own too.
    pub not_causal: bool,
    /// With `not_causal`: so many tokens are seen from a query's own on; 0: all.
    pub window_right: usize,
    /// Sequences with unlike numbers of query tokens: where each begins in `q` and output,
    /// `[batch_size + 1]`, and where the last one ends; with [`decode_ragged`](crate::decode_ragged)
    /// alone. They are `[total_tokens, num_q_heads, head_dim]`, and `lse` is
    /// `[num_q_heads, total_tokens]`. `num_tokens` is the most that one has; 0: all. What is out of order
    /// counts like a length that does not fit.
    pub cu_seqlens_q: Option<DeviceSlice<'a, i32>>,
    /// Query tokens of all sequences, with `cu_seqlens_q`.
    pub total_tokens: usize,
    /// The same of `k` and `v`, which are `[total_new_tokens, num_kv_heads, head_dim]`.
    pub cu_seqlens_k_new: Option<DeviceSlice<'a, i32>>,
    /// New tokens of all sequences, with `cu_seqlens_k_new`.
    pub total_new_tokens: usize,
    /// Queries that are drafts: which of them each sees, instead of those up to its own; all that comes
    /// before them is seen by all. `[batch_size, num_tokens, words]`, bit `i` of word `w` of a row is
    /// whether it sees draft `32 * w + i`. As many tokens are new.
    pub tree_mask: Option<DeviceSlice<'a, u32>>,
    /// Rotary embedding of queries and new keys, before the keys are cached.
    pub rotary: Option<Rotary<'a>>,
    /// RMS norm of queries over each head, before they are rotated: the weights, `[head_dim]`.
    pub q_norm_weight: Option<Numbers<'a>>,
    /// The same of new keys.
    pub k_norm_weight: Option<Numbers<'a>>,
    /// What is added to mean squares, usually 1e-6.
    pub norm_eps: f32,
    /// Whether 1 is added to weights, as in Gemma.
    pub norm_plus_one: bool,
    /// What the caches consist of. Those of 8 bits take half the memory and the time to read it; their
    /// rows are at even addresses. New tokens are rounded to the nearest, ties to even, and to the
    /// largest number where they are beyond it, and attended to as they are stored.
    pub cache_type: CacheType,
    /// What keys in a cache of 8 bits are multiplied by; none: 1.
    pub k_scale: Option<Scale<'a>>,
    /// The same of values.
    pub v_scale: Option<Scale<'a>>,
    /// Programmatic dependent launch, where it pays (Hopper and newer, caches of up to 32 MiB): the
    /// kernel may start while the kernel before it in the stream finishes. It reads nothing before
    /// that one is done, but may fetch its first tiles to L2. Worth having where that kernel lets
    /// others start early, as this one does; after one that does not, a launch takes up to a
    /// microsecond longer. Where it does not pay, the launch is an ordinary one.
    pub dependent: bool,
    /// A hint: lengths on the device are about equal. Kernel and splits are chosen for such, without
    /// spare blocks, which balance unlike lengths and may cost time where they are equal. A long
    /// sequence among short ones then has no more blocks than they have. Results are right either
    /// way.
    pub equal_lengths: bool,
    /// Where to write the natural logarithm of the sum of the exponentials of the scores, sinks
    /// included: `[batch_size, num_q_heads]`, or as `num_tokens` says. Minus infinity, or the sink, for
    /// a sequence with nothing to attend to; NaN for one that does not fit.
    pub lse: Option<Lse<'a>>,
    /// How tensors lie in memory; contiguous by default.
    pub strides: Strides,
}

impl Default for Config<'_> {
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
            softcap: 0.0,
            window: 0,
            sinks: None,
            alibi_slopes: None,
            cache_leftpad: None,
            cache_batch_idx: None,
            cache_rows: 0,
            head_dim_v: 0,
            output_float32: false,
            block_table: None,
            block_table_stride: 0,
            max_pages: 0,
            page_size: 0,
            num_pages: 0,
            slot_mapping: None,
            num_tokens: 0,
            num_new_tokens: 0,
            not_causal: false,
            window_right: 0,
            cu_seqlens_q: None,
            total_tokens: 0,
            cu_seqlens_k_new: None,
            total_new_tokens: 0,
            tree_mask: None,
            rotary: None,
            q_norm_weight: None,
            k_norm_weight: None,
            norm_eps: 0.0,
            norm_plus_one: false,
            cache_type: CacheType::OfQ,
            k_scale: None,
            v_scale: None,
            dependent: false,
            equal_lengths: false,
            lse: None,
            strides: Strides::PACKED,
        }
    }
}

impl Config<'_> {
    /// What C takes.
    pub(crate) fn to_c<T: Element>(
        self,
        workspace: &mut Workspace<'_>,
    ) -> Result<ffi::GQADecodeConfig, GqaError> {
        self.check_features()?;
        let (memory, workspace_size) = workspace.parts();
        let (strides, rotary) = (self.strides, self.rotary);
        let [k_scales, v_scales] =
            [self.k_scale, self.v_scale].map(|it| it.and_then(|it| it.on_device()));
        let [k_steps, v_steps] = [k_scales, v_scales].map(|it| it.map_or([0; 2], |it| it.1));
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
            softcap: self.softcap,
            window: to_int("config: window", self.window)?,
            sinks: self.sinks.map_or(null(), |it| it.address()),
            sinks_type: self.sinks.map_or(0, |it| it.dtype()),
            alibi_batch_stride: match self.alibi_slopes {
                Some(it) if it.len() != self.num_q_heads => {
                    to_int("config: num_q_heads", self.num_q_heads)?
                }
                _ => 0,
            },
            alibi_slopes: self.alibi_slopes.map_or(null(), |it| it.as_ptr()),
            cache_leftpad: self.cache_leftpad.map_or(null(), |it| it.as_ptr()),
            cache_batch_idx: self.cache_batch_idx.map_or(null(), |it| it.as_ptr()),
            cache_rows: to_int("config: cache_rows", self.cache_rows)?,
            equal_lengths: i32::from(self.equal_lengths),
            lse: self.lse.map_or(null_mut(), |it| it.as_mut_ptr()),
            output_batch_stride: to_long("output_batch_stride", strides.output.batch)?,
            output_head_stride: to_long("output_head_stride", strides.output.head)?,
            q_batch_stride: to_long("q_batch_stride", strides.q.batch)?,
            q_head_stride: to_long("q_head_stride", strides.q.head)?,
            k_batch_stride: to_long("k_batch_stride", strides.k.batch)?,
            k_head_stride: to_long("k_head_stride", strides.k.head)?,
            v_batch_stride: to_long("v_batch_stride", strides.v.batch)?,
            v_head_stride: to_long("v_head_stride", strides.v.head)?,
            kv_cache_k_batch_stride: to_long("kv_cache_k_batch_stride", strides.kv_cache_k.batch)?,
            kv_cache_k_token_stride: to_long("kv_cache_k_token_stride", strides.kv_cache_k.token)?,
            kv_cache_k_head_stride: to_long("kv_cache_k_head_stride", strides.kv_cache_k.head)?,
            kv_cache_v_batch_stride: to_long("kv_cache_v_batch_stride", strides.kv_cache_v.batch)?,
            kv_cache_v_token_stride: to_long("kv_cache_v_token_stride", strides.kv_cache_v.token)?,
            kv_cache_v_head_stride: to_long("kv_cache_v_head_stride", strides.kv_cache_v.head)?,
            dependent: i32::from(self.dependent),
            head_dim_v: to_int("config: head_dim_v", self.head_dim_v)?,
            output_float32: i32::from(self.output_float32),
            page_size: to_int("config: page_size", self.page_size)?,
            block_table: self.block_table.map_or(null(), |it| it.as_ptr()),
            block_table_stride: to_long("block_table_stride", self.block_table_stride)?,
            slot_mapping: self.slot_mapping.map_or(null(), |it| it.as_ptr()),
            max_pages: to_int("config: max_pages", self.max_pages)?,
            num_pages: to_int("config: num_pages", self.num_pages)?,
            num_tokens: to_int("config: num_tokens", self.num_tokens)?,
            num_new_tokens: to_int("config: num_new_tokens", self.num_new_tokens)?,
            not_causal: i32::from(self.not_causal),
            window_right: to_int("config: window_right", self.window_right)?,
            output_token_stride: to_long("output_token_stride", strides.tokens.output)?,
            q_token_stride: to_long("q_token_stride", strides.tokens.q)?,
            k_token_stride: to_long("k_token_stride", strides.tokens.k)?,
            v_token_stride: to_long("v_token_stride", strides.tokens.v)?,
            cu_seqlens_q: self.cu_seqlens_q.map_or(null(), |it| it.as_ptr()),
            cu_seqlens_k_new: self.cu_seqlens_k_new.map_or(null(), |it| it.as_ptr()),
            total_tokens: to_int("config: total_tokens", self.total_tokens)?,
            total_new_tokens: to_int("config: total_new_tokens", self.total_new_tokens)?,
            rotary_cos: rotary.map_or(null(), |it| it.cos.address()),
            rotary_sin: rotary.map_or(null(), |it| it.sin.address()),
            rotary_seqlens: rotary
                .and_then(|it| it.seqlens)
                .map_or(null(), |it| it.as_ptr()),
            rotary_cos_stride: to_long("rotary_cos_stride", rotary.map_or(0, |it| it.cos_stride))?,
            rotary_sin_stride: to_long("rotary_sin_stride", rotary.map_or(0, |it| it.sin_stride))?,
            rotary_type: rotary.map_or(0, |it| it.cos.dtype()),
            rotary_positions: to_int(
                "config: rotary_positions",
                rotary.map_or(0, |it| it.positions),
            )?,
            rotary_dim: to_int("config: rotary_dim", rotary.map_or(0, |it| it.dim))?,
            rotary_interleaved: rotary.map_or(0, |it| i32::from(it.interleaved)),
            q_norm_weight: self.q_norm_weight.map_or(null(), |it| it.address()),
            k_norm_weight: self.k_norm_weight.map_or(null(), |it| it.address()),
            q_norm_type: self.q_norm_weight.map_or(0, |it| it.dtype()),
            k_norm_type: self.k_norm_weight.map_or(0, |it| it.dtype()),
            norm_eps: self.norm_eps,
            norm_plus_one: i32::from(self.norm_plus_one),
            tree_mask: self.tree_mask.map_or(null(), |it| it.as_ptr()),
            cache_type: self.cache_type.to_c(),
            k_scale: self.k_scale.map_or(0.0, |it| it.number()),
            v_scale: self.v_scale.map_or(0.0, |it| it.number()),
            k_scale_batch_stride: to_int("config: k_scale_batch_stride", k_steps[0])?,
            k_scale_head_stride: to_int("config: k_scale_head_stride", k_steps[1])?,
            v_scale_batch_stride: to_int("config: v_scale_batch_stride", v_steps[0])?,
            v_scale_head_stride: to_int("config: v_scale_head_stride", v_steps[1])?,
            scales_of_tokens: i32::from(self.has_scales_of_tokens()),
            k_scales: k_scales.map_or(null(), |it| it.0),
            v_scales: v_scales.map_or(null(), |it| it.0),
        })
    }

    /// Checks the elements that tensors of features have.
    fn check_features(&self) -> Result<(), GqaError> {
        let (batch_size, heads) = (self.batch_size, self.num_q_heads);
        if let Some(it) = self.sinks {
            check_len("config: sinks", it.len(), heads, "num_q_heads")?;
        }
        if let Some(it) = self.alibi_slopes {
            if it.len() != heads {
                let needed = self.elements(&[batch_size, heads])?;
                let rule = "batch_size * num_q_heads, or num_q_heads";
                check_len("config: alibi_slopes", it.len(), needed, rule)?;
            }
        }
        if let Some(it) = self.cache_leftpad {
            check_len("config: cache_leftpad", it.len(), batch_size, "batch_size")?;
        }
        if let Some(it) = self.cache_batch_idx {
            check_len(
                "config: cache_batch_idx",
                it.len(),
                batch_size,
                "batch_size",
            )?;
        }
        if let Some(it) = self.block_table {
            let sizes = [or(self.cache_rows, batch_size), 1, 1, self.max_pages];
            let strides = [self.block_table_stride, 0, 0];
            check_reach("config: block_table", it.len(), sizes, strides)?;
        }
        self.check_tokens()?;
        self.check_turning()?;
        self.check_scales()
    }

    /// Checks that the output has the type which the configuration says.
    pub(crate) fn check_output<T, O: Output<T>>(&self) -> Result<(), GqaError> {
        if O::IS_FLOAT32 == self.output_float32 {
            return Ok(());
        }
        let (got, said) = (O::IS_FLOAT32, self.output_float32);
        Err(GqaError::InvalidValue(format!(
            "output: got {} with output_float32: {said}; needed: {}. Nothing was launched.",
            if got { "f32" } else { "what q is of" },
            if said { "f32" } else { "what q is of" },
        )))
    }

    pub(crate) fn elements(&self, factors: &[usize]) -> Result<usize, GqaError> {
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

/// A size, or what it is where it is not given.
pub(crate) fn or(size: usize, default: usize) -> usize {
    match size {
        0 => default,
        size => size,
    }
}

pub(crate) fn to_int(what: &str, value: usize) -> Result<i32, GqaError> {
    i32::try_from(value).map_err(|_| {
        let allowed = i32::MAX;
        let message =
            format!("{what}: got {value}; allowed: at most {allowed}. Nothing was launched.");
        GqaError::InvalidValue(message)
    })
}

fn to_long(field: &str, value: usize) -> Result<i64, GqaError> {
    i64::try_from(value).map_err(|_| {
        let allowed = i64::MAX;
        GqaError::InvalidValue(format!(
            "config: {field}: got {value}; allowed: at most {allowed}. Nothing was launched."
        ))
    })
}
