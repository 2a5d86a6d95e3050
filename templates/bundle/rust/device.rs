//! Views of device memory. They own nothing: memory comes from CUDA, by whatever crate.

use std::fmt;
use std::marker::PhantomData;
use std::ops::Range;

use crate::error::GqaError;
use crate::ffi;

/// Device memory that is read: `&[T]` on the GPU.
///
/// Of a tensor with [`Strides`](crate::Strides), what is promised below is promised of its elements:
/// what lies between them may be another view's.
pub struct DeviceSlice<'a, T> {
    ptr: *const T,
    len: usize,
    memory: PhantomData<&'a [T]>,
}

/// Device memory that is written: `&mut [T]` on the GPU.
///
/// Of a tensor with [`Strides`](crate::Strides), what is promised below is promised of its elements:
/// what lies between them may be another view's.
pub struct DeviceSliceMut<'a, T> {
    ptr: *mut T,
    len: usize,
    memory: PhantomData<&'a mut [T]>,
}

impl<'a, T> DeviceSlice<'a, T> {
    /// A view of `len` elements at a device pointer.
    ///
    /// A null or misaligned pointer is no undefined behaviour: calls report it.
    ///
    /// # Safety
    ///
    /// Launches outlive the call that made them, and `'a` with it. From the first call that gets the
    /// view until the work that those calls launched has finished:
    ///
    /// - the `len` elements at `ptr` are allocated and readable by the GPU (device, managed or mapped
    ///   memory), and hold values;
    /// - the context that they belong to is current in those calls;
    /// - nothing writes them but work that is ordered before or after that work: on the same stream,
    ///   or by events.
    pub unsafe fn from_raw_parts(ptr: *const T, len: usize) -> Self {
        DeviceSlice {
            ptr,
            len,
            memory: PhantomData,
        }
    }

    /// The address on the device.
    pub fn as_ptr(&self) -> *const T {
        self.ptr
    }

    /// The number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is no element.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// A part of it, for a batch smaller than the buffer for instance.
    pub fn slice(&self, range: Range<usize>) -> Result<DeviceSlice<'a, T>, GqaError> {
        check_range(&range, self.len)?;
        let ptr = self.ptr.wrapping_add(range.start);
        Ok(DeviceSlice {
            ptr,
            len: range.len(),
            memory: PhantomData,
        })
    }
}

impl<'a, T> DeviceSliceMut<'a, T> {
    /// A view of `len` elements at a device pointer.
    ///
    /// A null or misaligned pointer is no undefined behaviour: calls report it.
    ///
    /// # Safety
    ///
    /// Launches outlive the call that made them, and `'a` with it. From the first call that gets the
    /// view until the work that those calls launched has finished:
    ///
    /// - the `len` elements at `ptr` are allocated, and the GPU can read and write them (device,
    ///   managed or mapped memory);
    /// - the context that they belong to is current in those calls;
    /// - nothing else reads or writes them, through another view or otherwise, but work that is
    ///   ordered before or after that work: on the same stream, or by events.
    pub unsafe fn from_raw_parts(ptr: *mut T, len: usize) -> Self {
        DeviceSliceMut {
            ptr,
            len,
            memory: PhantomData,
        }
    }

    /// The address on the device.
    pub fn as_mut_ptr(&mut self) -> *mut T {
        self.ptr
    }

    /// The number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is no element.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The same memory, to be read.
    pub fn as_slice(&self) -> DeviceSlice<'_, T> {
        DeviceSlice {
            ptr: self.ptr,
            len: self.len,
            memory: PhantomData,
        }
    }

    /// A part of it, for a batch smaller than the cache for instance.
    pub fn slice_mut(&mut self, range: Range<usize>) -> Result<DeviceSliceMut<'_, T>, GqaError> {
        check_range(&range, self.len)?;
        let ptr = self.ptr.wrapping_add(range.start);
        Ok(DeviceSliceMut {
            ptr,
            len: range.len(),
            memory: PhantomData,
        })
    }
}

fn check_range(range: &Range<usize>, len: usize) -> Result<(), GqaError> {
    if range.start <= range.end && range.end <= len {
        return Ok(());
    }
    let message = format!("slice: got {range:?}; allowed: within 0..{len}.");
    Err(GqaError::InvalidValue(message))
}

