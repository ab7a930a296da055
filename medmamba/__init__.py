"""MedMamba: medical image classification with selective state spaces.

>>> import medmamba
>>> model = medmamba.MedMamba.from_pretrained("medmamba/bloodmnist-nano")
>>> print(model.predict(medmamba.example_image()))  # or a file: model.predict("cell.png")

Names are imported on first use (PEP 562), so importing the package does not import PyTorch.
"""

import importlib
from typing import TYPE_CHECKING, Any

from . import _moved
from ._version import __version__
from .integrations import timm_hook

if TYPE_CHECKING:
    from .config import DEFAULT_MODEL, ConfigError, MedMambaConfig, PreprocessConfig
    from .detection import MedMambaDetector, create_detector
    from .imaging import ImageError, MedicalImage, example_image, load_image
    from .integrations.upstream import ConversionError, load_upstream
    from .kernels import BackendError, available_backends, selective_scan, selective_scan_2d
    from .model import MedMamba, create_model
    from .pretrained import PretrainedError, bundled_models
    from .segmentation import MedMambaSegmenter, create_segmenter
    from .training import train
    from .training.detection_run import train_detector
    from .training.segmentation_run import train_segmenter

_HOME = {  # public name -> the module that defines it
    "DEFAULT_MODEL": "config",
    "BackendError": "kernels",
    "ConfigError": "config",
    "ConversionError": "integrations.upstream",
    "ImageError": "imaging",
    "MedMamba": "model",
    "MedMambaConfig": "config",
    "MedMambaDetector": "detection",
    "MedMambaSegmenter": "segmentation",
    "MedicalImage": "imaging",
    "PreprocessConfig": "config",
    "PretrainedError": "pretrained",
    "available_backends": "kernels",
    "bundled_models": "pretrained",
    "create_model": "model",
    "create_detector": "detection",
    "create_segmenter": "segmentation",
    "example_image": "imaging",
    "load_image": "imaging",
    "load_upstream": "integrations.upstream",
    "selective_scan": "kernels",
    "selective_scan_2d": "kernels",
    "train": "training",
    "train_detector": "training.detection_run",
    "train_segmenter": "training.segmentation_run",
}
_PACKAGES = (
    *(
        "data",
        "decision",
        "evaluation",
        "explain",
        "export",
        "imaging",
        "inference",
        "kernels",
        "metrics",
        "model",
        "segmentation",
        "training",
    ),
)

__all__ = [
    "DEFAULT_MODEL",
    "BackendError",
    "ConfigError",
    "ConversionError",
    "ImageError",
    "MedMamba",
    "MedMambaConfig",
    "MedMambaDetector",
    "MedMambaSegmenter",
    "MedicalImage",
    "PreprocessConfig",
    "PretrainedError",
    "__version__",
    "available_backends",
    "bundled_models",
    "create_detector",
    "create_model",
    "create_segmenter",
    "example_image",
    "load_image",
    "load_upstream",
    "selective_scan",
    "selective_scan_2d",
    "train",
    "train_detector",
    "train_segmenter",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
        globals()[name] = value
        return value
    if name in _PACKAGES or name in _moved.MODULES:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module 'medmamba' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME, *_PACKAGES})


_moved.install()  # deprecated module names, for one release
timm_hook.install()  # registers MedMamba with timm once timm is imported, before or after this package
