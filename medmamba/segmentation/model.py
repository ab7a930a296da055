"""The segmentation model: a MedMamba encoder and a decoder of segmentation_models_pytorch, with loading and saving."""

from __future__ import annotations

import copy
import inspect
import json
import os
import tempfile
import uuid
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._version import __version__
from ..config import ConfigError, MedMambaConfig, variant_config
from ..model import MedMamba
from ..model.fuse import fuse
from ..pretrained.sources import fetch
from ..pretrained.weights_file import check_header, differences, listed, load_strict, not_finite, read_header, shapes
from ..utils.checksums import CHECKSUM_KEY, CONFIG_NAME, WEIGHTS_NAME, PretrainedError, file_hash
from ..utils.files import staged
from ..utils.strict_json import StrictJsonError, read_json
from ..utils.weights import read_weights
from .config import SegmenterConfig
from .encoder import SmpEncoder, load_weights, require_smp
from .predict import predict
from .result import Segmentation

MAX_CONFIG = 8 * 2**20  # bytes
SIDE = 352  # pixels; the default size of the network's input, a multiple of 32
# Half of smp's default channels: 85 instead of 116 ms for the nano encoder at 352 pixels on two CPU cores.
DECODER_OPTIONS: dict[str, dict[str, Any]] = {"unet": {"decoder_channels": (128, 64, 32, 16, 16)}}


class MedMambaSegmenter(nn.Module):
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
        return self.net(x)

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
        """Returns a copy for inference, with the batch norms of the encoder folded into its convolutions.

        Raises:
            ValueError: the model is in training mode.
        """
        copied = copy.deepcopy(self)
        copied.net.encoder.net = fuse(copied.encoder, dtype)  # type: ignore[union-attr, arg-type, assignment]
        if dtype is not None:
            copied.net.decoder.to(dtype)  # type: ignore[union-attr]
            copied.net.segmentation_head.to(dtype)  # type: ignore[union-attr]
        return copied

    # --- loading and saving ---

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike,
        *,
        revision: str | None = None,
        cache_dir: str | os.PathLike | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
    ) -> MedMambaSegmenter:
        """Loads a segmentation model in eval mode, in float32 on the CPU.

        Args: as those of `MedMamba.from_pretrained`.

        Raises:
            PretrainedError: not found, unreachable or damaged, or the weights do not match the configuration.
            ConfigError: the configuration of another kind of model.
        """
        folder = fetch(name, revision, cache_dir, token, local_files_only, force_download)
        config, header = read_segmenter_config(folder), read_header(folder / WEIGHTS_NAME)
        check_header(header, config.encoder, str(folder))
        with torch.device("meta"):
            model = cls(config)
        if problems := differences(shapes(model.state_dict()), shapes(header)):
            raise PretrainedError(f"{folder} does not match its configuration: {listed(problems)}")
        tensors = read_weights(folder)
        if broken := not_finite(tensors):
            raise PretrainedError(
                f"{folder}: {len(broken)} of {len(tensors)} tensors contain NaN or infinity ({listed(broken, 3)}): "
                "training diverged; use an earlier checkpoint"
            )
        load_strict(model, tensors, str(folder))
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        return model.eval()

    def save_pretrained(self, folder: str | os.PathLike, dtype: torch.dtype | None = None) -> Path:
        """Saves `model.safetensors` and `config.json`; an existing model is replaced only when both are written.

        Args:
            dtype: type in which matrices are stored, e.g. torch.float16 for half the size. Vectors and the parameters
                of the scan stay float32.

        Raises:
            PretrainedError: weights that are not finite, or of a fused copy.
        """
        from safetensors.torch import save_file

        tensors = {}
        for key, tensor in self.state_dict().items():
            shrink = dtype is not None and tensor.ndim > 1 and not key.endswith(("A_log", "D", "dt_bias"))
            tensors[key] = tensor.detach().to(device="cpu", dtype=dtype if shrink else None).contiguous().clone()
        with torch.device("meta"):
            blank = type(self)(self.config)
        if problems := differences(shapes(blank.state_dict()), shapes(tensors)):
            raise PretrainedError(f"the model was not saved, because it could not be loaded again: {listed(problems)}")
        if broken := not_finite(tensors):
            raise PretrainedError(f"the model was not saved: NaN or infinity in {listed(broken, 3)}")
        folder = Path(folder)
        with staged(folder, last=(CONFIG_NAME, WEIGHTS_NAME)) as staging:
            save_file(tensors, staging / WEIGHTS_NAME, metadata={"format": "pt"})
            data = {**self.config.to_dict(), "medmamba_version": __version__}
            data[CHECKSUM_KEY] = file_hash(staging / WEIGHTS_NAME)
            text = json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False)
            (staging / CONFIG_NAME).write_text(text + "\n", encoding="utf-8")
            read_segmenter_config(staging)
        return folder

    def push_to_hub(self, repo_id: str, *, private: bool = False, token: str | None = None) -> str:
        """Uploads the model to the Hub in one commit and returns the URL of that commit."""
        from huggingface_hub import HfApi

        api = HfApi(token=token, library_name="medmamba", library_version=__version__)
        with tempfile.TemporaryDirectory() as staging:
            self.save_pretrained(staging)
            api.create_repo(repo_id, private=private, exist_ok=True)
            info = api.upload_folder(repo_id=repo_id, folder_path=staging, commit_message="Upload segmentation model")
        return str(info.commit_url)


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
    source = start if isinstance(start, MedMamba) or start is None else MedMamba.from_pretrained(start)
    base = source.config if source else variant_config(variant)
    side = SIDE if size is None else size
    if side % 32 or side < 32:
        raise ConfigError(f"size must be a multiple of 32, got {side}")
    names = [f"class_{i + 1}" for i in range(classes)] if isinstance(classes, int) else list(classes)
    config = SegmenterConfig(
        encoder=_encoder_config(base, in_chans or base.in_chans, side),
        decoder=decoder,
        decoder_options=DECODER_OPTIONS.get(decoder, {}) if decoder_options is None else decoder_options,
        classes=tuple(names),
        exclusive=exclusive,
        training={"base_model": str(start)} if isinstance(start, str) else {},
    )
    model = MedMambaSegmenter(config)
    if source:
        load_weights(model.encoder, source.state_dict())
    return model


def read_segmenter_config(folder: str | os.PathLike) -> SegmenterConfig:
    """Reads `config.json` of the folder of a segmentation model.

    Raises:
        ConfigError: not valid JSON, another kind of model, or unknown or invalid fields.
    """
    path = Path(folder) / CONFIG_NAME
    try:
        data = read_json(path, MAX_CONFIG)
    except StrictJsonError as error:
        raise ConfigError(f"{path} is not valid JSON ({error}); download or save the model again") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path} holds {type(data).__name__}, expected an object")
    if data.get("model_type") == "medmamba":
        raise ConfigError(f"{path} is of a classifier; load it with medmamba.MedMamba.from_pretrained")
    data.pop(CHECKSUM_KEY, None)
    try:
        return SegmenterConfig.from_dict(data)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{path}: {error}") from error


def _encoder_config(base: MedMambaConfig, in_chans: int, side: int) -> MedMambaConfig:
    config = base.replace(in_chans=in_chans, num_classes=0, id2label={}, calibration={}, training={}, task="multiclass")
    crop = "squash" if config.preprocess.crop_mode == "center" else config.preprocess.crop_mode
    return config.replace(preprocess=replace(config.preprocess, input_size=(side, side), crop_mode=crop))


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
