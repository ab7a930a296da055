"""What the tests of the web app share."""

import os
import shutil
from contextlib import contextmanager
from pathlib import Path

import torch

import medmamba
from medmamba.data import registry

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
CALIBRATION = {
    "method": "temperature",
    "temperature": 0.1,
    "n": 100,
    "ece_before": 0.1,
    "ece_after": 0.02,
    "ood": {"score": "energy", "threshold": 5.0, "coverage": 0.95},
}


def save_model(folder: Path, dataset: str | None = "bloodmnist", variant: str = "test", **config) -> Path:
    """A random model, small by default, of the classes of a dataset or of three others; calibrated, as a folder."""
    torch.manual_seed(0)
    entry = registry.get(dataset) if dataset else None
    settings = {"training": {"dataset": dataset} if dataset else {}, "calibration": CALIBRATION, **config}
    if entry:
        settings["id2label"] = entry.id2label
    model = medmamba.create_model(variant, entry.num_classes if entry else 3, **settings)
    return model.save_pretrained(folder)


@contextmanager
def serving(models: list[Path], root: Path, **limits):
    """The address of a running app; `root` gets its uploads and sessions."""
    from demo import app
    from demo.options import Limits, Options

    options = Options(tuple(map(str, models)), "cpu", Limits(**limits))
    before, own = os.environ.get("GRADIO_TEMP_DIR"), str(root / "uploads")
    os.environ["GRADIO_TEMP_DIR"] = own
    demo = app.build_demo(options, root)
    try:
        _, url, _ = demo.launch(prevent_thread_lock=True, quiet=True, **app.launch_options(options.limits))
        yield url
    finally:
        demo.close(verbose=False)
        # Another app, started later, may have set it and still be running.
        if os.environ.get("GRADIO_TEMP_DIR") == own:
            os.environ.pop("GRADIO_TEMP_DIR")
            if before is not None:
                os.environ["GRADIO_TEMP_DIR"] = before
