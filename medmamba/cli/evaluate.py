"""The subcommand `medmamba evaluate`."""

import argparse
import sys
from typing import Any

from .messages import say
from .predict import add_reading, add_tta


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "evaluate",
        help="evaluate a model on labelled images",
        description="Computes the published metrics and others, overall and by class, with bootstrap confidence "
        "intervals. Writes results.json, results.md, confusion.png, roc.png and reliability.png.",
    )
    parser.add_argument("--model", required=True, metavar="MODEL", help="bundled name, org/name[@revision] or folder")
    parser.add_argument("--data", required=True, metavar="PATH", help="folder, .csv, .npz or .zip of images")
    parser.add_argument("--split", default="test", help="train, val, test or all (default: %(default)s)")
    parser.add_argument("--out", metavar="DIR", help="folder for the files (default: only print the tables)")
    parser.add_argument("--dataset", metavar="NAME", help="name in the registry, for classes and patients")
    parser.add_argument(
        "--classes", nargs="+", metavar="NAME", help="all class names, if the data contain only some of the classes"
    )
    parser.add_argument(
        "--patient-pattern", metavar="REGEX", help="regular expression whose group 1 in a file name is the patient"
    )
    add_reading(parser)
    add_tta(parser)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"), help="default: %(default)s")
    parser.add_argument(
        "--batch-size", type=int, metavar="N", help="images per forward pass (default: found by itself)"
    )
    parser.add_argument(
        "--workers", type=int, metavar="N", help="processes that read images (default: one per core, if worth it)"
    )
    parser.add_argument(
        "--resamples", type=int, default=1000, metavar="N", help="bootstrap resamples (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the bootstrap (default: %(default)s)")
    parser.add_argument(
        "--per", choices=("patient",), help="score one answer per patient too, from all images of the patient"
    )
    parser.add_argument(
        "--combine",
        choices=("mean_logit", "max", "noisy_or"),
        help="with --per: how images are combined (default: as chosen on validation, else mean_logit)",
    )
    add_groups(parser)
    parser.add_argument("--quiet", action="store_true", help="show no progress bars")
    parser.set_defaults(run=run)


def add_groups(parser: argparse.ArgumentParser) -> None:
    """Adds the options of subgroups and of corruptions."""
    parser.add_argument(
        "--by",
        type=names,
        default=[],
        metavar="COLUMNS",
        help="score the groups of these columns, such as age,sex,site",
    )
    parser.add_argument(
        "--metadata", metavar="CSV", help="file with these columns (default: the data, or the metadata.csv in them)"
    )
    parser.add_argument(
        "--cuts",
        type=cut_points,
        action="append",
        default=[],
        metavar="COLUMN=A,B",
        help="where to divide a column of numbers, such as age=40,65 (default: its quartiles)",
    )
    parser.add_argument(
        "--corruptions",
        nargs="?",
        const="auto",
        metavar="DATASET",
        help="measure the errors on images corrupted as in MedMNIST-C, for this of its datasets (default: the model's)",
    )
    parser.add_argument(
        "--corruption-images", type=int, metavar="N", help="corrupt at most so many images, drawn with --seed"
    )


def names(text: str) -> list[str]:
    """Parses names from text such as "age,sex".

    Raises:
        ArgumentTypeError: an empty name.
    """
    found = [part.strip() for part in text.split(",")]
    if not all(found):
        raise argparse.ArgumentTypeError(f"expected names separated by commas, such as age,sex, got {text!r}")
    return found


def cut_points(text: str) -> tuple[str, tuple[float, ...]]:
    """Parses a column and its cut points from text such as "age=40,65".

    Raises:
        ArgumentTypeError: something else.
    """
    name, found, numbers = text.partition("=")
    try:
        cuts = tuple(float(part) for part in numbers.split(","))
    except ValueError:
        cuts = ()
    if not found or not name.strip() or not cuts:
        raise argparse.ArgumentTypeError(f"expected COLUMN=A,B such as age=40,65, got {text!r}")
    return name.strip(), cuts


def run(args: argparse.Namespace) -> int:
    from ..evaluation import evaluate_model

    scored = evaluate_model(
        args.model,
        args.data,
        None if args.split == "all" else args.split,
        out=args.out,
        dataset=args.dataset,
        classes=args.classes,
        patient_pattern=args.patient_pattern,
        frame=args.frame,
        window=args.window,
        device=args.device,
        batch_size=args.batch_size,
        workers=args.workers,
        resamples=args.resamples,
        seed=args.seed,
        tta=args.tta,
        progress=not args.quiet,
        by=args.by,
        metadata=args.metadata,
        cuts=dict(args.cuts),
        corruptions=args.corruptions,
        corruption_images=args.corruption_images,
        per=args.per,
        combine=args.combine,
    )
    for note in scored.notes:
        say(note, sys.stderr)
    say(scored.to_markdown())
    return 0
