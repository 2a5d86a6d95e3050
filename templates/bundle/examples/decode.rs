//! One decode step on made-up data, checked against attention in double precision on the CPU.
//!
//! ```text
//! decode BATCH Q_HEADS KV_HEADS HEAD_DIM CACHE_LEN MAX_SEQ_LEN f16|bf16
//! ```
//!
//! Prints the kernel, hashes of the output and of the caches, and the error, as `decode.c` does.
//! Exits with 0 when all is right, 1 when not, 2 for bad arguments, 77 where there is no usable GPU.

#[path = "../rust/tests/common/mod.rs"]
mod common;

use std::process::ExitCode;

use common::gpu::Gpu;
use common::step::{allowed, bits, worst_error, Tensors, TensorsOnGpu};
use gqa_attention_decode::{
    bf16, decode, f16, set_log_callback, workspace_size, Config, Element, GqaError, Stream,
};

const NO_GPU: u8 = 77;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let exit_code = match parse(&arguments) {
        Some((config, "f16")) => run::<f16>(&config),
        Some((config, "bf16")) => run::<bf16>(&config),
        _ => {
            eprintln!(
                "usage: decode BATCH Q_HEADS KV_HEADS HEAD_DIM CACHE_LEN MAX_SEQ_LEN f16|bf16"
            );
            2
        }
    };
    ExitCode::from(exit_code)
}

/// The sizes and the name of the type.
fn parse(arguments: &[String]) -> Option<(Config<'static>, &str)> {
    let (dtype, sizes) = arguments.split_last()?;
    let sizes: Option<Vec<usize>> = sizes.iter().map(|it| it.parse().ok()).collect();
    match sizes?[..] {
        [batch_size, num_q_heads, num_kv_heads, head_dim, cache_len, max_seq_len] => {
            let scale = (1.0 / (head_dim as f64).sqrt()) as f32;
            let config = Config {
                batch_size,
                cache_len,
                num_q_heads,
                num_kv_heads,
                head_dim,
                scale,
                max_seq_len,
                ..Config::default()
            };
            Some((config, dtype))
        }
        _ => None,
    }
}

fn run<T: Element>(config: &Config) -> u8 {
    let gpu = match Gpu::open() {
        Ok(gpu) => gpu,
        Err(reason) => {
            eprintln!("no usable GPU: {reason}");
            return NO_GPU;
        }
    };
    match step::<T>(&gpu, config) {
        Ok(true) => 0,
        Ok(false) => 1,
        Err(error) => {
            eprintln!("{error}");
            match error {
                GqaError::NoDriver(_) | GqaError::Device(_) => NO_GPU,
                _ => 1,
            }
        }
    }
}

/// Whether the step did what it must.
fn step<T: Element>(gpu: &Gpu, config: &Config) -> Result<bool, GqaError> {
    let mut memory = gpu.copy(&vec![0; workspace_size::<T>(config)?]);
    // SAFETY: it is zeroed, and used by one launch.
    let mut workspace = unsafe { memory.workspace() };
    let before = Tensors::<T>::make(config);
    let mut tensors = before.on(gpu);
    set_log_callback(Some(Box::new(print_kernel)));
    decode(
        config,
        &mut tensors.output.view_mut(),
        tensors.q.view(),
        tensors.k.view(),
        tensors.v.view(),
        &mut tensors.kv_cache_k.view_mut(),
        &mut tensors.kv_cache_v.view_mut(),
        &mut workspace,
        Stream::DEFAULT,
    )?;
    Ok(report(config, &before, &tensors))
}

/// Prints the kernel's name from a line of `key=value`s.
fn print_kernel(line: &str) {
    let name = line
        .split_whitespace()
        .find_map(|word| word.strip_prefix("kernel="));
    println!("kernel {}", name.unwrap_or("unknown"));
}

fn report<T: Element>(config: &Config, before: &Tensors<T>, after: &TensorsOnGpu<'_, T>) -> bool {
    let lengths = vec![config.cache_len; config.batch_size];
    let caches = [after.kv_cache_k.read(), after.kv_cache_v.read()];
    let expected = [
        Tensors::appended(config, &before.kv_cache_k, &before.k, &lengths),
        Tensors::appended(config, &before.kv_cache_v, &before.v, &lengths),
    ];
    let appended = caches
        .iter()
        .zip(&expected)
        .all(|(got, wanted)| bits(got) == bits(wanted));
    let output = after.output.read();
    let (error, allowed) = (
        worst_error(&output, &before.attend(config, &lengths)),
        allowed::<T>(),
    );
    println!("output {:016x}", hash(&output));
    println!("cache {:016x}", hash(&caches.concat()));
    println!(
        "error {} allowed {}",
        scientific(error),
        scientific(allowed)
    );
    if !appended {
        eprintln!("the caches do not hold what they should");
    }
    error <= allowed && appended
}

/// FNV-1a of a tensor's bytes.
fn hash<T: Element>(tensor: &[T]) -> u64 {
    let bytes = tensor.iter().flat_map(|it| it.to_bits().to_le_bytes());
    bytes.fold(0xCBF2_9CE4_8422_2325, |state, byte| {
        (state ^ u64::from(byte)).wrapping_mul(0x100_0000_01B3)
    })
}

/// As C's `%.3e`, whose exponents have a sign and two digits.
fn scientific(value: f64) -> String {
    let text = format!("{value:.3e}");
    match text
        .split_once('e')
        .map(|(digits, exponent)| (digits, exponent.parse::<i32>()))
    {
        Some((digits, Ok(exponent))) => format!("{digits}e{exponent:+03}"),
        _ => text, // infinite
    }
}
