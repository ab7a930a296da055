"""MedMNIST `.npz` files of any size, read with numpy alone: no pickle, and mapped from disk where stored so."""

from __future__ import annotations

import math
import os
import shutil
import zipfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np

from ..imaging.load import MedicalImage, load_image
from ..utils.files import write_atomically
from ..utils.names import shown
from .archive import DAMAGES
from .dataset import SPLITS, DatasetError, ImageDataset, Record
from .registry import DatasetEntry

MAX_CLASSES = 65_536
"""Upper bound of labels in an array without names; a larger value is not a class index."""

_LOCAL_HEADER_BYTES = 30


class NpzReader:
    """Reads images of an `.npz`, one array per split.

    An array that is stored without compression is memory-mapped. A compressed one (the published MedMNIST files are)
    is read whole with its first image; `unpack_npz` makes a copy that can be mapped.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._arrays: dict[str, np.ndarray] = {}

    def read(self, record: Record) -> MedicalImage:
        # The row counts within the array it was indexed from, which with_splits() must not change.
        member, _, row = str(record.source).rpartition(":")
        return load_image(np.asarray(self._array(member)[int(row)]))

    def file_of(self, record: Record) -> Path:
        """Returns the file that determines what `read` returns."""
        return self.path

    def _array(self, member: str) -> np.ndarray:
        if member not in self._arrays:
            self._arrays[member] = read_member(self.path, member)
        return self._arrays[member]

    def __getstate__(self) -> dict[str, object]:
        return {"path": self.path, "_arrays": {}}


def open_npz(
    path: str | os.PathLike[str], *, entry: DatasetEntry | None = None, classes: Sequence[str] | None = None
) -> ImageDataset:
    """Indexs an `.npz` that holds `{train,val,test}_images` and `_labels` (MedMNIST), or plain `images` and `labels`.

    Images are uint8 (uint16, or float in [0, 1]) `(N, H, W)` or `(N, H, W, 3)`; labels are integers `(N,)`, `(N, 1)`,
    or `(N, K)` of 0 and 1 for several classes at once. Record sources are "member:row".

    Raises:
        DatasetError: a file that is cut off, of another kind, or whose arrays do not fit together.
    """
    path = Path(path)
    shapes, types = _members(path)
    members: dict[str | None, tuple[str, str]] = {
        split: (f"{split}_images", f"{split}_labels") for split in SPLITS if f"{split}_images" in shapes
    }
    notes = _unused(shapes, members, path)
    members = members or {None: ("images", "labels")}
    records: list[Record] = []
    multilabel = False
    largest = -1
    for split, (images, labels) in members.items():
        for name in (images, labels):
            if name not in shapes:
                raise DatasetError(
                    f"{path}: no array {name!r} (found: {', '.join(shapes) or 'none'}); expected train_images, "
                    "train_labels and so on, as MedMNIST has them, or images and labels"
                )
        shape = shapes[images]
        if not (len(shape) == 3 or (len(shape) == 4 and shape[3] in (1, 3))):
            kind = "volumes (a 3D MedMNIST set?)" if len(shape) == 4 else "something else"
            if len(shape) == 4 and shape[1] in (1, 3):
                kind = "channels first, which images.transpose(0, 2, 3, 1) turns"
            raise DatasetError(f"{path}: {images} has shape {shape}: {kind}, not (N, H, W) or (N, H, W, 3)")
        if not _is_pixel_type(types[images]):
            raise DatasetError(
                f"{path}: {images} is of type {types[images]}; images are uint8, uint16, bool, or float in [0, 1]"
            )
        values = _labels(read_member(path, labels), path, labels)
        if len(values) != shape[0]:
            raise DatasetError(f"{path}: {shape[0]} {images} but {len(values)} {labels}")
        multilabel = multilabel or values.ndim == 2
        for row, value in enumerate(values.tolist()):
            records.append(Record(f"{images}:{row}", tuple(value) if values.ndim == 2 else value, split))
        if len(values):
            largest = max(largest, values.shape[1] - 1 if values.ndim == 2 else int(values.max()))
    if classes is None:
        if entry is not None:
            notes.append(f"classes are named as those of {entry.title}")
        elif largest >= MAX_CLASSES:
            raise DatasetError(
                f"{path}: a label is {largest}, and classes are counted from 0; number them 0, 1, 2, ... without gaps"
            )
        classes = entry.classes if entry is not None else tuple(str(index) for index in range(largest + 1))
    task = "multilabel" if multilabel else "multiclass"
    dataset = ImageDataset(records, classes, NpzReader(path), task, name=path.stem)
    return dataset.with_notes(*notes, *_notes_on_labels(dataset))


def _unused(shapes: Collection[str], members: Mapping[str | None, tuple[str, str]], path: Path) -> list[str]:
    """Returns notes on arrays that are not used.

    Raises:
        DatasetError: images of a split beside plain `images`, so that it is ambiguous which are meant.
    """
    if members and "images" in shapes:
        raise DatasetError(f"{path}: has the array images beside those of splits; remove or rename the ones not meant")
    used = {name for pair in members.values() for name in pair} or {"images", "labels"}
    others = [name for name in shapes if name not in used]
    return [f"arrays {shown(*others)} are not used"] if others else []


def _notes_on_labels(dataset: ImageDataset) -> list[str]:
    """Returns notes on suspicious labels: one-hot rows, and classes without images."""
    if not len(dataset):
        return []
    if dataset.task == "multilabel":
        if len(dataset.classes) > 1 and (dataset.labels.sum(axis=1) == 1).all():
            return [
                "each row of the labels shows exactly one class, and counts as a multi-label task; for one class per "
                "image store labels.argmax(1)"
            ]
        return []
    empty = [name for name, count in zip(dataset.classes, dataset.class_counts, strict=True) if count == 0]
    return [f"no image has the class {shown(*empty)}"] if empty else []


def _is_pixel_type(dtype: np.dtype) -> bool:
    return dtype.kind in "bf" or (dtype.kind == "u" and dtype.itemsize <= 2)


def read_member(path: Path, member: str) -> np.ndarray:
    """Loads one array of an `.npz`: memory-mapped (read-only) if stored uncompressed, else read into memory."""
    with _open(path) as archive:
        info = archive.getinfo(f"{member}.npy")
        with archive.open(info) as stream:
            shape, fortran, dtype, header = _npy_header(stream, path, member)
        expected = header + math.prod(shape) * dtype.itemsize  # of Python: a product that wraps round may fit by chance
        if expected != info.file_size:
            raise DatasetError(f"{path}: array {member} declares {expected} bytes but has {info.file_size}")
        if info.compress_type == zipfile.ZIP_STORED:
            offset = _data_offset(path, info) + header
            return np.memmap(path, dtype, "r", offset, shape, "F" if fortran else "C")
        try:
            with archive.open(info) as stream:
                return np.lib.format.read_array(stream, allow_pickle=False)
        except (ValueError, *DAMAGES) as exc:
            raise DatasetError(f"{path}: array {member} is damaged ({exc}); download the file again") from exc


def unpack_npz(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> Path:
    """Copies a compressed `.npz` to an uncompressed one, whose images are mapped from disk instead of held in memory.

    Takes the size of the arrays on disk (MedMNIST at 224 pixels: up to 16 GB); streams, so memory stays small.
    """

    def write(partial: Path) -> None:
        with _open(Path(source)) as archive, zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as plain:
            for info in archive.infolist():
                member = zipfile.ZipInfo(info.filename)
                with archive.open(info) as stream, plain.open(member, "w", force_zip64=True) as sink:
                    shutil.copyfileobj(stream, sink, 2**20)

    return write_atomically(target, write)


def _members(path: Path) -> tuple[dict[str, tuple[int, ...]], dict[str, np.dtype]]:
    """Returns shape and dtype of each array, by name.

    Raises:
        DatasetError: two arrays of one name, or one that cannot be unpacked.
    """
    shapes, types = {}, {}
    with _open(path) as archive:
        for info in archive.infolist():
            if not info.filename.endswith(".npy"):
                continue
            member = info.filename.removesuffix(".npy")
            if member in shapes:
                raise DatasetError(f"{path}: array {member} is in the file twice")
            try:
                with archive.open(info) as stream:
                    shapes[member], _, types[member], _ = _npy_header(stream, path, member)
            except DAMAGES as exc:
                raise DatasetError(f"{path}: array {member} cannot be unpacked ({exc}); save it again") from exc
    return shapes, types


def _npy_header(stream: object, path: Path, member: str) -> tuple[tuple[int, ...], bool, np.dtype, int]:
    """Returns shape, whether in Fortran order, dtype, and the number of bytes before the data."""
    form = np.lib.format
    try:
        version = form.read_magic(stream)  # type: ignore[arg-type]
        read = form.read_array_header_1_0 if version == (1, 0) else form.read_array_header_2_0
        shape, fortran, dtype = read(stream)  # type: ignore[arg-type]
    except (ValueError, EOFError, zipfile.BadZipFile) as exc:
        raise DatasetError(f"{path}: array {member} cannot be read ({exc})") from exc
    if dtype.hasobject:
        raise DatasetError(f"{path}: array {member} holds Python objects, which are refused (they can run code)")
    return shape, fortran, dtype, stream.tell()  # type: ignore[attr-defined]


def _open(path: Path) -> zipfile.ZipFile:
    if not path.is_file():
        raise DatasetError(f"{path}: no such file")
    try:
        return zipfile.ZipFile(path)
    except zipfile.BadZipFile as exc:
        size = path.stat().st_size
        raise DatasetError(
            f"{path}: not a complete .npz file ({size} bytes, {exc}); the download was probably cut off, fetch it again"
        ) from exc


def _data_offset(path: Path, info: zipfile.ZipInfo) -> int:
    with path.open("rb") as stream:
        stream.seek(info.header_offset)
        local = stream.read(_LOCAL_HEADER_BYTES)
    # Lengths of the name and the extra field stand in the local header, and can differ from the central directory's.
    return (
        info.header_offset
        + _LOCAL_HEADER_BYTES
        + int.from_bytes(local[26:28], "little")
        + int.from_bytes(local[28:30], "little")
    )


def _labels(values: np.ndarray, path: Path, member: str) -> np.ndarray:
    values = np.asarray(values)
    if values.ndim == 2 and values.shape[1] == 1:
        values = values[:, 0]
    if values.ndim not in (1, 2) or not np.issubdtype(values.dtype, np.integer):
        raise DatasetError(
            f"{path}: {member} must be integers of shape (N,), (N, 1) or (N, K); it is {values.dtype} {values.shape}"
        )
    return values.astype(np.int64)
