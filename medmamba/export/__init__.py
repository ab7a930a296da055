"""Export to ONNX and torch.export, verified against PyTorch before the file is written.

>>> from medmamba import MedMamba
>>> from medmamba.export import onnx_session, to_onnx
>>> report = to_onnx(MedMamba.from_pretrained("medmamba/bloodmnist-nano"), "bloodmnist.onnx")
>>> session = onnx_session("bloodmnist.onnx")
"""

from .check import ExportError, ExportReport
from .onnx_model import to_onnx
from .onnx_runtime import onnx_session, scan_library
from .torch_program import load_torch_export, to_torch_export

__all__ = [
    "ExportError",
    "ExportReport",
    "load_torch_export",
    "onnx_session",
    "scan_library",
    "to_onnx",
    "to_torch_export",
]
