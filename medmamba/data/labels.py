"""Maps names of folders and labels to class indices, in an explicit order.

The published trainer numbers classes by the *alphabetical* order of their folder names. MedMNIST sets with
more than ten classes are often exported to folders "0" ... "10", which sort as 0, 1, 10, 2, ...: a model trained on
them has its outputs permuted against the official labels. `alphabetical_permutation(11)` is that permutation.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..utils.names import AmbiguousNameError, alike, shown, whole_number
from .dataset import DatasetError
from .registry import DatasetEntry

MISSING = frozenset(
    (
        "",
        "nan",
        "none",
        "na",
        "n/a",
        "n.a.",
        "#n/a",
        "#na",
        "<na>",
        "null",
        "nil",
        "nat",
        "-",
        "--",
        "---",
        "?",
        "??",
        ".",
    )
    + ("missing", "undefined", "#value!", "#ref!", "#div/0!")
)
"""Spellings of missing values in tables, in lower case."""

CLASS_ORDERS = ("auto", "numeric", "alphabetical")


def order_classes(names: Iterable[str], order: str = "auto") -> tuple[str, ...]:
    """Sorts class names.

    Args:
        names: names of folders or labels; repetitions are dropped.
        order: "alphabetical" compares characters, as torchvision's ImageFolder does ("10" before "2"); "numeric"
            compares numbers, for names that are all integers; "auto" is numeric where all are, else alphabetical.

    Raises:
        DatasetError: numeric order for names that are not integers.
    """
    if order not in CLASS_ORDERS:
        raise DatasetError(f"class_order must be one of {', '.join(CLASS_ORDERS)}, got {order!r}")
    unique = sorted(set(names))
    numbers = all(name.isdecimal() for name in unique)
    if order == "numeric" and not numbers:
        odd = next(name for name in unique if not name.isdecimal())
        raise DatasetError(f"class_order='numeric' needs names that are integers, but one is {odd!r}")
    if order == "alphabetical" or not numbers:
        return tuple(unique)
    return tuple(sorted(unique, key=int))


def alphabetical_permutation(num_classes: int) -> tuple[int, ...]:
    """Returns the official label of each output of a model trained on folders "0", "1", ... in alphabetical order.

    For 11 classes: (0, 1, 10, 2, 3, 4, 5, 6, 7, 8, 9). The identity up to ten classes. `head.weight[argsort(p)]`
    puts a head into the official order.
    """
    return tuple(sorted(range(num_classes), key=str))


def resolve_classes(
    found: Iterable[str], entry: DatasetEntry | None, classes: Sequence[str] | None, order: str, where: str
) -> tuple[tuple[str, ...], dict[str, int]]:
    """Returns class names in order, and the index of every name in `found`.

    Explicit `classes` win, then the registry entry (any spelling or alias it knows), then the sorted names themselves.

    Raises:
        DatasetError: a name that is no class.
    """
    unique = sorted(set(found))
    if classes is not None:
        names = tuple(classes)
        index = {name: names.index(name) if name in names else None for name in unique}
    elif entry is not None:
        names = entry.classes
        try:
            index = {name: entry.class_index(name) for name in unique}
        except AmbiguousNameError as exc:
            raise DatasetError(f"{where}: {exc}") from exc
    else:
        for same in alike(unique, whole_number):
            raise DatasetError(
                f"{where}: classes {shown(*same)} spell the same number; write it in one way where they are one class"
            )
        names = order_classes(unique, order)
        index = {name: names.index(name) for name in unique}
    unknown = [name for name, number in index.items() if number is None]
    if unknown:
        by_entry = classes is None and entry is not None
        source = f"dataset {entry.name}" if by_entry and entry else "the classes given"
        way = "leave out dataset= (--dataset) to take the names as they are" if by_entry else "correct classes="
        raise DatasetError(
            f"{where}: {shown(*unknown)} {'is' if len(unknown) == 1 else 'are'} not among {source} "
            f"({', '.join(names)}); rename, or {way}"
        )
    resolved = {name: number for name, number in index.items() if number is not None}
    shared = {number for number in resolved.values() if list(resolved.values()).count(number) > 1}
    if entry is not None and classes is None and shared:
        same = tuple(name for name, number in resolved.items() if number in shared)
        raise DatasetError(f"{where}: {shown(*same)} mean the same class of {entry.name}; merge them")
    return names, resolved


def is_missing(text: str) -> bool:
    """Returns whether a cell is a missing value in any of the usual spellings ("", "nan", "N/A", "?", ...)."""
    return text.strip().lower() in MISSING


def notes_on_names(names: Iterable[str]) -> list[str]:
    """Returns notes on suspicious class names: two that differ little, or one that reads like a missing value."""
    unique = sorted(set(names))
    notes = [
        f"classes {shown(*same)} differ in case, separators or width alone and count as {len(same)} classes"
        for same in alike(unique)
    ]
    empty = [name for name in unique if is_missing(name)]
    if empty:
        notes.append(f"class {shown(*empty)} reads like a missing label")
    return notes
