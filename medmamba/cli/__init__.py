"""The `medmamba` command: one module per subcommand."""

from .._moved import names
from .main import main

__all__ = ["main"]
__getattr__ = names(__name__, {"pick_device": "utils.devices"})
