"""What is done to one image before a network sees it, the same in every thread and process."""

from __future__ import annotations

import abc
import dataclasses
import math
import os
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...config import PreprocessConfig
from ..colour import colour_note
from ..fit import fit
from ..image import ImageError, MedicalImage, Window, source_name
from ..load import load_image, load_named


class Deferred(abc.ABC):
    """An image that is read where it is decoded, such as a member of an archive or an object in a store.

    Subclasses can be pickled and are defined in a module that other processes can import.

    Attributes:
        portable: whether another process may read it.
        slow: whether reading mostly waits, so that several are read at once.
    """

    portable: bool = True
    slow: bool = False

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """What the image is called in results and messages; the same in every run."""

    @abc.abstractmethod
    def read(self, frame: int | None, window: Window | None) -> MedicalImage:
        """Reads it as `load_image` does.

        Raises:
            ImageError: it cannot be read; the message begins with its name.
        """

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Order:
    """What to do with every image.

    Attributes:
        preprocess: of the model.
        in_chans: channels that the model takes.
        frame, window: as in `load_image`.
        stored: keep 8 bits where the file has no more, else 16, as decoded data sets do, instead of float32.
        sized: whether notes say how the image was brought to the size of the network.
        encoded: leave plain JPEG files compressed, for a device that decodes them, see `inference.gpu_decode`.
        reduced: decode JPEG at a half, a quarter or an eighth of its size where that is still at least twice the
            network's input. Fast, but not the same pixels.
        colour: whether the model was trained on colour images, for a warning; None if unknown.
    """

    preprocess: PreprocessConfig
    in_chans: int = 3
    frame: int | None = None
    window: Window | None = None
    stored: bool = False
    sized: bool = True
    reduced: bool = False
    encoded: bool = False
    colour: bool | None = None

    @property
    def bytes_per_image(self) -> int:
        """The most that the pixels of one prepared image take."""
        height, width = self.preprocess.input_size
        return height * width * self.in_chans * 4


@dataclass
class Prepared:
    """An image in the size of the network's input.

    Attributes:
        source: file name, or what kind of object it was.
        notes: what was done to it, see `Prediction.image_notes`.
        pixels: (h, w, c), see `fit`; uint16 of 65535 for 1 is possible too.
        deep: whether the file has more than 8 bits.
        encoded: (H, W, C) of a JPEG whose bytes are in `pixels`, (1, bytes, 1); None for pixels.
        picture_notes_at: where in `notes` those belong that depend on the values of such an image.
    """

    source: str
    notes: list[str]
    pixels: np.ndarray
    deep: bool = False
    encoded: tuple[int, int, int] | None = None
    picture_notes_at: int = 0


@dataclass
class Unread:
    """An image that could not be read: its name, why, and the error itself."""

    source: str
    error: str
    cause: Exception | None = field(default=None, repr=False)


def read_source(source: Any, frame: int | None = None, window: Window | None = None) -> MedicalImage:
    """Returns `load_image(source, frame=frame, window=window)`, or the source where it is a `MedicalImage` already.

    Raises:
        ImageError: the file cannot be read, or a frame or window is given for an image that is already decoded.
    """
    if isinstance(source, Deferred):
        return source.read(frame, window)
    if not isinstance(source, MedicalImage):
        return load_image(source, frame=frame, window=window)
    if frame is not None or window is not None:
        raise ImageError(f"{source.source}: frame and window apply to files, but this image is already decoded")
    return source


def prepare(source: Any, order: Order) -> Prepared | Unread:
    """Reads one image and fits it to the network's input."""
    if order.encoded and (compressed := _compressed(source, order)):
        return compressed
    try:
        image = _read_reduced(source, order) if order.reduced else read_source(source, order.frame, order.window)
        notes = [*image.notes, *(input_notes(image, order.preprocess, order.colour) if order.sized else ())]
        pixels = fit(image, order.preprocess, order.in_chans)
        deep = image.bit_depth > 8
        return Prepared(image.source, notes, as_stored(pixels, deep) if order.stored else pixels, deep)
    except (ValueError, OSError, MemoryError) as error:  # ImageError is a ValueError
        name = str(source) if isinstance(source, str | os.PathLike | Deferred) else type(source).__name__
        return Unread(name, str(error) or f"{name}: {type(error).__name__}", error)


def as_stored(pixels: np.ndarray, deep: bool) -> np.ndarray:
    """Returns fitted pixels rounded to 8 bits, or to 16 where the file is deep."""
    if pixels.dtype == np.uint8:
        return pixels if not deep else pixels.astype(np.uint16) * 257
    return np.rint(pixels * np.float32(65535 if deep else 255)).astype(np.uint16 if deep else np.uint8)


def input_notes(image: MedicalImage, config: PreprocessConfig, colour: bool | None = None) -> list[str]:
    """Returns notes and warnings about resizing to the input size of the network, an image of one value, and colour."""
    notes = [*size_notes(image.size, config), *([constant_note()] if image.constant else [])]
    if note := colour_note(image, colour):
        notes.append(note)
    return notes


def size_notes(size: tuple[int, int], config: PreprocessConfig) -> list[str]:
    """Returns notes and warnings about resizing an image of this (height, width)."""
    height, width = size
    target = config.input_size
    notes = [f"resized from {height}x{width} to {target[0]}x{target[1]} ({config.crop_mode})"]
    stretch = abs(math.log((width / height) / (target[1] / target[0])))
    if config.crop_mode == "squash" and stretch > math.log(1.5):
        notes.append("warning: the aspect ratio is far from the model's; the image is visibly distorted")
    if min(height, width) < min(target) / 4:
        notes.append("warning: the image is much smaller than the training images; detail is missing")
    return notes


def constant_note() -> str:
    """Returns the warning for an image of one value."""
    return "warning: all pixels of the image are equal; the prediction is meaningless"


def prepare_bytes(content: bytes, name: str, order: Order) -> Prepared | Unread:
    """Reads an image from the bytes of a file of that name."""
    try:
        image = load_named(content, name)
    except (ValueError, OSError, MemoryError) as error:
        return Unread(name, str(error), error)
    return prepare(image, dataclasses.replace(order, encoded=False, reduced=False, frame=None, window=None))


def _compressed(source: Any, order: Order) -> Prepared | None:
    """Returns a plain JPEG as it is, with the notes that its header makes; None for all else."""
    from ..raster import plain_jpeg

    if not isinstance(source, str | os.PathLike) or order.window is not None or order.frame is not None:
        return None
    try:
        with open(source, "rb") as file:
            if file.read(3) != b"\xff\xd8\xff":
                return None
            content = b"\xff\xd8\xff" + file.read()
    except OSError:
        return None
    found = plain_jpeg(content) if len(content) <= order.bytes_per_image else None
    if found is None:
        return None
    shape, notes = found
    if shape[2] == 3 and order.in_chans == 1:
        return None
    sized = size_notes(shape[:2], order.preprocess) if order.sized else []
    pixels = np.frombuffer(content, np.uint8).reshape(1, -1, 1)
    return Prepared(source_name(source), [*notes, *sized], pixels, False, shape, len(notes))


def _read_reduced(source: Any, order: Order) -> MedicalImage:
    from ..raster import load_reduced_jpeg

    if isinstance(source, str | os.PathLike) and order.window is None and order.frame is None:
        height, width = order.preprocess.input_size
        found = load_reduced_jpeg(source, source_name(source), (2 * width, 2 * height))
        if found is not None:
            return found
    return read_source(source, order.frame, order.window)
