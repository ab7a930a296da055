"""Images of every supported format, from a file to a tensor."""

from .image import ImageError, MedicalImage, MissingDependencyError
from .load import expand_inputs, find_images, load_image
from .preprocess import normalise, preprocess

__all__ = [
    "ImageError",
    "MedicalImage",
    "MissingDependencyError",
    "expand_inputs",
    "find_images",
    "load_image",
    "normalise",
    "preprocess",
]
