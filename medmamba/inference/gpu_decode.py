"""JPEG decoding and resizing on an NVIDIA GPU (extra `gpu-decode`, nvImageCodec).

Processes read the files and their headers; compressed bytes travel to the GPU, which decodes and resizes them. Only
plain 8-bit grey or YCbCr JPEG files without rotation come here, all else is decoded as ever. Pixels differ by a few
levels, since another inverse DCT and another upsampling of the colours are used.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import PreprocessConfig
from ..imaging.ahead import Order, Prepared, Unread, constant_note, prepare_bytes
from ..imaging.fit import placement
from ..imaging.quality import GRID, picture_notes
from ..utils.extras import require


class GpuDecoder:
    """Decodes what `Order.encoded` left compressed.

    Raises:
        ImportError: nvImageCodec is not installed.
    """

    def __init__(self, device: torch.device) -> None:
        codec = require("nvidia.nvimgcodec", "decoding on a GPU", "gpu-decode")
        self.device = device
        self._codec = codec
        self._decoder = codec.Decoder(device_id=device.index or 0, options=":fancy_upsampling=1")
        self._colours = {1: codec.ColorSpec.GRAY, 3: codec.ColorSpec.SRGB}

    def decode(self, items: list[Prepared], order: Order) -> list[Tensor | Unread]:
        """Returns the fitted pixels (1, h, w, c) in [0, 1] of compressed images of one size, on the current stream.

        Notes on the pictures are added to the items. What the GPU cannot decode is decoded on the CPU.
        """
        assert items[0].encoded is not None
        height, width, channels = items[0].encoded
        params = self._codec.DecodeParams(color_spec=self._colours[channels], apply_exif_orientation=False)
        stream = torch.cuda.current_stream(self.device).cuda_stream
        found = self._decoder.decode([item.pixels.tobytes() for item in items], params=params, cuda_stream=stream)
        found = found if isinstance(found, list) else [found]
        pictures: dict[int, Tensor] = {}
        for i, image in enumerate(found):
            if image is not None:
                picture = torch.as_tensor(image, device=self.device)
                picture = picture[..., None] if picture.ndim == 2 else picture
                if tuple(picture.shape) == (height, width, channels):
                    pictures[i] = picture
        fitted = self._fitted(list(pictures.values()), order, [items[i] for i in pictures])
        rows: list[Tensor | Unread] = []
        position = 0
        for i, item in enumerate(items):
            if i in pictures:
                rows.append(fitted[position : position + 1])
                position += 1
            else:
                rows.append(self._by_cpu(item, order))
        return rows

    def _fitted(self, pictures: list[Tensor], order: Order, items: list[Prepared]) -> Tensor:
        if not pictures:
            return torch.empty(0)
        stack = torch.stack(pictures)  # (n, H, W, C)
        self._note(stack, items, order)
        return fit_on_device(stack, order.preprocess)

    def _note(self, stack: Tensor, items: list[Prepared], order: Order) -> None:
        """Adds the notes that depend on the values, of the same grid of pixels as on a CPU."""
        height, width = stack.shape[1:3]
        grids = stack[:, :: -(-height // GRID), :: -(-width // GRID)].contiguous()
        flat = stack.flatten(1)
        equal = (flat.amax(1) == flat.amin(1)).cpu().numpy()
        for item, grid, constant in zip(items, grids.cpu().numpy(), equal, strict=True):
            found = picture_notes(grid, grid if grid.shape[2] == 1 else None)
            item.notes[item.picture_notes_at : item.picture_notes_at] = found
            item.notes += [constant_note()] if constant and order.sized else []

    def _by_cpu(self, item: Prepared, order: Order) -> Tensor | Unread:
        read = prepare_bytes(item.pixels.tobytes(), item.source, order)
        if isinstance(read, Unread):
            return read
        item.notes[:] = read.notes
        pixels = torch.from_numpy(np.array(read.pixels)).to(self.device)
        return (pixels.float().div_(255) if read.pixels.dtype == np.uint8 else pixels)[None]


def fit_on_device(stack: Tensor, config: PreprocessConfig) -> Tensor:
    """Returns (n, H, W, C) of 8 bits as (n, h, w, C) in [0, 1], as `imaging.fit.fit` does on a CPU."""
    inner, margins = placement((stack.shape[1], stack.shape[2]), config)
    pixels = stack.permute(0, 3, 1, 2).float()
    if tuple(pixels.shape[-2:]) != inner:
        pixels = F.interpolate(pixels, inner, mode=config.interpolation, antialias=True, align_corners=False)
    pixels = pixels.div(255).clamp_(0, 1)
    return (F.pad(pixels, margins) if any(margins) else pixels).permute(0, 2, 3, 1)
