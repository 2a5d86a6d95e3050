"""An interpreter of NVIDIA PTX in NumPy: each instruction runs for all threads of many warps."""
