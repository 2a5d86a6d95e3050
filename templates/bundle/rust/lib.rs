//! Grouped-query attention for decode: one step of a transformer in one CUDA kernel launch. Appends
//! the new token's K and V to the cache, attends over everything cached, writes the output.
//!
//! Written by `gqa-cutlass export`; the kernels are part of the library. Building needs a C compiler
//! and neither CUDA nor a GPU: libcuda is opened by the first call that needs it. Without it, such
//! calls return [`GqaError::NoDriver`].
//!
//! Memory, streams and contexts come from whatever crate the program has for them; [`DeviceSlice`],
//! [`DeviceSliceMut`], [`Workspace`] and [`Stream`] are views of what it holds. What must be promised
//! of it is promised there, once, and the calls are safe.
//!
//! ```no_run
//! use gqa_attention_decode::{
//!     decode, f16, workspace_size, Config, DeviceSlice, DeviceSliceMut, GqaError, Stream, Workspace,
//! };
//!
//! # fn allocate_zeroed<T>(_elements: usize) -> *mut T { std::ptr::null_mut() }
//! # fn main() -> Result<(), GqaError> {
//! let mut config = Config {
//!     batch_size: 4,
//!     cache_len: 0,
//!     num_q_heads: 32,
//!     num_kv_heads: 8,
//!     head_dim: 128,
//!     scale: 1.0 / 128f32.sqrt(),
//!     max_seq_len: 4096,
//!     ..Config::default()
//! };
//! let (query, token, cache) = (4 * 32 * 128, 4 * 8 * 128, 4 * 4096 * 8 * 128);
//! let workspace_bytes = workspace_size::<f16>(&config)?;
//!
//! // SAFETY: each is memory of its own, on the GPU, not freed before the work below has finished;
//! // the workspace was zeroed.
//! let (mut output, q, k, v, mut kv_cache_k, mut kv_cache_v, mut workspace) = unsafe {
//!     (
//!         DeviceSliceMut::<f16>::from_raw_parts(allocate_zeroed(query), query),
//!         DeviceSlice::<f16>::from_raw_parts(allocate_zeroed(query), query),
//!         DeviceSlice::<f16>::from_raw_parts(allocate_zeroed(token), token),
//!         DeviceSlice::<f16>::from_raw_parts(allocate_zeroed(token), token),
//!         DeviceSliceMut::<f16>::from_raw_parts(allocate_zeroed(cache), cache),
//!         DeviceSliceMut::<f16>::from_raw_parts(allocate_zeroed(cache), cache),
//!         Workspace::new(DeviceSliceMut::from_raw_parts(
//!             allocate_zeroed(workspace_bytes),
//!             workspace_bytes,
//!         )),
//!     )
//! };
//! while config.cache_len < config.max_seq_len {
//!     // ... write q, k and v ...
//!     decode(
//!         &config,
//!         &mut output,
//!         q,
//!         k,
//!         v,
//!         &mut kv_cache_k,
//!         &mut kv_cache_v,
//!         &mut workspace,
//!         Stream::DEFAULT,
//!     )?;
//!     config.cache_len += 1;
//! }
//! # Ok(())
//! # }
//! ```

#![deny(missing_docs, unsafe_op_in_unsafe_fn)]
#![warn(clippy::all)]

mod config;
mod decode;
mod device;
mod element;
mod error;
mod explain;
pub mod ffi;
mod layout;
mod log;
mod stored;
mod tokens;
mod turning;
mod types;

pub use config::Config;
pub use decode::{decode, decode_ragged, prepare, workspace_size};
pub use device::{DeviceSlice, DeviceSliceMut, Lse, Stream, Workspace, Written};
pub use element::{bf16, f16, f8e4m3, f8e5m2, Element, Output, Stored};
pub use error::GqaError;
pub use explain::{arch_names, explain, kernel_names, Launch};
pub use layout::{CacheStrides, RowStrides, Strides, TokenStrides};
pub use log::{set_log_callback, LogCallback};
pub use stored::{CacheType, Scale};
pub use turning::{Numbers, Rotary, Sinks};
