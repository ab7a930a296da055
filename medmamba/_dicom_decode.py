"""Stored pixel values of a DICOM file or Dataset: bounded reading, transfer syntaxes, decoder plug-ins."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, BinaryIO, cast

import numpy as np

from ._image import MAX_PIXELS, ImageError, MissingDependencyError, check_size, is_dataset

if TYPE_CHECKING:
    from pydicom import Dataset
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


def read_dataset(source: BinaryIO | Dataset) -> Dataset:
    """The elements that describe pixels, from a seekable stream; a Dataset is returned as it is."""
    try:
        import pydicom
        import pydicom.pixels  # absent before pydicom 3
    except ImportError:
        raise MissingDependencyError('reading DICOM needs pydicom 3: pip install "medmamba[dicom]"') from None
    if is_dataset(source):
        return source
    stream = cast(BinaryIO, source)
    _check_inflated_size(stream)
    return pydicom.dcmread(stream, force=True, specific_tags=list(ELEMENTS))


def _check_inflated_size(stream: BinaryIO) -> None:
    """Refuse a deflated file that would grow beyond all bounds: pydicom inflates it whole."""
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


def decode_frame(ds: Dataset, index: int, n_frames: int) -> tuple[np.ndarray, str]:
    """Stored values `(H, W)` or `(H, W, 3)` of one frame, and their photometric interpretation (YBR is RGB by now)."""
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
    packages = _decoder_packages(syntax)
    if not decoder.is_available:
        raise MissingDependencyError(f"decoding {syntax.name} needs a plug-in: pip install {packages}")
    if syntax.is_encapsulated:
        _check_codestream(ds, index, n_frames)
    try:
        # Of one sample a pixel, unused bits are kept: they may hold padding, and dicom_stored looks at them.
        array, properties = decoder.as_array(ds, index=index, correct_unused_bits=ds.SamplesPerPixel != 1)
    except Exception:
        message = f"the pixel data ({syntax.name}) cannot be decoded: damaged, truncated, or not as the header says"
        if packages and not _better_plugins(syntax) & set(decoder.available_plugins):
            raise MissingDependencyError(
                f"{message}. Perhaps a better plug-in reads it: pip install {packages}"
            ) from None
        raise ImageError(f"{message}. Copy or export it again") from None
    return array, str(properties["photometric_interpretation"])


def transfer_syntax(ds: Dataset) -> UID:
    """The declared transfer syntax, or for files without one the native syntax that they were read as."""
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


def _check_codestream(ds: Dataset, index: int, n_frames: int) -> None:
    """Check the size inside the compressed frame: decoders allocate by it, whatever Rows and Columns say."""
    from pydicom.encaps import get_frame

    offsets = (ds.ExtendedOffsetTable, ds.ExtendedOffsetTableLengths) if "ExtendedOffsetTable" in ds else None
    try:
        data = get_frame(ds.PixelData, index, number_of_frames=n_frames, extended_offsets=offsets)
    except Exception:
        raise ImageError("the compressed pixel data is damaged or truncated; copy or export it again") from None
    start = data.find(b"\xff\x4f\xff\x51", 0, 4096)  # JPEG 2000: start of codestream, then the SIZ segment
    if start >= 0:
        right, bottom, left, top = np.frombuffer(data, ">u4", 4, start + 8).tolist()
        check_size(bottom - top, right - left)
    elif data[:2] == b"\xff\xd8":
        check_size(*_jpeg_size(data))


def _jpeg_size(data: bytes) -> tuple[int, int]:
    """Height and width in the frame header of a JPEG, lossless JPEG or JPEG-LS stream."""
    position = 2
    while position + 9 <= len(data) and data[position] == 0xFF:
        marker, length = data[position + 1], int.from_bytes(data[position + 2 : position + 4], "big")
        # SOF0-15 without DHT, JPG and DAC, and SOF55 of JPEG-LS
        if marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):
            height, width = np.frombuffer(data, ">u2", 2, position + 5).tolist()
            return height, width
        position += 1 if marker == 0xFF else 2 + length  # 0xFF before a marker is a fill byte
    raise ImageError("the compressed pixel data is damaged or truncated; copy or export it again")


def is_big_endian(ds: Dataset) -> bool:
    """Whether 16-bit words in byte strings of the dataset are big-endian."""
    return not transfer_syntax(ds).is_little_endian
