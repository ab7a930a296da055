"""Seeded random numbers for one thread, without touching PyTorch's global generators.

The global generators are shared by all threads: seeding and restoring them would change what training in another thread
draws, and mix the numbers of two explanations that run at the same time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_DRAW: set[Callable] = {
    torch.bernoulli, torch.multinomial, torch.normal, torch.poisson, torch.rand, torch.randint, torch.randn,
    torch.randperm, Tensor.bernoulli, Tensor.bernoulli_, Tensor.cauchy_, Tensor.exponential_, Tensor.geometric_,
    Tensor.log_normal_, Tensor.multinomial, Tensor.normal_, Tensor.random_, Tensor.uniform_, nn.init.kaiming_normal_,
    nn.init.kaiming_uniform_, nn.init.normal_, nn.init.orthogonal_, nn.init.sparse_, nn.init.trunc_normal_,
    nn.init.uniform_, nn.init.xavier_normal_, nn.init.xavier_uniform_,
}  # fmt: skip
"""Functions that accept `generator`."""

_LIKE: dict[Callable, Callable] = {torch.rand_like: torch.rand, torch.randn_like: torch.randn}
"""Functions that lack `generator` in older versions, and their equivalents that take a shape."""


class PrivateRandom(TorchFunctionMode):
    """Passes a private generator to every PyTorch function that draws random numbers in this thread.

    The numbers are those drawn after `torch.manual_seed(seed)`. A generator passed explicitly takes precedence.
    """

    def __init__(self, seed: int):
        super().__init__()
        self.seed = seed
        self.generators: dict[torch.device, torch.Generator] = {}

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _DRAW and kwargs.get("generator") is None:
            tensors = (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
            device = kwargs.get("device") or next((t.device for t in tensors), torch.get_default_device())
            if torch.device(device).type != "meta":  # tensors without data, for which nothing is drawn
                kwargs = {**kwargs, "generator": self.generator(torch.device(device))}
        elif func in _LIKE and kwargs.get("generator") is None:
            like: Tensor = args[0]
            options = {"device": like.device, "dtype": like.dtype, **kwargs}
            options.pop("memory_format", None)
            return _LIKE[func](like.shape, generator=self.generator(torch.device(options["device"])), **options)
        return func(*args, **kwargs)

    def generator(self, device: torch.device) -> torch.Generator:
        """Returns the generator of a device, created and seeded on first use."""
        if device not in self.generators:
            self.generators[device] = torch.Generator(device).manual_seed(self.seed)
        return self.generators[device]
