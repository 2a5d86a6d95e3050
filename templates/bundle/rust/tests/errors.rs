//! Every error that needs no GPU, what it says, and what `explain` says of kernels that are there.
//!
//! Memory is never touched: addresses are made up, and nothing that could be launched is called
//! with them where there is a GPU.

#![deny(unsafe_op_in_unsafe_fn)]

mod common;

use std::error::Error;
use std::ffi::{c_void, CStr};
use std::mem::size_of;
use std::os::raw::c_char;
use std::ptr::{null, null_mut};
use std::sync::Barrier;
use std::thread;

use common::gpu::Gpu;
use common::kernels::{kinds, Kind};
use gqa_attention_decode::ffi::*;
use gqa_attention_decode::{
    arch_names, bf16, decode, decode_ragged, explain, f16, f8e4m3, kernel_names, prepare,
    set_log_callback, workspace_size, CacheStrides, CacheType, Config, DeviceSlice, DeviceSliceMut,
    Element, GqaError, Launch, Lse, Numbers, Rotary, RowStrides, Scale, Sinks, Stream, Strides,
    TokenStrides, Workspace, Written,
};

const CONFIG: Config = Config {
    batch_size: 2,
    cache_len: 5,
    num_q_heads: 8,
    num_kv_heads: 2,
    head_dim: 64,
    scale: 0.125,
    max_seq_len: 16,
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
};

const C_CONFIG: GQADecodeConfig = GQADecodeConfig {
    struct_size: size_of::<GQADecodeConfig>(),
    batch_size: 2,
    cache_len: 5,
    num_q_heads: 8,
    num_kv_heads: 2,
    head_dim: 64,
    scale: 0.125,
    max_seq_len: 16,
    dtype: GQA_FLOAT16,
    workspace: null_mut(),
    workspace_size: 0,
    softcap: 0.0,
    window: 0,
    sinks: null(),
    sinks_type: GQA_FLOAT16,
    alibi_batch_stride: 0,
    alibi_slopes: null(),
    cache_leftpad: null(),
    cache_batch_idx: null(),
    cache_rows: 0,
    equal_lengths: 0,
    lse: null_mut(),
    output_batch_stride: 0,
    output_head_stride: 0,
    q_batch_stride: 0,
    q_head_stride: 0,
    k_batch_stride: 0,
    k_head_stride: 0,
    v_batch_stride: 0,
    v_head_stride: 0,
    kv_cache_k_batch_stride: 0,
    kv_cache_k_token_stride: 0,
    kv_cache_k_head_stride: 0,
    kv_cache_v_batch_stride: 0,
    kv_cache_v_token_stride: 0,
    kv_cache_v_head_stride: 0,
    dependent: 0,
    head_dim_v: 0,
    output_float32: 0,
    page_size: 0,
    block_table: null(),
    block_table_stride: 0,
    slot_mapping: null(),
    max_pages: 0,
    num_pages: 0,
    num_tokens: 0,
    num_new_tokens: 0,
    not_causal: 0,
    window_right: 0,
    output_token_stride: 0,
    q_token_stride: 0,
    k_token_stride: 0,
    v_token_stride: 0,
    cu_seqlens_q: null(),
    cu_seqlens_k_new: null(),
    total_tokens: 0,
    total_new_tokens: 0,
    rotary_cos: null(),
    rotary_sin: null(),
    rotary_seqlens: null(),
    rotary_cos_stride: 0,
    rotary_sin_stride: 0,
    rotary_type: GQA_FLOAT16,
    rotary_positions: 0,
    rotary_dim: 0,
    rotary_interleaved: 0,
    q_norm_weight: null(),
    k_norm_weight: null(),
    q_norm_type: GQA_FLOAT16,
    k_norm_type: GQA_FLOAT16,
    norm_eps: 0.0,
    norm_plus_one: 0,
    tree_mask: null(),
    cache_type: 0,
    k_scale: 0.0,
    v_scale: 0.0,
    k_scale_batch_stride: 0,
    k_scale_head_stride: 0,
    v_scale_batch_stride: 0,
    v_scale_head_stride: 0,
    scales_of_tokens: 0,
    k_scales: null(),
    v_scales: null(),
};

/// Arguments of a step as C takes them, each tensor at an address of its own.
#[derive(Clone, Copy)]
struct Arguments {
    tensors: [usize; 6], // output, q, k, v, kv_cache_k, kv_cache_v
    cache_seqlens: usize,
    overflow: usize,
}

const NAMES: [&str; 6] = ["output", "q", "k", "v", "kv_cache_k", "kv_cache_v"];
const ARGUMENTS: Arguments = Arguments {
    tensors: [0x10000, 0x20000, 0x30000, 0x40000, 0x50000, 0x60000],
    cache_seqlens: 0x70000,
    overflow: 0x80000,
};

impl Arguments {
    fn with(mut self, tensor: usize, address: usize) -> Self {
        self.tensors[tensor] = address;
        self
    }

    /// # Safety
    ///
    /// Where there is a GPU, the arguments or the configuration are wrong, so that nothing runs.
    unsafe fn decode(&self, config: *const GQADecodeConfig) -> Result<(), GqaError> {
        let [output, q, k, v, k_cache, v_cache] = self.tensors.map(|it| it as *mut c_void);
        // SAFETY: nothing is launched.
        GqaError::check(unsafe {
            gqa_attention_decode(output, q, k, v, k_cache, v_cache, config, null_mut())
        })
    }

    /// # Safety
    ///
    /// As `decode`.
    unsafe fn decode_ragged(&self, config: *const GQADecodeConfig) -> Result<(), GqaError> {
        let [output, q, k, v, k_cache, v_cache] = self.tensors.map(|it| it as *mut c_void);
        let (lengths, overflow) = (self.cache_seqlens as *const i32, self.overflow as *mut i32);
        // SAFETY: nothing is launched.
        GqaError::check(unsafe {
            gqa_attention_decode_ragged(
                output,
                q,
                k,
                v,
                k_cache,
                v_cache,
                lengths,
                overflow,
                config,
                null_mut(),
            )
        })
    }
}

/// The message of an error that must be of this variant, and hold these parts.
macro_rules! assert_error {
    ($result:expr, $variant:ident, $($part:expr),+) => {
        match $result {
            Err(GqaError::$variant(message)) => {
                $(assert!(message.contains(&*$part), "{message:?} says nothing of {:?}", $part);)+
            }
            other => panic!("got {other:?}; expected {}", stringify!($variant)),
        }
    };
}

#[test]
fn a_null_tensor_is_named() {
    for (i, name) in NAMES.iter().enumerate() {
        let says = format!("{name}: got null; needed: device memory of");
        // SAFETY: a pointer is null.
        unsafe {
            assert_error!(ARGUMENTS.with(i, 0).decode(&C_CONFIG), NullPointer, says);
            assert_error!(
                ARGUMENTS.with(i, 0).decode_ragged(&C_CONFIG),
                NullPointer,
                says
            );
        }
    }
}

#[test]
fn null_lengths_and_a_null_overflow_are_named() {
    let without_lengths = Arguments {
        cache_seqlens: 0,
        ..ARGUMENTS
    };
    let without_overflow = Arguments {
        overflow: 0,
        ..ARGUMENTS
    };
    // SAFETY: a pointer is null.
    unsafe {
        assert_error!(
            without_lengths.decode_ragged(&C_CONFIG),
            NullPointer,
            "cache_seqlens: got null"
        );
        assert_error!(
            without_overflow.decode_ragged(&C_CONFIG),
            NullPointer,
            "overflow: got null"
        );
    }
}

#[test]
fn a_null_config_or_result_is_an_error() {
    let mut bytes = 0;
    // SAFETY: C checks every pointer for null.
    unsafe {
        assert_error!(ARGUMENTS.decode(null()), NullPointer, "config: got null");
        assert_error!(
            ARGUMENTS.decode_ragged(null()),
            NullPointer,
            "config: got null"
        );
        let size = GqaError::check(gqa_workspace_size(null(), &mut bytes));
        assert_error!(size, NullPointer, "config: got null");
        let size = GqaError::check(gqa_workspace_size(&C_CONFIG, null_mut()));
        assert_error!(size, NullPointer, "bytes: got null");
        assert_error!(
            GqaError::check(gqa_prepare(null())),
            NullPointer,
            "config: got null"
        );
        let explained = GqaError::check(gqa_explain(&C_CONFIG, null(), 1, 0, null_mut()));
        assert_error!(explained, NullPointer, "arch and launch: got null");
    }
}

