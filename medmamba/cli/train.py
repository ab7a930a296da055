"""The subcommand `medmamba train`."""

import argparse
from collections.abc import Sequence
from typing import Any

from ..config import BACKBONES, ORGANISATION, TASKS
from .training_options import STOPPED, split_option

DENSE = ("segment", "detect")
"""Tasks beside those of classifiers."""
CLASSIFIERS_ONLY = ("dataset", "allow_leakage", "cache", "keep", "workers", "graphs")


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "train",
        help="train or fine-tune a model",
        description="Trains on the train split, selects the best epoch on val, evaluates once on test, and writes a "
        "model folder. Rerun the same command to resume an interrupted run; the exit code is "
        f"{STOPPED} if --max-seconds or SIGTERM stopped it. On several GPUs: "
        "accelerate launch -m medmamba train ...",
    )
    parser.add_argument(
        "--data", required=True, metavar="PATH", help="folder, .csv, .npz, .zip or .tar of images, or hf://owner/name"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the model, results and checkpoints")
    parser.add_argument(
        "--recipe", metavar="NAME", help="name or .json file (default: default, with --task segment or detect that)"
    )
    parser.add_argument(
        "--variant",
        metavar="NAME",
        help="nano, tiny, small, base, ... (default: tiny; for segment and detect nano)",
    )
    parser.add_argument(
        "--from",
        dest="init",
        metavar="MODEL",
        nargs="?",
        const="",
        help="start from this model: bundled name, org/name or folder; without a name, the general backbone of the "
        f"--variant ({', '.join(BACKBONES)})",
    )
    parser.add_argument(
        "--teacher",
        metavar="MODEL",
        help="distil from this model for the same classes, with --set distill=0.7; not for detect",
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: %(default)s)")

    data = parser.add_argument_group("data")
    data.add_argument("--dataset", metavar="NAME", help="name in the registry, for classes, patients and licence")
    data.add_argument("--split", metavar="A,B,C", help="fractions for new splits, or 'published' with --dataset")
    data.add_argument(
        "--patient-pattern", metavar="REGEX", help="regular expression whose group 1 in a file name is the patient"
    )
    data.add_argument(
        "--patients",
        metavar="RULE",
        help="folder: the folder below the class folder is the patient; FILE.csv:COLUMN: a column of a CSV file tells",
    )
    data.add_argument(
        "--classes", nargs="+", metavar="NAME", help="all class names in the order of the labels (default: sorted)"
    )
    data.add_argument(
        "--task",
        choices=(*TASKS, *DENSE),
        help="ordinal: the classes are grades in ascending order; segment, detect: as `medmamba segment train` and "
        "`medmamba detect train` (default: from the data)",
    )
    data.add_argument(
        "--allow-leakage",
        nargs="+",
        default=(),
        choices=("patients", "duplicates", "conflicts"),
        help="continue although patients or images are in several splits, or an image has conflicting labels",
    )
    data.add_argument("--in-chans", type=int, metavar="N", help="input channels (default: those of --from, or 3)")
    data.add_argument("--cache", metavar="DIR", help="cache decoded images in this folder, for faster starts")
    data.add_argument(
        "--keep",
        default="auto",
        choices=("auto", "memory", "disk", "nowhere"),
        help="where decoded images stay: in memory, on disk in --cache, or nowhere (decoded in every epoch); "
        "auto: the first that has the space (default: %(default)s)",
    )
    data.add_argument(
        "--workers", type=int, metavar="N", help="processes that decode images kept nowhere (default: one per core)"
    )

    dense = parser.add_argument_group("with --task segment or detect")
    dense.add_argument("--decoder", metavar="NAME", help="segment: unet, fpn, segformer, ... (default: unet)")
    dense.add_argument("--loss", choices=("dice+ce", "dice+focal", "image-dice+ce"), help="segment (default: dice+ce)")
    dense.add_argument("--small-objects", action="store_true", help="detect: for objects of few pixels")

    recipe = parser.add_argument_group("recipe settings")
    recipe.add_argument("--epochs", type=int, metavar="N", help="number of epochs")
    recipe.add_argument("--batch-size", type=int, metavar="N", help="images per step, summed over processes")
    recipe.add_argument("--size", type=int, metavar="N", help="size of the training images, in pixels")
    recipe.add_argument("--lr", type=float, metavar="RATE", help="learning rate")
    recipe.add_argument(
        "--freeze", type=int, metavar="N", help="freeze the first N stages; 4 trains only the classifier"
    )
    recipe.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="any other setting, such as augment.hflip=0",
    )

    machine = parser.add_argument_group("machine")
    machine.add_argument(
        "--device", default="auto", choices=("auto", "cpu", "cuda", "mps"), help="default: %(default)s"
    )
    machine.add_argument(
        "--precision", default="auto", choices=("auto", "fp32", "bf16", "fp16"), help="default: %(default)s"
    )
    machine.add_argument(
        "--accumulate", type=int, default=1, metavar="N", help="process a batch in N parts, to save memory"
    )
    machine.add_argument(
        "--graphs", default="auto", choices=("auto", "off"), help="use CUDA graphs (default: %(default)s)"
    )
    machine.add_argument("--max-seconds", type=float, metavar="S", help="stop after about S seconds; rerun to resume")
    machine.add_argument(
        "--finish-early", action="store_true", help="on --max-seconds, write the model of the best epoch so far"
    )
    machine.add_argument(
        "--checkpoint-seconds", type=float, default=60.0, metavar="S", help="interval (default: %(default)s)"
    )
    machine.add_argument("--restart", action="store_true", help="discard the run in --out and start again")
    machine.add_argument("--fp32-weights", action="store_true", help="save weights in float32 instead of float16")
    machine.add_argument("--tensorboard", action="store_true", help="write event files to OUT/tensorboard")
    machine.add_argument("--quiet", action="store_true", help="show no progress bars")
    parser.set_defaults(run=run, default_of=parser.get_default)


