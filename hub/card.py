"""python -m hub.card FOLDER ...: writes model cards from the configuration, results and figures in the folders.

Also writes golden.json where it is missing: a reference prediction with which users can verify the weights.
"""

import argparse
import sys
from pathlib import Path

from medmamba import MedMamba
from medmamba.cards import EXAMPLE_NAME, is_dense, write_card, write_dense_card
from medmamba.utils.text import json_text

from .golden import GOLDEN_NAME, write_golden

METHODS = ("integrated_gradients", "gradcam:stage3.conv", "gradcam:stage3.scan")


def write_example(folder: Path, image: Path, credit: str) -> None:
    """Writes attribution.png, the attribution maps of one image by three methods, and attribution.json, its source."""
    from medmamba.explain import compare

    comparison = compare(MedMamba.from_pretrained(folder), image, METHODS)
    comparison.save(folder / "attribution.png")
    first = comparison.explanations[0]
    record = {"image": image.name, "credit": credit, "label": first.label, "methods": list(METHODS)}
    (folder / EXAMPLE_NAME).write_text(json_text(record, indent=2) + "\n", encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m hub.card", description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="model folders")
    parser.add_argument("--repo", metavar="ORG/NAME", help="repository it will be loaded from (medmamba/FOLDER)")
    parser.add_argument("--license", metavar="ID", help="licence of the weights; default: that of the data")
    parser.add_argument("--permission", default="", metavar="TEXT", help="who permitted unlicensed weights, and when")
    parser.add_argument("--example", type=Path, metavar="IMAGE", help="add an attribution example for this image")
    parser.add_argument("--credit", default="", help="source and licence of that image")
    args = parser.parse_args(argv)
    if len(args.folders) > 1 and (args.repo or args.example):
        parser.error("--repo and --example need a single folder")
    try:
        if args.example and not args.credit:
            raise ValueError("--example needs --credit: the image becomes public, so name its source and licence")
        for folder in args.folders:
            if is_dense(folder):
                print(write_dense_card(folder, args.repo, args.license))
                continue
            if args.example:
                write_example(folder, args.example, args.credit)
            if not (folder / GOLDEN_NAME).is_file() and (model := MedMamba.from_pretrained(folder)).config.num_classes:
                write_golden(model, folder)
            print(write_card(folder, args.repo, args.license, args.permission))
    except (ValueError, OSError, ImportError) as error:
        print(f"hub.card: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