type Change = fn(&mut GQADecodeConfig);

#[test]
fn a_config_that_is_not_allowed_is_refused_by_every_function() {
    let cases: [(Change, &str); 20] = [
        (
            |c| c.batch_size = 0,
            "batch_size: got 0; allowed: 1 to 65535",
        ),
        (
            |c| c.batch_size = -3,
            "batch_size: got -3; allowed: 1 to 65535",
        ),
        (
            |c| c.batch_size = 65536,
            "batch_size: got 65536; allowed: 1 to 65535",
        ),
        (|c| c.max_seq_len = 0, "max_seq_len: got 0; allowed: 1 to"),
        (
            |c| c.max_seq_len = i32::MAX,
            "max_seq_len: got 2147483647; allowed: 1 to",
        ),
        (
            |c| c.head_dim = 24,
            "head_dim: got 24; allowed: multiples of 8 from 32 to 256",
        ),
        (
            |c| c.head_dim = 68,
            "head_dim: got 68; allowed: multiples of 8 from 32 to 256",
        ),
        (
            |c| c.head_dim = 264,
            "head_dim: got 264; allowed: multiples of 8 from 32 to 256",
        ),
        (
            |c| c.num_q_heads = 0,
            "heads: got 0 query heads and 2 KV heads; allowed:",
        ),
        (
            |c| c.num_kv_heads = 0,
            "heads: got 8 query heads and 0 KV heads; allowed:",
        ),
        (
            |c| c.num_kv_heads = -2,
            "heads: got 8 query heads and -2 KV heads; allowed:",
        ),
        (
            |c| c.num_q_heads = 9,
            "heads: got 9 query heads and 2 KV heads; allowed:",
        ),
        (
            |c| c.num_q_heads = 2050,
            "query heads per KV head: got 1025; allowed: 1 to 1024",
        ),
        (
            |c| c.scale = f32::NAN,
            "scale: got nan; allowed: a number from",
        ),
        (
            |c| c.scale = f32::NEG_INFINITY,
            "scale: got -inf; allowed: a number from",
        ),
        (
            |c| c.dtype = 2,
            "dtype: got 2; allowed: GQA_FLOAT16 (0), GQA_BFLOAT16 (1)",
        ),
        (
            |c| c.dtype = -1,
            "dtype: got -1; allowed: GQA_FLOAT16 (0), GQA_BFLOAT16 (1)",
        ),
        (
            |c| c.equal_lengths = 2,
            "equal_lengths: got 2; allowed: 0 to 1",
        ),
        (|c| c.dependent = -1, "dependent: got -1; allowed: 0 to 1"),
        (
            |c| c.kv_cache_v_token_stride = -1,
            "kv_cache_v_token_stride: got -1; allowed: 0 to",
        ),
    ];
    for (change, says) in cases {
        let mut config = C_CONFIG;
        let mut bytes = 0;
        change(&mut config);
        // SAFETY: the configuration is not allowed.
        unsafe {
            assert_error!(ARGUMENTS.decode(&config), InvalidValue, says);
            assert_error!(ARGUMENTS.decode_ragged(&config), InvalidValue, says);
            let size = GqaError::check(gqa_workspace_size(&config, &mut bytes));
            assert_error!(size, InvalidValue, says);
            assert_error!(GqaError::check(gqa_prepare(&config)), InvalidValue, says);
            let explained = GqaError::check(gqa_explain(&config, null(), 1, 0, null_mut()));
            assert_error!(explained, InvalidValue, says);
        }
    }
}

/// A configuration with something behind it that this crate does not know.
#[repr(C)]
struct Newer {
    known: GQADecodeConfig,
    window: i32,
    sinks: i32,
}

#[test]
fn a_newer_configuration_is_refused_where_it_asks_for_what_is_not_there() {
    let mut newer = Newer {
        known: GQADecodeConfig {
            struct_size: size_of::<Newer>(),
            ..C_CONFIG
        },
        window: 0,
        sinks: 0,
    };
    let at = |newer: &Newer| (newer as *const Newer).cast::<GQADecodeConfig>();
    let mut launch = gqa_launch::default();
    let name = arch_names().next().unwrap();
    let arch = std::ffi::CString::new(name).unwrap();
    let mut explain_c = |newer: &Newer| {
        // SAFETY: the pointers are valid, the configuration's to all that its size says.
        GqaError::check(unsafe { gqa_explain(at(newer), arch.as_ptr(), 132, 0, &mut launch) })
    };
    match explain_c(&newer) {
        Ok(()) | Err(GqaError::Unsupported(_)) => (), // by the kernels that were exported
        other => panic!("got {other:?}"),
    }
    newer.sinks = 1;
    let says = format!("{} bytes that this library", size_of::<GQADecodeConfig>());
    let result = explain_c(&newer);
    assert_error!(
        result,
        UnsupportedFeature,
        says,
        "is newer than the library"
    );
    // SAFETY: the configuration is refused.
    let result = unsafe { ARGUMENTS.decode(at(&newer)) };
    assert_error!(result, UnsupportedFeature, "Nothing was launched");
    newer.known.struct_size = size_of::<GQADecodeConfig>();
    assert!(!matches!(
        explain_c(&newer),
        Err(GqaError::UnsupportedFeature(_))
    ));
}

#[test]
fn structures_whose_size_no_version_has_are_refused() {
    let arch = std::ffi::CString::new(arch_names().next().unwrap()).unwrap();
    for size in [0, 8, 32, 41, 1032, usize::MAX] {
        let config = GQADecodeConfig {
            struct_size: size,
            ..C_CONFIG
        };
        let says = format!("config: struct_size: got {size}; allowed: sizeof(GQADecodeConfig)");
        // SAFETY: the size is not allowed.
        assert_error!(unsafe { ARGUMENTS.decode(&config) }, InvalidValue, says);
    }
    for size in [0, 8, 17, 1032, usize::MAX] {
        let mut launch = gqa_launch {
            struct_size: size,
            ..gqa_launch::default()
        };
        let says = format!("launch: struct_size: got {size}; allowed: sizeof(gqa_launch)");
        // SAFETY: the pointers are valid.
        let result = unsafe { gqa_explain(&C_CONFIG, arch.as_ptr(), 132, 0, &mut launch) };
        assert_error!(GqaError::check(result), InvalidValue, says);
        assert!(launch.kernel.is_null());
    }
}

#[test]
fn defaults_are_of_their_own_size_and_refused_until_sizes_are_set() {
    assert_eq!(
        GQADecodeConfig::default().struct_size,
        size_of::<GQADecodeConfig>()
    );
    assert_eq!(gqa_launch::default().struct_size, size_of::<gqa_launch>());
    let config = Config::default();
    assert_error!(
        prepare::<f16>(&config),
        InvalidValue,
        "max_seq_len: got 0; allowed: 1 to"
    );
    let config = Config {
        scale: Config::default().scale,
        ..CONFIG
    };
    assert_error!(prepare::<f16>(&config), InvalidValue, "scale: got nan");
}

#[test]
fn a_token_that_does_not_fit_is_a_cache_overflow() {
    for cache_len in [16, 17, i32::MAX] {
        let config = GQADecodeConfig {
            cache_len,
            ..C_CONFIG
        };
        let says = format!("the cache holds {cache_len} tokens");
        // SAFETY: the cache is full.
        let result = unsafe { ARGUMENTS.decode(&config) };
        assert_error!(
            result,
            CacheOverflow,
            says,
            "max_seq_len is 16",
            "Nothing was written"
        );
    }
}

