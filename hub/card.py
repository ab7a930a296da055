"""python -m hub.card FOLDER: writes the model card of a folder from its config.json and results.json."""

import argparse
import json
import sys
from pathlib import Path

from medmamba import MedMamba
from medmamba.card import EXAMPLE_NAME, write_card

METHODS = ("integrated_gradients", "gradcam:stage3.conv", "gradcam:stage3.scan")


def write_example(folder: Path, image: Path, credit: str) -> None:
    """attribution.png: what in one image moved the model, by three methods; attribution.json says which image it is."""
    from medmamba.explain import compare

    comparison = compare(MedMamba.from_pretrained(folder), image, METHODS)
    comparison.save(folder / "attribution.png")
    first = comparison.explanations[0]
    record = {"image": image.name, "credit": credit, "label": first.label, "methods": list(METHODS)}
    (folder / EXAMPLE_NAME).write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m hub.card", description=__doc__)
    parser.add_argument("folder", type=Path, help="a model folder")
    parser.add_argument("--repo", metavar="ORG/NAME", help="where it will be loaded from (medmamba/FOLDER)")
    parser.add_argument("--license", metavar="ID", help="of the weights; default: that of the data")
    parser.add_argument("--permission", default="", metavar="TEXT", help="who allowed unlicensed weights, and when")
    parser.add_argument("--example", type=Path, metavar="IMAGE", help="draw an attribution example of this image")
    parser.add_argument("--credit", default="", help="source and licence of that image")
    args = parser.parse_args(argv)
    try:
        if args.example:
            if not args.credit:
                raise ValueError("--example needs --credit: the image will be public, say whose it is")
            write_example(args.folder, args.example, args.credit)
        print(write_card(args.folder, args.repo, args.license, args.permission))
    except (ValueError, OSError, ImportError) as error:
        print(f"hub.card: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
