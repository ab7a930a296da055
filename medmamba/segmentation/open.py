"""Opens a segmentation dataset, whatever its layout."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from ..data import DatasetError
from ..data.csv_text import read_table
from ..data.dataset import split_name
from ..data.patients import compile_pattern, patient_of
from ..dense.files import under
from ..imaging import expand_inputs
from ..utils.strict_json import StrictJsonError, read_json
from .dataset import Pair, SegmentationDataset, mask_from_file, pair_by_name

LAYOUTS = (
    "a folder with images and masks, or with train, val and test that have them; a CSV with columns image and mask; a "
    "COCO .json; or a Pascal VOC folder (JPEGImages, SegmentationClass)"
)
MAX_COCO = 2**30  # bytes


def open_segmentation(
    data: str | os.PathLike | SegmentationDataset,
    classes: Sequence[str] = ("object",),
    *,
    exclusive: bool = True,
    patient_pattern: str | None = None,
) -> SegmentationDataset:
    """Finds the images and masks of a dataset.

    Args:
        data: a folder with `images` and `masks`, whose files have the same names, or with `train`, `val` and `test`
            that have these two; a CSV with the columns `image` and `mask` (and `split`, `patient`), paths relative to
            it; a COCO JSON (polygons or run lengths; images beside it or in `images`); a folder of Pascal VOC.
        classes: names, in the order of the values 1, 2, ... in the masks. COCO has its own, which are taken.
        exclusive: classes of COCO do not overlap; where they do, the later annotation counts.
        patient_pattern: regular expression; group 1 in the name of an image is the patient.

    Raises:
        DatasetError: another layout, an image without its mask, or no images.
    """
    if isinstance(data, SegmentationDataset):
        return data
    path = Path(data)
    names = tuple(classes)
    if path.suffix.lower() == ".csv" and path.is_file():
        found = _from_csv(path, names)
    elif path.suffix.lower() == ".json" and path.is_file():
        found = _from_coco(path, exclusive)
    elif (path / "SegmentationClass").is_dir():
        found = _from_voc(path, names)
    elif path.is_dir():
        found = _from_folders(path, names)
    else:
        raise DatasetError(f"{path}: no such folder or file. A segmentation dataset is {LAYOUTS}")
    pattern = compile_pattern(patient_pattern)
    if pattern is None:
        return found
    pairs = tuple(replace(pair, patient=patient_of(pair.image.name, pattern)) for pair in found.examples)
    if not any(pair.patient for pair in pairs):
        raise DatasetError(f"{path}: patient_pattern {pattern.pattern!r} matches none of the {len(pairs)} file names")
    return replace(found, examples=pairs)


def _from_folders(root: Path, classes: tuple[str, ...]) -> SegmentationDataset:
    parts: list[tuple[str | None, Path]] = []
    if (root / "images").is_dir() and (root / "masks").is_dir():
        parts = [(None, root)]
    else:
        for folder in sorted(path for path in root.iterdir() if path.is_dir()):
            if (split := split_name(folder.name)) and (folder / "images").is_dir():
                parts.append((split, folder))
    if not parts:
        raise DatasetError(f"{root} is laid out in another way. A segmentation dataset is {LAYOUTS}")
    pairs = []
    for split, folder in parts:
        if not (folder / "masks").is_dir():
            raise DatasetError(f"{folder} has images and no folder masks beside them")
        images, masks = expand_inputs(folder / "images"), expand_inputs(folder / "masks")
        for image, mask in pair_by_name(images, masks, str(folder)):
            pairs.append(Pair(image, str(mask), mask, mask_from_file(mask, len(classes)), split))
    return SegmentationDataset(root.name, classes, tuple(pairs), len(classes) > 1)


def _from_csv(path: Path, classes: tuple[str, ...]) -> SegmentationDataset:
    table = read_table(path, ("image", "mask", "split", "patient"))
    if missing := [name for name in ("image", "mask") if name not in map(str.lower, table.header)]:
        raise DatasetError(f"{path} has no column {' or '.join(missing)}; it has {', '.join(table.header)}")
    pairs = []
    for line, cells in table.rows:
        cell = {name.lower(): value.strip() for name, value in cells.items()}
        if not cell["image"] or not cell["mask"]:
            raise DatasetError(f"{path}, line {line}: no {'mask' if cell['image'] else 'image'}")
        image, mask = under(path.parent, cell["image"]), under(path.parent, cell["mask"])
        split = cell.get("split") or None
        if split is not None and split_name(split) is None:
            raise DatasetError(f"{path}, line {line}: split {split!r} is none of train, val and test")
        read = mask_from_file(mask, len(classes))
        pairs.append(Pair(image, str(mask), mask, read, split and split_name(split), cell.get("patient") or None))
    return SegmentationDataset(path.stem, classes, tuple(pairs), len(classes) > 1)


def _from_voc(root: Path, classes: tuple[str, ...]) -> SegmentationDataset:
    images = {path.stem: path for path in expand_inputs(root / "JPEGImages")}
    lists = root / "ImageSets" / "Segmentation"
    splits: dict[str, str] = {}
    for file in sorted(lists.glob("*.txt")):
        if split := split_name(file.stem):
            for name in file.read_text(encoding="utf-8").split():
                if splits.setdefault(name, split) != split:
                    raise DatasetError(f"{lists}: {name} is in {splits[name]} and in {split}")
    pairs = []
    for mask in expand_inputs(root / "SegmentationClass"):
        if mask.stem not in images:
            raise DatasetError(f"{root}: the mask {mask.name} has no image {mask.stem} in JPEGImages")
        read = mask_from_file(mask, len(classes))
        pairs.append(Pair(images[mask.stem], str(mask), mask, read, splits.get(mask.stem)))
    return SegmentationDataset(root.name, classes, tuple(pairs), len(classes) > 1)


def _from_coco(path: Path, exclusive: bool) -> SegmentationDataset:
    try:
        data = read_json(path, MAX_COCO)
        categories = {int(entry["id"]): str(entry["name"]) for entry in data["categories"]}
        images = {entry["id"]: entry for entry in data["images"]}
        shapes: dict[int, list[dict]] = {number: [] for number in images}
        for entry in data["annotations"]:
            if entry["image_id"] not in images or entry["category_id"] not in categories:
                raise DatasetError(f"{path}: annotation {entry.get('id')} names an image or category that is not there")
            shapes[entry["image_id"]].append(entry)
    except (StrictJsonError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, DatasetError):
            raise
        raise DatasetError(
            f"{path} is not a COCO annotation file ({error!r}); it needs images, categories and annotations"
        ) from error
    ids = sorted(categories)
    number = {category: i + 1 for i, category in enumerate(ids)}
    one = exclusive or len(ids) == 1
    root = path.parent / "images" if (path.parent / "images").is_dir() else path.parent
    pairs = []
    for key, entry in images.items():
        read = _coco_reader(shapes[key], number, one, f"{path}: image {entry['file_name']}")
        pairs.append(Pair(under(root, str(entry["file_name"])), f"{path} ({entry['file_name']})", path, read))
    if not pairs:
        raise DatasetError(f"{path} has no images")
    names = tuple(categories[category] for category in ids)
    return SegmentationDataset(path.stem, names, tuple(pairs), one and len(ids) > 1)


def _coco_reader(annotations: list[dict], number: dict[int, int], one: bool, where: str):
    def read(size: tuple[int, int]) -> np.ndarray:
        from ..utils.extras import require

        coco = require("pycocotools.mask", "COCO masks", "segment")
        mask = np.zeros((1 if one else len(number), *size), np.uint8)
        for annotation in annotations:
            shape = annotation.get("segmentation")
            if not shape:
                raise DatasetError(f"{where}: annotation {annotation.get('id')} has no segmentation, only a box")
            if isinstance(shape, list):
                runs = coco.merge(coco.frPyObjects(shape, *size))
            elif isinstance(shape.get("counts"), list):
                runs = coco.frPyObjects(shape, *size)
            else:
                runs = shape
            if tuple(runs["size"]) != size:
                raise DatasetError(f"{where}: a mask of {runs['size']} pixels for an image of {list(size)}")
            inside = coco.decode(runs).astype(bool)
            value = number[annotation["category_id"]]
            if one:
                mask[0][inside] = value
            else:
                mask[value - 1][inside] = 1
        return mask

    return read
