"""Prepares the training of a segmentation model: the model, and digests of the data."""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path
from typing import Any

from ..data import DatasetError
from ..segmentation import MedMambaSegmenter, create_segmenter
from ..segmentation.dataset import SegmentationDataset
from ..utils.checksums import CONFIG_NAME, file_hash


def build(
    dataset: SegmentationDataset, variant: str, init: Any, decoder: str, in_chans: int | None, size: int | None
) -> MedMambaSegmenter:
    """Returns a model for the classes of a dataset: new, with the encoder of `init`, or a copy of the segmenter `init`.

    Raises:
        DatasetError: `init` segments other classes.
    """
    if isinstance(init, MedMambaSegmenter) or (init is not None and _is_segmenter(init)):
        model = copy.deepcopy(init) if isinstance(init, MedMambaSegmenter) else MedMambaSegmenter.from_pretrained(init)
        if tuple(model.config.classes) != dataset.classes:
            raise DatasetError(
                f"init segments {', '.join(model.config.classes)}, and the data have {', '.join(dataset.classes)}; "
                "start from a MedMamba, whose encoder is taken, or name the same classes in the same order"
            )
        return model.train()
    exclusive = dataset.exclusive
    options: dict[str, Any] = dict(exclusive=exclusive, decoder=decoder, in_chans=in_chans, size=size)
    return create_segmenter(variant, dataset.classes, start=init, **options)


def _is_segmenter(name: Any) -> bool:
    try:
        found = json.loads((Path(name) / CONFIG_NAME).read_text(encoding="utf-8"))
        return isinstance(found, dict) and found.get("model_type") == "medmamba-segmenter"
    except (OSError, ValueError, TypeError):
        return False


def data_table(dataset: SegmentationDataset) -> dict[str, str]:
    """Returns for each image a digest of its content and one of its mask, split and patient."""
    rows = {}
    for pair in dataset.pairs:
        mask = Path(pair.mask)
        label = file_hash(mask)[:16] if mask.is_file() else pair.mask
        rows[str(pair.image)] = f"{file_hash(pair.image)[:32]}:{label} {pair.split} {pair.patient}"
    return rows


def hash_rows(dataset: SegmentationDataset, table: dict[str, str]) -> str:
    """Returns a digest of images, masks, splits and patients, their order, and the classes."""
    digest = hashlib.sha256(repr((dataset.classes, dataset.exclusive)).encode())
    for pair in dataset.pairs:
        digest.update(f"{pair.image.name}\0{table[str(pair.image)]}\1".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:32]
