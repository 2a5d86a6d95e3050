//! `include/gqa_attention_decode.h`, as it is. The rest of the crate wraps it safely.
//!
//! `rust/tests/layout.rs` compares names, parameters, constants and layouts with the header's.

#![allow(non_camel_case_types)]

use std::ffi::c_void;
use std::os::raw::c_char;

pub use crate::element::{bf16, f16};
pub use crate::types::*;

/// What a stream handle points to; `cudaStream_t` and `CUstream` of other crates are cast to it.
#[repr(C)]
pub struct CUstream_st {
    opaque: [u8; 0],
}

/// A CUDA stream; null: the default stream.
pub type cudaStream_t = *mut CUstream_st;

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