#[test]
fn a_negative_length_is_no_length() {
    let config = GQADecodeConfig {
        cache_len: -1,
        ..C_CONFIG
    };
    // SAFETY: the length is negative.
    let result = unsafe { ARGUMENTS.decode(&config) };
    assert_error!(result, InvalidValue, "cache_len: got -1; allowed: 0 to 15");
}

#[test]
fn tensors_at_odd_addresses_are_refused() {
    let lengths = Arguments {
        cache_seqlens: 0x70002,
        ..ARGUMENTS
    };
    // SAFETY: an address is not allowed.
    unsafe {
        for (i, name) in NAMES.iter().enumerate() {
            let result = ARGUMENTS
                .with(i, ARGUMENTS.tensors[i] + 1)
                .decode(&C_CONFIG);
            assert_error!(
                result,
                InvalidValue,
                format!("{name}: got address"),
                "multiples of 2"
            );
        }
        let result = lengths.decode_ragged(&C_CONFIG);
        assert_error!(result, InvalidValue, "cache_seqlens", "multiples of 4");
    }
}

#[test]
fn an_output_that_shares_memory_is_refused() {
    let query_bytes = 2 * 8 * 64 * 2;
    // SAFETY: tensors share memory.
    unsafe {
        for (i, name) in NAMES.iter().enumerate().skip(1) {
            let last = ARGUMENTS.tensors[0] + query_bytes - 2;
            let result = ARGUMENTS.with(i, last).decode(&C_CONFIG);
            assert_error!(
                result,
                InvalidValue,
                format!("output: got memory that {name} also uses")
            );
        }
        let shared = ARGUMENTS.with(5, ARGUMENTS.tensors[4] + 2);
        let result = shared.decode(&C_CONFIG);
        assert_error!(
            result,
            InvalidValue,
            "kv_cache_v: got memory that kv_cache_k also uses"
        );
    }
}

/// Elements of the tensors of `CONFIG`: output, q, k, v and the caches.
const LENS: [usize; 6] = [1024, 1024, 256, 256, 4096, 4096];

/// Both kinds of step by way of the safe functions, whose views begin where `ARGUMENTS` says.
///
/// # Safety
///
/// Where there is a GPU, the arguments or the configuration are wrong, so that nothing runs.
unsafe fn step<T: Element>(
    config: &Config,
    at: Arguments,
    lens: [usize; 6],
    ragged: Option<(usize, usize)>,
) -> Result<(), GqaError> {
    // SAFETY: nothing is launched.
    let view =
        |i: usize| unsafe { DeviceSlice::<T>::from_raw_parts(at.tensors[i] as *const T, lens[i]) };
    // SAFETY: as above.
    let view_mut =
        |i: usize| unsafe { DeviceSliceMut::<T>::from_raw_parts(at.tensors[i] as *mut T, lens[i]) };
    let (mut output, mut k_cache, mut v_cache) = (view_mut(0), view_mut(4), view_mut(5));
    let [q, k, v] = [1, 2, 3].map(view);
    let mut workspace = Workspace::none();
    let (output, k_cache, v_cache) = (&mut output, &mut k_cache, &mut v_cache);
    let (lengths, overflow) = match ragged {
        Some(lens) => lens,
        None => {
            let stream = Stream::DEFAULT;
            return decode(
                config,
                output,
                q,
                k,
                v,
                k_cache,
                v_cache,
                &mut workspace,
                stream,
            );
        }
    };
    // SAFETY: as above.
    let (lengths, mut overflow) = unsafe {
        (
            DeviceSlice::from_raw_parts(at.cache_seqlens as *const i32, lengths),
            DeviceSliceMut::from_raw_parts(at.overflow as *mut i32, overflow),
        )
    };
    decode_ragged(
        config,
        output,
        q,
        k,
        v,
        k_cache,
        v_cache,
        lengths,
        &mut overflow,
        &mut workspace,
        Stream::DEFAULT,
    )
}

#[test]
fn a_slice_of_another_length_is_named() {
    for (i, name) in NAMES.iter().enumerate() {
        for len in [0, 1, LENS[i] - 1, LENS[i] + 1, 2 * LENS[i], usize::MAX] {
            let mut lens = LENS;
            lens[i] = len;
            let says = format!(
                "{name}: got {len} elements; needed: {}, batch_size *",
                LENS[i]
            );
            for ragged in [None, Some((2, 1))] {
                // SAFETY: a length is wrong.
                unsafe {
                    let (half, brain) = (
                        step::<f16>(&CONFIG, ARGUMENTS, lens, ragged),
                        step::<bf16>(&CONFIG, ARGUMENTS, lens, ragged),
                    );
                    assert_error!(half, InvalidValue, says, "Nothing was launched");
                    assert_error!(brain, InvalidValue, says, "Nothing was launched");
                }
            }
        }
    }
    // SAFETY: a length is wrong.
    unsafe {
        let lengths = step::<f16>(&CONFIG, ARGUMENTS, LENS, Some((3, 1)));
        assert_error!(
            lengths,
            InvalidValue,
            "cache_seqlens: got 3 elements; needed: 2"
        );
        let overflow = step::<f16>(&CONFIG, ARGUMENTS, LENS, Some((2, 0)));
        assert_error!(
            overflow,
            InvalidValue,
            "overflow: got 0 elements; needed: 1"
        );
    }
}

#[test]
fn the_safe_functions_pass_on_what_c_says() {
    let full = Config {
        cache_len: 16,
        ..CONFIG
    };
    let odd = Config {
        num_kv_heads: 2,
        num_q_heads: 9,
        ..CONFIG
    };
    let lens = [1152, 1152, 256, 256, 4096, 4096];
    // SAFETY: each is wrong.
    unsafe {
        assert_error!(
            step::<f16>(&full, ARGUMENTS, LENS, None),
            CacheOverflow,
            "16 tokens"
        );
        assert_error!(
            step::<bf16>(&odd, ARGUMENTS, lens, None),
            InvalidValue,
            "9 query heads"
        );
        let shared = ARGUMENTS.with(1, ARGUMENTS.tensors[0]);
        assert_error!(
            step::<f16>(&CONFIG, shared, LENS, None),
            InvalidValue,
            "that q also uses"
        );
        let ragged = step::<f16>(&CONFIG, ARGUMENTS.with(2, 0), LENS, Some((2, 1)));
        assert_error!(ragged, NullPointer, "k: got null");
    }
    assert_error!(prepare::<f16>(&odd), InvalidValue, "9 query heads");
    assert_error!(workspace_size::<f16>(&odd), InvalidValue, "9 query heads");
    assert_error!(
        explain::<f16>(&odd, "sm_90a", 132, false),
        InvalidValue,
        "9 query heads"
    );
}

#[test]
fn sizes_that_no_c_integer_holds_are_refused() {
    let large = i32::MAX as usize + 1;
    let cases = [
        (
            "batch_size",
            Config {
                batch_size: large,
                ..CONFIG
            },
        ),
        (
            "cache_len",
            Config {
                cache_len: large,
                ..CONFIG
            },
        ),
        (
            "num_q_heads",
            Config {
                num_q_heads: large,
                ..CONFIG
            },
        ),
        (
            "num_kv_heads",
            Config {
                num_kv_heads: usize::MAX,
                ..CONFIG
            },
        ),
        (
            "head_dim",
            Config {
                head_dim: large + 64,
                ..CONFIG
            },
        ),
        (
            "max_seq_len",
            Config {
                max_seq_len: large,
                ..CONFIG
            },
        ),
    ];
    for (name, config) in cases {
        let says = format!("config: {name}: got ");
        // SAFETY: the configuration is not allowed.
        let result = unsafe { step::<f16>(&config, ARGUMENTS, LENS, None) };
        assert_error!(result, InvalidValue, says, "allowed: at most 2147483647");
        assert_error!(
            explain::<f16>(&config, "sm_90a", 1, false),
            InvalidValue,
            says
        );
    }
    assert_error!(
        explain::<f16>(&CONFIG, "sm_90a", large, false),
        InvalidValue,
        "num_sms: got"
    );
    // SAFETY: the views are empty.
    let ragged = unsafe { step::<f16>(&cases[1].1, ARGUMENTS, [0; 6], Some((2, 1))) };
    assert_error!(ragged, InvalidValue, "output: got 0 elements"); // cache_len is ignored
}

