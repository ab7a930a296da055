"""The network as an ONNX graph: the layers of `model/network.py`, in the same order and with the same weight names.

Written by hand instead of traced: the graph does not depend on the version of PyTorch, is built at once, and has fully
dynamic sizes. Every export is checked against the network.
"""

from typing import Any

import numpy as np
from torch import Tensor, nn

from ..model import SS2D, ConvBranch, MedMamba, PatchMerging, SSConvSSM
from .onnx_scan import DOMAIN, OPSET, Scan2D

IR_VERSION = 8  # of ONNX 1.13, where this set of operators first was


class Graph:
    """Collects nodes and weights; values are referred to by name."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.weights: dict[str, np.ndarray] = {}

    def weight(self, name: str, values: Tensor | np.ndarray | list[int]) -> str:
        array = values.detach().numpy() if isinstance(values, Tensor) else np.asarray(values)
        # ONNX requires int64 for shapes and axes.
        self.weights[name] = np.ascontiguousarray(array, dtype=np.float32 if array.dtype.kind == "f" else np.int64)
        return name

    def ints(self, *values: int) -> str:
        return self.weight("ints_" + "_".join(map(str, values)), list(values))

    def add(self, op: str, *inputs: str, outputs: int = 1, domain: str = "", **attributes: Any) -> Any:
        """Adds a node and returns the name of its output, or a tuple of names."""
        from onnx import helper

        names = [f"{op.lower()}_{len(self.nodes)}" + (f"_{i}" if outputs > 1 else "") for i in range(outputs)]
        self.nodes.append(helper.make_node(op, inputs, names, names[0], domain=domain, **attributes))
        return names[0] if outputs == 1 else tuple(names)

    def linear(self, name: str, x: str, weight: Tensor, bias: Tensor | None = None) -> str:
        y = self.add("MatMul", x, self.weight(f"{name}.weight", weight.detach().t()))
        return y if bias is None else self.add("Add", y, self.weight(f"{name}.bias", bias))

    def conv(self, name: str, x: str, conv: nn.Conv2d) -> str:
        """Adds a convolution, (B, C, H, W) to (B, C', H', W')."""
        assert conv.bias is not None and not isinstance(conv.padding, str)
        return self.add(
            *("Conv", x, self.weight(f"{name}.weight", conv.weight), self.weight(f"{name}.bias", conv.bias)),
            kernel_shape=conv.kernel_size,
            strides=conv.stride,
            pads=[*conv.padding, *conv.padding],
            group=conv.groups,
        )

    def norm(self, name: str, x: str, norm: nn.LayerNorm) -> str:
        weight, bias = self.weight(f"{name}.weight", norm.weight), self.weight(f"{name}.bias", norm.bias)
        return self.add("LayerNormalization", x, weight, bias, axis=-1, epsilon=norm.eps)

    def silu(self, x: str) -> str:
        return self.add("Mul", x, self.add("Sigmoid", x))

    def channels_first(self, x: str) -> str:
        return self.add("Transpose", x, perm=[0, 3, 1, 2])

    def channels_last(self, x: str) -> str:
        return self.add("Transpose", x, perm=[0, 2, 3, 1])


def build(model: MedMamba) -> Any:
    """Returns a ModelProto without metadata for a model in eval mode, float32 and on the CPU."""
    from onnx import TensorProto, helper, numpy_helper

    model = model.fuse()
    config = model.config
    g = Graph()
    x = g.channels_last(g.conv("patch_embed.proj", "image", model.patch_embed.proj))  # (B, H, W, C)
    x = g.norm("patch_embed.norm", x, model.patch_embed.norm)
    for i, stage in enumerate(model.stages):
        if i:
            x = _merge(g, f"downsamples.{i - 1}", x, model.downsamples[i - 1])  # type: ignore[arg-type]
        for j, block in enumerate(stage.blocks):  # type: ignore[arg-type]
            x = _block(g, f"stages.{i}.blocks.{j}", x, block)
    x = g.add("ReduceMean", x, g.ints(1, 2), keepdims=0)  # (B, C)
    output = "features"
    if isinstance(model.head, nn.Linear):
        output = "logits"
        x = g.linear("head", x, model.head.weight, model.head.bias)
    g.nodes[-1].output[0] = output

    width = config.num_classes or config.dims[-1]
    return helper.make_model(
        helper.make_graph(
            g.nodes,
            "medmamba",
            [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", config.in_chans, "height", "width"])],
            [helper.make_tensor_value_info(output, TensorProto.FLOAT, ["batch", width])],
            [numpy_helper.from_array(values, name) for name, values in g.weights.items()],
        ),
        functions=[Scan2D.to_function_proto()],
        opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)],
        ir_version=IR_VERSION,
    )


