"""Triton kernels of the scan."""
