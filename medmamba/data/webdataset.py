"""Tar shards in the layout of WebDataset: the files of a sample follow each other and share a key.

A sample `000123.png`, `000123.cls` has the key `000123`. The label is in `.cls` or `.txt` (the name or number of the
class; several are separated by `;`) or in `.json` (`label`, and optionally `patient` and `split`). See
https://github.com/webdataset/webdataset for the format.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from ..imaging.find import reason_by_path
from ..imaging.formats import IMAGE_SUFFIXES
from ..imaging.load import ImageError, MedicalImage, load_named
from ..utils.names import shown
from .cells import LABEL_SEPARATOR, parse_labels
from .dataset import SPLITS, DatasetError, ImageDataset, Record, split_name
from .files import MAX_MEMBER_BYTES
from .labels import is_missing, notes_on_names, resolve_classes
from .patients import patients_by_name
from .registry import DatasetEntry
from .table import known_class
from .tar_index import Member, tar_members

_WANTED = frozenset((".cls", ".txt", ".json"))
_OTHERS = (".csv", ".tsv", ".npz", ".zip")
_WORDS = str.maketrans("-_.", "   ")


class TarReader:
    """Reads images from tar shards, each by its position; `frame` and `window` as in `load_image`.

    The source of a record is `shard:offset:size:member`.
    """

    frame: int | None = None
    window: tuple[float, float] | None = None

    def __init__(self, root: Path, shards: Sequence[str]) -> None:
        self.root = root
        self._files = {shard: root / shard for shard in shards}
        self._open: dict[str, tuple[int, Any]] = {}

    def read(self, record: Record) -> MedicalImage:
        shard, offset, size, name = str(record.source).split(":", 3)
        content = self._content(shard, int(offset), int(size))
        if len(content) != int(size):
            raise ImageError(f"{self._files[shard]}: is shorter than it was; was the file replaced?")
        return load_named(content, name, frame=self.frame, window=self.window)

    def file_of(self, record: Record) -> Path:
        """Returns the file that determines what `read` returns."""
        return self._files[str(record.source).split(":", 1)[0]]

    def _content(self, shard: str, offset: int, size: int) -> bytes:
        if hasattr(os, "pread"):  # has no position, so that threads and forks can share the file
            if shard not in self._open:
                file = self._files[shard].open("rb")
                if self._open.setdefault(shard, (0, file))[1] is not file:
                    file.close()
            return os.pread(self._open[shard][1].fileno(), size, offset)
        with self._files[shard].open("rb") as file:
            file.seek(offset)
            return file.read(size)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_open": {}}


class _Sample(NamedTuple):
    source: str
    label: str
    split: str | None
    patient: str | None


def is_shards(path: Path) -> bool:
    """Returns whether a path is a tar, a pattern of tars, or a folder of tars, also in folders named after splits.

    Not a folder that holds another dataset too, beside which a tar may just be its download.
    """
    if not path.is_dir():
        return path.suffix.lower() == ".tar"
    return holds_only(path, ".tar")


def holds_only(folder: Path, suffix: str) -> bool:
    """Returns whether a folder holds files of a suffix, also in folders named after splits or "data", and neither other
    folders nor a file of another kind of dataset."""
    try:
        children = [child for child in folder.iterdir() if not child.name.startswith((".", "_"))]
        inner = [child for child in children if child.is_dir()]
        files = [child for child in children if child.suffix.lower() == suffix]
        for child in inner:
            below = [file for file in child.glob(f"*{suffix}") if file.is_file()]
            if not below or (split_name(child.name) is None and child.name != "data"):
                return False
            files += below
    except OSError:
        return False  # reported by the reader of folders
    return bool(files) and not any(child.suffix.lower() in _OTHERS for child in children)


def open_shards(
    path: str | os.PathLike[str],
    *,
    entry: DatasetEntry | None = None,
    classes: Sequence[str] | None = None,
    class_order: str = "auto",
    patient_pattern: str | None = None,
) -> ImageDataset:
    """Indexs tar shards in the layout of WebDataset, reading headers and labels only.

    Args:
        path: one `.tar`, a folder of them, or a pattern such as `shards/train-*.tar`. A shard or its folder that is
            called after a split (`train-000.tar`, `val/000.tar`) belongs to it, unless the JSON of a sample says
            otherwise.
        entry, classes, class_order, patient_pattern: see `open_dataset`.

    Raises:
        DatasetError: no shards, a damaged one, a sample without a label, or labels that cannot be understood.
    """
    path = Path(path)
    where = str(path)
    root, files = _shards(path)
    shards = sorted((file.relative_to(root).as_posix() for file in files), key=_order)
    if odd := next((shard for shard in shards if ":" in shard), None):
        raise DatasetError(f"{where}: {odd!r} has a colon in its name; rename it")
    unlabelled: list[str] = []
    samples: list[_Sample] = []
    for shard in shards:
        samples += _samples(shard, _split_of(shard), tar_members(root / shard, _WANTED), where, unlabelled)
    if not samples:
        without = f". Without a label: {shown(*unlabelled)}" if unlabelled else ""
        raise DatasetError(
            f"{where}: no image with a label in {len(files)} tar files; a sample is an image and a .cls, .txt or .json "
            f"of the same name, and a tar of class folders is unpacked first{without}"
        )
    notes = []
    if unlabelled:
        notes.append(f"{len(unlabelled)} images without a .cls, .txt or .json are not used, such as {unlabelled[0]!r}")
    cells = [(number, sample.label) for number, sample in enumerate(samples, 1)]
    texts, multilabel, said = _labels(cells, entry, classes, where)
    notes += said
    names, index = resolve_classes({part for parts in texts for part in parts}, entry, classes, class_order, where)
    notes += notes_on_names({part for parts in texts for part in parts})
    patients: Sequence[str | None] = [sample.patient for sample in samples]
    if not any(patients):
        members = [sample.source.split(":", 3)[3] for sample in samples]
        patients, said = patients_by_name(members, patient_pattern, entry, where)
        notes += said
    elif patient_pattern is not None:
        raise DatasetError(f"{where}: the JSON of the samples names patients; leave patient_pattern out")
    records = []
    for sample, parts, patient in zip(samples, texts, patients, strict=True):
        label: int | tuple[int, ...] = index[parts[0]] if not multilabel else 0
        if multilabel:
            numbers = {index[part] for part in parts}
            label = tuple(int(i in numbers) for i in range(len(names)))
        records.append(Record(sample.source, label, sample.split, patient))
    task = "multilabel" if multilabel else "multiclass"
    return lone_split(ImageDataset(records, names, TarReader(root, shards), task, None, path.stem, notes))


def lone_split(dataset: ImageDataset) -> ImageDataset:
    """Returns a dataset whose images are all in "train" as one without splits, with a note; others as they are.

    Many published sets come so, and it means no more than "all of it".
    """
    if set(dataset.splits) != {"train"}:
        return dataset
    return dataset.with_splits([None] * len(dataset)).with_notes(
        "its only split, 'train', counts as all images; have splits made (split=, --split 0.7,0.1,0.2)"
    )


def _labels(
    cells: list[tuple[int, str]], entry: DatasetEntry | None, classes: Sequence[str] | None, where: str
) -> tuple[list[list[str]], bool, list[str]]:
    """Parses each different text once: there may be millions of samples."""
    first: dict[str, int] = {}
    for number, text in cells:
        first.setdefault(text, number)
    different = [(number, text) for text, number in first.items()]
    parsed, multilabel, notes = parse_labels(different, known_class(entry, classes), f"{where}, labels by sample")
    by_text = {text: parts for (_, text), parts in zip(different, parsed, strict=True)}
    return [by_text[text] for _, text in cells], multilabel, notes


def _shards(path: Path) -> tuple[Path, list[Path]]:
    if path.is_dir():
        return path, sorted(_tars(path))
    if path.is_file():
        return path.parent, [path]
    if any(mark in str(path) for mark in "*?["):
        fixed = 0
        while not any(mark in path.parts[fixed] for mark in "*?["):
            fixed += 1
        root = Path(*path.parts[:fixed])
        if files := sorted(file for file in root.glob(str(Path(*path.parts[fixed:]))) if file.is_file()):
            return root, files
    raise DatasetError(f"{path}: no such tar file; give a .tar, a folder of them, or a pattern such as 'train-*.tar'")


def _tars(folder: Path) -> Iterator[Path]:
    inner = (child for child in folder.iterdir() if child.is_dir() and not child.name.startswith("."))
    for place in (folder, *inner):
        for file in place.glob("*.tar"):
            if reason_by_path(file.name) is None:
                yield file


def _split_of(shard: str) -> str | None:
    parts = PurePosixPath(shard).parts
    names = [*parts[:-1], *parts[-1].translate(_WORDS).split()]
    return next((split for name in names if (split := split_name(name))), None)


def _order(shard: str) -> tuple[int, str]:
    split = _split_of(shard)
    return len(SPLITS) if split is None else SPLITS.index(split), shard


def _samples(
    shard: str, split: str | None, members: Iterable[Member], where: str, unlabelled: list[str]
) -> Iterator[_Sample]:
    """Groups consecutive members by key."""
    # Written for speed: there may be millions of members.
    key, files = None, dict[str, Member]()
    for member in members:
        name = member.name
        start = name.rfind("/") + 1
        dot = name.find(".", start)
        dot = len(name) if dot < 0 else dot
        if dot == start or name.startswith("__MACOSX/"):  # hidden, or of the operating system
            continue
        if name[:dot] != key:
            if files and (sample := _sample(shard, split, files, where, unlabelled)):
                yield sample
            key, files = name[:dot], {}
        suffix = name[dot:].lower()
        if suffix in files:
            raise DatasetError(f"{where}: {shard} holds {name!r} twice in one sample")
        files[suffix] = member
    if files and (sample := _sample(shard, split, files, where, unlabelled)):
        yield sample


def _sample(
    shard: str, split: str | None, files: dict[str, Member], where: str, unlabelled: list[str]
) -> _Sample | None:
    """Returns the sample that these files are, or None where there is no image or no label."""
    images = [member for suffix, member in files.items() if suffix[suffix.rfind(".") :] in IMAGE_SUFFIXES]
    if not images:
        return None
    if len(images) > 1:
        raise DatasetError(
            f"{where}: {shard} has {len(images)} images in one sample, {shown(*[m.name for m in images])}; a sample is "
            "one image"
        )
    image = images[0]
    if image.size > MAX_MEMBER_BYTES:
        raise DatasetError(
            f"{where}: {image.name!r} in {shard} has {image.size} bytes; the limit is {MAX_MEMBER_BYTES}"
        )
    label, patient = None, None
    for suffix in (".cls", ".txt"):
        if label is None and suffix in files:
            label = _text(files[suffix])
    if ".json" in files:
        found = _json(_text(files[".json"]), files[".json"].name, shard, where)
        label = found.get("label") if label is None else label
        patient = found.get("patient")
        split = split_name(str(found["split"])) if found.get("split") else split
    if label is None:
        unlabelled.append(image.name)
        return None
    if isinstance(label, list):
        label = LABEL_SEPARATOR.join(map(str, label))
    patient = None if patient is None or is_missing(str(patient)) else str(patient)
    return _Sample(f"{shard}:{image.offset}:{image.size}:{image.name}", str(label), split, patient)


def _text(member: Member) -> str:
    return (member.content or b"").decode("utf-8", "replace").removeprefix("\ufeff").strip()


def _json(text: str, name: str, shard: str, where: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise DatasetError(f"{where}: {name!r} in {shard} is not JSON ({error})") from error
    if not isinstance(found, dict):
        raise DatasetError(f"{where}: {name!r} in {shard} is not a JSON object with a label")
    return found
