"""The detector: a MedMamba with a feature pyramid under torchvision's FCOS."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..dense import load_weights, names_of, starting_encoder
from ..model import MedMamba
from ..model.network import MedMambaNetwork
from ..pretrained.folder import FolderMixin
from ..utils.extras import require
from .config import DetectorConfig
from .predict import predict
from .result import Detection

SIDE = 512  # pixels; the default size of the network's input
_STRIDES = (4, 8, 16, 32)


class PyramidBackbone(nn.Module):
    """The stages of a MedMamba with a feature pyramid network (arXiv 1612.03144) on top.

    Input: (B, C, H, W). Output: maps of `out_channels` channels by name, the finest first, and one of twice the stride
    of the coarsest.
    """

    def __init__(self, config: DetectorConfig):
        from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool

        super().__init__()
        self.net: nn.Module = MedMambaNetwork(config.encoder.replace(num_classes=0, id2label={}, calibration={}))
        self.first, self.out_channels = config.first_stage, config.channels
        self.fpn = FeaturePyramidNetwork(list(config.encoder.dims[self.first :]), config.channels, LastLevelMaxPool())

    @property
    def strides(self) -> tuple[int, ...]:
        """Distance in pixels between neighbouring places of each map."""
        return (*_STRIDES[self.first :], 64)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        maps = self.net.forward_pyramid(x)[self.first :]  # type: ignore[operator]
        return self.fpn(OrderedDict((str(i), m) for i, m in enumerate(maps)))


def fcos(backbone: nn.Module, config: DetectorConfig) -> nn.Module:
    """Builds torchvision's FCOS for batches that come resized and normalised.

    Args:
        backbone: returns maps of `out_channels` channels by name; `strides` are those of the maps.
        config: classes, overlap and number of boxes.
    """
    from torchvision.models.detection import FCOS
    from torchvision.models.detection.anchor_utils import AnchorGenerator

    strides: tuple[int, ...] = backbone.strides  # type: ignore[assignment]
    net = FCOS(
        backbone,
        config.num_classes,
        anchor_generator=AnchorGenerator(tuple((stride,) for stride in strides), ((1.0,),) * len(strides)),
        score_thresh=0.01,  # the reported ones are chosen from these, see `predict`
        nms_thresh=config.overlap,
        detections_per_img=config.most,
    )
    net.transform = _AsGiven()
    return net


class MedMambaDetector(FolderMixin, nn.Module):
    """Detects objects: a MedMamba with a feature pyramid under FCOS (arXiv 1904.01355), torchvision's.

    FCOS has no anchor boxes to be chosen for a dataset: each place of the pyramid predicts the distances to the sides
    of the object it lies in.

    Input: (B, in_chans, H, W) float, normalised as `config.preprocess` says, H and W multiples of 32. Output in eval
    mode: for each image a dict of boxes (N, 4) as left, top, right, bottom in pixels of the input, scores (N,) and
    labels (N,) from 0; in train mode, with targets of the same form, a dict of losses.

    >>> model = MedMambaDetector.from_pretrained("runs/cells")
    >>> print(model.predict("smear.png").boxes)

    Raises:
        ImportError: torchvision is not installed; the message holds the command that installs it.
    """

    config_class = DetectorConfig

    def __init__(self, config: DetectorConfig):
        super().__init__()
        require("torchvision", "detection")
        self.config = config
        self.net = fcos(PyramidBackbone(config), config)

    @property
    def encoder(self) -> nn.Module:
        """The MedMamba network without a classifier."""
        return self.net.backbone.net  # type: ignore[union-attr, return-value]

    def forward(self, x: Tensor, targets: list[dict[str, Tensor]] | None = None) -> Any:
        return self.net(list(x), targets)

    def raw(self, x: Tensor) -> RawDetections:
        """Returns what the head says of every place of the pyramid, on the CPU, for images as in `forward`."""
        features = list(self.net.backbone(x).values())  # type: ignore[operator]
        images, _ = self.net.transform(list(x))  # type: ignore[operator]
        outputs = {name: value.float().cpu() for name, value in self.net.head(features).items()}  # type: ignore[operator]
        anchors = [places.cpu() for places in self.net.anchor_generator(images, features)]  # type: ignore[operator]
        return RawDetections(
            self.net, outputs, anchors, [f.shape[2] * f.shape[3] for f in features], images.image_sizes
        )

    def no_weight_decay(self) -> set[str]:
        """Returns the names of parameters to exclude from weight decay: the scan's A and D, biases and norms."""
        return {n for n, p in self.named_parameters() if p.ndim < 2 or n.endswith(("A_log", ".D", "dt_bias"))}

    def predict(
        self,
        image: Any,
        *,
        frame: int | None = None,
        window: tuple[float, float] | None = None,
        tile: int | None = None,
        overlap: float = 0.25,
        score: float | None = None,
    ) -> Detection:
        """Detects objects in one image; see `medmamba.detection.predict.predict`."""
        return predict(self, image, frame=frame, window=window, tile=tile, overlap=overlap, score=score)


