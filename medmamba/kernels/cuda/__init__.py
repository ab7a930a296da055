"""CUDA sources of the kernels, their compilation and launch, and the capture of CUDA graphs."""
