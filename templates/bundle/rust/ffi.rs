//! `include/gqa_attention_decode.h`, as it is. The rest of the crate wraps it safely.
//!
//! `rust/tests/layout.rs` compares names, parameters, constants and layouts with the header's.

#![allow(non_camel_case_types)]

use std::ffi::c_void;
use std::os::raw::{c_char, c_int};

pub use crate::element::{bf16, f16};

/// What a stream handle points to; `cudaStream_t` and `CUstream` of other crates are cast to it.
#[repr(C)]
pub struct CUstream_st {
    opaque: [u8; 0],
}

/// A CUDA stream; null: the default stream.
pub type cudaStream_t = *mut CUstream_st;

/// What every function that can fail returns. An integer and no enum, because a value that this
/// crate does not know must be no undefined behaviour.
pub type gqa_status = c_int;

/// All is well; everything else launched and wrote nothing.
pub const GQA_SUCCESS: gqa_status = 0;
/// A pointer that must not be null is.
pub const GQA_ERROR_NULL_POINTER: gqa_status = 1;
/// A size, an address or the scale is not allowed.
pub const GQA_ERROR_INVALID_VALUE: gqa_status = 2;
/// The new token does not fit into the cache.
pub const GQA_ERROR_CACHE_OVERFLOW: gqa_status = 3;
/// The library was exported without a kernel for the configuration.
pub const GQA_ERROR_UNSUPPORTED: gqa_status = 4;
/// The workspace is missing, too small or misaligned.
pub const GQA_ERROR_WORKSPACE: gqa_status = 5;
/// No libcuda, too old a one, or no GPU.
pub const GQA_ERROR_NO_DRIVER: gqa_status = 6;
/// The GPU is too old, or none of those exported for.
pub const GQA_ERROR_DEVICE: gqa_status = 7;
/// The driver refused to load or to launch a kernel.
pub const GQA_ERROR_LAUNCH: gqa_status = 8;

/// The element type of every tensor of a call.
pub type gqa_dtype = i32;

/// Every element is an `f16`.
pub const GQA_FLOAT16: gqa_dtype = 0;
/// Every element is a `bf16`.
pub const GQA_BFLOAT16: gqa_dtype = 1;

/// The sizes of a step.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct GQADecodeConfig {
    /// Sequences, 1 to 65535.
    pub batch_size: i32,
    /// Tokens in every sequence's cache before the step, 0 to `max_seq_len - 1`.
    pub cache_len: i32,
    /// Query heads, a multiple of `num_kv_heads`.
    pub num_q_heads: i32,
    /// KV heads.
    pub num_kv_heads: i32,
    /// Elements per head, a multiple of 8 from 32 to 256.
    pub head_dim: i32,
    /// Factor on the scores, usually `1 / sqrt(head_dim)`.
    pub scale: f32,
    /// Tokens that the cache can hold per sequence.
    pub max_seq_len: i32,
    /// The type of every tensor.
    pub dtype: gqa_dtype,
    /// Device memory of `workspace_size` bytes; may be null where [`gqa_workspace_size`] is 0.
    pub workspace: *mut c_void,
    /// Bytes.
    pub workspace_size: usize,
}

/// What would be launched.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct gqa_launch {
    /// The kernel's name; never freed.
    pub kernel: *const c_char,
    /// Blocks.
    pub grid: [u32; 3],
    /// Blocks of a cluster, along y.
    pub cluster: u32,
    /// Threads.
    pub block: u32,
    /// Bytes.
    pub shared_bytes: u32,
    /// Blocks that share a sequence.
    pub num_splits: i32,
    /// Tiles that a warp has under way at a time.
    pub num_stages: i32,
    /// Bytes of workspace that this launch uses.
    pub workspace_size: usize,
}

/// Receives a line, and what was given to [`gqa_set_log_callback`]. Must not unwind.
pub type gqa_log_callback = Option<unsafe extern "C" fn(line: *const c_char, user: *mut c_void)>;

extern "C" {
    /// One decode step, see [`decode`](crate::decode). Launches one kernel and returns without
    /// waiting for it.
    pub fn gqa_attention_decode(
        output: *mut c_void,
        q: *const c_void,
        k: *const c_void,
        v: *const c_void,
        kv_cache_k: *mut c_void,
        kv_cache_v: *mut c_void,
        config: *const GQADecodeConfig,
        stream: cudaStream_t,
    ) -> gqa_status;

    /// One decode step of sequences of different lengths, see
    /// [`decode_ragged`](crate::decode_ragged).
    pub fn gqa_attention_decode_ragged(
        output: *mut c_void,
        q: *const c_void,
        k: *const c_void,
        v: *const c_void,
        kv_cache_k: *mut c_void,
        kv_cache_v: *mut c_void,
        cache_seqlens: *const i32,
        overflow: *mut i32,
        config: *const GQADecodeConfig,
        stream: cudaStream_t,
    ) -> gqa_status;

    /// Bytes of workspace that the configuration needs on the current device.
    pub fn gqa_workspace_size(config: *const GQADecodeConfig, bytes: *mut usize) -> gqa_status;

    /// Loads the configuration's kernels on the current device.
    pub fn gqa_prepare(config: *const GQADecodeConfig) -> gqa_status;

    /// Says what would be launched, on a GPU that need not be there.
    pub fn gqa_explain(
        config: *const GQADecodeConfig,
        arch: *const c_char,
        num_sms: i32,
        ragged: i32,
        launch: *mut gqa_launch,
    ) -> gqa_status;

    /// What went wrong in this thread's last call that did not return [`GQA_SUCCESS`]. Valid until
    /// the thread's next such call.
    pub fn gqa_last_error() -> *const c_char;

    /// A status' name; never freed.
    pub fn gqa_status_name(status: gqa_status) -> *const c_char;

    /// Sets what receives one line per launch; `None` for nothing.
    pub fn gqa_set_log_callback(callback: gqa_log_callback, user: *mut c_void);

    /// How many kernels the library has.
    pub fn gqa_kernel_count() -> i32;

    /// The name of one of them, never freed; null beyond the last.
    pub fn gqa_kernel_name(index: i32) -> *const c_char;

    /// The name of a target that they were compiled for, never freed; null beyond the last.
    pub fn gqa_arch_name(index: i32) -> *const c_char;
}
