"""Matches the classes of a dataset to those of a model, by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from ..config import MedMambaConfig
from ..data import DatasetError, ImageDataset, registry
from ..utils.names import AmbiguousNameError, find_name, shown


def match_classes(dataset: ImageDataset, config: MedMambaConfig) -> ImageDataset:
    """Returns the dataset with its labels renumbered to the model's classes, of which it may have a subset.

    Raises:
        DatasetError: a class that the model does not know, or another task.
    """
    wanted = config.labels
    if (dataset.task == "multilabel") != (config.task == "multilabel"):  # grades are classes, in order
        raise DatasetError(f"{dataset.name} is a {dataset.task} task and the model is {config.task}")
    if list(dataset.classes) == wanted:
        return dataset
    entry = _entry_of(config)
    try:
        numbers = [find_name(name, wanted) for name in dataset.classes]
        if entry and None in numbers:  # the data may use short names: "NORM" for "normal colon mucosa"
            numbers = [entry.class_index(name) for name in dataset.classes]
    except AmbiguousNameError as error:
        raise DatasetError(f"{dataset.name}: class {error}; the model has both") from error
    unknown = [name for name, number in zip(dataset.classes, numbers, strict=True) if number is None]
    if unknown:
        raise DatasetError(
            f"{dataset.name}: the model does not know {', '.join(unknown)}; it knows {', '.join(wanted)}. Rename the "
            "classes, name the dataset (dataset=...), or train a model for these"
        )
    for number in set(numbers):
        same = [name for name, other in zip(dataset.classes, numbers, strict=True) if other == number]
        if len(same) > 1 and number is not None:
            raise DatasetError(
                f"{dataset.name}: classes {shown(*same)} would all be the model's {wanted[number]!r}; merge them where "
                "they are the same, or rename them"
            )
    place = [number for number in numbers if number is not None]

    def renumbered(label: int | tuple[int, ...]) -> int | tuple[int, ...]:
        if isinstance(label, int):
            return place[label]
        present = {place[i] for i, value in enumerate(label) if value}
        return tuple(int(i in present) for i in range(len(wanted)))

    records = [dataclasses.replace(record, label=renumbered(record.label)) for record in dataset.records]
    return ImageDataset(records, wanted, dataset.reader, dataset.task, dataset.transform, dataset.name, dataset.notes)


def propose_classes(dataset: ImageDataset, config: MedMambaConfig) -> dict[str, str] | None:
    """Returns what the classes of a dataset may be for a model that does not know all their names, else None.

    Classes with a known name keep it, the others are taken in order. This is a guess that a person has to confirm, and
    only made where there are as many classes as the model has.
    """
    wanted = config.labels
    if len(dataset.classes) != len(wanted) or (dataset.task == "multilabel") != (config.task == "multilabel"):
        return None
    try:
        found = {name: find_name(name, wanted) for name in dataset.classes}
    except AmbiguousNameError:
        return None
    known = [number for number in found.values() if number is not None]
    if len(set(known)) != len(known):
        return None
    free = iter([name for number, name in enumerate(wanted) if number not in known])
    return {name: next(free) if number is None else wanted[number] for name, number in found.items()}


def rename_classes(dataset: ImageDataset, names: Mapping[str, str]) -> ImageDataset:
    """Returns the dataset with other names for its classes, and a note about that.

    Args:
        names: new name of each class that gets one.
    """
    new = [names.get(name, name) for name in dataset.classes]
    changed = [f"{a!r} as {b!r}" for a, b in zip(dataset.classes, new, strict=True) if a != b]
    notes = (*dataset.notes, f"classes were taken by the user's word: {', '.join(changed)}")
    return ImageDataset(dataset.records, new, dataset.reader, dataset.task, dataset.transform, dataset.name, notes)


def _entry_of(config: MedMambaConfig) -> registry.DatasetEntry | None:
    """Returns the registry entry of the model's training data if its classes are the model's."""
    name = config.training.get("dataset")
    if not name or str(name) not in registry.names():
        return None
    entry = registry.get(str(name))
    return entry if list(entry.id2label.values()) == config.labels else None
