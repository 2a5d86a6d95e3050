//! One line per launch.

use std::ffi::{c_void, CStr};
use std::os::raw::c_char;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::{Arc, Mutex, PoisonError};

use crate::ffi;

/// What receives the lines.
pub type LogCallback = Box<dyn Fn(&str) + Send + Sync>;

type SharedCallback = Arc<dyn Fn(&str) + Send + Sync>;

static CALLBACK: Mutex<Option<SharedCallback>> = Mutex::new(None);

/// Sets what receives one line per launch, `launch key=value key=value ...`; `None`, as at first,
/// for nothing. Launches log at what other libraries call the debug level.
///
/// The callback runs in the launching thread, after the launch; it may be called by several threads
/// at a time. It must not launch. Should it panic, the panic ends there and the launch stands.
///
/// ```
/// use gqa_attention_decode::set_log_callback;
///
/// set_log_callback(Some(Box::new(|line| eprintln!("{line}"))));
/// # set_log_callback(None);
/// ```
pub fn set_log_callback(callback: Option<LogCallback>) {
    let c: ffi::gqa_log_callback = match callback {
        Some(_) => Some(pass_on),
        None => None,
    };
    let mut current = CALLBACK.lock().unwrap_or_else(PoisonError::into_inner);
    let former = std::mem::replace(&mut *current, callback.map(Arc::from));
    // SAFETY: `pass_on` is there for good, and needs no data.
    unsafe { ffi::gqa_set_log_callback(c, std::ptr::null_mut()) };
    drop(current);
    drop(former); // whose destructor may come here again
}

/// Called by C: gives the line to the callback, which may have changed since.
unsafe extern "C" fn pass_on(line: *const c_char, _user: *mut c_void) {
    let callback = CALLBACK
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .clone();
    if let Some(callback) = callback {
        // SAFETY: C passes a string that ends with a zero and outlives the call.
        let line = unsafe { CStr::from_ptr(line) }.to_string_lossy();
        // No panic may unwind into C; dropping what it carries may panic too.
        let outcome = catch_unwind(AssertUnwindSafe(move || callback(&line)));
        std::mem::forget(outcome);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ffi::CString;
    use std::thread;

    fn log(line: &str) {
        let line = CString::new(line).expect("no zero inside");
        // SAFETY: the string is valid.
        unsafe { pass_on(line.as_ptr(), std::ptr::null_mut()) }
    }

    // One test, because there is one callback.
    #[test]
    fn lines_reach_the_callback_that_is_set() {
        let lines = Arc::new(Mutex::new(Vec::new()));
        let received = Arc::clone(&lines);
        log("before");
        set_log_callback(Some(Box::new(move |line| {
            received.lock().unwrap().push(line.to_string())
        })));
        log("first");
        thread::spawn(|| log("of another thread")).join().unwrap();
        assert_eq!(*lines.lock().unwrap(), ["first", "of another thread"]);
        set_log_callback(Some(Box::new(|line| panic!("on purpose: {line}"))));
        log("swallowed");
        set_log_callback(Some(Box::new(|_| set_log_callback(None))));
        log("by a callback that takes itself off");
        log("after");
        assert_eq!(lines.lock().unwrap().len(), 2);
        assert_eq!(Arc::strong_count(&lines), 1); // callbacks that were replaced are dropped
    }
}
