"""Trained weights (`hub/models`), and the tools that bring weights to the Hugging Face Hub.

python -m hub.card      writes the model card of a folder from its results
python -m hub.publish   validates a model folder and uploads it, in one commit
python -m hub.convert   turns a published .pth checkpoint into a model folder
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before PyTorch is loaded, see medmamba/__main__.py