def run(args: argparse.Namespace) -> int:
    if args.task in DENSE:
        return _run_dense(args)
    refuse_options(args, ("decoder", "loss", "small_objects"), "--task segment or detect")
    from ..training import train
    from ..training.recipe import parse_setting

    settings = dict(parse_setting(text) for text in args.set)
    for name in ("epochs", "batch_size", "size", "lr", "freeze"):
        if getattr(args, name) is not None:
            settings[name] = getattr(args, name)
    variant = args.variant or "tiny"
    result = train(
        args.data,
        args.out,
        args.recipe or "default",
        variant,
        _start(args.init, variant),
        seed=args.seed,
        dataset=args.dataset,
        split=split_option(args.split),
        patient_pattern=args.patient_pattern,
        patients=args.patients,
        classes=args.classes,
        task=args.task,
        allow_leakage=args.allow_leakage,
        in_chans=args.in_chans,
        device=args.device,
        precision=args.precision,
        accumulate=args.accumulate,
        half=not args.fp32_weights,
        max_seconds=args.max_seconds,
        finish_early=args.finish_early,
        checkpoint_seconds=args.checkpoint_seconds,
        cache=args.cache,
        keep=args.keep,
        workers=args.workers,
        graphs=args.graphs,
        restart=args.restart,
        teacher=args.teacher,
        progress=not args.quiet,
        tensorboard=args.tensorboard,
        **settings,
    )
    if not result.finished:
        print(f"stopped in epoch {result.epoch + 1}; rerun the same command to resume")
        return STOPPED
    print(f"best epoch {result.best_epoch} of {result.epoch}; model in {result.out}")
    for split, found in (("val", result.val), ("test", result.test)):
        if found:
            shown = ("accuracy", "balanced_accuracy", "auroc", "quadratic_kappa")
            scores = ", ".join(f"{name} {found.overall[name]}" for name in shown if name in found.overall)
            print(f"{split}: {scores}")
    return 0


def _run_dense(args: argparse.Namespace) -> int:
    """Trains a segmenter or detector: what `medmamba segment train` and `medmamba detect train` do."""
    from .dense import report, training_options

    refuse_options(args, CLASSIFIERS_ONLY, "classifiers")
    args.variant = args.variant or "nano"
    args.init = _start(args.init, args.variant)
    args.recipe = args.recipe or args.task
    options = training_options(args, ("lr", "freeze")) | {
        "in_chans": args.in_chans,
        "accumulate": args.accumulate,
        "half": not args.fp32_weights,
        "checkpoint_seconds": args.checkpoint_seconds,
        "tensorboard": args.tensorboard,
    }
    if args.task == "segment":
        from ..training.segmentation_run import train_segmenter

        refuse_options(args, ("small_objects",), "--task detect")
        chosen: dict[str, Any] = {"decoder": args.decoder or "unet", "loss": args.loss or "dice+ce"}
        chosen["teacher"] = args.teacher
        return report(train_segmenter(args.data, args.out, args.classes or ["object"], **chosen, **options))
    from ..training.detection_run import train_detector

    refuse_options(args, ("decoder", "loss", "teacher"), "--task segment")
    return report(train_detector(args.data, args.out, args.classes, small_objects=args.small_objects, **options))


def refuse_options(args: argparse.Namespace, names: Sequence[str], whom: str) -> None:
    """Raises ValueError if an option was given that is for other kinds of training."""
    if given := [name for name in names if getattr(args, name) != args.default_of(name)]:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ValueError(f"{options}: only for {whom}; leave it out")


def _start(init: str | None, variant: str) -> str | None:
    """Returns the model to start from: for `--from` without a name the general backbone of the variant."""
    if init != "":
        return init
    name = f"{ORGANISATION}/{variant}-medical"
    if name not in BACKBONES:
        raise ValueError(f"--from without a name takes {' or '.join(BACKBONES)}: there is none for --variant {variant}")
    return name
