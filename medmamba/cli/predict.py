"""The subcommand `medmamba predict`."""

import argparse
import csv
import functools
import sys
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..config import DEFAULT_MODEL
from ..utils.tables import csv_row
from ..utils.text import for_stream, json_text, printable
from .groups import add_grouping, check_grouping, run_groups
from .messages import followable, say
from .page import Page, check_record, shortened


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "predict",
        help="classify images",
        description="Classifies files, folders (recursively) and globs; zip and tar archives; the rows of CSV and "
        "Parquet tables; and addresses such as s3://bucket/folder. Files that cannot be read are reported and skipped, "
        "and the exit code is then 1.",
    )
    parser.add_argument("images", nargs="*", metavar="IMAGE", help="file, folder, glob, archive, table or address")
    parser.add_argument(
        "--list", action="append", default=[], metavar="FILE", help="file with one image per line; - for standard input"
    )
    parser.add_argument("--column", metavar="NAME", help="column of the tables that names the images")
    parser.add_argument(
        "--model", default=DEFAULT_MODEL, help="bundled name, org/name[@revision] or folder (default: %(default)s)"
    )
    parser.add_argument(
        "--top-k",
        type=int,
        metavar="K",
        help="number of classes to report (default: 3); not with --csv, which lists all",
    )
    add_running(parser)
    parser.add_argument(
        "--device",
        default="auto",
        help="cpu, cuda, cuda:1, mps, several such as cuda:0,cuda:1, all GPUs with all, or auto (default: %(default)s)",
    )
    parser.add_argument(
        "--precision",
        choices=("float32", "tf32", "bfloat16", "float16"),
        help="of the computation; faster ones change probabilities slightly (default: that of the weights, float32)",
    )
    parser.add_argument(
        "--reduced-jpeg",
        action="store_true",
        help="decode large JPEG files at a half, a quarter or an eighth of their size: faster, not the same pixels",
    )
    parser.add_argument(
        "--gpu-decode",
        action="store_true",
        help="decode plain JPEG files on the GPU (extra gpu-decode): faster, pixels differ by a few levels",
    )
    parser.add_argument(
        "--decide",
        "--operating-point",
        nargs="+",
        metavar="NAME",
        help="operating points, sets or abstentions stored with the model (see `medmamba decide`), or all",
    )
    parser.add_argument(
        "--refuse-unusual",
        nargs="?",
        const="far",
        choices=("far", "near"),
        help="give no label, but the reason, for images far from the training images; near: for all that are flagged",
    )
    add_grouping(parser)
    add_reading(parser)
    add_tta(parser)
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print one JSON object per line and image")
    output.add_argument("--csv", action="store_true", help="print CSV: source, label, probability, all classes, error")
    output.add_argument(
        "--out",
        metavar="FILE",
        help="write results to a .jsonl, .csv or .parquet file, or a folder of Parquet parts, as they come; after an "
        "interruption the same command goes on",
    )
    parser.add_argument(
        "--record",
        metavar="FILE",
        help="also write a page for the record, .html or .pdf: each image with its prediction, file hash, window and "
        "warnings, and the model with the hash of its weights (at most 100 images)",
    )
    parser.add_argument(
        "--ray",
        metavar="ADDRESS",
        help="compute on a Ray cluster at this address; auto: the running one, or a new one on this machine",
    )
    parser.set_defaults(run=run)


def add_running(parser: argparse.ArgumentParser) -> None:
    """Adds the options of a stream of images that do not change results."""
    parser.add_argument(
        "--batch-size", type=int, metavar="N", help="images per forward pass (default: found automatically)"
    )
    parser.add_argument(
        "--workers", type=int, metavar="N", help="processes that read images (default: one per core, if worth it)"
    )


def add_reading(parser: argparse.ArgumentParser) -> None:
    """Adds the options that control how files are read, the same as those of `medmamba.load_image`."""
    parser.add_argument("--frame", type=int, metavar="N", help="frame to read from a multi-frame file, from 0")
    parser.add_argument(
        "--window",
        type=window,
        metavar="CENTER,WIDTH",
        help="window of grey values shown from black to white, in the units of the file",
    )


