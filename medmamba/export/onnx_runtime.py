"""Exported models in ONNX Runtime."""

import os
from pathlib import Path
from typing import Any

from ..kernels.backends import cpu as native
from ..utils import extras


def scan_library() -> Path:
    """The library that speeds up exported models in ONNX Runtime on a CPU; it depends on neither Python nor PyTorch.

    >>> options = onnxruntime.SessionOptions()
    >>> options.register_custom_ops_library(str(scan_library()))

    Raises:
        OSError: there is none for this platform. Exported models run without it, slower.
    """
    native.load_library()
    return native.LIBRARIES / native.library_name()


def onnx_session(model: str | os.PathLike[str] | bytes, threads: int | None = None, library: bool | None = None) -> Any:
    """An `onnxruntime.InferenceSession` on the CPU.

    Args:
        model: file written by `to_onnx`, or its bytes.
        threads: None: one for each core.
        library: use the scan library; None: where there is one.

    Raises:
        ImportError: onnxruntime is not installed. OSError: `library=True` and there is none for this platform.
    """
    onnxruntime = require("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors; the optimiser warns of what it tidies up
    if threads is not None:
        options.intra_op_num_threads = threads
    if library or (library is None and native.BACKEND.available()):
        options.register_custom_ops_library(str(scan_library()))
    source = model if isinstance(model, bytes) else os.fspath(model)
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def require(name: str) -> Any:
    """Returns one of the packages of the extra `export`."""
    return extras.require(name, "exporting to ONNX", "export")
