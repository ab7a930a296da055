"""What attribution methods return, and checks of their options."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

Baseline = str | float


@dataclass
class Attribution:
    """Result of a method.

    Attributes:
        values: (H, W) float32 at the size of the network's input.
        parameters: settings that the method derived itself, for the record.
        diagnostics: measurements of the quality of the result.
        notes: caveats about the result.
    """

    values: Tensor
    parameters: dict[str, Any] = field(default_factory=dict)
    diagnostics: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def check_count(name: str, value: Any, least: int = 1) -> None:
    """Raises ValueError unless the option is an integer of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")


def check_positive(name: str, value: Any) -> None:
    """Raises ValueError unless the option is a finite positive number."""
    if not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"{name} must be a positive number, got {value!r}")
