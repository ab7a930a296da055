"""Other pipelines from files to answers, as their documentation writes them, for `pipeline.py`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image

PEER_BATCH = 64  # two for each process are read ahead: of larger ones, a short run would consist


class Files(torch.utils.data.Dataset):
    """Files as PyTorch's and timm's documentation read them."""

    def __init__(self, paths: list[str], transform: Any, dicom: bool) -> None:
        self.paths, self.transform, self.dicom = paths, transform, dicom

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Any:
        if not self.dicom:
            with Image.open(self.paths[index]) as image:
                return self.transform(image.convert("RGB"))
        import pydicom
        from pydicom.pixels import apply_modality_lut, apply_voi_lut

        ds = pydicom.dcmread(self.paths[index])
        values = apply_voi_lut(apply_modality_lut(ds.pixel_array, ds), ds)
        low, high = values.min(), values.max()
        return self.transform(Image.fromarray(((values - low) / (high - low) * 255).astype(np.uint8)).convert("RGB"))


def data_loader(kind: str, model: Any, paths: list[str], workers: int, device: str) -> Iterator[Any]:
    """PyTorch's DataLoader and torchvision's transforms, before the same fused network."""
    from torchvision.transforms import v2

    config = model.config.preprocess
    transform = v2.Compose(
        [
            v2.PILToTensor(),
            v2.Resize(config.input_size, antialias=True),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(config.mean, config.std),
        ]
    )
    loader = torch.utils.data.DataLoader(
        Files(paths, transform, kind == "dicom"),
        batch_size=PEER_BATCH,
        num_workers=workers,
        pin_memory=device != "cpu",
        worker_init_fn=one_thread,
    )
    network = model.fuse()
    with torch.inference_mode():
        for images in loader:
            chances = network(images.to(device, non_blocking=True)).softmax(-1)
            yield from zip(*(part.tolist() for part in chances.topk(5)), strict=True)


class Paths(torch.utils.data.Dataset):
    """Names of files, as the pipeline of transformers reads them in its own processes."""

    def __init__(self, paths: list[str]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> str:
        return self.paths[index]


def one_thread(_worker: int) -> None:
    torch.set_num_threads(1)


def transformers_pipeline(kind: str, model: Any, paths: list[str], workers: int, device: str) -> Iterator[Any]:
    """The image-classification pipeline of transformers, around a ResNet-50 with random weights."""
    if kind == "dicom":
        raise ImportError("it reads no DICOM")
    from transformers import ConvNextImageProcessor, ResNetConfig, ResNetForImageClassification, pipeline

    size = {"shortest_edge": model.config.preprocess.input_size[0]}
    classify = pipeline(
        "image-classification",
        model=ResNetForImageClassification(ResNetConfig(num_labels=8)).eval(),
        image_processor=ConvNextImageProcessor(size=size, crop_pct=1.0),
        device=device,
    )
    yield from classify(Paths(paths), batch_size=PEER_BATCH, num_workers=workers)
