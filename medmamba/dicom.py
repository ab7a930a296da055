"""DICOM images as `MedicalImage` (needs pydicom 3: `pip install "medmamba[dicom]"`).

Grey pixels go through the standard's pipeline, PS3.3 C.11 and PS3.4 N.2, in this order:

1. stored values, of `BitsStored` bits
2. modality LUT or rescale slope and intercept, giving the raw units that `window` takes (Hounsfield units for CT)
3. the `window` argument, else the file's first VOI LUT, else its first window
4. scaling to [0, 1]: a window or LUT by its own output range; without one, the range that `BitsStored` allows after
   step 2 (for floating-point pixels, which declare none, the smallest and largest value of the frame)
5. inversion for MONOCHROME1 or a presentation LUT shape INVERSE

For enhanced multi-frame objects 2 and 3 come from the functional groups of the frame. YBR and palettes become RGB.

Privacy: only the elements that describe pixels are read from a file, and no text of a file enters an error, a note or a
`MedicalImage`. Errors of pydicom may quote values, therefore they are replaced and not chained.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from ._dicom_decode import PIXEL_KEYWORDS, decode_frame, is_big_endian, read_dataset
from ._image import (
    ImageError,
    MedicalImage,
    Window,
    check_frame,
    check_size,
    is_dataset,
    naming_errors,
    open_binary,
)

if TYPE_CHECKING:
    from pydicom import Dataset


@dataclass(frozen=True)
class WindowPreset:
    """A window declared in a file. `explanation` is the file's own text for it ("LUNG"), often empty."""

    center: float
    width: float
    explanation: str = ""


@dataclass(frozen=True)
class DicomWindows:
    """What a window/level control needs. Everything is in the raw units that `load_image(window=)` takes.

    Attributes:
        presets: windows declared in the file, its default first.
        value_range: smallest and largest value in the frame; None for colour, which takes no window.
        unit: "HU" for Hounsfield units, else "".
    """

    presets: tuple[WindowPreset, ...]
    value_range: tuple[float, float] | None
    unit: str = ""


def load_dicom(source: BinaryIO | Dataset, name: str, frame: int | None, window: Window | None) -> MedicalImage:
    """Read one frame from a seekable stream or a Dataset. `medmamba.load_image` is the public way in."""
    with _decoding():
        decoded = _Frame(read_dataset(source), frame)
        pixels, value_range, notes = decoded.grey(window) if decoded.is_grey else decoded.color(window)
        return MedicalImage(
            pixels=np.ascontiguousarray(pixels, dtype=np.float32),
            source=name,
            format="DICOM",
            mode=decoded.photometric,
            bit_depth=decoded.bits,
            frame=decoded.index,
            n_frames=decoded.n_frames,
            value_range=value_range,
            notes=tuple(notes),
            window=decoded.applied[0],
            window_from=decoded.applied[1],
        )


def dicom_window_presets(source: Any, *, frame: int | None = None) -> DicomWindows:
    """Windows and range of values of a DICOM path, bytes, binary file object or Dataset.

    Raises:
        ImageError: as `load_image`.
    """
    with naming_errors(source):
        if is_dataset(source):
            return _windows(source, frame)
        with open_binary(source) as stream:
            return _windows(stream, frame)


def _windows(source: BinaryIO | Dataset, frame: int | None) -> DicomWindows:
    with _decoding():
        decoded = _Frame(read_dataset(source), frame)
        if not decoded.is_grey:
            return DicomWindows((), None)
        raw, _ = decoded.modality([])
        unit = decoded.find("RescaleType") or ("HU" if decoded.find("Modality") == "CT" else "")
        return DicomWindows(decoded.presets(), (float(raw.min()), float(raw.max())), "HU" if unit == "HU" else "")


@contextmanager
def _decoding() -> Iterator[None]:
    try:
        yield
    except ImageError:
        raise
    except Exception as exc:  # damaged headers fail in any way
        raise ImageError(
            f"damaged or unusual DICOM file ({type(exc).__name__} while reading it); export it again"
        ) from None


