"""What generator, kernels and runtime must agree about, said once.

A leaf: imports neither torch nor the driver nor the rest of the generator. `gqa-cutlass generate`
emits C++ and C from it; ctypes structures are built from it.
"""
