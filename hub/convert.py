"""python -m hub.convert FILE.pth --dataset kvasir --out DIR: converts a published checkpoint to a model folder.

Names the classes, puts the outputs into official order, sets the published preprocessing, and verifies the logits
against an independent implementation on the original tensors. The model card credits the authors of the weights.
"""

import argparse
import hashlib
import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from medmamba import ConversionError, MedMamba, load_upstream
from medmamba.cards import default_repo, write_card
from medmamba.cards.licences import UPSTREAM_URL
from medmamba.data import DatasetError, alphabetical_permutation, open_dataset, registry
from medmamba.data.registry import DatasetEntry
from medmamba.integrations.upstream import read_checkpoint, unwrap

from .golden import write_golden
from .reference import largest_difference, reference_logits

CHECK_SIZE, CHECK_IMAGES = 64, 2  # small, because the reference is slow
TOLERANCE = 2e-4  # relative to the largest logit, at least 2e-4
MOST_IMAGES = 500  # for testing a class order
CLEARLY = 0.1  # accuracy margin by which another class order must win to be suggested


@dataclass(frozen=True)
class Conversion:
    """A converted model folder.

    Attributes:
        folder: config.json, model.safetensors, README.md and golden.json.
        model: in eval mode.
        order: class index of each checkpoint output, or None if the order was official already.
        difference: largest difference between its logits and those of the reference.
        largest: largest logit of the reference.
    """

    folder: Path
    model: MedMamba
    order: tuple[int, ...] | None
    difference: float
    largest: float


def convert(
    file: str | Path,
    out: str | Path,
    *,
    dataset: str | None = None,
    class_indices: str | Path | None = None,
    order: str | Sequence[int] | None = None,
    images: str | Path | None = None,
    url: str = UPSTREAM_URL,
    half: bool = False,
    repo: str | None = None,
) -> Conversion:
    """Converts a checkpoint of the published code.

    Args:
        file: a `.pth` with a state dict, bare or wrapped, of any variant; loaded without executing code.
        out: output folder; must not hold a model yet.
        dataset: registry name, which gives class names and order, source and published results.
        class_indices: JSON written by the published trainer, {"0": "polyps", ...} or the inverse.
        order: class index of each checkpoint output: "numbers" (output k is class k), "folders" (classes were folders
            "0", "1", "10", "2", ..., sorted as text), or the indices themselves. Required for more than ten numbered
            classes without class_indices.
        images: labelled images for testing the class order.
        url: where the checkpoint was published.
        half: store float16, at half the size.
        repo: "org/name" for the card.

    Raises:
        ConversionError: the checkpoint, the classes or their order do not match; the message names the mismatch.
    """
    file, out = Path(file), Path(out)
    if (out / "config.json").exists():
        raise ConversionError(f"{out} already holds a model; choose another folder")
    state = unwrap(read_checkpoint(file))
    model = load_upstream(state)
    difference, largest = check_logits(model, state)
    entry = _entry(dataset, model.config.num_classes)
    names = read_class_indices(class_indices, model.config.num_classes) if class_indices else None
    labels, moved = name_classes(model.config.num_classes, entry, names, order)
    if moved is not None:
        permute_head(model, moved)
    model.config = model.config.replace(
        id2label=dict(enumerate(labels)),
        training={
            "dataset": entry.name if entry else dataset or file.stem,
            "source": entry.source.url if entry else None,
            "licence": None,
            "origin": {
                "file": file.name,
                "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
                "url": url,
                "class_order": None if moved is None else list(moved),
                "check": {
                    "largest_difference": difference,
                    "largest_logit": largest,
                    "images": CHECK_IMAGES,
                    "size": CHECK_SIZE,
                },
            },
        },
    )
    if images is not None:
        _try_order(model, images, entry)
    _write(model, out, half, repo)
    return Conversion(out, model, moved, difference, largest)


