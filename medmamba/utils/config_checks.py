"""Checks of single values in a configuration, which may come from an untrusted file.

Each returns the value in its type, or raises `ConfigError` with the name of the field. Nothing is coerced: 2.7 is not a
number of blocks, "0.5" not a mean, True not an integer.
"""

import math
import numbers
import operator
import re
import unicodedata
from collections.abc import Iterable, Mapping
from typing import Any

from .names import canonical

MAX_CLASSES = 100_000
MAX_TEXT = 10_000  # characters of one text in a record
MAX_LABEL = 300  # characters
MAX_RECORD = 200_000  # values in a record
MAX_DEPTH = 16  # of nested records
# Characters that reorder the text around them: a label could be shown as another.
_REORDERING = {*map(chr, range(0x202A, 0x202F)), *map(chr, range(0x2066, 0x206A)), "\u200e", "\u200f"}
_OOD_FIELDS = {"score", "threshold", "coverage"}


class ConfigError(ValueError):
    """A configuration that is foreign, incomplete or contradicts itself."""


def integer(value: Any, name: str, low: int, high: int) -> int:
    """Returns an integer within [low, high]; accepts NumPy integers and integral floats such as 4.0."""
    try:
        if isinstance(value, bool):
            raise TypeError
        number = int(value) if isinstance(value, float) and value.is_integer() else operator.index(value)
    except (TypeError, ValueError):
        raise ConfigError(f"{name} must be an integer, got {_shown(value)}") from None
    if not low <= number <= high:
        many = f"at least {low}" if number < low else f"at most {high:,}"
        raise ConfigError(f"{name} must be {many}, got {_shown(number)}")
    return number


