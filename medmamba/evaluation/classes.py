"""Matches the classes of a dataset to those of a model, by name."""

from __future__ import annotations

import dataclasses

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


def _entry_of(config: MedMambaConfig) -> registry.DatasetEntry | None:
    """Returns the registry entry of the model's training data if its classes are the model's."""
    name = config.training.get("dataset")
    if not name or str(name) not in registry.names():
        return None
    entry = registry.get(str(name))
    return entry if list(entry.id2label.values()) == config.labels else None
