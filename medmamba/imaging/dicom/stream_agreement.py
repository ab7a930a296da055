"""Compare the header of a compressed stream with the DICOM header, before anything is decoded.

PS3.5 8.2.1: where characteristics that the compressed stream states are inconsistent with the DICOM elements, those of
the stream control the decompression. That settles colour and unused precision, which is noted. A stream of another
size, another number of components or more bits than fit is another image, and refused with the element named.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from ..decoding.codestream import StreamError, StreamHeader, parse_stream, rle_segments
from ..image import ImageError, check_size, warning_note

if TYPE_CHECKING:
    from pydicom import Dataset
    from pydicom.uid import UID

_ITEM = b"\xfe\xff\x00\xe0"
_SEQUENCE_END = b"\xfe\xff\xdd\xe0"
_STREAM_STARTS = (b"\xff\xd8\xff", b"\xff\x4f\xff")
_AGAIN = "export the image again"


@dataclass(frozen=True)
class StreamFacts:
    """Facts for the decoder about a stream that agrees with its header.

    Attributes:
        photometric: photometric interpretation of the stream, from which pydicom decides on conversion to RGB.
        container: bits of each sample that a decoder returns.
        precision: bits of each sample in the stream.
        two_complement: whether the format has no sign flag, so that signed values take all its bits.
        signed: sign flag of the stream; None for formats without one.
        adobe_transform: as in `StreamHeader`.
        notes: contradictions that were settled.
    """

    photometric: str
    container: int
    precision: int
    two_complement: bool = False
    signed: bool | None = None
    adobe_transform: int | None = None
    notes: list[str] = field(default_factory=list)

    def check_values(self, values: np.ndarray, bits_stored: int, signed: bool) -> list[str]:
        """Looks for decoded values whose sign the two headers do not settle; returns notes.

        Raises:
            ImageError: names Pixel Representation or Bits Stored.
        """
        half = 1 << (self.precision - 1)
        if self.signed is True and not signed and values.size and int(values.max()) >= half:
            raise ImageError(
                "Pixel Representation says unsigned, but the compressed stream holds signed values, some of them "
                f"negative; {_AGAIN}"
            )
        if self.signed is False and signed and values.size and int(values.min()) < 0:
            text = "the compressed stream calls its values unsigned; read as signed, as Pixel Representation says"
            return [warning_note("stream-sign", text)]
        narrow = self.two_complement and signed and self.precision < bits_stored
        if narrow and values.size and (int(values.min()) < 0 or int(values.max()) >= half):
            raise ImageError(
                f"Bits Stored is {bits_stored}, but the compressed stream holds signed values of {self.precision} "
                f"bits, so that their sign is not certain; {_AGAIN}"
            )
        return []


def compressed_frame(ds: Dataset, syntax: UID, index: int, n_frames: int) -> bytes:
    """Returns the bytes of one compressed frame.

    Raises:
        ImageError: items cut short, or fragments that contradict Number of Frames.
    """
    from pydicom.encaps import get_frame

    offsets = (ds.ExtendedOffsetTable, ds.ExtendedOffsetTableLengths) if "ExtendedOffsetTable" in ds else None
    data = ds.PixelData
    try:
        if isinstance(data, (bytes, bytearray)):
            _check_fragments(data, n_frames, one_each="RLE" in syntax.name)
        return get_frame(data, index, number_of_frames=n_frames, extended_offsets=offsets)
    except ImageError:
        raise
    except Exception:
        raise ImageError("the compressed pixel data is damaged or truncated; copy or export it again") from None


def _check_fragments(data: bytes | bytearray, n_frames: int, one_each: bool) -> None:
    """Walks the items (PS3.5 A.4): each must be whole, and there must be one beginning of a stream per frame."""
    position, count, begins = 0, -1, 0  # the first item is the offset table
    while data[position : position + 4] == _ITEM:
        (length,) = struct.unpack_from("<L", data, position + 4)
        position += 8
        if position + length > len(data):
            raise ImageError("the compressed pixel data is cut short; copy or export it again")
        if count >= 0:
            begins += data[position : position + 3] in _STREAM_STARTS
        count += 1
        position += length
    if data[position : position + 4] != _SEQUENCE_END and any(data[position:]):
        raise ImageError("the items of the compressed pixel data are damaged; copy or export it again")
    frames = count if one_each else begins
    if frames > n_frames or count < n_frames:
        raise ImageError(
            f"Number of Frames is {n_frames}, but the pixel data holds {frames if frames > n_frames else count} "
            f"compressed frames; {_AGAIN}"
        )


def compare_stream(ds: Dataset, syntax: UID, data: bytes, bits_allocated: int, bits_stored: int) -> StreamFacts:
    """Compares the stream with the header; returns what the decoder needs to know.

    Raises:
        ImageError: names the element that the stream contradicts.
    """
    samples, photometric = int(ds.SamplesPerPixel), str(ds.PhotometricInterpretation)
    try:
        if "RLE" in syntax.name:
            return _compare_rle(rle_segments(data), samples, bits_allocated, photometric)
        stream = parse_stream(data)
    except StreamError as error:
        raise ImageError(
            f"the compressed pixel data is damaged or truncated, or not what its Transfer Syntax says: {error}; "
            "copy or export it again"
        ) from None
    check_size(stream.rows, stream.columns)  # decoders allocate by it
    _compare_layout(stream, ds, syntax, samples, bits_allocated)
    precision, notes = stream.precision[0], []
    if precision < bits_stored:
        text = f"Bits Stored is {bits_stored}, but the compressed stream holds samples of {precision} bits"
        notes.append(warning_note("stream-precision", text))
    if samples > 1 and (planar := ds.get("PlanarConfiguration")) != 0:
        what = "missing" if planar is None else "ignored"
        notes.append(f"Planar Configuration {what}: the decoder of the compressed stream gives colour by pixel")
    photometric, more = _settle_color(stream, photometric, samples)
    if photometric.startswith("YBR_FULL") and precision > 8:
        raise ImageError(f"Photometric Interpretation {photometric} with {precision} bits is not supported; {_AGAIN}")
    by_header = stream.family in ("JPEG", "JPEG Lossless")
    return StreamFacts(
        photometric,
        container=(8 if precision <= 8 else 16) if by_header else bits_allocated,
        precision=precision,
        two_complement=stream.signed is None,
        signed=stream.signed,
        adobe_transform=stream.adobe_transform,
        notes=notes + more,
    )


def _compare_rle(segments: int, samples: int, bits_allocated: int, photometric: str) -> StreamFacts:
    if bits_allocated % 8:
        raise ImageError(f"Bits Allocated ({bits_allocated}) is not possible for RLE; {_AGAIN}")
    if segments != samples * bits_allocated // 8:
        raise ImageError(
            f"the RLE frame has {segments} segments, where Samples per Pixel ({samples}) and Bits Allocated "
            f"({bits_allocated}) ask for {samples * bits_allocated // 8}; {_AGAIN}"
        )
    return StreamFacts(photometric, bits_allocated, bits_allocated)


def _compare_layout(stream: StreamHeader, ds: Dataset, syntax: UID, samples: int, bits_allocated: int) -> None:
    if stream.family != _family(syntax):
        raise ImageError(
            f"Transfer Syntax says {syntax.name}, but the pixel data is a {stream.family} stream; {_AGAIN}"
        )
    if not stream.complete:
        raise ImageError("the compressed stream ends before its end marker; copy or export it again")
    if stream.components != samples:
        raise ImageError(
            f"Samples per Pixel is {samples}, but the compressed stream has {stream.components} components; {_AGAIN}"
        )
    if (stream.rows, stream.columns) != (int(ds.Rows), int(ds.Columns)):
        raise ImageError(
            f"Rows and Columns are {int(ds.Rows)} and {int(ds.Columns)}, but the compressed stream is "
            f"{stream.rows} by {stream.columns}; {_AGAIN}"
        )
    if len(set(stream.precision)) > 1:
        raise ImageError(f"the components of the compressed stream differ in their number of bits; {_AGAIN}")
    if stream.precision[0] > bits_allocated:
        raise ImageError(
            f"Bits Allocated is {bits_allocated}, but the compressed stream holds samples of {stream.precision[0]} "
            f"bits; {_AGAIN}"
        )
    if stream.family == "JPEG 2000" and stream.subsampled:
        raise ImageError(f"JPEG 2000 with subsampled components is not supported; {_AGAIN} as RGB")


def _family(syntax: UID) -> str:
    """Returns the coding that a transfer syntax declares (PS3.5 A.4)."""
    name = syntax.name
    if "JPEG 2000" in name or "JPEG2000" in name:
        return "JPEG 2000"
    if "JPEG-LS" in name:
        return "JPEG-LS"
    return "JPEG Lossless" if "Lossless" in name else "JPEG"


def _settle_color(stream: StreamHeader, photometric: str, samples: int) -> tuple[str, list[str]]:
    """Returns the photometric interpretation of the stream, and a note where the header says another."""
    if samples != 3:
        return photometric, []
    ybr = photometric.startswith("YBR")
    transformed = photometric in ("YBR_RCT", "YBR_ICT")
    if stream.family == "JPEG 2000":
        # The decoder undoes the transform that the stream declares, and no other; what comes out is RGB.
        if stream.color == "MCT" and not transformed:
            return "RGB", [_color_note(photometric, "the stream has a colour transform: it was undone")]
        if stream.color is None and transformed:
            return "RGB", [_color_note(photometric, "the stream has no colour transform: taken as RGB")]
        return photometric, []
    if stream.color == "RGB" and ybr:
        return "RGB", [_color_note(photometric, "the compressed stream is RGB: taken as RGB")]
    if stream.color == "YBR" and not ybr:
        return "YBR_FULL", [_color_note(photometric, "the compressed stream is YCbCr: converted")]
    return photometric, []


def _color_note(photometric: str, found: str) -> str:
    known = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_PARTIAL_420", "YBR_PARTIAL_422", "YBR_RCT", "YBR_ICT")
    said = photometric if photometric in known else "another colour space"
    return warning_note("stream-colour", f"Photometric Interpretation says {said}, but {found}")
