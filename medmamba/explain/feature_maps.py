"""Names of the feature maps that Grad-CAM can explain."""

from __future__ import annotations

from typing import cast

from torch import nn

from ..model import MedMamba, Stage
from ..utils import modes
from .subject import blocks


def layers(model: MedMamba) -> list[str]:
    """Returns the values of `layer` that `gradcam` accepts for this model, from input to output."""
    model = cast(MedMamba, modes.unwrap(model))
    names = []
    for i in range(1, len(model.stages) + 1):
        for j in range(1, len(blocks(model, i)) + 1):
            names += [f"stage{i}.block{j}.conv", f"stage{i}.block{j}.scan"]
        names += [f"stage{i}.conv", f"stage{i}.scan", f"stage{i}"]
    return names


def find_layer(model: MedMamba, name: str) -> nn.Module:
    """Returns the module whose output is the (B, C, H, W) feature map of that name.

    Raises:
        ValueError: no such layer.
    """
    if name not in layers(model):
        short = ", ".join(n for n in layers(model) if "block" not in n)
        raise ValueError(f"no layer {name!r}; choose from {short}, or a branch such as stage1.block1.scan")
    stage, *rest = name.split(".")
    number = int(stage.removeprefix("stage"))
    if not rest:
        return cast(Stage, model.stages[number - 1]).map
    block = blocks(model, number)[int(rest[0].removeprefix("block")) - 1 if len(rest) == 2 else -1]
    return block.conv if rest[-1] == "conv" else block.ssm_map
