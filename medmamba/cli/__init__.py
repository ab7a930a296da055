"""The command `medmamba`: one module per subcommand."""

from .._moved import names

__getattr__ = names(__name__, {"pick_device": "cli.main"})
