"""Random numbers of one thread, from a seed, that leave PyTorch's generators as they are.

The global generators belong to all threads: to seed them, draw and put them back would change what a training in
another thread draws, and give two explanations at a time each other's numbers.
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
"""Functions with an argument `generator`."""

_LIKE: dict[Callable, Callable] = {torch.rand_like: torch.rand, torch.randn_like: torch.randn}
"""Functions without one, in older versions, and what does the same of a shape."""


class PrivateRandom(TorchFunctionMode):
    """Gives every function of PyTorch that draws random numbers, in this thread, a generator of its own.

    The numbers are those that the functions would draw after `torch.manual_seed(seed)`. A generator that the caller
    passes is used instead.
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
        """Returns the generator of a device, seeded when it is first asked for."""
        if device not in self.generators:
            self.generators[device] = torch.Generator(device).manual_seed(self.seed)
        return self.generators[device]
