"""The subcommand `medmamba explain`."""

import argparse
import ast
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..config import DEFAULT_MODEL
from ..utils.text import json_text, printable
from .messages import followable, say
from .predict import add_reading


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "explain",
        help="compute pixel attributions for a class",
        description="Writes an attribution map over the image, and optionally checks how faithful it is to the model.",
        epilog="example: medmamba explain cell.png --method gradcam --layer stage3.scan --trust --out cell.map.png",
    )
    parser.add_argument("image", nargs="?", metavar="IMAGE", help="file: PNG, JPEG, TIFF, DICOM, ...")
    parser.add_argument("--list", action="store_true", help="list methods, their options and layers, and exit")
    parser.add_argument(
        "--model", default=DEFAULT_MODEL, help="bundled name, org/name[@revision] or folder (default: %(default)s)"
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--method", default="integrated_gradients", help="see --list (default: %(default)s)")
    what.add_argument(
        "--compare",
        nargs="?",
        const="",
        metavar="A,B:LAYER,...",
        help="compare methods in one figure and table, such as occlusion,gradcam:stage3.scan (without a value: all)",
    )
    what.add_argument(
        "--scan",
        nargs="?",
        const="",
        metavar="ROW,COLUMN",
        help="show the effective receptive field of the scan at a pixel of the image (without a value: its centre)",
    )
    parser.add_argument(
        "--target", metavar="CLASS", help="class to explain, as label or index (default: the predicted class)"
    )
    parser.add_argument("--layer", help="for gradcam: stage1 to stage4, or a branch such as stage3.conv or stage3.scan")
    parser.add_argument(
        "--baseline", help="stands for absent evidence: mean, black, grey, blur, or a grey level from 0 to 1"
    )
    parser.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE", help="any other option of the method; repeatable"
    )
    parser.add_argument("--stage", type=int, metavar="N", help="for --scan: 1 to 4 (default: 1)")
    parser.add_argument(
        "--block", type=int, metavar="N", help="for --scan: block of the stage, from 1 (default: the last)"
    )
    parser.add_argument(
        "--trust",
        action="store_true",
        help="check the map: infidelity, sensitivity, deletion and insertion, random weights",
    )
    parser.add_argument(
        "--out",
        nargs="+",
        metavar="FILE",
        help="one or more .png, .npz or .json files (default: name of IMAGE + .explain.png)",
    )
    parser.add_argument("--seed", type=int, help="for methods that draw random numbers (default: 0)")
    parser.add_argument(
        "--batch-size", type=int, metavar="N", help="images per forward pass (default: 8, more on a GPU)"
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps or auto (default: %(default)s)")
    add_reading(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from ..explain import METRICS, assess, compare, explain, scan_field
    from ..explain.comparison import parse_method
    from ..imaging.load import load_image
    from ..model import MedMamba
    from ..utils.devices import pick_device

    outputs = _outputs(args)
    if args.list:
        say(_listing(args.model))
        return 0
    if args.image is None:
        raise ValueError("name an image to explain; --list shows the methods")
    _check_combination(args)
    image = load_image(args.image, frame=args.frame, window=args.window)
    model = MedMamba.from_pretrained(args.model).to(pick_device(args.device))
    settings = {"seed": args.seed or 0, "batch_size": args.batch_size}
    result: Any
    if args.scan is not None:
        result = scan_field(model, image, _pixel(args.scan), args.stage or 1, args.block)
        lines = [f"{name}: 90% of the influence within {n} tokens" for name, n in result.reach.items() if n is not None]
    elif args.compare is not None:
        names = [parse_method(name.strip()) for name in args.compare.split(",")] if args.compare else None
        metrics = METRICS if args.trust else ()
        with _progress() as progress:
            result = compare(model, image, names, args.target, metrics=metrics, progress=progress, **settings)
        lines = [_headline(result.explanations[0]), result.table(), *_notes(result.explanations)]
    else:
        name, options = parse_method(args.method)
        options |= _options(args)
        with _progress() as progress:
            result = explain(model, image, name, args.target, progress=progress, **settings, **options)
        lines = [_headline(result), *(f"{k}: {_short(v)}" for k, v in result.diagnostics.items()), *_notes([result])]
        if args.trust:
            with _progress() as progress:
                lines.append(assess(model, result, progress=progress, **settings).table())
    say("\n".join(followable(line, args.parser) for line in lines))
    for path in outputs:
        facts = {"facts": _facts(args, model)} if path.suffix == ".png" and args.scan is None else {}
        say(f"wrote {result.save(path, **facts)}")
    return 0


def _check_combination(args: argparse.Namespace) -> None:
    """Raises ValueError for options that would have no effect."""
    if args.trust and args.scan is not None:
        raise ValueError("--trust checks maps of a class; a scan field has none")
    mode = "--scan" if args.scan is not None else "--compare" if args.compare is not None else "--method"
    given = {
        "--layer": args.layer is not None,
        "--baseline": args.baseline is not None,
        "--option": bool(args.option),
        "--target": args.target is not None,
        "--batch-size": args.batch_size is not None,
        "--seed": args.seed is not None,
        "--stage": args.stage is not None,
        "--block": args.block is not None,
    }
    without = {
        "--scan": ("--layer", "--baseline", "--option", "--target", "--batch-size", "--seed"),
        "--compare": ("--layer", "--baseline", "--option", "--stage", "--block"),
        "--method": ("--stage", "--block"),
    }[mode]
    idle = [name for name in without if given[name]]
    if idle:
        advice = "; name a layer as in --compare gradcam:stage3.scan" if mode == "--compare" and args.layer else ""
        raise ValueError(f"{', '.join(idle)} would have no effect with {mode}{advice}: leave it out")


def _facts(args: argparse.Namespace, model: Any) -> dict[str, str]:
    """Returns the metadata of a picture: the model, its weights, the file and the date."""
    from ..pretrained import fetch
    from ..reporting import RecordedModel, record_facts
    from ..utils.checksums import file_hash

    image = Path(args.image)
    facts = record_facts(RecordedModel.of(args.model, fetch(args.model), model.config))
    return facts | {"file": printable(image.name), "file_sha256": file_hash(image)}


def _outputs(args: argparse.Namespace) -> list[Path]:
    """Returns the paths of --out, checked before anything is computed."""
    paths = [Path(p) for p in args.out or [Path(args.image or "image").stem + ".explain.png"]]
    for path in paths:
        if path.suffix not in (".png", ".npz", ".json"):
            raise ValueError(f"--out {path}: use a name that ends in .png, .npz or .json")
        if not path.absolute().parent.is_dir():
            raise ValueError(f"--out {path}: there is no folder {path.parent}")
        if args.image and path.absolute() == Path(args.image).absolute():
            raise ValueError(f"--out {path} would overwrite the image")
    return paths


def _options(args: argparse.Namespace) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for text in args.option:
        name, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"--option {text}: expected NAME=VALUE, such as n_steps=100")
        options[name] = _value(value)
    if args.layer is not None:
        options["layer"] = args.layer
    if args.baseline is not None:
        options["baseline"] = _value(args.baseline)
    return options


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _pixel(text: str) -> tuple[int, int] | None:
    if not text:
        return None
    try:
        row, column = (int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"--scan {text}: expected ROW,COLUMN, such as --scan 120,96") from None
    return row, column


def _headline(explanation: Any) -> str:
    e = explanation
    what = f"{printable(e.image.source)}: {e.title} for {printable(e.label)}"
    return f"{what}, logit {e.logit:.3f}, probability {e.probability:.1%}"


def _notes(explanations: Any) -> list[str]:
    return list(dict.fromkeys(f"note: {note}" for e in explanations for note in e.notes))


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _listing(model_name: str) -> str:
    from ..explain import BASELINES, layers, methods
    from ..model import MedMamba
    from ..pretrained import PretrainedError

    lines = ["methods:"]
    for method in methods().values():
        lines.append(f"  {method.name}: {method.summary}")
        if method.options:
            lines.append("      " + ", ".join(f"{k}={json_text(v)}" for k, v in method.options.items()))
    lines += ["baselines:", *(f"  {name}: {meaning}" for name, meaning in BASELINES.items())]
    try:
        names = layers(MedMamba.from_pretrained(model_name, local_files_only=True))
        lines += [f"layers of {model_name}:", "  " + ", ".join(n for n in names if "block" not in n)]
    except PretrainedError:
        pass
    return "\n".join(lines)


@contextmanager
def _progress() -> Iterator[Callable[[float], None]]:
    """Shows a progress bar on a terminal."""
    from tqdm import tqdm

    bar_format = "{l_bar}{bar}| {elapsed}<{remaining}"
    with tqdm(total=100, disable=None, file=sys.stderr, leave=False, bar_format=bar_format) as bar:

        def show(fraction: float) -> None:
            bar.update(round(100 * fraction) - bar.n)

        yield show
