"""Helpers of the tests of what users give as a dataset."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medmamba.data import (
    DatasetError,
    open_dataset,
)

NFC, NFD = "caf\u00e9", "cafe\u0301"


def save(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (6, 5), dtype=np.uint8)).save(path, format="PNG")
    return path


def tree(root: Path, *paths: str) -> Path:
    for seed, path in enumerate(paths):
        save(root / path, seed)
    return root


def said(dataset) -> str:
    return "\n".join(dataset.notes)


def refuses(message: str, path: Path, **options) -> str:
    with pytest.raises(DatasetError, match=message) as caught:
        open_dataset(path, **options)
    return str(caught.value)


def csv(root: Path, text: str | bytes, name: str = "labels.csv") -> Path:
    for i in range(4):
        save(root / f"{i}.png", i)
    save(root / "class" / "0.png")
    (root / name).write_bytes(text if isinstance(text, bytes) else text.encode("utf-8"))
    return root / name
