"""Stored pixel values of a DICOM file or Dataset: bounded reading, transfer syntaxes, decoder plug-ins."""

from __future__ import annotations

import zlib
from functools import cache
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, cast

import numpy as np

from ..decoding import pool
from ..image import MAX_PIXELS, ImageError, MissingDependencyError, is_dataset, warning_note
from .native import check_native_length, single_bits
from .stream_agreement import compare_stream, compressed_frame

if TYPE_CHECKING:
    from pydicom import Dataset
    from pydicom.pixels.decoders.base import Decoder
    from pydicom.uid import UID

PIXEL_KEYWORDS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")
_PALETTE = [
    f"{color}PaletteColorLookupTable{part}" for color in ("Red", "Green", "Blue") for part in ("Descriptor", "Data")
]
_SEGMENTED_PALETTE = [f"Segmented{color}PaletteColorLookupTableData" for color in ("Red", "Green", "Blue")]
# All that is ever read from a file. Nothing here identifies a patient.
ELEMENTS = [
    *("SOPClassUID", "Modality", "Rows", "Columns", "NumberOfFrames", "SamplesPerPixel", "PhotometricInterpretation"),
    *("PlanarConfiguration", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "PixelSpacing"),
    *("PixelAspectRatio", "ModalityLUTSequence", "RescaleSlope", "RescaleIntercept", "RescaleType", "VOILUTSequence"),
    *("VOILUTFunction", "WindowCenter", "WindowWidth", "WindowCenterWidthExplanation", "PresentationLUTShape"),
    *("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence", "PixelPresentation"),
    *("PixelPaddingValue", "PixelPaddingRangeLimit", "FloatPixelPaddingValue", "FloatPixelPaddingRangeLimit"),
    *("DoubleFloatPixelPaddingValue", "DoubleFloatPixelPaddingRangeLimit", "PresentationLUTSequence", "ShutterShape"),
    *("ImagerPixelSpacing", "NominalScannedPixelSpacing", "EnhancedPaletteColorLookupTableSequence"),
    *("AlphaPaletteColorLookupTableDescriptor",),
    *("ExtendedOffsetTable", "ExtendedOffsetTableLengths", *_PALETTE, *_SEGMENTED_PALETTE, *PIXEL_KEYWORDS),
]
_MAX_INFLATED = 8 * MAX_PIXELS  # bytes of a deflated file
# Limits of one compressed frame: about a hundred times what decoders take, so that only damage meets them.
_SECONDS, _SECONDS_PER_SAMPLE = 15.0, 2e-6
_MEMORY, _MEMORY_PER_SAMPLE = 512 << 20, 32


def read_dataset(source: BinaryIO | Dataset) -> Dataset:
    """Reads the elements that describe pixels from a seekable stream; a Dataset is returned unchanged."""
    try:
        import pydicom
        import pydicom.pixels  # absent before pydicom 3
    except ImportError:
        raise MissingDependencyError('reading DICOM needs pydicom 3: pip install "medmamba[dicom]"') from None
    if is_dataset(source):
        return source
    stream = cast(BinaryIO, source)
    _check_inflated_size(stream)
    return pydicom.dcmread(stream, force=True, specific_tags=_element_tags())


@cache
def _element_tags() -> list[Any]:
    """Tags of `ELEMENTS`; finding them by keyword takes as long as reading a small file."""
    from pydicom.tag import Tag

    return [Tag(keyword) for keyword in ELEMENTS]


def _check_inflated_size(stream: BinaryIO) -> None:
    """Rejects a deflated file whose inflated size exceeds the limit; pydicom would inflate all of it."""
    from pydicom import filereader
    from pydicom.uid import DeflatedExplicitVRLittleEndian

    filereader.read_preamble(stream, force=True)
    meta = filereader.read_dataset(stream, False, True, stop_when=lambda tag, vr, length: tag >> 16 != 2)
    if meta.get("TransferSyntaxUID") == DeflatedExplicitVRLittleEndian:
        inflater, rest, size = zlib.decompressobj(-zlib.MAX_WBITS), stream.read(), 0
        while rest and not inflater.eof:
            size += len(inflater.decompress(rest, 1 << 20))
            rest = inflater.unconsumed_tail
            if size > _MAX_INFLATED:
                raise ImageError(
                    f"the deflated content is larger than {_MAX_INFLATED >> 20} MiB; export it uncompressed"
                )
    stream.seek(0)


class DecodedFrame(NamedTuple):
    """One frame as it was decoded.

    Attributes:
        words: pixel cells `(H, W)` or `(H, W, 3)`, with their unused bits; see `dicom.stored`.
        photometric: their photometric interpretation; YBR is RGB by now.
        notes: contradictions of the file that were settled, and how.
    """

    words: np.ndarray
    photometric: str
    notes: list[str]


