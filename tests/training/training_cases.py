"""Small datasets and settings that train in a second."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

# Fast to train: no randomness in the network, no warm-up, a large step.
QUICK = dict(epochs=3, batch_size=8, size=32, lr=3e-3, warmup_epochs=0, ema=0.9)


COMMON = dict(device="cpu", progress=False, half=False)


def make_folder(root: Path, counts=(16, 6, 6), classes=3, poison: str | None = None) -> Path:
    """Makes noisy squares whose brightness is the class; `poison` is a split whose classes are rotated by one."""
    rng = np.random.default_rng(0)
    for split, count in zip(("train", "val", "test"), counts, strict=True):
        for label in range(classes):
            shown = (label + 1) % classes if split == poison else label
            folder = root / split / f"class_{shown}"
            folder.mkdir(parents=True, exist_ok=True)
            for i in range(count):
                pixels = rng.normal(60 + 70 * label, 30, (32, 32, 3)).clip(0, 255).astype("uint8")
                Image.fromarray(pixels).save(folder / f"{label}_{i}.png")
    return root


def scores(history: list[dict]) -> list[dict]:
    """Returns a history without its timings."""
    return [{k: v for k, v in row.items() if k not in ("seconds", "images_per_second")} for row in history]


def same_weights(a: Path, b: Path) -> bool:
    one, two = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


SCRIPT = """
import sys
from medmamba.training import train
data, out, options = sys.argv[1], sys.argv[2], eval(sys.argv[3])
train(data, out, "default", "test", **options)
"""
