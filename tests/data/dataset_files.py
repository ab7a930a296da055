"""Makes small datasets for tests."""

from pathlib import Path

import numpy as np
from PIL import Image

from medmamba.data import Record
from medmamba.imaging.load import load_image


def picture(seed: int, size: tuple[int, int] = (12, 10), colour: bool = True) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*size, 3) if colour else size, dtype=np.uint8)


def save(path: Path, seed: int, colour: bool = True) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture(seed, colour=colour)).save(path)
    return path


def tree(root: Path, paths: list[str]) -> Path:
    for seed, path in enumerate(paths):
        save(root / path, seed)
    return root


class Memory:
    """Pixels from the record's label, for tests of what needs no files."""

    def read(self, record: Record):
        return load_image(np.full((4, 4), record.source, dtype=np.uint8))


def npz(
    path: Path, size: int = 28, k: int = 3, colour: bool = False, compressed: bool = True, **extra: np.ndarray
) -> Path:
    rng = np.random.default_rng(0)
    arrays: dict[str, np.ndarray] = {}
    for split, n in (("train", 6), ("val", 2), ("test", 3)):
        arrays[f"{split}_images"] = rng.integers(
            0, 256, (n, size, size, 3) if colour else (n, size, size), dtype=np.uint8
        )
        arrays[f"{split}_labels"] = (np.arange(n) % k).astype(np.uint8)[:, None]
    arrays.update(extra)
    (np.savez_compressed if compressed else np.savez)(path, **arrays)
    return path
