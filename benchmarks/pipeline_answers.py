"""Whether the pipeline gives the answers of the plain way, and what its faster ways cost, on whole test sets.

    python benchmarks/pipeline_answers.py --data FOLDER_OF_SETS [--models bloodmnist ...] [--device cuda]

The plain way reads one image after another: `load_image`, float32 pixels, `torch.nn.functional.interpolate`, the model
layer by layer in float32 without TF32. Prints, for each shipped model over the test split of its own set
(FOLDER_OF_SETS/<set>/test), the accuracy of the plain way, and for the pipeline and each of its options the accuracy,
the number of images with another class, and the largest and the mean difference of a logit. "stored" is what `evaluate`
does: pixels rounded to the levels of the file.
"""

from __future__ import annotations

import argparse
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from hub.zoo_data import open_one
from medmamba import MedMamba
from medmamba.data.deferred import RecordImages
from medmamba.evaluation.classes import match_classes
from medmamba.imaging.ahead import Order
from medmamba.imaging.preprocess import adapt_channels, normalise, resize
from medmamba.inference.stream import Options, stream
from medmamba.utils.modes import eval_view
from medmamba.utils.precision import FullPrecision

SHIPPED = {
    "bloodmnist-nano": "bloodmnist",
    "bloodmnist": "bloodmnist",
    "breastmnist": "breastmnist",
    "pneumoniamnist": "pneumoniamnist",
    "dermamnist": "dermamnist",
    "pad-ufes-20": "pad_ufes_20",
    "cpn-xray": "cpn_xray",
}  # a model, and the set whose test split it is tried on
MODELS = Path(__file__).resolve().parents[1] / "hub" / "models"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--models", nargs="+", default=list(SHIPPED), choices=SHIPPED, metavar="MODEL")
    parser.add_argument("--folder", default=str(MODELS), help="of the models")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int)
    parser.add_argument("--enlarged", type=int, metavar="N", help="for JPEG at reduced size: files of N times the size")
    parser.add_argument("--most", type=int, help="images of each set")
    args = parser.parse_args()
    print("| model | images | way | accuracy | other class | largest logit difference | mean |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name in args.models:
        measure(name, args)


def measure(name: str, args: argparse.Namespace) -> None:
    """Prints the rows of one model."""
    model = MedMamba.from_pretrained(str(Path(args.folder) / name)).eval().to(args.device)
    found = open_one(args.data, SHIPPED[name]).split("test")
    if args.most:
        found = found.subset(range(min(args.most, len(found))))
    found = match_classes(found, model.config)
    labels = found.labels
    plain, rounded = plain_logits(model, found)
    show(name, "plain", plain, plain, labels)
    ways: dict[str, tuple[Order, Options, np.ndarray]] = {
        "pipeline": (_order(model), Options(workers=args.workers), plain),
        "pipeline, stored": (_order(model, stored=True), Options(workers=args.workers), rounded),
    }
    if args.device != "cpu":
        for precision in ("tf32", "bfloat16", "float16"):
            ways[f"pipeline, {precision}"] = _order(model), Options(workers=args.workers, precision=precision), plain
    for way, (how, options, reference) in ways.items():
        batches = stream(model, RecordImages(found), how, options)
        logits = np.concatenate([batch.answer.logits.numpy() for batch in batches if batch.answer is not None])
        show(name, way, logits, reference, labels)
    if args.enlarged:
        enlarged(name, model, found, labels, args)


def enlarged(name: str, model: MedMamba, found, labels: np.ndarray, args: argparse.Namespace) -> None:
    """Compares ways to decode JPEG files, made of the test set at a multiple of its size."""
    import tempfile

    from PIL import Image

    with tempfile.TemporaryDirectory() as folder:

        def write(row: int) -> str:
            image = found.image(row).to_pil()
            size = (image.width * args.enlarged, image.height * args.enlarged)
            path = f"{folder}/{row:06}.jpg"
            image.resize(size, Image.Resampling.BICUBIC).save(path, "JPEG", quality=90)
            return path

        with ThreadPoolExecutor() as pool:
            paths = list(pool.map(write, range(len(found))))
        ways = {"whole": Options(workers=args.workers), "reduced": Options(workers=args.workers, reduced=True)}
        if args.device != "cpu":
            ways["GPU"] = Options(workers=args.workers, gpu_decode=True)
        reference = None
        for way, options in ways.items():
            how = Order(model.config.preprocess, model.config.in_chans, reduced=options.reduced)
            batches = stream(model, paths, how, options)
            logits = np.concatenate([batch.answer.logits.numpy() for batch in batches if batch.answer is not None])
            reference = logits if reference is None else reference
            show(name, f"JPEG of {args.enlarged} times the size, {way}", logits, reference, labels)


def _order(model: MedMamba, stored: bool = False) -> Order:
    return Order(model.config.preprocess, model.config.in_chans, stored=stored)


@torch.inference_mode()
def plain_logits(model: MedMamba, found) -> tuple[np.ndarray, np.ndarray]:
    """Returns logits of float32 pixels, and of pixels rounded to 255 levels."""
    config, view = model.config, eval_view(model)
    device = model.patch_embed.proj.weight.device
    answers: tuple[list, list] = ([], [])
    for start in range(0, len(found), 32):
        pixels = []
        for row in range(start, min(start + 32, len(found))):
            image = torch.from_numpy(np.array(found.image(row).pixels)).permute(2, 0, 1)
            pixels.append(resize(adapt_channels(image, config.in_chans)[None], config.preprocess)[0])
        batch = torch.stack(pixels)
        for values, kept in ((batch, answers[0]), ((batch * 255).round() / 255, answers[1])):
            with FullPrecision():
                kept.append(view(normalise(values, config.preprocess).to(device)).float().cpu().numpy())
    return np.concatenate(answers[0]), np.concatenate(answers[1])


def show(name: str, way: str, logits: np.ndarray, reference: np.ndarray, labels: np.ndarray) -> None:
    classes, difference = logits.argmax(1), np.abs(logits - reference)
    cells = [name, len(labels), way, f"{(classes == labels).mean():.4f}", int((classes != reference.argmax(1)).sum())]
    cells += [f"{difference.max():.2g}", f"{difference.mean():.2g}"]
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


if __name__ == "__main__":
    main()
