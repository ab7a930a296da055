"""Half precision and int8 for ONNX files. The scan stays in float32: in half precision its recurrence drifts."""

import logging
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ..config import MedMambaConfig
from ..imaging.load import load_image
from ..imaging.preprocess import preprocess
from .check import ExportError


def store_half(proto: Any) -> None:
    """Stores the weights of convolutions and matrix products in float16.

    Each is cast back to float32, once, when the runtime loads the model.

    Raises:
        ExportError: a weight exceeds the range of float16.
    """
    import onnx
    from onnx import TensorProto, numpy_helper

    casts = []
    for tensor in proto.graph.initializer:
        values = numpy_helper.to_array(tensor)
        if not tensor.name.endswith(".weight") or values.ndim < 2:
            continue
        if np.abs(values).max() > np.finfo(np.float16).max:
            raise ExportError(f"{tensor.name} has values that half precision cannot hold; export fp32")
        name, half = tensor.name, tensor.name + ".half"
        tensor.CopyFrom(numpy_helper.from_array(values.astype(np.float16), half))
        casts.append(onnx.helper.make_node("Cast", [half], [name], to=TensorProto.FLOAT))
    nodes = [*casts, *proto.graph.node]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)


def quantise(proto: Any, config: MedMambaConfig, images: Sequence[Any]) -> Any:
    """Quantises convolutions and matrix products to 8 bits: activations calibrated on `images`, weights per channel."""
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter(images)

        def get_next(self) -> dict[str, np.ndarray] | None:
            for image in self.left:
                tensor = preprocess(load_image(image), config.preprocess, config.in_chans)
                return {"image": tensor.unsqueeze(0).numpy()}
            return None

    with tempfile.TemporaryDirectory() as folder, _without_warnings():
        target = Path(folder) / "int8.onnx"
        quantize_static(
            proto,
            target,
            Reader(),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["Conv", "MatMul", "Gemm"],
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
        return onnx.load(target)


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Silences logging: the quantiser recommends folding batch norms, which is already done."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
