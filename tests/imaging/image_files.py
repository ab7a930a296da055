"""Helpers of the tests of image files."""

import io
import struct
import zlib

import numpy as np
from PIL import Image

rng = np.random.default_rng(0)


RGB = rng.integers(0, 256, (11, 7, 3), dtype=np.uint8)


GREY = rng.integers(0, 256, (11, 7), dtype=np.uint8)


GREY16 = rng.integers(0, 65536, (11, 7), dtype=np.uint16)


GREY16[0, 0] = 65535


def encode(array_or_image, fmt, **options) -> bytes:
    image = array_or_image if isinstance(array_or_image, Image.Image) else Image.fromarray(array_or_image)
    buffer = io.BytesIO()
    image.save(buffer, fmt, **options)
    return buffer.getvalue()


def png_bytes(array, color_type, *, size=None) -> bytes:
    """A PNG written by hand, since Pillow writes no 16-bit colour."""
    height, width = size or array.shape[:2]
    depth = array.dtype.itemsize * 8
    rows = b"".join(b"\0" + row.astype(array.dtype.newbyteorder(">")).tobytes() for row in array)

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, depth, color_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def tiff_bytes(data, width, height, *, bits, photometric=1, sample_format=1) -> bytes:
    """A one-strip grey TIFF written by hand, for the variants that Pillow reads but does not write."""
    tags = [(256, 4, width), (257, 4, height), (258, 3, bits), (259, 3, 1), (262, 3, photometric), (273, 4, 8)]
    tags += [(277, 3, 1), (278, 4, height), (279, 4, len(data)), (339, 3, sample_format)]
    data += b"\0" * (len(data) % 2)
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(tags)) + entries + bytes(4)
