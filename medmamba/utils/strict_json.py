"""Reads JSON from untrusted files: no NaN, no duplicate keys, no size without limit."""

import json
import math
import os
from pathlib import Path
from typing import Any

MAX_BYTES = 16 * 2**20


class StrictJsonError(ValueError):
    """Text that is not JSON as RFC 8259 defines it, or that is too large; the message says which."""


def read_json(path: str | os.PathLike, most: int = MAX_BYTES) -> Any:
    """Reads a UTF-8 file of at most `most` bytes.

    Raises:
        OSError: the file cannot be read.
        StrictJsonError: too large, not UTF-8, or not strict JSON.
    """
    with Path(path).open("rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise StrictJsonError(f"larger than {most / 2**20:.0f} MiB, which no such file needs")
    try:
        return parse_json(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise StrictJsonError(f"not UTF-8: {error}") from error


def parse_json(text: str) -> Any:
    """Parses JSON; unlike `json.loads`, refuses what RFC 8259 does not have or leaves open.

    Raises:
        StrictJsonError: NaN or Infinity, a number beyond float64, a key twice in one object, too deep nesting.
    """
    try:
        return json.loads(text, parse_constant=_constant, parse_float=_number, object_pairs_hook=_unique)
    except RecursionError as error:
        raise StrictJsonError("nested too deeply") from error
    except StrictJsonError:
        raise
    except ValueError as error:  # JSONDecodeError, and integers of more digits than Python converts
        raise StrictJsonError(str(error)) from error


def _constant(name: str) -> Any:
    raise StrictJsonError(f"{name} is not a JSON number")


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise StrictJsonError(f"the number {text[:40]} is beyond the range of float64")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise StrictJsonError(f"the key {key[:80]!r} stands twice in one object")
            seen.add(key)
    return found
