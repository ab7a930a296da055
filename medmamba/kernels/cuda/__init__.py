"""CUDA sources and their compiler."""
