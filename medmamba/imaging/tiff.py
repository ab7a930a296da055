"""What Pillow reads of TIFF without regard to its tags: checked, mended or refused before a pixel is decoded.

Byte order of compressed signed and 32-bit values, stacks of ImageJ behind a single directory, predictors without a
compression that has one, 16-bit planes, subsampled raw YCbCr, strips that are missing.
"""

from __future__ import annotations

import contextlib
import os
import re
from typing import Any

from .decoding.codestream import StreamError, StreamHeader, parse_stream
from .image import ImageError

BITS, COMPRESSION, PHOTOMETRIC, SAMPLE_FORMAT = 258, 259, 262, 339
_STRIP_OFFSETS, _ROWS_PER_STRIP, _TILE_WIDTH, _TILE_LENGTH, _TILE_OFFSETS = 273, 278, 322, 323, 324
_JPEG, _HEAD_BYTES, _MAX_HEAD_BYTES = 7, 1 << 12, 1 << 16  # the compression; bytes read to find its frame header
_DESCRIPTION, _PLANAR, _PREDICTOR, _SUBSAMPLING, _STRIP_BYTES, _IJ_METADATA = 270, 284, 317, 530, 279, 50839
_WITH_PREDICTOR = (5, 8, 32946, 34925, 50000)  # LZW, Deflate twice, LZMA, Zstandard
# libtiff hands values over in the byte order of the machine, whatever that of the file; Pillow swaps these again.
_NATIVE = {"I;16BS": "I;16NS", "I;32B": "I;32N", "I;32BS": "I;32NS", "F;32BF": "F;32NF", "I;16B": "I;16N"}
_NATIVE |= {"I;16S": "I;16NS", "I;32S": "I;32NS", "F;32F": "F;32NF"}


def check_tiff(image: Any) -> None:
    """Refuses a TIFF that Pillow would decode to something else, and mends the byte order of compressed ones.

    Raises:
        ImageError: with the tag that cannot be followed.
    """
    tags = image.tag_v2
    tiles = getattr(image, "tile", None) or []
    covered = sum((right - left) * (lower - upper) for left, upper, right, lower in (tile[1] for tile in tiles))
    if tiles and covered < image.width * image.height:
        raise ImageError("damaged TIFF: part of its pixels is missing. Copy or export it again")
    if tags.get(_PREDICTOR, 1) != 1 and tags.get(COMPRESSION, 1) not in _WITH_PREDICTOR:
        raise ImageError("this TIFF declares a predictor for a compression that has none; save it with LZW or as PNG")
    codec = tiles[0][0] if tiles else ""
    if tags.get(_PLANAR, 1) == 2 and codec == "raw" and max(tags.get(BITS, (1,))) > 8:
        raise ImageError("this TIFF holds its channels one after the other, 16 bits each; save it as PNG")
    if tags.get(PHOTOMETRIC) == 6 and codec == "raw" and tuple(tags.get(_SUBSAMPLING, (2, 2))) != (1, 1):
        raise ImageError("this TIFF holds subsampled YCbCr without compression; save it as PNG")
    if tags.get(COMPRESSION) == _JPEG:
        _check_jpeg_segments(image)
    if codec == "libtiff":
        image.tile = [
            tile._replace(args=(_NATIVE.get(tile.args[0], tile.args[0]), *tile.args[1:])) for tile in image.tile
        ]


def _check_jpeg_segments(image: Any) -> None:
    """Rejects JPEG strips and tiles that are smaller than declared: libtiff leaves the rest of their pixels undefined.

    Raises:
        ImageError: such a segment, or one without a readable header.
    """
    tags = image.tag_v2
    tiled = _TILE_OFFSETS in tags
    width = tags.get(_TILE_WIDTH, 0) if tiled else image.width
    height = tags.get(_TILE_LENGTH, 0) if tiled else min(tags.get(_ROWS_PER_STRIP, image.height), image.height)
    per_plane = -(-image.height // height) if not tiled and height else 0
    position = image.fp.tell()
    try:
        for number, offset in enumerate(tags.get(_TILE_OFFSETS if tiled else _STRIP_OFFSETS, ())):
            if number and tags.get(_PLANAR, 1) == 2 and tags.get(PHOTOMETRIC) == 6:
                break  # planes of chroma may be subsampled
            stream = _parse_jpeg(image.fp, offset)
            rows = height if tiled else min(height, image.height - number % per_plane * height)
            if stream.columns < width or stream.rows < rows:
                raise ImageError("damaged TIFF: a JPEG strip is smaller than declared. Copy or export it again")
    except StreamError as error:
        raise ImageError(f"damaged TIFF: {error}. Copy or export it again") from None
    finally:
        image.fp.seek(position)


def _parse_jpeg(file: Any, offset: int) -> StreamHeader:
    file.seek(offset)
    with contextlib.suppress(StreamError):
        return parse_stream(file.read(_HEAD_BYTES))
    file.seek(offset)
    return parse_stream(file.read(_MAX_HEAD_BYTES))


def imagej_images(image: Any) -> int:
    """Returns the number of images that ImageJ says are in a stack, 1 for other files."""
    tags = image.tag_v2
    found = re.search(r"^images=(\d{1,9})\s*$", _description(tags), re.MULTILINE)
    return int(found[1]) if found else 1


def select_imagej_image(image: Any, index: int, count: int) -> None:
    """Points an image with one directory at another image of its stack; they follow each other without compression.

    Raises:
        ImageError: the stack is compressed, or cut short.
    """
    tags = image.tag_v2
    size = sum(tags.get(_STRIP_BYTES, ()))
    tiles = image.tile
    bits = sum(tags.get(BITS, (1,)))
    if tags.get(COMPRESSION, 1) != 1 or bits % 8 or size != image.width * image.height * bits // 8:
        raise ImageError(f"an ImageJ stack of {count} images in a form that is not supported; save its slices as PNG")
    position = image.fp.tell()
    end = image.fp.seek(0, os.SEEK_END)
    image.fp.seek(position)
    if min(tile.offset for tile in tiles) + count * size > end:
        raise ImageError(f"an ImageJ stack that says it has {count} images is cut short; copy or export it again")
    image.tile = [tile._replace(offset=tile.offset + index * size) for tile in tiles]


def imagej_notes(image: Any) -> list[str]:
    """Returns notes on what ImageJ would apply to display the picture, and what is not applied here."""
    tags = image.tag_v2
    text = _description(tags)
    found = dict(re.findall(r"^(min|max|c0)=([-+0-9.eE]{1,30})\s*$", text, re.MULTILINE))
    notes = []
    if {"min", "max"} <= set(found):
        notes.append(f"ImageJ's display range {found['min']}..{found['max']} not applied")
    if "c0" in found:
        notes.append("ImageJ's calibration of the values not applied")
    kinds = _bytes(tags.get(_IJ_METADATA))[:256]  # begins with a table of what follows, in the file's byte order
    if b"luts" in kinds or b"stul" in kinds:
        notes.append("ImageJ's lookup table not applied")
    return notes


def _description(tags: Any) -> str:
    text = tags.get(_DESCRIPTION, "")
    text = text if isinstance(text, str) else ""
    return text[:10_000] if text.startswith("ImageJ=") else ""


def _bytes(value: Any) -> bytes:
    return value if isinstance(value, bytes) else b""
