"""The classifier: the network with its weights, labels and preprocessing."""

from typing import cast

import torch

from ..config import MedMambaConfig, variant_config
from ..inference.predict import predict
from ..pretrained import PretrainedMixin
from .fuse import fuse
from .network import MedMambaNetwork


class MedMamba(PretrainedMixin, MedMambaNetwork):
    """MedMamba classifier.

    Input: (B, in_chans, H, W) float, normalised as `config.preprocess` says (the published models: pixels / 255 mapped
    from [0, 1] to [-1, 1]); any H and W of at least `config.min_size`, 32 by default. Output: logits (B, num_classes).

    >>> model = MedMamba.from_pretrained("medmamba/bloodmnist")
    >>> model.predict("cell.png")
    """

    def __init__(self, config: MedMambaConfig):
        super().__init__(config)

    def predict(
        self,
        images,
        top_k: int | None = None,
        batch_size: int | None = None,
        *,
        frame: int | None = None,
        window=None,
        decide=None,
        tta: str = "none",
    ):
        """Classifies an image, path, array or list of them; see `medmamba.inference.predict.predict`."""
        return predict(self, images, top_k, batch_size, frame=frame, window=window, decide=decide, tta=tta)

    def fuse(self, dtype: torch.dtype | None = None) -> "MedMamba":
        """Returns a copy for inference with the batch norms folded into the convolutions.

        Outputs agree to float accuracy, or to that of `dtype` (such as torch.bfloat16), in which everything but the
        scan then runs. See `medmamba.model.fuse.fuse`.
        """
        return cast(MedMamba, fuse(self, dtype))

    def reset_classifier(self, num_classes: int, id2label: dict[int, str] | None = None) -> None:
        """Replaces the classifier by a randomly initialised one, and discards what was fitted with the old one."""
        super().reset_classifier(num_classes, id2label)
        self.unusual = None


def create_model(name: str = "tiny", num_classes: int = 1000, in_chans: int = 3, **config) -> MedMamba:
    """Builds a randomly initialised MedMamba.

    Args:
        name: "nano" (1.8M parameters), "tiny" (14.5M), "small" (18.6M), "base" (39.9M) as the published code builds
            them, "small-paper" (22.8M), "base-paper" (47.1M) as the paper's sizes imply; "test" for tests.
        config: any other field of `MedMambaConfig`.

    Raises:
        ConfigError: unknown name or field.
    """
    return MedMamba(variant_config(name, num_classes=num_classes, in_chans=in_chans, **config))