#[test]
fn tensors_larger_than_any_memory_are_refused() {
    for (batch_size, heads) in [(65535, i32::MAX as usize), (1 << 15, 1 << 19)] {
        let config = Config {
            batch_size,
            num_q_heads: heads,
            num_kv_heads: heads,
            max_seq_len: 1 << 30, // of the second: 2^70 elements, 0 where 64 bits wrap around
            ..CONFIG
        };
        let says = "config: sizes: got";
        // SAFETY: the configuration is not allowed.
        let result = unsafe { step::<f16>(&config, ARGUMENTS, LENS, None) };
        assert_error!(result, InvalidValue, says, heads.to_string());
        assert_error!(
            explain::<f16>(&config, "sm_90a", 132, false),
            InvalidValue,
            says
        );
        assert_error!(prepare::<f16>(&config), InvalidValue, says);
        assert_error!(workspace_size::<f16>(&config), InvalidValue, says);
    }
}

/// A view that no GPU sees.
fn unused<T>(address: usize, len: usize) -> DeviceSlice<'static, T> {
    // SAFETY: the view is not used on a GPU.
    unsafe { DeviceSlice::from_raw_parts(address as *const T, len) }
}

/// The same in pages: eight of four tokens each, of which a sequence can have four.
fn paged(config: Config<'static>) -> Config<'static> {
    Config {
        block_table: Some(unused(0x90004, 2 * 4)),
        max_pages: 4,
        page_size: 4,
        num_pages: 8,
        slot_mapping: Some(unused(0x98008, 2)),
        ..config
    }
}

/// What is asked for beyond plain attention, of no library's kernels.
fn featured() -> [(&'static str, Config<'static>); 13] {
    let odd = Config {
        head_dim: 40,
        num_q_heads: 22,
        ..CONFIG
    };
    let sinks = |sinks| Config {
        sinks: Some(sinks),
        ..odd
    };
    [
        (
            "window, softcap",
            Config {
                softcap: 30.0,
                window: 15,
                ..odd
            },
        ),
        ("sinks", sinks(Sinks::F32(unused(0x90004, 22)))),
        ("sinks", sinks(Sinks::F16(unused(0x90002, 22)))),
        ("sinks", sinks(Sinks::Bf16(unused(0x90002, 22)))),
        (
            "alibi_slopes",
            Config {
                alibi_slopes: Some(unused(0x90004, 2 * 22)),
                ..odd
            },
        ),
        (
            "cache_leftpad",
            Config {
                cache_leftpad: Some(unused(0x90004, 2)),
                ..odd
            },
        ),
        (
            "cache_batch_idx",
            Config {
                cache_batch_idx: Some(unused(0x90004, 2)),
                cache_rows: 7,
                ..odd
            },
        ),
        (
            "output_float32",
            Config {
                output_float32: true,
                ..odd
            },
        ),
        ("block_table", paged(odd)),
        (
            "num_tokens",
            Config {
                num_tokens: 3,
                ..odd
            },
        ),
        (
            "tree_mask",
            Config {
                num_tokens: 3,
                tree_mask: Some(unused(0x90004, 2 * 3)),
                ..odd
            },
        ),
        (
            "q_norm_weight",
            Config {
                k_norm_weight: Some(Numbers::Bf16(unused(0x90002, 40))),
                ..odd
            },
        ),
        (
            "rotary_cos",
            Config {
                rotary: Some(rotary()),
                ..odd
            },
        ),
    ]
}

#[test]
fn features_without_a_kernel_are_unsupported_and_named() {
    for (name, config) in featured() {
        let Some(arch) = arch_names().next() else {
            return;
        };
        let says = format!("no kernel with {name} for float16, head_dim 40, ");
        let result = explain::<f16>(&config, arch, 132, true);
        assert_error!(result, Unsupported, says);
        assert_eq!(config, { config });
    }
    assert_ne!(featured()[1].1, featured()[2].1);
}

#[test]
fn pages_that_are_not_allowed_are_refused() {
    let config = paged(CONFIG);
    let with_table = |len| Config {
        block_table: Some(unused(0x90004, len)),
        ..config
    };
    let cases = [
        (
            with_table(7),
            "config: block_table: got 7 elements; needed: 8 or more",
        ),
        (
            Config {
                block_table_stride: 5,
                ..config
            },
            "config: block_table: got 8 elements; needed: 9 or more",
        ),
        (
            Config {
                cache_batch_idx: Some(unused(0xA0004, 2)),
                cache_rows: 3,
                ..config
            },
            "config: block_table: got 8 elements; needed: 12 or more",
        ),
        (
            Config {
                slot_mapping: Some(unused(0x98008, 1)),
                ..config
            },
            "config: slot_mapping: got 1 elements; needed: 2, batch_size",
        ),
        (
            Config {
                slot_mapping: Some(unused(0x98004, 2)),
                ..config
            },
            "config: slot_mapping: got address 0x98004; allowed: multiples of 8",
        ),
        (
            Config {
                block_table: None,
                ..config
            },
            "config: page_size: got 4 without block_table; allowed: 0",
        ),
        (
            Config {
                page_size: 0,
                ..config
            },
            "config: page_size: got 0; allowed: 1 to ",
        ),
        (
            Config {
                num_pages: 1 << 31,
                ..config
            },
            "config: num_pages: got 2147483648; allowed: at most 2147483647",
        ),
        (
            Config {
                max_seq_len: 17,
                ..config
            },
            "config: max_seq_len: got 17 with block_table; allowed: 0, or max_pages * page_size, 16",
        ),
    ];
    for (config, says) in cases {
        assert_error!(
            explain::<f16>(&config, "sm_90a", 132, true),
            InvalidValue,
            says
        );
        assert_error!(workspace_size::<f16>(&config), InvalidValue, says);
    }
    // SAFETY: one length for all is refused.
    let result = unsafe { step::<f16>(&config, ARGUMENTS, LENS, None) };
    assert_error!(
        result,
        InvalidValue,
        "config: block_table: got 0x90004 with one length for all"
    );
    let mut lens = LENS;
    lens[5] = 4097;
    // SAFETY: a view is of the wrong length.
    let result = unsafe { step::<f16>(&config, ARGUMENTS, lens, Some((2, 1))) };
    assert_error!(
        result,
        InvalidValue,
        "kv_cache_v: got 4097 elements; needed: 4096, num_pages * page_size * num_kv_heads * head_dim"
    );
}

#[test]
fn several_tokens_have_as_many_elements() {
    let several = Config {
        num_tokens: 3,
        num_new_tokens: 2,
        ..CONFIG
    };
    let index = Some(unused(0x90004, 3));
    let unlike = Config {
        cu_seqlens_q: index,
        total_tokens: 5,
        cu_seqlens_k_new: index,
        total_new_tokens: 4,
        ..CONFIG
    };
    let strided = Config {
        strides: Strides {
            q: RowStrides {
                batch: 1800,
                head: 0,
            },
            tokens: TokenStrides {
                q: 600,
                ..TokenStrides::PACKED
            },
            ..Strides::PACKED
        },
        ..several
    };
    let cases = [
        (
            several,
            0,
            3072,
            "batch_size * num_tokens * num_q_heads * head_dim",
        ),
        (
            several,
            1,
            3072,
            "batch_size * num_tokens * num_q_heads * head_dim",
        ),
        (
            several,
            2,
            512,
            "batch_size * num_new_tokens * num_kv_heads * head_dim",
        ),
        (
            several,
            3,
            512,
            "batch_size * num_new_tokens * num_kv_heads * head_dim",
        ),
        (unlike, 0, 2560, "total_tokens * num_q_heads * head_dim"),
        (unlike, 2, 512, "total_new_tokens * num_kv_heads * head_dim"),
        (strided, 1, 3512, "or more"),
    ];
    for (config, tensor, needed, rule) in cases {
        let (queries, new) = match config.cu_seqlens_q {
            None => (3072, 512),
            Some(_) => (2560, 512),
        };
        let mut lens = [queries, queries, new, new, 4096, 4096];
        lens[tensor] = needed - 1;
        let says = format!("got {} elements; needed: {needed}", needed - 1);
        // SAFETY: a view is of the wrong length.
        let result = unsafe { step::<f16>(&config, ARGUMENTS, lens, Some((2, 1))) };
        assert_error!(result, InvalidValue, says, rule);
    }
    let short = Config {
        cu_seqlens_q: Some(unused(0x90004, 2)),
        ..unlike
    };
    let says = "config: cu_seqlens_q: got 2 elements; needed: 3, batch_size + 1";
    assert_error!(workspace_size::<f16>(&short), InvalidValue, says);
    let masked = Config {
        num_tokens: 33,
        num_new_tokens: 0,
        tree_mask: Some(unused(0x90004, 2 * 33)),
        ..several
    };
    let says = "config: tree_mask: got 66 elements; needed: 132, batch_size * num_tokens, in words";
    assert_error!(workspace_size::<f16>(&masked), InvalidValue, says);
    let config = Config {
        window_right: 2,
        ..several
    };
    let says = "config: window_right: got 2 without not_causal; allowed: 0";
    assert_error!(workspace_size::<f16>(&config), InvalidValue, says);
}

/// Of 32 elements of a head, for 20 positions.
fn rotary() -> Rotary<'static> {
    Rotary {
        cos: Numbers::F32(unused(0x90008, 20 * 16)),
        sin: Numbers::F32(unused(0x98008, 20 * 16)),
        positions: 20,
        dim: 32,
        interleaved: false,
        cos_stride: 0,
        sin_stride: 0,
        seqlens: None,
    }
}

