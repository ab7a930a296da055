"""Verification of an exported file against PyTorch, before it is moved into place."""

import dataclasses
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config import MedMambaConfig
from ..data import ImageDataset, open_dataset
from ..evaluation import match_classes
from ..imaging.load import load_image
from ..imaging.preprocess import normalise, preprocess
from ..inference.fitted import carry_over
from ..inference.predict import predict_logits
from ..model import MedMamba
from ..utils.modes import frozen_view, unwrap

TOLERANCE = 1e-4
MAX_ACCURACY_LOSS = 0.5  # points

Run = Callable[[np.ndarray], np.ndarray]
"""Maps normalised images (B, in_chans, H, W) to outputs (B, num_classes), float32."""


class ExportError(RuntimeError):
    """The export is not possible or its outputs are wrong; no file was written."""


@dataclass(frozen=True)
class ExportReport:
    """What was written, and how it compares with PyTorch.

    Attributes:
        path, bytes: of the file.
        precision: "fp32", "fp16" or "int8".
        shapes: of the batches used for the comparison, (B, in_chans, H, W).
        max_difference: maximum absolute difference from PyTorch's outputs.
        accuracy: on the check data, in percent, or None.
        accuracy_pytorch: of the original model on the same images.
        images: number of check images.
    """

    path: Path
    bytes: int
    precision: str
    shapes: list[tuple[int, ...]]
    max_difference: float
    accuracy: float | None = None
    accuracy_pytorch: float | None = None
    images: int = 0

    def __str__(self) -> str:
        shapes = ", ".join("x".join(map(str, shape)) for shape in self.shapes)
        lines = [
            f"{self.path}: {self.bytes / 1e6:.1f} MB, {self.precision}",
            f"largest difference from PyTorch {self.max_difference:.1e}, on batches of {shapes}",
        ]
        if self.accuracy is not None:
            lines.append(
                f"accuracy {self.accuracy:.2f} %, PyTorch {self.accuracy_pytorch:.2f} %, on {self.images} images"
            )
        return "\n".join(lines)


def export_view(model: torch.nn.Module) -> MedMamba:
    """Returns a view of the model in eval mode, float32 and on the CPU; the model itself is not changed.

    Raises:
        ExportError: not a MedMamba, or its weights contain NaN or infinity.
    """
    inner = unwrap(model) if isinstance(model, torch.nn.Module) else model
    if not isinstance(inner, MedMamba):
        raise ExportError(f"only a MedMamba can be exported, got {type(inner).__name__}")
    for name, tensor in inner.state_dict().items():
        if not tensor.isfinite().all():
            raise ExportError(f"{name} contains NaN or infinity: the model is damaged or its training diverged")
    view = frozen_view(inner, torch.float32, torch.device("cpu"))
    carry_over(inner, view)  # its classifier has parameters of its own, and stays the one that the labels name
    return view


