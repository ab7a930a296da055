"""Read a medical image from a file, an object or an array into one plain form.

`load_image` takes anything and returns a `MedicalImage`: float32 pixels `(H, W, C)` in [0, 1], `C` = 1 for grey and
3 for colour, plus a list of what was done on the way. It never resizes, never normalises by the content of the image,
and raises `ImageError`, with a text that says how to fix it, rather than return something doubtful.

How stored values become [0, 1]: by the range that the format declares (1 bit: 1, 8 bits: 255, 12-bit TIFF: 4095,
16 bits: 65535), never by the largest value found; floating point must be in [0, 1] already. Integers without a declared
range (signed, 32 and 64 bits) need an explicit `window`. DICOM has rules of its own, see `medmamba.dicom`.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, TypeAlias, Union

import numpy as np
from PIL import Image

from ._image import (
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
from .dicom import load_dicom
from .raster import load_array, load_pil, load_raster

if TYPE_CHECKING:
    from pydicom import Dataset

__all__ = [
    "IMAGE_SUFFIXES",
    "MAX_PIXELS",
    "ImageError",
    "ImageSource",
    "MedicalImage",
    "MissingDependencyError",
    "expand_inputs",
    "load_image",
]

ImageSource: TypeAlias = Union[str, "os.PathLike[str]", bytes, BinaryIO, Image.Image, np.ndarray, "Dataset"]

_DICOM_SUFFIXES = (".dcm", ".dicom", ".dic")
IMAGE_SUFFIXES = frozenset(
    (".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".tif", ".tiff", ".bmp", ".dib")
)
IMAGE_SUFFIXES |= {".gif", *_DICOM_SUFFIXES}

# How each supported format begins, and Pillow's name for it.
_RASTER_MAGIC = (
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"\xff\xd8\xff", "JPEG"),
    (b"II*\x00", "TIFF"),
    (b"MM\x00*", "TIFF"),
    (b"II+\x00", "TIFF"),
    (b"MM\x00+", "TIFF"),
    (b"GIF8", "GIF"),
    (b"BM", "BMP"),
)
# What people pass by mistake: beginning, what it is, what to do.
_OTHER_MAGIC = (
    (b"%PDF", "a PDF document", "export its pages as PNG"),
    (b"PK\x03\x04", "a ZIP archive", "unpack it first"),
    (b"\x1f\x8b", "a gzip archive (.gz, .nii.gz)", "unpack it first, and export slices of a volume as PNG"),
    (b"7z\xbc\xaf", "a 7-Zip archive", "unpack it first"),
    (b"Rar!", "a RAR archive", "unpack it first"),
    (b"\x93NUMPY", "a numpy file", "pass numpy.load(path) instead of the path"),
    (b"\x89HDF", "an HDF5 file", "read the array with h5py and pass the array"),
    (b"\x00\x00\x00\x0cjP  ", "a JPEG 2000 file", "save it as PNG"),
    (b"\xff\x4f\xff\x51", "a JPEG 2000 codestream", "save it as PNG"),
    (b"8BPS", "a Photoshop file", "save it as PNG"),
    (b"v/1\x01", "an OpenEXR file", "save it as 16-bit PNG"),
    (b"NRRD", "an NRRD volume", "export slices as PNG or DICOM"),
    (b"\x5c\x01\x00\x00", "a NIfTI volume", "export slices as PNG or DICOM"),
)


def load_image(source: ImageSource, *, frame: int | None = None, window: Window | None = None) -> MedicalImage:
    """Read one image.

    Args:
        source: path of a PNG, JPEG, WebP, TIFF, BMP, GIF or DICOM file (recognised by content, not by name); the bytes
            of one, or a binary file object; a `PIL.Image`; a pydicom `Dataset`; or a numpy array `(H, W)`,
            `(H, W, 1)`, `(H, W, 3)` or `(H, W, 4)` of bool, uint8, uint16 or float in [0, 1].
        frame: index from 0, required where the source holds several (animations, multi-page TIFF, multi-frame DICOM).
        window: `(center, width)` in raw units of a grey image: `center - width / 2` becomes 0 and `center + width / 2`
            becomes 1. For DICOM it replaces the file's own window and follows the file's VOI function, so that
            passing the file's own window changes nothing.

    Transparency is composited on black, except that an alpha channel that is zero everywhere is ignored. 16-bit colour
    keeps its upper 8 bits. Colour profiles are not applied. All of it is said in `MedicalImage.notes`.

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


