"""The subcommand `medmamba segment`: train, predict and evaluate segmentation models."""

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

_WRITTEN = {"png": ".png", "nifti": ".nii.gz", "dicom": ".dcm"}
_OVERLAY = "_overlay"


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "segment",
        help="train, predict and evaluate segmentation models",
        description="Segmentation with a MedMamba encoder and a decoder of segmentation_models_pytorch.",
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    _add_train(actions)
    _add_predict(actions)
    _add_evaluate(actions)
    parser.set_defaults(run=lambda args: args.act(args))


def _add_train(actions: Any) -> None:
    parser = actions.add_parser(
        "train",
        help="train on images with masks",
        description="Trains on train, selects epoch and thresholds on val, evaluates once on test. " + RESUMES,
    )
    parser.add_argument(
        "--data",
        required=True,
        metavar="PATH",
        help="folder with images/ and masks/ (or train, val, test that have them), CSV, COCO .json, or Pascal VOC",
    )
    parser.add_argument(
        "--classes", nargs="+", default=["object"], metavar="NAME", help="names of the mask values 1, 2, ..."
    )
    parser.add_argument("--decoder", default="unet", metavar="NAME", help="unet, fpn, segformer, ... (default: unet)")
    parser.add_argument(
        "--loss",
        default="dice+ce",
        choices=("dice+ce", "dice+focal", "image-dice+ce"),
        help="dice+focal: for rare foreground; image-dice+ce: small objects count as large ones (default: %(default)s)",
    )
    add_training(parser, "segment")
    parser.add_argument(
        "--teacher",
        metavar="MODEL",
        help="distil from this segmentation model for the same classes, with --set distill=0.5",
    )
    parser.set_defaults(act=_train)


def _add_predict(actions: Any) -> None:
    parser = actions.add_parser(
        "predict",
        help="segment images",
        description="Segments files, folders and globs; writes masks and overlays to --out and prints one line per "
        "image. Files that cannot be read are reported and skipped, and the exit code is then 1.",
    )
    add_prediction(parser, "a segmentation model", "masks and overlays")
    parser.add_argument("--format", default="png", choices=tuple(_WRITTEN), help="of the masks (default: png)")
    parser.add_argument("--threshold", type=float, metavar="P", help="probability from which a pixel counts")
    _add_flips(parser)
    parser.set_defaults(act=_predict)


def _add_evaluate(actions: Any) -> None:
    parser = actions.add_parser("evaluate", help="compare with true masks", description="Dice, IoU, HD95 and lesions.")
    add_evaluation(parser)
    _add_flips(parser)
    parser.set_defaults(act=_evaluate)


def _add_flips(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--flips", action="store_true", help="average over reflections, in four times the time")


def _train(args: argparse.Namespace) -> int:
    from ..training.segmentation_run import train_segmenter

    options = training_options(args) | {"decoder": args.decoder, "loss": args.loss, "teacher": args.teacher}
    return report(train_segmenter(args.data, args.out, args.classes, **options))


def _predict(args: argparse.Namespace) -> int:
    model = _load(args)
    if args.format == "dicom" and not args.out:
        raise ValueError("--format dicom needs --out")

    def predict(path: Path, name: Path) -> Any:
        found = model.predict(path, frame=args.frame, window=args.window, **_how(args))
        if args.threshold is not None:
            found = found.with_thresholds(args.threshold)
        if args.out:
            name.parent.mkdir(parents=True, exist_ok=True)
            found.save(f"{name}{_WRITTEN[args.format]}", source=path)
            found.overlay().save(f"{name}{_OVERLAY}.png")
        return found

    return predict_each(args, predict, _summary, _OVERLAY)


def _summary(found: Any) -> str:
    parts = []
    for entry in found.to_dict()["classes"]:
        area = f"{entry['area']} px" if entry["area_mm2"] is None else f"{entry['area_mm2']:.1f} mm²"
        parts.append(f"{entry['label']} {area} ({entry['share']:.1%}, {entry['regions']} regions)")
    return ", ".join(parts)


def _evaluate(args: argparse.Namespace) -> int:
    from ..segmentation.evaluate import evaluate_segmenter
    from ..segmentation.open import open_segmentation

    return evaluate(args, _load(args), open_segmentation, evaluate_segmenter, **_how(args))


def _load(args: argparse.Namespace) -> Any:
    from ..segmentation import MedMambaSegmenter
    from ..utils.devices import pick_device

    return MedMambaSegmenter.from_pretrained(args.model).fuse().to(pick_device(args.device))


def _how(args: argparse.Namespace) -> dict[str, Any]:
    return {"tile": args.tile, "overlap": args.overlap, "flips": args.flips}
