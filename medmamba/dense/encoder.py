"""Encoders made from classifiers."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor, nn

from ..config import ConfigError, MedMambaConfig, variant_config
from ..model import MedMamba
from ..utils.weights import adapt_input


def starting_encoder(
    variant: str, start: str | os.PathLike | MedMamba | None, in_chans: int | None, side: int
) -> tuple[MedMambaConfig, MedMamba | None]:
    """Returns the configuration of an encoder, and the model whose weights it takes.

    Args:
        variant: as in `create_model`; ignored with `start`.
        start: a pretrained MedMamba: a name, a folder or a model.
        in_chans: channels of the images; default: those of `start`, or 3.
        side: height and width of the input, in pixels.

    Raises:
        ConfigError: an unknown variant, or a side that is no multiple of 32.
        PretrainedError: `start` cannot be loaded.
    """
    source = start if isinstance(start, MedMamba) or start is None else MedMamba.from_pretrained(start)
    base = source.config if source else variant_config(variant)
    if side % 32 or side < 32:
        raise ConfigError(f"size must be a multiple of 32, got {side}")
    return encoder_config(base, in_chans or base.in_chans, side), source


def names_of(classes: int | Sequence[str]) -> tuple[str, ...]:
    """Returns names of classes, made up where only their number is given."""
    return tuple(f"class_{i + 1}" for i in range(classes)) if isinstance(classes, int) else tuple(classes)


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
