"""One frame of a DICOM image, from stored values to pixels in [0, 1]; `dicom.load` lists the steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from ..image import ImageError, Window, check_frame, check_size, warning_note
from .decode import PIXEL_KEYWORDS, decode_frame, is_big_endian, transfer_syntax
from .elements import read_integer, read_numbers, read_value
from .padding import padding_mask
from .palette import Palette, has_palette, pixel_presentation
from .stored import stored_range, stored_values
from .tables import TableError, apply_lut
from .voi import WindowPreset, apply_range, apply_window, usable_windows, voi_function

if TYPE_CHECKING:
    from pydicom import Dataset


class Frame:
    """One decoded frame and the header values that apply to it. `notes` grows as the steps are taken."""

    def __init__(self, ds: Dataset, frame: int | None) -> None:
        self.ds = ds
        self.notes: list[str] = []
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
        self.value_range: tuple[float, float] | None = None
        self.photometric = str(ds.PhotometricInterpretation)
        self.groups = _functional_groups(ds, self.index)
        words, self.decoded_photometric, decoding_notes = decode_frame(ds, self.index, self.n_frames)
        self.notes += decoding_notes
        self.big_endian = is_big_endian(ds)
        self.stored = words
        if not self.is_float:
            compressed = transfer_syntax(ds).is_encapsulated
            high_bit = read_integer(ds, "HighBit")
            self.stored = stored_values(words, self.bits, high_bit, self.signed, self.notes, compressed=compressed)
        self.padding = self.colored = None
        if self.is_grey:
            if self.stored.ndim != 2:
                raise ImageError("the DICOM header calls a colour image grey; export the image again")
            self.padding = padding_mask(ds, words, self.stored, self.bits, self.signed, self.notes)
            self.colored = self._supplemental()
        self._voi_function = ""

    @cached_property
    def _extent(self) -> tuple[float, float]:
        """Smallest and largest stored value of the frame."""
        return self.stored.min().item(), self.stored.max().item()

    @property
    def is_grey(self) -> bool:
        return self.decoded_photometric in ("MONOCHROME1", "MONOCHROME2")

    @property
    def voi_function(self) -> str:
        if not self._voi_function:
            declared = str(self.find("VOILUTFunction") or "").upper()
            self._voi_function = voi_function(declared, is_float=self.is_float, notes=self.notes)
        return self._voi_function

    def find(self, keyword: str) -> Any:
        """Returns the value of an element for this frame, or None if it is absent, empty or not readable."""
        values = (read_value(group, keyword) for group in (*self._macros(), self.ds))
        return next((value for value in values if value is not None), None)

    def numbers(self, keyword: str) -> list[float | None]:
        """Returns the values of a numeric element for this frame, as `read_numbers`."""
        return next((found for group in (*self._macros(), self.ds) if (found := read_numbers(group, keyword))), [])

    def _macros(self) -> Iterator[Dataset]:
        """Yields the functional group items that hold rescale, window and spacing, per-frame before shared."""
        for group in self.groups:
            for macro in ("PixelValueTransformationSequence", "FrameVOILUTSequence", "PixelMeasuresSequence"):
                yield from (group.get(macro) or [])[:1]

    def _allowed(self) -> tuple[float, float]:
        """Returns the range that the header allows for stored values; for floating-point pixels, the range found."""
        if not self.is_float:
            return stored_range(self.bits, self.signed)
        found = self.stored if self.padding is None else self.stored[~self.padding]
        if not np.isfinite(found).all():
            raise ImageError("the pixels hold NaN or infinite values")
        return float(found.min()), float(found.max())

    def _supplemental(self) -> tuple[np.ndarray, Palette] | None:
        """Returns the mask of values coloured by a supplemental palette, and the palette (PS3.3 C.7.6.19), or None."""
        presentation = pixel_presentation(self.ds, self.groups)
        if presentation not in ("COLOR", "MIXED"):
            return None
        if self.is_float or not has_palette(self.ds):
            self.notes.append(warning_note("palette-missing", "the file declares colour (0008,9205); drawn in grey"))
            return None
        try:
            palette = Palette(self.ds, self._allowed(), self.notes, big_endian=self.big_endian)
        except TableError:
            self.notes.append(warning_note("palette-unreadable", "supplemental palette unreadable; drawn in grey"))
            return None
        mask = self.stored >= palette.first
        if self.padding is not None:
            mask &= ~self.padding
        if not mask.any():
            return None
        self.notes.append(f"supplemental palette applied ({mask.mean():.0%} of the pixels are colours)")
        return mask, palette

    def modality(self) -> tuple[np.ndarray, tuple[float, float]]:
        """Returns raw values, float64 `(H, W)`, and the range that the header allows them; sets `value_range`."""
        low, high = self._allowed()
        stored = self.stored
        if self.is_float and self.padding is not None:
            stored = np.where(self.padding, low, stored)
        if luts := self.find("ModalityLUTSequence"):
            values, largest = apply_lut(stored, luts[0], (low, high), self.notes, big_endian=self.big_endian)
            self.notes.append("modality LUT applied")
            raw, allowed = values.astype(np.float64), (0.0, float(largest))
        else:
            slope, intercept = self._rescale()
            raw = stored.astype(np.float64)
            if (slope, intercept) != (1, 0):
                raw = raw * slope + intercept
                self.notes.append(f"rescaled by slope {slope:g}, intercept {intercept:g}")
            ends = sorted((low * slope + intercept, high * slope + intercept))
            allowed = (ends[0], ends[1])
            if not np.isfinite(ends).all():
                raise ImageError("the rescaled values overflow; export the image again")
            if self.padding is None and self.colored is None:
                found = sorted((self._extent[0] * slope + intercept, self._extent[1] * slope + intercept))
                self.value_range = found[0], found[1]
        if self.value_range is None:
            self.value_range = self._range_of(raw)
        return raw, allowed

    def _rescale(self) -> tuple[float, float]:
        found = []
        for keyword, tag, default in (("RescaleSlope", "0028,1053", 1.0), ("RescaleIntercept", "0028,1052", 0.0)):
            values = self.numbers(keyword) or [default]
            if values[0] is None or len(set(values)) > 1 or (keyword == "RescaleSlope" and values[0] == 0):
                raise ImageError(
                    f"{keyword} ({tag}) of the DICOM header is not a usable number; export the image again"
                )
            found.append(values[0])
        return found[0], found[1]

    def _range_of(self, raw: np.ndarray) -> tuple[float, float]:
        """Returns the smallest and largest raw value of the pixels drawn in grey."""
        if self.padding is None and self.colored is None:
            return float(raw.min()), float(raw.max())
        drawn = np.ones(raw.shape, bool) if self.padding is None else ~self.padding
        if self.colored is not None:
            drawn &= ~self.colored[0]
        values = raw[drawn]
        return (float(values.min()), float(values.max())) if values.size else (float(raw.min()), float(raw.max()))

    def grey(self, window: Window | None) -> np.ndarray:
        """Returns pixels `(H, W, 1)` in [0, 1], or `(H, W, 3)` if a supplemental palette colours some."""
        pixels = self._by_value(window)
        # Exporters write INVERSE together with MONOCHROME1, so the two are one inversion.
        shape = str(self.find("PresentationLUTShape") or "").upper()
        if self.photometric == "MONOCHROME1" or shape == "INVERSE":
            pixels = 1 - pixels
            self.notes.append(
                f"{'MONOCHROME1' if self.photometric == 'MONOCHROME1' else 'INVERSE presentation'} inverted"
            )
        if shape not in ("", "IDENTITY", "INVERSE") or "PresentationLUTSequence" in self.ds:
            self.notes.append(
                warning_note("presentation-lut", "the file's presentation LUT (2050,0010) is not applied")
            )
        if self.padding is not None:
            pixels = np.where(self.padding, 0, pixels)
        pixels = pixels[..., None]
        if self.colored is not None:
            mask, palette = self.colored
            pixels = np.repeat(pixels, 3, axis=-1)
            pixels[mask] = palette(self.stored[mask])
        return pixels

    def _by_value(self, window: Window | None) -> np.ndarray:
        """Returns the pixels after steps 2 to 4, computed once for each stored value where those are few and fit."""
        stored = self.stored
        simple = not self.is_float and self.padding is None and self.colored is None
        if not simple or self.find("ModalityLUTSequence") or self.find("VOILUTSequence"):
            return self._voi(*self.modality(), window)
        low, high = (int(value) for value in self._extent)
        if 4 * (high - low) > stored.size:
            return self._voi(*self.modality(), window)
        self.stored = np.arange(low, high + 1).astype(stored.dtype)
        try:
            by_value = self._voi(*self.modality(), window).astype(np.float32)
        finally:
            self.stored = stored
        return by_value.take(stored if low == 0 else stored.astype(np.int64) - low)

    def _voi(self, raw: np.ndarray, allowed: tuple[float, float], window: Window | None) -> np.ndarray:
        """Maps raw values to [0, 1] by the requested window, the file's VOI LUT, its window, or the allowed range."""
        if window is not None:
            self.notes.append(f"window {window[0]:g}/{window[1]:g} applied")
            self.applied = window, "argument"
            return apply_window(raw, *window, self.voi_function)
        for lut in self.find("VOILUTSequence") or []:
            try:
                notes: list[str] = []
                values, largest = apply_lut(raw, lut, allowed, notes, big_endian=self.big_endian)
            except TableError:
                self.notes.append(
                    warning_note("voi-lut", "a VOI LUT of the file is damaged; that table is not applied")
                )
                continue
            several = len(self.find("VOILUTSequence"))
            also = "; the file's window is not" if self.numbers("WindowWidth") else ""
            self.notes += [*notes, "VOI LUT applied" + (f" (first of {several})" if several > 1 else "") + also]
            return values / largest
        presets = self.presets(self.notes)
        function = self.voi_function
        if presets:
            center, width = presets[0].center, presets[0].width
            self.applied = (center, width), "file"
            more = f" (first of {len(presets)} in the file)" if len(presets) > 1 else ""
            self.notes.append(f"VOI window {center:g}/{width:g} applied{more}")
            return apply_window(raw, center, width, function)
        low, high = allowed
        level = 1 if function == "LINEAR" else 0
        if function != "SIGMOID" and high > low:
            self.applied = ((low + high + level) / 2, high - low + level), "range"
        self.notes.append(self._full_range_note(low, high))
        return apply_range(raw, low, high)

    def _full_range_note(self, low: float, high: float) -> str:
        what = "range of the floating-point values" if self.is_float else f"full {self.bits}-bit range"
        text = f"no usable window in the file: {what} {low:g}..{high:g} scaled to 0..1"
        if self.is_float or self.bits <= 8 or self.value_range is None:
            return text
        first, last = self.value_range
        if last - first >= (high - low) / 2:
            return f"{text}; contrast may be low, window=(center, width) sets it"
        return warning_note(
            "unused-range", f"{text}, but the values are in {first:g}..{last:g}; window=(center, width) sets another"
        )

    def color(self, window: Window | None) -> np.ndarray:
        """Returns pixels `(H, W, 3)` in [0, 1]."""
        if window is not None:
            raise ImageError("window applies to grey images only; this one is in colour")
        if self.decoded_photometric == "PALETTE COLOR":
            if self.stored.ndim != 2:
                raise ImageError("the DICOM header calls a colour image a palette; export the image again")
            palette = Palette(self.ds, self._allowed(), self.notes, big_endian=self.big_endian)
            self.notes.append("palette expanded to RGB")
            return palette(self.stored)
        if self.decoded_photometric not in ("RGB", "YBR_ICT", "YBR_RCT") or self.stored.ndim != 3 or self.signed:
            raise ImageError("this DICOM colour space is not supported; export the image as RGB or MONOCHROME2")
        if self.photometric != "RGB":
            self.notes.append(f"{self.photometric} converted to RGB")
        used = self.used_bits() or self.bits
        if self.bits > 8 and used < self.bits:
            self.notes.append(
                warning_note(
                    "unused-range",
                    f"colours of {self.bits} bits use only {used}, so the image is dark; save it as 8-bit",
                )
            )
        largest = 2**self.bits - 1
        return (
            np.divide(self.stored, np.float32(largest), dtype=np.float32) if self.bits <= 16 else self.stored / largest
        )

    def used_bits(self) -> int | None:
        """Returns the bits that the stored values of the frame need; None for floating point."""
        if self.is_float:
            return None
        low, high = (int(value) for value in self._extent)
        return max(1, high.bit_length(), (-low - 1).bit_length() if low < 0 else 0) + int(self.signed)

    def presets(self, notes: list[str] | None = None) -> tuple[WindowPreset, ...]:
        """Returns the usable windows that the header declares."""
        centers, widths = self.numbers("WindowCenter"), self.numbers("WindowWidth")
        explanation = self.find("WindowCenterWidthExplanation")
        return usable_windows(centers, widths, explanation, [] if notes is None else notes)


def _functional_groups(ds: Dataset, index: int) -> list[Dataset]:
    """Returns the functional groups of a frame: its own before the shared ones."""
    groups: list[Dataset] = []
    for keyword, position in (("PerFrameFunctionalGroupsSequence", index), ("SharedFunctionalGroupsSequence", 0)):
        items: Sequence[Dataset] = ds.get(keyword) or []
        groups.extend(items[position : position + 1])
    return groups


def _object_kind(ds: Dataset) -> str:
    from pydicom.uid import UID

    uid = UID(str(ds.get("SOPClassUID") or ""))
    return f" (it is {uid.name})" if uid and uid.name != uid else ""