#[test]
fn tables_and_weights_have_as_many_elements() {
    let with = |rotary| Config {
        rotary: Some(rotary),
        ..CONFIG
    };
    let cases = [
        (
            with(Rotary {
                positions: 21,
                ..rotary()
            }),
            "config: rotary.cos: got 320 elements; needed: 336 or more",
        ),
        (
            with(Rotary {
                sin_stride: 18,
                ..rotary()
            }),
            "config: rotary.sin: got 320 elements; needed: 358 or more",
        ),
        (
            with(Rotary {
                sin: Numbers::F16(unused(0x98008, 20 * 16)),
                ..rotary()
            }),
            "config: rotary.sin: got F16(",
        ),
        (
            with(Rotary {
                seqlens: Some(unused(0x9C004, 3)),
                ..rotary()
            }),
            "config: rotary.seqlens: got 3 elements; needed: 2, batch_size",
        ),
        (
            with(Rotary {
                dim: 24,
                ..rotary()
            }),
            "config: rotary_dim: got 24; allowed: multiples of 16",
        ),
        (
            Config {
                q_norm_weight: Some(Numbers::F32(unused(0x90004, 63))),
                ..CONFIG
            },
            "config: q_norm_weight: got 63 elements; needed: 64, head_dim",
        ),
        (
            Config {
                norm_eps: -1.0,
                ..CONFIG
            },
            "config: norm_eps: got -1; allowed: a finite number",
        ),
    ];
    for (config, says) in cases {
        assert_error!(workspace_size::<f16>(&config), InvalidValue, says);
    }
}

#[test]
fn about_equal_lengths_are_launched_as_one_for_all() {
    for (kind, arch) in kinds()
        .into_iter()
        .flat_map(|kind| arch_names().map(move |arch| (kind, arch)))
    {
        let config = kind.config(4, 1, 4500);
        let equal = Config {
            equal_lengths: true,
            ..config
        };
        let Ok(plain) = kind.explain(&config, arch, false) else {
            continue; // exported in the other schedule alone
        };
        assert_eq!(kind.explain(&equal, arch, true), Ok(plain));
    }
}

#[test]
fn dependent_launches_without_a_kernel_are_unsupported_and_named() {
    let (large, small) = (unsupported().config(1, 1, 1 << 17), CONFIG);
    let config = Config {
        dependent: true,
        ..small
    };
    let arch = arch_names().find(|name| *name == "sm_90a");
    let Some(arch) = arch else { return };
    let has_dependents = kernel_names().any(|name| name.ends_with("_pdl"));
    if !has_dependents {
        let says = "no kernel of dependent launches for float16, head_dim 64, 4 query";
        let result = explain::<f16>(&config, arch, 132, false);
        assert_error!(result, Unsupported, says, "export --dependent");
    }
    let config = Config {
        dependent: true,
        ..large
    };
    let result = explain::<f16>(&config, arch, 132, false); // too large for one to pay
    assert_error!(result, Unsupported, "no kernel for float16");
}

#[test]
fn features_that_are_not_allowed_are_refused() {
    let sinks = |sinks| Config {
        sinks: Some(sinks),
        ..CONFIG
    };
    let cases = [
        (
            "config: softcap: got nan; allowed: 0 (none)",
            Config {
                softcap: f32::NAN,
                ..CONFIG
            },
        ),
        (
            "config: window: got 2147483648; allowed: at most",
            Config {
                window: 1 << 31,
                ..CONFIG
            },
        ),
        (
            "config: sinks: got address 0x90002; allowed: multiples of 4",
            sinks(Sinks::F32(unused(0x90002, 8))),
        ),
        (
            "config: sinks: got 7 elements; needed: 8, num_q_heads",
            sinks(Sinks::F32(unused(0x90000, 7))),
        ),
        (
            "config: sinks: got 9 elements; needed: 8, num_q_heads",
            sinks(Sinks::F16(unused(0x90000, 9))),
        ),
        (
            "config: alibi_slopes: got 17 elements; needed: 16, batch_size * num_q_heads",
            Config {
                alibi_slopes: Some(unused(0x90000, 17)),
                ..CONFIG
            },
        ),
        (
            "config: cache_leftpad: got 3 elements; needed: 2, batch_size",
            Config {
                cache_leftpad: Some(unused(0x90000, 3)),
                ..CONFIG
            },
        ),
        (
            "config: cache_batch_idx: got 1 elements; needed: 2, batch_size",
            Config {
                cache_batch_idx: Some(unused(0x90000, 1)),
                ..CONFIG
            },
        ),
        (
            "config: cache_rows: got 3 without cache_batch_idx; allowed: 0, or batch_size, 2",
            Config {
                cache_rows: 3,
                ..CONFIG
            },
        ),
    ];
    for (says, config) in cases {
        assert_error!(
            explain::<f16>(&config, "sm_90a", 132, true),
            InvalidValue,
            says
        );
        assert_error!(workspace_size::<f16>(&config), InvalidValue, says);
    }
}

#[test]
fn caches_have_as_many_rows_as_the_index_may_name() {
    let config = Config {
        cache_batch_idx: Some(unused(0x90000, 2)),
        cache_rows: 3,
        ..CONFIG
    };
    let mut lens = LENS;
    // SAFETY: the views are of the wrong length.
    let result = unsafe { step::<f16>(&config, ARGUMENTS, lens, Some((2, 1))) };
    assert_error!(result, InvalidValue, "kv_cache_k: got", "needed: 6144, ");
    lens[4] = 6144;
    lens[5] = 6144;
    // SAFETY: one length for all is refused.
    let result = unsafe { step::<f16>(&config, ARGUMENTS, lens, None) };
    assert_error!(
        result,
        InvalidValue,
        "cache_batch_idx: got 0x90000 with one length for all",
        "Call gqa_attention_decode_ragged"
    );
}

/// Room for a log-sum-exp that no GPU writes.
fn unused_lse(address: usize, len: usize) -> Option<Lse<'static>> {
    // SAFETY: the view is not used on a GPU.
    Some(unsafe { Lse::new(DeviceSliceMut::from_raw_parts(address as *mut f32, len)) })
}

