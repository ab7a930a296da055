"""The subcommand `medmamba detect`: train, predict and evaluate detectors."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from ..utils.text import json_text
from .messages import say
from .predict import add_reading
from .train import STOPPED, _split


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "detect",
        help="train, predict and evaluate detectors",
        description="Detection with a MedMamba backbone under torchvision's FCOS.",
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    _add_train(actions)
    _add_predict(actions)
    _add_evaluate(actions)
    parser.set_defaults(run=lambda args: args.act(args))


def _add_train(actions: Any) -> None:
    parser = actions.add_parser(
        "train",
        help="train on images with boxes",
        description="Trains on train, selects epoch and reported score on val, evaluates once on test. Rerun the same "
        f"command to resume an interrupted run; the exit code is {STOPPED} if --max-seconds or SIGTERM stopped it.",
    )
    parser.add_argument(
        "--data",
        required=True,
        metavar="PATH",
        help="Pascal VOC folder, COCO .json, or CSV with columns image, label, left, top, right, bottom",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the model, results and checkpoints")
    parser.add_argument("--classes", nargs="+", metavar="NAME", help="names in order (default: those found)")
    parser.add_argument("--recipe", default="detect", metavar="NAME", help="name or .json file (default: %(default)s)")
    parser.add_argument("--variant", default="nano", metavar="NAME", help="encoder: nano, tiny, ... (default: nano)")
    parser.add_argument("--from", dest="init", metavar="MODEL", help="pretrained encoder, such as nano-medical")
    parser.add_argument("--small-objects", action="store_true", help="for objects of few pixels; twice the work")
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
    parser.add_argument("--restart", action="store_true", help="discard the run in --out and start again")
    parser.add_argument("--quiet", action="store_true", help="show no progress bars")
    parser.set_defaults(act=_train)


def _add_predict(actions: Any) -> None:
    parser = actions.add_parser(
        "predict",
        help="detect in images",
        description="Detects in files, folders and globs; prints one line per image, and with --out writes pictures "
        "with the boxes. Files that cannot be read are reported and skipped, and the exit code is then 1.",
    )
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="file, folder or glob")
    parser.add_argument("--model", required=True, help="folder or org/name of a detector")
    parser.add_argument("--out", metavar="DIR", help="folder for pictures with the boxes")
    parser.add_argument("--score", type=float, metavar="P", help="from which a box is reported (default: the model's)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps or auto (default: auto)")
    parser.add_argument("--json", action="store_true", help="print one JSON object per line and image")
    _add_tiles(parser)
    add_reading(parser)
    parser.set_defaults(act=_predict)


def _add_evaluate(actions: Any) -> None:
    parser = actions.add_parser("evaluate", help="compare with true boxes", description="COCO's mAP and mAP50.")
    parser.add_argument("--model", required=True, help="folder or org/name of a detector")
    parser.add_argument("--data", required=True, metavar="PATH", help="as for train")
    parser.add_argument("--split", default="test", help="train, val, test or all (default: test)")
    parser.add_argument("--patient-pattern", metavar="REGEX", help="group 1 in a file name is the patient")
    parser.add_argument("--out", metavar="FILE", help="write the metrics to this JSON file")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps or auto (default: auto)")
    _add_tiles(parser)
    parser.set_defaults(act=_evaluate)


def _add_tiles(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tile", type=int, metavar="N", help="cut into overlapping tiles of N pixels")
    parser.add_argument("--overlap", type=float, default=0.25, help="of neighbouring tiles (default: %(default)s)")


def _train(args: argparse.Namespace) -> int:
    from ..training.detection_run import train_detector
    from ..training.recipe import parse_setting

    settings = dict(parse_setting(text) for text in args.set)
    for name in ("epochs", "batch_size", "size"):
        if getattr(args, name) is not None:
            settings[name] = getattr(args, name)
    split = _split(args.split)
    if isinstance(split, str):
        raise ValueError("--split takes three fractions such as 0.7,0.1,0.2")
    result = train_detector(
        args.data,
        args.out,
        args.classes,
        args.recipe,
        args.variant,
        args.init,
        seed=args.seed,
        small_objects=args.small_objects,
        split=split,
        patient_pattern=args.patient_pattern,
        device=args.device,
        precision=args.precision,
        max_seconds=args.max_seconds,
        restart=args.restart,
        progress=not args.quiet,
        **settings,
    )
    if not result.finished:
        print(f"stopped in epoch {result.epoch + 1}; rerun the same command to resume")
        return STOPPED
    print(f"best epoch {result.best_epoch} of {result.epoch}; model in {result.out}")
    for name, found in (("val", result.val), ("test", result.test)):
        if found:
            print(f"\n{name}, {found.n} images\n{found.table()}")
    return 0


def _predict(args: argparse.Namespace) -> int:
    from ..imaging import ImageError, expand_inputs

    paths = expand_inputs(args.images)
    model = _load(args)
    failed = False
    for path in paths:
        try:
            how = dict(frame=args.frame, window=args.window, tile=args.tile, overlap=args.overlap, score=args.score)
            found = model.predict(path, **how)
            if args.out:
                Path(args.out).mkdir(parents=True, exist_ok=True)
                found.overlay().save(Path(args.out) / f"{path.stem}_boxes.png")
        except (ImageError, OSError) as error:
            failed = True
            say(json_text({"source": str(path), "error": str(error)}) if args.json else f"{error}", sys.stderr)
            continue
        counts = ", ".join(f"{label} {count}" for label, count in found.counts.items())
        say(json_text(found.to_dict()) if args.json else f"{path}: {counts}")
    return int(failed)


def _evaluate(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from ..detection.dataset import open_detection
    from ..detection.evaluate import evaluate_detector
    from ..utils.files import write_text

    model = _load(args)
    data = open_detection(args.data, model.config.classes, patient_pattern=args.patient_pattern)
    if args.split != "all":
        data = data.split(args.split)
    found = evaluate_detector(
        model, data, progress=lambda rows: tqdm(rows, unit="img"), tile=args.tile, overlap=args.overlap
    )
    say(f"{data.name}, {args.split}: {found.n} images, 95 % intervals over {found.units}\n{found.table()}")
    if args.out:
        write_text(args.out, json.dumps(found.to_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    return 0


def _load(args: argparse.Namespace) -> Any:
    from ..detection import MedMambaDetector
    from ..utils.devices import pick_device

    return MedMambaDetector.from_pretrained(args.model).to(pick_device(args.device))