def add_tta(parser: argparse.ArgumentParser) -> None:
    """Adds the choice of test-time augmentation."""
    parser.add_argument(
        "--tta",
        default="none",
        choices=("none", "hflip", "flips", "dihedral"),
        help="average over mirrored or turned views of each image: 1, 2, 4 or 8 forward passes (default: %(default)s)",
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
    from ..data.sources import open_sources
    from ..inference.predict import iter_predict
    from ..inference.to_file import Summary
    from ..model import MedMamba
    from ..pretrained import fetch
    from ..utils.devices import pick_devices

    if args.csv and args.top_k is not None:
        raise ValueError("--top-k has no effect on --csv, which has a column for every class: leave one of them out")
    whole = bool(args.csv or (args.out and not args.out.endswith(".jsonl")))
    if args.out and whole and args.top_k is not None:
        raise ValueError("--top-k has no effect on such a file, which holds every class: leave it out, or write .jsonl")
    check_grouping(args)
    if args.record:
        check_record(args)
    if args.decide and args.out and whole:
        raise ValueError("such a file has no place for decisions: write .jsonl with --decide")
    sources = open_sources(args.images, lists=args.list, column=args.column)
    for note in sources.notes:
        say(note, sys.stderr)
    if args.ray and args.device != "auto":
        raise ValueError("--device has no effect on --ray, where each actor takes a GPU if there are any: leave it out")
    devices = pick_devices("cpu" if args.ray else args.device)
    folder = fetch(args.model, sidecars=True) if args.record else args.model
    model = MedMamba.from_pretrained(folder).to(devices[0])
    args.top_k = None if whole else 3 if args.top_k is None else args.top_k
    options = {
        "batch_size": args.batch_size,
        "workers": args.workers,
        "devices": devices,
        "precision": args.precision,
        "reduced": args.reduced_jpeg,
        "gpu_decode": args.gpu_decode,
        "frame": args.frame,
        "window": args.window,
        "decide": args.decide,
        "tta": args.tta,
    }
    if args.refuse_unusual:
        if args.per:
            raise ValueError("--refuse-unusual has no effect on --per, which says what share is unusual: leave it out")
        options["refuse_unusual"] = args.refuse_unusual
    if args.per:
        if args.ray:
            raise ValueError("--per has no effect on a cluster: leave --ray out, or group its results")
        return run_groups(args, model, sources, options)
    args.predict = iter_predict
    if args.ray:
        from ..inference.cluster import predict_on_ray

        del options["devices"]
        args.predict = functools.partial(predict_on_ray, address=args.ray)
    if args.record:
        args.page = Page(Path(args.record), args.model, folder, model.config, args.frame, args.window)
    summary: Summary = _to_file(args, model, sources, options) if args.out else _print(args, model, sources, options)
    if args.record:
        say(f"{args.page.write()}: a page for the record", sys.stderr)
    total = summary.answered
    counts = {
        "could not be read": summary.unread,
        "got no answer from the model": summary.undefined,
        "were refused: they do not look like the training images": summary.refused,
    }
    for what, count in counts.items():
        if count:
            say(f"{count} of {total} images {what}", sys.stderr)
    return 1 if summary.unread or summary.undefined else 0


def _to_file(args: argparse.Namespace, model: Any, sources: Any, options: dict[str, Any]) -> Any:
    from tqdm import tqdm

    from ..inference.to_file import predict_to_file

    with tqdm(total=sources.count, unit="image", disable=None, file=sys.stderr) as bar:

        def record(name: str, result: Any) -> dict[str, Any]:
            return {**_record(name, result, args.parser), "source": name}

        summary = predict_to_file(
            model,
            sources,
            args.out,
            top_k=args.top_k,
            record=record,
            done=bar.update,
            predict=args.predict,
            **options,
        )
    before = f", {summary.before} had been answered before" if summary.before else ""
    say(f"{args.out}: {summary.answered} images answered{before}", sys.stderr)
    return summary


def _print(args: argparse.Namespace, model: Any, sources: Any, options: dict[str, Any]) -> Any:
    from tqdm import tqdm

    from ..data.sources import name_of
    from ..inference.to_file import Summary

    write = _json if args.json else _csv(model, _names(model, args.decide)) if args.csv else _lines
    given_sources: deque[Any] = deque()
    summary = Summary()
    top_k = None if args.record else args.top_k  # the page shows every class

    def named() -> Iterator[Any]:
        for source in sources:
            given_sources.append(source)
            yield source

    given = _Counted(named(), sources.count)
    with tqdm(total=sources.count, unit="image", disable=None, file=sys.stderr) as bar:
        for result in args.predict(model, given, top_k, **options):
            bar.update()
            source = given_sources.popleft()
            if args.record:
                args.page.add(source, result)
                result = shortened(result, args.top_k)
            summary.count(result)
            write(bar, name_of(source), result, args.parser)
    return summary


class _Counted:
    """An iterator whose length is known."""

    def __init__(self, items: Iterator[Any], count: int | None) -> None:
        self._items, self._count = items, count

    def __iter__(self) -> Iterator[Any]:
        return self._items

    def __length_hint__(self) -> int:
        return NotImplemented if self._count is None else self._count


def _json(bar: Any, path: str, result: Any, parser: argparse.ArgumentParser) -> None:
    record = {**_record(path, result, parser), "source": path}
    encoding = (getattr(sys.stdout, "encoding", None) or "utf-8").lower()
    bar.write(json_text(record, ascii_only=not encoding.startswith("utf")), file=sys.stdout)


def _names(model: Any, decide: list[str] | None) -> list[str]:
    """Returns the names of the decisions asked for."""
    from ..inference.decide import chosen
    from ..inference.fitted import in_force

    return [entry.name for entry in chosen(in_force(model), decide)]


def _csv(model: Any, decisions: list[str]) -> Callable[..., None]:
    labels = model.config.labels
    table = csv.writer(_Printable())
    extra = {"multilabel": ["labels"], "ordinal": ["grade"]}.get(model.config.task, [])
    table.writerow(csv_row(["source", "label", "probability", *extra, *labels, *decisions, "error"]))

    def write(bar: Any, path: str, result: Any, parser: argparse.ArgumentParser) -> None:
        record = _record(path, result, parser)
        if "error" in record:
            row = ["", "", *[""] * len(extra + labels + decisions), record["error"]]
        else:
            scores = dict(result.top)
            shares = [scores[label] for label in labels]
            own = [";".join(result.labels) if result.labels is not None else result.grade] if extra else []
            row = [result.label, result.probability, *own, *shares, *map(str, result.decisions), ""]
        table.writerow(csv_row([path, *row]))

    return write


class _Printable:
    """Standard output, with escapes for characters that its encoding lacks."""

    def write(self, text: str) -> int:
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        return sys.stdout.write(text.encode(encoding, "backslashreplace").decode(encoding))


def _lines(bar: Any, path: str, result: Any, parser: argparse.ArgumentParser) -> None:
    record = _record(path, result, parser)
    if "error" in record:
        bar.write(for_stream(record["error"], sys.stderr), file=sys.stderr)
        return
    top = "  ".join(f"{printable(label)} {probability:.1%}" for label, probability in result.top)
    if result.labels is not None:
        top = f"{', '.join(map(printable, result.labels)) or 'none of the labels'}  ({top})"
    if result.grade is not None:
        top += f"  (mean grade {result.grade:.2f})"
    warnings = [printable(note) for note in record["image_notes"] if note.startswith("warning")]
    said = [f"{printable(decision.name)}: {printable(decision.answer)}" for decision in result.decisions]
    bar.write(for_stream("\n    ".join([f"{printable(path)}: {top}", *said, *warnings]), sys.stdout), file=sys.stdout)


def _record(path: str, result: Any, parser: argparse.ArgumentParser) -> dict[str, Any]:
    """Returns the result as plain data, with advice phrased as options of the command."""
    record = result.to_dict()
    if "error" in record:
        record["error"] = followable(record["error"], parser, path)
    else:
        record["image_notes"] = [followable(note, parser) for note in record["image_notes"]]
    return record
