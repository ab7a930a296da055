"""Images with boxes: Pascal VOC, COCO and CSV, found and checked before anything is decoded."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from ..data import DatasetError
from ..data.csv_text import read_table
from ..data.dataset import split_name
from ..data.patients import compile_pattern, patient_of
from ..dense.examples import Examples
from ..dense.files import under
from ..imaging import MedicalImage, expand_inputs, load_image
from ..utils.strict_json import StrictJsonError, read_json

LAYOUTS = (
    "a Pascal VOC folder (JPEGImages, Annotations, ImageSets/Main), a COCO .json, or a CSV with columns image, label, "
    "left, top, right, bottom (and split, patient)"
)
MAX_COCO, MAX_XML = 2**30, 2**24  # bytes


@dataclass(frozen=True)
class Boxed:
    """One image with its boxes.

    Attributes:
        image: the image file.
        label_file: the file that holds the boxes.
        boxes: (N, 4) float32: left, top, right, bottom in pixels of the image.
        labels: (N,) int64, numbers of the classes from 0.
        split: "train", "val", "test", or None.
        patient: who must not be in two splits; None where unknown.
    """

    image: Path
    label_file: Path
    boxes: np.ndarray
    labels: np.ndarray
    split: str | None = None
    patient: str | None = None


@dataclass(frozen=True)
class DetectionDataset(Examples):
    """Images with boxes, and the names of the classes.

    Attributes:
        name: of the folder or file.
        classes: names.
        examples: the images; those without any box are images in which there is nothing to detect.
        notes: what was left out on opening, such as boxes without an extent.
    """

    name: str
    classes: tuple[str, ...]
    examples: tuple[Boxed, ...]
    notes: tuple[str, ...] = ()

    def load(self, index: int) -> tuple[MedicalImage, np.ndarray, np.ndarray]:
        """Reads one image; returns it with its boxes and labels.

        Raises:
            ImageError: the image cannot be read.
            DatasetError: a box lies outside of it.
        """
        example = self.examples[index]
        image = load_image(example.image)
        height, width = image.size
        if len(example.boxes):
            limit = np.array([width, height, width, height], np.float32)
            outside = (example.boxes < -1).any(1) | (example.boxes > limit + 1).any(1)
            if outside.any():
                box = example.boxes[outside][0].tolist()
                raise DatasetError(
                    f"{example.label_file}: box {box} lies outside of {example.image.name} (width {width}, height "
                    f"{height}); boxes are left, top, right, bottom in pixels of the image after EXIF rotation"
                )
        limits = np.array([width, height] * 2, np.float32)
        return image, np.clip(example.boxes, 0, limits), example.labels


def open_detection(
    data: str | os.PathLike | DetectionDataset,
    classes: Sequence[str] | None = None,
    *,
    patient_pattern: str | None = None,
) -> DetectionDataset:
    """Finds the images and boxes of a dataset.

    Args:
        data: a folder of Pascal VOC, a COCO JSON (images beside it or in `images`), or a CSV with one box per row.
        classes: names, in the order of their numbers; a label that is none of them is an error. None: those found,
            sorted (COCO: in the order of its categories).
        patient_pattern: regular expression; group 1 in the name of an image is the patient.

    Raises:
        DatasetError: another layout, an unknown class, or no images.
    """
    if isinstance(data, DetectionDataset):
        return data
    path = Path(data)
    if path.suffix.lower() == ".csv" and path.is_file():
        rows, order = _from_csv(path), None
    elif path.suffix.lower() == ".json" and path.is_file():
        rows, order = _from_coco(path)
    elif (path / "Annotations").is_dir():
        rows, order = _from_voc(path), None
    else:
        raise DatasetError(f"{path}: no such folder or file, or another layout. A detection dataset is {LAYOUTS}")
    if not rows:
        raise DatasetError(f"{path} has no images")
    found = order or sorted({label for row in rows for label, _ in row.objects})
    names = tuple(classes) if classes else tuple(found)
    if unknown := sorted(set(found) - set(names)):
        raise DatasetError(f"{path}: unknown classes {', '.join(unknown)}; the classes given are {', '.join(names)}")
    if not names:
        raise DatasetError(f"{path} has no boxes at all")
    return _built(path.stem, names, rows, patient_pattern)


@dataclass
class _Row:
    image: Path
    label_file: Path
    objects: list[tuple[str, list[float]]]
    split: str | None = None
    patient: str | None = None


def _built(name: str, classes: tuple[str, ...], rows: list[_Row], patient_pattern: str | None) -> DetectionDataset:
    pattern, examples, degenerate = compile_pattern(patient_pattern), [], []
    number = {label: i for i, label in enumerate(classes)}
    for row in rows:
        kept = []
        for label, box in row.objects:
            if box[2] - box[0] >= 1 and box[3] - box[1] >= 1:
                kept.append((label, box))
            else:
                degenerate.append(f"{row.image.name} {box}")
        boxes = np.array([box for _, box in kept], np.float32).reshape(-1, 4)
        labels = np.array([number[label] for label, _ in kept], np.int64)
        patient = patient_of(row.image.name, pattern) if pattern else row.patient
        examples.append(Boxed(row.image, row.label_file, boxes, labels, row.split, patient))
    if pattern and not any(example.patient for example in examples):
        raise DatasetError(f"{name}: patient_pattern {pattern.pattern!r} matches none of the {len(rows)} file names")
    notes: tuple[str, ...] = ()
    if degenerate:
        notes = (f"{len(degenerate)} boxes smaller than a pixel were left out: {', '.join(degenerate[:5])}",)
    return DetectionDataset(name, classes, tuple(examples), notes)


def _from_voc(root: Path) -> list[_Row]:
    images = {path.stem: path for path in expand_inputs(root / "JPEGImages")}
    splits: dict[str, str] = {}
    for file in sorted((root / "ImageSets" / "Main").glob("*.txt")):
        if split := split_name(file.stem):
            for line in file.read_text(encoding="utf-8").splitlines():
                name = line.strip().removesuffix(".jpg")
                if name and splits.setdefault(name, split) != split:
                    raise DatasetError(f"{file}: {name} is in {splits[name]} and in {split}")
    rows = []
    for file in sorted((root / "Annotations").glob("*.xml")):
        if file.stem not in images:
            raise DatasetError(f"{root}: the annotation {file.name} has no image {file.stem} in JPEGImages")
        rows.append(_Row(images.pop(file.stem), file, _voc_objects(file), splits.get(file.stem)))
    if images:
        names = ", ".join(sorted(path.name for path in images.values())[:5])
        raise DatasetError(
            f"{root}: {len(images)} images have no annotation: {names}; an image with nothing to detect needs an "
            "annotation without objects"
        )
    return rows


def _voc_objects(file: Path) -> list[tuple[str, list[float]]]:
    if file.stat().st_size > MAX_XML:
        raise DatasetError(f"{file} has {file.stat().st_size:,} bytes, too many for an annotation")
    text = file.read_bytes()
    if b"<!DOCTYPE" in text or b"<!ENTITY" in text:
        raise DatasetError(f"{file} declares a document type, which annotations do not need; remove it")
    try:
        found = []
        for entry in ElementTree.fromstring(text).iter("object"):
            bounds = entry.find("bndbox")
            box = [float(bounds.findtext(side)) for side in ("xmin", "ymin", "xmax", "ymax")]  # type: ignore
            found.append((str(entry.findtext("name")).strip(), box))
        return found
    except (ElementTree.ParseError, AttributeError, TypeError, ValueError) as error:
        raise DatasetError(f"{file} is not a Pascal VOC annotation ({error})") from error


def _from_coco(path: Path) -> tuple[list[_Row], list[str]]:
    root = path.parent / "images" if (path.parent / "images").is_dir() else path.parent
    try:
        data = read_json(path, MAX_COCO)
        names = {int(entry["id"]): str(entry["name"]) for entry in data["categories"]}
        rows = {entry["id"]: _Row(under(root, str(entry["file_name"])), path, []) for entry in data["images"]}
        for entry in data["annotations"]:
            if entry["image_id"] not in rows or entry["category_id"] not in names:
                raise DatasetError(f"{path}: annotation {entry.get('id')} names an image or category that is not there")
            left, top, width, height = map(float, entry["bbox"])
            box = [left, top, left + width, top + height]
            rows[entry["image_id"]].objects.append((names[entry["category_id"]], box))
    except (StrictJsonError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, DatasetError):
            raise
        raise DatasetError(
            f"{path} is not a COCO annotation file ({error!r}); it needs images, categories and annotations with bbox"
        ) from error
    return list(rows.values()), [names[number] for number in sorted(names)]


def _from_csv(path: Path) -> list[_Row]:
    sides = ("left", "top", "right", "bottom")
    table = read_table(path, ("image", "label", *sides))
    columns = [name.lower() for name in table.header]
    if missing := [name for name in ("image", "label", *sides) if name not in columns]:
        raise DatasetError(f"{path} has no column {', '.join(missing)}; it has {', '.join(table.header)}")
    rows: dict[str, _Row] = {}
    for line, cells in table.rows:
        cell = {name.lower(): value.strip() for name, value in cells.items()}
        split = cell.get("split") or None
        if split is not None and (split := split_name(split)) is None:
            raise DatasetError(f"{path}, line {line}: split {cell['split']!r} is none of train, val and test")
        row = rows.setdefault(
            cell["image"], _Row(under(path.parent, cell["image"]), path, [], split, cell.get("patient") or None)
        )
        if row.split != split:
            raise DatasetError(f"{path}, line {line}: {cell['image']} is in {row.split} and in {split}")
        if not cell["label"] and not any(cell[side] for side in sides):
            continue  # an image with nothing to detect
        try:
            row.objects.append((cell["label"], [float(cell[side]) for side in sides]))
        except ValueError:
            raise DatasetError(f"{path}, line {line}: left, top, right and bottom must be numbers") from None
    return list(rows.values())
