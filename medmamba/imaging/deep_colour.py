"""Colour of 16 bits a channel with Pillow, whose colour modes have 8.

Pillow unpacks either byte of a 16-bit channel, depending on the byte order given. The file is decoded twice, once
for the upper and once for the lower bytes.
"""

from __future__ import annotations

import sys
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageOps

_TIFF_PLANAR = 284
# How a pixel is packed in the file, and what it holds.
_KINDS = {f"{mode};16{order}": mode for mode in ("RGB", "RGBA", "RGBX", "RGBa", "LA") for order in ("B", "L", "N")}
_SWAPPED = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}


def is_deep_colour(image: Any) -> bool:
    """Returns whether an undecoded image has 16-bit colour, or 16-bit grey with alpha, that can be read in full."""
    tiles = getattr(image, "tile", None) or []
    if getattr(image, "tag_v2", {}).get(_TIFF_PLANAR, 1) == 2:
        return False  # Pillow takes the upper bytes of such channels, whatever byte order is given
    return bool(tiles) and len({_raw_mode(tile) for tile in tiles}) == 1 and _raw_mode(tiles[0]) in _KINDS


def read_deep_colour(stream: BinaryIO, kind: str, index: int, *, turn: bool) -> np.ndarray:
    """Returns uint16 `(H, W, 2|3|4)`: grey and alpha, RGB, or RGBA.

    Args:
        stream: the file, seekable.
        kind: Pillow's name of the format.
        index: frame.
        turn: whether to apply the EXIF orientation.
    """
    first, mode = _decode(stream, kind, index, upper=True, turn=turn)
    if mode == "LA":  # four bytes a pixel, read as four channels of 8 bits
        return np.stack([_word(first[..., 0], first[..., 1]), _word(first[..., 2], first[..., 3])], axis=-1)
    second, _ = _decode(stream, kind, index, upper=False, turn=turn)
    words = _word(first, second)
    return words[..., :3] if mode in ("RGBX", "RGBa") else words


def is_premultiplied(image: Any) -> bool:
    """Returns whether the colours are premultiplied by alpha, which equals compositing on black."""
    return _KINDS.get(_raw_mode(image.tile[0])) == "RGBa"


def _word(upper: np.ndarray, lower: np.ndarray) -> np.ndarray:
    return upper.astype(np.uint16) << 8 | lower


def _decode(stream: BinaryIO, kind: str, index: int, *, upper: bool, turn: bool) -> tuple[np.ndarray, str]:
    stream.seek(0)
    image: Any
    with Image.open(stream, formats=[kind]) as image:
        if index != image.tell():
            image.seek(index)
        raw = _raw_mode(image.tile[0])
        mode, order = _KINDS[raw], raw[-1]
        order = order if upper else _SWAPPED[order]
        wanted = "RGBA" if mode == "LA" else f"{mode.replace('RGBa', 'RGBA')};16{order}"
        image.tile = [
            tile._replace(args=(wanted, *tile.args[1:]) if isinstance(tile.args, tuple) else wanted)
            for tile in image.tile
        ]
        image.load()
        return np.asarray(ImageOps.exif_transpose(image) if turn else image), mode


def _raw_mode(tile: Any) -> str:
    args = tile.args
    return str(args[0] if isinstance(args, tuple) and args else args)
