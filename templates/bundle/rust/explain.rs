//! What would be launched, and what there is to launch. Needs no GPU.

use std::ffi::{CStr, CString};
use std::os::raw::c_char;

use crate::config::{to_int, Config};
use crate::device::Workspace;
use crate::element::Element;
use crate::error::GqaError;
use crate::ffi;

/// What would be launched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Launch {
    /// The kernel's name.
    pub kernel: &'static str,
    /// Blocks: KV heads times blocks per head, splits, sequences.
    pub grid: [u32; 3],
    /// Blocks of a cluster, along y.
    pub cluster: u32,
    /// Threads.
    pub block: u32,
    /// Bytes of shared memory of a block.
    pub shared_bytes: u32,
    /// Blocks that share a sequence.
    pub num_splits: i32,
    /// Tiles that a warp has under way at a time.
    pub num_stages: i32,
    /// Bytes of workspace that this launch uses.
    pub workspace_size: usize,
}

/// Says what would be launched for 16-byte aligned tensors, on a GPU that need not be there: `arch`
/// is a target that was exported, `"sm_90a"` for instance, and `num_sms` its multiprocessors.
/// `ragged` asks for [`decode_ragged`](crate::decode_ragged).
///
/// ```
/// use gqa_attention_decode::{explain, f16, Config};
///
/// let config = Config {
///     batch_size: 1,
///     cache_len: 1000,
///     num_q_heads: 32,
///     num_kv_heads: 8,
///     head_dim: 128,
///     scale: 1.0 / 128f32.sqrt(),
///     max_seq_len: 4096,
///     ..Config::default()
/// };
/// match explain::<f16>(&config, "sm_90a", 132, false) {
///     Ok(launch) => println!("{} in {:?} blocks", launch.kernel, launch.grid),
///     Err(error) => println!("{error}"), // this library was exported without it
/// }
/// ```
///
/// # Errors
///
/// The configuration is not allowed or not supported, or the target was not exported.
pub fn explain<T: Element>(
    config: &Config,
    arch: &str,
    num_sms: usize,
    ragged: bool,
) -> Result<Launch, GqaError> {
    let c = config.to_c::<T>(&mut Workspace::none())?;
    let num_sms = to_int("num_sms", num_sms)?;
    let arch = CString::new(arch).map_err(|_| {
        GqaError::InvalidValue(format!("arch: got {arch:?}; allowed: what was exported."))
    })?;
    let mut launch = ffi::gqa_launch::default();
    // SAFETY: the pointers are valid.
    GqaError::check(unsafe {
        ffi::gqa_explain(&c, arch.as_ptr(), num_sms, i32::from(ragged), &mut launch)
    })?;
    Ok(Launch {
        // SAFETY: a name in the library's table.
        kernel: unsafe { name(launch.kernel) },
        grid: launch.grid,
        cluster: launch.cluster,
        block: launch.block,
        shared_bytes: launch.shared_bytes,
        num_splits: launch.num_splits,
        num_stages: launch.num_stages,
        workspace_size: launch.workspace_size,
    })
}

/// The kernels that were exported.
///
/// ```
/// for name in gqa_attention_decode::kernel_names() {
///     assert!(name.starts_with("gqa_decode_"));
/// }
/// ```
pub fn kernel_names() -> impl ExactSizeIterator<Item = &'static str> {
    // SAFETY: C takes any index, and these have names.
    (0..unsafe { ffi::gqa_kernel_count() }).map(|i| unsafe { name(ffi::gqa_kernel_name(i)) })
}

/// The targets that they were compiled for.
///
/// ```
/// for name in gqa_attention_decode::arch_names() {
///     assert!(name.starts_with("sm_"));
/// }
/// ```
pub fn arch_names() -> impl Iterator<Item = &'static str> {
    // SAFETY: C takes any index; what is not null is a name.
    (0..).map_while(|i| unsafe {
        let text = ffi::gqa_arch_name(i);
        (!text.is_null()).then(|| name(text))
    })
}

/// A name.
///
/// # Safety
///
/// `text` points into the library's table, which stays as it is.
unsafe fn name(text: *const c_char) -> &'static str {
    // SAFETY: the caller's promise.
    let text = unsafe { CStr::from_ptr(text) };
    text.to_str().expect("names are ASCII")
}