def _block(g: Graph, name: str, x: str, block: SSConvSSM) -> str:
    left, right = g.add("Split", x, outputs=2, axis=-1, num_outputs=2)  # (B, H, W, C/2) each
    left = _conv_branch(g, f"{name}.conv", left, block.conv)
    right = _ss2d(g, f"{name}.ssm", g.norm(f"{name}.norm", right, block.norm), block.ssm)
    # Channel shuffle with two groups: the halves alternate.
    pairs = [g.add("Unsqueeze", half, g.ints(-1)) for half in (left, right)]
    shuffled = g.add("Reshape", g.add("Concat", *pairs, axis=-1), g.ints(0, 0, 0, -1))
    return g.add("Add", x, shuffled)  # (B, H, W, C)


def _conv_branch(g: Graph, name: str, x: str, branch: ConvBranch) -> str:
    """Adds a convolution branch with folded batch norms, (B, H, W, C) to (B, H, W, C)."""
    affine, conv1, _, conv2, _, pointwise, _ = branch
    x = g.add("Mul", x, g.weight(f"{name}.scale", affine.scale.flatten()))  # type: ignore[operator, union-attr]
    x = g.channels_first(g.add("Add", x, g.weight(f"{name}.shift", affine.shift.flatten())))  # type: ignore[operator, union-attr]
    x = g.add("Relu", g.conv(f"{name}.conv1", x, conv1))  # type: ignore[arg-type]
    x = g.add("Relu", g.conv(f"{name}.conv2", x, conv2))  # type: ignore[arg-type]
    x = g.linear(f"{name}.conv3", g.channels_last(x), pointwise.weight, pointwise.bias)  # type: ignore[arg-type]
    return g.add("Relu", x)


def _ss2d(g: Graph, name: str, x: str, ssm: SS2D) -> str:
    """Adds the scan branch, (B, H, W, C) to (B, H, W, C)."""
    x, gate = g.add("Split", g.linear(f"{name}.in_proj", x, ssm.in_proj.weight), outputs=2, axis=-1, num_outputs=2)
    x = g.silu(g.channels_last(g.conv(f"{name}.conv", g.channels_first(x), ssm.conv)))
    proj = g.linear(f"{name}.x_proj", x, ssm.x_proj.flatten(0, 1))
    proj = g.add("Reshape", proj, g.ints(0, 0, 0, len(ssm.x_proj), -1))  # (B, H, W, K, R + 2N)
    parameters = {"dt_weight": ssm.dt_weight, "dt_bias": ssm.dt_bias, "A": -ssm.A_log.detach().exp(), "D": ssm.D}
    weights = [g.weight(f"{name}.{key}", value) for key, value in parameters.items()]
    y = g.norm(f"{name}.out_norm", g.add("Scan2D", x, proj, *weights, domain=DOMAIN), ssm.out_norm)
    return g.linear(f"{name}.out_proj", g.add("Mul", y, g.silu(gate)), ssm.out_proj.weight)


def _merge(g: Graph, name: str, x: str, merging: PatchMerging) -> str:
    """Adds a 2x2 merge, (B, H, W, C) to (B, H/2, W/2, 2C); an odd last row or column is dropped."""
    size = g.add("Shape", x, start=1, end=3)
    half = g.add("Div", size, g.ints(2))
    x = g.add("Slice", x, g.ints(0, 0), g.add("Mul", half, g.ints(2)), g.ints(1, 2))
    height, width = g.add("Split", half, outputs=2, axis=0, num_outputs=2)
    pixels = g.add("Concat", g.ints(0), height, g.ints(2), width, g.ints(2), g.ints(-1), axis=0)
    x = g.add("Transpose", g.add("Reshape", x, pixels), perm=[0, 1, 3, 4, 2, 5])  # (B, H/2, W/2, 2, 2, C)
    x = g.add("Reshape", x, g.ints(0, 0, 0, -1))  # (B, H/2, W/2, 4C): pixels (0,0), (1,0), (0,1), (1,1)
    return g.linear(f"{name}.reduction", g.norm(f"{name}.norm", x, merging.norm), merging.reduction.weight)
