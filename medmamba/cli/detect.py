"""The subcommand `medmamba detect`: train, predict and evaluate detectors."""

import argparse
from pathlib import Path
from typing import Any

from .dense import (
    RESUMES,
    add_evaluation,
    add_prediction,
    add_training,
    evaluate,
    predict_each,
    report,
    training_options,
)


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
        description="Trains on train, selects epoch and reported score on val, evaluates once on test. " + RESUMES,
    )
    parser.add_argument(
        "--data",
        required=True,
        metavar="PATH",
        help="Pascal VOC folder, COCO .json, or CSV with columns image, label, left, top, right, bottom",
    )
    parser.add_argument("--classes", nargs="+", metavar="NAME", help="names in order (default: those found)")
    parser.add_argument("--small-objects", action="store_true", help="for objects of few pixels; twice the work")
    add_training(parser, "detect")
    parser.set_defaults(act=_train)


def _add_predict(actions: Any) -> None:
    parser = actions.add_parser(
        "predict",
        help="detect in images",
        description="Detects in files, folders and globs; prints one line per image, and with --out writes pictures "
        "with the boxes. Files that cannot be read are reported and skipped, and the exit code is then 1.",
    )
    add_prediction(parser, "a detector", "pictures with the boxes")
    parser.add_argument("--score", type=float, metavar="P", help="from which a box is reported (default: the model's)")
    parser.set_defaults(act=_predict)


def _add_evaluate(actions: Any) -> None:
    parser = actions.add_parser("evaluate", help="compare with true boxes", description="COCO's mAP and mAP50.")
    add_evaluation(parser)
    parser.set_defaults(act=_evaluate)


def _train(args: argparse.Namespace) -> int:
    from ..training.detection_run import train_detector

    options = training_options(args)
    return report(train_detector(args.data, args.out, args.classes, small_objects=args.small_objects, **options))


def _predict(args: argparse.Namespace) -> int:
    model = _load(args)

    def predict(path: Path, name: Path) -> Any:
        how = dict(frame=args.frame, window=args.window, tile=args.tile, overlap=args.overlap, score=args.score)
        found = model.predict(path, **how)
        if args.out:
            name.parent.mkdir(parents=True, exist_ok=True)
            found.overlay().save(f"{name}_boxes.png")
        return found

    return predict_each(args, predict, lambda found: ", ".join(f"{label} {n}" for label, n in found.counts.items()))


def _evaluate(args: argparse.Namespace) -> int:
    from ..detection.dataset import open_detection
    from ..detection.evaluate import evaluate_detector

    return evaluate(args, _load(args), open_detection, evaluate_detector, tile=args.tile, overlap=args.overlap)


def _load(args: argparse.Namespace) -> Any:
    from ..detection import MedMambaDetector
    from ..utils.devices import pick_device

    return MedMambaDetector.from_pretrained(args.model).to(pick_device(args.device))
