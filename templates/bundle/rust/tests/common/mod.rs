//! What the tests and the example share: a GPU's memory, made-up tensors, attention on the CPU.

#![allow(dead_code)] // each of them needs a part of it
#![deny(unsafe_op_in_unsafe_fn)]

pub mod gpu;
pub mod kernels;
pub mod step;
