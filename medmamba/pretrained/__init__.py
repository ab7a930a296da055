"""Model folders: finding, loading, checking, saving and publishing them."""

from .._moved import names
from ..utils.checksums import PretrainedError
from ..utils.weights import read_weights
from .config_file import read_config
from .mixin import PretrainedMixin
from .sources import bundled_models, fetch, has_classes, hub_name, model_kind
from .weights_file import load_strict

__all__ = [
    "PretrainedError",
    "PretrainedMixin",
    "bundled_models",
    "fetch",
    "has_classes",
    "hub_name",
    "load_strict",
    "model_kind",
    "read_config",
    "read_weights",
]

__getattr__ = names(
    __name__, {"CONFIG_NAME": "utils.checksums", "WEIGHTS_NAME": "utils.checksums", "ORGANISATION": "config"}
)
