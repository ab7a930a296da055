"""DICOM images as `MedicalImage` (needs pydicom 3: `pip install "medmamba[dicom]"`).

Grey pixels go through the standard's pipeline, PS3.3 C.11 and PS3.4 N.2, in this order:

1. stored values, of `BitsStored` bits; padding and values of a supplemental palette are set apart
2. modality LUT or rescale slope and intercept, giving the raw units that `window` takes (Hounsfield units for CT)
3. the `window` argument, else the file's first VOI LUT, else its first window that can be read
4. scaling to [0, 1]: a window or LUT by its own output range; without one, the range that `BitsStored` allows after
   step 2 (for floating-point pixels, which declare none, the smallest and largest value of the frame)
5. inversion for MONOCHROME1 or a presentation LUT shape INVERSE
6. padding is drawn black; values of a supplemental palette in its colours, which makes the picture RGB

For enhanced multi-frame objects 2 and 3 come from the functional groups of the frame. YBR and palettes become RGB.

An optional element that cannot be read is left out with a note. An element that the meaning of the values depends on
(bits, rescale, modality LUT, palette) is refused by name where it cannot be read.

Privacy: only the elements that describe pixels are read from a file, and no text of a file enters an error, a note or a
`MedicalImage`. Errors of pydicom may quote values, therefore they are replaced and not chained.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from ..image import ImageError, MedicalImage, Window, is_dataset, naming_errors, open_binary
from ..quality import picture_notes
from .decode import read_dataset
from .display import display_notes
from .frame import Frame
from .voi import DicomWindows

if TYPE_CHECKING:
    from pydicom import Dataset


def load_dicom(source: BinaryIO | Dataset, name: str, frame: int | None, window: Window | None) -> MedicalImage:
    """Reads one frame from a seekable stream or a Dataset. `medmamba.load_image` is the public way in."""
    with _decoding():
        decoded = Frame(read_dataset(source), frame)
        pixels = decoded.grey(window) if decoded.is_grey else decoded.color(window)
        pixels = np.ascontiguousarray(pixels, dtype=np.float32)
        notes = [
            *decoded.notes,
            *display_notes(decoded.ds, decoded.numbers, bool(decoded.groups)),
            *picture_notes(pixels, decoded.stored),
        ]
        return MedicalImage(
            pixels=pixels,
            source=name,
            format="DICOM",
            mode=decoded.photometric,
            bit_depth=decoded.bits,
            frame=decoded.index,
            n_frames=decoded.n_frames,
            value_range=decoded.value_range,
            notes=tuple(notes),
            window=decoded.applied[0],
            window_from=decoded.applied[1],
            used_bits=decoded.used_bits(),
            voi_function=decoded.voi_function if decoded.is_grey else "",
        )


def dicom_window_presets(source: Any, *, frame: int | None = None) -> DicomWindows:
    """Returns windows and value range of a DICOM path, bytes, binary file object or Dataset.

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
        decoded = Frame(read_dataset(source), frame)
        if not decoded.is_grey:
            return DicomWindows((), None)
        decoded.modality()
        unit = decoded.find("RescaleType") or ("HU" if decoded.find("Modality") == "CT" else "")
        return DicomWindows(decoded.presets(), decoded.value_range, "HU" if unit == "HU" else "")


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
