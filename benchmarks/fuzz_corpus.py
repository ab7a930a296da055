"""Files for `fuzz`: good ones of every transfer syntax and raster format, and seeded rules that alter them."""

from __future__ import annotations

import io
import random
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pydicom import Dataset, dcmread, dcmwrite, uid
from pydicom.dataset import FileMetaDataset
from pydicom.encaps import encapsulate

_LARGEST = 200_000  # bytes of a file shipped with pydicom
CHANGES = {
    True: ("bytes", "bytes", "cut", "element", "element", "stream header", "stream header", "syntax", "length"),
    False: ("bytes", "cut", "stream header", "length"),
}
_SYNTAXES = [
    *(uid.ImplicitVRLittleEndian, uid.ExplicitVRLittleEndian, uid.ExplicitVRBigEndian, uid.RLELossless),
    *(uid.JPEGBaseline8Bit, uid.JPEGExtended12Bit, uid.JPEGLossless, uid.JPEGLosslessSV1, uid.JPEGLSLossless),
    *(uid.JPEGLSNearLossless, uid.JPEG2000Lossless, uid.JPEG2000, uid.HTJ2KLossless, uid.HTJ2K),
    uid.DeflatedExplicitVRLittleEndian,
]


@dataclass(frozen=True)
class Sample:
    """A good file: where it comes from, its kind ("JPEG-LS Lossless", "PNG"), its bytes."""

    name: str
    kind: str
    data: bytes
    is_dicom: bool


