"""The subcommand `medmamba predict`."""

import argparse
import csv
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..config import DEFAULT_MODEL
from ..utils.tables import csv_row
from ..utils.text import for_stream, json_text, printable
from .messages import followable, say


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "predict",
        help="classify images",
        description="Classifies files, folders (recursively) and globs. Files that cannot be read are reported and "
        "skipped, and the exit code is then 1.",
    )
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="file, folder or glob")
    parser.add_argument(
        "--model", default=DEFAULT_MODEL, help="bundled name, org/name[@revision] or folder (default: %(default)s)"
    )
    parser.add_argument(
        "--top-k",
        type=int,
        metavar="K",
        help="number of classes to report (default: 3); not with --csv, which lists all",
    )
    parser.add_argument(
        "--batch-size", type=int, default=16, metavar="N", help="images per forward pass (default: %(default)s)"
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps or auto (default: %(default)s)")
    add_reading(parser)
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print one JSON object per line and image")
    output.add_argument("--csv", action="store_true", help="print CSV: source, label, probability, all classes, error")
    parser.set_defaults(run=run)


def add_reading(parser: argparse.ArgumentParser) -> None:
    """Adds the options that control how files are read, the same as those of `medmamba.load_image`."""
    parser.add_argument("--frame", type=int, metavar="N", help="frame to read from a multi-frame file, from 0")
    parser.add_argument(
        "--window",
        type=window,
        metavar="CENTER,WIDTH",
        help="window of grey values shown from black to white, in the units of the file",
    )


def window(text: str) -> tuple[float, float]:
    """Parses (center, width) from text such as "40,400".

    Raises:
        ArgumentTypeError: not two numbers.
    """
    try:
        center, width = (float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected CENTER,WIDTH such as 40,400, got {printable(text)!r}") from None
    return center, width


def run(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from ..imaging.load import find_images
    from ..inference.predict import Failure, NotFinite, iter_predict
    from ..model import MedMamba
    from ..utils.devices import pick_device

    if args.csv and args.top_k is not None:
        raise ValueError("--top-k has no effect on --csv, which has a column for every class: leave one of them out")
    found = find_images(args.images)
    paths = found.paths
    if found.passed_over:
        say(str(found), sys.stderr)
    model = MedMamba.from_pretrained(args.model).to(pick_device(args.device))
    top_k = None if args.csv else 3 if args.top_k is None else args.top_k
    results = iter_predict(model, paths, top_k, args.batch_size, frame=args.frame, window=args.window)
    write = _json if args.json else _csv(model.config.labels) if args.csv else _lines
    unread = undefined = 0
    with tqdm(total=len(paths), unit="image", disable=None, file=sys.stderr) as bar:
        for path, result in zip(paths, results, strict=True):
            bar.update()
            undefined += isinstance(result, NotFinite)
            unread += isinstance(result, Failure) and not isinstance(result, NotFinite)
            write(bar, path, result, args.parser)
    for count, what in ((unread, "could not be read"), (undefined, "got no answer from the model")):
        if count:
            say(f"{count} of {len(paths)} images {what}", sys.stderr)
    return 1 if unread or undefined else 0


def _json(bar: Any, path: Path, result: Any, parser: argparse.ArgumentParser) -> None:
    record = {**_record(path, result, parser), "source": str(path)}
    encoding = (getattr(sys.stdout, "encoding", None) or "utf-8").lower()
    bar.write(json_text(record, ascii_only=not encoding.startswith("utf")), file=sys.stdout)


def _csv(labels: list[str]) -> Callable[..., None]:
    table = csv.writer(_Printable())
    table.writerow(csv_row(["source", "label", "probability", *labels, "error"]))

    def write(bar: Any, path: Path, result: Any, parser: argparse.ArgumentParser) -> None:
        record = _record(path, result, parser)
        if "error" in record:
            row = ["", "", *[""] * len(labels), record["error"]]
        else:
            scores = dict(result.top)
            row = [result.label, result.probability, *[scores[label] for label in labels], ""]
        table.writerow(csv_row([str(path), *row]))

    return write


class _Printable:
    """Standard output, with escapes for characters that its encoding lacks."""

    def write(self, text: str) -> int:
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        return sys.stdout.write(text.encode(encoding, "backslashreplace").decode(encoding))


def _lines(bar: Any, path: Path, result: Any, parser: argparse.ArgumentParser) -> None:
    record = _record(path, result, parser)
    if "error" in record:
        bar.write(for_stream(record["error"], sys.stderr), file=sys.stderr)
        return
    top = "  ".join(f"{printable(label)} {probability:.1%}" for label, probability in result.top)
    warnings = [printable(note) for note in record["image_notes"] if note.startswith("warning")]
    bar.write(for_stream("\n    ".join([f"{printable(path)}: {top}", *warnings]), sys.stdout), file=sys.stdout)


def _record(path: Path, result: Any, parser: argparse.ArgumentParser) -> dict[str, Any]:
    """Returns the result as plain data, with advice phrased as options of the command."""
    record = result.to_dict()
    if "error" in record:
        record["error"] = followable(record["error"], parser, str(path))
    else:
        record["image_notes"] = [followable(note, parser) for note in record["image_notes"]]
    return record
