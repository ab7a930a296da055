"""python -m hub.similar --data DATA: builds the galleries of training images that the app shows as similar ones.

DATA holds one folder per dataset, named as in the registry. Only datasets whose licence allows showing the images with
their source get one; the others are named with the reason. Sampling is seeded, so a second run writes the same file.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from medmamba import MedMamba, registry
from medmamba.data import open_dataset
from medmamba.data.registry import DatasetEntry
from medmamba.evaluation.classes import match_classes
from medmamba.inference.similar import FREE, build_gallery
from medmamba.pretrained import read_config
from medmamba.utils.checksums import CONFIG_NAME

MODELS = Path(__file__).resolve().parent / "models"
IMAGES = 300
LARGEST = 2 * 2**20  # bytes of a gallery


def attribution(entry: DatasetEntry) -> str:
    """Returns whose images they are and what was changed, as the licences demand."""
    return f"{entry.citation[-1]} Licence: {entry.licence.id}, {entry.licence.url}. Reduced in size."


def build(folder: Path, data: Path, images: int = IMAGES) -> str:
    """Writes the gallery of a model folder; returns what was done or why not.

    Args:
        data: folder of its dataset.
        images: number of images, divided among the classes.
    """
    name = str(read_config(folder).training.get("dataset") or "")
    try:
        entry = registry.get(name)
    except registry.RegistryError:
        return f"no gallery: its dataset {name!r} is not in the registry, so the licence is unknown"
    if entry.licence.id not in FREE:
        return f"no gallery: the images are under {entry.licence.id}, which does not allow showing them freely"
    if not data.is_dir():
        return f"no gallery: there is no folder {data}"
    model = MedMamba.from_pretrained(folder)
    dataset = match_classes(open_dataset(data, dataset=entry), model.config)
    gallery = build_gallery(model, dataset, str(entry.licence.id), attribution(entry), images)
    path = gallery.save(folder)
    size = path.stat().st_size
    if size > LARGEST:
        path.unlink()
        raise ValueError(f"the gallery of {folder.name} has {size / 2**20:.1f} MiB, more than {LARGEST / 2**20:.0f}")
    return f"{len(gallery.labels)} images, {size / 2**20:.2f} MiB"


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="hub.similar", description="Builds galleries of training images.")
    parser.add_argument("--data", type=Path, required=True, help="folder with one folder per dataset")
    parser.add_argument("--models", nargs="+", type=Path, help="model folders (default: all in hub/models)")
    parser.add_argument("--images", type=int, default=IMAGES, help="images in a gallery (%(default)s)")
    args = parser.parse_args(argv)
    folders = args.models or sorted(path.parent for path in MODELS.glob(f"*/{CONFIG_NAME}"))
    for folder in folders:
        config = read_config(folder)
        if config.num_classes:
            said = build(folder, args.data / str(config.training.get("dataset")).replace("-", "_"), args.images)
            print(f"{folder.name}: {said}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