#[test]
fn a_log_sum_exp_that_is_not_allowed_is_refused() {
    let cases = [
        (
            "config: lse: got 15 elements; needed: 16, batch_size * num_q_heads",
            unused_lse(0x90000, 15),
        ),
        (
            "config: lse: got address 0x90002; allowed: multiples of 4",
            unused_lse(0x90002, 16),
        ),
        (
            "lse: got memory that k also uses; allowed: memory of its own",
            unused_lse(ARGUMENTS.tensors[2], 16),
        ),
    ];
    for (says, lse) in cases {
        let config = Config { lse, ..CONFIG };
        // SAFETY: it is not allowed.
        let result = unsafe { step::<f16>(&config, ARGUMENTS, LENS, None) };
        assert_error!(result, InvalidValue, says, "Nothing was launched");
    }
}

#[test]
fn values_have_a_head_dim_of_their_own() {
    let config = Config {
        head_dim_v: 80,
        ..CONFIG
    };
    let mut lens = LENS;
    for (i, needed) in [(0, 1280), (3, 320), (5, 5120)] {
        // SAFETY: the views are of the wrong length.
        let result = unsafe { step::<f16>(&config, ARGUMENTS, lens, None) };
        let says = format!("{}: got {} elements; needed: {needed}, ", NAMES[i], LENS[i]);
        assert_error!(result, InvalidValue, says, "_heads * head_dim_v");
        lens[i] = needed;
    }
    let shared = ARGUMENTS.with(1, ARGUMENTS.tensors[0] + 2560 - 2);
    // SAFETY: output and q share memory.
    let result = unsafe { step::<f16>(&config, shared, lens, None) };
    assert_error!(result, InvalidValue, "output: got memory that q also uses");
    let odd = Config {
        head_dim_v: 4,
        ..CONFIG
    };
    assert_error!(
        explain::<f16>(&odd, "sm_90a", 132, false),
        InvalidValue,
        "config: head_dim_v: got 4; allowed: multiples of 8 from 32 to 256"
    );
}

#[test]
fn an_output_of_another_type_than_the_configuration_says_is_refused() {
    let float32 = Config {
        output_float32: true,
        ..CONFIG
    };
    let at = |i: usize| ARGUMENTS.tensors[i];
    // SAFETY: the output is of the wrong type, or shares memory with q.
    let launch = |config: &Config, output: usize, len: usize| unsafe {
        decode(
            config,
            &mut DeviceSliceMut::<f32>::from_raw_parts(output as *mut f32, len),
            unused::<bf16>(at(1), LENS[1]),
            unused(at(2), LENS[2]),
            unused(at(3), LENS[3]),
            &mut DeviceSliceMut::from_raw_parts(at(4) as *mut bf16, LENS[4]),
            &mut DeviceSliceMut::from_raw_parts(at(5) as *mut bf16, LENS[5]),
            &mut Workspace::none(),
            Stream::DEFAULT,
        )
    };
    assert_error!(
        launch(&CONFIG, at(0), LENS[0]),
        InvalidValue,
        "output: got f32 with output_float32: false; needed: what q is of. Nothing was launched"
    );
    assert_error!(
        launch(&float32, at(1) - 4 * 1024 + 4, LENS[0]),
        InvalidValue,
        "output: got memory that q also uses"
    );
    assert_error!(
        launch(&float32, at(0), LENS[0] - 1),
        InvalidValue,
        "output: got 1023 elements; needed: 1024, batch_size * num_q_heads * head_dim"
    );
    // SAFETY: the output is of the wrong type.
    let result = unsafe { step::<f16>(&float32, ARGUMENTS, LENS, Some((2, 1))) };
    assert_error!(
        result,
        InvalidValue,
        "output: got what q is of with output_float32: true; needed: f32"
    );
}

/// Scales on the device, of as many elements.
fn scales(len: usize) -> Option<Scale<'static>> {
    Some(Scale::OnDevice {
        values: unused(0x90004, len),
        batch_stride: 2,
        head_stride: 1,
    })
}

#[test]
fn caches_of_8_bits_and_their_scales_are_checked() {
    let e4m3 = Config {
        cache_type: CacheType::F8E4M3,
        ..CONFIG
    };
    let at = |i: usize| ARGUMENTS.tensors[i];
    // SAFETY: the caches are of the wrong type or too short, or a scale is not allowed.
    let launch = |config: &Config, len: usize| unsafe {
        decode(
            config,
            &mut DeviceSliceMut::from_raw_parts(at(0) as *mut bf16, LENS[0]),
            unused::<bf16>(at(1), LENS[1]),
            unused(at(2), LENS[2]),
            unused(at(3), LENS[3]),
            &mut DeviceSliceMut::from_raw_parts(at(4) as *mut f8e4m3, len),
            &mut DeviceSliceMut::from_raw_parts(at(5) as *mut f8e4m3, LENS[5]),
            &mut Workspace::none(),
            Stream::DEFAULT,
        )
    };
    let e5m2 = Config {
        cache_type: CacheType::F8E5M2,
        ..CONFIG
    };
    for (config, said) in [(CONFIG, "OfQ"), (e5m2, "F8E5M2")] {
        let says = format!("got F8E4M3 with cache_type: {said}; needed: the same.");
        assert_error!(launch(&config, LENS[4]), InvalidValue, says);
    }
    // SAFETY: the caches are of the wrong type.
    let result = unsafe { step::<f16>(&e4m3, ARGUMENTS, LENS, None) };
    assert_error!(result, InvalidValue, "got OfQ with cache_type: F8E4M3; nee");
    let says = "kv_cache_k: got 4095 elements; needed: 4096, batch_size * max_seq_len * ";
    assert_error!(launch(&e4m3, LENS[4] - 1), InvalidValue, says);
    let wrong = [
        (
            Some(Scale::Number(0.0)),
            "got 0; allowed: a number from 1e-30 to 1e30.",
        ),
        (
            Some(Scale::Number(-1.0)),
            "got -1; allowed: 0 (one), or a number from 1e-30",
        ),
        (
            scales(3),
            "got 3 elements; needed: 4 or more, from the first to the last by its strides.",
        ),
    ];
    for (scale, says) in wrong {
        for (name, config) in [
            (
                "k_scale",
                Config {
                    k_scale: scale,
                    ..e4m3
                },
            ),
            (
                "v_scale",
                Config {
                    v_scale: scale,
                    ..e4m3
                },
            ),
        ] {
            let says = format!("config: {name}: {says}");
            assert_error!(launch(&config, LENS[4]), InvalidValue, says);
        }
    }
    let far = Scale::OnDevice {
        values: unused(0x90004, usize::MAX),
        batch_stride: 1 << 31,
        head_stride: 0,
    };
    let far = Config {
        k_scale: Some(far),
        ..e4m3
    };
    let says = "config: k_scale_batch_stride: got 2147483648; allowed: at most 2147483647.";
    assert_error!(launch(&far, LENS[4]), InvalidValue, says);
    let unscaled = Config {
        v_scale: scales(4),
        ..CONFIG
    };
    let says = "v_scales: got one with caches of the type of q; allowed: null.";
    assert_error!(prepare::<f16>(&unscaled), InvalidValue, says);
}

/// Those of tokens: as many, at this address.
fn of_tokens(address: usize, len: usize, batch_stride: usize) -> Option<Scale<'static>> {
    // SAFETY: nothing is launched with them.
    let values = unsafe { Written::new(DeviceSliceMut::from_raw_parts(address as *mut f32, len)) };
    Some(Scale::OfTokens {
        values,
        batch_stride,
    })
}

