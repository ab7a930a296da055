"""What `medmamba segment` and `medmamba detect` share."""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..utils.text import json_text
from .messages import say
from .predict import add_reading
from .training_options import STOPPED, split_option

RESUMES = (
    f"Rerun the same command to resume an interrupted run; the exit code is {STOPPED} if --max-seconds or SIGTERM "
    "stopped it."
)


def add_training(parser: argparse.ArgumentParser, recipe: str) -> None:
    """Adds output, model, recipe and machine."""
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the model, results and checkpoints")
    parser.add_argument("--recipe", default=recipe, metavar="NAME", help="name or .json file (default: %(default)s)")
    parser.add_argument("--variant", default="nano", metavar="NAME", help="encoder: nano, tiny, ... (default: nano)")
    parser.add_argument("--from", dest="init", metavar="MODEL", help="pretrained encoder, such as nano-medical")
    parser.add_argument("--split", metavar="A,B,C", help="fractions for data without splits (default: 0.7,0.1,0.2)")
    parser.add_argument("--patient-pattern", metavar="REGEX", help="group 1 in a file name is the patient")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: %(default)s)")
    parser.add_argument("--epochs", type=int, metavar="N", help="number of epochs")
    parser.add_argument("--batch-size", type=int, metavar="N", help="images per step, summed over processes")
    parser.add_argument("--size", type=int, metavar="N", help="side of the network's input, a multiple of 32")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="other settings of the recipe"
    )
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"), help="default: auto")
    parser.add_argument("--precision", default="auto", choices=("auto", "fp32", "bf16", "fp16"), help="default: auto")
    parser.add_argument("--max-seconds", type=float, metavar="S", help="stop after about S seconds; rerun to resume")
    parser.add_argument(
        "--finish-early", action="store_true", help="on --max-seconds, write the model of the best epoch so far"
    )
    parser.add_argument("--restart", action="store_true", help="discard the run in --out and start again")
    parser.add_argument("--quiet", action="store_true", help="show no progress bars")


def training_options(args: argparse.Namespace, more: Sequence[str] = ()) -> dict[str, Any]:
    """Returns the keyword arguments that `add_training` stands for.

    Args:
        args: the parsed options.
        more: names of further options that are settings of the recipe.

    Raises:
        ValueError: --split is not three fractions.
    """
    from ..training.recipe import parse_setting

    settings = dict(parse_setting(text) for text in args.set)
    for name in ("epochs", "batch_size", "size", *more):
        if getattr(args, name) is not None:
            settings[name] = getattr(args, name)
    split = split_option(args.split)
    if isinstance(split, str):
        raise ValueError("--split takes three fractions such as 0.7,0.1,0.2")
    names = ["recipe", "variant", "init", "seed", "patient_pattern", "device", "precision", "max_seconds"]
    names += ["finish_early", "restart"]
    return {name: getattr(args, name) for name in names} | {"split": split, "progress": not args.quiet, **settings}


def report(result: Any) -> int:
    """Prints the result of a training; returns the exit code."""
    if not result.finished:
        print(f"stopped in epoch {result.epoch + 1}; rerun the same command to resume")
        return STOPPED
    print(f"best epoch {result.best_epoch} of {result.epoch}; model in {result.out}")
    for name, found in (("val", result.val), ("test", result.test)):
        if found:
            print(f"\n{name}, {found.n} images\n{found.table()}")
    return 0


