"""python -m hub.pretrain_pool: the training images of a general backbone, in one file.

    python -m hub.pretrain_pool --data DATA --out pool.npz

Takes training images only, and leaves out those that look like a validation or test image of any dataset: each is
compared with all of them as a thumbnail. The images left out are counted in the file and in the output.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from medmamba import load_image
from medmamba.utils.text import json_text

SIDE = 224  # pixels of the stored squares
THUMBNAIL = 32
SAME = 0.985  # correlation from which two thumbnails count as near-duplicates
SUFFIXES = (".webp", ".jpg", ".jpeg", ".png")
FOLDERS = ("bloodmnist", "pneumoniamnist", "breastmnist", "pad_ufes_20", "dermamnist")  # as SPLIT/CLASS/IMAGE
HELD_OUT = ("cpn_xray_external", "busi_masks")  # no training images


@dataclass(frozen=True)
class Source:
    """A collection of images: its title, its licence, and whether that allows commercial use."""

    title: str
    licence: str
    free: bool = True


SOURCES = {
    "bloodmnist": Source(
        "PBC blood cells (BloodMNIST), Acevedo et al. 2020, doi:10.1016/j.dib.2020.105474", "CC BY 4.0"
    ),
    "pneumoniamnist": Source(
        "paediatric chest X-rays (PneumoniaMNIST), Kermany et al. 2018, doi:10.1016/j.cell.2018.02.010", "CC BY 4.0"
    ),
    "breastmnist": Source(
        "BUSI breast ultrasound (BreastMNIST), Al-Dhabyani et al. 2020, doi:10.1016/j.dib.2019.104863", "CC BY 4.0"
    ),
    "pad_ufes_20": Source(
        "PAD-UFES-20 smartphone photographs of skin, a part, Pacheco et al. 2020, doi:10.1016/j.dib.2020.106221",
        "CC BY 4.0",
    ),
    "cpn_xray": Source(
        "COVID-19 Radiography Database, COVID and normal adults, Chowdhury et al. 2020, "
        "doi:10.1109/ACCESS.2020.3010287, and Rahman et al. 2021, doi:10.1016/j.compbiomed.2021.104319",
        "no standard licence: its authors ask for both papers to be cited",
    ),
    "bccd": Source("BCCD blood smears", "MIT"),
    "dermamnist": Source("HAM10000 dermatoscopy (DermaMNIST), Tschandl et al. 2018", "CC BY-NC 4.0", False),
    "kvasir_seg": Source("Kvasir-SEG polyps, Jha et al. 2020", "research and education only", False),
}


@dataclass(frozen=True)
class Item:
    """One image: its path, its label, whether it is a training image (or held out), and whether its licence allows
    commercial use."""

    path: Path
    label: str | None
    learn: bool
    free: bool = True


def items(data: Path) -> Iterator[Item]:
    """Yields all images in DATA, of all splits; collections that are not there are passed over."""
    for name in FOLDERS:
        for path in _images(data / name):
            split, label = path.relative_to(data / name).parts[:2]
            yield Item(path, f"{name}: {label}", split == "train", SOURCES[name].free)
    if (data / "cpn_xray").is_dir():
        yield from _chest_xrays(data)
    for path in _images(data / "kvasir_seg"):
        if "images" in path.parts:
            yield Item(path, None, path.relative_to(data / "kvasir_seg").parts[0] == "train", free=False)
    if (data / "bccd").is_dir():
        training = set((data / "bccd" / "ImageSets" / "Main" / "train.txt").read_text(encoding="utf-8").split())
        for path in _images(data / "bccd"):
            yield Item(path, None, path.stem in training)
    for name in HELD_OUT:
        for path in _images(data / name):
            if "masks" not in path.parts:
                yield Item(path, None, False)


def _chest_xrays(data: Path) -> Iterator[Item]:
    with open(data / "cpn_xray" / "index.csv", newline="", encoding="utf-8") as stream:
        for row in csv.DictReader(stream):
            path = data / "cpn_xray" / row["path"]
            if "pneumoniamnist" not in row["path"]:  # those are read above, with the split of that set
                yield Item(path, f"cpn_xray: {row['label']}", row["split"] == "train")


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


def digest(path: Path) -> bytes:
    """Returns the first eight bytes of the SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).digest()[:8]


def build(data: Path, out: Path, threads: int = 2, hashes: Path | None = None) -> dict[str, int]:
    """Writes the pool; returns the numbers of images of each source in it, and of those left out as near-duplicates.

    The file holds `data` (uint8, all images concatenated), `ends` (int64, where each ends), `labels` (int32, -1:
    none), `free` (bool: commercial use is allowed) and `meta` (JSON: classes, counts).

    Args:
        hashes: file for the `digest` of each image that may be used commercially, one after the other, sorted; a test
            compares those of the released backbones (hub/results/pretraining-images.sha) with all held-out images.
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
        meta=np.frombuffer(json_text(meta).encode(), np.uint8),
    )
    if hashes is not None:
        hashes.write_bytes(b"".join(sorted(digest(every[index].path) for index in kept if every[index].free)))
    return dict(counts)


def load(
    path: Path, non_commercial: bool = False, without: Sequence[str] = (), threads: int = 16
) -> tuple[NDArray[np.uint8], NDArray[np.int32], dict]:
    """Loads a pool: images (n, 224, 224, 3), labels (n,) and metadata.

    Args:
        non_commercial: include images whose licence excludes commercial use.
        without: labelled datasets to leave out.

    Raises:
        ValueError: the pool has no labelled images of a dataset in `without`.
    """
    with np.load(path, allow_pickle=False) as pool:
        data, ends, labels, free = pool["data"], pool["ends"], pool["labels"], pool["free"]
        meta = json.loads(pool["meta"].tobytes())
    datasets = [label.partition(":")[0] for label in meta["classes"]]
    if missing := set(without) - set(datasets):
        raise ValueError(
            f"{path} has no labelled images of {', '.join(sorted(missing))}; it has those of "
            f"{', '.join(dict.fromkeys(datasets))}"
        )
    left_out = [number for number, name in enumerate(datasets) if name in without]
    kept = (free | non_commercial) & ~np.isin(labels, left_out)
    starts, ends, labels = np.concatenate(([0], ends[:-1]))[kept], ends[kept], labels[kept]

    def decode(span: tuple[int, int]) -> NDArray[np.uint8]:
        with Image.open(io.BytesIO(data[span[0] : span[1]].tobytes())) as image:
            return np.asarray(image.convert("RGB"))

    with ThreadPoolExecutor(threads) as workers:
        images = np.stack(list(workers.map(decode, zip(starts.tolist(), ends.tolist(), strict=True))))
    return images, labels, meta


def _images(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES]


def main() -> None:
    parser = argparse.ArgumentParser(prog="hub.pretrain_pool", description="The training images of a general backbone.")
    parser.add_argument("--data", type=Path, required=True, metavar="DATA")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.npz")
    parser.add_argument(
        "--hashes", type=Path, metavar="FILE", help="also write a digest of each image that may be used"
    )
    args = parser.parse_args()
    for name, count in sorted(build(args.data, args.out, hashes=args.hashes).items()):
        print(f"{count:6d} {name}")
    print(f"{args.out}: {args.out.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
