"""Images with boxes, made in code: bright and dark squares on noise, as Pascal VOC."""

from pathlib import Path

import numpy as np
from PIL import Image


def squares(seed: int, size: int = 64) -> tuple[np.ndarray, list[tuple[str, tuple[int, int, int, int]]]]:
    """Returns an image (H, W, 3) uint8 and its objects: names and boxes."""
    rng = np.random.default_rng(seed)
    pixels = rng.normal(120, 10, (size, size, 3))
    objects = []
    for place in rng.permutation(4)[: rng.integers(1, 4)]:  # one in each quarter at most
        side = int(rng.integers(14, 24))
        left, top = (int(rng.integers(2, size // 2 - side)) + size // 2 * int(part) for part in divmod(place, 2))
        name = ("bright", "dark")[int(rng.integers(2))]
        pixels[top : top + side, left : left + side] += 100 if name == "bright" else -100
        objects.append((name, (left, top, left + side, top + side)))
    return pixels.clip(0, 255).astype(np.uint8), objects


def annotation(objects: list[tuple[str, tuple]]) -> str:
    """Returns a Pascal VOC annotation."""
    entries = "".join(
        f"<object><name>{name}</name><bndbox><xmin>{box[0]}</xmin><ymin>{box[1]}</ymin>"
        f"<xmax>{box[2]}</xmax><ymax>{box[3]}</ymax></bndbox></object>"
        for name, box in objects
    )
    return f"<annotation>{entries}</annotation>"


def write_voc(root: Path, train: int = 32, val: int = 8, test: int = 8) -> Path:
    """Writes a Pascal VOC folder."""
    for name in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (root / name).mkdir(parents=True, exist_ok=True)
    first = 0
    for split, count in (("train", train), ("val", val), ("test", test)):
        names = [f"s{number:03d}" for number in range(first, first + count)]
        for number, name in enumerate(names, first):
            pixels, objects = squares(number)
            Image.fromarray(pixels).save(root / "JPEGImages" / f"{name}.jpg", quality=95)
            (root / "Annotations" / f"{name}.xml").write_text(annotation(objects))
        (root / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(names) + "\n")
        first += count
    return root
