"""A request to classify an uploaded file."""

from __future__ import annotations

from dataclasses import dataclass

from ..imaging.image import MedicalImage
from ..imaging.load import load_named

PATH = "/classify"


@dataclass(frozen=True)
class Upload:
    """One request.

    Attributes:
        name: of the file, for messages.
        content: its bytes.
        frame, window: as of `load_image`.
        arrived: time.monotonic() at which it was complete.
    """

    name: str
    content: bytes
    frame: int | None
    window: tuple[float, float] | None
    arrived: float


def load_upload(upload: Upload) -> MedicalImage | Exception:
    """Returns the image of a request, or the exception that reading it raised."""
    try:
        return load_named(upload.content, upload.name, frame=upload.frame, window=upload.window)
    except (ValueError, OSError, MemoryError) as error:  # ImageError is a ValueError
        return error
