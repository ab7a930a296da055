"""Runs exported models in ONNX Runtime."""

import os
from pathlib import Path
from typing import Any

from ..kernels.backends import cpu
from ..utils import extras


def scan_library() -> Path:
    """Returns the path of the library that speeds up exported models in ONNX Runtime on a CPU.

    It depends on neither Python nor PyTorch.

    >>> options = onnxruntime.SessionOptions()
    >>> options.register_custom_ops_library(str(scan_library()))

    Raises:
        OSError: there is none for this platform; exported models run without it, but slower.
    """
    cpu.load_library()
    return cpu.LIBRARIES / cpu.library_name()


def onnx_session(model: str | os.PathLike[str] | bytes, threads: int | None = None, library: bool | None = None) -> Any:
    """Returns an `onnxruntime.InferenceSession` on the CPU.

    Args:
        model: file written by `to_onnx`, or its bytes.
        threads: number of threads; None: one per core.
        library: whether to use the scan library; None: if there is one.

    Raises:
        ImportError: onnxruntime is not installed.
        OSError: `library=True`, and there is none for this platform.
    """
    onnxruntime = require("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only; the optimiser warns about what it removes
    if threads is not None:
        options.intra_op_num_threads = threads
    if library or (library is None and cpu.BACKEND.available()):
        options.register_custom_ops_library(str(scan_library()))
    source = model if isinstance(model, bytes) else os.fspath(model)
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def require(name: str) -> Any:
    """Imports a package of the extra `export`."""
    return extras.require(name, "exporting to ONNX", "export")
