"""Finds the images in folders, and counts what it passes over and why.

One set of rules serves prediction, training, evaluation and archives: a known image suffix decides by itself; any other
file is an image if its content says so, since scanners name files by UID ("1.3.6.1.4.1...", "CT.1.2.840...") or with
suffixes of their own (".IMA"). Everything left out is counted.
"""

from __future__ import annotations

import os
import stat
from collections import Counter
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from .formats import HEAD_BYTES, IMAGE_SUFFIXES, LEFTOVERS, OTHER_FORMATS, certain_format, is_dicomdir, suffix_of

_SYSTEM_FILES = frozenset(("thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"))
_SYSTEM_FOLDERS = frozenset(("__macosx", "@eadir", "$recycle.bin", "system volume information", "lost+found"))

HIDDEN = "hidden"
SYSTEM = "of the operating system"
UNREADABLE = "unreadable"
_FOLDER = "folder: "  # begins the reasons for folders
UNREADABLE_FOLDER = _FOLDER + "cannot be opened"


@dataclass
class PassedOver:
    """Files and folders that were left out, with the reason.

    Attributes:
        reasons: reason by path; a reason is a suffix (".txt") or a few words.
    """

    reasons: dict[str, str] = field(default_factory=dict)

    def add(self, path: str, reason: str) -> None:
        self.reasons[path] = reason

    @property
    def counts(self) -> Counter[str]:
        """Number of paths by reason."""
        return Counter(self.reasons.values())

    def __len__(self) -> int:
        return len(self.reasons)

    def __str__(self) -> str:
        """Returns a summary such as "passed over 3 files: 2 .txt, 1 hidden"; "" if nothing was passed over."""
        rows = sorted(self.counts.items(), key=lambda item: (-item[1], item[0]))
        files = [(reason, count) for reason, count in rows if not reason.startswith(_FOLDER)]
        folders = [(reason.removeprefix(_FOLDER), count) for reason, count in rows if reason.startswith(_FOLDER)]
        texts = []
        for what, group in (("file", files), ("folder", folders)):
            if group:
                total = sum(count for _, count in group)
                listed = ", ".join(f"{count} {reason}" for reason, count in group)
                texts.append(f"{total} {what}{'s' if total > 1 else ''}: {listed}")
        return f"passed over {' and '.join(texts)}" if texts else ""


@dataclass
class Found:
    """The images below a folder.

    Attributes:
        paths: relative to the folder, with forward slashes, sorted.
        passed_over: what is not among them.
        others: paths of files that are no images, in the form of `paths`, hidden and system files apart.
        folders: all folders that are not hidden, in the form of `paths`, without the folder itself.
    """

    paths: list[str] = field(default_factory=list)
    passed_over: PassedOver = field(default_factory=PassedOver)
    others: list[str] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)


def reason_by_path(path: str) -> str | None:
    """Returns why a relative path with forward slashes is left out whatever the file holds; None where it is not."""
    *folders, name = PurePosixPath(path).parts or ("",)
    if any(part.lower() in _SYSTEM_FOLDERS for part in folders) or name.lower() in _SYSTEM_FILES:
        return SYSTEM
    if any(part.startswith(".") for part in (*folders, name)):
        return HIDDEN
    suffix = suffix_of(name)
    if suffix in LEFTOVERS or name.endswith("~"):
        return "unfinished or backup copies"
    if suffix in OTHER_FORMATS:
        return suffix
    return "DICOMDIR (an index of images)" if is_dicomdir(name) else None


def reason_by_content(name: str, head: bytes) -> str | None:
    """Returns why a file without an image suffix is left out, given its first `HEAD_BYTES`; None for an image."""
    if is_dicomdir(name, head):
        return "DICOMDIR (an index of images)"
    if certain_format(head):
        return None
    return suffix_of(name) or ("empty" if not head else "without suffix and not an image")


def has_image_suffix(name: str) -> bool:
    """Returns whether the name alone marks an image."""
    return suffix_of(name) in IMAGE_SUFFIXES


def find_in(root: str | os.PathLike[str]) -> Found:
    """Lists the images below a folder, recursively.

    Links to folders are followed, each real folder once, so that loops end; a folder counts under its own place, not
    under a link to it.
    """
    root = os.fspath(root)
    found = Found()
    visited: set[str] = set()
    links = [""]
    while links:
        waiting, links = links, []
        for start in waiting:
            _walk(root, start, found, visited, links)
    found.paths.sort()
    return found


def reason_to_pass(path: str | os.PathLike[str], relative: str) -> str | None:
    """Returns why the file at `path`, called `relative` below what is searched, is left out; None for an image."""
    if reason := reason_by_path(relative):
        return reason
    try:
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode):
            return "not a regular file"
        if has_image_suffix(os.path.basename(relative)):
            return None
        with open(path, "rb") as stream:
            return reason_by_content(os.path.basename(relative), stream.read(HEAD_BYTES))
    except OSError:
        return "broken link" if os.path.islink(path) else UNREADABLE


def _walk(root: str, start: str, found: Found, visited: set[str], links: list[str]) -> None:
    """Adds what lies below one folder; links to folders wait until all real folders have been seen."""
    waiting = [start]
    while waiting:
        relative = waiting.pop()
        where = os.path.join(root, relative)
        real = os.path.realpath(where)
        if real in visited:
            found.passed_over.add(relative, _FOLDER + "link to one that is read already")
            continue
        visited.add(real)
        try:
            entries = sorted(os.scandir(where), key=lambda entry: entry.name)
        except OSError:
            found.passed_over.add(relative or root, UNREADABLE_FOLDER)
            continue
        for entry in entries:
            path = f"{relative}/{entry.name}" if relative else entry.name
            if not entry.is_dir():
                _sort_in(entry.path, path, found)
            elif entry.name.lower() in _SYSTEM_FOLDERS or entry.name.startswith("."):
                found.passed_over.add(path, _FOLDER + (HIDDEN if entry.name.startswith(".") else SYSTEM))
            else:
                found.folders.append(path)
                (links if entry.is_symlink() else waiting).append(path)


def _sort_in(path: str, relative: str, found: Found) -> None:
    reason = reason_to_pass(path, relative)
    if reason is None:
        found.paths.append(relative)
        return
    found.passed_over.add(relative, reason)
    if reason not in (HIDDEN, SYSTEM):
        found.others.append(relative)
