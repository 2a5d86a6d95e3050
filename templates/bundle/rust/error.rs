//! What can go wrong.

use std::error::Error;
use std::ffi::CStr;
use std::fmt;

use crate::ffi;

/// Why nothing was launched. Each variant carries the library's message: what it was, what was
/// given, what is allowed, what to do.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum GqaError {
    /// A pointer that must not be null is.
    NullPointer(String),
    /// A size, an address or the scale is not allowed.
    InvalidValue(String),
    /// The new token does not fit into the cache.
    CacheOverflow(String),
    /// The library was exported without a kernel for the configuration.
    Unsupported(String),
    /// The workspace is missing, too small or misaligned.
    Workspace(String),
    /// No libcuda, too old a one, or no GPU.
    NoDriver(String),
    /// The GPU is too old, or none of those exported for.
    Device(String),
    /// The driver refused to load or to launch a kernel.
    Launch(String),
    /// The configuration asks for what is newer than the library.
    UnsupportedFeature(String),
    /// A status that this crate does not know.
    Unknown {
        /// What C returned.
        status: ffi::gqa_status,
        /// What it said.
        message: String,
    },
}

impl GqaError {
    /// What to make of the status that a function of [`ffi`] has just returned on this thread.
    pub fn check(status: ffi::gqa_status) -> Result<(), GqaError> {
        match status {
            ffi::GQA_SUCCESS => Ok(()),
            _ => Err(GqaError::new(status, last_error())),
        }
    }

    fn new(status: ffi::gqa_status, message: String) -> GqaError {
        match status {
            ffi::GQA_ERROR_NULL_POINTER => GqaError::NullPointer(message),
            ffi::GQA_ERROR_INVALID_VALUE => GqaError::InvalidValue(message),
            ffi::GQA_ERROR_CACHE_OVERFLOW => GqaError::CacheOverflow(message),
            ffi::GQA_ERROR_UNSUPPORTED => GqaError::Unsupported(message),
            ffi::GQA_ERROR_WORKSPACE => GqaError::Workspace(message),
            ffi::GQA_ERROR_NO_DRIVER => GqaError::NoDriver(message),
            ffi::GQA_ERROR_DEVICE => GqaError::Device(message),
            ffi::GQA_ERROR_LAUNCH => GqaError::Launch(message),
            ffi::GQA_ERROR_UNSUPPORTED_FEATURE => GqaError::UnsupportedFeature(message),
            _ => GqaError::Unknown { status, message },
        }
    }

    /// The status that C has for it.
    pub fn status(&self) -> ffi::gqa_status {
        match self {
            GqaError::NullPointer(_) => ffi::GQA_ERROR_NULL_POINTER,
            GqaError::InvalidValue(_) => ffi::GQA_ERROR_INVALID_VALUE,
            GqaError::CacheOverflow(_) => ffi::GQA_ERROR_CACHE_OVERFLOW,
            GqaError::Unsupported(_) => ffi::GQA_ERROR_UNSUPPORTED,
            GqaError::Workspace(_) => ffi::GQA_ERROR_WORKSPACE,
            GqaError::NoDriver(_) => ffi::GQA_ERROR_NO_DRIVER,
            GqaError::Device(_) => ffi::GQA_ERROR_DEVICE,
            GqaError::Launch(_) => ffi::GQA_ERROR_LAUNCH,
            GqaError::UnsupportedFeature(_) => ffi::GQA_ERROR_UNSUPPORTED_FEATURE,
            GqaError::Unknown { status, .. } => *status,
        }
    }

    /// What it was, what was given, what is allowed, what to do.
    pub fn message(&self) -> &str {
        match self {
            GqaError::NullPointer(message)
            | GqaError::InvalidValue(message)
            | GqaError::CacheOverflow(message)
            | GqaError::Unsupported(message)
            | GqaError::Workspace(message)
            | GqaError::NoDriver(message)
            | GqaError::Device(message)
            | GqaError::Launch(message)
            | GqaError::UnsupportedFeature(message)
            | GqaError::Unknown { message, .. } => message,
        }
    }
}

impl fmt::Display for GqaError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.message())
    }
}

impl Error for GqaError {}

fn last_error() -> String {
    // SAFETY: C returns this thread's message, which ends with a zero and is copied before the next
    // call could change it.
    unsafe { CStr::from_ptr(ffi::gqa_last_error()) }
        .to_string_lossy()
        .into_owned()
}
