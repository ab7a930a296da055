"""Scan backends, one module each, loaded by name through `kernels.dispatch`; `base.py` is their protocol."""

from .base import Backend

__all__ = ["Backend"]