impl<T> Clone for DeviceSlice<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for DeviceSlice<'_, T> {}

impl<T> PartialEq for DeviceSlice<'_, T> {
    /// Whether both are views of the same memory.
    fn eq(&self, other: &Self) -> bool {
        (self.ptr, self.len) == (other.ptr, other.len)
    }
}

impl<T> fmt::Debug for DeviceSlice<'_, T> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "DeviceSlice({:p}, {})", self.ptr, self.len)
    }
}

impl<T> fmt::Debug for DeviceSliceMut<'_, T> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "DeviceSliceMut({:p}, {})", self.ptr, self.len)
    }
}

// SAFETY: device pointers mean the same to every thread, and the views are used as `&[T]` and
// `&mut [T]` are.
unsafe impl<T: Sync> Send for DeviceSlice<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Sync> Sync for DeviceSlice<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send> Send for DeviceSliceMut<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Sync> Sync for DeviceSliceMut<'_, T> {}

/// Device memory in which the blocks of a launch meet. [`workspace_size`](crate::workspace_size)
/// says how much is needed; one workspace serves every configuration that it is large enough for.
#[derive(Debug)]
pub struct Workspace<'a>(DeviceSliceMut<'a, u8>);

impl<'a> Workspace<'a> {
    /// A workspace in this memory, which is aligned to 16 bytes, as what CUDA allocates is.
    ///
    /// # Safety
    ///
    /// Every byte was zero when the memory first became a workspace, and nothing but this library
    /// has written it since. Launches with it are ordered, one after the other: those that may run
    /// at the same time, on different streams, have workspaces of their own.
    pub unsafe fn new(memory: DeviceSliceMut<'a, u8>) -> Self {
        Workspace(memory)
    }

    /// None, for configurations that need none.
    pub fn none() -> Workspace<'static> {
        Workspace(DeviceSliceMut {
            ptr: std::ptr::null_mut(),
            len: 0,
            memory: PhantomData,
        })
    }

    pub(crate) fn parts(&mut self) -> (*mut u8, usize) {
        (self.0.ptr, self.0.len)
    }
}

/// What a [`Config`](crate::Config) names and steps write: a log-sum-exp, scales of tokens.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Written<'a> {
    ptr: *mut f32,
    len: usize,
    memory: PhantomData<&'a [f32]>,
}

/// Where the log-sum-exp of a step is written: `[batch_size, num_q_heads]`.
pub type Lse<'a> = Written<'a>;

impl<'a> Written<'a> {
    /// In this memory.
    ///
    /// # Safety
    ///
    /// This can be copied, and its copies name the same memory: launches that get one of them are
    /// ordered, one after the other, and so is what reads it, after those that it wants to see.
    pub unsafe fn new(memory: DeviceSliceMut<'a, f32>) -> Self {
        Written {
            ptr: memory.ptr,
            len: memory.len,
            memory: PhantomData,
        }
    }

    pub(crate) fn as_mut_ptr(&self) -> *mut f32 {
        self.ptr
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }
}

// SAFETY: as for slices; that copies are used one after the other was promised.
unsafe impl Send for Written<'_> {}
// SAFETY: as above.
unsafe impl Sync for Written<'_> {}

/// Where to launch.
#[derive(Clone, Copy, Debug)]
pub struct Stream(ffi::cudaStream_t);

impl Stream {
    /// The default stream.
    pub const DEFAULT: Stream = Stream(std::ptr::null_mut());

    /// A stream of any crate: its `cudaStream_t` or `CUstream`, cast.
    ///
    /// # Safety
    ///
    /// The stream exists, and its context is current, in every call that gets this value or a copy.
    pub const unsafe fn from_raw(stream: ffi::cudaStream_t) -> Stream {
        Stream(stream)
    }

    /// The handle.
    pub const fn as_raw(self) -> ffi::cudaStream_t {
        self.0
    }
}

impl Default for Stream {
    fn default() -> Stream {
        Stream::DEFAULT
    }
}

// SAFETY: every thread may launch on a stream.
unsafe impl Send for Stream {}
// SAFETY: as above.
unsafe impl Sync for Stream {}
