"""The protocol that every scan backend implements."""

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

Gradients2d = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
Gradients1d = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


class Backend(ABC):
    """One implementation of the selective scan; `kernels/reference.py` defines the results and the notation.

    The operators of `kernels/ops.py` call it below autograd and with autocast disabled, after checking shapes, devices
    and types. Inputs may be views of any strides and mix float dtypes; none of their sizes is 0. Outputs are contiguous
    and share no memory with the inputs. The recurrence runs in float32 at least.

    Attributes:
        name: that users select it by.
        chunk: tokens between the states that `scan_2d` saves for `scan_2d_backward`; 0 if it saves none.
    """

    name: ClassVar[str]
    chunk: ClassVar[int] = 0

    @abstractmethod
    def why_not(self) -> str | None:
        """Returns None if the backend can run on this machine, else the reason and its remedy."""

    @abstractmethod
    def why_not_on(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Returns None if the backend scans maps of `dtype` on `device`, else the reason."""

    def available(self) -> bool:
        """Returns whether the backend can run on this machine."""
        return self.why_not() is None

    def supports(self, device: torch.device, dtype: torch.dtype) -> bool:
        """Returns whether the backend scans maps of `dtype` on `device`."""
        return self.why_not_on(device, dtype) is None

    @abstractmethod
    def scan_2d(
        self, x: Tensor, proj: Tensor, dt_weight: Tensor, dt_bias: Tensor, A: Tensor, D: Tensor, states: Tensor
    ) -> Tensor:
        """Scans a feature map in four directions, as `reference.scan_2d`.

        Args:
            x: (B, H, W, C). proj: (B, H, W, K, R + 2N). dt_weight: (K, C, R). dt_bias: (K, C). A: (K, C, N). D: (K, C).
            states: filled for the backward pass with the state before each chunk of tokens, in scan order: float32
                (B, K, ceil(L / chunk), N, C), in a layout that is private to the backend. Empty if no gradient is
                needed or `chunk` is 0.

        Returns:
            y (B, H, W, C) in the dtype of x.
        """

    @abstractmethod
    def scan_2d_backward(
        self,
        dy: Tensor,
        x: Tensor,
        proj: Tensor,
        dt_weight: Tensor,
        dt_bias: Tensor,
        A: Tensor,
        D: Tensor,
        states: Tensor,
    ) -> Gradients2d:
        """Differentiates `scan_2d`.

        Args:
            dy: (B, H, W, C) the gradient of y. The others: inputs of `scan_2d`, and the states it has filled.

        Returns:
            Gradients of x, proj, dt_weight, dt_bias, A, D, each in the shape and dtype of its tensor.
        """

    @abstractmethod
    def scan_1d(
        self,
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor,
        delta_bias: Tensor,
        softplus: bool,
    ) -> tuple[Tensor, Tensor]:
        """Scans sequences, as `reference.scan_1d`.

        Args:
            u, delta: (B, C, L). A: (C, N). B, C: (B, G, N, L). D, delta_bias: (C,).
            softplus: whether it is applied to delta + delta_bias.

        Returns:
            y (B, C, L) in the dtype of u, and the last state (B, C, N) in the dtype of the recurrence.
        """

    @abstractmethod
    def scan_1d_backward(
        self,
        dy: Tensor,
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor,
        delta_bias: Tensor,
        softplus: bool,
    ) -> Gradients1d:
        """Differentiates `scan_1d` for dy (B, C, L), the gradient of y.

        Returns:
            Gradients of u, delta, A, B, C, D, delta_bias, each in the shape and dtype of its tensor.
        """