@contextmanager
def written_whole(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary path that is renamed to `path` when the block ends, and removed if it raises.

    Raises:
        ExportError: the folder does not exist, or `path` is a folder.
    """
    target = Path(path)
    if not target.parent.is_dir():
        raise ExportError(f"there is no folder {target.parent}; create it, or write elsewhere")
    if target.is_dir():
        raise ExportError(f"{target} is a folder; name a file in it")
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as folder:
        temporary = Path(folder) / target.name
        yield temporary
        os.replace(temporary, target)


def check_batches(config: MedMambaConfig, images: Sequence[Any] = ()) -> list[Tensor]:
    """Returns normalised batches of one to three images, at the model's input size and at other sizes and shapes.

    Args:
        config: of the model.
        images: inputs of `load_image`; none: synthetic images, the same every time.
    """
    height, width = config.preprocess.input_size
    sizes = [
        (1, height, width),
        (3, height, width),
        (2, max(height * 3 // 4, config.min_size) | 1, width + 5),
        (1, height + 32, max(width // 2, config.min_size)),
    ]
    loaded = [load_image(image) for image in images]
    generator = torch.Generator().manual_seed(0)
    batches = []
    for i, (count, *size) in enumerate(sizes):
        resized = dataclasses.replace(config.preprocess, input_size=(size[0], size[1]))
        if loaded:
            chosen = [loaded[(i + j) % len(loaded)] for j in range(count)]
            batches.append(torch.stack([preprocess(image, resized, config.in_chans) for image in chosen]))
        else:
            batches.append(normalise(_draw(count, config.in_chans, size[0], size[1], generator), resized))
    return batches


def _draw(count: int, channels: int, height: int, width: int, generator: torch.Generator) -> Tensor:
    """Returns smooth blobs with noise, (B, C, H, W) in [0, 1]; outputs vary more than for noise alone."""
    coarse = torch.rand(count, channels, 5, 5, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic", align_corners=False)
    return (smooth + 0.1 * torch.randn(smooth.shape, generator=generator)).clamp(0, 1)


def compare(run: Run, model: torch.nn.Module, batches: Sequence[Tensor], tolerance: float) -> float:
    """Returns the maximum absolute difference between the outputs of `run` and `model`.

    Raises:
        ExportError: it exceeds `tolerance` (times the largest output, if that is over 1), or is NaN.
    """
    worst = 0.0
    for batch in batches:
        expected = predict_logits(model, batch).numpy()
        found = run(batch.numpy())
        if found.shape != expected.shape:
            raise ExportError(f"{tuple(batch.shape)} images gave outputs of shape {found.shape}, not {expected.shape}")
        difference = float(np.abs(found - expected).max())
        if not difference <= tolerance * max(1.0, float(np.abs(expected).max())):
            raise ExportError(
                f"the exported model is wrong: its outputs for a batch of {tuple(batch.shape)} differ from PyTorch's "
                f"by {difference:.2e}, more than {tolerance:.0e}; nothing was written. Please report this"
            )
        worst = max(worst, difference)
    return worst


def open_check_data(path: str | os.PathLike[str], config: MedMambaConfig, limit: int | None = None) -> ImageDataset:
    """Opens labelled images, preprocessed for the model: the test split, or all images of a dataset without one.

    Args:
        path: as in `open_dataset`.
        config: of the model.
        limit: maximum number of images, evenly spaced.

    Raises:
        DatasetError: no such dataset, or the model lacks some of its classes.
        ExportError: the model is multilabel, or `limit` is below 1.
    """
    if config.task == "multilabel":
        raise ExportError("accuracy is defined for models with one class per image; this one is multilabel")
    if limit is not None and limit < 1:
        raise ExportError(f"the number of images to check must be at least 1, got {limit}")
    dataset = match_classes(open_dataset(path), config)
    if "test" in dataset.splits:
        dataset = dataset.split("test")
    count = len(dataset) if limit is None else min(limit, len(dataset))
    dataset = dataset.subset(np.linspace(0, len(dataset) - 1, count).round().astype(int))
    return dataset.with_transform(lambda image: preprocess(image, config.preprocess, config.in_chans))


def check_accuracy(
    run: Run, model: torch.nn.Module, data: ImageDataset, precision: str, batch_size: int = 8
) -> tuple[float, float]:
    """Returns the accuracies of `run` and of `model`, in percent.

    Raises:
        ExportError: `run` loses more than half a percentage point.
    """
    right = np.zeros(2)
    for start in range(0, len(data), batch_size):
        images, labels = zip(*(data[i] for i in range(start, min(start + batch_size, len(data)))), strict=True)
        batch, truth = torch.stack(images), torch.stack(labels).numpy()
        right += [
            (run(batch.numpy()).argmax(1) == truth).sum(),
            (predict_logits(model, batch).numpy().argmax(1) == truth).sum(),
        ]
    found, expected = 100 * right / len(data)
    if expected - found > MAX_ACCURACY_LOSS:
        raise ExportError(
            f"{precision} costs too much: accuracy falls from {expected:.2f} % to {found:.2f} % on {len(data)} images, "
            f"more than {MAX_ACCURACY_LOSS} points; nothing was written. Export fp32 or another precision"
        )
    return float(found), float(expected)
