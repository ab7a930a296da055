"""The subcommand `medmamba report`."""

import argparse
import sys
from typing import Any

from .evaluate import add_groups
from .messages import say


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "report",
        help="write a report on a model for reviewers and ethics boards",
        description="Evaluates a model and writes report.html, one file with all it shows, and report.pdf: data and "
        "splits, performance, operating points, calibration, subgroups, corrupted and unusual images, explanations "
        "with their checks, errors, limits, and which items of TRIPOD+AI and CLAIM are covered. It shows images of the "
        "data.",
    )
    parser.add_argument("model", metavar="MODEL", help="bundled name, org/name[@revision] or folder")
    parser.add_argument("data", metavar="DATA", help="folder, .csv, .npz or .zip of labelled images")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the report")
    parser.add_argument("--split", default="test", help="train, val, test or all (default: %(default)s)")
    parser.add_argument("--dataset", metavar="NAME", help="name in the registry, for classes and patients")
    parser.add_argument(
        "--patient-pattern", metavar="REGEX", help="regular expression whose group 1 in a file name is the patient"
    )
    parser.add_argument("--external", action="store_true", help="the data are of another source than the training data")
    add_groups(parser)
    parser.add_argument(
        "--explain", type=int, default=2, metavar="N", help="images to explain, with all checks (default: %(default)s)"
    )
    parser.add_argument(
        "--methods", nargs="+", default=["gradcam"], metavar="METHOD", help="to explain them with (default: gradcam)"
    )
    parser.add_argument(
        "--statements", metavar="JSON", help='what only authors can say: {"TRIPOD+AI": {"17": "Approved by ..."}}'
    )
    parser.add_argument("--no-pdf", action="store_true", help="write only the HTML")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"), help="default: %(default)s")
    parser.add_argument(
        "--resamples", type=int, default=1000, metavar="N", help="bootstrap resamples (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of all that is drawn (default: %(default)s)")
    parser.add_argument("--quiet", action="store_true", help="show no progress bars")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from ..reporting import write_report

    paths = write_report(
        args.model,
        args.data,
        args.out,
        split=None if args.split == "all" else args.split,
        pdf=not args.no_pdf,
        statements=args.statements,
        dataset=args.dataset,
        patient_pattern=args.patient_pattern,
        external=args.external,
        by=args.by,
        metadata=args.metadata,
        cuts=dict(args.cuts),
        corruptions=args.corruptions,
        corruption_images=args.corruption_images,
        explain=args.explain,
        methods=args.methods,
        device=args.device,
        resamples=args.resamples,
        seed=args.seed,
        progress=not args.quiet,
    )
    for path in paths.values():
        say(str(path))
    if "pdf" not in paths:
        say('no PDF was asked for; print the HTML, or install one: pip install "medmamba[report]"', sys.stderr)
    return 0
