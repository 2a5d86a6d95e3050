//! What the library at hand can do, from its kernels' names.

use gqa_attention_decode::{bf16, explain, f16, kernel_names, Config, GqaError, Launch};

/// What a kernel is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Kind {
    pub bf16: bool,
    pub head_dim: usize,
    pub group_size: usize,
}

/// What there are plain kernels for: without features, whose names end with the tile, with values of
/// the same head_dim, and with caches of the type of q.
pub fn kinds() -> Vec<Kind> {
    let plain = kernel_names().filter(|name| {
        let of_16_bits = name.contains("_f16_f16_") || name.contains("_bf16_bf16_");
        of_16_bits && name.rsplit('_').next().unwrap().starts_with('h')
    });
    let mut found: Vec<Kind> = plain.filter_map(kind).collect();
    found.sort_unstable();
    found.dedup();
    found
}

/// Of `gqa_decode_sm80_tensorop_f16_f16_d128_g4_align8_...`, for instance; `d192v128` has none.
fn kind(name: &str) -> Option<Kind> {
    let number = |letter| {
        let parts = name.split('_').filter_map(|part| part.strip_prefix(letter));
        parts.filter_map(|digits| digits.parse().ok()).next()
    };
    Some(Kind {
        bf16: name.contains("_bf16_"),
        head_dim: number("d")?,
        group_size: number("g")?,
    })
}

impl Kind {
    /// A step that wants such a kernel.
    pub fn config(
        self,
        batch_size: usize,
        num_kv_heads: usize,
        max_seq_len: usize,
    ) -> Config<'static> {
        Config {
            batch_size,
            cache_len: 0,
            num_q_heads: num_kv_heads * self.group_size,
            num_kv_heads,
            head_dim: self.head_dim,
            scale: 1.0 / (self.head_dim as f32).sqrt(),
            max_seq_len,
            ..Config::default()
        }
    }

    /// What would be launched for it.
    pub fn explain(self, config: &Config, arch: &str, ragged: bool) -> Result<Launch, GqaError> {
        match self.bf16 {
            true => explain::<bf16>(config, arch, 132, ragged),
            false => explain::<f16>(config, arch, 132, ragged),
        }
    }
}
