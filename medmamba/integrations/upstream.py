"""Loads checkpoints of the published MedMamba code: a `state_dict` saved by `torch.save`."""

import os
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import VARIANTS, MedMambaConfig
from ..model import DIRECTIONS, MedMamba
from ..pretrained import load_strict
from ..pretrained.weights_file import listed, not_finite


class ConversionError(ValueError):
    """A checkpoint that is not a published MedMamba or cannot be read; the message gives the reason."""


# Published names to the names here; `{}` is a number. Names in `_SPLIT_DIRECTIONS` also change shape.
WEIGHT_MAP = {
    "patch_embed.proj.weight": "patch_embed.proj.weight",
    "patch_embed.proj.bias": "patch_embed.proj.bias",
    "patch_embed.norm.weight": "patch_embed.norm.weight",
    "patch_embed.norm.bias": "patch_embed.norm.bias",
    "layers.{}.blocks.{}.ln_1.weight": "stages.{}.blocks.{}.norm.weight",
    "layers.{}.blocks.{}.ln_1.bias": "stages.{}.blocks.{}.norm.bias",
    "layers.{}.blocks.{}.self_attention.in_proj.weight": "stages.{}.blocks.{}.ssm.in_proj.weight",
    "layers.{}.blocks.{}.self_attention.conv2d.weight": "stages.{}.blocks.{}.ssm.conv.weight",
    "layers.{}.blocks.{}.self_attention.conv2d.bias": "stages.{}.blocks.{}.ssm.conv.bias",
    "layers.{}.blocks.{}.self_attention.x_proj_weight": "stages.{}.blocks.{}.ssm.x_proj",
    "layers.{}.blocks.{}.self_attention.dt_projs_weight": "stages.{}.blocks.{}.ssm.dt_weight",
    "layers.{}.blocks.{}.self_attention.dt_projs_bias": "stages.{}.blocks.{}.ssm.dt_bias",
    "layers.{}.blocks.{}.self_attention.A_logs": "stages.{}.blocks.{}.ssm.A_log",
    "layers.{}.blocks.{}.self_attention.Ds": "stages.{}.blocks.{}.ssm.D",
    "layers.{}.blocks.{}.self_attention.out_norm.weight": "stages.{}.blocks.{}.ssm.out_norm.weight",
    "layers.{}.blocks.{}.self_attention.out_norm.bias": "stages.{}.blocks.{}.ssm.out_norm.bias",
    "layers.{}.blocks.{}.self_attention.out_proj.weight": "stages.{}.blocks.{}.ssm.out_proj.weight",
    **{
        f"layers.{{}}.blocks.{{}}.conv33conv33conv11.{layer}.{tensor}": f"stages.{{}}.blocks.{{}}.conv.{layer}.{tensor}"
        for layers, tensors in (
            ((0, 2, 5), ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")),
            ((1, 4, 7), ("weight", "bias")),
        )
        for layer in layers
        for tensor in tensors
    },
    "layers.{}.downsample.norm.weight": "downsamples.{}.norm.weight",
    "layers.{}.downsample.norm.bias": "downsamples.{}.norm.bias",
    "layers.{}.downsample.reduction.weight": "downsamples.{}.reduction.weight",
    "head.weight": "head.weight",
    "head.bias": "head.bias",
}
# (4 * C, ...) in the published layout, (4, C, ...) here.
_SPLIT_DIRECTIONS = ("ssm.A_log", "ssm.D")
_WRAPPERS = ("state_dict", "model", "model_state_dict", "net", "weights")


def load_upstream(source: str | os.PathLike | Mapping[str, Tensor], **config: Any) -> MedMamba:
    """Loads a checkpoint of the published code into a model in eval mode.

    Args:
        source: a `.pth` file, or its state dict. Depths, widths, classes and channels are inferred from it.
        config: further fields of `MedMambaConfig`, such as `id2label` or `training`.

    Raises:
        ConversionError: the file cannot be read without unpickling code, is not a MedMamba, is incomplete, or has the
            layout from before April 2024, which is a different network.
    """
    state = unwrap(read_checkpoint(source) if isinstance(source, str | os.PathLike) else source)
    model_config = infer_config(state, **config)
    with torch.device("meta"):
        model = MedMamba(model_config)
    tensors = {new: _reshape(new, state[old]).clone() for old, new in map_keys(state).items()}
    if broken := not_finite(tensors):
        raise ConversionError(
            f"the checkpoint has NaN or infinity in {len(broken)} of {len(tensors)} tensors ({listed(broken, 3)}): its "
            "training diverged; take an earlier one"
        )
    try:
        load_strict(model, {k: t.float() if t.is_floating_point() else t for k, t in tensors.items()}, "the checkpoint")
    except OSError as error:
        raise ConversionError(str(error)) from error
    return model.eval()


def read_checkpoint(path: str | os.PathLike) -> Mapping[str, Any]:
    """Reads a `.pth` with `weights_only=True`; files that would run code are rejected.

    Raises:
        ConversionError: there is no such file, or it holds anything but tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise ConversionError(f"no such file: {path}")
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ConversionError(
            f"{path} holds more than tensors, and unpickling it could run arbitrary code. If you trust it, load it "
            "yourself and save only the weights: torch.save(model.state_dict(), 'weights.pth')"
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError) as error:
        raise ConversionError(f"{path} is not a PyTorch checkpoint, or it is cut short: {error}") from error
    if not isinstance(loaded, Mapping):
        raise ConversionError(f"{path} holds a {type(loaded).__name__}, expected a state dict")
    return loaded


def unwrap(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Removes what trainers wrap around a state dict: {"state_dict": ...} and prefixes such as "module."."""
    for key in _WRAPPERS:
        if isinstance(state.get(key), Mapping):
            state = state[key]
            break
    tensors = {str(k): v for k, v in state.items() if isinstance(v, Tensor)}
    # Prefixes: "model." or "net." of Lightning and others, "module." of DataParallel, "_orig_mod." of torch.compile.
    known = "patch_embed.proj.weight"
    prefix = next((k.removesuffix(known) for k in tensors if k.endswith(f".{known}")), "")
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def infer_config(state: Mapping[str, Tensor], **config: Any) -> MedMambaConfig:
    """Infers depths, dims, channels and classes from the keys and shapes of a published state dict.

    Raises:
        ConversionError: the state dict is not that of a published MedMamba.
    """
    if any(".finalconv11." in k for k in state):
        raise ConversionError(
            "this checkpoint has the layout from before April 2024 (finalconv11.*): an earlier network of the same "
            "name with other results. Only later checkpoints can be loaded"
        )
    if any(re.match(r"stages\.\d+\.blocks\.\d+\.ssm\.", k) for k in state):
        raise ConversionError(
            "these are weights of this package, not of the published code: load them with "
            "MedMamba(config).load_state_dict(...), or with MedMamba.from_pretrained(folder) if a folder was saved"
        )
    for key in ("patch_embed.proj.weight", "head.weight"):
        if key not in state:
            raise ConversionError(
                f"not a published MedMamba checkpoint but another network: it has no {key!r}; it has "
                f"{_sample(state) or 'no tensors at all'}"
            )
    blocks: dict[int, set[int]] = {}
    for key in state:
        if match := re.match(r"layers\.(\d+)\.blocks\.(\d+)\.", key):
            blocks.setdefault(int(match[1]), set()).add(int(match[2]))
    depths = tuple(len(blocks[i]) for i in sorted(blocks))
    if sorted(blocks) != list(range(len(blocks))) or any(max(b) + 1 != len(b) for b in blocks.values()) or not blocks:
        raise ConversionError(f"the checkpoint has gaps in its layers: { ({i: sorted(b) for i, b in blocks.items()}) }")
    embed, head = state["patch_embed.proj.weight"], state["head.weight"]
    A = state.get("layers.0.blocks.0.self_attention.A_logs")
    if A is None or A.ndim != 2 or embed.ndim != 4:
        raise ConversionError("the checkpoint has no scan in its first block, so it is not a MedMamba")
    dims = tuple(embed.shape[0] * 2**i for i in range(len(depths)))
    return MedMambaConfig(
        **{
            "architecture": next(
                (n for n, v in VARIANTS.items() if (v["depths"], v["dims"]) == (depths, dims)), "custom"
            ),
            "depths": depths,
            "dims": dims,
            "d_state": A.shape[1],
            "ssm_expand": A.shape[0] // DIRECTIONS // (dims[0] // 2),
            "patch_size": embed.shape[2],
            "in_chans": embed.shape[1],
            "num_classes": head.shape[0],
            **({"preprocess": {"mean": (0.5,), "std": (0.5,)}} if embed.shape[1] != 3 else {}),
            **config,
        }
    )


def map_keys(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Maps the published name of every tensor of the checkpoint to the name here.

    Raises:
        ConversionError: the checkpoint has names that no published MedMamba has.
    """
    mapped, unknown = {}, []
    for key in state:
        match = re.match(r"layers\.(\d+)\.(?:blocks\.(\d+)\.)?", key)
        numbers = [n for n in match.groups() if n is not None] if match else []
        pattern = key
        if match:
            pattern = "layers.{}." + ("blocks.{}." if len(numbers) == 2 else "") + key[match.end() :]
        if pattern in WEIGHT_MAP:
            mapped[key] = WEIGHT_MAP[pattern].format(*numbers)
        else:
            unknown.append(key)
    if unknown:
        raise ConversionError(f"not a published MedMamba checkpoint: {len(unknown)} unknown names, {_sample(unknown)}")
    return mapped


def _reshape(key: str, tensor: Tensor) -> Tensor:
    return tensor.unflatten(0, (DIRECTIONS, -1)) if key.endswith(_SPLIT_DIRECTIONS) else tensor


def _sample(keys) -> str:
    keys = list(keys)
    return ", ".join(keys[:3]) + (", ..." if len(keys) > 3 else "")
