"""Pillow images and numpy arrays as `MedicalImage`: bit depths, palettes, alpha, rotation, frames."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageOps

from . import tiff
from .deep_colour import is_deep_colour, is_premultiplied, read_deep_colour
from .image import MAX_PIXELS, ImageError, MedicalImage, Window, WindowNeeded, check_frame, check_size, warning_note
from .quality import picture_notes

_EXIF_ORIENTATION = 0x0112
_TIFF_COMPRESSION, _FAX = 259, (2, 3, 4)


def load_raster(stream: BinaryIO, name: str, kind: str, frame: int | None, window: Window | None) -> MedicalImage:
    """Decodes a file of the Pillow format `kind` ("PNG", "TIFF", ...) from a seekable stream."""
    with _decoding(f"{kind} file"):
        if kind == "PNG":
            # Decoding alone does not notice every flipped bit; the checksums do.
            with Image.open(stream, formats=[kind]) as image:
                check_size(image.height, image.width)
                image.verify()
            stream.seek(0)
        with Image.open(stream, formats=[kind]) as image:
            return _from_pil(image, name, kind, frame, window, stream)


def load_pil(image: Image.Image, name: str, frame: int | None, window: Window | None) -> MedicalImage:
    """Converts a Pillow image, which stays at the frame it was at."""
    with _decoding("PIL image"):
        position = image.tell()
        try:
            return _from_pil(image, name, "PIL", frame, window)
        finally:
            if image.tell() != position:
                image.seek(position)


def load_array(array: np.ndarray, name: str, frame: int | None, window: Window | None) -> MedicalImage:
    """Converts `(H, W)` or `(H, W, 1|3|4)` of bool, uint8, uint16 or float in [0, 1]; any real type with `window`."""
    check_frame(frame, 1)
    if isinstance(array, np.ma.MaskedArray):
        raise ImageError("masked arrays are ambiguous; pass array.filled(value)")
    if array.dtype.kind not in "buif":
        raise ImageError(f"arrays of {array.dtype} are not images; convert to uint8, uint16 or float in 0..1")
    shape = array.shape
    if len(shape) == 3 and shape[2] not in (1, 3, 4) and shape[0] in (1, 3, 4):
        raise ImageError(
            f"shape {shape} has the channels first; pass numpy.transpose(array, (1, 2, 0)), shape (H, W, C)"
        )
    if not (len(shape) == 2 or (len(shape) == 3 and shape[2] in (1, 3, 4))):
        raise ImageError(f"shape {shape} is not an image; expected (H, W), (H, W, 1), (H, W, 3) or (H, W, 4)")
    check_size(shape[0], shape[1])
    bits = 1 if array.dtype.kind == "b" else array.dtype.itemsize * 8
    raw = np.array(array) if array.dtype == np.uint8 else np.asarray(array)  # bytes are kept, so they are copied
    return _finish(raw, bits, window, [], source=name, format="numpy", mode=str(array.dtype))


@contextmanager
def _decoding(what: str) -> Iterator[None]:
    try:
        yield
    except ImageError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as exc:
        limit = f"{MAX_PIXELS / 1e6:.0f} million"
        raise ImageError(f"more pixels than the limit of {limit}. Crop it or save a smaller version first") from exc
    except Exception as exc:  # a decoder that is fed damaged bytes raises anything, from OSError to KeyError
        raise ImageError(
            f"damaged or truncated {what}, or a variant that Pillow cannot read ({type(exc).__name__}: {exc}). "
            "Copy or export it again, or save it as 8- or 16-bit PNG"
        ) from exc


def _from_pil(
    image: Image.Image, name: str, kind: str, frame: int | None, window: Window | None, stream: BinaryIO | None = None
) -> MedicalImage:
    """Decodes a Pillow image; `stream` is its file where that may be read again."""
    notes: list[str] = []
    directories = n_frames = getattr(image, "n_frames", 1)
    if image.format == "MPO" and n_frames > 1:  # a camera's JPEG with previews or gain maps behind the picture
        if frame is None:
            notes.append(f"first of {n_frames} pictures in this JPEG used")
        frame = frame or 0
    is_tiff = bool(getattr(image, "tag_v2", None))
    if is_tiff:
        notes += tiff.imagej_notes(image)
        if directories == 1:
            n_frames = tiff.imagej_images(image)
    index = check_frame(frame, n_frames)
    check_size(image.height, image.width)
    if index != image.tell() and directories > 1:
        image.seek(index)
        check_size(image.height, image.width)

    tags: Any = getattr(image, "tag_v2", {})
    if is_tiff:
        tiff.check_tiff(image)
        if tags.get(_TIFF_COMPRESSION) in _FAX:
            # Pillow gets no error from libtiff there, and leaves what was not decoded undefined.
            notes.append("fax compression (CCITT): damage of the file would not be noticed")
        if n_frames > directories:
            tiff.select_imagej_image(image, index, n_frames)
    bits = _stored_bits(image, tags)
    raw_mode = _raw_mode(image)
    grey_alpha = "LA;16" in raw_mode
    # Pillow inverts "white is zero" for up to 8 bits only.
    inverted = is_tiff and tags.get(tiff.PHOTOMETRIC, 0) == 0 and image.mode in ("I;16", "I;16B", "F")
    signed = tags.get(tiff.SAMPLE_FORMAT, (1,))[0] == 2 if is_tiff else None
    mode = image.mode

    # Frames of an animated PNG are drawn over each other, in 8 bits.
    single = n_frames == directories and (is_tiff or n_frames == 1)
    deep = ";16" in raw_mode and stream is not None and single and is_deep_colour(image)
    premultiplied = deep and is_premultiplied(image)
    # Before load(), which turns a TIFF and removes its tag; the other formats are turned here. For a PNG this decodes.
    turned = _note_orientation(image, notes)
    if deep and stream is not None:
        _note_profile(image, notes)
        if premultiplied:
            notes.append("transparent areas composited on black")
        array = _with_transparent_colour(read_deep_colour(stream, kind, index, turn=turned), image)
    else:
        image.load()
        image = ImageOps.exif_transpose(image) if turned else image  # which copies, turned or not
        array = _pil_array(image, bits, signed, grey_alpha, notes)
    _note_display(image, notes)
    return _finish(
        array,
        bits,
        window,
        notes,
        inverted=inverted,
        source=name,
        format=kind,
        mode=mode,
        frame=index,
        n_frames=n_frames,
    )


def _with_transparent_colour(array: np.ndarray, image: Image.Image) -> np.ndarray:
    """Values `(H, W)` or `(H, W, 3)` with alpha behind, where the file names a transparent colour (PNG tRNS)."""
    colour = image.info.get("transparency")
    if not isinstance(colour, (int, tuple)) or (array.ndim == 3 and array.shape[2] != 3):
        return array
    array = array if array.ndim == 3 else array[..., None]
    opaque = (array != np.array(colour, array.dtype)).any(axis=-1, keepdims=True)
    return np.concatenate([array, opaque * np.array(np.iinfo(array.dtype).max, array.dtype)], axis=-1)


def _note_display(image: Image.Image, notes: list[str]) -> None:
    """Notes display settings of the file that are not applied."""
    info = image.info
    if not info:
        return
    gamma = info.get("gamma")
    if gamma and "srgb" not in info and abs(gamma - 1 / 2.2) > 0.02:
        notes.append(f"display gamma {gamma:g} of the file not applied")
    density = info.get("dpi") or info.get("aspect") or info.get("jfif_density")
    if isinstance(density, tuple) and len(density) == 2 and density[0] != density[1] and min(density) > 0:
        ratio = float(density[0] / density[1])
        if abs(ratio - 1) > 0.01:
            notes.append(f"pixels are not square (height to width {ratio:.3g}); not resampled")


def _raw_mode(image: Image.Image) -> str:
    """Returns how pixels are packed in the file ("RGB;16B", ...); "" once the image is decoded."""
    tile = getattr(image, "tile", None)
    args = tile[0][3] if tile else ""
    return str(args[0] if isinstance(args, tuple) and args else args)


def _stored_bits(image: Image.Image, tags: Any) -> int:
    if tags and tiff.BITS in tags:
        return int(max(tags[tiff.BITS]))
    if ";16" in _raw_mode(image):
        return 16
    return {"1": 1, "I": 32, "F": 32}.get(image.mode, 16 if image.mode.startswith("I;16") else 8)


def _note_orientation(image: Image.Image, notes: list[str]) -> bool:
    """Notes a rotation that is due; returns whether one is; False if the metadata is damaged."""
    try:
        orientation = image.getexif().get(_EXIF_ORIENTATION, 1)
    except Exception:  # damaged metadata fails in any way, and the pixels may be good
        notes.append("unreadable EXIF data ignored; the image may lack a rotation")
        return False
    if orientation not in range(2, 9):
        return False
    notes.append(f"EXIF rotation applied (orientation {orientation})")
    return True


def _note_profile(image: Image.Image, notes: list[str]) -> None:
    profile = image.info.get("icc_profile") or b""
    if profile and b"sRGB" not in profile and b"s\0R\0G\0B" not in profile and image.mode != "L":
        notes.append("embedded colour profile not applied")


def _pil_array(image: Image.Image, bits: int, signed: bool | None, grey_alpha: bool, notes: list[str]) -> np.ndarray:
    """Returns raw values `(H, W)` or `(H, W, C)`; 8 bits where Pillow expands or truncates the stored ones."""
    mode = image.mode
    _note_profile(image, notes)
    if mode == "1":
        return np.asarray(image, dtype=bool)
    if mode == "F":
        return np.asarray(image)
    if mode.startswith("I"):
        array = np.asarray(image)
        if mode == "I" and bits == 16 and not signed:
            array = array.astype(np.uint16)
        if array.dtype.kind == "u" and array.itemsize == 2:
            return _with_transparent_colour(array.astype(np.uint16, copy=False), image)
        # Pillow keeps unsigned 32-bit TIFF in its signed mode "I"; of other sources only the mode is known.
        return array.view(np.uint32) if mode == "I" and signed is False else array
    if mode == "L" and signed:
        return np.asarray(image).view(np.int8)

    transparent = image.has_transparency_data
    if mode in ("P", "PA"):
        palette = np.array(image.getpalette("RGB")).reshape(-1, 3)
        target = "L" if (palette == palette[:, :1]).all() else "RGB"
        notes.append(f"palette expanded to {'grey' if target == 'L' else 'RGB'}")
    else:
        target = "L" if mode in ("L", "LA", "La") or grey_alpha else "RGB"
        if mode not in ("L", "LA", "La", "RGB", "RGBA", "RGBa", "RGBX"):
            notes.append(f"{mode} converted to RGB without its colour profile")
    if bits == 16:
        notes.append("16 bits per channel read as the upper 8")
    target += "A" if transparent else ""
    return np.asarray(image if mode == target else image.convert(target))  # which would copy


def _finish(
    raw: np.ndarray, bits: int, window: Window | None, notes: list[str], *, inverted: bool = False, **info: Any
) -> MedicalImage:
    """Converts raw values `(H, W)` or `(H, W, 1|2|3|4)` (grey, grey and alpha, RGB, RGBA) to `MedicalImage`."""
    if raw.ndim == 2:
        raw = raw[..., None]
    if not raw.dtype.isnative:
        raw = raw.astype(raw.dtype.newbyteorder("="))
    channels = raw.shape[2]
    if raw.dtype.kind == "f" and not np.isfinite(raw).all():
        raise ImageError("the pixels hold NaN or infinite values; replace them first (numpy.nan_to_num)")
    colour = raw[..., : channels - 1] if channels in (2, 4) else raw  # without alpha
    is_grey = channels <= 2
    value_range = (float(colour.min()), float(colour.max())) if is_grey else None
    applied = window if window is not None else _declared_window(raw, bits) if is_grey else None
    used_bits = int(colour.max()).bit_length() or 1 if raw.dtype.kind in "bu" else None
    if window is not None and not is_grey:
        raise ImageError(f"window applies to grey images only; this one has {channels} channels")
    if window is not None:
        center, width = window
        pixels = np.clip((colour.astype(np.float64) - center) / width + 0.5, 0, 1)
        if channels == 2:
            pixels = np.concatenate([pixels, _to_unit(raw[..., 1:], bits, [])], axis=-1)
        notes.append(f"window {center:g}/{width:g} applied")
    elif raw.dtype == np.uint8 and not inverted:  # stays at 8 bits: a quarter of the memory and of the time
        pixels = raw
        _note_unused_range(colour, bits, notes)
    else:
        pixels = _to_unit(raw, bits, notes)
        _note_unused_range(colour, bits, notes)
    if inverted:
        pixels = 1 - pixels
        notes.append("white-is-zero inverted")
    if channels in (2, 4):
        pixels = _drop_alpha(pixels, notes)
    in_levels = pixels.dtype == np.uint8
    pixels = np.ascontiguousarray(pixels, dtype=np.uint8 if in_levels else np.float32)
    make = MedicalImage.of_levels if in_levels else MedicalImage
    return make(
        pixels,
        bit_depth=bits,
        value_range=value_range,
        notes=(*notes, *picture_notes(pixels, raw if channels == 1 else None)),
        window=applied,
        window_from="" if applied is None else "range" if window is None else "argument",
        used_bits=used_bits,
        **info,
    )


def _note_unused_range(colour: np.ndarray, bits: int, notes: list[str]) -> None:
    """Warns of values that leave at least half of a 16-bit range unused: they were made with fewer bits."""
    if bits != 16 or colour.dtype not in (np.uint8, np.uint16):
        return
    # Of some files only the upper bytes are read.
    largest = int(colour.max()) if colour.dtype == np.uint16 else int(colour.max()) * 257
    if not 0 < largest < 2**15:
        return
    used = max(largest.bit_length(), 8)
    advice = f"pass window=({(2**used - 1) / 2:g}, {2**used - 1})"
    if colour.shape[2] == 3:
        advice = "save it as 8 bits a channel, scaled by its own range"
    notes.append(
        warning_note(
            "unused-range",
            f"16-bit values scaled by 65535 though the largest is {largest}, so the image is dark; if these are {used}-"
            f"bit values, {advice}",
        )
    )


def _declared_window(raw: np.ndarray, bits: int) -> Window:
    """Returns the range that `_to_unit` scales by, as a window."""
    largest = 2**bits - 1 if raw.dtype == np.uint16 else 255 if raw.dtype == np.uint8 else 1
    return largest / 2, float(largest)


def _to_unit(raw: np.ndarray, bits: int, notes: list[str]) -> np.ndarray:
    """Scales by the declared range of the type, never by the values found."""
    if raw.dtype == np.uint8 or raw.dtype == np.uint16:
        return np.divide(raw, np.float32(255 if raw.dtype == np.uint8 else 2**bits - 1), dtype=np.float32)
    if raw.dtype == np.bool_:
        return raw
    largest = raw.max()
    if raw.dtype.kind == "f":
        smallest, tolerance = raw.min(), 1e-6  # resampling in float leaves 1.0000001
        if smallest < -tolerance or largest > 1 + tolerance:
            hint = "divide them by 255 if they are 8-bit values, or " if smallest >= 0 and largest <= 255 else ""
            raise _window_needed(
                raw,
                f"floating-point pixels must be in 0..1, these are in {smallest:g}..{largest:g}; {hint}pass "
                "window=(center, width) with the range that the values stand for",
            )
        return np.clip(raw, 0, 1)
    raise _window_needed(
        raw,
        f"{raw.dtype} pixels declare no range; pass window=(center, width) in the units of the image (found "
        f"{raw.min()}..{largest}), or convert to uint8, uint16 or float in 0..1 first",
    )


def _window_needed(raw: np.ndarray, text: str) -> ImageError:
    """Returns the error for values without a declared range; a plain `ImageError` for colour, which takes no window."""
    if raw.shape[2] != 1:
        return ImageError(text)
    error = WindowNeeded(text)
    error.value_range = (float(raw.min()), float(raw.max()))
    return error


def _drop_alpha(pixels: np.ndarray, notes: list[str]) -> np.ndarray:
    """Values `(H, W, 1|3)`, in [0, 1] or of 8 bits, without alpha; float where areas are composited."""
    color, alpha = pixels[..., :-1], pixels[..., -1:]  # (H, W, 1|3), (H, W, 1)
    if alpha.min() == (255 if pixels.dtype == np.uint8 else 1):
        notes.append("opaque alpha channel dropped")
        return color
    if alpha.max() == 0:
        notes.append("alpha channel ignored, it is zero everywhere")
        return color
    if pixels.dtype == np.uint8:
        color, alpha = _to_unit(color, 8, []), _to_unit(alpha, 8, [])
    notes.append(f"transparent areas ({(alpha < 1).mean():.0%} of the pixels) composited on black")
    return color * alpha


def load_reduced_jpeg(path: str | os.PathLike[str], name: str, least: tuple[int, int]) -> MedicalImage | None:
    """Decodes a JPEG at a half, a quarter or an eighth of its size, which saves most of the work.

    Args:
        path: a file.
        name: for `MedicalImage.source`.
        least: (width, height) that the result has at the least.

    Returns:
        The image, with a note; None where this is no JPEG of 8 bits, or one that is not large enough.
    """
    try:
        with Image.open(path, formats=["JPEG"]) as image:
            size = image.size
            if image.mode not in ("L", "RGB") or image.draft(image.mode, least) is None or image.size == size:
                return None
            if image.getexif().get(_EXIF_ORIENTATION, 1) != 1:
                return None
            check_size(size[1], size[0])
            found = _from_pil(image, name, "JPEG", None, None)
    except (ImageError, OSError, ValueError, SyntaxError, TypeError, KeyError):
        return None  # the usual way in says what is wrong with it
    return found.with_notes(f"decoded at {found.size[0]}x{found.size[1]} of {size[1]}x{size[0]} pixels")


def plain_jpeg(content: bytes) -> tuple[tuple[int, int, int], list[str]] | None:
    """Returns (H, W, C) and the notes of the header of a JPEG that any decoder reads alike; None for others.

    Grey, or YCbCr as JFIF has it; of 8 bits, not rotated, and not cut off.
    """
    if b"\xff\xd9" not in content[-64:]:
        return None
    try:
        with Image.open(io.BytesIO(content), formats=["JPEG"]) as image:
            check_size(image.height, image.width)
            if image.format != "JPEG" or image.mode not in ("L", "RGB") or "adobe_transform" in image.info:
                return None
            if image.getexif().get(_EXIF_ORIENTATION, 1) != 1:
                return None
            notes: list[str] = []
            _note_profile(image, notes)
            _note_display(image, notes)
            return (image.height, image.width, 1 if image.mode == "L" else 3), notes
    except Exception:  # damaged headers fail in any way; the usual reader says what is wrong
        return None
