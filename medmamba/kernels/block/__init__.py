"""What surrounds the scan in a block, as kernels for NVIDIA GPUs."""