def check_logits(model: MedMamba, state: dict[str, torch.Tensor]) -> tuple[float, float]:
    """Compares logits with the reference on random images; returns the largest difference and the largest logit.

    Raises:
        ConversionError: the difference exceeds rounding error.
    """
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(CHECK_IMAGES, model.config.in_chans, CHECK_SIZE, CHECK_SIZE, generator=generator) * 2 - 1
    expected = reference_logits(state, images)
    with torch.inference_mode():
        difference = largest_difference(model(images), expected)
    largest = expected.abs().max().item()
    if not difference <= TOLERANCE * max(1.0, largest):
        raise ConversionError(
            f"the converted model does not reproduce the checkpoint: logits differ by {difference:.2g}, the largest "
            f"is {largest:.2g}. The checkpoint may belong to a modified network"
        )
    return difference, largest


def read_class_indices(file: str | Path, num_classes: int) -> list[str]:
    """Reads the class name of each output from class_indices.json.

    Raises:
        ConversionError: not such a file, or a different number of classes.
    """
    try:
        data = json.loads(Path(file).read_text(encoding="utf-8"))
        if all(isinstance(value, int) for value in data.values()):  # ImageFolder's class_to_idx
            data = {index: name for name, index in data.items()}
        names = {int(index): str(name) for index, name in data.items()}
    except (OSError, ValueError, AttributeError) as error:
        raise ConversionError(f'{file} is not a class_indices.json such as {{"0": "polyps", ...}}: {error}') from error
    if sorted(names) != list(range(num_classes)):
        raise ConversionError(f"{file} names outputs {sorted(names)}, but the checkpoint has {num_classes} outputs")
    return [names[index] for index in range(num_classes)]


def name_classes(
    num_classes: int,
    entry: DatasetEntry | None,
    names: list[str] | None = None,
    order: str | Sequence[int] | None = None,
) -> tuple[list[str], tuple[int, ...] | None]:
    """Returns the labels in official order, and the class index of each checkpoint output (None if identical).

    Raises:
        ConversionError: names that are not classes of the dataset, or an ambiguous order.
    """
    if names is not None and order is not None:
        raise ConversionError("class_indices.json already gives the order; omit --order")
    if names is not None and all(name.isdecimal() for name in names):
        order, names = [int(name) for name in names], None  # class folders were named by index
    if entry is None and names is not None:
        return names, None
    if names is not None and entry is not None:
        found = [entry.class_index(name) for name in names]
        if None in found or len(set(found)) != len(found):
            wrong = [name for name, index in zip(names, found, strict=True) if index is None or found.count(index) > 1]
            raise ConversionError(
                f"class_indices.json has {', '.join(wrong)}, but the classes of {entry.title} are: "
                f"{', '.join(entry.classes)}"
            )
        behind = tuple(index for index in found if index is not None)
    else:
        behind = _order(num_classes, entry, order)
    labels = list(entry.id2label.values()) if entry else [f"class_{index}" for index in range(num_classes)]
    return labels, None if behind == tuple(range(num_classes)) else behind


def _order(num_classes: int, entry: DatasetEntry | None, order: str | Sequence[int] | None) -> tuple[int, ...]:
    if order is None:
        numbered = entry is not None and entry.class_order == "official"  # classes identified by index
        if numbered and num_classes > 10:
            raise ConversionError(
                f"the order of the {num_classes} outputs is ambiguous: exported to folders '0' to "
                f"'{num_classes - 1}', they were sorted as 0, 1, 10, 2, ... Pass --order folders if it was trained "
                "that way, --order numbers if not, or --class-indices; --images DIR tests it on labelled images"
            )
        order = "numbers"
    if order == "numbers":
        return tuple(range(num_classes))
    if order == "folders":
        return alphabetical_permutation(num_classes)
    behind = tuple(order) if not isinstance(order, str) else ()
    if sorted(behind) != list(range(num_classes)):
        raise ConversionError(
            f"--order must be numbers, folders, or each of 0 to {num_classes - 1} once, the class of each output; "
            f"got {order if isinstance(order, str) else list(order)}"
        )
    return behind


@torch.no_grad()
def permute_head(model: MedMamba, behind: Sequence[int]) -> None:
    """Moves output k of the head to behind[k]."""
    head = model.head
    assert isinstance(head, torch.nn.Linear)
    rows = torch.argsort(torch.tensor(behind))
    head.weight.copy_(head.weight[rows].clone())
    head.bias.copy_(head.bias[rows].clone())


