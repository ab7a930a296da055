"""`medmamba predict --per`: one prediction per patient, study, series or folder."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..utils.text import for_stream, json_text, printable
from .messages import say

PER = ("patient", "study", "series", "folder")


def add_grouping(parser: argparse.ArgumentParser) -> None:
    """Adds the options that combine images."""
    parser.add_argument(
        "--per",
        choices=PER,
        help="one prediction for all images of a patient, study or series, by the identifiers in DICOM files, which "
        "are neither printed nor stored; or of a folder",
    )
    parser.add_argument(
        "--combine",
        choices=("mean_logit", "max", "noisy_or"),
        help="with --per: how images are combined (default: as chosen on validation, else mean_logit)",
    )
    parser.add_argument(
        "--pseudonym-key",
        metavar="FILE",
        help="with --per: name each group by a keyed hash of its identifier, with the content of this file as the key",
    )


def check_grouping(args: argparse.Namespace) -> None:
    """Raises ValueError for options that cannot be combined."""
    if args.per is None:
        if args.combine or args.pseudonym_key:
            raise ValueError("--combine and --pseudonym-key need --per")
    elif args.csv or args.out:
        raise ValueError("--per cannot be combined with --csv and --out: use --json")
    elif args.per == "folder" and args.pseudonym_key:
        raise ValueError("--pseudonym-key is for identifiers in DICOM files, not for folders")


def files_of(sources: Any) -> list[Path]:
    """Returns the files among the sources.

    Raises:
        ValueError: one is not a file, such as a member of an archive.
    """
    from ..data.sources import name_of

    paths = [Path(name_of(source)) for source in sources]
    if others := [path for path in paths if not path.is_file()]:
        raise ValueError(f"--per works on files, and {others[0]} is none: unpack or download the images first")
    return paths


def groups_of(args: argparse.Namespace, paths: Sequence[Path]) -> list[Any]:
    """Returns the group of each file: a number, a pseudonym or a folder; None for a file without one."""
    if args.per == "folder":
        return [str(path.parent) for path in paths]
    from ..imaging.dicom.studies import group_files, pseudonyms

    if args.pseudonym_key:
        return list(pseudonyms(paths, Path(args.pseudonym_key).read_bytes().strip(), args.per))
    return [None if number is None else f"{args.per} {number + 1}" for number in group_files(paths, args.per)]


def run_groups(args: argparse.Namespace, model: Any, sources: Any, options: dict[str, Any]) -> int:
    """Predicts and prints one line or JSON object per group; returns the exit code."""
    from ..inference.patients import predict_groups
    from ..inference.predict import Failure

    paths, top_k = files_of(sources), args.top_k
    groups = groups_of(args, paths)
    if alone := sum(group is None for group in groups):
        say(f"{alone} of {len(paths)} files name no {args.per}; each is predicted by itself", sys.stderr)
    found = predict_groups(model, paths, groups, method=args.combine, **options)
    failed = 0
    for result in found:
        if isinstance(result, Failure):
            failed += 1
            say(result.error, sys.stderr)
            continue
        failed += len(result.failures)
        record = result.to_dict()
        record["top"] = record["top"][:top_k]
        if args.json:
            encoding = (getattr(sys.stdout, "encoding", None) or "utf-8").lower()
            print(json_text(record, ascii_only=not encoding.startswith("utf")))
            continue
        name = f"one {args.per}" if result.group is None else printable(str(result.group))
        top = "  ".join(f"{printable(label)} {probability:.1%}" for label, probability in record["top"])
        count = len(result.images)
        lines = [f"{name} ({count} image{'s' if count > 1 else ''}): {top}"]
        lines += [f"{printable(said.name)}: {printable(said.answer)}" for said in result.decisions]
        if result.unusual:
            lines.append(f"warning: {result.unusual:.0%} of its images do not look like the training images")
        print(for_stream("\n    ".join(lines), sys.stdout))
    if failed:
        say(f"{failed} images could not be classified", sys.stderr)
    return 1 if failed else 0
