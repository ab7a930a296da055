"""Selective scan operators, their backends, and kernels for the layers around the scan."""

from .dispatch import BackendError, available_backends, resolve_backend
from .ops import selective_scan, selective_scan_2d

__all__ = ["BackendError", "available_backends", "resolve_backend", "selective_scan", "selective_scan_2d"]
