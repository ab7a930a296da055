"""Model folders: finding, loading, checking, saving and publishing them."""

from .._moved import names
from ..utils.checksums import PretrainedError
from .mixin import PretrainedMixin, load_strict, read_config, read_weights
from .sources import bundled_models, fetch

__all__ = [
    "PretrainedError",
    "PretrainedMixin",
    "bundled_models",
    "fetch",
    "load_strict",
    "read_config",
    "read_weights",
]

__getattr__ = names(
    __name__, {"CONFIG_NAME": "utils.checksums", "WEIGHTS_NAME": "utils.checksums", "ORGANISATION": "config"}
)
