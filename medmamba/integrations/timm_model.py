"""MedMamba with the constructor and the methods that timm expects of a model."""

import dataclasses
from typing import Any

from torch import Tensor

from ..config import MedMambaConfig
from ..model import MedMamba


class TimmMedMamba(MedMamba):
    """A MedMamba with timm's model interface; same weights, same outputs.

    Args:
        global_pool: "avg", or "" for unpooled features (without a classifier).
        config: fields of `MedMambaConfig`.
    """

    def __init__(self, num_classes: int = 1000, in_chans: int = 3, global_pool: str = "avg", **config: Any):
        fields = {field.name for field in dataclasses.fields(MedMambaConfig)}
        if unknown := sorted(set(config) - fields):
            raise TypeError(f"MedMamba has no {', '.join(unknown)}; it takes {', '.join(sorted(fields))}")
        super().__init__(MedMambaConfig(num_classes=num_classes, in_chans=in_chans, **config))
        self._set_pool(global_pool)
        stride = self.config.patch_size
        self.feature_info = [
            dict(num_chs=dim, reduction=stride * 2**i, module=f"stages.{i}") for i, dim in enumerate(self.config.dims)
        ]
        self.num_features = self.head_hidden_size = self.config.dims[-1]

    @classmethod
    def _from_config(cls, config: MedMambaConfig) -> "TimmMedMamba":
        return cls(**{field.name: getattr(config, field.name) for field in dataclasses.fields(config)})

    @property
    def num_classes(self) -> int:
        return self.config.num_classes

    @property
    def in_chans(self) -> int:
        return self.config.in_chans

    def reset_classifier(  # type: ignore[override]
        self, num_classes: int, global_pool: Any = None, id2label: dict[int, str] | None = None
    ) -> None:
        if global_pool is not None:
            self._set_pool(global_pool)
        super().reset_classifier(num_classes, id2label)

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        if self.global_pool:
            return super().forward_head(features, pre_logits)
        return features if pre_logits else self.head(features)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ):
        """Returns feature maps of the stages like timm's models; `norm` has no effect, as there is no final norm."""
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt must be NCHW or NHWC, got {output_fmt!r}")
        maps = self.forward_pyramid(x)
        taken = [maps[i] for i in _stage_indices(len(maps), indices)]  # (B, C, H, W)
        if output_fmt == "NHWC":
            taken = [m.permute(0, 2, 3, 1) for m in taken]  # (B, H, W, C)
        return taken if intermediates_only else (maps[-1], taken)

    def prune_intermediate_layers(
        self, indices: int | list[int] | None = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Removes the stages after the last requested one, and the classifier; returns the indices."""
        taken = _stage_indices(len(self.stages), indices)
        if prune_head or max(taken) < len(self.stages) - 1:
            self.reset_classifier(0, "")
        self.stages = self.stages[: max(taken) + 1]
        self.downsamples = self.downsamples[: max(taken)]
        self.num_features = self.head_hidden_size = self.config.dims[max(taken)]
        return taken

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Returns parameter groups by depth, for layer-wise learning rates."""
        return dict(
            stem=r"^patch_embed",
            blocks=r"^(?:stages|downsamples)\.(\d+)"
            if coarse
            else [
                (r"^stages\.(\d+)\.blocks\.(\d+)", None),
                (r"^downsamples\.(\d+)", (99,)),
            ],
        )

    def _set_pool(self, global_pool: str) -> None:
        if global_pool not in ("avg", ""):
            raise ValueError(f'global_pool must be "avg" or "" (no pooling), got {global_pool!r}')
        self.global_pool = global_pool


def _stage_indices(stages: int, indices: int | list[int] | None) -> list[int]:
    """Resolves indices by timm's convention: None is all, an int the last n; negative ones count from the end."""
    if indices is None or isinstance(indices, int):
        indices = list(range(stages))[-(indices or stages) :]
    taken = [i + stages if i < 0 else i for i in indices]
    if not taken or min(taken) < 0 or max(taken) >= stages:
        raise ValueError(f"there are {stages} stages; cannot take {list(indices)}")
    return taken
