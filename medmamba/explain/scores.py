"""Masks and boxes as one number each, so that `explain`, `compare` and `assess` take them as they take a class."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import MedMambaConfig
from ..imaging.image import Window
from ..imaging.load import ImageSource, MedicalImage
from ..imaging.preprocess import placement, preprocess
from ..inference.predict import read_image
from ..model.fused import FusedMedMamba
from ..utils import modes

SEGMENTER, DETECTOR = "medmamba-segmenter", "medmamba-detector"
SAME_BOX = 0.5  # intersection over union from which a box of the detector counts as the one that was asked for


class Score(nn.Module):
    """A model with a MedMamba encoder as a classifier of one class, whose logit is a score of a mask or a box.

    `explain`, `compare`, `assess` and `scan_field` take it in the place of a MedMamba.

    Input: (B, in_chans, H, W) as for the model. Output: (B, 1).

    Args:
        model: a `MedMambaSegmenter` or `MedMambaDetector`.
        label: name of what is explained.
    """

    unusual = None  # as of a MedMamba without out-of-distribution detection

    def __init__(self, model: Any, label: str):
        super().__init__()
        self.net = model
        # One label that holds or does not: its probability is the sigmoid of the score.
        self.config: MedMambaConfig = model.config.encoder.replace(
            num_classes=1, id2label={0: label}, task="multilabel", calibration={}, decisions={}
        )

    @property
    def encoder(self) -> Any:
        """The MedMamba network without a classifier."""
        return self.net.encoder

    @property
    def patch_embed(self) -> Any:
        """Of the encoder; its weights tell device and dtype."""
        return self.encoder.patch_embed

    @property
    def stages(self) -> Any:
        """Of the encoder."""
        return self.encoder.stages

    def forward_features(self, x: Tensor) -> Tensor:
        """Returns the last feature map of the encoder."""
        return self.encoder.forward_features(x)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Turns recomputation in the backward pass of the encoder on or off."""
        self.encoder.set_grad_checkpointing(enable)

    def set_scan_backend(self, name: str | None) -> None:
        """Selects the scan kernels of the encoder."""
        self.encoder.set_scan_backend(name)

    def set_encoder(self, encoder: nn.Module) -> None:
        """Puts another encoder under the same decoder or head."""
        holder = self.net.net.backbone if self.net.config.MODEL_TYPE == DETECTOR else self.net.net.encoder
        holder.net = encoder

    def with_random_weights(self) -> Score:
        """Returns the same score of a new model with random weights, drawn from PyTorch's generator."""
        net = type(self.net)(self.net.config).eval()
        if isinstance(self.encoder, FusedMedMamba):
            net = net.fuse()
        fresh = modes.frozen_view(self)
        fresh.net = net.to(self.patch_embed.proj.weight.device)
        return fresh


class MaskScore(Score):
    """The mean log-odds of a class over a region: of the pixel being of the class rather than not.

    Args:
        model: a `MedMambaSegmenter`.
        index: of the class.
        weights: (H, W) at the size of the network's input, the share of each pixel in the mean; they sum to 1.
    """

    weights: Tensor

    def __init__(self, model: Any, index: int, weights: Tensor):
        super().__init__(model, model.config.classes[index])
        self.index = index
        self.register_buffer("weights", weights.to(next(model.parameters()).device))

    def forward(self, x: Tensor) -> Tensor:
        logits = self.net(x)
        if self.net.config.exclusive:  # the first map is the background's
            place = self.index + 1
            others = torch.cat((logits[:, :place], logits[:, place + 1 :]), 1)
            odds = logits[:, place] - others.logsumexp(1)
        else:
            odds = logits[:, self.index]
        return (odds * self.weights).sum((1, 2))[:, None]


class BoxScore(Score):
    """The class logit at the place of the pyramid that predicts a box.

    Args:
        model: a `MedMambaDetector`.
        index: of the class.
        place: number of the place, over all maps of the pyramid.
    """

    def __init__(self, model: Any, index: int, place: int):
        super().__init__(model, model.config.classes[index])
        self.index, self.place = index, place

    def forward(self, x: Tensor) -> Tensor:
        return _head(self.net, x)["cls_logits"][:, self.place, self.index][:, None]


def mask_score(
    model: Any,
    image: ImageSource | MedicalImage,
    label: str | None = None,
    region: np.ndarray | None = None,
    *,
    frame: int | None = None,
    window: Window | None = None,
) -> MaskScore:
    """Returns the score of a mask: the mean log-odds of a class inside of it.

    >>> score = mask_score(model, "skin.png")
    >>> explain(score, "skin.png").save("why.png")

    Args:
        model: a `MedMambaSegmenter`, as it is; its weights are shared.
        image: as in `predict`.
        label: the class; None: that with the largest predicted area.
        region: (H, W) bool at the size of the image; None: what the model predicts as this class.
        frame, window: as in `load_image`.

    Raises:
        ValueError: another kind of model, an unknown class, a region of another size or without pixels, or nothing
            predicted.
        ImageError: the image cannot be read.
    """
    inner = _of_kind(model, SEGMENTER, "mask_score")
    picture = read_image(image, frame, window)
    classes = inner.config.classes
    if label is not None and label not in classes:
        raise ValueError(f"no class {label!r}; this model segments {', '.join(classes)}")
    if region is None:
        masks = inner.predict(picture).masks
        index = int(masks.sum((1, 2)).argmax()) if label is None else classes.index(label)
        region = masks[index]
        if not region.any():
            raise ValueError(
                f"the model finds no {label or ' or '.join(classes)} in {picture.source}; pass region= to explain the "
                "score of pixels of your choice"
            )
    else:
        if label is None and len(classes) > 1:
            raise ValueError(f"name the class that region= is explained for: {', '.join(classes)}")
        index = 0 if label is None else classes.index(label)
        region = np.asarray(region, dtype=bool)
        if region.shape != picture.size:
            raise ValueError(f"region is {region.shape}, and the image {picture.size}; give it at the image's size")
        if not region.any():
            raise ValueError("region has no pixel")
    inner_size, (left, right, top, bottom) = placement(picture.size, inner.config.preprocess)
    share = F.adaptive_avg_pool2d(torch.from_numpy(region.astype(np.float32))[None, None], inner_size)
    placed = F.pad(share, (left, right, top, bottom))[0, 0]
    return MaskScore(inner, index, placed / placed.sum())


