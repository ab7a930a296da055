"""MedMamba in timm: `timm.create_model("hf-hub:org/name", pretrained=True)`, including `features_only` backbones.

timm is neither required nor imported here. `timm_hook` registers the models as soon as timm is imported, before or
after medmamba; `register()` registers them immediately.
"""

from typing import Any

from ..config import VARIANTS, MedMambaConfig
from ..pretrained.timm_config import CROP_MODES, ENTRY_POINT, pretrained_cfg


def register() -> None:
    """Registers "medmamba", "medmamba_tiny", "medmamba_small", ... with timm.

    Raises:
        ImportError: timm is not installed or cannot be imported.
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

    create.__name__ = create.__qualname__ = name  # the name that timm registers
    create.__doc__ = f"{name}: a MedMamba (arXiv 2403.03849)."
    return create


def _known_classes(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Returns labels and preprocessing of a checkpoint, so that `predict` works as after `from_pretrained`."""
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
            "crop_mode": next(name for name, in_timm in CROP_MODES.items() if in_timm == saved["crop_mode"]),
            "mean": saved["mean"],
            "std": saved["std"],
        }
    return found


_VARIANT_OF = {f"{ENTRY_POINT}_{name.replace('-', '_')}": name for name in VARIANTS if name != "test"}
# timm looks up this name in the module of an entry point. It lists no weights: those are on the Hub.
default_cfgs: dict[str, Any] = {
    name: pretrained_cfg(MedMambaConfig(**{"architecture": variant, **VARIANTS[variant]}))
    for name, variant in {ENTRY_POINT: "tiny", **_VARIANT_OF}.items()
}