def real(value: Any, name: str, low: float, high: float, open_high: bool = False) -> float:
    """Returns a finite number within [low, high], or [low, high) if `open_high`."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ConfigError(f"{name} must be a number, got {_shown(value)}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ConfigError(f"{name} must be finite, got {_shown(number)}")
    if not (low <= number < high if open_high else low <= number <= high):
        raise ConfigError(f"{name} must be from {low:g} to {high:g}, got {number:g}")
    return number


def text(value: Any, name: str, most: int = MAX_TEXT) -> str:
    """Returns a text of at most `most` characters without control characters, which drive a terminal."""
    if not isinstance(value, str):
        raise ConfigError(f"{name} must be text, got {_shown(value)}")
    if len(value) > most:
        raise ConfigError(f"{name} has {len(value)} characters; at most {most} are allowed")
    for character in value:
        if unicodedata.category(character) in ("Cc", "Cs") and character not in "\n\t\r":
            raise ConfigError(f"{name} has the control character {character!r}: {_shown(value)}")
    return value


def several(values: Any, name: str, most: int) -> list[Any]:
    """Returns the values, at most `most`, of a list, tuple or another sequence of numbers such as an array."""
    if isinstance(values, str | bytes | Mapping) or not isinstance(values, Iterable):
        raise ConfigError(f"{name} must be a list, got {_shown(values)}")
    found = []
    for value in values:
        found.append(value)
        if len(found) > most:
            raise ConfigError(f"{name} has more than {most} values")
    return found


def labels(found: Any, num_classes: int) -> dict[int, str]:
    """Returns class names by number; JSON turns integer keys into strings.

    Raises:
        ConfigError: not one name for each class, a name twice (also in another Unicode form), or an unreadable name.
    """
    if found is None or not isinstance(found, Mapping):
        raise ConfigError(f"id2label must map class numbers to names, got {_shown(found)}")
    if not found:
        return {i: f"class_{i}" for i in range(num_classes)}
    if len(found) != num_classes:
        raise ConfigError(f"id2label must name classes 0 to {num_classes - 1}; it names {_sample(found)}")
    named: dict[int, str] = {}
    for key, name in found.items():
        if isinstance(key, str) and re.fullmatch(r"0|[1-9][0-9]{0,9}", key):
            number = int(key)
        else:
            number = integer(key, "a class number in id2label", 0, MAX_CLASSES)
        if number in named:
            raise ConfigError(f"id2label names class {number} twice")
        named[number] = _label(name, number)
    if sorted(named) != list(range(num_classes)):
        raise ConfigError(f"id2label must name classes 0 to {num_classes - 1}; it names {_sample(sorted(named))}")
    alike: dict[str, int] = {}
    for number in range(num_classes):
        name = named[number]
        other = alike.setdefault(canonical(name), number)
        if other != number:
            raise ConfigError(f"classes {other} and {number} in id2label have the same name, {name!r}")
    return {number: named[number] for number in range(num_classes)}


def _label(name: Any, number: int) -> str:
    if isinstance(name, numbers.Integral) and not isinstance(name, bool):
        name = str(name)  # grades 0, 1, 2 are often stored as numbers
    name = text(name, f"the name of class {number}", MAX_LABEL)
    if not name.strip():
        raise ConfigError(f"the name of class {number} is empty")
    if any(character in _REORDERING or character in "\n\r\t" for character in name):
        raise ConfigError(f"the name of class {number} has a line break or reorders text: {name!r}")
    return name


def calibration(found: Any) -> dict[str, Any]:
    """Checks a record of `Calibration.to_dict`; {} if not calibrated. Single entries may be absent.

    Raises:
        ConfigError: a temperature that is not above 0, an unknown method, a threshold that is no number.
    """
    record = plain(found, "calibration")
    if record.get("method", "temperature") not in ("temperature", "none"):
        raise ConfigError(f"calibration.method must be temperature or none, got {_shown(record['method'])}")
    if "temperature" in record:
        record["temperature"] = real(record["temperature"], "calibration.temperature", 1e-3, 1e3)
    if "n" in record:
        integer(record["n"], "calibration.n", 0, 10**12)
    for name in ("ece_before", "ece_after"):
        if name in record:
            real(record[name], f"calibration.{name}", 0, 1)
    if "thresholds" in record:
        values = several(record["thresholds"], "calibration.thresholds", MAX_RECORD)
        record["thresholds"] = [real(value, "calibration.thresholds", 0, 1) for value in values]
    if "weights" in record:
        fingerprint(record["weights"], "calibration.weights")
    if "ood" in record and record["ood"] is not None:
        ood = record["ood"]
        if not isinstance(ood, dict) or (ood and set(ood) != _OOD_FIELDS):
            raise ConfigError(f"calibration.ood must have {', '.join(sorted(_OOD_FIELDS))}; got {_shown(ood)}")
        if ood:
            if ood["score"] not in ("energy", "max_prob"):
                raise ConfigError(f"calibration.ood.score must be energy or max_prob, got {_shown(ood['score'])}")
            real(ood["threshold"], "calibration.ood.threshold", -1e30, 1e30)
            real(ood["coverage"], "calibration.ood.coverage", 0, 1)
    return record


def fingerprint(found: Any, name: str) -> dict[str, list[float]]:
    """Checks a record of `medmamba.inference.fingerprint.fingerprint`: two numbers for each part of the network."""
    if not isinstance(found, Mapping) or not 0 < len(found) <= 100:
        raise ConfigError(f"{name} must be an object with two numbers for each part, got {_shown(found)}")
    parts = {text(part, f"a part in {name}", 200): several(pair, f"{name}.{part}", 2) for part, pair in found.items()}
    if any(len(pair) != 2 for pair in parts.values()):
        raise ConfigError(f"{name} must have two numbers for each part")
    return {part: [real(value, f"{name}.{part}", -1e9, 1e9) for value in pair] for part, pair in parts.items()}


_TEXTS = ("dataset", "source", "licence", "split", "recipe", "init", "base_model", "device", "precision", "note")
_COUNTS = ("epochs", "best_epoch", "processes")


def training(found: Any) -> dict[str, Any]:
    """Checks the record of a training run; free-form except for entries read by cards, licences and the app.

    Raises:
        ConfigError: not plain JSON values, or one of those entries of another type.
    """
    record = plain(found, "training")
    for name in _TEXTS:
        if record.get(name) is not None:
            text(record[name], f"training.{name}")
    for name in _COUNTS:
        if record.get(name) is not None:
            integer(record[name], f"training.{name}", 0, 10**12)
    if record.get("seconds") is not None:
        real(record["seconds"], "training.seconds", 0, 1e12)
    for name in ("pretraining", "selected_by"):
        if record.get(name) is not None:
            for word in several(record[name], f"training.{name}", 1000):
                text(word, f"training.{name}")
    for name in ("split_sizes", "settings", "versions", "origin", "identity"):
        if record.get(name) is not None and not isinstance(record[name], dict):
            raise ConfigError(f"training.{name} must be an object, got {_shown(record[name])}")
    for name, size in (record.get("split_sizes") or {}).items():
        integer(size, f"training.split_sizes[{name!r}]", 0, 10**12)
    if origin := record.get("origin"):
        _origin(origin)
    return record


def _origin(origin: dict[str, Any]) -> None:
    for name in ("file", "sha256", "url"):
        if name in origin:
            text(origin[name], f"training.origin.{name}")
    check = origin.get("check", {})
    if not isinstance(check, dict):
        raise ConfigError(f"training.origin.check must be an object, got {_shown(check)}")
    for name in ("largest_difference", "largest_logit", "images"):
        if name in check:
            real(check[name], f"training.origin.check.{name}", 0, 1e30)


def plain(found: Any, name: str) -> dict[str, Any]:
    """Returns a copy of a record after checking that it is plain JSON with finite numbers and within size limits.

    Raises:
        ConfigError: another type somewhere; the message says where.
    """
    if not isinstance(found, Mapping):
        raise ConfigError(f"{name} must be an object, got {_shown(found)}")
    left = [MAX_RECORD]
    return _plain(found, name, left, 0)


def _plain(value: Any, where: str, left: list[int], depth: int) -> Any:
    left[0] -= 1
    if left[0] < 0 or depth > MAX_DEPTH:
        raise ConfigError(f"{where.split('.')[0]} is too large or nested too deeply for a record")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return text(value, where)
    if isinstance(value, numbers.Integral):
        return integer(value, where, -(2**63), 2**64)
    if isinstance(value, numbers.Real):
        return real(value, where, -math.inf, math.inf)
    if isinstance(value, Mapping):
        for key in value:
            text(key, f"a key in {where}", 1000)
        return {str(key): _plain(item, f"{where}.{key}", left, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        kept = [_plain(item, f"{where}[{i}]", left, depth + 1) for i, item in enumerate(value)]
        return tuple(kept) if isinstance(value, tuple) else kept
    raise ConfigError(f"{where} must be text, a number, a list or an object, as JSON has; got {_shown(value)}")


def _shown(value: Any) -> str:
    shown = (
        f"{type(value).__name__}" if isinstance(value, dict | list | tuple | set) and len(value) > 8 else repr(value)
    )
    return shown if len(shown) <= 80 else shown[:77] + "..."


def _sample(keys: Iterable[Any]) -> str:
    keys = list(keys)
    return str(keys) if len(keys) <= 8 else f"{len(keys)} others"
