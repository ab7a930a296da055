"""Resolves the file paths in a table, including paths written on another system."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from ..imaging.formats import IMAGE_SUFFIXES
from ..utils.names import shown
from .dataset import DatasetError


def locate(texts: Sequence[tuple[int, str]], folder: Path, where: str) -> tuple[list[str], list[str]]:
    """Returns the path of each image below `folder` with forward slashes, and notes.

    A path is taken as it stands; where there is no such file, backslashes are tried as separators, and the other
    Unicode form of the name.

    Args:
        texts: line and path of each row.
        where: the table, for messages.

    Raises:
        DatasetError: files that do not exist, with a hint why where one is found.
    """
    found: list[str] = []
    missing: list[str] = []
    changed = {"backslashes": 0, "Unicode": 0}
    for line, text in texts:
        if not text:
            raise DatasetError(f"{where}, line {line}: no path")
        for what, path in _spellings(text):
            if (folder / path).is_file():
                found.append(str(PurePosixPath(path)))
                if what:
                    changed[what] += 1
                break
        else:
            missing.append(text)
    if missing:
        raise DatasetError(
            f"{where}: {len(missing)} of {len(texts)} images do not exist below {folder}, such as "
            f"{', '.join(missing[:3])}; {_hint(missing[0], folder)}"
        )
    notes = []
    if changed["backslashes"]:
        notes.append(f"{changed['backslashes']} paths hold backslashes, as Windows writes them; read as separators")
    if changed["Unicode"]:
        notes.append(f"{changed['Unicode']} paths name files in another Unicode form, which were taken")
    return found, notes


def _spellings(text: str) -> list[tuple[str, str]]:
    spellings = [("", text)]
    if "\\" in text:
        spellings.append(("backslashes", text.replace("\\", "/")))
    for _, path in tuple(spellings):
        if not path.isascii():
            spellings += [("Unicode", unicodedata.normalize(form, path)) for form in ("NFC", "NFD")]
    return spellings


def _hint(text: str, folder: Path) -> str:
    """Returns why the file was probably not found, else how paths are resolved."""
    path = text.replace("\\", "/")
    rule = "paths are relative to the CSV file unless root= of open_csv says otherwise"
    if re.match(r"[A-Za-z]:/|//", path):
        return f"these are absolute paths of a Windows computer: make them relative to {folder}"
    parent, name = os.path.split(path)
    try:
        beside = os.listdir(folder / parent)
    except OSError:
        return rule
    alike = [other for other in beside if other.casefold() == name.casefold()]
    longer = [other for other in beside if os.path.splitext(other)[0] == name]
    longer = [other for other in longer if os.path.splitext(other)[1].lower() in IMAGE_SUFFIXES]
    if alike:
        return f"there is {shown(alike[0])}, which differs in upper and lower case"
    if longer:
        return f"there is {shown(longer[0])}: write the suffix too"
    return rule
