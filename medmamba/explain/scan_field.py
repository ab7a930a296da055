"""Effective receptive field of the selective scan at one pixel, computed from the recurrence."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..imaging.image import Window
from ..imaging.load import ImageSource, MedicalImage
from ..imaging.preprocess import placement, preprocess
from ..inference.predict import read_image
from ..kernels.reference import to_directions
from ..utils.text import json_text
from .conditions import controlled
from .explanation import to_image_size
from .render import scan_figure
from .scores import encoder_only
from .subject import blocks, frozen_view

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DIRECTIONS = ("rows, forward", "columns, forward", "rows, backward", "columns, backward")


@dataclass(frozen=True, eq=False)
class ScanField:
    """Influence of each pixel of a feature map on the scan's output at one pixel.

    Attributes:
        directions: float32 (4, H', W') in the order of `names`: mean over channels of |d y / d x|, where y is the
            output of that direction at the pixel and x its input at every pixel, with the step sizes, B and C of this
            image held fixed. Covers what the states carry, without the skip connection D.
        merged: float32 (H', W'), the same for the sum of the four directions, which is what the block uses.
        skip: |D|, mean over channels, summed over directions: the additional influence of the pixel on itself.
        reach: by direction, the number of preceding tokens, in scan order, that carry 90% of the influence on the
            pixel from before it; None at the first token.
        pixel: (row, column) in the feature map.
        image_pixel: (row, column) in the image.
        stage, block: numbers, from 1.
        image: the image.
        merged_full: float32 (h, w), the merged map at the size of the image.
        names: of the directions.
    """

    directions: np.ndarray = field(repr=False)
    merged: np.ndarray = field(repr=False)
    skip: float
    reach: dict[str, int | None]
    pixel: tuple[int, int]
    image_pixel: tuple[int, int]
    stage: int
    block: int
    image: MedicalImage = field(repr=False)
    merged_full: np.ndarray = field(repr=False)
    names: tuple[str, ...] = DIRECTIONS

    def to_dict(self) -> dict[str, Any]:
        """Returns everything but the maps, in plain types, for JSON."""
        return {
            "source": self.image.source,
            "image_pixel": list(self.image_pixel),
            "pixel": list(self.pixel),
            "map_size": list(self.merged.shape),
            "stage": self.stage,
            "block": self.block,
            "reach_90": self.reach,
            "skip": self.skip,
            "share_of_influence": {
                name: float(m.sum() / max(self.directions.sum(), 1e-30))
                for name, m in zip(self.names, self.directions, strict=True)
            },
        }

    def figure(self) -> Figure:
        """Returns the image, the merged field and the four directions as a matplotlib `Figure`."""
        directions = {}
        for name, values in zip(self.names, self.directions, strict=True):
            reach = self.reach.get(name)
            directions[name + (f": 90% within {reach} tokens" if reach is not None else "")] = values
        return scan_figure(
            self.image,
            f"pixel {self.image_pixel}, stage {self.stage}, block {self.block}",
            self.image_pixel,
            self.pixel,
            (f"all directions; the pixel on itself: +{self.skip:.2g}", self.merged),
            directions,
        )

    def save(self, path: str | os.PathLike) -> Path:
        """Writes .png (the figure), .npz (the maps and the record) or .json (the record).

        Returns:
            The path.

        Raises:
            ValueError: unknown suffix.
        """
        path = Path(path)
        record = json_text(self.to_dict(), indent=2)
        if path.suffix == ".png":
            self.figure().savefig(path)
        elif path.suffix == ".npz":
            np.savez_compressed(
                path,
                directions=self.directions,
                merged=self.merged,
                merged_full=self.merged_full,
                record=np.array(record),
            )
        elif path.suffix == ".json":
            path.write_text(record + "\n", encoding="utf-8")
        else:
            raise ValueError(f"cannot save a scan field as {path.name!r}: use .png, .npz or .json")
        return path


def scan_field(
    model: nn.Module,
    image: ImageSource | MedicalImage,
    pixel: tuple[int, int] | None = None,
    stage: int = 1,
    block: int | None = None,
    *,
    frame: int | None = None,
    window: Window | None = None,
) -> ScanField:
    """Computes the influence of every pixel of a feature map on the scan's output at one pixel, by direction.

    Derived from the recurrence: token s contributes
    `C[t] * exp(A * (dt[s+1] + ... + dt[t])) * B[s] * dt[s]`, summed over the states, to the output of a later token t.

    Args:
        model: a `MedMamba`, or a model with one as encoder: `MedMambaSegmenter`, `MedMambaDetector`.
        pixel: (row, column) in the image, not in the network's input; None: its centre.
        stage: 1 (finest map, 4 input pixels per cell) to 4.
        block: number within the stage, from 1; None: the last.
        frame, window: as in `load_image`.

    Raises:
        ValueError: the pixel is outside the image or cropped away, or there is no such stage or block.
    """
    view = frozen_view(encoder_only(model))
    in_stage = blocks(view, stage)
    block = len(in_stage) if block is None else block
    if not 1 <= block <= len(in_stage):
        raise ValueError(f"no block {block}; stage {stage} of this model has blocks 1 to {len(in_stage)}")
    ssm = in_stage[block - 1].ssm
    picture = read_image(image, frame, window)
    config = view.config
    height, width = picture.size
    y, x = (height // 2, width // 2) if pixel is None else pixel
    if not (0 <= y < height and 0 <= x < width):
        raise ValueError(f"pixel {(y, x)} is outside the image, {height}x{width}; give (row, column) in the image")
    weight = view.patch_embed.proj.weight
    captured: list[Tensor] = []
    handle = ssm.register_forward_pre_hook(lambda module, inputs: captured.append(inputs[0]))
    with controlled(weight.device, 0), torch.no_grad():
        view.forward_features(preprocess(picture, config.preprocess, config.in_chans, weight.device)[None])
        handle.remove()
        values, proj, dt_weight, A, _ = ssm.scan_inputs(captured[0])  # x (1, H', W', C)
        H, W = values.shape[1:3]
        row, col = _to_map((y, x), picture.size, config.preprocess, (H, W))
        jacobian = influence(proj[0], dt_weight, ssm.dt_bias, A, (row, col))  # (K, H', W', C)
        directions = jacobian.abs().mean(-1)
        merged = jacobian.sum(0).abs().mean(-1)
        reach = [_reach(seq[: t + 1]) for seq, t in zip(*_in_order(directions, (row, col)), strict=True)]
    merged_map = merged.float().cpu().numpy()
    return ScanField(
        directions=directions.float().cpu().numpy(),
        merged=merged_map,
        skip=ssm.D.sum(0).abs().mean().item(),
        reach=dict(zip(DIRECTIONS, reach, strict=True)),
        pixel=(row, col),
        image_pixel=(int(y), int(x)),
        stage=stage,
        block=block,
        image=picture,
        merged_full=to_image_size(_enlarge(merged_map, config.preprocess.input_size), picture.size, config.preprocess),
    )


def influence(proj: Tensor, dt_weight: Tensor, dt_bias: Tensor, A: Tensor, pixel: tuple[int, int]) -> Tensor:
    """Returns d y[k, pixel, c] / d x[k, every pixel, c] of the four scans without D; step sizes, B and C held fixed.

    Channels do not mix within a scan, so this is the full Jacobian.

    Args:
        proj: (H, W, K, R + 2N).
        dt_weight, dt_bias, A: as in `kernels.reference.scan_2d`.
        pixel: (row, column) in the feature map.

    Returns:
        Signed float64 (K, H, W, C), in pixel order.
    """
    H, W, K, _ = proj.shape
    C, N = A.shape[1:]
    R = dt_weight.shape[2]
    proj, dt_weight, dt_bias, A = (t.double() for t in (proj, dt_weight, dt_bias, A))
    code, B_, C_ = to_directions(proj[None])[0].split((R, N, N), dim=-1)  # (K, L, R), (K, L, N), (K, L, N)
    order, at = _order(H, W, K, pixel, proj.device)
    result = proj.new_zeros(K, H * W, C)
    for k in range(K):
        t = at[k]
        dt = F.softplus(code[k, : t + 1] @ dt_weight[k].T + dt_bias[k])  # (t + 1, C)
        elapsed = dt.cumsum(0)
        elapsed = elapsed[-1] - elapsed  # of steps after s up to t
        # One state at a time: all at once would take N times the memory of the sequence.
        gain = sum(torch.exp(elapsed * A[k, :, n]) * (B_[k, : t + 1, n, None] * C_[k, t, n]) for n in range(N))
        result[k, order[k, : t + 1]] = dt * gain
    return result.unflatten(1, (H, W))


def _order(H: int, W: int, K: int, pixel: tuple[int, int], device: torch.device) -> tuple[Tensor, list[int]]:
    """Returns the row-major pixel index of each token (K, L), and the position of the pixel in each direction."""
    index = torch.arange(H * W, device=device).view(1, H, W, 1, 1).expand(1, H, W, K, 1)
    order = to_directions(index)[0, ..., 0]  # (K, L)
    return order, (order == pixel[0] * W + pixel[1]).int().argmax(1).tolist()


def _in_order(maps: Tensor, pixel: tuple[int, int]) -> tuple[Tensor, list[int]]:
    """Returns (K, H, W) maps in scan order (K, L), and the position of the pixel in each direction."""
    K, H, W = maps.shape
    order, at = _order(H, W, K, pixel, maps.device)
    return maps.flatten(1).gather(1, order), at


def _reach(sequence: Tensor, share: float = 0.9) -> int | None:
    """Returns how many tokens before the last carry this share of the influence on it; None if there is none."""
    before = sequence[:-1].flip(0)
    if not len(before) or not before.sum():
        return None
    return int((before.cumsum(0) < share * before.sum()).sum()) + 1


def _to_map(pixel: tuple[int, int], size: tuple[int, int], config: Any, map_size: tuple[int, int]) -> tuple[int, int]:
    """Returns the feature-map cell that covers a pixel of the image."""
    inner, (left, _, top, _) = placement(size, config)
    where = []
    for p, full, placed, margin, side, cells in zip(
        pixel, size, inner, (top, left), config.input_size, map_size, strict=True
    ):
        seen = int((p + 0.5) * placed / full) + margin
        if not 0 <= seen < side:
            raise ValueError(f"the model does not see pixel {pixel}: its preprocessing crops that part of the image")
        where.append(min(seen * cells // side, cells - 1))
    return where[0], where[1]


def _enlarge(map_: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return F.interpolate(torch.from_numpy(map_)[None, None], size, mode="nearest")[0, 0].numpy()
