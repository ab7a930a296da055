"""Encoders made from classifiers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor, nn

from ..config import MedMambaConfig
from ..utils.weights import adapt_input


def encoder_config(base: MedMambaConfig, in_chans: int, side: int) -> MedMambaConfig:
    """Returns the configuration of an encoder made from a classifier, for inputs of side x side pixels."""
    config = base.replace(in_chans=in_chans, num_classes=0, id2label={}, calibration={}, training={}, task="multiclass")
    crop = "squash" if config.preprocess.crop_mode == "center" else config.preprocess.crop_mode
    return config.replace(preprocess=replace(config.preprocess, input_size=(side, side), crop_mode=crop))


def load_weights(net: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copies tensors of a MedMamba to one without a classifier, adapting the patch embedding to its channels.

    Raises:
        ValueError: tensors of another variant.
    """
    own = {name: tensor for name, tensor in tensors.items() if not name.startswith("head.")}
    patch = "patch_embed.proj.weight"
    here = {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}
    for name, shape in here.items():
        fits = name in own and (name == patch or tuple(own[name].shape) == shape)
        if not fits:
            found = tuple(own[name].shape) if name in own else "missing"
            raise ValueError(f"the weights are of another variant: {name} is {found}, expected {shape}")
    own[patch] = adapt_input(own[patch], here[patch][1])
    net.load_state_dict(own)
