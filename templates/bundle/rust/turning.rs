//! What is done to queries and new keys before they are multiplied, and tensors of numbers.

use std::ffi::c_void;

use crate::config::{or, Config};
use crate::device::DeviceSlice;
use crate::element::{bf16, f16};
use crate::error::GqaError;
use crate::ffi;
use crate::layout::{check_len, check_reach};

/// Numbers that are no elements: attention sinks, cosines and sines, weights of norms.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Numbers<'a> {
    /// Of 32 bits.
    F32(DeviceSlice<'a, f32>),
    /// Of 16 bits.
    F16(DeviceSlice<'a, f16>),
    /// Of 16 bits, like the upper half of an `f32`.
    Bf16(DeviceSlice<'a, bf16>),
}

/// Attention sinks, by an older name.
pub type Sinks<'a> = Numbers<'a>;

impl Numbers<'_> {
    pub(crate) fn address(&self) -> *const c_void {
        match self {
            Numbers::F32(it) => it.as_ptr().cast(),
            Numbers::F16(it) => it.as_ptr().cast(),
            Numbers::Bf16(it) => it.as_ptr().cast(),
        }
    }

    pub(crate) fn len(&self) -> usize {
        match self {
            Numbers::F32(it) => it.len(),
            Numbers::F16(it) => it.len(),
            Numbers::Bf16(it) => it.len(),
        }
    }

    pub(crate) fn dtype(&self) -> ffi::gqa_dtype {
        match self {
            Numbers::F32(_) => ffi::GQA_FLOAT32,
            Numbers::F16(_) => ffi::GQA_FLOAT16,
            Numbers::Bf16(_) => ffi::GQA_BFLOAT16,
        }
    }
}

/// Rotary embedding: the first `dim` elements of a head turn, two and two, by angles that grow with
/// the position. A new token of a sequence has the position that it gets in the cache, and the first
/// query that of the first new token; all queries have it where they are neither causal nor in a
/// window. A sequence whose positions the tables do not have counts like one that does not fit.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rotary<'a> {
    /// Cosines, `[positions, dim / 2]`, of the type of `q` or `f32`.
    pub cos: Numbers<'a>,
    /// Sines, likewise, and of the same type.
    pub sin: Numbers<'a>,
    /// Positions that the tables have.
    pub positions: usize,
    /// Elements of a head that turn, a multiple of 16; 0: `head_dim`.
    pub dim: usize,
    /// Whether neighbours turn together, as in GPT-J; otherwise element `i` and `i + dim / 2` do, as in
    /// Llama, Qwen and Gemma.
    pub interleaved: bool,
    /// Numbers from a row of `cos` to the next, even; 0: `dim / 2`.
    pub cos_stride: usize,
    /// The same of `sin`.
    pub sin_stride: usize,
    /// Positions of each sequence's first new token, instead of its length, `[batch_size]`; with
    /// [`decode_ragged`](crate::decode_ragged) alone.
    pub seqlens: Option<DeviceSlice<'a, i32>>,
}

impl Config<'_> {
    /// Checks the elements of tables and weights.
    pub(crate) fn check_turning(&self) -> Result<(), GqaError> {
        let weights = [
            ("config: q_norm_weight", self.q_norm_weight),
            ("config: k_norm_weight", self.k_norm_weight),
        ];
        for (name, weight) in weights {
            if let Some(it) = weight {
                check_len(name, it.len(), self.head_dim, "head_dim")?;
            }
        }
        match self.rotary {
            Some(it) => self.check_rotary(&it),
            None => Ok(()),
        }
    }

    fn check_rotary(&self, rotary: &Rotary<'_>) -> Result<(), GqaError> {
        let half = or(rotary.dim, self.head_dim) / 2;
        let tables = [
            ("config: rotary.cos", rotary.cos, rotary.cos_stride),
            ("config: rotary.sin", rotary.sin, rotary.sin_stride),
        ];
        for (name, table, stride) in tables {
            let sizes = [rotary.positions, 1, 1, half];
            check_reach(name, table.len(), sizes, [stride, 0, 0])?;
        }
        if rotary.cos.dtype() != rotary.sin.dtype() {
            return Err(GqaError::InvalidValue(format!(
                "config: rotary.sin: got {:?} with {:?}; allowed: the same type. Nothing was \
                 launched.",
                rotary.sin, rotary.cos
            )));
        }
        if let Some(it) = rotary.seqlens {
            let name = "config: rotary.seqlens";
            check_len(name, it.len(), self.batch_size, "batch_size")?;
        }
        Ok(())
    }
}
