"""Optional packages, and the extra that installs each."""

from __future__ import annotations

import importlib
from types import ModuleType

EXTRAS = {
    "accelerate": "train",
    "matplotlib": "train",
    "sklearn": "train",
    "weasyprint": "report",
    "jinja2": "report",
    "tensorboard": "train",
    "captum": "explain",
    "pydicom": "dicom",
    "onnx": "export",
    "onnxruntime": "export",
    "onnxscript": "export",
    "gradio": "demo",
    "pyarrow": "parquet",
    "datasets": "datasets",
    "ray": "ray",
    "litserve": "serve",
    "segmentation_models_pytorch": "segment",
    "scipy": "segment",
    "highdicom": "segment",
    "nibabel": "segment",
    "pycocotools": "segment",
    "pooch": "hub",
    "requests": "hub",
}
"""Top-level modules, and the extra of `medmamba` that installs them."""


def require(module: str, purpose: str, extra: str | None = None) -> ModuleType:
    """Returns an optional module.

    Args:
        module: its name for `import`.
        purpose: what needs it, such as "evaluation"; the first words of the message.
        extra: of `medmamba`; None: that of `EXTRAS`.

    Raises:
        ImportError: it is not installed; the message holds the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = (error.name or module).partition(".")[0]
        if missing != module.partition(".")[0] and missing not in EXTRAS:
            raise
        raise ImportError(missing_text(missing, purpose, extra), name=missing) from error


def missing_text(module: str, purpose: str, extra: str | None = None) -> str:
    """Returns the message for a missing package."""
    return f'{purpose} needs {module}: pip install "medmamba[{extra or EXTRAS[module]}]"'
