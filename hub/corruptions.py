"""python -m hub.corruptions: measures the released models on corrupted images; writes corruptions.json beside each.

    python -m hub.corruptions --data DATA [--models hub/models/breastmnist ...] [--images 300]
    python -m hub.card hub/models/*  # the tables in the cards

DATA holds one folder per dataset, arranged as DATASET/SPLIT/CLASS/IMAGE or with an index.csv. The logits of each kind
and severity are kept in --cache, so that an interrupted run continues.
"""

import argparse
import sys
from pathlib import Path

from medmamba import MedMamba
from medmamba.data import DatasetError, open_dataset
from medmamba.evaluation import match_classes
from medmamba.evaluation.corruptions import CORRUPTIONS_NAME, Corruptions, evaluate_corruptions
from medmamba.pretrained import has_classes
from medmamba.utils.checksums import WEIGHTS_NAME, file_hash
from medmamba.utils.devices import make_accelerator
from medmamba.utils.modes import frozen_view

from .decide import located

MODELS = Path(__file__).resolve().parent / "models"


def measure(folder: Path, data: Path, device: str, images: int | None, cache: Path, resamples: int) -> Corruptions:
    """Evaluates the model in `folder` on corrupted images of the test split of its dataset in `data`."""
    model = MedMamba.from_pretrained(folder)
    name = str(model.config.training["dataset"])
    accelerator = make_accelerator(device, "fp32")
    if (place := located(data, name)) is None:
        raise DatasetError(f"{data} has no folder for {name}, the dataset of {folder}")
    index = match_classes(open_dataset(place, dataset=name).split("test"), model.config)
    view = frozen_view(model, device=accelerator.device)
    return evaluate_corruptions(
        view,
        index,
        accelerator,
        images=images,
        resamples=resamples,
        keep=cache / folder.name,
        weights=file_hash(folder / WEIGHTS_NAME),
        context={"model": folder.name, "data": name, "split": "test", **({"images": images} if images else {})},
        progress=True,
    )


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m hub.corruptions", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with one folder per dataset")
    parser.add_argument("--models", type=Path, nargs="+", metavar="FOLDER", help="default: all with a classifier")
    parser.add_argument("--images", type=int, metavar="N", help="at most so many of each test split, seed 0")
    parser.add_argument("--cache", type=Path, default=Path("build/corruptions"), help="(%(default)s)")
    parser.add_argument("--resamples", type=int, default=1000, help="of the bootstrap (%(default)s)")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args(argv)
    folders = args.models or [path.parent for path in sorted(MODELS.glob("*/results.json")) if has_classes(path.parent)]
    for folder in folders:
        found = measure(folder, args.data, args.device, args.images, args.cache, args.resamples)
        print(f"{found.save(folder / CORRUPTIONS_NAME)}\n{found.to_markdown()}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
