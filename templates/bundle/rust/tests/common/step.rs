//! A decode step: made-up tensors, the same on the GPU, and what must come out.

use gqa_attention_decode::ffi::GQA_BFLOAT16;
use gqa_attention_decode::{Config, Element};

use super::gpu::{Buffer, Gpu};

/// The tensors that a step gets.
pub struct Tensors<T> {
    pub q: Vec<T>,
    pub k: Vec<T>,
    pub v: Vec<T>,
    pub kv_cache_k: Vec<T>,
    pub kv_cache_v: Vec<T>,
}

impl<T: Element> Tensors<T> {
    /// As the C example makes them.
    pub fn make(config: &Config) -> Tensors<T> {
        let query = config.batch_size * config.num_q_heads * config.head_dim;
        let token = config.batch_size * config.num_kv_heads * config.head_dim;
        let cache = token * config.max_seq_len;
        Tensors {
            q: make(1, query),
            k: make(2, token),
            v: make(3, token),
            kv_cache_k: make(4, cache),
            kv_cache_v: make(5, cache),
        }
    }

    pub fn on<'gpu>(&self, gpu: &'gpu Gpu) -> TensorsOnGpu<'gpu, T> {
        TensorsOnGpu {
            output: gpu.copy(&vec![T::from_bits(0); self.q.len()]),
            q: gpu.copy(&self.q),
            k: gpu.copy(&self.k),
            v: gpu.copy(&self.v),
            kv_cache_k: gpu.copy(&self.kv_cache_k),
            kv_cache_v: gpu.copy(&self.kv_cache_v),
        }
    }

    /// A cache as it must be after the step: the new token where its sequence ends, where it fits.
    pub fn appended(config: &Config, cache: &[T], token: &[T], lengths: &[usize]) -> Vec<T> {
        let row = config.num_kv_heads * config.head_dim;
        let mut after = cache.to_vec();
        for (b, &length) in lengths
            .iter()
            .enumerate()
            .filter(|(_, it)| **it < config.max_seq_len)
        {
            let at = (b * config.max_seq_len + length) * row;
            after[at..at + row].copy_from_slice(&token[b * row..(b + 1) * row]);
        }
        after
    }

    /// The output in double precision; NaN where the new token does not fit.
    pub fn attend(&self, config: &Config, lengths: &[usize]) -> Vec<f64> {
        let values = Values {
            config,
            k: widened(&Self::appended(config, &self.kv_cache_k, &self.k, lengths)),
            v: widened(&Self::appended(config, &self.kv_cache_v, &self.v, lengths)),
        };
        let q = widened(&self.q);
        let heads = q.chunks(config.head_dim).enumerate();
        heads
            .flat_map(|(i, q)| {
                let (b, head) = (i / config.num_q_heads, i % config.num_q_heads);
                match lengths[b] < config.max_seq_len {
                    true => values.attend(q, b, head, lengths[b] + 1),
                    false => vec![f64::NAN; config.head_dim],
                }
            })
            .collect()
    }
}

pub struct TensorsOnGpu<'gpu, T> {
    pub output: Buffer<'gpu, T>,
    pub q: Buffer<'gpu, T>,
    pub k: Buffer<'gpu, T>,
    pub v: Buffer<'gpu, T>,
    pub kv_cache_k: Buffer<'gpu, T>,
    pub kv_cache_v: Buffer<'gpu, T>,
}

/// Caches with the new token in them.
struct Values<'a> {
    config: &'a Config<'a>,
    k: Vec<f64>,
    v: Vec<f64>,
}

impl Values<'_> {
    /// One query head over the first tokens of a sequence.
    fn attend(&self, q: &[f64], b: usize, head: usize, tokens: usize) -> Vec<f64> {
        let scale = f64::from(self.config.scale);
        let scores: Vec<f64> = (0..tokens)
            .map(|t| {
                let products = self
                    .row(&self.k, b, t, head)
                    .iter()
                    .zip(q)
                    .map(|(k, q)| q * k);
                scale * products.sum::<f64>()
            })
            .collect();
        let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let weights: Vec<f64> = scores.iter().map(|score| (score - largest).exp()).collect();
        let sum: f64 = weights.iter().sum();
        let mut output = vec![0.0; q.len()];
        for (t, weight) in weights.iter().enumerate() {
            for (out, v) in output.iter_mut().zip(self.row(&self.v, b, t, head)) {
                *out += weight / sum * v;
            }
        }
        output
    }

    fn row<'a>(&self, cache: &'a [f64], b: usize, t: usize, head: usize) -> &'a [f64] {
        let c = self.config;
        let kv_head = head / (c.num_q_heads / c.num_kv_heads);
        let row = (b * c.max_seq_len + t) * c.num_kv_heads + kv_head;
        &cache[row * c.head_dim..(row + 1) * c.head_dim]
    }
}

fn widened<T: Element>(tensor: &[T]) -> Vec<f64> {
    tensor.iter().map(|it| f64::from(it.to_f32())).collect()
}

/// A tensor of multiples of 1/128 in [-1, 1), which both types hold exactly: SplitMix64's.
fn make<T: Element>(seed: u64, count: usize) -> Vec<T> {
    (0..count as u64)
        .map(|i| {
            let z = ((seed << 40).wrapping_add(i + 1)).wrapping_mul(0x9E37_79B9_7F4A_7C15);
            let z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
            let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
            let z = z ^ (z >> 31);
            T::from_f32(((z >> 56) as i32 - 128) as f32 / 128.0)
        })
        .collect()
}

/// The largest difference between an output and what it must be; infinite where just one is NaN.
pub fn worst_error<T: Element>(output: &[T], expected: &[f64]) -> f64 {
    assert_eq!(output.len(), expected.len());
    let errors = output.iter().zip(expected).map(|(out, expected)| {
        let out = f64::from(out.to_f32());
        match (out.is_nan(), expected.is_nan()) {
            (true, true) => 0.0,
            (false, false) => (out - expected).abs(),
            _ => f64::INFINITY,
        }
    });
    errors.fold(0.0, f64::max)
}

/// The largest error allowed of outputs within [-1, 1].
///
/// Of relative size u, 2^-11 for f16 and 2^-8 for bf16, are the roundings of a weight, which all of
/// V's rows average to at most u, and that of the output, at most u; sums are in f32. Twice as much
/// is allowed: 4u, in round numbers.
pub fn allowed<T: Element>() -> f64 {
    match T::DTYPE {
        GQA_BFLOAT16 => 1.6e-2,
        _ => 2e-3,
    }
}

pub fn bits<T: Element>(tensor: &[T]) -> Vec<u16> {
    tensor.iter().map(|it| it.to_bits()).collect()
}
