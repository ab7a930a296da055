"""The medmamba web app: classify, explain and fine-tune in the browser, plus an HTTP API."""

import os

# Must precede the import of PyTorch; training processes inherit it. Waiting threads sleep instead of spinning: with
# spinning, two epochs of fine-tuning beside the server took 80 s instead of 10.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
