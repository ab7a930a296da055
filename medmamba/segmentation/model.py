"""The segmentation model: a MedMamba encoder and a decoder of segmentation_models_pytorch."""

from __future__ import annotations

import copy
import inspect
import os
import uuid
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ..config import ConfigError
from ..dense import load_weights, names_of, starting_encoder
from ..kernels.cuda import graph_capture
from ..model import MedMamba
from ..model.fuse import fuse
from ..model.fused import FusedMedMamba
from ..pretrained.folder import FolderMixin
from .config import SegmenterConfig
from .encoder import SmpEncoder, require_smp
from .fused import fuse_unet
from .predict import predict
from .result import Segmentation

SIDE = 352  # pixels; the default size of the network's input, a multiple of 32
# Half of smp's default channels: 85 instead of 116 ms for the nano encoder at 352 pixels on two CPU cores.
DECODER_OPTIONS: dict[str, dict[str, Any]] = {"unet": {"decoder_channels": (128, 64, 32, 16, 16)}}


class MedMambaSegmenter(FolderMixin, nn.Module):
    """Segments images: a MedMamba as the encoder, a decoder of segmentation_models_pytorch.

    Input: (B, in_chans, H, W) float, normalised as `config.preprocess` says, H and W multiples of 32. Output: logits
    (B, config.outputs, H, W): one map per class, after that of the background if classes are exclusive.

    >>> model = MedMambaSegmenter.from_pretrained("runs/polyps")
    >>> found = model.predict("colonoscopy.png")
    >>> found.overlay().save("overlay.png")

    Raises:
        ImportError: segmentation_models_pytorch is not installed; the message holds the command that installs it.
        ConfigError: options that the decoder does not take.
    """

    config_class = SegmenterConfig

    def __init__(self, config: SegmenterConfig):
        super().__init__()
        smp = require_smp()
        self.config = config
        try:
            net = _architecture(smp, config, SmpEncoder(config.encoder))
        except TypeError as error:
            raise ConfigError(f"the decoder {config.decoder!r} does not take these decoder_options: {error}") from error
        self.net = net

    @property
    def encoder(self) -> nn.Module:
        """The MedMamba network without a classifier."""
        return self.net.encoder.net  # type: ignore[union-attr, return-value]

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.to(next(self.parameters()).dtype))

    def no_weight_decay(self) -> set[str]:
        """Returns the names of parameters to exclude from weight decay: the scan's A and D, biases and norms."""
        return {n for n, p in self.named_parameters() if p.ndim < 2 or n.endswith(("A_log", ".D", "dt_bias"))}

    def predict(
        self,
        image: Any,
        *,
        frame: int | None = None,
        window: tuple[float, float] | None = None,
        tile: int | None = None,
        overlap: float = 0.25,
        flips: bool = False,
    ) -> Segmentation:
        """Segments one image; see `medmamba.segmentation.predict.predict`."""
        return predict(self, image, frame=frame, window=window, tile=tile, overlap=overlap, flips=flips)

    def fuse(self, dtype: torch.dtype | None = None) -> MedMambaSegmenter:
        """Returns a copy for inference, with the batch norms folded into the convolutions.

        On an NVIDIA GPU, in float16 or bfloat16, the decoder of a U-Net runs as one kernel for each convolution.

        Args:
            dtype: of the copy, which takes images of any; None: that of this model.

        Raises:
            ValueError: the model is in training mode.
        """
        copied = copy.deepcopy(self)
        copied.net.encoder.net = fuse(copied.encoder, dtype)  # type: ignore[union-attr, arg-type, assignment]
        fold_norms(copied.net.decoder)  # type: ignore[arg-type]
        copied.net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if dtype is not None:
            copied.net.decoder.to(dtype)  # type: ignore[union-attr]
            copied.net.segmentation_head.to(dtype)  # type: ignore[union-attr]
        fuse_unet(copied.net)
        return copied

    def graphed(self, example: Tensor) -> Callable[[Tensor], Tensor]:
        """Captures a CUDA graph and returns it as a function from images to logits, without Python's launch overhead.

        Each call returns a new tensor. The function is thread-safe, but calls are serialised: capture one graph per
        thread for concurrent calls. It keeps the weights that it was captured with.

        >>> run = model.fuse(torch.float16).cuda().graphed(images)

        Args:
            example: images (B, in_chans, H, W); the function takes batches of exactly this shape.

        Raises:
            RuntimeError: the model is not fused; from the function, if its encoder was moved or loaded since.
            ValueError: the model is not on an NVIDIA GPU, or `example` is empty; from the function, another shape.
        """
        encoder = self.encoder
        if not isinstance(encoder, FusedMedMamba):
            raise RuntimeError(
                "a graph is made of a fused model: call model.fuse(torch.float16).cuda().graphed(images)"
            )

        def weights() -> list[object]:
            return [encoder._blocks, *(t.detach() for t in (*self.parameters(), *self.buffers()))]

        images = example.to(next(self.parameters()).device)
        return graph_capture.replayed(self, images, weights, lambda: encoder._changes)