class _Frame:
    """One decoded frame and the header values that apply to it."""

    def __init__(self, ds: Dataset, frame: int | None) -> None:
        self.ds = ds
        if not any(keyword in ds for keyword in PIXEL_KEYWORDS):
            raise ImageError(
                f"this holds no DICOM pixel data{_object_kind(ds)}; choose an image object of the study, or copy the "
                "file again if it was cut short"
            )
        required = ("Rows", "Columns", "SamplesPerPixel", "BitsAllocated", "PhotometricInterpretation")
        if missing := [keyword for keyword in required if keyword not in ds]:
            raise ImageError(f"the DICOM header lacks {', '.join(missing)}; export the image again")
        self.n_frames = int(ds.get("NumberOfFrames") or 1)
        self.index = check_frame(frame, self.n_frames)
        check_size(int(ds.Rows), int(ds.Columns))
        self.is_float = "PixelData" not in ds
        self.bits = int(ds.BitsAllocated if self.is_float else ds.get("BitsStored") or ds.BitsAllocated)
        self.signed = ds.get("PixelRepresentation") == 1
        self.applied: tuple[Window | None, str] = (None, "")  # the window that `grey` applies, and whose it is
        self.photometric = str(ds.PhotometricInterpretation)
        self._groups = [*_functional_groups(ds, self.index), ds]
        self.stored, self.decoded_photometric = decode_frame(ds, self.index, self.n_frames)

    @property
    def is_grey(self) -> bool:
        return self.decoded_photometric in ("MONOCHROME1", "MONOCHROME2")

    @property
    def voi_function(self) -> str:
        # LINEAR counts integer levels, which floating-point pixels do not have.
        return str(self.find("VOILUTFunction") or ("LINEAR_EXACT" if self.is_float else "LINEAR")).upper()

    def find(self, keyword: str) -> Any:
        """Value of an element for this frame; None where it is absent or empty."""
        values = (group.get(keyword) for group in self._groups)
        return next((value for value in values if value not in (None, "") and value != []), None)

    def modality(self, notes: list[str]) -> tuple[np.ndarray, tuple[float, float]]:
        """Raw values in float64 `(H, W)`, and the range that the header allows them."""
        low, high = (-(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1) if self.signed else (0, 2**self.bits - 1)
        if self.is_float:
            if not np.isfinite(self.stored).all():
                raise ImageError("the pixels hold NaN or infinite values")
            low, high = self.stored.min(), self.stored.max()
        if luts := self.find("ModalityLUTSequence"):
            values, largest = _apply_lut(self.stored, luts[0], signed=low < 0, big_endian=is_big_endian(self.ds))
            notes.append("modality LUT applied")
            return values.astype(np.float64), (0, largest)
        slope, intercept = self.find("RescaleSlope"), self.find("RescaleIntercept")
        slope, intercept = float(1 if slope is None else slope), float(intercept or 0)
        if not (math.isfinite(slope) and math.isfinite(intercept)) or slope == 0:
            raise ImageError("the rescale slope or intercept of the DICOM header is not usable; export the image again")
        values = self.stored.astype(np.float64)
        if (slope, intercept) != (1, 0):
            values = values * slope + intercept
            notes.append(f"rescaled by slope {slope:g}, intercept {intercept:g}")
        ends = sorted((low * slope + intercept, high * slope + intercept))
        return values, (ends[0], ends[1])

    def grey(self, window: Window | None) -> tuple[np.ndarray, tuple[float, float], list[str]]:
        """Pixels `(H, W, 1)` in [0, 1], range of the raw values, notes."""
        if self.stored.ndim != 2:
            raise ImageError("the DICOM header calls a colour image grey; export the image again")
        notes: list[str] = []
        raw, allowed = self.modality(notes)
        presets = self.presets()
        voi_luts = [lut for lut in self.find("VOILUTSequence") or [] if "LUTDescriptor" in lut and "LUTData" in lut]
        if window is not None:
            # LINEAR is not defined below a width of 1.
            exact = self.voi_function == "LINEAR" and window[1] < 1
            pixels = _apply_window(raw, *window, "LINEAR_EXACT" if exact else self.voi_function)
            notes.append(f"window {window[0]:g}/{window[1]:g} applied")
            self.applied = window, "argument"
        elif voi_luts:
            values, largest = _apply_lut(raw, voi_luts[0], signed=allowed[0] < 0, big_endian=is_big_endian(self.ds))
            pixels = values / largest
            notes.append("VOI LUT applied" + (f" (first of {len(voi_luts)})" if len(voi_luts) > 1 else ""))
        elif presets:
            center, width = presets[0].center, presets[0].width
            pixels = _apply_window(raw, center, width, self.voi_function)
            self.applied = (center, width), "file"
            more = f" (first of {len(presets)} in the file)" if len(presets) > 1 else ""
            notes.append(f"VOI window {center:g}/{width:g} applied{more}")
        else:
            low, high = allowed
            level = 1 if self.voi_function == "LINEAR" else 0
            if self.voi_function != "SIGMOID" and high > low:
                self.applied = ((low + high + level) / 2, high - low + level), "range"
            pixels = np.clip((raw - low) / max(high - low, 1e-300), 0, 1)
            what = "range of the floating-point values" if self.is_float else f"full {self.bits}-bit range"
            advice = "; contrast may be low, window=(center, width) sets it" if self.bits > 8 else ""
            notes.append(f"no usable window in the file: {what} {low:g}..{high:g} scaled to 0..1{advice}")
        # Exporters write INVERSE together with MONOCHROME1, so the two are one inversion.
        if self.photometric == "MONOCHROME1" or str(self.find("PresentationLUTShape")).upper() == "INVERSE":
            pixels = 1 - pixels
            notes.append(f"{'MONOCHROME1' if self.photometric == 'MONOCHROME1' else 'INVERSE presentation'} inverted")
        return pixels[..., None], (float(raw.min()), float(raw.max())), notes + _aspect_note(self)

    def color(self, window: Window | None) -> tuple[np.ndarray, None, list[str]]:
        """Pixels `(H, W, 3)` in [0, 1], no range, notes."""
        if window is not None:
            raise ImageError("window applies to grey images only; this one is in colour")
        if self.decoded_photometric == "PALETTE COLOR":
            return _apply_palette(self.stored, self.ds), None, ["palette expanded to RGB", *_aspect_note(self)]
        if self.decoded_photometric not in ("RGB", "YBR_ICT", "YBR_RCT") or self.stored.ndim != 3 or self.signed:
            raise ImageError("this DICOM colour space is not supported; export the image as RGB or MONOCHROME2")
        notes = [] if self.photometric == "RGB" else [f"{self.photometric} converted to RGB"]
        return np.clip(self.stored / (2**self.bits - 1), 0, 1), None, notes + _aspect_note(self)

    def presets(self) -> tuple[WindowPreset, ...]:
        """Usable windows that the header declares; a width below the minimum of its VOI function is left out."""
        centers, widths = _numbers(self.find("WindowCenter")), _numbers(self.find("WindowWidth"))
        texts = self.find("WindowCenterWidthExplanation") or []
        texts = [texts] if isinstance(texts, str) else [str(text) for text in texts]
        minimum = 1 if self.voi_function == "LINEAR" else 1e-12
        pairs = enumerate(zip(centers, widths, strict=False))
        return tuple(
            WindowPreset(center, width, texts[i] if i < len(texts) else "")
            for i, (center, width) in pairs
            if math.isfinite(center) and math.isfinite(width) and width >= minimum
        )


def _apply_window(raw: np.ndarray, center: float, width: float, function: str) -> np.ndarray:
    """PS3.3 C.11.2.1.2 and C.11.2.1.3 with the output range [0, 1]."""
    if function == "SIGMOID":
        return 1 / (1 + np.exp(np.clip(-4 * (raw - center) / width, -700, 700)))
    if function == "LINEAR":
        # The standard's `width - 1` counts levels; a width of 1 is a threshold.
        center, width = center - 0.5, width - 1
        if width == 0:
            return (raw > center).astype(np.float64)
    elif function != "LINEAR_EXACT":
        raise ImageError("the DICOM header names an unknown VOI LUT function; export the image again")
    return np.clip((raw - center) / width + 0.5, 0, 1)


def _apply_lut(values: np.ndarray, lut: Dataset, *, signed: bool, big_endian: bool) -> tuple[np.ndarray, int]:
    """Look `values` up (PS3.3 C.11.1.1); returns the entries and the largest entry that the descriptor allows.

    Not pydicom's apply_voi: it indexes in the type of the entries, so 12-bit values wrap in a LUT of 8-bit entries.
    """
    entries, first, bits = (int(value) for value in lut.LUTDescriptor)
    entries = entries or 2**16
    if signed and first >= 2**15:  # written as unsigned
        first -= 2**16
    data = lut.LUTData
    if isinstance(data, bytes):
        table = np.frombuffer(data, np.uint8 if len(data) < 2 * entries else ">u2" if big_endian else "<u2")
    else:
        table = np.atleast_1d(np.asarray(data, dtype=np.int64))
    if len(table) < entries or not 1 <= bits <= 16:
        raise ImageError("a lookup table of the DICOM header is damaged; export the image again")
    index = np.clip(np.rint(values).astype(np.int64) - first, 0, entries - 1)
    return np.clip(table.astype(np.int64)[index], 0, 2**bits - 1), 2**bits - 1


def _apply_palette(stored: np.ndarray, ds: Dataset) -> np.ndarray:
    """Palette colour to RGB `(H, W, 3)` in [0, 1] (PS3.3 C.7.6.3.1.5)."""
    entries, _, bits = (int(value) for value in ds.RedPaletteColorLookupTableDescriptor)
    entries = entries or 2**16
    if "RedPaletteColorLookupTableData" not in ds:
        from pydicom.pixels import apply_color_lut

        if bits == 8 and entries > 256:
            raise ImageError("this segmented DICOM palette is not supported; export the image as RGB")
        return apply_color_lut(stored, ds)[..., :3] / (2**bits - 1)
    planes = []
    for color in ("Red", "Green", "Blue"):
        first = int(ds[f"{color}PaletteColorLookupTableDescriptor"].value[1])
        data = ds[f"{color}PaletteColorLookupTableData"].value
        wide = len(data) >= 2 * entries
        table = np.frombuffer(data, (">u2" if is_big_endian(ds) else "<u2") if wide else np.uint8)
        if len(table) < entries:
            raise ImageError("the DICOM palette is damaged; export the image as RGB")
        # 8-bit entries may lie in 16-bit words, and some writers declare 16 bits for 8-bit words.
        scale = 255 if not wide or (bits == 8 and table.max() < 256) else 65535
        index = np.clip(stored.astype(np.int64) - first, 0, entries - 1)
        planes.append(table[index] / scale)
    return np.stack(planes, axis=-1)


def _functional_groups(ds: Dataset, index: int) -> list[Dataset]:
    """The functional group items of a frame that hold rescale and window, per frame before shared."""
    items: list[Dataset] = []
    for keyword, position in (("PerFrameFunctionalGroupsSequence", index), ("SharedFunctionalGroupsSequence", 0)):
        groups: Sequence[Dataset] = ds.get(keyword) or []
        if position < len(groups):
            for macro in ("PixelValueTransformationSequence", "FrameVOILUTSequence", "PixelMeasuresSequence"):
                items.extend((groups[position].get(macro) or [])[:1])
    return items


def _aspect_note(frame: _Frame) -> list[str]:
    spacing = _numbers(frame.find("PixelSpacing")) or _numbers(frame.find("PixelAspectRatio"))
    if len(spacing) == 2 and min(spacing) > 0 and abs(spacing[0] / spacing[1] - 1) > 0.01:
        return [f"pixels are not square (height to width {spacing[0] / spacing[1]:.3g}); not resampled"]
    return []


def _numbers(value: Any) -> list[float]:
    if value is None:
        return []
    return [float(item) for item in (value if isinstance(value, Sequence) and not isinstance(value, str) else [value])]


def _object_kind(ds: Dataset) -> str:
    from pydicom.uid import UID

    uid = UID(str(ds.get("SOPClassUID") or ""))
    return f" (it is {uid.name})" if uid and uid.name != uid else ""
