"""The datasets behind the released models: opening, joining, decoding and checking them for `python -m hub.zoo`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from medmamba.config import PreprocessConfig
from medmamba.data import ImageDataset, cache_images, check_leakage, open_dataset
from medmamba.data.dataset import Record
from medmamba.data.files import FolderReader
from medmamba.training.identity import fingerprint
from medmamba.utils.files import write_text
from medmamba.utils.text import json_text

# Dataset name to the kinds of leakage that are known, allowed and reported with the results: in breastmnist, one image
# is in both train and test, with different labels; in pneumoniamnist, eight identical images are in several splits.
DATASETS: dict[str, tuple[str, ...]] = {
    "breastmnist": ("duplicates",),
    "pneumoniamnist": ("duplicates",),
    "dermamnist": (),
    "bloodmnist": (),
    "pad_ufes_20": (),
    "cpn_xray": ("duplicates", "patients"),
}
NOTES = {  # what a card must say of the images used, where they are not those that the registry describes
    "pad_ufes_20": "780 of the 2,298 images were used, which were not drawn at random (ACK, BCC and SCC are "
    "under-represented, 7 SCC are in test), split by patient: compare with published results with care.",
    "cpn_xray": "The published set could not be had. These images are a rebuilt set of its size: COVID and half of the "
    "normals from the COVID-19 Radiography Database (adults; Chowdhury et al., IEEE Access 8:132665 (2020); Rahman et "
    "al., Computers in Biology and Medicine 132:104319 (2021)), pneumonia and the other normals from Kermany et al. "
    "(children of one hospital), so sources and classes are confounded. 87 of the patient numbers in test also occur "
    "in train or val.",
}
TABLE = "index.csv"  # lists the images of a dataset whose folders do not show splits, or that shares images
# Training data of the joint model. Without dermamnist, whose non-commercial licence would extend to all the weights.
JOINT = ("breastmnist", "pneumoniamnist", "bloodmnist")
DECODED = "decoded.json"  # record of `decode` in the cache folder of a dataset


def open_one(root: str | Path, name: str) -> ImageDataset:
    """Opens one dataset in `root`, with classes and patients from the registry."""
    folder = Path(root) / name
    return open_dataset(folder / TABLE if (folder / TABLE).is_file() else folder, dataset=name)


def open_joint(root: str | Path, names: Sequence[str] = JOINT) -> ImageDataset:
    """Combines train and val of several datasets, with the union of their classes; test images are left out."""
    records: list[Record] = []
    classes: list[str] = []
    for name in names:
        index = open_one(root, name)
        for record in index.records:
            if record.split in ("train", "val"):
                assert isinstance(record.label, int)
                source, label = f"{name}/{record.source}", len(classes) + record.label
                records.append(dataclasses.replace(record, source=source, label=label))
        classes += [f"{name}: {title}" for title in index.classes]
    return ImageDataset(records, classes, FolderReader(Path(root)), name="joint")


def decode(name: str, data: str | Path, cache: Path, sizes: Sequence[int], processes: int = 1) -> None:
    """Decodes all splits of a dataset, or of "joint", into the cache, and checks the dataset for leakage.

    Later commands with the same `--cache` reuse the decoded images and skip the check.

    Raises:
        LeakageError: leakage other than what `DATASETS` allows.
    """
    index = open_joint(data) if name == "joint" else open_one(data, name)
    (cache / name).mkdir(parents=True, exist_ok=True)
    for size in sizes:
        config = PreprocessConfig(input_size=(size, size))
        for split, count in index.split_sizes.items():
            if split and count:
                file = cache / name / f"{split}-{size}.npy"
                cache_images(index.split(split), config, file=file, workers=processes if processes > 1 else None)
    if name != "joint":
        check_leakage(index, allow=DATASETS[name])
    write_text(cache / name / DECODED, json_text({"data": fingerprint(index), "sizes": list(sizes)}))


def duplicates_checked(index: ImageDataset, cache: Path | None) -> str | None:
    """Returns how cross-split duplicates were ruled out, or None if unchecked."""
    try:
        found = json.loads((cache / DECODED).read_text()) if cache else {}
    except (OSError, ValueError):
        return None
    return "by hub.zoo decode" if found.get("data") == fingerprint(index) else None
