"""The CPU, where ptxsim interprets kernels."""
