"""The sixteen datasets of the MedMamba paper, and ChestMNIST: classes, splits, licence, source, published metrics.

One file, `registry.json`, is read by training, evaluation, conversion, model cards, demo and documentation alike.
Unknown facts are None; metrics are fractions in [0, 1], whatever the source printed.

>>> from medmamba import registry
>>> registry.get("bloodmnist").published["tiny"].accuracy
0.978
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from types import MappingProxyType
from typing import Any

from ..utils.names import find_name


class RegistryError(KeyError, ValueError):
    """A dataset that is not in the registry. The message lists those that are."""

    def __str__(self) -> str:  # KeyError would print the repr of the message
        return str(self.args[0])


@dataclass(frozen=True)
class Licence:
    """Terms of the images. `id` is an SPDX identifier (or LicenseRef-...), None where the terms are not known."""

    id: str | None
    url: str | None
    non_commercial: bool | None
    note: str = ""


@dataclass(frozen=True)
class Source:
    """Where the images come from.

    `md5` maps the image size to the checksum of the MedMNIST `.npz` of that size; `contact` says whom to ask for images
    that are not public.
    """

    url: str
    doi: str | None = None
    public: bool = True
    contact: str = ""
    md5: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class SplitRule:
    """How train, val and test were made.

    `kind` is "official" (published with the data), "random" (drawn by `fractions` and `seed`, see
    `medmamba.data.published_split`) or "unknown".
    """

    kind: str
    fractions: tuple[float, float, float] | None
    seed: int | None
    note: str


@dataclass(frozen=True)
class PublishedMetrics:
    """Metrics published elsewhere, as fractions in [0, 1]; None where the source does not give them.

    Precision, sensitivity, specificity and F1 are macro averages over the classes, for two classes too.
    """

    quoted_from: str
    accuracy: float | None = None
    auc: float | None = None
    precision: float | None = None
    sensitivity: float | None = None
    specificity: float | None = None
    f1: float | None = None
    model: str = ""
    note: str = ""


@dataclass(frozen=True)
class DatasetEntry:
    """What is known about one dataset.

    Attributes:
        name: key, lower case, such as "pad-ufes-20".
        task: "multiclass", "binary", "multilabel" or "ordinal" (classes are grades in ascending order).
        channels: 1 or 3, of the files as distributed.
        colour: whether the images are in colour: greyscale images may be stored in three channels; None if unknown.
        classes: names in the order of the label indices.
        display_names: the same, for people, where `classes` are abbreviations or numbers.
        aliases: other names of each class, such as folder names.
        class_order: "official" (defined by the data), "alphabetical" (folder names sorted, as the published trainer
            does) or "assumed" (private data: alphabetical, unconfirmed).
        splits: number of images in "train", "val", "test"; None where unknown.
        other_splits: sizes of earlier releases of the same data.
        class_counts: images in each class, over all splits; None where unknown.
        group_pattern: regular expression whose group 1 is the patient (or `group_unit`) in a file name.
        published: metrics of the MedMamba paper by variant ("tiny", "small", "base").
        elsewhere: metrics of other models on the same dataset.
    """

    name: str
    title: str
    task: str
    modality: str
    channels: int
    classes: tuple[str, ...]
    class_order: str
    split_rule: SplitRule
    source: Source
    licence: Licence
    citation: tuple[str, ...]
    published: Mapping[str, PublishedMetrics]
    elsewhere: tuple[PublishedMetrics, ...] = ()
    display_names: tuple[str, ...] = ()
    aliases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    splits: Mapping[str, int] | None = None
    other_splits: tuple[Mapping[str, int], ...] = ()
    class_counts: tuple[int, ...] | None = None
    n_images: int | None = None
    n_patients: int | None = None
    group_pattern: str | None = None
    group_unit: str | None = None
    colour: bool | None = None

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def in_paper(self) -> bool:
        """Whether the MedMamba paper has results on it."""
        return bool(self.published)

    @property
    def id2label(self) -> dict[int, str]:
        """Label index to display name, in the form of `MedMambaConfig.id2label`."""
        return dict(enumerate(self.display_names or self.classes))

    @property
    def best_elsewhere(self) -> PublishedMetrics | None:
        """The most accurate model among those quoted from elsewhere."""
        return max(self.elsewhere, key=lambda row: row.accuracy or 0.0, default=None)

    def class_index(self, name: str) -> int | None:
        """Returns the label index of a class given by name, display name, alias or index ("0", "1", ...), else None.

        An exact name goes first; else case, spaces and separators do not matter where that leaves one class:
        "normal_or_benign" is "normal or benign".

        Raises:
            AmbiguousNameError: (a ValueError) several classes are spelled like this.
        """
        spellings = [
            (title, *self.aliases.get(title, ()), *self.display_names[index : index + 1])
            for index, title in enumerate(self.classes)
        ]
        if (index := find_name(name, spellings)) is not None:
            return index
        if name.isdecimal() and int(name) < len(self.classes):
            return int(name)
        return None


def names() -> tuple[str, ...]:
    """Returns the names of all datasets, in the order of the file."""
    return tuple(_entries())


def get(name: str) -> DatasetEntry:
    """Returns the entry of a dataset. Case, dashes and underscores do not matter.

    Raises:
        RegistryError: no such dataset.
    """
    entries = list(_entries().values())
    index = find_name(name, [(entry.name, entry.title) for entry in entries])
    if index is not None:
        return entries[index]
    raise RegistryError(f"no dataset {name!r} in the registry; it knows: {', '.join(names())}")


def group_unit(name: str) -> str:
    """Returns what the groups of a dataset are, "patient" or "lesion"; "patient" if the registry does not say."""
    try:
        entry = get(name)
    except ValueError:
        return "patient"
    return entry.group_unit if entry.group_unit and entry.group_pattern else "patient"


@functools.cache
def _entries() -> Mapping[str, DatasetEntry]:
    text = resources.files("medmamba.data").joinpath("registry.json").read_text(encoding="utf-8")
    return MappingProxyType({row["name"]: _entry(row) for row in json.loads(text)["datasets"]})


def _entry(row: dict[str, Any]) -> DatasetEntry:
    row = {"colour": row["channels"] == 3, **row}
    rule, source = row["split_rule"], dict(row["source"])
    source["md5"] = MappingProxyType({int(size): md5 for size, md5 in source.get("md5", {}).items()})
    row["split_rule"] = SplitRule(**{**rule, "fractions": tuple(rule["fractions"]) if rule["fractions"] else None})
    row["source"] = Source(**source)
    row["licence"] = Licence(**row["licence"])
    row["published"] = MappingProxyType({key: PublishedMetrics(**value) for key, value in row["published"].items()})
    row["elsewhere"] = tuple(PublishedMetrics(**value) for value in row.get("elsewhere", ()))
    row["aliases"] = MappingProxyType({key: tuple(value) for key, value in row.get("aliases", {}).items()})
    row["other_splits"] = tuple(MappingProxyType(value) for value in row.get("other_splits", ()))
    if "splits" in row:
        row["splits"] = MappingProxyType(row["splits"])
    for key in ("classes", "citation", "display_names", "class_counts"):
        if key in row:
            row[key] = tuple(row[key])
    return DatasetEntry(**row)