def add_prediction(parser: argparse.ArgumentParser, model: str, out: str) -> None:
    """Adds images, model, output and how to read the images; `model` and `out` are what the help calls these two."""
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="file, folder or glob")
    parser.add_argument("--model", required=True, help=f"folder or org/name of {model}")
    parser.add_argument(
        "--out", metavar="DIR", help=f"folder for {out}, in folders like those of the images if two share a name"
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps or auto (default: auto)")
    parser.add_argument("--json", action="store_true", help="print one JSON object per line and image")
    add_tiles(parser)
    add_reading(parser)


def predict_each(
    args: argparse.Namespace,
    predict: Callable[[Path, Path], Any],
    summary: Callable[[Any], str],
    second: str | None = None,
) -> int:
    """Predicts and prints every image; those that cannot be read are reported. Returns the exit code.

    Args:
        args: the options of `add_prediction`.
        predict: returns what is found in a file, with `to_dict()`, and writes its files; takes the file and the start
            of their names, see `names_in`.
        summary: returns the line that is printed without --json.
        second: as in `names_in`.
    """
    from ..imaging import ImageError, expand_inputs

    failed = False
    paths = expand_inputs(args.images)
    for path, name in zip(paths, names_in(args.out or "", paths, second), strict=True):
        try:
            found = predict(path, name)
        except (ImageError, OSError) as error:
            failed = True
            say(json_text({"source": str(path), "error": str(error)}) if args.json else f"{error}", sys.stderr)
            continue
        say(json_text(found.to_dict()) if args.json else f"{path}: {summary(found)}")
    return int(failed)


def names_in(folder: str, paths: Sequence[Path], second: str | None = None) -> list[Path]:
    """Returns the start of the names of files that are written for each image, no two the same.

    That is the name of the image without its suffix. Where two images share one, all go into folders like those that
    the images are in, and two in the same folder keep their suffixes.

    Args:
        folder: that the names are in.
        paths: of the images.
        second: the end of the name of a second file for each image, such as "_overlay": images whose name is that of
            the second file of another keep their suffixes.
    """
    names = _short_names(folder, paths)
    if second is not None and (taken := {f"{name}{second}" for name in names}):
        names = [
            name.with_name(path.name) if str(name) in taken else name for name, path in zip(names, paths, strict=True)
        ]
    return names


def _short_names(folder: str, paths: Sequence[Path]) -> list[Path]:
    if len({path.stem for path in paths}) == len(paths):
        return [Path(folder, path.stem) for path in paths]
    whole = [Path(os.path.abspath(path)).parts[1:] for path in paths]
    folders = [parts[:-1] for parts in whole]
    levels = enumerate(zip(*folders, strict=False))
    common = next((i for i, names in levels if len(set(names)) > 1), min(map(len, folders)))
    below = [Path(*parts[common:]) for parts in whole]
    count = Counter(path.with_suffix("") for path in below)
    return [Path(folder, path if count[path.with_suffix("")] > 1 else path.with_suffix("")) for path in below]


def add_evaluation(parser: argparse.ArgumentParser) -> None:
    """Adds model, data, split and output."""
    parser.add_argument("--model", required=True, help="folder or org/name of the model")
    parser.add_argument("--data", required=True, metavar="PATH", help="as for train")
    parser.add_argument("--split", default="test", help="train, val, test or all (default: test)")
    parser.add_argument("--patient-pattern", metavar="REGEX", help="group 1 in a file name is the patient")
    parser.add_argument("--out", metavar="FILE", help="write the metrics to this JSON file")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps or auto (default: auto)")
    add_tiles(parser)


def evaluate(
    args: argparse.Namespace, model: Any, open_data: Callable[..., Any], measure: Callable[..., Any], **how: Any
) -> int:
    """Evaluates a model on a split of a dataset, prints and writes the metrics; returns the exit code.

    Args:
        args: the options of `add_evaluation`.
        model: the loaded model.
        open_data: opens the dataset, such as `open_segmentation`.
        measure: returns the evaluation, such as `evaluate_segmenter`; `how` are further arguments of it.
    """
    from tqdm import tqdm

    data = open_data(args.data, model.config.classes, patient_pattern=args.patient_pattern)
    if args.split != "all":
        data = data.split(args.split)
    found = measure(model, data, progress=lambda rows: tqdm(rows, unit="img"), **how)
    say(f"{data.name}, {args.split}: {found.n} images, 95 % intervals over {found.units}\n{found.table()}")
    write_metrics(found, args.out)
    return 0


def add_tiles(parser: argparse.ArgumentParser) -> None:
    """Adds tile and overlap."""
    parser.add_argument("--tile", type=int, metavar="N", help="cut into overlapping tiles of N pixels")
    parser.add_argument("--overlap", type=float, default=0.25, help="of neighbouring tiles (default: %(default)s)")


def write_metrics(found: Any, out: str | None) -> None:
    """Writes an evaluation as JSON, if a file was named."""
    import json

    from ..utils.files import write_text

    if out:
        write_text(out, json.dumps(found.to_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n")
