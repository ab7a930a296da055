"""The decoder and head of a U-Net for inference, one kernel for each convolution on NVIDIA GPUs.

Layer by layer, each step of the decoder takes a dozen passes over memory: it enlarges a map, joins it with a skip
connection and convolves the result twice, with bias and ReLU. With `kernels/block/convolution.py` it takes two. In
other cases (other devices, float32, gradients, torch.compile, hooks, more than 64 channels or no multiple of 16,
weights written since) the layers run one by one, on a GPU a convolution with its ReLU where that may be. They do not
join a map with one of no channels, which would change the order of its memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.block import convolution
from ..kernels.block.eligibility import kernels_run, observed


class FusedConv(nn.Sequential):
    """A 3x3 convolution and what follows it, with the weight a second time as the kernel takes it.

    Args:
        layers: a convolution, then a ReLU or nothing, and layers that do nothing.
    """

    arranged: Tensor

    def __init__(self, layers: nn.Sequential):
        super().__init__(*layers)
        self.head = not any(isinstance(layer, nn.ReLU) for layer in layers)
        self.register_buffer("arranged", None, persistent=False)
        self._arrange()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._arrange()  # the weight of a copy counts its writes anew

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self._arrange()  # moved or cast, perhaps to another tensor
        return self

    def _arrange(self) -> None:
        weight: Tensor = self[0].weight  # type: ignore[assignment]
        fits = convolution.fits_weight(weight, self.head)
        self.arranged = convolution.arranged(weight.detach(), self.head) if fits else torch.empty(0)
        # In a tuple, which registers no parameter.
        self._arranged_of: tuple[Any, int] | None = (weight, self._writes()) if fits else None

    def runs(self, x: Tensor, skip: Tensor | None = None) -> bool:
        """Returns whether the kernel takes x and skip, (B, H, W, C)."""
        return self._replaceable(x) and self._up_to_date() and convolution.fits(x, skip)

    def run(self, x: Tensor, skip: Tensor | None = None, enlarge: bool = False) -> Tensor:
        """Returns the output for x (B, H, W, C), or with `enlarge` (B, H/2, W/2, C), and skip; see `conv3x3`."""
        conv: Any = self[0]
        return convolution.conv3x3(x, skip, self.arranged, conv.bias, enlarge=enlarge, head=self.head)

    def forward(self, x: Tensor) -> Tensor:
        last = x.permute(0, 2, 3, 1)
        if self.runs(last):
            return self.run(last) if self.head else self.run(last).permute(0, 3, 1, 2)
        if x.is_cuda and not self.head and self._replaceable(last):  # of any type and number of channels
            conv: Any = self[0]
            return torch.cudnn_convolution_relu(x, conv.weight, conv.bias, (1, 1), (1, 1), (1, 1), 1)
        return super().forward(x)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._arranged_of = None
        super()._load_from_state_dict(*args, **kwargs)

    def _replaceable(self, x: Tensor) -> bool:
        """Returns whether other operations may stand for the layers, for x (B, H, W, C)."""
        weight: Tensor = self[0].weight  # type: ignore[assignment]
        if torch.is_grad_enabled() or not kernels_run(x, None) or torch._C._len_torch_dispatch_stack():
            return False
        if torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda") != x.dtype:
            return False
        same = weight.dtype == x.dtype and weight.device == x.device
        return same and not observed(self) and not any(map(observed, self))

    def _up_to_date(self) -> bool:
        """Returns whether the weight is neither another than the one that was arranged nor written to since."""
        weight, writes = self._arranged_of or (None, -1)
        return weight is self[0].weight and writes == self._writes()

    def _writes(self) -> int:
        """Returns a number that grows when the weight is written to."""
        weight: Tensor = self[0].weight  # type: ignore[assignment]
        return 0 if weight.is_inference() else weight._version


class FusedUnetDecoder(nn.Module):
    """The decoder of a U-Net, from the maps of an encoder at strides 1, 2, ..., 32 to one at stride 1."""

    def __init__(self, decoder: nn.Module):
        super().__init__()
        self.center, self.blocks = decoder.center, decoder.blocks
        for block in self.blocks:  # type: ignore[union-attr]
            block.conv1, block.conv2 = FusedConv(block.conv1), FusedConv(block.conv2)

    def forward(self, features: list[Tensor]) -> Tensor:
        x = self.center(features[-1])  # type: ignore[operator]
        for i, block in enumerate(self.blocks, 2):  # type: ignore[arg-type]
            beside = features[-i]
            joined = beside if i < len(features) and beside.shape[1] else None
            x = _step(block, x, joined, beside.shape[2:])
        return x


def _step(block: Any, x: Tensor, skip: Tensor | None, size: torch.Size) -> Tensor:
    """Returns the map (B, O, *size) of one step of the decoder."""
    twice = size == (2 * x.shape[2], 2 * x.shape[3]) and block.interpolation_mode == "nearest"
    last, beside = x.permute(0, 2, 3, 1), None if skip is None else skip.permute(0, 2, 3, 1)
    if not twice or observed(block) or not block.conv1.runs(last, beside):
        return block(x, *size, skip_connection=skip)
    return block.conv2(block.conv1.run(last, beside, enlarge=True).permute(0, 3, 1, 2))


def fuse_unet(net: Any) -> None:
    """Replaces the decoder and the head of a U-Net whose batch norms are folded, in place; leaves other networks.

    Args:
        net: a network of segmentation_models_pytorch, in eval mode.
    """
    if type(net.decoder).__name__ != "UnetDecoder" or not all(map(_fits_block, net.decoder.blocks)):
        return
    net.decoder = FusedUnetDecoder(net.decoder)
    conv, *following = net.segmentation_head
    if _fits_conv(conv) and all(type(part) is nn.Identity for after in following for part in _leaves(after)):
        net.segmentation_head = FusedConv(net.segmentation_head)


def _fits_block(block: Any) -> bool:
    attentions = (block.attention1.attention, block.attention2.attention)
    convs = (block.conv1, block.conv2)
    plain = all(type(attention) is nn.Identity for attention in attentions)
    return plain and all(_fits_conv(c[0]) and type(c[1]) is nn.Identity and type(c[2]) is nn.ReLU for c in convs)


def _fits_conv(conv: Any) -> bool:
    shape = (conv.kernel_size, conv.stride, conv.padding, conv.dilation) if type(conv) is nn.Conv2d else None
    return shape == ((3, 3), (1, 1), (1, 1), (1, 1)) and conv.groups == 1 and conv.bias is not None


def _leaves(module: nn.Module) -> list[nn.Module]:
    return [part for part in module.modules() if not list(part.children())]
