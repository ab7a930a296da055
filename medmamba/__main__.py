"""The command `medmamba`, also as `python -m medmamba`: sets what PyTorch reads when it loads, then runs `cli.main`."""

import os
import sys


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    # Waiting threads sleep instead of spinning. Alone on a machine this makes no difference; with another program on
    # the same cores, spinning made training take six times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        from .cli.main import main
    except KeyboardInterrupt:  # while PyTorch is loaded
        return 130
    return main(argv)


if __name__ == "__main__":
    sys.exit(main())
