"""Resolves the file paths in a table, including paths written on another system."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Collection, Sequence
from pathlib import Path, PurePosixPath

from ..imaging.formats import IMAGE_SUFFIXES
from ..utils.names import shown
from .dataset import DatasetError


def locate(
    texts: Sequence[tuple[int, str]], folder: Path, where: str, members: Collection[str] | None = None
) -> tuple[list[str], list[str]]:
    """Returns the path of each image below `folder` with forward slashes, and notes.

    A path is taken as it stands; where there is no such file, backslashes are tried as separators, and the other
    Unicode form of the name.

    Args:
        texts: line and path of each row.
        where: the table, for messages.
        members: the paths of all files there, such as those in an archive. A path that is not among them is then found
            by its last part, if only one file ends with it.

    Raises:
        DatasetError: files that do not exist, with a hint why where one is found.
    """
    found: list[str] = []
    missing: list[str] = []
    changed = {"backslashes": 0, "Unicode": 0, "name": 0}
    known = None if members is None else _Members(members)
    for line, text in texts:
        if not text:
            raise DatasetError(f"{where}, line {line}: no path")
        spellings = _spellings(text)
        if known is not None:
            spellings += [("name", member) for _, path in spellings if (member := known.ending(path)) is not None]
        for what, path in spellings:
            if (folder / path).is_file() if known is None else str(PurePosixPath(path)) in known.paths:
                found.append(str(PurePosixPath(path)))
                if what:
                    changed[what] += 1
                break
        else:
            missing.append(text)
    if missing:
        hint = _hint(missing[0], folder) if known is None else known.hint(missing[0])
        raise DatasetError(
            f"{where}: {len(missing)} of {len(texts)} images do not exist below {folder}, such as "
            f"{', '.join(missing[:3])}; {hint}"
        )
    notes = []
    if changed["backslashes"]:
        notes.append(f"{changed['backslashes']} paths hold backslashes, as Windows writes them; read as separators")
    if changed["Unicode"]:
        notes.append(f"{changed['Unicode']} paths name files in another Unicode form, which were taken")
    if changed["name"]:
        notes.append(f"{changed['name']} images were found by their file name, not by the folder in the table")
    return found, notes


class _Members:
    """The files of an archive or folder, by path and by the end of their path."""

    def __init__(self, paths: Collection[str]) -> None:
        self.paths = frozenset(paths)
        self._by_name: dict[str, list[str]] = {}
        for path in sorted(self.paths):
            self._by_name.setdefault(PurePosixPath(path).name, []).append(path)

    def ending(self, text: str) -> str | None:
        """Returns the only file whose path ends with this one or, if there is none, that has its name."""
        path = PurePosixPath(text)
        alike = self._by_name.get(path.name, [])
        closest = [other for other in alike if f"/{other}".endswith(f"/{path}")] or alike
        return closest[0] if len(closest) == 1 else None

    def hint(self, text: str) -> str:
        """Returns why a file was probably not found."""
        alike = self._by_name.get(PurePosixPath(text.replace("\\", "/")).name, [])
        if alike:
            return f"several files have this name, {shown(*alike)}: write their folders too"
        return "paths are those of the files given, or their names"


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