def decode_frame(ds: Dataset, index: int, n_frames: int) -> DecodedFrame:
    """Decodes one frame.

    Compressed frames are decoded in another process, with limits of time and memory. Before, their own header is
    compared with the DICOM header; where the two differ, PS3.5 8.2.1 is followed (the stream controls) with a
    note, or the image is rejected.

    Raises:
        ImageError: names the element that is wrong; `MissingDependencyError` where a plug-in is needed.
    """
    from pydicom.pixels import get_decoder

    syntax = transfer_syntax(ds)
    try:
        decoder = get_decoder(syntax)
    except NotImplementedError:
        # The name of a registered UID is public; anything else may be text of the file.
        name = f" ({syntax.name})" if syntax.name != syntax else ""
        raise ImageError(
            f"compression{name} that pydicom does not decode; export frames as uncompressed DICOM or PNG"
        ) from None
    bits = _read_bits(ds)
    if bits is not None:
        _refuse_deep_ybr(str(ds.PhotometricInterpretation), bits.allocated)
        if syntax.is_encapsulated:
            return _decode_compressed(ds, syntax, decoder, index, n_frames, bits)
    notes = _check_native(ds, n_frames)
    if bits and bits.allocated == 1 and int(ds.SamplesPerPixel) == 1 and isinstance(ds.PixelData, (bytes, bytearray)):
        swapped = not syntax.is_little_endian and ds["PixelData"].VR == "OW"
        frame = single_bits(ds.PixelData, index, int(ds.Rows), int(ds.Columns), swapped)
        return DecodedFrame(frame, str(ds.PhotometricInterpretation), notes)
    try:
        keep_bits: Any = {"correct_unused_bits": False}  # they may hold padding, and `dicom.stored` looks at them
        array, properties = decoder.as_array(ds, index=index, **keep_bits)
    except Exception:
        raise ImageError(f"{_undecodable(syntax)}. Copy or export it again") from None
    return DecodedFrame(array, str(properties["photometric_interpretation"]), notes)


class _Bits(NamedTuple):
    allocated: int
    stored: int
    signed: bool


def _read_bits(ds: Dataset) -> _Bits | None:
    if "PixelData" not in ds:
        return None
    allocated, representation = int(ds.BitsAllocated), ds.get("PixelRepresentation")
    if representation not in (None, 0, 1):
        raise ImageError("Pixel Representation of the DICOM header must be 0 or 1; export the image again")
    stored = ds.get("BitsStored")
    stored = allocated if stored is None else int(stored)
    if not 1 <= stored <= allocated:
        raise ImageError(
            f"BitsStored (0028,0101) of the DICOM header is {stored}, but the pixels have {allocated} bits; "
            "export the image again"
        )
    return _Bits(allocated, stored, representation == 1)


def _missing_notes(ds: Dataset) -> list[str]:
    """Returns notes on missing elements that decoding needs; native pixels without them are rejected."""
    missing = [keyword for keyword in ("BitsStored", "PixelRepresentation") if ds.get(keyword) is None]
    text = f"{' and '.join(missing)} missing; taken as Bits Allocated and unsigned" if missing else ""
    return [warning_note("header-incomplete", text)] if missing else []


def _undecodable(syntax: UID) -> str:
    return f"the pixel data ({syntax.name}) cannot be decoded: damaged, truncated, or not as the header says"


def _refuse_deep_ybr(photometric: str, allocated: int) -> None:
    if photometric.startswith("YBR_FULL") and allocated != 8:
        # The standard's equations (PS3.3 C.7.6.3.1.2) and pydicom's are those of 8 bits.
        raise ImageError(
            f"Photometric Interpretation YBR_FULL with {allocated} Bits Allocated is not supported; export it as RGB"
        )