def corpus() -> list[Sample]:
    """Return good files, the same in every run."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [*_shipped(), *_made(), *_rasters()]


def _kind(syntax: Any) -> str:
    name = uid.UID(str(syntax)).name
    return "DICOM " + re.sub(r" (Image Compression|Transfer Syntax).*|,.*|: Default.*", "", name)


def _shipped() -> list[Sample]:
    import pydicom.data

    folder = Path(pydicom.data.__file__).parent / "test_files"
    samples = []
    for path in sorted(folder.glob("*.dcm")):
        data = path.read_bytes()
        if len(data) <= _LARGEST:
            try:
                ds = dcmread(io.BytesIO(data), force=True)
                if "PixelData" not in ds or "Rows" not in ds:
                    continue
                syntax = ds.file_meta.TransferSyntaxUID if "TransferSyntaxUID" in ds.get("file_meta", {}) else ""
                syntax = getattr(ds, "file_meta", {}).get("TransferSyntaxUID", "")
            except Exception:
                continue
            samples.append(Sample(path.name, _kind(syntax) if syntax else "DICOM without meta", data, True))
    return samples


def _pictures() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    y, x = np.mgrid[0:40, 0:52]
    wave = (np.sin(x / 7) + np.cos(y / 5) + 2) / 4 + rng.normal(0, 0.01, x.shape)
    grey = wave.clip(0, 1)
    colour = np.stack([grey, grey[::-1], 1 - grey], -1)
    return {"grey": grey, "colour": colour}


def _dataset(stored: np.ndarray, bits: int, signed: bool = False) -> Dataset:
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
    ds.SOPClassUID, ds.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.7", "1.2.3.4"
    colour = stored.shape[-1] == 3
    ds.Rows, ds.Columns = stored.shape[-3:-1] if colour else stored.shape[-2:]
    if stored.ndim == (4 if colour else 3):
        ds.NumberOfFrames = stored.shape[0]
    ds.SamplesPerPixel, ds.PhotometricInterpretation = (3, "RGB") if colour else (1, "MONOCHROME2")
    if colour:
        ds.PlanarConfiguration = 0
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = stored.itemsize * 8, bits, bits - 1
    ds.PixelRepresentation = int(signed)
    if not colour:
        ds.RescaleSlope, ds.RescaleIntercept = "1", "-1024" if signed else "0"
        ds.WindowCenter, ds.WindowWidth = "40", "400"
    data = stored.tobytes()
    ds.PixelData = data + b"\0" * (len(data) % 2)
    ds["PixelData"].VR = "OW" if stored.itemsize > 1 else "OB"
    return ds


def _write(ds: Dataset, syntax: str) -> bytes:
    ds.file_meta.TransferSyntaxUID = syntax
    buffer = io.BytesIO()
    if uid.UID(syntax).is_encapsulated:
        ds["PixelData"].is_undefined_length = True
    dcmwrite(buffer, ds, enforce_file_format=True)
    return buffer.getvalue()


def _made() -> list[Sample]:
    pictures = _pictures()
    g8, g12 = np.uint8(np.rint(pictures["grey"] * 255)), np.uint16(np.rint(pictures["grey"] * 4095))
    rgb = np.uint8(np.rint(pictures["colour"] * 255))
    s16 = g12.astype(np.int16) - 2000
    samples = []

    def add(name: str, ds: Dataset, syntax: str, frames: list[bytes] | None = None) -> None:
        if frames is not None:
            ds.PixelData = encapsulate(frames)
        samples.append(Sample(f"made {name}", _kind(syntax), _write(ds, syntax), True))

    native = (uid.ImplicitVRLittleEndian, uid.ExplicitVRLittleEndian, uid.DeflatedExplicitVRLittleEndian)
    for syntax in native:
        for name, array, bits, signed in (("8", g8, 8, False), ("12", g12, 12, False), ("s16", s16, 16, True)):
            add(f"{name} bits", _dataset(array, bits, signed), syntax)
        add("colour", _dataset(rgb, 8), syntax)
        add("frames", _dataset(np.stack([g8, g8.T.reshape(g8.shape)]), 8), syntax)
    for name, array, bits, signed in (("12", g12, 12, False), ("s16", s16, 16, True)):
        ds = _dataset(array, bits, signed)
        ds.PixelData = array.astype(array.dtype.newbyteorder(">")).tobytes()
        add(f"{name} bits", ds, uid.ExplicitVRBigEndian)
    for name, array, bits, signed in (("8", g8, 8, False), ("12", g12, 12, False), ("s16", s16, 16, True)):
        ds = _dataset(array, bits, signed)
        ds.compress(uid.RLELossless, generate_instance_uid=False)
        add(f"{name} bits", ds, uid.RLELossless)
    ds = _dataset(rgb, 8)
    ds.compress(uid.RLELossless, generate_instance_uid=False)
    add("colour", ds, uid.RLELossless)
    for name, array in (("8 bits", g8), ("colour", rgb)):
        stream = io.BytesIO()
        Image.fromarray(array).save(stream, "JPEG", quality=90)
        ds = _dataset(array, 8)
        if array is rgb:
            ds.PhotometricInterpretation = "YBR_FULL_422"
        add(name, ds, uid.JPEGBaseline8Bit, [stream.getvalue()])
    try:
        import imagecodecs as codec
    except ImportError:
        return samples
    for name, array, bits in (("8 bits", g8, 8), ("12 bits", g12, 12), ("colour", rgb, 8)):
        jls = codec.jpegls_encode(array)
        near = codec.jpegls_encode(array, level=2)
        j2k = codec.jpeg2k_encode(array, level=0, reversible=True, bitspersample=bits, codecformat="j2k", mct=False)
        lossy = codec.jpeg2k_encode(array, level=60, bitspersample=bits, codecformat="j2k", mct=False)
        high = codec.htj2k_encode(array)
        sof3 = codec.ljpeg_encode(array, bitspersample=bits) if array.ndim == 2 else None
        for frame, syntax in (
            (jls, uid.JPEGLSLossless),
            (near, uid.JPEGLSNearLossless),
            (j2k, uid.JPEG2000Lossless),
            (lossy, uid.JPEG2000),
            (high, uid.HTJ2KLossless),
            (high, uid.HTJ2K),
            (sof3, uid.JPEGLossless),
            (sof3, uid.JPEGLosslessSV1),
        ):
            if frame is not None:
                ds = _dataset(array, bits)
                add(name, ds, syntax, [bytes(frame)])
                samples[-1].data  # noqa: B018
                if syntax == uid.JPEG2000Lossless and name == "8 bits":
                    ds = _dataset(np.stack([array, array]), bits)
                    add("two frames", ds, syntax, [bytes(frame), bytes(frame)])
    return samples


def _rasters() -> list[Sample]:
    pictures = _pictures()
    grey = Image.fromarray(np.uint8(np.rint(pictures["grey"] * 255)))
    deep = Image.fromarray(np.uint16(np.rint(pictures["grey"] * 65535)))
    rgb = Image.fromarray(np.uint8(np.rint(pictures["colour"] * 255)))
    rgba = rgb.copy()
    rgba.putalpha(grey)
    modes = {"L": grey, "I;16": deep, "RGB": rgb, "RGBA": rgba, "P": rgb.quantize(64), "1": grey.convert("1")}
    recipes: list[tuple[str, str, dict]] = [
        *(("PNG", mode, {}) for mode in modes),
        *(("JPEG", mode, {"quality": 90}) for mode in ("L", "RGB")),
        ("JPEG", "RGB", {"progressive": True}),
        *(("TIFF", mode, {"compression": "tiff_lzw"}) for mode in ("L", "I;16", "RGB", "P")),
        *(("TIFF", "L", {"compression": name}) for name in ("raw", "packbits", "tiff_adobe_deflate", "jpeg")),
        *(("TIFF", "1", {"compression": name}) for name in ("group3", "group4")),
        *(("BMP", mode, {}) for mode in ("L", "RGB", "P", "1")),
        *(("GIF", mode, {}) for mode in ("L", "P")),
        ("WEBP", "RGB", {"lossless": True}),
        ("WEBP", "RGBA", {"lossless": True}),
        ("WEBP", "RGB", {"quality": 90}),
    ]
    samples = []
    for kind, mode, options in recipes:
        stream = io.BytesIO()
        modes[mode].save(stream, kind, **options)
        samples.append(Sample(f"made {kind} {mode} {options}", kind, stream.getvalue(), False))
    return samples


# ---- changes --------------------------------------------------------------------------------------------------------


def alter(sample: Sample, change: str, rng: random.Random) -> bytes:
    """Return the bytes of a sample after a change of a kind."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _CHANGES[change](sample, rng)


