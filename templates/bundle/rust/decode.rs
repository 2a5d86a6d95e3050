//! The step itself, and what prepares it.

use crate::config::Config;
use crate::device::{DeviceSlice, DeviceSliceMut, Stream, Workspace};
use crate::element::{Element, Output, Stored};
use crate::error::GqaError;
use crate::ffi;
use crate::layout::check_len;

/// One decode step: appends `k` and `v`, the new tokens', to the caches at `config.cache_len`, and
/// attends over everything cached, the new tokens included.
///
/// | tensor | shape, contiguous unless `config.strides` says otherwise |
/// | --- | --- |
/// | `output` | `[batch_size, num_q_heads, head_dim]`, written; of `T`, or of `f32` with `output_float32` |
/// | `q` | `[batch_size, num_q_heads, head_dim]` |
/// | `k`, `v` | `[batch_size, num_kv_heads, head_dim]` |
/// | `kv_cache_k`, `kv_cache_v` | `[batch_size, max_seq_len, num_kv_heads, head_dim]`, one row written; of `T`, or of 8 bits, as `cache_type` says |
///
/// Where there is a `head_dim_v`, it is that of `output`, `v` and `kv_cache_v`. Caches in pages are
/// `[num_pages, page_size, num_kv_heads, head_dim]`. Several tokens are a dimension behind the sequences,
/// see [`Config::num_tokens`].
///
/// Launches one kernel and returns without waiting for it. The stream's context is current, or none
/// is: then the primary context of device 0 becomes current, as in the CUDA runtime. Can be captured
/// into a CUDA graph after [`prepare`].
///
/// # Errors
///
/// Nothing was launched and nothing written. Any [`GqaError`]; [`GqaError::CacheOverflow`] where the
/// cache is full.
#[allow(clippy::too_many_arguments)] // those of the C function, in its order
pub fn decode<T: Element, O: Output<T>, C: Stored<T>>(
    config: &Config,
    output: &mut DeviceSliceMut<'_, O>,
    q: DeviceSlice<'_, T>,
    k: DeviceSlice<'_, T>,
    v: DeviceSlice<'_, T>,
    kv_cache_k: &mut DeviceSliceMut<'_, C>,
    kv_cache_v: &mut DeviceSliceMut<'_, C>,
    workspace: &mut Workspace<'_>,
    stream: Stream,
) -> Result<(), GqaError> {
    config.check_output::<T, O>()?;
    config.check_cache::<T, C>()?;
    let c = config.to_c::<T>(workspace)?;
    let lens = [
        output.len(),
        q.len(),
        k.len(),
        v.len(),
        kv_cache_k.len(),
        kv_cache_v.len(),
    ];
    config.check_lens(lens)?;
    // SAFETY: the kernel reads and writes as many elements as the configuration says, which is what
    // the views have; that they stay what they are was promised when they were made.
    GqaError::check(unsafe {
        ffi::gqa_attention_decode(
            output.as_mut_ptr().cast(),
            q.as_ptr().cast(),
            k.as_ptr().cast(),
            v.as_ptr().cast(),
            kv_cache_k.as_mut_ptr().cast(),
            kv_cache_v.as_mut_ptr().cast(),
            &c,
            stream.as_raw(),
        )
    })
}

/// One decode step of sequences of different lengths, which stay on the device.
///
/// As [`decode`], but the tokens in each cache come from `cache_seqlens`, `[batch_size]`, and
/// `config.cache_len` is ignored. `overflow`, one element, receives 1 + the index of a sequence that
/// the new tokens do not fit into, and is left alone when all fit. That
/// sequence's output is NaN and its cache is untouched; the others are right.
///
/// # Errors
///
/// As [`decode`]; a length that does not fit is none.
#[allow(clippy::too_many_arguments)] // those of the C function, in its order
pub fn decode_ragged<T: Element, O: Output<T>, C: Stored<T>>(
    config: &Config,
    output: &mut DeviceSliceMut<'_, O>,
    q: DeviceSlice<'_, T>,
    k: DeviceSlice<'_, T>,
    v: DeviceSlice<'_, T>,
    kv_cache_k: &mut DeviceSliceMut<'_, C>,
    kv_cache_v: &mut DeviceSliceMut<'_, C>,
    cache_seqlens: DeviceSlice<'_, i32>,
    overflow: &mut DeviceSliceMut<'_, i32>,
    workspace: &mut Workspace<'_>,
    stream: Stream,
) -> Result<(), GqaError> {
    let config = Config {
        cache_len: 0,
        ..*config
    };
    config.check_output::<T, O>()?;
    config.check_cache::<T, C>()?;
    let c = config.to_c::<T>(workspace)?;
    let lens = [
        output.len(),
        q.len(),
        k.len(),
        v.len(),
        kv_cache_k.len(),
        kv_cache_v.len(),
    ];
    config.check_lens(lens)?;
    check_len(
        "cache_seqlens",
        cache_seqlens.len(),
        config.batch_size,
        "batch_size",
    )?;
    check_len("overflow", overflow.len(), 1, "for all sequences together")?;
    // SAFETY: as in `decode`.
    GqaError::check(unsafe {
        ffi::gqa_attention_decode_ragged(
            output.as_mut_ptr().cast(),
            q.as_ptr().cast(),
            k.as_ptr().cast(),
            v.as_ptr().cast(),
            kv_cache_k.as_mut_ptr().cast(),
            kv_cache_v.as_mut_ptr().cast(),
            cache_seqlens.as_ptr(),
            overflow.as_mut_ptr(),
            &c,
            stream.as_raw(),
        )
    })
}

/// Bytes of [`Workspace`] that either kind of step needs on the current device, whatever `cache_len`
/// is; may be 0.
///
/// # Errors
///
/// The configuration is not allowed or not supported, or there is no usable GPU.
pub fn workspace_size<T: Element>(config: &Config) -> Result<usize, GqaError> {
    let c = config.to_c::<T>(&mut Workspace::none())?;
    let mut bytes = 0;
    // SAFETY: both pointers are valid.
    GqaError::check(unsafe { ffi::gqa_workspace_size(&c, &mut bytes) })?;
    Ok(bytes)
}

/// Loads the kernels that either kind of step would launch on the current device, which the first
/// launch does otherwise; not allowed while a CUDA graph is captured.
///
/// # Errors
///
/// As [`workspace_size`]; [`GqaError::Launch`] where the driver refuses a kernel.
pub fn prepare<T: Element>(config: &Config) -> Result<(), GqaError> {
    let c = config.to_c::<T>(&mut Workspace::none())?;
    // SAFETY: the pointer is valid.
    GqaError::check(unsafe { ffi::gqa_prepare(&c) })
}
