"""Triton kernels of the scan; importing the modules with kernels requires Triton."""
