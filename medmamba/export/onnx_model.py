"""Export to a single ONNX file."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..config import MedMambaConfig
from ..inference.fitted import in_force
from ..kernels.backends import cpu
from ..utils.text import json_text
from .check import (
    TOLERANCE,
    ExportError,
    ExportReport,
    Run,
    check_accuracy,
    check_batches,
    compare,
    export_view,
    open_check_data,
    written_whole,
)
from .onnx_runtime import onnx_session, require

PRECISIONS = ("fp32", "fp16", "int8")


def to_onnx(
    model,
    path: str | os.PathLike[str],
    *,
    precision: str = "fp32",
    images: Sequence[Any] = (),
    check_data: str | os.PathLike[str] | None = None,
    check_limit: int | None = None,
    tolerance: float = TOLERANCE,
) -> ExportReport:
    """Writes an ONNX file that accepts any batch size and any image of at least 32x32 pixels.

    Input `image`: (B, in_chans, H, W) float32, normalised as described in the metadata. Output: `logits`
    (B, num_classes), or `features` if the model has no classifier. The metadata hold labels, preprocessing, calibration
    and version. Batch norms are folded. The scan is a function of standard operators, see `onnx_scan`; with the library
    of `scan_library`, ONNX Runtime runs it several times faster.

    The file is written only if its outputs in ONNX Runtime match PyTorch, with the library and without.

    Args:
        model: a `MedMamba` in any mode; it is not changed.
        path: of the file.
        precision: "fp32"; "fp16", weights stored in half precision and computed in float32, half the size; "int8",
            convolutions and matrix products quantised, a quarter of the size. The scan is always float32.
        images: inputs of `load_image` for the comparison; none: synthetic images. int8 is calibrated on them, so it
            needs a few dozen typical images, other than those of `check_data`.
        check_data: labelled images as in `open_dataset`, on which fp16 and int8 may lose at most half a percentage
            point of accuracy.
        check_limit: maximum number of these, evenly spaced.
        tolerance: of the comparison, for fp32.

    Raises:
        ImportError: onnx, onnxruntime or onnxscript is missing.
        ExportError: the export is not possible, or its outputs are wrong.
        ImageError: an image cannot be read.
        DatasetError: `check_data` cannot be used.
    """
    for package in ("onnx", "onnxscript", "onnxruntime"):
        require(package)
    import onnx

    from .onnx_graph import build

    if precision not in PRECISIONS:
        raise ExportError(f"unknown precision {precision!r}; choose one of: {', '.join(PRECISIONS)}")
    if precision != "fp32" and check_data is None:
        raise ExportError(f"{precision} changes the outputs: give check_data, labelled images that show by how much")
    if precision == "int8" and not images:
        raise ExportError("int8 takes the ranges of its numbers from images: give a few dozen as `images`")
    model = export_view(model)
    # Reduced precision is judged by its accuracy on the check data instead.
    tolerance = tolerance if precision == "fp32" else float("inf")
    data = open_check_data(check_data, model.config, check_limit) if check_data is not None else None
    batches = check_batches(model.config, images)
    proto = build(model)
    if precision == "fp16":
        from .onnx_precision import store_half

        store_half(proto)
    if precision == "int8":
        from .onnx_precision import quantise

        proto = quantise(proto, model.config, images)
    _describe(proto, in_force(model).config, precision)
    with written_whole(path) as temporary:
        onnx.save(proto, temporary)
        onnx.checker.check_model(os.fspath(temporary))
        difference = 0.0
        # The library last, if there is one: the accuracy is then measured with it, which is faster.
        for library in (False, True) if cpu.BACKEND.available() else (False,):
            run = _runner(temporary, library)
            difference = max(difference, compare(run, model, batches, tolerance))
        accuracy = check_accuracy(run, model, data, precision) if data is not None else (None, None)
        size = temporary.stat().st_size
    return ExportReport(
        path=Path(path),
        bytes=size,
        precision=precision,
        shapes=[tuple(batch.shape) for batch in batches],
        max_difference=difference,
        accuracy=accuracy[0],
        accuracy_pytorch=accuracy[1],
        images=len(data) if data is not None else 0,
    )


def _runner(path: Path, library: bool) -> Run:
    session = onnx_session(path, library=library)

    def run(images: np.ndarray) -> np.ndarray:
        return session.run(None, {"image": images})[0]

    return run


def _describe(proto: Any, config: MedMambaConfig, precision: str) -> None:
    """Writes all metadata needed to use the file on its own; values other than text are JSON."""
    from .._version import __version__

    full = config.to_dict()
    proto.doc_string = "MedMamba image classifier. For research; not a medical device."
    proto.producer_name, proto.producer_version = "medmamba", __version__
    del proto.metadata_props[:]
    for key, value in {
        "labels": config.labels,
        "task": config.task,
        "preprocess": full["preprocess"],
        "calibration": full["calibration"],
        "training": full["training"],
        "architecture": config.architecture,
        "precision": precision,
        "medmamba_version": __version__,
    }.items():
        entry = proto.metadata_props.add()
        entry.key, entry.value = key, value if isinstance(value, str) else json_text(value)