#[test]
fn scales_of_tokens_are_checked() {
    let (keys, values) = (0x90000, 0xa0000);
    let config = Config {
        cache_type: CacheType::F8E4M3,
        k_scale: of_tokens(keys, 2 * 16 * 2, 0),
        v_scale: of_tokens(values, 40 + 16 * 2, 40),
        ..CONFIG
    };
    let paged = Config {
        block_table: Some(unused(0x70000, 2)),
        max_pages: 1,
        page_size: 16,
        num_pages: 3,
        ..config
    };
    let alone = "beside scales of tokens; needed: Scale::OfTokens. Nothing was launched.";
    let needed = |name: &str, got: usize, needed: usize| {
        format!("config: {name}: got {got} elements; needed: {needed} or more, from the first to")
    };
    let with_values = |v_scale| Config { v_scale, ..config };
    let wrong = [
        (
            with_values(None),
            format!("config: v_scale: got None {alone}"),
        ),
        (
            with_values(Some(Scale::Number(0.5))),
            format!("config: v_scale: got Some(Number(0.5)) {alone}"),
        ),
        (with_values(scales(64)), alone.to_string()),
        (
            Config {
                k_scale: scales(64),
                ..config
            },
            "config: k_scale: got Some(OnDevice { values: DeviceSlice(".to_string(),
        ),
        (
            with_values(of_tokens(values, 71, 40)),
            needed("v_scale", 71, 72),
        ),
        (
            with_values(of_tokens(values, 63, 0)),
            needed("v_scale", 63, 64),
        ),
        (paged, needed("k_scale", 64, 96)),
        (
            with_values(of_tokens(values, 64, 1 << 31)),
            "config: v_scale: got 64 elements; needed: 2147483680 or more".to_string(),
        ),
        (
            with_values(of_tokens(values, 1 << 40, 31)),
            "v_scale_batch_stride: got 31 with scales_of_tokens; allowed: from 32".to_string(),
        ),
        (
            with_values(of_tokens(values + 2, 64, 0)),
            "v_scales: got address 0xa0002; allowed: multiples of 4.".to_string(),
        ),
        (
            Config {
                cache_type: CacheType::OfQ,
                ..config
            },
            "scales_of_tokens: got 1 with caches of the type of q; allowed: 0.".to_string(),
        ),
    ];
    for (config, says) in wrong {
        assert_error!(prepare::<f16>(&config), InvalidValue, says);
    }
    let at = |i: usize| ARGUMENTS.tensors[i];
    // SAFETY: scales have memory of a tensor, or of each other.
    let launch = |config: &Config| unsafe {
        decode(
            config,
            &mut DeviceSliceMut::from_raw_parts(at(0) as *mut f16, LENS[0]),
            unused::<f16>(at(1), LENS[1]),
            unused(at(2), LENS[2]),
            unused(at(3), LENS[3]),
            &mut DeviceSliceMut::from_raw_parts(at(4) as *mut f8e4m3, LENS[4]),
            &mut DeviceSliceMut::from_raw_parts(at(5) as *mut f8e4m3, LENS[5]),
            &mut Workspace::none(),
            Stream::DEFAULT,
        )
    };
    for (shared, says) in [
        (keys + 4, "v_scales: got memory that k_scales also uses"),
        (at(1), "q: got memory of v_scales, to which the new token"),
        (at(5), "v_scales: got memory that kv_cache_v also uses"),
    ] {
        let config = with_values(of_tokens(shared, 64, 0));
        assert_error!(launch(&config), InvalidValue, says);
    }
}

#[test]
fn caches_of_8_bits_without_a_kernel_are_unsupported_and_named() {
    let of_heads = (Some(Scale::Number(0.5)), scales(4));
    let of_tokens = (of_tokens(0x90000, 64, 0), of_tokens(0xa0000, 64, 0));
    let Some(arch) = arch_names().next() else {
        return;
    };
    for (cache_type, (k_scale, v_scale), name) in [
        (CacheType::F8E4M3, of_heads, "float8_e4m3fn"),
        (CacheType::F8E5M2, of_heads, "float8_e5m2"),
        (
            CacheType::F8E4M3,
            of_tokens,
            "float8_e4m3fn with scales of tokens",
        ),
        (
            CacheType::F8E5M2,
            of_tokens,
            "float8_e5m2 with scales of tokens",
        ),
    ] {
        let config = Config {
            head_dim: 40,
            num_q_heads: 22,
            cache_type,
            k_scale,
            v_scale,
            ..CONFIG
        };
        let several = Config {
            num_tokens: 2,
            ..config
        };
        for (config, asked) in [(config, ""), (several, " with num_tokens")] {
            let says = format!("no kernel{asked} for float16 and caches of {name}, head_dim 40, ");
            assert_error!(explain::<f16>(&config, arch, 132, false), Unsupported, says);
        }
    }
}

#[test]
fn views_reach_as_far_as_strides() {
    let heads_first = CacheStrides {
        token: 64 + 8,
        head: 16 * (64 + 8),
        batch: 2 * 16 * (64 + 8),
    };
    let slice = RowStrides {
        batch: 2048,
        head: 0,
    };
    let strides = Strides {
        q: slice,
        kv_cache_v: heads_first,
        ..Strides::PACKED
    };
    let config = Config { strides, ..CONFIG };
    let mut lens = LENS;
    let cases = [(1, 2048 + 512), (5, 4 * 16 * 72 - 8)];
    for (i, needed) in cases {
        for len in [0, LENS[i], needed - 1] {
            lens[i] = len;
            let says = format!(
                "{}: got {len} elements; needed: {needed} or more, from the first",
                NAMES[i]
            );
            // SAFETY: a view is too short.
            let result = unsafe { step::<f16>(&config, ARGUMENTS, lens, None) };
            assert_error!(result, InvalidValue, says, "Nothing was launched");
        }
        lens[i] = needed;
    }
    let apart = Arguments {
        tensors: [1, 2, 3, 4, 5, 5].map(|it| it << 40),
        ..ARGUMENTS
    };
    for more in [0, 1000] {
        lens[1] += more;
        // SAFETY: the caches share memory.
        let result = unsafe { step::<f16>(&config, apart, lens, None) };
        assert_error!(
            result,
            InvalidValue,
            "kv_cache_v: got memory that kv_cache_k"
        );
    }
}

#[test]
fn strides_that_are_not_allowed_are_refused() {
    let of_q = |batch, head| Config {
        strides: Strides {
            q: RowStrides { batch, head },
            ..Strides::PACKED
        },
        ..CONFIG
    };
    let cases = [
        (
            of_q(0, 63),
            "config: strides: got q with 512 elements between sequences and 63 between heads of 64;",
        ),
        (
            of_q(1 << 60, 64),
            "config: strides: got q with 2.306e+18 bytes from its first element to its last",
        ),
        (
            of_q(usize::MAX, 64),
            "config: q_batch_stride: got 18446744073709551615; allowed: at most 9223372036854775807",
        ),
    ];
    for (config, says) in cases {
        assert_error!(
            explain::<f16>(&config, "sm_90a", 132, true),
            InvalidValue,
            says
        );
        assert_error!(workspace_size::<f16>(&config), InvalidValue, says);
    }
}

#[test]
fn parts_of_views_lie_within_them() {
    // SAFETY: the views are not used on a GPU.
    let (view, mut view_mut) = unsafe {
        (
            DeviceSlice::from_raw_parts(0x1000 as *const f16, 10),
            DeviceSliceMut::from_raw_parts(0x1000 as *mut i32, 10),
        )
    };
    let part = view.slice(2..6).unwrap();
    assert_eq!((part.as_ptr() as usize, part.len()), (0x1004, 4));
    assert!(view.slice(10..10).unwrap().is_empty());
    let mut part = view_mut.slice_mut(3..10).unwrap();
    assert_eq!((part.as_mut_ptr() as usize, part.len()), (0x100c, 7));
    assert_eq!(part.as_slice().as_ptr() as usize, 0x100c);
    assert_error!(
        view.slice(0..11),
        InvalidValue,
        "slice: got 0..11; allowed: within 0..10"
    );
    #[allow(clippy::reversed_empty_ranges)]
    let reversed = view_mut.slice_mut(6..5).map(|_| ());
    assert_error!(reversed, InvalidValue, "slice: got 6..5");
}

/// A configuration that no kernel of the library is for.
fn unsupported() -> Kind {
    let groups = (1..=1024).map(|group_size| Kind {
        bf16: false,
        head_dim: 248,
        group_size,
    });
    groups
        .into_iter()
        .find(|it| !kinds().contains(it))
        .expect("not everything was exported")
}

