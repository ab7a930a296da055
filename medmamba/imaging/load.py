"""Reads medical images from files, objects or arrays into one plain form.

`load_image` takes anything and returns a `MedicalImage`: float32 pixels `(H, W, C)` in [0, 1], `C` = 1 for grey and
3 for colour, plus a list of what was done on the way. It never resizes, never normalises by the content of the image,
and raises `ImageError`, with advice how to fix it, rather than return a doubtful image.

How stored values become [0, 1]: by the range that the format declares (1 bit: 1, 8 bits: 255, 12-bit TIFF: 4095,
16 bits: 65535), never by the largest value found; floating point must be in [0, 1] already. Integers without a declared
range (signed, 32 and 64 bits) need an explicit `window`. DICOM has rules of its own, see `medmamba.imaging.dicom`.
"""

from __future__ import annotations

import glob
import io
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, TypeAlias, Union

import numpy as np
from PIL import Image

from .dicom import load_dicom
from .find import PassedOver, find_in, reason_to_pass
from .formats import DICOM_SUFFIXES, IMAGE_SUFFIXES, describe, sniff
from .image import (
    MAX_PIXELS,
    ImageError,
    MedicalImage,
    MissingDependencyError,
    Window,
    check_window,
    is_dataset,
    naming_errors,
    open_binary,
    source_name,
)
from .raster import load_array, load_pil, load_raster

if TYPE_CHECKING:
    from pydicom import Dataset

__all__ = [
    "IMAGE_SUFFIXES",
    "MAX_PIXELS",
    "FoundImages",
    "ImageError",
    "ImageSource",
    "MedicalImage",
    "MissingDependencyError",
    "expand_inputs",
    "find_images",
    "load_image",
]

ImageSource: TypeAlias = Union[str, "os.PathLike[str]", bytes, BinaryIO, Image.Image, np.ndarray, "Dataset"]


def load_image(source: ImageSource, *, frame: int | None = None, window: Window | None = None) -> MedicalImage:
    """Reads one image.

    Args:
        source: path of a PNG, JPEG, WebP, TIFF, BMP, GIF or DICOM file (recognised by content, not by name); the bytes
            of one, or a binary file object; a `PIL.Image`; a pydicom `Dataset`; or a numpy array `(H, W)`,
            `(H, W, 1)`, `(H, W, 3)` or `(H, W, 4)` of bool, uint8, uint16 or float in [0, 1].
        frame: index from 0, required where the source holds several (animations, multi-page TIFF, multi-frame DICOM).
        window: `(center, width)` in raw units of a grey image: `center - width / 2` becomes 0 and `center + width / 2`
            becomes 1. For DICOM it replaces the file's own window and follows the file's VOI function, so that
            passing the file's own window changes nothing.

    Transparency is composited on black, except that an alpha channel that is zero everywhere is ignored. Pixel
    padding of DICOM is drawn black. Colour profiles are not applied. All of it is listed in `MedicalImage.notes`;
    what makes a result unreliable (most of a 16-bit range unused, a window that cannot be read, a picture that
    shows next to nothing) is in `MedicalImage.warnings`.

    Raises:
        ImageError: missing, empty, damaged, too large (`MAX_PIXELS`) or unsupported image, or arguments that do not fit
            it; `MissingDependencyError` (also an `ImportError`) where a package is needed to read it.
    """
    name = source_name(source)
    with naming_errors(source):
        check_window(window)
        if isinstance(source, np.ndarray):
            return load_array(source, name, frame, window)
        if isinstance(source, Image.Image):
            return load_pil(source, name, frame, window)
        if is_dataset(source):
            return load_dicom(source, name, frame, window)
        with open_binary(source) as stream:
            return _load_stream(stream, name, frame, window)


def load_named(content: bytes, path: str, *, frame: int | None = None, window: Window | None = None) -> MedicalImage:
    """Reads one image from bytes that stand for a file called `path`, such as a member of an archive.

    Raises:
        ImageError: as `load_image`, with the path.
    """
    with naming_errors(path):
        return _load_stream(io.BytesIO(content), source_name(path), frame, window)


