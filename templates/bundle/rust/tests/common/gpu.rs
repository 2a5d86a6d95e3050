//! Device memory, by way of libcuda opened at run time. A program that has a CUDA crate uses that.

use std::ffi::{c_void, CString};
use std::marker::PhantomData;
use std::mem::{size_of, size_of_val, transmute_copy};
use std::os::raw::{c_char, c_int, c_uint};
use std::ptr::null_mut;

use gqa_attention_decode::{DeviceSlice, DeviceSliceMut, Stream, Workspace};

type Address = u64;

extern "C" {
    fn dlopen(file: *const c_char, mode: c_int) -> *mut c_void;
    fn dlsym(library: *mut c_void, name: *const c_char) -> *mut c_void;
}

const RTLD_NOW: c_int = 2;

/// The first GPU, entered by this thread.
pub struct Gpu {
    allocate: unsafe extern "C" fn(*mut Address, usize) -> c_int,
    free: unsafe extern "C" fn(Address) -> c_int,
    to_device: unsafe extern "C" fn(Address, *const c_void, usize) -> c_int,
    to_host: unsafe extern "C" fn(*mut c_void, Address, usize) -> c_int,
    wait: unsafe extern "C" fn() -> c_int,
    create_stream: unsafe extern "C" fn(*mut *mut c_void, c_uint) -> c_int,
}

impl Gpu {
    /// Opens it, or says why there is none.
    pub fn open() -> Result<Gpu, String> {
        let name = CString::new("libcuda.so.1").unwrap();
        // SAFETY: functions have the types that cuda.h gives them, and get valid pointers.
        unsafe {
            let library = dlopen(name.as_ptr(), RTLD_NOW);
            if library.is_null() {
                return Err("libcuda.so.1 cannot be opened".to_string());
            }
            let init: unsafe extern "C" fn(c_uint) -> c_int = find(library, "cuInit")?;
            let device: unsafe extern "C" fn(*mut c_int, c_int) -> c_int =
                find(library, "cuDeviceGet")?;
            let retain: unsafe extern "C" fn(*mut *mut c_void, c_int) -> c_int =
                find(library, "cuDevicePrimaryCtxRetain")?;
            let enter: unsafe extern "C" fn(*mut c_void) -> c_int =
                find(library, "cuCtxSetCurrent")?;
            let (mut ordinal, mut context) = (0, null_mut());
            check("cuInit", init(0))?;
            check("cuDeviceGet", device(&mut ordinal, 0))?;
            check("cuDevicePrimaryCtxRetain", retain(&mut context, ordinal))?;
            check("cuCtxSetCurrent", enter(context))?;
            Ok(Gpu {
                allocate: find(library, "cuMemAlloc_v2")?,
                free: find(library, "cuMemFree_v2")?,
                to_device: find(library, "cuMemcpyHtoD_v2")?,
                to_host: find(library, "cuMemcpyDtoH_v2")?,
                wait: find(library, "cuCtxSynchronize")?,
                create_stream: find(library, "cuStreamCreate")?,
            })
        }
    }

    /// Memory on the GPU with this content.
    pub fn copy<T: Copy>(&self, content: &[T]) -> Buffer<'_, T> {
        let mut address = 0;
        let bytes = size_of_val(content);
        // SAFETY: the pointers are valid for their sizes.
        unsafe {
            check("cuMemAlloc", (self.allocate)(&mut address, bytes.max(1))).unwrap();
            if bytes > 0 {
                let status = (self.to_device)(address, content.as_ptr().cast(), bytes);
                check("cuMemcpyHtoD", status).unwrap();
            }
        }
        Buffer {
            gpu: self,
            address,
            len: content.len(),
            elements: PhantomData,
        }
    }

    /// Waits until all that was launched has finished.
    pub fn wait(&self) {
        // SAFETY: it takes nothing.
        check("cuCtxSynchronize", unsafe { (self.wait)() }).unwrap();
    }

    /// A stream, which stays for good.
    pub fn stream(&self) -> Stream {
        let mut stream = null_mut();
        // SAFETY: the pointer is valid; the stream is never destroyed.
        unsafe {
            check("cuStreamCreate", (self.create_stream)(&mut stream, 0)).unwrap();
            Stream::from_raw(stream.cast())
        }
    }
}

/// Finds a function.
///
/// # Safety
///
/// `F` is a pointer to a function of this name's type.
unsafe fn find<F: Copy>(library: *mut c_void, name: &str) -> Result<F, String> {
    assert_eq!(size_of::<F>(), size_of::<*mut c_void>());
    let symbol = CString::new(name).unwrap();
    // SAFETY: the library is open, and is never closed.
    let address = unsafe { dlsym(library, symbol.as_ptr()) };
    if address.is_null() {
        return Err(format!("libcuda.so.1 has no {name}"));
    }
    // SAFETY: the caller's promise.
    Ok(unsafe { transmute_copy(&address) })
}

fn check(doing: &str, status: c_int) -> Result<(), String> {
    match status {
        0 => Ok(()),
        _ => Err(format!("{doing}: CUDA error {status}")),
    }
}

/// Memory on the GPU.
pub struct Buffer<'gpu, T> {
    gpu: &'gpu Gpu,
    address: Address,
    len: usize,
    elements: PhantomData<T>,
}

impl<T: Copy> Buffer<'_, T> {
    /// Waits for the GPU, then copies from it.
    pub fn read(&self) -> Vec<T> {
        let mut content: Vec<T> = Vec::with_capacity(self.len);
        self.gpu.wait();
        // SAFETY: there is room for `len` elements, and all are written.
        unsafe {
            let to = content.as_mut_ptr().cast();
            let bytes = self.len * size_of::<T>();
            check("cuMemcpyDtoH", (self.gpu.to_host)(to, self.address, bytes)).unwrap();
            content.set_len(self.len);
        }
        content
    }

    /// To be read.
    pub fn view(&self) -> DeviceSlice<'_, T> {
        // SAFETY: the buffer is allocated, filled, and freed only after the GPU was waited for; all
        // work is on one stream.
        unsafe { DeviceSlice::from_raw_parts(self.address as *const T, self.len) }
    }

    /// To be written.
    pub fn view_mut(&mut self) -> DeviceSliceMut<'_, T> {
        // SAFETY: as in `view`, and this is the only view.
        unsafe { DeviceSliceMut::from_raw_parts(self.address as *mut T, self.len) }
    }
}

impl Buffer<'_, u8> {
    /// As a workspace.
    ///
    /// # Safety
    ///
    /// As [`Workspace::new`].
    pub unsafe fn workspace(&mut self) -> Workspace<'_> {
        // SAFETY: the caller's promise.
        unsafe { Workspace::new(self.view_mut()) }
    }
}

impl<T> Drop for Buffer<'_, T> {
    fn drop(&mut self) {
        // SAFETY: nothing uses the memory once the GPU was waited for.
        unsafe {
            (self.gpu.wait)();
            (self.gpu.free)(self.address);
        }
    }
}
