"""MedMamba in timm: `timm.create_model("hf-hub:org/name", pretrained=True)`, `features_only` backbones included.

timm is neither needed nor imported here: importing medmamba leaves a hook that registers the models when, and only if,
timm is imported, in whichever order the two are. `register()` does it at once.
"""

import importlib.abc
import importlib.util
import sys
import threading
import warnings
from collections.abc import Sequence
from typing import Any

from .config import VARIANTS, MedMambaConfig

ENTRY_POINT = "medmamba"  # "architecture" in config.json: any variant, shaped by "model_args"
FILE_FIELDS = ("num_features", "pretrained_cfg", "model_args")  # of config.json, for timm alone
_SHAPE = ("depths", "dims", "d_state", "ssm_expand", "patch_size")
_CROP_MODES = {"squash": "squash", "center": "center", "pad": "border"}


def timm_fields(config: MedMambaConfig) -> dict[str, Any]:
    """What timm reads from config.json: its entry point, how to build the model, how to prepare images."""
    return {
        "architecture": ENTRY_POINT,
        "num_features": config.dims[-1],
        "model_args": {name: getattr(config, name) for name in _SHAPE},
        "pretrained_cfg": _pretrained_cfg(config),
    }


def _pretrained_cfg(config: MedMambaConfig) -> dict[str, Any]:
    preprocess = config.preprocess
    repeat = config.in_chans // len(preprocess.mean)
    return {
        "input_size": (config.in_chans, *preprocess.input_size),
        "interpolation": preprocess.interpolation,
        "crop_pct": 1.0,
        "crop_mode": _CROP_MODES[preprocess.crop_mode],
        "mean": preprocess.mean * repeat,
        "std": preprocess.std * repeat,
        "num_classes": config.num_classes,
        "label_names": config.labels,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "paper_ids": "arXiv:2403.03849",
    }


def register() -> None:
    """Makes "medmamba" and "medmamba_tiny", "medmamba_small", ... known to timm.

    Raises:
        ImportError: timm is not installed, or does not work here.
    """
    from timm.models import is_model, register_model

    for name in (ENTRY_POINT, *default_cfgs):
        if not is_model(name):
            register_model(_entry_point(name))


def _entry_point(name: str):
    def create(pretrained: bool = False, **kwargs):
        from timm.models import build_model_with_cfg

        from .timm_model import TimmMedMamba

        variant = _VARIANT_OF.get(name, "tiny")
        shape = {key: VARIANTS[variant][key] for key in ("depths", "dims")}
        architecture = "custom" if name == ENTRY_POINT else variant
        model_args = {"architecture": architecture, **shape, **_known_classes(kwargs), **kwargs}
        features = dict(out_indices=(0, 1, 2, 3), feature_cls="getter")
        return build_model_with_cfg(TimmMedMamba, name, pretrained, feature_cfg=features, **model_args)

    create.__name__ = create.__qualname__ = name  # what timm registers it under
    create.__doc__ = f"{name}: a MedMamba (arXiv 2403.03849)."
    return create


def _known_classes(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Labels and preprocessing of a checkpoint, so that `predict` works as after `from_pretrained`."""
    saved = kwargs.get("pretrained_cfg")
    if not isinstance(saved, dict) or "label_names" not in saved:
        return {}
    found: dict[str, Any] = {}
    if kwargs.get("num_classes", saved["num_classes"]) == len(saved["label_names"]) and not kwargs.get("features_only"):
        found["id2label"] = dict(enumerate(saved["label_names"]))
    channels, height, width = saved["input_size"]
    if kwargs.get("in_chans", channels) == channels:
        found["preprocess"] = {
            "input_size": (height, width),
            "interpolation": saved["interpolation"],
            "crop_mode": next(ours for ours, theirs in _CROP_MODES.items() if theirs == saved["crop_mode"]),
            "mean": saved["mean"],
            "std": saved["std"],
        }
    return found


_VARIANT_OF = {f"{ENTRY_POINT}_{name.replace('-', '_')}": name for name in VARIANTS if name != "test"}
# timm looks this name up in the module of an entry point. No weights: those are on the Hub, under names of their own.
default_cfgs: dict[str, Any] = {
    name: _pretrained_cfg(MedMambaConfig(**{"architecture": variant, **VARIANTS[variant]}))
    for name, variant in {ENTRY_POINT: "tiny", **_VARIANT_OF}.items()
}


class _AfterTimm(importlib.abc.MetaPathFinder):
    """Runs `register` after the first import of timm, then is gone."""

    def __init__(self) -> None:
        self._asking = threading.local()  # this finder asks the others, and must not ask itself

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: Any = None):
        if fullname != "timm" or getattr(self._asking, "now", False):
            return None
        self._asking.now = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._asking.now = False
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module) -> None:
                run(module)
                # Only now: other packages look whether there is a timm without importing it.
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                try:
                    register()
                except Exception as error:  # another package's import must not fail for our sake
                    warnings.warn(f"medmamba could not register its models with timm: {error}", stacklevel=2)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def hook() -> None:
    """Registers now if timm is imported, otherwise as soon as it is. Does nothing a second time."""
    if "timm" in sys.modules:
        register()
    elif not any(isinstance(finder, _AfterTimm) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterTimm())
