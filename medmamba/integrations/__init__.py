"""Integrations: timm, and checkpoints of the published code.

Names are imported on first use, because `import medmamba` runs this module and must not import PyTorch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .timm import register
    from .timm_model import TimmMedMamba
    from .upstream import ConversionError, load_upstream

_HOME = {  # public name -> the module that defines it
    "ConversionError": "upstream",
    "TimmMedMamba": "timm_model",
    "load_upstream": "upstream",
    "register": "timm",
}

__all__ = ["ConversionError", "TimmMedMamba", "load_upstream", "register"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
