"""python -m hub.pretrain_pool: the images that a general backbone learns from, in one file.

    python -m hub.pretrain_pool --data DATA --out pool.npz

Only training images are taken, and none that looks like an image of any validation or test set: each is compared with
all of them, across data sets, as a thumbnail. What is left out is counted in the file and printed.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from medmamba import load_image

SIDE = 224  # pixels of the stored squares
THUMBNAIL = 32
SAME = 0.985  # correlation of two thumbnails from which on they count as one picture
SUFFIXES = (".webp", ".jpg", ".jpeg", ".png")
FOLDERS = {"bloodmnist": True, "pneumoniamnist": True, "breastmnist": True, "pad_ufes_20": True, "dermamnist": False}
"""Data sets as SPLIT/CLASS/IMAGE; whether commercial use is allowed."""


@dataclass(frozen=True)
class Item:
    """One image: where it is, what it is called, whether it is a training image (or must be kept away from), and
    whether its licence allows commercial use."""

    path: Path
    label: str | None
    learn: bool
    free: bool = True


def items(data: Path) -> Iterator[Item]:
    """All images in DATA, of all splits."""
    for name, free in FOLDERS.items():
        for path in _images(data / name):
            split, label = path.relative_to(data / name).parts[:2]
            yield Item(path, f"{name}: {label}", split == "train", free)
    with open(data / "cpn_xray" / "index.csv", newline="", encoding="utf-8") as stream:
        for row in csv.DictReader(stream):
            path = data / "cpn_xray" / row["path"]
            if "pneumoniamnist" not in row["path"]:  # those are read above, with the split of that set
                yield Item(path, f"cpn_xray: {row['label']}", row["split"] == "train")
    for path in _images(data / "kvasir_seg"):
        if "images" in path.parts:
            yield Item(path, None, path.relative_to(data / "kvasir_seg").parts[0] == "train", free=False)
    training = set((data / "bccd" / "ImageSets" / "Main" / "train.txt").read_text(encoding="utf-8").split())
    for path in _images(data / "bccd"):
        yield Item(path, None, path.stem in training)
    for name in ("cpn_xray_external", "busi_masks"):
        for path in _images(data / name):
            if "masks" not in path.parts:
                yield Item(path, None, False)


def thumbnail(image: Image.Image) -> NDArray[np.float32]:
    """Grey values at 32 by 32 pixels with mean 0 and length 1, so that a product of two is their correlation."""
    grey = image.convert("L").resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
    values = np.asarray(grey, np.float32).ravel()
    values -= values.mean()
    return values / max(float(np.linalg.norm(values)), 1e-6)


def read(path: Path) -> tuple[bytes, NDArray[np.float32]]:
    """An image as a WebP square of 224 pixels, and its thumbnail."""
    image = load_image(path).to_pil().convert("RGB")
    stream = io.BytesIO()
    image.resize((SIDE, SIDE), Image.Resampling.BICUBIC, reducing_gap=3).save(stream, "WEBP", quality=82, method=2)
    return stream.getvalue(), thumbnail(image)


def build(data: Path, out: Path, threads: int = 2) -> dict[str, int]:
    """Writes the pool and returns how many images of each source it holds, and how many were too much like others.

    The file holds `data` (uint8, all images one after the other), `ends` (int64, where each ends), `labels` (int32, -1:
    none), `free` (bool: commercial use is allowed) and `meta` (JSON: classes, counts).
    """
    every = sorted(items(data), key=lambda item: str(item.path))
    with ThreadPoolExecutor(threads) as pool:
        decoded = list(pool.map(lambda item: read(item.path), every))
    thumbnails = np.stack([found[1] for found in decoded])
    learn = np.array([item.learn for item in every])
    held_out = thumbnails[~learn]
    counts: Counter[str] = Counter()
    kept: list[int] = []
    for start in range(0, len(every), 1024):
        block = np.arange(start, min(start + 1024, len(every)))
        block = block[learn[block]]
        nearest = (thumbnails[block] @ held_out.T).max(1) if len(block) else np.empty(0)
        for index, likeness in zip(block, nearest, strict=True):
            source = every[index].path.relative_to(data).parts[0]
            if likeness >= SAME:
                counts[f"{source}: like a held-out image"] += 1
            else:
                counts[source] += 1
                kept.append(int(index))
    classes = sorted({label for index in kept if (label := every[index].label) is not None})
    numbers = {label: number for number, label in enumerate(classes)}
    images = [np.frombuffer(decoded[index][0], np.uint8) for index in kept]
    labels = [every[index].label for index in kept]
    meta = {"classes": classes, "counts": dict(counts), "same": SAME}
    np.savez(
        out,
        data=np.concatenate(images),
        ends=np.cumsum([len(image) for image in images], dtype=np.int64),
        labels=np.array([-1 if label is None else numbers[label] for label in labels], np.int32),
        free=np.array([every[index].free for index in kept]),
        meta=np.frombuffer(json.dumps(meta).encode(), np.uint8),
    )
    return dict(counts)


def load(
    path: Path, non_commercial: bool = False, threads: int = 16
) -> tuple[NDArray[np.uint8], NDArray[np.int32], dict]:
    """The images of a pool (n, 224, 224, 3), their labels (n,) and what is known of them.

    Args:
        non_commercial: with the images whose licence excludes commercial use.
    """
    with np.load(path, allow_pickle=False) as pool:
        data, ends, labels, free = pool["data"], pool["ends"], pool["labels"], pool["free"]
        meta = json.loads(pool["meta"].tobytes())
    starts = np.concatenate(([0], ends[:-1]))
    if not non_commercial:
        starts, ends, labels = starts[free], ends[free], labels[free]

    def decode(span: tuple[int, int]) -> NDArray[np.uint8]:
        with Image.open(io.BytesIO(data[span[0] : span[1]].tobytes())) as image:
            return np.asarray(image.convert("RGB"))

    with ThreadPoolExecutor(threads) as workers:
        images = np.stack(list(workers.map(decode, zip(starts.tolist(), ends.tolist(), strict=True))))
    return images, labels, meta


def _images(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES]


def main() -> None:
    parser = argparse.ArgumentParser(prog="hub.pretrain_pool", description="The images a general backbone learns from.")
    parser.add_argument("--data", type=Path, required=True, metavar="DATA")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.npz")
    args = parser.parse_args()
    for name, count in sorted(build(args.data, args.out).items()):
        print(f"{count:6d} {name}")
    print(f"{args.out}: {args.out.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
