"""Groups DICOM files by patient, study or series, in memory: no identifier is returned, written or quoted.

>>> numbers = group_files(paths, "study")  # 0, 0, 1, ...
>>> names = pseudonyms(paths, key, "study")  # the same study has the same name wherever the same key is used
"""

from __future__ import annotations

import hashlib
import hmac
import os
import warnings
from collections.abc import Iterable, Sequence

from ...utils.extras import require

LEVELS = ("patient", "study", "series")
_KEYWORDS = {
    "patient": ("IssuerOfPatientID", "PatientID"),
    "study": ("StudyInstanceUID",),
    "series": ("SeriesInstanceUID",),
}
LEAST_KEY = 16  # bytes


def group_files(paths: Iterable[str | os.PathLike], level: str = "study") -> list[int | None]:
    """Returns the number of the group of each file, counted from 0 in order of appearance.

    None for files that are no DICOM, cannot be read, or do not say: each is then a group of its own.

    Args:
        level: "patient" (issuer and patient ID), "study" or "series" (their instance UIDs).

    Raises:
        ValueError: unknown level.
        ImportError: pydicom is missing.
    """
    numbers: dict[tuple[str, ...], int] = {}
    found = (_identity(path, level) for path in paths)
    return [None if one is None else numbers.setdefault(one, len(numbers)) for one in found]


def pseudonyms(paths: Iterable[str | os.PathLike], key: bytes, level: str = "study") -> list[str | None]:
    """Returns a name for the group of each file that only the holder of the key can link to it: 16 hexadecimal digits.

    A keyed hash (HMAC-SHA256) of the identifier: without the key nobody can try out identifiers. None as in
    `group_files`.

    Raises:
        ValueError: unknown level, or a key of fewer than 16 bytes.
        ImportError: pydicom is missing.
    """
    if len(key) < LEAST_KEY:
        raise ValueError(
            f"the key has {len(key)} bytes and needs at least {LEAST_KEY}: make one with "
            '`python -c "import secrets; print(secrets.token_hex(32))"`, and keep it where the images are'
        )
    return [None if one is None else _name(key, level, one) for one in (_identity(path, level) for path in paths)]


def _name(key: bytes, level: str, identity: Sequence[str]) -> str:
    message = "\0".join((level, *identity)).encode()
    return hmac.new(key, message, hashlib.sha256).hexdigest()[:16]


def _identity(path: str | os.PathLike, level: str) -> tuple[str, ...] | None:
    if level not in LEVELS:
        raise ValueError(f"level must be {', '.join(LEVELS)}, got {level!r}")
    require("pydicom", "grouping DICOM files")
    import pydicom
    from pydicom.errors import InvalidDicomError

    names = _KEYWORDS[level]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom's warnings quote values of the header
        try:
            dataset = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=list(names))
            values = tuple(str(dataset.get(name) or "").strip() for name in names)
        except (InvalidDicomError, OSError, ValueError, KeyError, TypeError, AttributeError, EOFError):
            return None
    return values if values[-1] else None
