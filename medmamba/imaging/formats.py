"""Detects file formats from the first bytes, and classifies file names."""

from __future__ import annotations

import re

DICOM_SUFFIXES = (".dcm", ".dicom", ".dic")
IMAGE_SUFFIXES = frozenset(
    (".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".tif", ".tiff", ".bmp", ".dib", ".gif")
    + DICOM_SUFFIXES
)
"""Suffixes that identify a file as an image, in lower case."""

# Suffixes of formats that begin like a supported one but differ: slides in pyramids, camera raw data, stereo
# pairs and thumbnails. Read as plain images they would give a preview, or one eye.
OTHER_FORMATS = frozenset(
    (".svs", ".ndpi", ".scn", ".bif", ".lsm", ".vms", ".dng", ".nef", ".nrw", ".cr2", ".arw", ".orf", ".pef", ".srw")
    + (".rw2", ".mpo", ".jps", ".thm")
)
# Suffixes of unfinished or obsolete files, left by editors, browsers and copying.
LEFTOVERS = frozenset(
    (".part", ".partial", ".crdownload", ".download", ".tmp", ".temp", ".bak", ".old", ".orig", ".swp")
)

HEAD_BYTES = 1024
"""How many bytes of a file `sniff` and `is_certain` want to see."""

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
_BMP_HEADERS = frozenset((12, 16, 40, 52, 56, 64, 108, 124))
_EXPLICIT_VRS = frozenset(
    b"AE AS AT CS DA DS DT FD FL IS LO LT OB OD OF OL OV OW PN SH SL SQ SS ST SV TM UC UI UL UN UR US UT UV".split()
)
_LONG_VRS = frozenset(b"OB OD OF OL OV OW SQ SV UC UN UR UT UV".split())
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


def sniff(head: bytes) -> str | None:
    """Returns the format ("DICOM" or Pillow's name) of a file assumed to be an image; None if unknown."""
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


def certain_format(head: bytes) -> str | None:
    """Returns the format of a file of unknown origin; stricter than `sniff`, as two matching bytes are no evidence.

    A bitmap must have a header of a known size, and DICOM without preamble several well-formed elements in a row, a
    UID of the standard among them.
    """
    kind = sniff(head)
    if kind == "BMP":
        plausible = head[6:10] == bytes(4) and int.from_bytes(head[14:18], "little") in _BMP_HEADERS
        return "BMP" if plausible else None
    if kind == "DICOM" and head[128:132] != b"DICM":
        return "DICOM" if _has_elements(head) else None
    return kind


def is_dicomdir(name: str, head: bytes = b"") -> bool:
    """Returns whether this is an index of a DICOM medium, which holds no image, by name or declared class."""
    return name.split(";")[0].upper() == "DICOMDIR" or b"1.2.840.10008.1.3.10\x00" in head[132:]


def describe(head: bytes) -> str:
    """Returns what an unsupported file is, and what to do with it."""
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


def suffix_of(name: str) -> str:
    """Returns the suffix in lower case, ".jpg"; "" where the end of the name is no suffix, such as that of a UID.

    A suffix has a letter in it and at most twelve characters: "1.3.6.1.4.1" and "CT.1.2.840" have none.
    """
    stem, dot, suffix = name.strip().rpartition(".")
    if not dot or not stem.strip(". ") or not re.fullmatch(r"[A-Za-z0-9_+~-]{1,12}", suffix):
        return ""
    return "." + suffix.lower() if re.search(r"[A-Za-z]", suffix) else ""


def _has_elements(head: bytes) -> bool:
    """Returns whether the bytes are DICOM data elements in ascending order, up to the end or for at least eight."""
    order = "big" if head[0] == 0 else "little"
    explicit = head[4:6] in _EXPLICIT_VRS
    at, last, count, has_uid = 0, (0, 0), 0, False
    while at + 8 <= len(head) and count < 8:
        tag = int.from_bytes(head[at : at + 2], order), int.from_bytes(head[at + 2 : at + 4], order)  # type: ignore[arg-type]
        if tag <= last or tag[0] > 0x7FE0:
            return False
        # Group 2 is always explicit; what follows it may be implicit.
        explicit = explicit if tag[0] == last[0] or count == 0 else head[at + 4 : at + 6] in _EXPLICIT_VRS
        if not explicit:
            length, start = int.from_bytes(head[at + 4 : at + 8], order), at + 8  # type: ignore[arg-type]
        elif head[at + 4 : at + 6] not in _EXPLICIT_VRS:
            return False
        elif head[at + 4 : at + 6] in _LONG_VRS:
            length, start = int.from_bytes(head[at + 8 : at + 12], order), at + 12  # type: ignore[arg-type]
        else:
            length, start = int.from_bytes(head[at + 6 : at + 8], order), at + 8  # type: ignore[arg-type]
        if length == 0xFFFFFFFF:  # a sequence of undefined length: what precedes it must do
            break
        has_uid |= head[start : start + length].startswith(b"1.2.840.10008.")
        at, last, count = start + length, tag, count + 1
    return count >= 2 and has_uid
