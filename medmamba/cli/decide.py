"""The subcommand `medmamba decide`."""

import argparse
import sys
from pathlib import Path
from typing import Any

from .messages import say
from .predict import add_reading


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "decide",
        help="choose operating points, sets with a guarantee and abstention on validation images",
        description="Chooses thresholds on validation images, checks them on test images where there are any, and with "
        "--write stores them in the config.json of the model folder, from where `medmamba predict --decide NAME` takes "
        "them.",
    )
    parser.add_argument("model", metavar="MODEL", help="bundled name, org/name[@revision] or folder")
    parser.add_argument("--val", required=True, metavar="PATH", help="folder, .csv, .npz or .zip of labelled images")
    parser.add_argument("--split", default="val", help="split that chooses: val or all (default: %(default)s)")
    parser.add_argument("--test", metavar="PATH", help="images to check on (default: the split test of --val, if any)")
    parser.add_argument("--test-split", default="test", help="split to check on: test or all (default: %(default)s)")
    point = parser.add_argument_group("operating points")
    point.add_argument(
        "--classes",
        nargs="+",
        metavar="NAME",
        help="an image is positive if it shows any of these (default: the rarer of two classes; each class of several)",
    )
    rule = point.add_mutually_exclusive_group()
    rule.add_argument("--sensitivity", type=float, metavar="S", help="find at least this share of the positive images")
    rule.add_argument("--specificity", type=float, metavar="S", help="spare at least this share of the negative images")
    rule.add_argument("--youden", action="store_true", help="largest sum of sensitivity and specificity")
    rule.add_argument("--cost", type=float, metavar="R", help="lowest cost, where a miss costs R times a false alarm")
    rule.add_argument("--predicted-prevalence", action="store_true", help="call as many images positive as are")
    rule.add_argument("--f1", action="store_true", help="largest F1")
    point.add_argument(
        "--no-margin",
        action="store_true",
        help="reach the target on the validation images only, not on average on new ones",
    )
    point.add_argument("--name", default="", help="name of the operating point (default: made of classes and rule)")
    point.add_argument(
        "--prevalence",
        type=float,
        metavar="P",
        help="where it is to be used, for predictive values and --cost (default: that of the images)",
    )
    sets = parser.add_argument_group("sets with a guarantee")
    sets.add_argument("--coverage", type=float, metavar="C", help="sets that hold the true class with this probability")
    sets.add_argument("--score", default="lac", choices=("lac", "aps", "raps"), help="default: %(default)s")
    abstain = parser.add_argument_group("abstaining").add_mutually_exclusive_group()
    abstain.add_argument("--answer-share", type=float, metavar="C", help="answer this share of the images")
    abstain.add_argument("--risk", type=float, metavar="R", help="answer as long as at most this share is wrong")
    parser.add_argument("--write", action="store_true", help="store them in the model folder")
    parser.add_argument("--replace", action="store_true", help="with --write: drop what was stored before")
    parser.add_argument("--dataset", metavar="NAME", help="name in the registry, for classes and patients")
    parser.add_argument(
        "--patient-pattern", metavar="REGEX", help="regular expression whose group 1 in a file name is the patient"
    )
    add_reading(parser)
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps or auto (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="default: %(default)s")
    parser.add_argument("--quiet", action="store_true", help="show no progress bars")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from ..evaluation.decide import bound, check_decisions, describe, fit_decisions, write_decisions
    from ..evaluation.observed import observe
    from ..inference.fitted import in_force
    from ..model import MedMamba
    from ..utils.devices import pick_device

    folder = Path(args.model)
    if args.write and not folder.is_dir():
        raise ValueError(
            f"--write needs a model folder, and {args.model} is none: save the model to one first, with "
            "MedMamba.from_pretrained(...).save_pretrained(folder)"
        )
    model: Any = MedMamba.from_pretrained(args.model).to(pick_device(args.device))
    config = in_force(model).config
    rules = _rules(args, config)
    if not rules and args.coverage is None and args.answer_share is None and args.risk is None:
        raise ValueError(
            "nothing to decide: give a rule such as --sensitivity 0.9, --coverage 0.95 for sets, or --answer-share 0.9"
        )
    reading: dict[str, Any] = {
        "dataset": args.dataset,
        "patient_pattern": args.patient_pattern,
        "frame": args.frame,
        "window": args.window,
        "batch_size": args.batch_size,
        "progress": not args.quiet,
    }
    seen = observe(model, args.val, None if args.split == "all" else args.split, **reading)
    found = fit_decisions(
        seen,
        rules if args.classes or len(config.labels) > 2 or not rules else [_rarer(seen, rules[0][1])],
        coverage=args.coverage,
        score=args.score,
        answer_share=args.answer_share,
        risk=args.risk,
        prevalence=args.prevalence,
        name=args.name,
    )
    found = bound(found, config, keep=not args.replace)
    unseen = _test(args, model, reading)
    checked = None if unseen is None else check_decisions(found, unseen, prevalence=args.prevalence)
    say(describe(found, config.labels, checked))
    if args.write:
        write_decisions(folder, found, checked)
        say(f"stored in {folder / 'config.json'}: {', '.join(found.names)}", sys.stderr)
    return 0


def _rules(args: argparse.Namespace, config: Any) -> list[tuple[list[str], Any]]:
    """Returns classes and rule of each operating point."""
    from ..decision import Rule

    given = {
        "sensitivity": args.sensitivity,
        "specificity": args.specificity,
        "cost": args.cost,
        "youden": args.youden or None,
        "prevalence": args.predicted_prevalence or None,
        "f1": args.f1 or None,
    }
    kinds = [kind for kind, value in given.items() if value is not None]
    if not kinds:
        if args.classes or args.name:
            raise ValueError("--classes and --name need a rule, such as --sensitivity 0.9")
        return []
    value = given[kinds[0]]
    rule = Rule(kinds[0], None if value is True else value, not args.no_margin)
    return [(args.classes, rule)] if args.classes else [([label], rule) for label in config.labels]


def _rarer(seen: Any, rule: Any) -> tuple[list[str], Any]:
    counts = [(seen.labels == i).sum() if seen.labels.ndim == 1 else seen.labels[:, i].sum() for i in range(2)]
    return [seen.classes[0 if counts[0] <= counts[1] else 1]], rule


def _test(args: argparse.Namespace, model: Any, reading: dict[str, Any]) -> Any:
    """Returns what the model says of the images to check on; None where there are none."""
    from ..data import open_dataset
    from ..evaluation.observed import observe

    split = None if args.test_split == "all" else args.test_split
    if args.test:
        return observe(model, args.test, split, **reading)
    if args.split == "all":
        return None
    index = open_dataset(args.val, dataset=args.dataset, patient_pattern=args.patient_pattern, single_class=True)
    return observe(model, args.val, split, **reading) if index.split_sizes.get(split) else None