@dataclass(frozen=True)
class FoundImages:
    """What files, folders and patterns stand for.

    Attributes:
        paths: the images, sorted, each file once.
        passed_over: what folders and patterns hold besides, with the reasons.
    """

    paths: list[Path]
    passed_over: PassedOver

    def __str__(self) -> str:
        images = f"{len(self.paths)} {'image' if len(self.paths) == 1 else 'images'}"
        return f"{images}; {self.passed_over}" if self.passed_over else images


def expand_inputs(paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> list[Path]:
    """Turns files, folders and glob patterns into a sorted list of files without duplicates.

    `find_images` gives the same list together with what was passed over.
    """
    return find_images(paths).paths


def find_images(paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> FoundImages:
    """Finds the images that files, folders and glob patterns stand for.

    A file named outright is taken whatever it is called. Folders are searched recursively, links to folders included
    (each real folder once). There, and in the matches of a pattern, hidden files and folders and those of the operating
    system are passed over; of the rest, files with a suffix of `IMAGE_SUFFIXES` are taken, and files with another
    suffix or none if their content is that of an image, such as DICOM files that are named by a UID. `**` in a pattern
    is recursive.

    Raises:
        ImageError: an entry that matches no image; nothing given at all.
    """
    entries = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
    if not entries:
        raise ImageError("no images given; name files, folders or patterns such as 'scans/*.png'")
    found: dict[str, Path] = {}
    left = PassedOver()
    for entry in entries:
        passed = PassedOver()
        matches, reason = _matches(os.fspath(entry), passed)
        if not matches:
            raise ImageError(f"{entry}: {reason}{f'; {passed}' if passed else ''}")
        for match in matches:
            found.setdefault(os.path.realpath(match), match)
        left.reasons.update(passed.reasons)
    for path in found:
        left.reasons.pop(path, None)
    return FoundImages(sorted(found.values()), left)


def _matches(entry: str, passed: PassedOver) -> tuple[list[Path], str]:
    """Returns the files that `entry` matches, and a reason for the case that there are none."""
    path = Path(entry)
    if entry and path.is_dir():
        suffixes = " ".join(sorted(IMAGE_SUFFIXES))
        return _below(path, passed), f"no images in this folder (looked for {suffixes}, and at what other files hold)"
    if entry and path.exists():
        return [path], ""
    if not glob.has_magic(entry):
        return [], "no such file or folder"
    files = []
    for hit in map(Path, glob.glob(entry, recursive=True)):
        if hit.is_dir():
            files += _below(hit, passed)
        elif reason := reason_to_pass(hit, hit.name):
            passed.add(_place(hit), reason)
        else:
            files.append(hit)
    return files, "no image matches this pattern"


def _below(folder: Path, passed: PassedOver) -> list[Path]:
    found = find_in(folder)
    for relative, reason in found.passed_over.reasons.items():
        passed.add(_place(folder / relative), reason)
    return [folder / relative for relative in found.paths]


def _place(path: Path) -> str:
    """Returns a path that identifies a file however it was reached; links keep their own location."""
    return os.path.join(os.path.realpath(path.parent), path.name)


def _load_stream(stream: BinaryIO, name: str, frame: int | None, window: Window | None) -> MedicalImage:
    head = stream.read(512)
    stream.seek(0)
    if not head:
        raise ImageError("the file is empty (0 bytes); copy or export it again")
    kind = sniff(head)
    if kind == "DICOM" or (kind is None and name.lower().endswith(DICOM_SUFFIXES)):
        return load_dicom(stream, name, frame, window)
    if kind is None:
        raise ImageError(f"{describe(head)}. Supported: PNG, JPEG, WebP, TIFF, BMP, GIF, DICOM")
    return load_raster(stream, name, kind, frame, window)