@dataclass(frozen=True)
class RawDetections:
    """What the head of FCOS says of a batch: detections and losses of one forward pass.

    Both are computed on the CPU: torchvision asks for results on the way hundreds of times for a batch, and a GPU would
    have to finish all its work each time.
    """

    net: Any
    outputs: dict[str, Tensor]
    anchors: list[Tensor]
    counts: list[int]
    sizes: list[tuple[int, int]]

    def detections(self) -> list[dict[str, Tensor]]:
        """Returns what `MedMambaDetector.forward` returns in eval mode."""
        split = {name: list(value.split(self.counts, dim=1)) for name, value in self.outputs.items()}
        anchors = [list(places.split(self.counts)) for places in self.anchors]
        return self.net.postprocess_detections(split, anchors, self.sizes)

    def losses(self, targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Returns the losses for targets on the CPU, as in `MedMambaDetector.forward`."""
        return self.net.compute_loss(targets, self.outputs, self.anchors, self.counts)


def create_detector(
    variant: str = "nano",
    classes: int | Sequence[str] = ("object",),
    *,
    start: str | os.PathLike | MedMamba | None = None,
    channels: int = 96,
    small_objects: bool = False,
    in_chans: int | None = None,
    size: int | None = None,
) -> MedMambaDetector:
    """Builds a detector with a new pyramid and head, and an encoder that is new or pretrained.

    Args:
        variant: of the encoder, as in `create_model`: "nano", "tiny", ...; ignored with `start`.
        classes: names of what is detected, or their number.
        start: the pretrained MedMamba whose weights the encoder takes: a name, a folder or a model.
        channels: of pyramid and head.
        small_objects: begin the pyramid at stride 4 instead of 8, for objects of few pixels; about twice the work.
        in_chans: channels of the images; default: those of `start`, or 3.
        size: height and width of the network's input, a multiple of 32; 512 by default.

    Raises:
        ConfigError: an unknown variant, or options that do not fit.
        PretrainedError: `start` cannot be loaded.
        ImportError: torchvision is not installed.
    """
    encoder, source = starting_encoder(variant, start, in_chans, SIDE if size is None else size)
    model = MedMambaDetector(
        DetectorConfig(
            encoder=encoder,
            classes=names_of(classes),
            channels=channels,
            first_stage=0 if small_objects else 1,
            training={"base_model": str(start)} if isinstance(start, str) else {},
        )
    )
    if source:
        load_weights(model.encoder, source.state_dict())
    return model


class _AsGiven(nn.Module):
    """In the place of torchvision's transform, which resizes and normalises: batches come prepared here."""

    def forward(self, images: list[Tensor], targets: Any = None) -> tuple[Any, Any]:
        from torchvision.models.detection.image_list import ImageList

        return ImageList(torch.stack(images), [(x.shape[1], x.shape[2]) for x in images]), targets

    def postprocess(self, result: Any, image_shapes: Any, original_image_sizes: Any) -> Any:
        """Returns the detections as they are."""
        return result
