"""Released weights (`hub/models`), and the commands that train, convert, document and publish models.

python -m hub.zoo       trains the released models and their baselines
python -m hub.make      makes a model of any public dataset of the registry, from the download on
python -m hub.results   collects the results of runs into docs/results.md and README.md
python -m hub.convert   converts a published .pth checkpoint to a model folder
python -m hub.card      writes the model card of a folder from its results
python -m hub.publish   validates a model folder and uploads it in one commit
python -m hub.space     builds the folder of the web app's Space
python -m hub.datasets  writes docs/datasets.md
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # must precede the import of PyTorch, see medmamba/__main__.py