def _entry(dataset: str | None, num_classes: int) -> DatasetEntry | None:
    if dataset is None:
        return None
    try:
        entry = registry.get(dataset)
    except registry.RegistryError as error:
        raise ConversionError(f"{error}. For another dataset, omit --dataset and pass --class-indices") from error
    if entry.num_classes != num_classes:
        raise ConversionError(
            f"the checkpoint has {num_classes} classes, but {entry.title} has {entry.num_classes}: it was trained on "
            "another dataset"
        )
    return entry


def _try_order(model: MedMamba, images: str | Path, entry: DatasetEntry | None) -> None:
    """Rejects a class order that is clearly worse than the alternative on labelled images."""
    try:
        data = open_dataset(images, dataset=entry)
    except DatasetError as error:
        raise ConversionError(f"--images: {error}") from error
    some = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:MOST_IMAGES].tolist()
    labels = torch.from_numpy(data.labels)[some]
    found = torch.tensor([model.predict(data.image(i)).logits for i in some]).argmax(1)
    accuracy = (found == labels).double().mean().item()
    count = model.config.num_classes
    folders = torch.tensor(alphabetical_permutation(count))
    others = {"folders": folders[found], "numbers": torch.argsort(folders)[found]}
    best = max(others, key=lambda name: (others[name] == labels).double().mean().item())
    better = (others[best] == labels).double().mean().item()
    if better > accuracy + CLEARLY:
        raise ConversionError(
            f"on {len(labels)} images, accuracy is {accuracy:.0%} in this class order and {better:.0%} in the other: "
            f"try --order {best}"
        )
    if accuracy <= 1 / count:
        raise ConversionError(
            f"on {len(labels)} images, accuracy is only {accuracy:.0%}, no better than chance with {count} classes: "
            "these images are not of the training dataset, or the classes are in yet another order"
        )


def _write(model: MedMamba, out: Path, half: bool, repo: str | None) -> None:
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".converting-") as staging:
        folder = Path(staging)
        model.save_pretrained(folder, dtype=torch.float16 if half else None)
        stored = MedMamba.from_pretrained(folder)
        write_golden(stored, folder)
        write_card(folder, repo or default_repo(out))
        for file in folder.iterdir():
            shutil.move(str(file), out / file.name)


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m hub.convert", description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="checkpoint of the published code (.pth)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the model")
    parser.add_argument("--dataset", metavar="NAME", help=f"training dataset: {', '.join(registry.names())}")
    parser.add_argument("--class-indices", type=Path, metavar="JSON", help="class_indices.json of the training run")
    parser.add_argument("--order", type=_parse_order, help="numbers, folders, or a list such as 0,1,10,2,...")
    parser.add_argument("--images", type=Path, metavar="DIR", help="labelled images for testing the class order")
    parser.add_argument("--url", default=UPSTREAM_URL, help="where the checkpoint was published (%(default)s)")
    parser.add_argument("--repo", metavar="ORG/NAME", help="repository named in the card; default: medmamba/DIR")
    parser.add_argument("--half", action="store_true", help="store float16")
    args = parser.parse_args(argv)
    options: dict[str, Any] = {key: value for key, value in vars(args).items() if key not in ("file", "out")}
    try:
        done = convert(args.file, args.out, **options)
    except (ConversionError, OSError) as error:
        print(f"hub.convert: {error}", file=sys.stderr)
        return 1
    c = done.model.config
    print(f"{done.folder}: MedMamba-{c.architecture}, {c.num_classes} classes: {', '.join(c.labels)}")
    print(f"largest logit difference from the checkpoint: {done.difference:.1e} (largest logit: {done.largest:.2g})")
    if done.order is not None:
        print(f"outputs were reordered to the official class order; output k was class {list(done.order)}")
    print(f"the weights belong to their authors, who stated no licence ({args.url}): ask before you redistribute them")
    return 0


def _parse_order(text: str) -> str | list[int]:
    if text in ("numbers", "folders"):
        return text
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError("numbers, folders, or a list such as 0,1,10,2,...") from None


if __name__ == "__main__":
    sys.exit(main())
