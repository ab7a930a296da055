"""The `medmamba` command."""

import argparse
import csv
import importlib
import json
import sys
from typing import Any

from . import __version__
from .sources import DEFAULT_MODEL

# Further subcommands, each a module with `add_parser(subparsers)` that imports what it needs only when it runs.
SUBCOMMANDS = ("cli_train", "cli_evaluate", "cli_explain", "cli_export")


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code: 0, 1 where some input failed, 2 for wrong usage or an error."""
    parser = argparse.ArgumentParser(
        prog="medmamba",
        description="MedMamba medical image classification. For research; not a medical device.",
    )
    parser.add_argument("--version", action="version", version=f"medmamba {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_predict(subparsers)
    doctor = subparsers.add_parser("doctor", help="what is available, what is used, and how to get what is missing")
    doctor.set_defaults(run=_run_doctor)
    for module in SUBCOMMANDS:
        importlib.import_module(f"medmamba.{module}").add_parser(subparsers)
    args = parser.parse_args(argv)
    try:
        return args.run(args) or 0
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        print(f"medmamba {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _add_predict(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "predict",
        help="classify images",
        description="Classifies files, folders (recursively) and globs. Files that cannot be read are reported and "
        "skipped; the exit code is 1 if there were any.",
    )
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="file, folder or glob")
    parser.add_argument("--model", default=DEFAULT_MODEL, help="name, org/name[@revision] or folder (%(default)s)")
    parser.add_argument("--top-k", type=int, default=3, metavar="K", help="classes to report (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="images per forward pass (%(default)s)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps, or auto (%(default)s)")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="one JSON object per image and line")
    output.add_argument("--csv", action="store_true", help="a table: source, label, probability, all classes, error")
    parser.set_defaults(run=_run_predict)


def _run_predict(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from .images import find_images
    from .model import MedMamba
    from .predict import Failure, iter_predict

    found = find_images(args.images)
    paths = found.paths
    if found.passed_over:
        print(found, file=sys.stderr)
    model = MedMamba.from_pretrained(args.model).to(pick_device(args.device))
    # A table needs every class; people want the first few.
    results = iter_predict(model, paths, None if args.csv else args.top_k, args.batch_size)
    table = None
    if args.csv:
        table = csv.writer(sys.stdout)
        table.writerow(["source", "label", "probability", *model.config.labels, "error"])
    failures = 0
    with tqdm(total=len(paths), unit="image", disable=None, file=sys.stderr) as bar:
        for path, result in zip(paths, results, strict=True):
            bar.update()
            failed = isinstance(result, Failure)
            failures += failed
            if args.json:
                bar.write(json.dumps({**result.to_dict(), "source": str(path)}, ensure_ascii=False), file=sys.stdout)
            elif table and isinstance(result, Failure):
                table.writerow([path, "", "", *[""] * model.config.num_classes, result.error])
            elif table and not isinstance(result, Failure):
                scores = dict(result.top)
                table.writerow([path, result.label, result.probability, *[scores[c] for c in model.config.labels], ""])
            elif isinstance(result, Failure):
                bar.write(result.error, file=sys.stderr)
            else:
                top = "  ".join(f"{label} {probability:.1%}" for label, probability in result.top)
                warnings = [note for note in result.image_notes if note.startswith("warning")]
                bar.write("\n    ".join([f"{path}: {top}", *warnings]), file=sys.stdout)
    if failures:
        print(f"{failures} of {len(paths)} images could not be read", file=sys.stderr)
    return 1 if failures else 0


def pick_device(name: str):
    """The torch device by name; "auto" takes a GPU where there is one.

    Raises:
        ValueError: no such device here.
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(
            f"cannot use device {name!r}: {str(error).splitlines()[0]}; `medmamba doctor` shows what there is"
        ) from error
    return device


def _run_doctor(args: argparse.Namespace) -> int:
    from .doctor import report

    rows = report()
    width = max(len(what) for what, _ in rows)
    for what, finding in rows:
        print(f"{what:<{width}}  {finding}")
    return 0
