"""The web app."""

import os

# Before PyTorch is loaded, and for the training processes: threads that wait for each other sleep instead of spinning.
# A server shares its cores, with its own training for one; there, spinning made two epochs take 80 s instead of 10.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
