"""medmamba: MedMamba medical image classification, from an image to a class on any machine.

>>> from medmamba import MedMamba
>>> model = MedMamba.from_pretrained("medmamba/bloodmnist-nano")
>>> print(model.predict("cell.png"))
"""

import importlib

from .config import ConfigError, MedMambaConfig, PreprocessConfig
from .convert import ConversionError, load_upstream
from .images import ImageError, MedicalImage, load_image
from .kernels import BackendError, available_backends, selective_scan, selective_scan_2d
from .model import MedMamba, create_model
from .pretrained import PretrainedError, bundled_models
from .sources import DEFAULT_MODEL
from .timm_compat import hook as _hook_timm

__version__ = "0.1.0"

__all__ = [
    "DEFAULT_MODEL",
    "BackendError",
    "ConfigError",
    "ConversionError",
    "ImageError",
    "MedMamba",
    "MedMambaConfig",
    "MedicalImage",
    "PreprocessConfig",
    "PretrainedError",
    "available_backends",
    "bundled_models",
    "create_model",
    "load_image",
    "load_upstream",
    "selective_scan",
    "selective_scan_2d",
    "train",
]


# Parts that are imported when first used: `medmamba.export.to_onnx` needs no import of its own.
_SUBMODULES = ("calibrate", "data", "evaluate", "evaluation", "explain", "export", "plots", "predict", "training")


def __getattr__(name: str):
    if name == "train":  # imported when first used, with what it needs
        from .training import train

        return train
    if name in _SUBMODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module 'medmamba' has no attribute {name!r}")


_hook_timm()  # costs nothing without timm; with it, timm.create_model knows MedMamba, whichever is imported first
