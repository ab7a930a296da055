"""Peers of the detectors, in the same trainer: the same FCOS and feature pyramid over other encoders."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from medmamba.config import variant_config
from medmamba.detection.config import DetectorConfig
from medmamba.detection.model import MedMambaDetector, fcos
from medmamba.segmentation.encoder import require_smp
from medmamba.utils.extras import require

from .segment_peers import IMAGENET, LITE2, PEERS, load_lite2


class PeerBackbone(nn.Module):
    """The stages of strides 8, 16 and 32 of an encoder of smp under a feature pyramid, as in `PyramidBackbone`."""

    strides = (8, 16, 32, 64)

    def __init__(self, name: str, config: DetectorConfig):
        from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool

        super().__init__()
        encoder = {"resnet34": "resnet34", "efficientnet-lite2": LITE2}[name]
        self.net: nn.Module = require_smp().encoders.get_encoder(encoder, in_channels=config.in_chans, weights=None)
        self.out_channels = config.channels
        channels = list(self.net.out_channels)[-3:]  # type: ignore[arg-type]
        self.fpn = FeaturePyramidNetwork(channels, config.channels, LastLevelMaxPool())

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return self.fpn(OrderedDict((str(i), m) for i, m in enumerate(self.net(x)[-3:])))


@dataclass
class PeerConfig(DetectorConfig):
    """The configuration of a detector with another encoder; its MedMamba is not built."""

    MODEL_TYPE: ClassVar[str] = "peer-detector"

    peer: str = PEERS[0]


class PeerDetector(MedMambaDetector):
    """FCOS over an encoder of smp, under the interface of a `MedMambaDetector`."""

    config_class = PeerConfig
    config: PeerConfig

    def __init__(self, config: PeerConfig):
        nn.Module.__init__(self)
        require("torchvision", "detection")
        self.config = config
        self.net = fcos(PeerBackbone(config.peer, config), config)


def peer(name: str, classes: Sequence[str], size: int) -> PeerDetector:
    """Builds a peer: "resnet34" from scratch, or "efficientnet-lite2" with its ImageNet weights.

    Raises:
        ImportError: a package is not installed, as in `hub.segment_peers.peer`.
    """
    preprocess: dict[str, Any] = {"input_size": (size, size)}
    if name == "efficientnet-lite2":
        preprocess |= IMAGENET
    encoder = variant_config("nano", num_classes=0, preprocess=preprocess)
    model = PeerDetector(PeerConfig(encoder, classes=tuple(classes), peer=name))
    if name == "efficientnet-lite2":
        load_lite2(model.encoder)
    return model
