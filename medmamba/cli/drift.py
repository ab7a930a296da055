"""The subcommand `medmamba drift`."""

import argparse
import sys
from pathlib import Path
from typing import Any

from .messages import say


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "drift",
        help="compare new images with those a model was validated on",
        description="Tests whether images differ from those that a model was validated on: how many are unusual, the "
        "distribution of the features, the predicted classes and, with labels, the calibration. Prints the outcome, "
        "and writes a page with --out. The exit code is 0 whether or not there is a difference.",
    )
    parser.add_argument("model", metavar="MODEL", help="bundled name, org/name[@revision] or folder")
    parser.add_argument("data", nargs="+", metavar="IMAGES", help="files, folders or globs of new images")
    parser.add_argument("--out", metavar="DIR", help="folder for drift.html, drift.pdf and drift.json")
    parser.add_argument(
        "--labelled", action="store_true", help="IMAGES is a dataset with labels, as for medmamba evaluate"
    )
    parser.add_argument(
        "--reference",
        metavar="FOLDER",
        help="images to compare with, such as the validation images (default: what the model folder records of those)",
    )
    parser.add_argument("--images", type=int, metavar="N", help="at most so many, drawn with a fixed seed")
    parser.add_argument("--alpha", type=float, default=0.05, help="level of the corrected tests (default: %(default)s)")
    parser.add_argument("--no-pdf", action="store_true", help="write no PDF")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps or auto (default: %(default)s)")
    parser.add_argument(
        "--batch-size", type=int, default=16, metavar="N", help="images per forward pass (default: %(default)s)"
    )
    parser.add_argument("--quiet", action="store_true", help="show no progress bars")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from ..cards.facts import read_results
    from ..evaluation import evaluations
    from ..evaluation.drift import DriftError, detect_drift, predicted_counts
    from ..model import MedMamba
    from ..pretrained.sources import fetch
    from ..reporting import write_drift
    from ..utils.devices import pick_device
    from ..utils.extras import require

    if args.labelled and len(args.data) > 1:
        raise DriftError("a dataset with labels is a single folder or file; give one, or leave out --labelled")
    if args.out and not args.no_pdf:
        require("weasyprint", "the page as PDF (leave it out with --no-pdf)", "report")
    folder = fetch(args.model, sidecars=True)
    model = MedMamba.from_pretrained(folder).to(pick_device(args.device))
    by_split = evaluations(read_results(folder))
    known = by_split.get("val") or by_split.get("test")
    found = detect_drift(
        model,
        args.data[0] if args.labelled else args.data,
        predicted=predicted_counts(known) if known and list(known.classes) == model.config.labels else None,
        labelled=args.labelled,
        reference=args.reference,
        images=args.images,
        alpha=args.alpha,
        batch_size=args.batch_size,
        name=Path(args.model).name,
        progress=lambda rows: tqdm(rows, "images", unit="img", disable=args.quiet),
    )
    for source, error in found.failures:
        say(f"{source}: {error}", sys.stderr)
    say(found.to_markdown())
    if args.out:
        for path in write_drift(found, args.out, model.unusual, pdf=not args.no_pdf).values():
            say(str(path))
    return 1 if found.failures else 0