def box_score(
    model: Any,
    image: ImageSource | MedicalImage,
    box: Any = 0,
    *,
    frame: int | None = None,
    window: Window | None = None,
) -> BoxScore:
    """Returns the score of a box: the class logit at the place of the pyramid that predicts it.

    >>> found = model.predict("smear.png")
    >>> explain(box_score(model, "smear.png", found.boxes[0]), "smear.png").save("why.png")

    Args:
        model: a `MedMambaDetector`, as it is; its weights are shared.
        image: as in `predict`, as a whole (without tiles).
        box: one of the boxes that `predict` returned, or its number, 0 for the one with the highest score.
        frame, window: as in `load_image`.

    Raises:
        ValueError: another kind of model, no such box, or one that the detector does not predict in this image.
        ImageError: the image cannot be read.
    """
    inner = _of_kind(model, DETECTOR, "box_score")
    picture = read_image(image, frame, window)
    if isinstance(box, int):
        found = inner.predict(picture).boxes
        if not 0 <= box < len(found):
            raise ValueError(f"no box {box}: {len(found)} were reported in {picture.source}; a lower score= gives more")
        box = found[box]
    config = inner.config
    index = config.classes.index(box.label)
    view = modes.eval_view(inner)
    weight = view.encoder.patch_embed.proj.weight
    x = preprocess(picture, config.preprocess, config.in_chans, weight.device)[None].to(weight.dtype)
    with torch.inference_mode():
        boxes, scores = _predicted(view, x, index)
    wanted = _in_input(box.box, picture.size, config.preprocess).to(boxes.device)
    overlap = _overlap(boxes, wanted)
    place = int((overlap * scores).argmax())
    if overlap[place] < SAME_BOX:
        raise ValueError(
            f"the detector predicts no {box.label} at {tuple(round(v) for v in box.box)} of {picture.source}; give a "
            "box that predict() returned for this image without tiles"
        )
    return BoxScore(inner, index, place)


def encoder_only(model: nn.Module) -> nn.Module:
    """Returns a segmenter or a detector as a `Score`, for what asks of the encoder alone; other models as they are."""
    inner = modes.unwrap(model) if isinstance(model, nn.Module) else model
    if not isinstance(inner, Score) and _kind(inner) in (SEGMENTER, DETECTOR):
        return Score(inner, "encoder")
    return model


def _kind(model: Any) -> str:
    return getattr(getattr(model, "config", None), "MODEL_TYPE", "")


def _of_kind(model: Any, kind: str, function: str) -> Any:
    inner = modes.unwrap(model) if isinstance(model, nn.Module) else model
    if _kind(inner) != kind:
        name = {SEGMENTER: "a MedMambaSegmenter", DETECTOR: "a MedMambaDetector"}[kind]
        raise ValueError(f"{function} takes {name}, got {type(inner).__name__}")
    return inner


def _head(model: Any, x: Tensor) -> dict[str, Tensor]:
    """Returns what the head of the detector says of every place, such as cls_logits (B, N, K)."""
    return model.net.head(list(model.net.backbone(x).values()))


def _predicted(model: Any, x: Tensor, index: int) -> tuple[Tensor, Tensor]:
    """Returns boxes (N, 4) in pixels of the input and scores (N,) of one class, of every place."""
    from torchvision.models.detection.image_list import ImageList

    features = list(model.net.backbone(x).values())
    said = model.net.head(features)
    anchors = model.net.anchor_generator(ImageList(x, [(x.shape[2], x.shape[3])]), features)[0]
    scores = (said["cls_logits"][0, :, index].sigmoid() * said["bbox_ctrness"][0, :, 0].sigmoid()).sqrt()
    return model.net.box_coder.decode(said["bbox_regression"][0], anchors).float(), scores.float()


def _in_input(box: tuple[float, ...], size: tuple[int, int], config: Any) -> Tensor:
    inner, (left, _, top, _) = placement(size, config)
    scale = torch.tensor([inner[1] / size[1], inner[0] / size[0]] * 2)
    return torch.tensor(box) * scale + torch.tensor([left, top] * 2)


def _overlap(boxes: Tensor, box: Tensor) -> Tensor:
    """Returns the intersection over union of boxes (N, 4) with one."""
    from torchvision.ops import box_iou

    return box_iou(boxes, box[None])[:, 0]
