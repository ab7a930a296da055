"""MedMamba as an encoder of segmentation_models_pytorch: `smp.Unet("medmamba_nano", encoder_weights=None)`.

smp documents encoders of one's own at https://smp.readthedocs.io/en/latest/insights.html#creating-your-own-encoder:
a module that returns the input and its feature maps at strides 2, 4, 8, 16, 32. MedMamba starts at stride 4, so that of
stride 2 has no channels, as smp does for Swin and ConvNeXt.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..config import VARIANTS, MedMambaConfig, variant_config
from ..dense import load_weights
from ..model.network import MedMambaNetwork
from ..utils.extras import require

if TYPE_CHECKING:
    from ..model import MedMamba

PREFIX = "medmamba_"


class SmpEncoder(nn.Module):
    """The stages of a MedMamba, with what segmentation_models_pytorch expects of an encoder.

    Args:
        config: of the network; its classifier is left out.
        depth: 5, since the four stages of MedMamba belong together.
        output_stride: 32; MedMamba has no dilated form.

    Raises:
        ValueError: another depth or output stride.
    """

    # Read by smp's own tests and tools.
    _is_torch_scriptable = False
    _is_torch_exportable = True
    _is_torch_compilable = True

    def __init__(self, config: MedMambaConfig, depth: int = 5, output_stride: int = 32):
        super().__init__()
        if depth != 5 or output_stride != 32:
            raise ValueError(f"a MedMamba encoder has depth 5 and output stride 32, got {depth} and {output_stride}")
        self.net: nn.Module = MedMambaNetwork(config.replace(num_classes=0, id2label={}, calibration={}))
        self.output_stride = output_stride

    @property
    def config(self) -> MedMambaConfig:
        """The configuration of the network."""
        return self.net.config  # type: ignore[return-value]

    @property
    def out_channels(self) -> list[int]:
        """Channels of the six maps that `forward` returns."""
        return [self.config.in_chans, 0, *self.config.dims]

    def forward(self, x: Tensor) -> list[Tensor]:
        """Returns x (B, C, H, W) and its maps at strides 2 (without channels), 4, 8, 16 and 32."""
        half = x.new_empty(x.shape[0], 0, x.shape[2] // 2, x.shape[3] // 2)
        return [x, half, *self.net.forward_pyramid(x)]  # type: ignore[operator]

    def set_in_channels(self, in_channels: int, pretrained: bool = True) -> None:
        """Takes images with another number of channels; grey images give the same maps as before. Called by smp."""
        if in_channels == self.config.in_chans:
            return
        old = self.net
        self.net = MedMambaNetwork(self.config.replace(in_chans=in_channels))
        load_weights(self.net, old.state_dict())

    def load_pretrained(self, model: MedMamba) -> None:
        """Copies the weights of a MedMamba of the same shape, whatever its classes and channels.

        Raises:
            ValueError: a model of another variant.
        """
        load_weights(self.net, model.state_dict())


def register() -> None:
    """Makes "medmamba_nano", "medmamba_tiny", "medmamba_small", ... encoders of segmentation_models_pytorch.

    Then `smp.Unet("medmamba_nano", encoder_weights=None, encoder_depth=5)` works as with any other encoder, and
    `net.encoder.load_pretrained(MedMamba.from_pretrained("medmamba/nano-medical"))` starts it from trained weights.

    Raises:
        ImportError: segmentation_models_pytorch is not installed; the message holds the command that installs it.
    """
    smp = require_smp()
    for name in VARIANTS:
        if name != "test":
            entry = {"encoder": SmpEncoder, "pretrained_settings": {}, "params": {"config": variant_config(name)}}
            smp.encoders.encoders.setdefault(PREFIX + name.replace("-", "_"), entry)


def require_smp() -> Any:
    """Returns segmentation_models_pytorch.

    Raises:
        ImportError: it is not installed; the message holds the command that installs it.
    """
    return require("segmentation_models_pytorch", "segmentation")
