"""Images of every supported format, from a file to a tensor."""

from .examples import example_image
from .image import ImageError, MedicalImage, MissingDependencyError
from .load import expand_inputs, find_images, load_image
from .preprocess import normalise, preprocess

__all__ = [
    "ImageError",
    "MedicalImage",
    "MissingDependencyError",
    "example_image",
    "expand_inputs",
    "find_images",
    "load_image",
    "normalise",
    "preprocess",
]
