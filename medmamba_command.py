"""The command `medmamba`: what must be said before PyTorch is loaded, then `medmamba.cli`."""

import os

# Threads that wait for each other sleep instead of spinning. Alone on a machine this makes no difference; with another
# program on the same cores, spinning made training take six times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def main() -> int:
    try:
        from medmamba.cli import main
    except KeyboardInterrupt:  # while PyTorch is loaded
        return 130
    return main()
