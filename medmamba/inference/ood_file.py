"""The file `unusual.json`: plain JSON, arrays as base64 of little-endian numbers; version 1 holds lists of numbers."""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..config import ConfigError
from ..utils import config_checks as checks
from .ood_parts import Combined, Part

VERSION = 2
_TYPES = {"float16": "<f2", "float32": "<f4"}
_MOST = 1 << 22  # numbers in one array
_MOST_PARTS = 32
_DIGITS = 5  # significant, in lists


def rounded(values: np.ndarray) -> list[float]:
    """Returns numbers with few digits, for a list in the file."""
    return [float(f"{value:.{_DIGITS}g}") for value in values]


def packed(values: np.ndarray, kind: str = "float32") -> dict[str, Any]:
    """Returns an array as plain data."""
    data = base64.b64encode(np.ascontiguousarray(values, dtype=_TYPES[kind]).tobytes()).decode("ascii")
    return {"dtype": kind, "shape": list(values.shape), "data": data}


def unpacked(found: Any, name: str, shape: tuple[int | None, ...]) -> NDArray[np.float64]:
    """Returns a packed array, or a list of numbers.

    Args:
        shape: expected; None stands for any number from 1.

    Raises:
        ConfigError: anything else, or numbers that are not finite.
    """
    if isinstance(found, Mapping):
        if found.get("dtype") not in _TYPES or not isinstance(found.get("data"), str):
            raise ConfigError(f"{name} must hold dtype ({', '.join(_TYPES)}), shape and data")
        size = [checks.integer(n, f"{name}.shape", 0, _MOST) for n in checks.several(found["shape"], name, 3)]
        try:
            data = base64.b64decode(found["data"], validate=True)
        except (binascii.Error, ValueError) as error:
            raise ConfigError(f"{name} is not base64: {error}") from error
        kind = np.dtype(_TYPES[found["dtype"]])
        if math.prod(size) > _MOST or len(data) != math.prod(size) * kind.itemsize:
            raise ConfigError(f"{name} holds {len(data)} bytes, not an array {tuple(size)}")
        values = np.frombuffer(data, kind).reshape(size).astype(np.float64)
    else:
        values = np.array(found, np.float64)
    lengths: tuple[int, ...] = values.shape
    fits = values.ndim == len(shape)
    fits = fits and all(n > 0 and wanted in (None, n) for n, wanted in zip(lengths, shape, strict=True))
    if not fits:
        expected = ", ".join("n" if n is None else str(n) for n in shape)
        raise ConfigError(f"{name} has the shape {values.shape}, not ({expected})")
    if not np.isfinite(values).all():
        raise ConfigError(f"{name} holds numbers that are not finite")
    return values


def write_combined(found: Combined) -> dict[str, Any]:
    """Returns the parts of a detector as plain data."""
    return {
        "far": found.far,
        "pixel_limit": found.pixel_limit,
        "centre": packed(found.centre),
        "reach": packed(found.reach),
        "parts": [
            {
                "name": part.name,
                "first": part.first,
                "mean": packed(part.mean),
                "std": packed(part.std),
                "axes": packed(part.axes, "float16"),
                "variances": packed(part.variances),
                "rest": part.rest,
            }
            for part in found.parts
        ],
    }


def read_combined(found: Any) -> Combined:
    """Validates what `write_combined` returned, and returns the parts.

    Raises:
        ConfigError: values that do not fit together.
    """
    if not isinstance(found, Mapping):
        raise ConfigError("combined must be an object")
    parts, start = [], 0
    for i, part in enumerate(checks.several(found["parts"], "parts", _MOST_PARTS)):
        name = f"parts[{i}]"
        mean = unpacked(part["mean"], f"{name}.mean", (None,))
        axes = unpacked(part["axes"], f"{name}.axes", (None, len(mean)))
        std = unpacked(part["std"], f"{name}.std", (len(mean),))
        variances = unpacked(part["variances"], f"{name}.variances", (len(axes),))
        rest = checks.real(part["rest"], f"{name}.rest", 1e-30, 1e30)
        if checks.integer(part["first"], f"{name}.first", 0, _MOST) != start:
            raise ConfigError(f"{name} begins at column {part['first']}, not at {start}")
        if not (std > 0).all() or not (variances > 0).all():
            raise ConfigError(f"{name} has a deviation that is not positive")
        parts.append(Part(checks.text(part["name"], f"{name}.name", 100), start, mean, std, axes, variances, rest))
        start = parts[-1].end
    if not parts:
        raise ConfigError("there are no parts")
    count = 1 + 2 * len(parts)
    centre, reach = (unpacked(found[name], name, (count,)) for name in ("centre", "reach"))
    if not (reach > 0).all():
        raise ConfigError("reach must be positive")
    far, limit = (checks.real(found[name], name, 0, 1e30) for name in ("far", "pixel_limit"))
    return Combined(tuple(parts), centre, reach, far, limit)