#[test]
fn what_was_not_exported_is_unsupported() {
    let kind = unsupported();
    for arch in arch_names() {
        let result = kind.explain(&kind.config(1, 1, 64), arch, false);
        let group = format!("{} query heads per KV head", kind.group_size);
        assert_error!(
            result,
            Unsupported,
            "head_dim 248",
            group,
            arch,
            "gqa-cutlass export"
        );
    }
    let config = kind.config(1, 1, 64);
    let unknown = explain::<f16>(&config, "sm_1", 132, false);
    assert_error!(unknown, InvalidValue, "arch: got sm_1; allowed:", "sm_");
    let zero = explain::<f16>(&config, "sm_90a\0", 132, false);
    assert_error!(zero, InvalidValue, "arch: got \"sm_90a\\0\"");
    let none = explain::<f16>(&config, arch_names().next().unwrap(), 0, false);
    assert_error!(none, InvalidValue, "num_sms: got 0; allowed: 1 to");
}

#[test]
fn explain_gives_every_kind_of_kernel_a_sane_launch() {
    for kind in kinds() {
        let mut explained = 0;
        for arch in arch_names() {
            for (batch_size, max_seq_len) in [(1, 64), (1, 2048), (3, 2048), (64, 32768)] {
                let config = kind.config(batch_size, 2, max_seq_len);
                for ragged in [false, true] {
                    match kind.explain(&config, arch, ragged) {
                        Ok(launch) => check_launch(kind, &config, ragged, &launch),
                        Err(GqaError::Unsupported(_)) => continue, // one schedule was exported
                        Err(error) => panic!("{error}"),
                    }
                    explained += 1;
                }
            }
        }
        assert!(explained > 0, "{kind:?}");
    }
}

fn check_launch(kind: Kind, config: &Config, ragged: bool, launch: &Launch) {
    let name = launch.kernel;
    assert!(kernel_names().any(|it| it == name), "{name}");
    assert!(name.contains(&format!("_d{}_g{}_", kind.head_dim, kind.group_size)));
    assert_eq!(name.contains("_bf16_"), kind.bf16, "{name}");
    let [columns, rows, sequences] = launch.grid;
    let splits = launch.num_splits as u32;
    assert!(columns > 0 && columns % 2 == 0, "{launch:?}");
    assert!(splits >= 1 && rows >= splits, "{launch:?}");
    assert!(ragged || rows == splits, "{launch:?}");
    if ragged && config.max_seq_len > 4096 && kind.group_size <= 16 && launch.cluster == 1 {
        assert!(rows > splits, "{launch:?}"); // blocks to deal out by the lengths
    }
    assert_eq!(sequences as usize, config.batch_size);
    assert!(
        launch.cluster >= 1 && rows % launch.cluster == 0,
        "{launch:?}"
    );
    assert!(launch.block % 32 == 0 && (32..=1024).contains(&launch.block));
    assert!(launch.shared_bytes <= 227 * 1024, "{launch:?}");
    assert!((1..=8).contains(&launch.num_stages), "{launch:?}");
    assert_eq!(
        launch.workspace_size > 0,
        rows > launch.cluster,
        "{launch:?}"
    );
}

#[test]
fn kernels_have_names_of_their_own() {
    let mut names: Vec<&str> = kernel_names().collect();
    // SAFETY: C takes any index.
    let beyond = unsafe { [gqa_kernel_name(names.len() as i32), gqa_kernel_name(-1)] };
    assert!(beyond.iter().all(|name| name.is_null()));
    let count = names.len();
    names.sort_unstable();
    names.dedup();
    assert!(count > 0 && names.len() == count);
}

#[test]
fn targets_have_names() {
    let names: Vec<&str> = arch_names().collect();
    assert!(!names.is_empty() && names.iter().all(|name| name.starts_with("sm_")));
    // SAFETY: C takes any index.
    let beyond = unsafe { [gqa_arch_name(names.len() as i32), gqa_arch_name(-1)] };
    assert!(beyond.iter().all(|name| name.is_null()));
}

#[test]
fn without_a_driver_every_call_that_needs_one_says_so() {
    let kind = unsupported(); // the driver is asked for first
    let config = kind.config(2, 2, 16);
    let (prepared, size) = match kind.bf16 {
        true => (prepare::<bf16>(&config), workspace_size::<bf16>(&config)),
        false => (prepare::<f16>(&config), workspace_size::<f16>(&config)),
    };
    let says = "needed: an NVIDIA GPU and its driver";
    if let Err(GqaError::NoDriver(_)) = prepared {
        assert_error!(
            prepared,
            NoDriver,
            "no usable GPU",
            says,
            "Nothing was launched"
        );
        assert_error!(size, NoDriver, "no usable GPU", says);
        // SAFETY: without a driver nothing runs.
        unsafe {
            assert_error!(step::<f16>(&CONFIG, ARGUMENTS, LENS, None), NoDriver, says);
            assert_error!(
                step::<f16>(&CONFIG, ARGUMENTS, LENS, Some((2, 1))),
                NoDriver,
                says
            );
        }
    } else {
        assert!(Gpu::open().is_ok(), "{prepared:?} without a driver");
    }
}

#[test]
fn each_thread_has_its_last_error() {
    let both_failed = Barrier::new(2);
    let fail = |cache_len: i32, says: &str| {
        let config = GQADecodeConfig {
            cache_len,
            ..C_CONFIG
        };
        // SAFETY: the length is wrong; the message is the thread's.
        unsafe {
            assert!(ARGUMENTS.decode(&config).is_err());
            both_failed.wait();
            let message = CStr::from_ptr(gqa_last_error()).to_str().unwrap();
            assert!(message.contains(says), "{message}");
        }
    };
    thread::scope(|scope| {
        scope.spawn(|| fail(100, "the cache holds 100 tokens"));
        scope.spawn(|| fail(-7, "cache_len: got -7"));
    });
}

#[test]
fn a_status_becomes_its_variant_and_back() {
    for status in -2..=10 {
        // SAFETY: C takes any status.
        let name = unsafe { CStr::from_ptr(gqa_status_name(status)) }
            .to_str()
            .unwrap();
        match GqaError::check(status) {
            Ok(()) => assert_eq!((status, name), (GQA_SUCCESS, "GQA_SUCCESS")),
            Err(error) => {
                let variant = format!("{error:?}")
                    .split(['(', ' '])
                    .next()
                    .unwrap()
                    .to_string();
                assert_eq!(error.status(), status);
                assert_eq!(screaming(&variant), name);
            }
        }
    }
    let unknown = GqaError::check(i32::MIN).unwrap_err();
    assert!(matches!(
        &unknown,
        GqaError::Unknown {
            status: i32::MIN,
            ..
        }
    ));
}

/// `NoDriver` to `GQA_ERROR_NO_DRIVER`; `Unknown` to what C says of statuses that it does not know.
fn screaming(variant: &str) -> String {
    if variant == "Unknown" {
        return "unknown status".to_string();
    }
    let mut name = "GQA_ERROR".to_string();
    for letter in variant.chars() {
        if letter.is_uppercase() {
            name.push('_');
        }
        name.extend(letter.to_uppercase());
    }
    name
}

#[test]
fn errors_are_errors() {
    let error: Box<dyn Error + Send + Sync> =
        Box::new(explain::<f16>(&CONFIG, "x", 1, false).unwrap_err());
    assert!(error.to_string().starts_with("arch: got x"));
    let error = error.downcast_ref::<GqaError>().unwrap();
    assert_eq!(error.message(), error.to_string());
}

#[test]
fn what_fails_is_not_logged() {
    unsafe extern "C" fn fail(line: *const c_char, _user: *mut c_void) {
        // SAFETY: C passes a string.
        panic!("{:?}", unsafe { CStr::from_ptr(line) });
    }
    set_log_callback(Some(Box::new(|line| panic!("{line}"))));
    // SAFETY: the caches are full; the callbacks are there for good.
    unsafe {
        let full = Config {
            cache_len: 16,
            ..CONFIG
        };
        assert!(step::<f16>(&full, ARGUMENTS, LENS, None).is_err());
        gqa_set_log_callback(Some(fail), null_mut());
        assert!(step::<f16>(&full, ARGUMENTS, LENS, None).is_err());
        gqa_set_log_callback(None, null_mut());
    }
    set_log_callback(None);
}