def expand_inputs(paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> list[Path]:
    """Turn files, folders and glob patterns into a sorted list of files without duplicates.

    A file named outright is taken whatever its suffix. Folders are searched recursively, without following links to
    other folders; there, and in the matches of a pattern, hidden files and folders are skipped and only files with a
    suffix of `IMAGE_SUFFIXES`, or without suffix but with DICOM content, are taken. `**` in a pattern is recursive.

    Raises:
        ImageError: an entry that matches no image; nothing given at all.
    """
    entries = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
    if not entries:
        raise ImageError("no images given; name files, folders or patterns such as 'scans/*.png'")
    found: dict[str, Path] = {}
    for entry in entries:
        matches, reason = _matches(os.fspath(entry))
        if not matches:
            raise ImageError(f"{entry}: {reason}")
        for match in matches:
            found.setdefault(os.path.realpath(match), match)
    return sorted(found.values())


def _matches(entry: str) -> tuple[list[Path], str]:
    """Files that `entry` stands for, and the reason in case there are none."""
    path = Path(entry)
    if entry and path.is_dir():
        return list(_images_in(path)), f"no images in this folder (looked for {' '.join(sorted(IMAGE_SUFFIXES))})"
    if entry and path.exists():
        return [path], ""
    if not glob.has_magic(entry):
        return [], "no such file or folder"
    hits = [Path(hit) for hit in glob.glob(entry, recursive=True)]
    files = [hit for hit in hits if hit.is_file() and _is_image_name(hit)]
    return files + [image for hit in hits if hit.is_dir() for image in _images_in(hit)], "no image matches this pattern"


def _images_in(folder: Path) -> Iterator[Path]:
    for where, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            path = Path(where, name)
            if not name.startswith(".") and path.is_file() and _is_image_name(path):
                yield path


def _is_image_name(path: Path) -> bool:
    if path.suffix:
        return path.suffix.lower() in IMAGE_SUFFIXES
    try:
        with path.open("rb") as stream:
            # A DICOMDIR is an index of DICOM files and holds no image itself.
            return path.name.upper() != "DICOMDIR" and stream.read(132)[128:] == b"DICM"
    except OSError:
        return False


def _load_stream(stream: BinaryIO, name: str, frame: int | None, window: Window | None) -> MedicalImage:
    head = stream.read(512)
    stream.seek(0)
    if not head:
        raise ImageError("the file is empty (0 bytes); copy or export it again")
    kind = _sniff(head)
    if kind == "DICOM" or (kind is None and name.lower().endswith(_DICOM_SUFFIXES)):
        return load_dicom(stream, name, frame, window)
    if kind is None:
        raise ImageError(f"{_what_it_is(head)}. Supported: PNG, JPEG, WebP, TIFF, BMP, GIF, DICOM")
    return load_raster(stream, name, kind, frame, window)


def _sniff(head: bytes) -> str | None:
    """The format ("DICOM" or Pillow's name) by content, or None."""
    # DICOM first, because its preamble may hold the header of a TIFF.
    if head[128:132] == b"DICM":
        return "DICOM"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    for magic, kind in _RASTER_MAGIC:
        if head.startswith(magic):
            return kind
    # DICOM without preamble begins with an element of group 2 or 8, explicit (two-letter VR) or implicit (short value).
    if head[:2] in (b"\x02\x00", b"\x08\x00", b"\x00\x08") and len(head) >= 8:
        explicit = head[4:6].isalpha() and head[4:6].isupper()
        implicit = head[0] != 0 and head[3] == 0 and head[5:8] == b"\x00\x00\x00"
        return "DICOM" if explicit or implicit else None
    return None


def _what_it_is(head: bytes) -> str:
    for magic, what, advice in _OTHER_MAGIC:
        if head.startswith(magic):
            return f"this is {what}, not an image file; {advice}"
    if head[4:8] == b"ftyp":
        return "this is a HEIC, AVIF or video file, which is not supported; save it as JPEG or PNG"
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith((b"<svg", b"<?xml", b"<!doctype", b"<html")):
        return "this is SVG, XML or HTML text, not a pixel image; save it as PNG"
    if all(byte >= 32 or byte in b"\t\r\n\f" for byte in head):
        return "this is a text file, not an image"
    return "not a supported image format; save it as PNG"
