"""Shared by all readers: the result, the errors, the limits, and how a source is opened."""

from __future__ import annotations

import copy
import io
import math
import operator
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, BinaryIO, TypeGuard

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from pydicom import Dataset

MAX_PIXELS = 8192 * 8192
"""Images with more pixels than this are refused before they are decoded (as float32 RGB: 0.8 GB)."""

Window = tuple[float, float]
"""`(center, width)` in raw units."""


class ImageError(ValueError):
    """An image that cannot be read as requested. The message says why and what to do."""


class FrameNeeded(ImageError):
    """A source of several frames of which none was chosen."""

    n_frames: int = 0


class WindowNeeded(ImageError):
    """Grey values that declare no range; `value_range` is that of the values found."""

    value_range: tuple[float, float] = (0.0, 0.0)


class MissingDependencyError(ImageError, ImportError):
    """An image that needs a package that is not installed. The message holds the install command."""


_WARNING = "warning: "


def warning_note(kind: str, text: str) -> str:
    """Returns a note that affects how far a result for the image can be trusted: "warning: KIND: TEXT".

    Args:
        kind: stable name for programs, in lower case with hyphens ("unused-range").
        text: for people: what was found, and what to do where something can be done.
    """
    return f"{_WARNING}{kind}: {text}"


@dataclass(frozen=True, eq=False)
class MedicalImage:
    """One image, ready for a model's preprocessing. Holds no patient data beyond the pixels and the file's name.

    Attributes:
        pixels: float32 `(H, W, C)` in [0, 1]; `C` is 1 for grey and 3 for RGB. Never resized.
        source: name of the file, or what kind of object it was.
        format: "PNG", "JPEG", "DICOM", "numpy", ...
        mode: pixel mode of the source: Pillow's mode, the numpy dtype, or DICOM's photometric interpretation.
        bit_depth: bits per channel in the source.
        frame: index of the frame read, from 0.
        n_frames: number of frames in the source.
        value_range: smallest and largest raw value of a grey image, in the units that `window` takes (for DICOM after
            the modality LUT, so Hounsfield units for CT, and without pixel padding); None for colour.
        notes: what was done to get from the source to `pixels`, in order, for people to read. Those that change what
            an answer is worth begin with "warning: " and a kind; see `warnings`.
        window: the window that was applied: read again with it, the source gives the same pixels. None for colour, and
            where something else than a window was applied (a lookup table, a range drawn under a sigmoid).
        window_from: who chose it: "argument", "file", or "range" for the range that the format declares; "" for None.
        used_bits: bits that the values need, where they are integers of a declared range; at most `bit_depth`, and
            smaller for 12-bit values in a 16-bit file. None for floating point and where it is not known.
        voi_function: how DICOM applies a window to this image: "LINEAR", "LINEAR_EXACT" or "SIGMOID"; else "".
    """

    pixels: np.ndarray = field(repr=False)
    source: str
    format: str
    mode: str
    bit_depth: int
    frame: int = 0
    n_frames: int = 1
    value_range: tuple[float, float] | None = None
    notes: tuple[str, ...] = ()
    window: Window | None = None
    window_from: str = ""
    used_bits: int | None = None
    voi_function: str = ""

    @classmethod
    def of_levels(cls, levels: np.ndarray, **info: Any) -> MedicalImage:
        """Returns an image whose pixels are `levels / 255`, which are computed only if somebody asks for them.

        Args:
            levels: uint8 `(H, W, C)`.
            info: the other attributes.
        """
        image = cls(pixels=levels, **info)
        values = image.__dict__
        values["_levels"] = values.pop("pixels")
        return image

    def with_notes(self, *notes: str) -> MedicalImage:
        """Returns the same image with further notes."""
        found = copy.copy(self)
        found.__dict__["notes"] = (*self.notes, *notes)
        return found

    @property
    def levels(self) -> np.ndarray | None:
        """The pixels as uint8 `(H, W, C)`, 255 for 1; None where they have more than 8 bits, or were asked for as
        float already, in which case somebody may have changed them."""
        return None if "pixels" in self.__dict__ else self.__dict__["_levels"]

    def __getattr__(self, name: str) -> Any:
        levels = self.__dict__.get("_levels") if name == "pixels" else None
        if levels is None:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return self.__dict__.setdefault("pixels", np.divide(levels, np.float32(255), dtype=np.float32))

    @property
    def range_window(self) -> Window | None:
        """The window that spreads the values found over [0, 1]; None for colour and for constant images."""
        if self.value_range is None or not self.value_range[0] < self.value_range[1]:
            return None
        low, high = self.value_range
        level = 1 if self.voi_function == "LINEAR" else 0  # PS3.3 C.11.2.1.2: a window counts levels there
        return (low + high + level) / 2, high - low + level

    @property
    def low_contrast(self) -> bool:
        """Whether another window would show far more than the one applied: the pixels use less than a tenth of [0, 1],
        less than half where nobody chose the window, or lie at its ends almost all."""
        if self.range_window is None or (self.bit_depth <= 8 and self.window_from == "range"):
            return False
        spread = float(self.pixels.max() - self.pixels.min())
        if spread < (0.5 if self.window_from == "range" else 0.1):
            return True
        ends = int((self.pixels <= 0).sum()) + int((self.pixels >= 1).sum())
        return ends > 0.98 * self.pixels.size

    @property
    def warnings(self) -> tuple[str, ...]:
        """The notes that affect how far a result for this image can be trusted, each "warning: KIND: TEXT"."""
        return tuple(note for note in self.notes if note.startswith(_WARNING))

    @property
    def warning_kinds(self) -> tuple[str, ...]:
        """The kinds of `warnings`, stable names for programs ("unused-range", "two-valued", ...)."""
        return tuple(note.split(": ", 2)[1] for note in self.warnings)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels, after any EXIF rotation."""
        found = self.pixels if self.levels is None else self.levels
        return found.shape[0], found.shape[1]

    @property
    def constant(self) -> bool:
        """Whether all values are equal."""
        found = self.pixels if self.levels is None else self.levels
        return bool(found.max() == found.min())

    def to_uint8(self) -> np.ndarray:
        """Returns the pixels as uint8 `(H, W, C)`, rounded to the nearest of 256 levels."""
        return np.rint(self.pixels * 255).astype(np.uint8)

    def to_pil(self) -> Image.Image:
        """Returns an 8-bit Pillow image, mode "L" or "RGB"."""
        array = self.to_uint8()
        return Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)


def check_size(height: int, width: int) -> None:
    """Rejects empty and oversized images, before any pixel is decoded."""
    if height < 1 or width < 1:
        raise ImageError(f"the image has no pixels ({width}×{height})")
    if height * width > MAX_PIXELS:
        raise ImageError(
            f"{width}×{height} is {height * width / 1e6:.0f} million pixels; the limit is {MAX_PIXELS / 1e6:.0f} "
            "million. Crop it or save a smaller version first"
        )


def check_frame(frame: int | None, n_frames: int) -> int:
    """Returns the index of the frame to read; raises `ImageError` if it is missing but required, or out of range."""
    if frame is None:
        if n_frames > 1:
            error = FrameNeeded(f"this image has {n_frames} frames; choose one with frame=0 ... frame={n_frames - 1}")
            error.n_frames = n_frames
            raise error
        return 0
    try:
        index = operator.index(frame)
    except TypeError:
        raise ImageError(f"frame must be an integer, not {type(frame).__name__}") from None
    if not 0 <= index < n_frames:
        valid = "frame=0" if n_frames == 1 else f"frame=0 ... frame={n_frames - 1}"
        raise ImageError(f"frame {index} does not exist: the number of frames is {n_frames} ({valid})")
    return index


def check_window(window: Window | None) -> None:
    """Rejects anything but two finite numbers with a positive width."""
    if window is None:
        return
    try:
        center, width = (float(value) for value in window)
    except (TypeError, ValueError):
        raise ImageError("window must be two numbers (center, width), for example window=(40, 400)") from None
    if not (math.isfinite(center) and math.isfinite(width) and width > 0):
        raise ImageError(f"window=({center:g}, {width:g}) is not valid: both must be finite and the width above 0")


def source_name(source: object) -> str:
    """Returns a name for `MedicalImage.source`; never taken from the image content, which may be patient data."""
    if isinstance(source, (str, os.PathLike)):
        return os.path.basename(os.fsdecode(source)) or os.fsdecode(source)
    if isinstance(source, np.ndarray):
        return "numpy array"
    if isinstance(source, Image.Image):
        return "PIL image"
    if is_dataset(source):
        return "DICOM dataset"
    if isinstance(source, (bytes, bytearray, memoryview)):
        return "bytes"
    return "file object" if hasattr(source, "read") else type(source).__name__


@contextmanager
def naming_errors(source: object) -> Iterator[None]:
    """Prefixes an `ImageError` with the path as given, or the kind of `source`."""
    try:
        yield
    except ImageError as exc:
        where = os.fsdecode(source) if isinstance(source, (str, os.PathLike)) else source_name(source)
        named = type(exc)(f"{where}: {exc}")
        named.__dict__.update(exc.__dict__)
        raise named from exc.__cause__


def is_dataset(source: object) -> TypeGuard[Dataset]:
    """Returns whether this is a pydicom Dataset, without importing pydicom."""
    return any(cls.__module__ == "pydicom.dataset" and cls.__name__ == "Dataset" for cls in type(source).__mro__)


@contextmanager
def open_binary(source: Any) -> Iterator[BinaryIO]:
    """Yields a seekable binary stream over a path, bytes or file object; only files opened here are closed."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        yield io.BytesIO(source)
    elif isinstance(source, (str, os.PathLike)):
        with _open_path(source) as stream:
            yield stream
    elif hasattr(source, "read"):
        try:
            # An upload is often handed over with its position at the end.
            if hasattr(source, "seek") and getattr(source, "seekable", lambda: True)():
                source.seek(0)
            content = source.read()
        except (OSError, ValueError) as exc:
            raise ImageError(f"the file object cannot be read ({exc})") from exc
        if not isinstance(content, bytes):
            raise ImageError("the file object is open in text mode; open it with mode 'rb'")
        yield io.BytesIO(content)
    else:
        raise ImageError(
            "expected a path, bytes, a binary file object, a PIL image, a numpy array or a pydicom Dataset "
            "(for a torch tensor pass tensor.permute(1, 2, 0).numpy())"
        )


def _open_path(source: str | os.PathLike[str]) -> BinaryIO:
    path = os.fsdecode(source)
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISREG(mode):
            return open(path, "rb")
    except FileNotFoundError:
        hint = "; download it first" if path.startswith(("http://", "https://")) else ""
        raise ImageError(f"no such file{hint}") from None
    except (OSError, ValueError) as exc:  # ValueError: a null byte in the path
        raise ImageError(f"cannot be opened ({getattr(exc, 'strerror', None) or exc})") from exc
    if stat.S_ISDIR(mode):
        raise ImageError("this is a folder, not an image; pass one file (`expand_inputs` lists the images in it)")
    raise ImageError("this is not a regular file")
