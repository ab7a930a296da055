"""Whether an image is in colour, judged by its pixels: greyscale images are often stored as RGB."""

from __future__ import annotations

from .image import MedicalImage

GREY, COLOUR = 0.004, 0.02
"""Mean chroma up to which an image is grey (compression leaves traces), and from which it is in colour. In samples of
120 images of public sets, X-rays and ultrasound images had 0.000, microscopy and skin images at least 0.021."""
_SIDE = 128  # pixels per side that are looked at


def chroma(image: MedicalImage) -> float:
    """Returns the mean difference between the largest and the smallest channel, 0 to 1; 0 for one channel."""
    height, width = image.size
    pixels = image.pixels[:: max(1, height // _SIDE), :: max(1, width // _SIDE)]
    return float((pixels.max(axis=2) - pixels.min(axis=2)).mean())


def colour_note(image: MedicalImage, colour: bool | None) -> str:
    """Returns a warning if the image is grey and the training images were in colour, or the reverse; else "".

    Args:
        colour: whether the training images were in colour; None if unknown.
    """
    if colour is None or image.constant:
        return ""
    found = chroma(image)
    if colour and found <= GREY:
        kinds = "a greyscale image, but the model was trained on colour images"
    elif not colour and found >= COLOUR:
        kinds = "a colour image, but the model was trained on greyscale images"
    else:
        return ""
    return f"warning: this is {kinds}; the prediction may be meaningless"