def _bytes(sample: Sample, rng: random.Random) -> bytes:
    data = bytearray(sample.data)
    first = 132 if sample.is_dicom else 0
    for _ in range(rng.choice((1, 1, 3, 10, 40))):
        position = rng.randrange(first, len(data))
        data[position] = data[position] ^ (1 << rng.randrange(8)) if rng.random() < 0.5 else rng.randrange(256)
    return bytes(data)


def _cut(sample: Sample, rng: random.Random) -> bytes:
    return sample.data[: rng.randrange(len(sample.data) // 4, len(sample.data))]


def _element(sample: Sample, rng: random.Random) -> bytes:
    """One or two elements of group 0028 with another value."""
    small = [0, 1, 2, 3, 7, 8, 9, 11, 12, 14, 15, 16, 17, 24, 31, 32, 64, 255, 65535]
    choices: dict[str, list[Any]] = {
        **dict.fromkeys(("BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "SamplesPerPixel"), small),
        "PlanarConfiguration": [0, 1, 2],
        "Rows": [],
        "Columns": [],
        "NumberOfFrames": ["0", "1", "2", "3", "1000", "99999999"],
        "PhotometricInterpretation": [
            *("MONOCHROME1", "MONOCHROME2", "RGB", "YBR_FULL", "YBR_FULL_422", "YBR_RCT", "YBR_ICT", "PALETTE COLOR"),
            *("YBR_PARTIAL_420", "ARGB", "HSV", "NONSENSE"),
        ],
        "RescaleSlope": ["0", "-1", "1e-9", "1e300", "2.5"],
        "RescaleIntercept": ["-1024", "1e300", "0.5"],
        "WindowWidth": ["0", "0.5", "1", "-5", "1e9"],
        "PixelPaddingValue": [0, 1, 100],
    }
    try:
        ds = dcmread(io.BytesIO(sample.data), force=True)
        for _ in range(rng.choice((1, 1, 2))):
            keyword = rng.choice(list(choices))
            old = int(ds.get(keyword) or 1) if keyword in ("Rows", "Columns") else 0
            values = choices[keyword] or [old - 1, old + 1, 2 * old, old // 2, 1, 65535, 0]
            value = rng.choice(values)
            if keyword in ds and rng.random() < 0.1:
                del ds[keyword]
            else:
                setattr(ds, keyword, value)
        buffer = io.BytesIO()
        dcmwrite(buffer, ds, enforce_file_format=False)
        return buffer.getvalue()
    except Exception:  # a value that cannot be written
        return _bytes(sample, rng)


def _stream_header(sample: Sample, rng: random.Random) -> bytes:
    """Bytes near the beginning of the coded image."""
    data = bytearray(sample.data)
    start = 0
    if sample.is_dicom:
        start = data.rfind(b"\xe0\x7f\x10\x00")
        marks = [data.find(mark, start) for mark in (b"\xff\xd8\xff", b"\xff\x4f\xff\x51")]
        start = min([mark for mark in marks if mark >= 0], default=max(start, 132))
    for _ in range(rng.choice((1, 1, 2, 4))):
        position = min(start + rng.randrange(2, 120), len(data) - 1)
        data[position] = rng.choice((0, 1, 2, 3, 4, 8, 16, 64, 127, 128, 255, rng.randrange(256)))
    return bytes(data)


def _syntax(sample: Sample, rng: random.Random) -> bytes:
    """Another transfer syntax in the file's meta information, and nothing else changed."""
    start = sample.data.find(b"\x02\x00\x10\x00UI")
    if start < 0:
        return _bytes(sample, rng)
    length = int.from_bytes(sample.data[start + 6 : start + 8], "little")
    value = str(rng.choice(_SYNTAXES)).encode()
    value += b"\0" * (len(value) % 2)
    group = sample.data.find(b"\x02\x00\x00\x00UL\x04\x00")
    data = bytearray(sample.data)
    if 0 <= group < start:
        size = int.from_bytes(data[group + 8 : group + 12], "little") + len(value) - length
        data[group + 8 : group + 12] = size.to_bytes(4, "little")
    data[start + 6 : start + 8 + length] = len(value).to_bytes(2, "little") + value
    return bytes(data)


def _length(sample: Sample, rng: random.Random) -> bytes:
    """A length field that lies: of an element or item for DICOM, of any four bytes elsewhere."""
    data = bytearray(sample.data)
    places = [0]
    if sample.is_dicom:
        tags = (b"\x28\x00", b"\xe0\x7f\x10\x00", b"\xfe\xff\x00\xe0", b"\xfe\xff\xdd\xe0")
        places = [match.start() for tag in tags for match in re.finditer(re.escape(tag), sample.data)] or [132]
        position = rng.choice(places) + rng.choice((4, 6, 8))
    else:
        position = rng.randrange(min(400, len(data) - 4))
    value = rng.choice((0, 1, 2, 255, 65535, 2**31 - 1, 2**32 - 1, rng.randrange(2**16), rng.randrange(2**32)))
    width = rng.choice((2, 4))
    position = min(position, len(data) - width)
    data[position : position + width] = (value % 2 ** (8 * width)).to_bytes(width, rng.choice(("little", "big")))
    return bytes(data)


_CHANGES = {
    "none": lambda sample, rng: sample.data,
    "bytes": _bytes,
    "cut": _cut,
    "element": _element,
    "stream header": _stream_header,
    "syntax": _syntax,
    "length": _length,
}