def _check_native(ds: Dataset, n_frames: int) -> list[str]:
    keyword = next(keyword for keyword in PIXEL_KEYWORDS if keyword in ds)
    data = ds[keyword].value
    if not isinstance(data, (bytes, bytearray)):
        return []  # an open file, in a Dataset made by hand: pydicom reads it
    allocated = {"FloatPixelData": 32, "DoubleFloatPixelData": 64}.get(keyword, int(ds.BitsAllocated))
    samples = int(ds.Rows) * int(ds.Columns) * int(ds.SamplesPerPixel)
    if ds.PhotometricInterpretation == "YBR_FULL_422":
        if len(data) >= samples * n_frames > 0 and allocated == 8:
            raise ImageError(
                "Photometric Interpretation is YBR_FULL_422, but the pixel data is not subsampled; export it as RGB"
            )
        samples = samples // 3 * 2
    expected = -(-samples * n_frames * allocated // 8)
    return check_native_length(len(data), expected, -(-samples * allocated // 8), bytes(data[expected:]))


def _decode_compressed(
    ds: Dataset, syntax: UID, decoder: Decoder, index: int, n_frames: int, bits: _Bits
) -> DecodedFrame:
    packages = _decoder_packages(syntax)
    if not decoder.is_available:
        raise MissingDependencyError(f"decoding {syntax.name} needs a plug-in: pip install {packages}")
    data = compressed_frame(ds, syntax, index, n_frames)
    stream = compare_stream(ds, syntax, data, bits.allocated, bits.stored)
    rows, columns, samples = int(ds.Rows), int(ds.Columns), int(ds.SamplesPerPixel)
    count = rows * columns * samples
    seconds, memory = _SECONDS + count * _SECONDS_PER_SAMPLE, _MEMORY + count * _MEMORY_PER_SAMPLE + 8 * len(data)
    job = {
        "syntax": str(syntax),
        "plugins": list(decoder.available_plugins),
        "adobe_transform": stream.adobe_transform,
        "seconds": seconds,
        "bytes": memory,
        "options": {
            "rows": rows,
            "columns": columns,
            "samples_per_pixel": samples,
            "bits_allocated": stream.container,
            "bits_stored": min(bits.stored, stream.container),
            "pixel_representation": int(bits.signed),
            "photometric_interpretation": stream.photometric,
            "planar_configuration": 0,  # the decoders' own order; that of RLE sets itself
            "number_of_frames": 1,
        },
    }
    try:
        header, pixels = pool.decode(job, data, 8 * count)
    except pool.WorkerError as error:
        message = _worker_message(error.reason, syntax, seconds, memory)
        if error.reason == "decode" and packages and not _better_plugins(syntax) & set(decoder.available_plugins):
            raise MissingDependencyError(
                f"{message}. Perhaps a better plug-in reads it: pip install {packages}"
            ) from None
        raise ImageError(message if error.reason == "start" else f"{message}. Copy or export it again") from None
    shape = (rows, columns) if samples == 1 else (rows, columns, samples)
    dtype = np.dtype(str(header["dtype"]))
    if dtype.kind not in "ui" or tuple(header["shape"]) != shape or dtype.itemsize * count != len(pixels):
        raise ImageError(f"{_undecodable(syntax)}. Copy or export it again")
    array = np.frombuffer(pixels, dtype).reshape(shape)
    array = array.astype(f"{dtype.kind}{bits.allocated // 8}", copy=False) if bits.allocated >= 8 else array
    notes = _missing_notes(ds) + stream.notes + stream.check_values(array, bits.stored, bits.signed)
    return DecodedFrame(array, str(header["photometric"]), notes)


def _worker_message(reason: str, syntax: UID, seconds: float, memory: int) -> str:
    if reason == "start":
        return (
            "the process that decodes compressed pixel data cannot be started: check that this program may start "
            "Python and has memory left, or decompress the file first (gdcmconv --raw, dcmdjpeg)"
        )
    what = {
        "time": f"decoding was stopped after {seconds:.0f} s, far more than an image of this size takes",
        "memory": f"decoding was stopped at {memory >> 20} MiB, far more than an image of this size takes",
        "crash": "the decoder crashed on it",
    }.get(reason)
    return f"{_undecodable(syntax)} ({what})" if what else _undecodable(syntax)


def transfer_syntax(ds: Dataset) -> UID:
    """Returns the declared transfer syntax, or for files without one the native syntax they were read as."""
    from pydicom.uid import UID, ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

    declared = getattr(ds, "file_meta", {}).get("TransferSyntaxUID")
    if declared:
        return UID(declared)
    implicit, little_endian = ds.original_encoding
    if implicit:
        return ImplicitVRLittleEndian
    return ExplicitVRBigEndian if little_endian is False else ExplicitVRLittleEndian


def _decoder_packages(syntax: UID) -> str:
    from pydicom.uid import JPEG2000TransferSyntaxes, JPEGExtended12Bit, JPEGLSTransferSyntaxes, JPEGTransferSyntaxes

    if syntax in JPEG2000TransferSyntaxes or "JPEG 2000" in syntax.name:
        return "pylibjpeg pylibjpeg-openjpeg"
    if syntax == JPEGExtended12Bit:
        return "pylibjpeg pylibjpeg-libjpeg (note that this one is GPL-3.0)"
    if syntax in JPEGTransferSyntaxes or syntax in JPEGLSTransferSyntaxes:
        return "python-gdcm"
    return ""


def _better_plugins(syntax: UID) -> set[str]:
    """Plug-ins that read everything in this syntax; GDCM leaves out 12 bits of JPEG Extended."""
    from pydicom.uid import JPEGExtended12Bit

    return {"pylibjpeg"} if syntax == JPEGExtended12Bit else {"pylibjpeg", "gdcm", "pyjpegls"}


def is_big_endian(ds: Dataset) -> bool:
    """Returns whether 16-bit words in byte strings of the dataset are big-endian."""
    return not transfer_syntax(ds).is_little_endian
