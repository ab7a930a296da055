"""Images with masks: folders, CSV, COCO and Pascal VOC, found, paired and checked before anything is decoded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..data import DatasetError
from ..dense.examples import Examples
from ..imaging import MedicalImage, load_image

IGNORED = 255
"""Value of mask pixels that count for nothing: neither loss nor metrics."""


@dataclass(frozen=True)
class Pair:
    """One image with its mask.

    Attributes:
        image: the image file.
        mask: what the mask is read from, for messages.
        mask_file: the file that holds it.
        read: returns the mask at a size (height, width): (M, H, W) uint8, see `SegmentationDataset`.
        split: "train", "val", "test", or None.
        patient: who must not be in two splits; None where unknown.
    """

    image: Path
    mask: str
    mask_file: Path
    read: Callable[[tuple[int, int]], np.ndarray]
    split: str | None = None
    patient: str | None = None

    @property
    def label_file(self) -> Path:
        """The file that holds the mask."""
        return self.mask_file


@dataclass(frozen=True)
class SegmentationDataset(Examples):
    """Pairs of images and masks, and the names of the classes.

    A mask is (1, H, W) with 0 for the background and 1, 2, ... for the classes if they are exclusive or there is one
    class; else (K, H, W) of 0 and 1, since classes may overlap. 255 marks pixels that do not count (`IGNORED`).
    """

    name: str
    classes: tuple[str, ...]
    examples: tuple[Pair, ...]
    exclusive: bool = False

    def load(self, index: int) -> tuple[MedicalImage, np.ndarray]:
        """Reads one image and its mask.

        Raises:
            ImageError: the image or the mask cannot be read.
            DatasetError: a mask of another size than its image, or with values that name no class.
        """
        pair = self.examples[index]
        image = load_image(pair.image)
        return image, self.check_mask(pair.read(image.size), pair)

    def check_mask(self, mask: np.ndarray, pair: Pair) -> np.ndarray:
        """Returns the mask after a check of its values.

        Raises:
            DatasetError: a value that names no class.
        """
        highest = len(self.classes) if mask.shape[0] == 1 else 1
        values = np.unique(mask)
        wrong = values[(values > highest) & (values != IGNORED)]
        if len(wrong):
            raise DatasetError(
                f"{pair.mask}: values {', '.join(map(str, wrong[:5]))} name no class; the classes "
                f"{', '.join(self.classes)} have the values 1 to {highest}, the background 0, and {IGNORED} is ignored"
            )
        return mask


def mask_from_file(path: Path, classes: int) -> Callable[[tuple[int, int]], np.ndarray]:
    """Returns a reader of a mask file with one channel.

    With one class every value but 0 is that class (255 too, the usual white). With several, values are the numbers of
    the classes, also in a picture with a palette, and 255 is ignored.
    """

    def read(size: tuple[int, int]) -> np.ndarray:
        from PIL import Image, UnidentifiedImageError

        try:
            with Image.open(path) as picture:
                if picture.mode in ("P", "L", "1", "I;16", "I"):
                    values = np.asarray(picture)
                else:
                    values = _one_channel(np.asarray(picture.convert("RGB")), path)
        except (OSError, UnidentifiedImageError, SyntaxError, ValueError) as error:
            if isinstance(error, DatasetError):
                raise
            raise DatasetError(f"{path}: this mask cannot be read ({error}); export it again as PNG") from error
        if values.shape != size:
            raise DatasetError(
                f"{path}: the mask has {values.shape[0]}x{values.shape[1]} pixels, its image {size[0]}x{size[1]}; "
                "export the mask at the size of the image (height x width, after EXIF rotation)"
            )
        if classes == 1:
            return _one_class(values, path)[None]
        if values.max(initial=0) > IGNORED:
            raise DatasetError(f"{path}: the mask has values up to {values.max()}; class numbers go up to 254")
        return values.astype(np.uint8)[None]

    return read


def _one_class(values: np.ndarray, path: Path) -> np.ndarray:
    """Returns 0 and 1 for a mask of one class, stored as 0 and any other value, or in grey with smoothed seams."""
    levels = np.unique(values)
    if levels[0] < 0 or (len(levels) > 1 and levels[0] != 0):
        raise DatasetError(f"{path}: no pixel of the mask is 0, the background; is this a mask?")
    if len(levels) <= 2:
        return (values > 0).astype(np.uint8)
    # JPEG and resized masks have grey seams between black and white.
    ends = np.count_nonzero((values <= 16) | (values >= 239)) / values.size
    if levels[-1] == 255 and ends > 0.9:
        return (values >= 128).astype(np.uint8)
    raise DatasetError(
        f"{path}: the mask has {len(levels)} values ({', '.join(map(str, levels[:5]))}, ...) and one class was named; "
        "name the classes of the values 1, 2, ..., or store the mask in black and white"
    )


def _one_channel(pixels: np.ndarray, path: Path) -> np.ndarray:
    if (pixels == pixels[..., :1]).all():
        return pixels[..., 0]
    raise DatasetError(
        f"{path}: the mask is a colour picture; give class numbers in one channel (a palette picture is fine): "
        "0 for the background, 1, 2, ... for the classes"
    )


def pair_by_name(images: Sequence[Path], masks: Sequence[Path], where: str) -> list[tuple[Path, Path]]:
    """Pairs images and masks of the same name; `x_mask.png`, `x_seg.png` and `x_segmentation.png` belong to `x` too.

    Raises:
        DatasetError: an image without a mask, a mask without an image, or a name twice; up to five are listed.
    """
    by_name: dict[str, Path] = {}
    for mask in masks:
        stem = _mask_stem(mask)
        if stem in by_name:
            raise DatasetError(f"{where}: two masks for {stem!r}: {by_name[stem].name} and {mask.name}; keep one")
        by_name[stem] = mask
    pairs: list[tuple[Path, Path]] = []
    alone: list[str] = []
    seen: dict[str, Path] = {}
    for image in images:
        if image.stem in seen:
            raise DatasetError(f"{where}: two images named {image.stem!r}: {seen[image.stem].name} and {image.name}")
        seen[image.stem] = image
        if image.stem in by_name:
            pairs.append((image, by_name.pop(image.stem)))
        else:
            alone.append(image.name)
    problems = []
    if alone:
        problems.append(f"{len(alone)} images have no mask: {_few(alone)}")
    if by_name:
        problems.append(f"{len(by_name)} masks have no image: {_few([path.name for path in by_name.values()])}")
    if problems:
        raise DatasetError(
            f"{where}: {'; '.join(problems)}. Masks are named as their image (x.jpg and x.png, or x_mask.png); an "
            "image with nothing to segment needs a black mask"
        )
    if not pairs:
        raise DatasetError(f"{where}: no images")
    return pairs


def _mask_stem(path: Path) -> str:
    stem = path.stem
    for ending in ("_mask", "-mask", "_seg", "_segmentation"):
        if stem.lower().endswith(ending):
            return stem[: -len(ending)]
    return stem


def _few(names: Sequence[str]) -> str:
    return ", ".join(sorted(names)[:5]) + (", ..." if len(names) > 5 else "")
