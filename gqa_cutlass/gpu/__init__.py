"""NVIDIA GPUs: loading and launching kernels, memory for launches, and torch's private ways."""