def create_segmenter(
    variant: str = "nano",
    classes: int | Sequence[str] = ("object",),
    *,
    start: str | os.PathLike | MedMamba | None = None,
    exclusive: bool = False,
    decoder: str = "unet",
    decoder_options: dict[str, Any] | None = None,
    in_chans: int | None = None,
    size: int | None = None,
) -> MedMambaSegmenter:
    """Builds a segmentation model with a new decoder, and an encoder that is new or pretrained.

    Args:
        variant: of the encoder, as in `create_model`: "nano", "tiny", ...; ignored with `start`.
        classes: names of what is segmented, without the background, or their number.
        start: the pretrained MedMamba whose weights the encoder takes: a name, a folder or a model.
        exclusive: each pixel belongs to at most one class.
        decoder: "unet", "fpn", "segformer", ...; see `SegmenterConfig`.
        decoder_options: keyword arguments of the decoder of segmentation_models_pytorch.
        in_chans: channels of the images; default: those of `start`, or 3.
        size: height and width of the network's input, a multiple of 32; 352 by default.

    Raises:
        ConfigError: an unknown variant or decoder, or options that do not fit.
        PretrainedError: `start` cannot be loaded.
        ImportError: segmentation_models_pytorch is not installed.
    """
    encoder, source = starting_encoder(variant, start, in_chans, SIDE if size is None else size)
    config = SegmenterConfig(
        encoder=encoder,
        decoder=decoder,
        decoder_options=DECODER_OPTIONS.get(decoder, {}) if decoder_options is None else decoder_options,
        classes=names_of(classes),
        exclusive=exclusive,
        training={"base_model": str(start)} if isinstance(start, str) else {},
    )
    model = MedMambaSegmenter(config)
    if source:
        load_weights(model.encoder, source.state_dict())
    return model


def fold_norms(module: nn.Module) -> None:
    """Folds each batch norm that directly follows a convolution in the list of a module's children into it, in place.

    That holds for the networks of segmentation_models_pytorch, and for those of torchvision.

    Args:
        module: in eval mode.
    """
    for part in list(module.modules()):
        before: nn.Module | None = None
        for name, child in list(part.named_children()):
            if isinstance(before, (nn.Conv2d, nn.ConvTranspose2d)) and isinstance(child, nn.BatchNorm2d):
                fused = fuse_conv_bn_eval(before, child, transpose=isinstance(before, nn.ConvTranspose2d))
                before.weight, before.bias = fused.weight, fused.bias
                setattr(part, name, nn.Identity())
            before = child


def _architecture(smp: Any, config: SegmenterConfig, encoder: SmpEncoder) -> nn.Module:
    """Builds the decoder around `encoder`, through smp's public table of encoders."""
    name = f"medmamba-{uuid.uuid4().hex}"  # of this model alone, so that several threads can build at once
    kind = next(value for key, value in vars(smp).items() if isinstance(value, type) and key.lower() == config.decoder)
    known = set(inspect.signature(kind).parameters)  # smp passes what it does not know on to the encoder
    if unknown := sorted(set(config.decoder_options) - known):
        raise TypeError(
            f"no {', '.join(unknown)}; {config.decoder} takes {', '.join(sorted(known - {'self', 'kwargs'}))}"
        )
    table = smp.encoders.encoders
    options = dict(encoder_weights=None, in_channels=config.in_chans, classes=config.outputs)
    table[name] = {"encoder": lambda depth, output_stride: encoder, "pretrained_settings": {}, "params": {}}
    try:
        return smp.create_model(config.decoder, name, **options, **config.decoder_options)
    finally:
        del table[name]
