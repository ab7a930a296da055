"""Derives classes and splits from paths: `root/<class>/image` or `root/<split>/<class>/image`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ..imaging.find import UNREADABLE_FOLDER, Found
from ..imaging.formats import IMAGE_SUFFIXES, suffix_of
from ..utils.names import canonical, shown
from .dataset import SPLITS, DatasetError, ImageDataset, Reader, Record, split_name
from .labels import notes_on_names, resolve_classes
from .patients import patients_by_name
from .registry import DatasetEntry

Parts = tuple[str, ...]
# Suffixes of files that accompany images: a folder that holds nothing else is no class.
_PAPERS = frozenset(
    ("", ".txt", ".md", ".rst", ".pdf", ".csv", ".tsv", ".json", ".xml", ".html", ".htm", ".yaml", ".yml", ".doc")
    + (".docx", ".xls", ".xlsx", ".py", ".ipynb", ".m", ".log", ".rtf")
)


@dataclass(frozen=True)
class TreeOptions:
    """How to read a tree, see `open_dataset`."""

    entry: DatasetEntry | None = None
    classes: Sequence[str] | None = None
    class_order: str = "auto"
    patient_pattern: str | None = None
    single_class: bool = False

    @property
    def fixed(self) -> bool:
        """Whether the classes are given, so that an empty folder cannot drop one."""
        return self.classes is not None or self.entry is not None or self.single_class


def index_tree(found: Found, reader: Reader, where: str, options: TreeOptions) -> ImageDataset:
    """Indexes the images found below a folder or in an archive.

    Raises:
        DatasetError: no class folders, an empty one, ambiguous names, folders that cannot be opened.
    """
    _check_complete(found, where)
    notes = [str(found.passed_over)] if found.passed_over else []
    rows = _classify(found, where, options, notes)
    names, index = resolve_classes(
        (folder for _, _, folder in rows), options.entry, options.classes, options.class_order, where
    )
    if len(names) < 2 and not options.single_class:
        raise DatasetError(
            f"{where}: only one class folder ({names[0]}), and a classifier needs at least two. If the labels are in "
            "a CSV file, give its path; if this is part of a larger set, name that (dataset=NAME (--dataset)) or, "
            "in Python, open it with open_dataset(..., classes=[...])"
        )
    patients, said = patients_by_name([path for path, _, _ in rows], options.patient_pattern, options.entry, where)
    notes += [*said, *notes_on_names({folder for _, _, folder in rows})]
    records = [
        Record(path, index[folder], split, patient)
        for (path, split, folder), patient in zip(rows, patients, strict=True)
    ]

    def order(record: Record) -> tuple[int, int, str, str]:
        # Within a class as torchvision's ImageFolder does, so that a published random split can be drawn again.
        path = PurePosixPath(str(record.source))
        split = SPLITS.index(record.split) if record.split else 0
        return split, int(record.label), str(path.parent), path.name  # type: ignore[arg-type]

    return ImageDataset(sorted(records, key=order), names, reader, name=Path(where).name, notes=notes)


def _check_complete(found: Found, where: str) -> None:
    closed = [path for path, reason in found.passed_over.reasons.items() if reason == UNREADABLE_FOLDER]
    if closed:
        raise DatasetError(
            f"{where}: {len(closed)} folders cannot be opened, such as {shown(closed[0])}; a set without their images "
            "would be another one. Give yourself the permission to read them"
        )


def _classify(found: Found, where: str, options: TreeOptions, notes: list[str]) -> list[tuple[str, str | None, str]]:
    """Returns path, split and class name of every image; appends notes on what was left out or skipped over."""
    parts = {path: PurePosixPath(path).parts for path in found.paths}
    depth = _wrapper_depth(list(parts.values()))
    outer = next(iter(parts.values()))[:depth] if parts else ()
    if depth:
        notes.append(f"classes are looked for below {'/'.join(outer)!r}, the folder that holds all images")
    # Images beside the folders have no label; a preview picture in the root of a download is common.
    inner = {path: value[depth:] for path, value in parts.items()}
    labelled = {path: value for path, value in inner.items() if len(value) >= 2}
    tops = sorted({value[0] for value in labelled.values()})
    splits = _split_folders(tops, where)
    if splits:
        labelled = {path: value for path, value in labelled.items() if len(value) >= 3}
    if not labelled:
        passed = f"; {found.passed_over}" if found.passed_over else ""
        raise DatasetError(
            f"{where}: {len(found.paths)} images, none of them in a class folder; arrange them as root/<class>/image "
            f"or root/<split>/<class>/image, or describe them in a CSV file (path,label). Images: "
            f"{' '.join(sorted(IMAGE_SUFFIXES))}, and others by content{passed}"
        )
    if not splits and all(len(value) >= 3 and split_name(value[1]) for value in labelled.values()):
        raise DatasetError(
            f"{where}: the splits are inside the class folders ({'/'.join(next(iter(labelled.values()))[:2])}); "
            "arrange the images as root/<split>/<class>/image"
        )
    if len(labelled) < len(parts):
        stray = next(path for path in parts if path not in labelled)
        notes.append(
            f"{len(parts) - len(labelled)} images beside the class folders have no label and are not used, such as "
            f"{stray!r}"
        )
    level = 1 if splits else 0
    folders = {value[: level + 1] for value in labelled.values()}
    _check_names(folders, where, notes)
    _check_empty(found, outer, folders, splits, where, options, notes)
    return [
        (path, split_name(value[0]) if splits else None, canonical(value[level])) for path, value in labelled.items()
    ]


def _split_folders(tops: Sequence[str], where: str) -> list[str]:
    """Returns the top-level folders if they are splits, else [].

    Raises:
        DatasetError: some are and others are not, or two mean the same split.
    """
    splits = [top for top in tops if split_name(top)]
    others = [top for top in tops if not split_name(top)]
    if splits and others:
        raise DatasetError(
            f"{where}: folders {', '.join(splits)} look like splits, but {', '.join(others[:5])} do not; "
            "use root/<class>/image or root/<split>/<class>/image, not both"
        )
    for name in SPLITS:
        same = [top for top in splits if split_name(top) == name]
        if len(same) > 1:
            raise DatasetError(f"{where}: folders {shown(*same)} would all be {name}; merge them, or rename the others")
    return splits


def _check_names(folders: set[Parts], where: str, notes: list[str]) -> None:
    """Refuses class folders that are the same but for their Unicode form, side by side, and names that are no text."""
    places: dict[Parts, set[str]] = {}
    for *above, name in folders:
        if not name.isprintable() and any("\ud800" <= c <= "\udfff" for c in name):
            raise DatasetError(f"{where}: the name of the class folder {name!a} is not UTF-8; rename it")
        places.setdefault((*above, canonical(name)), set()).add(name)
    for same in places.values():
        if len(same) > 1:
            raise DatasetError(
                f"{where}: class folders {shown(*sorted(same))} differ in their Unicode form or outer spaces alone; "
                "merge them where they are the same class, or rename one"
            )
    spelt: dict[str, set[str]] = {}
    for *_, name in folders:
        spelt.setdefault(canonical(name), set()).add(name)
    merged = [same for same in spelt.values() if len(same) > 1]
    notes += [f"class folders {shown(*sorted(same))} of several splits count as one class" for same in merged]


def _check_empty(
    found: Found,
    outer: Parts,
    filled: set[Parts],
    splits: Sequence[str],
    where: str,
    options: TreeOptions,
    notes: list[str],
) -> None:
    """Refuses class folders without images: the class would vanish. Where it cannot, they are noted."""
    level = 2 if splits else 1
    depth = len(outer)
    all_parts = [PurePosixPath(path).parts for path in found.folders]
    inner = [parts[depth:] for parts in all_parts if parts[:depth] == outer]
    empty = [
        parts for parts in inner if len(parts) == level and parts not in filled and (not splits or split_name(parts[0]))
    ]
    present = {canonical(parts[-1]) for parts in filled}
    for parts in empty:
        folder = "/".join(parts)
        held = Counter(
            suffix_of(path) or "other files"
            for path in found.others
            if PurePosixPath(path).parts[: depth + level] == (*outer, *parts)
        )
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(held.items()))
        says = f"class folder {shown(folder)} holds no images{f' ({kinds})' if kinds else ''}"
        if canonical(parts[-1]) in present or options.fixed:
            notes.append(says)
            continue
        raise DatasetError(
            f"{where}: {says}, so the class would vanish. Add images or convert them to a kind that is read; or, if it "
            "is no class, move the folder away or begin its name with a dot"
        )
    beside = [parts[0] for parts in all_parts if depth and len(parts) == 1 and parts != outer[:1]]
    for folder in beside:
        kinds_of = {suffix_of(path) for path in found.others if PurePosixPath(path).parts[0] == folder}
        if not options.fixed and not (kinds_of and kinds_of <= _PAPERS):
            raise DatasetError(
                f"{where}: is folder {shown(folder)} a class? It holds no images, and {shown(outer[0])} holds all of "
                f"them in folders of its own. Give the path of {outer[0]!r} if the classes are in there; else add "
                f"images to {folder!r}, move it away or begin its name with a dot"
            )
    if beside:
        notes.append(f"folders {shown(*beside)} beside it hold no images")


def _wrapper_depth(paths: Sequence[Parts]) -> int:
    """Returns the number of outer wrapper folders that carry no meaning, such as `kvasir-dataset/` in its download."""
    depth = 0
    while paths:
        firsts = {path[depth] if len(path) > depth + 2 else "" for path in paths}
        first = firsts.pop()
        if firsts or not first or split_name(first):
            break
        depth += 1
    return depth
