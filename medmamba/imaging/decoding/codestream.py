"""Parses the header inside a compressed DICOM frame, before anything decodes it.

Decoders allocate and interpret by the header of the stream, whatever the DICOM header says. Only marker segments are
read here, in plain Python: JPEG (ISO/IEC 10918-1 B.2), JPEG-LS (ISO/IEC 14495-1 C.2), JPEG 2000 and HTJ2K
(ISO/IEC 15444-1 A.5 and A.6.1, and 15444-15) and the header of DICOM's RLE (PS3.5 Annex G).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

_SOC_SIZ = b"\xff\x4f\xff\x51"
_JP2_SIGNATURE = b"\x00\x00\x00\x0cjP  "
_RLE_HEADER = 64
_MAX_SEGMENTS = 15


class StreamError(ValueError):
    """A stream whose header cannot be read."""


@dataclass(frozen=True)
class StreamHeader:
    """Properties of an image as declared by its compressed stream.

    Attributes:
        family: "JPEG" (lossy), "JPEG Lossless", "JPEG-LS" or "JPEG 2000" (also high-throughput).
        rows, columns: size of the image in pixels.
        components: number of samples per pixel.
        precision: bits of each component, one entry per component.
        signed: whether the components are signed; None for formats without a sign flag.
        color: "RGB" or "YBR" (luma and chroma, which the decoder leaves as they are) where the stream declares it;
            "MCT" where the JPEG 2000 decoder undoes the component transform; None if undeclared.
        adobe_transform: colour transform of an Adobe APP14 segment, None without one.
        subsampled: whether some components have fewer samples than others.
        complete: False where the stream ends before its own end marker, or before the end of a tile part.
    """

    family: str
    rows: int
    columns: int
    components: int
    precision: tuple[int, ...]
    signed: bool | None = None
    color: str | None = None
    adobe_transform: int | None = None
    subsampled: bool = False
    complete: bool = True


def parse_stream(data: bytes) -> StreamHeader:
    """Returns the header of a JPEG, JPEG-LS or JPEG 2000 stream, recognised by its first bytes.

    Raises:
        StreamError: none of these, or truncated.
    """
    try:
        if data[:2] == b"\xff\xd8":
            return _parse_jpeg(data)
        if data[:4] == _SOC_SIZ:
            return _parse_j2k(data, 0)
        if data[:8] == _JP2_SIGNATURE:
            return _parse_j2k(data, _codestream_of_jp2(data))
    except (IndexError, struct.error):
        raise StreamError("the header of the compressed stream is cut short") from None
    raise StreamError("the compressed stream begins with no known header")


def rle_segments(data: bytes) -> int:
    """Returns the number of segments of an RLE frame (PS3.5 G.5).

    Raises:
        StreamError: a header cut short, or offsets that do not increase or lie outside the frame.
    """
    if len(data) < _RLE_HEADER:
        raise StreamError("the RLE header is cut short")
    count, *offsets = struct.unpack_from("<16L", data)
    if not 1 <= count <= _MAX_SEGMENTS:
        raise StreamError(f"the RLE header declares {count} segments")
    used = offsets[:count]
    if used[0] != _RLE_HEADER or sorted(set(used)) != used or used[-1] >= len(data):
        raise StreamError("the RLE header holds offsets that do not fit the frame")
    return count


def _parse_jpeg(data: bytes) -> StreamHeader:
    position, jfif, adobe = 2, False, None
    while True:
        if data[position] != 0xFF:
            raise StreamError("a marker is missing in the header of the JPEG stream")
        marker = data[position + 1]
        if marker == 0xFF:  # fill byte
            position += 1
            continue
        (length,) = struct.unpack_from(">H", data, position + 2)
        body = position + 4
        # SOF0-15 without DHT, JPG and DAC, and SOF55 of JPEG-LS
        if marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):
            break
        if marker in (0xD8, 0xD9, 0xDA) or length < 2:
            raise StreamError("the JPEG stream has no frame header before its data")
        if marker == 0xE0 and data[body : body + 5] == b"JFIF\0":
            jfif = True
        elif marker == 0xEE and data[body : body + 5] == b"Adobe" and length >= 14:
            adobe = data[body + 11]
        position = body + length - 2
    precision, rows, columns, components = struct.unpack_from(">BHHB", data, body)
    if components == 0 or length != 8 + 3 * components:
        raise StreamError("the frame header of the JPEG stream is damaged")
    identifiers = [data[body + 6 + 3 * i] for i in range(components)]
    sampling = {data[body + 7 + 3 * i] for i in range(components)}
    family = "JPEG-LS" if marker == 0xF7 else "JPEG Lossless" if marker in (0xC3, 0xC7, 0xCB, 0xCF) else "JPEG"
    color = None
    if components == 3 and family != "JPEG-LS":
        # The order in which readers of JPEG weigh the signs; most specific first.
        if bytes(identifiers) in (b"RGB", b"rgb"):
            color = "RGB"
        elif jfif:
            color = "YBR"
        elif adobe is not None:
            color = {0: "RGB", 1: "YBR"}.get(adobe)
        elif len(sampling) > 1 and family == "JPEG":
            color = "YBR"  # chroma at a lower resolution than luma
    return StreamHeader(
        family,
        rows,
        columns,
        components,
        (precision,) * components,
        color=color,
        adobe_transform=adobe,
        subsampled=len(sampling) > 1,
        complete=data.find(b"\xff\xd9", body + length - 2) >= 0,  # never within entropy-coded data
    )


def _codestream_of_jp2(data: bytes) -> int:
    """Returns where the codestream begins in a JP2 file, which some writers put into DICOM."""
    position = 12
    while True:
        length, kind = struct.unpack_from(">L4s", data, position)
        header = 8
        if length == 1:
            (length,) = struct.unpack_from(">Q", data, position + 8)
            header = 16
        if kind == b"jp2c":
            if data[position + header : position + header + 4] != _SOC_SIZ:
                raise StreamError("the JP2 file holds no JPEG 2000 codestream")
            return position + header
        if length < header:
            raise StreamError("the JP2 file is damaged")
        position += length


def _parse_j2k(data: bytes, start: int) -> StreamHeader:
    length, _ = struct.unpack_from(">HH", data, start + 4)
    right, bottom, left, top = struct.unpack_from(">4L", data, start + 8)
    (components,) = struct.unpack_from(">H", data, start + 40)
    if components == 0 or length != 38 + 3 * components:
        raise StreamError("the SIZ segment of the JPEG 2000 stream is damaged")
    parts = [struct.unpack_from(">3B", data, start + 42 + 3 * i) for i in range(components)]
    signs = {depth >> 7 for depth, _, _ in parts}
    if len(signs) > 1:
        raise StreamError("the components of the JPEG 2000 stream differ in sign")
    return StreamHeader(
        "JPEG 2000",
        max(bottom - top, 0),
        max(right - left, 0),
        components,
        tuple((depth & 0x7F) + 1 for depth, _, _ in parts),
        signed=bool(signs.pop()),
        color="MCT" if _component_transform(data, start + 4 + length) else None,
        subsampled=any(across != 1 or down != 1 for _, across, down in parts),
        complete=_tile_parts_complete(data, start + 4 + length),
    )


def _component_transform(data: bytes, position: int) -> bool:
    """Returns whether the COD segment of the main header switches the multiple component transform on."""
    while True:
        marker, length = struct.unpack_from(">HH", data, position)
        if marker == 0xFF52:
            return data[position + 8] == 1
        if marker < 0xFF00 or marker in (0xFF90, 0xFF93, 0xFFD9) or length < 2:
            raise StreamError("the JPEG 2000 stream has no coding style in its header")
        position += 2 + length


def _tile_parts_complete(data: bytes, position: int) -> bool:
    """Returns whether every tile part is as long as its SOT segment says; a missing end marker loses nothing."""
    while data[position : position + 2] != b"\xff\x90":  # segments of the main header
        (length,) = struct.unpack_from(">H", data, position + 2)
        position += 2 + length
    while data[position : position + 2] == b"\xff\x90":
        (length,) = struct.unpack_from(">L", data, position + 6)
        if length == 0:  # up to the end marker
            return data.find(b"\xff\xd9", position) >= 0
        position += length
    return position <= len(data) and (position == len(data) or data[position : position + 2] in (b"\xff\xd9", b"\0"))
