//! Caches whose elements are of 8 bits, and the scales by which they count.

use crate::config::Config;
use crate::device::{DeviceSlice, Written};
use crate::element::Stored;
use crate::error::GqaError;
use crate::ffi;
use crate::layout::check_reach;

/// What the caches consist of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CacheType {
    /// What `q` does.
    #[default]
    OfQ,
    /// [`f8e4m3`](crate::f8e4m3), up to 448.
    F8E4M3,
    /// [`f8e5m2`](crate::f8e5m2), up to 57344.
    F8E5M2,
}

impl CacheType {
    pub(crate) fn to_c(self) -> ffi::gqa_dtype {
        match self {
            CacheType::OfQ => 0,
            CacheType::F8E4M3 => ffi::GQA_FLOAT8_E4M3FN,
            CacheType::F8E5M2 => ffi::GQA_FLOAT8_E5M2,
        }
    }
}

/// What the elements of a cache of 8 bits are multiplied by, and new tokens divided by before they are
/// rounded.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Scale<'a> {
    /// One for all, from 1e-30 to 1e30.
    Number(f32),
    /// In device memory, where they may change between launches; any number is taken as it is. That
    /// of KV head `h` of sequence `b` is `values[b * batch_stride + h * head_stride]`: strides of 0
    /// are one scale for all.
    OnDevice {
        /// The scales.
        values: DeviceSlice<'a, f32>,
        /// From a sequence's to the next one's.
        batch_stride: usize,
        /// From a KV head's to the next one's.
        head_stride: usize,
    },
    /// One of every token and KV head, `[batch_size, max_seq_len, num_kv_heads]`, or of as many rows as
    /// the caches have; with pages `[num_pages, page_size, num_kv_heads]`. A step computes those of its
    /// new tokens, with which the largest number of a row becomes the last one of its type, and writes
    /// them. Keys and values both have such, or none; rows of all tensors are at multiples of 4 bytes.
    OfTokens {
        /// The scales, as the caches' tokens lie but contiguous within a sequence or page.
        values: Written<'a>,
        /// From a sequence's, or a page's, to the next one's; 0: packed.
        batch_stride: usize,
    },
}

impl<'a> Scale<'a> {
    pub(crate) fn number(&self) -> f32 {
        match self {
            Scale::Number(it) => *it,
            Scale::OnDevice { .. } | Scale::OfTokens { .. } => 0.0,
        }
    }

    pub(crate) fn is_of_tokens(&self) -> bool {
        matches!(self, Scale::OfTokens { .. })
    }

    /// The scales on the device, and their strides.
    pub(crate) fn on_device(&self) -> Option<(*const f32, [usize; 2])> {
        match *self {
            Scale::Number(_) => None,
            Scale::OnDevice {
                values,
                batch_stride,
                head_stride,
            } => Some((values.as_ptr(), [batch_stride, head_stride])),
            Scale::OfTokens {
                values,
                batch_stride,
            } => Some((values.as_mut_ptr(), [batch_stride, 0])),
        }
    }
}

impl Config<'_> {
    /// Whether tokens have scales.
    pub(crate) fn has_scales_of_tokens(&self) -> bool {
        let scales = [self.k_scale, self.v_scale];
        scales.iter().flatten().any(Scale::is_of_tokens)
    }

    /// Refuses a 0, which is none to C, and scales of tokens of keys or values alone; and checks the
    /// elements of scales on the device.
    pub(crate) fn check_scales(&self) -> Result<(), GqaError> {
        let scales = [
            ("config: k_scale", self.k_scale),
            ("config: v_scale", self.v_scale),
        ];
        for (name, scale) in scales {
            if self.has_scales_of_tokens() && !scale.map_or(false, |it| it.is_of_tokens()) {
                return Err(GqaError::InvalidValue(format!(
                    "{name}: got {scale:?} beside scales of tokens; needed: Scale::OfTokens. Nothing \
                     was launched. Keys and values both have a scale for every token, or none."
                )));
            }
        }
        for (name, scale) in scales {
            match scale {
                Some(Scale::Number(it)) if it == 0.0 => {
                    return Err(GqaError::InvalidValue(format!(
                        "{name}: got {it}; allowed: a number from 1e-30 to 1e30. Nothing was \
                         launched."
                    )))
                }
                Some(it) => self.check_on_device(name, &it)?,
                None => (),
            }
        }
        Ok(())
    }

    fn check_on_device(&self, name: &str, scale: &Scale<'_>) -> Result<(), GqaError> {
        let (values, batch_stride, head_stride) = match *scale {
            Scale::Number(_) => return Ok(()),
            Scale::OfTokens {
                values,
                batch_stride,
            } => {
                let [rows, room] = self.pool();
                let sizes = [rows, room, self.num_kv_heads, 1];
                return check_reach(name, values.len(), sizes, [batch_stride, 0, 0]);
            }
            Scale::OnDevice {
                values,
                batch_stride,
                head_stride,
            } => (values, batch_stride, head_stride),
        };
        let last = |count: usize, stride: usize| count.saturating_sub(1).saturating_mul(stride);
        let sequences = last(self.batch_size, batch_stride);
        let needed = sequences.saturating_add(last(self.num_kv_heads, head_stride));
        if values.len() > needed {
            return Ok(());
        }
        Err(GqaError::InvalidValue(format!(
            "{name}: got {} elements; needed: {} or more, from the first to the last by its \
             strides. Nothing was launched.",
            values.len(),
            needed.saturating_add(1)
        )))
    }

    /// Checks that the caches have the type which the configuration says.
    pub(crate) fn check_cache<T, C: Stored<T>>(&self) -> Result<(), GqaError> {
        if C::TYPE == self.cache_type {
            return Ok(());
        }
        Err(GqaError::InvalidValue(format!(
            "kv_cache_k and kv_cache_v: got {:?} with cache_type: {:?}; needed: the same. Nothing \
             was launched.",
            C::TYPE,
            self.cache_type
        )))
    }
}
