"""Compiled kernels: on disk, compiled several at a time, exported to C and Rust."""
