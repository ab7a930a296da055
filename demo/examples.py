"""The bundled example images, grouped by whether they match the training data of a model."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from medmamba.data import ImageDataset
from medmamba.data.registry import RegistryError, get

from .html import NOTHING, Markup, bullets, data_uri, join, tag
from .options import EXAMPLES

CC_BY = "CC BY 4.0"
KINDS = {
    "blood": (("bloodmnist",), "blood cell", "Acevedo et al. 2020, doi:10.17632/snkd93bnjr.1", CC_BY),
    "breast": (("breastmnist",), "breast ultrasound", "Al-Dhabyani et al. 2020, doi:10.1016/j.dib.2019.104863", CC_BY),
    "chest": (("pneumoniamnist", "cpn-xray"), "chest X-ray", "Kermany et al. 2018, doi:10.17632/rscbjbr9sj.2", CC_BY),
    "skin": (
        ("pad-ufes-20",), "photograph of skin", "PAD-UFES-20, Pacheco et al. 2020, doi:10.17632/zr7vgbcyr2.1", CC_BY,
    ),
    "smear": (("bccd",), "blood smear", "BCCD, github.com/Shenggan/BCCD_Dataset, © 2017 shenggan", "MIT"),
}  # fmt: skip
"""First word of a file name to (datasets whose test splits hold the images, kind of image, source, licence)."""
BOXED = ("smear",)
"""Those of datasets of boxes, which no classifier knows."""
LACKING = {"cpn-xray": "COVID is not among them: those images come without a licence to share them."}
"""Dataset to the classes without an example, and why."""
SUFFIXES = (".webp", ".jpg", ".jpeg", ".png")
HELD_OUT = 8
"""Number of test images shown after fine-tuning."""
FOREIGN = 1
"""Number of examples per other kind of image, which demonstrate out-of-distribution detection."""


@dataclass(frozen=True)
class Example:
    """An example image; `what` is its true class, `kind` the kind of image.

    `datasets` are those whose test splits hold it, by their names in the registry; none for an image of a visitor.
    """

    path: Path
    what: str
    kind: str
    datasets: tuple[str, ...]
    thumbnail: str


def load_examples(boxed: bool = False) -> list[Example]:
    """Loads the examples, sorted by name.

    Args:
        boxed: those of datasets of boxes too, after the others.
    """
    found = []
    paths = sorted(p for p in EXAMPLES.iterdir() if p.suffix in SUFFIXES)
    for path in sorted(paths, key=lambda p: p.stem.partition("_")[0] in BOXED):
        first, _, what = path.stem.partition("_")
        if first in BOXED and not boxed:
            continue
        datasets, kind, _, _ = KINDS[first]
        with Image.open(path) as picture:
            small = picture.convert("RGB")
        small.thumbnail((120, 120))
        what = what.rstrip("0123456789").strip("_").replace("_", " ")
        found.append(Example(path, what, kind, datasets, data_uri(np.asarray(small), exact=False)))
    return found


def outlined_html(examples: list[Example], dataset: str | None) -> Markup:
    """Renders the examples of the training dataset of a segmentation model or detector; nothing where there are none.

    Args:
        dataset: the training dataset, as the model names it.
    """
    own = [(i, e) for i, e in enumerate(examples) if {dataset, registered(dataset)} & set(e.datasets)]
    if not own:
        return NOTHING
    shown = _group("Or try an example", own, "Test images, which the model was not trained on.")
    return tag('<div class="mm-examples">{}{}</div>', shown, _sources({e.kind for _, e in own}))


def registered(dataset: str | None) -> str | None:
    """Returns the name of a dataset in the registry, however it is spelt; None if it is not there."""
    try:
        return get(dataset).name if dataset else None
    except RegistryError:
        return None


def held_out(index: ImageDataset, folder: Path) -> list[Example]:
    """Writes some 8-bit test images of a visitor's dataset, of each class in turn; [] if there are none."""
    if not index.split_sizes.get("test"):
        return []
    test = index.split("test")
    by_class = [[r for r in test.records if r.label == k] for k in range(len(test.classes))]
    turns = [records[i] for i in range(HELD_OUT) for records in by_class if i < len(records)]
    found: list[Example] = []
    for record in turns[:HELD_OUT]:
        try:
            image = test.reader.read(record)
        except (ValueError, OSError):
            continue
        if image.bit_depth > 8 or not isinstance(record.label, int):
            continue
        path = folder / f"{len(found)}_{Path(str(record.source)).stem[:60]}.png"
        picture = image.to_pil()
        picture.save(path)
        small = picture.convert("RGB")
        small.thumbnail((120, 120))
        what = test.classes[record.label]
        found.append(Example(path, what, "your test image", (), data_uri(np.asarray(small), exact=False)))
    return found


def examples_html(examples: list[Example], dataset: str | None, yours: Sequence[Example] = ()) -> Markup:
    """Renders thumbnails as buttons: examples of the model's own kind first, then others.

    Args:
        dataset: training dataset of the model.
        yours: test images of a model that the visitor trained, numbered after `examples`.
    """
    if yours:
        lead = "Test images of your dataset, not used for training or selection, labelled with their true class."
        own_images = list(enumerate(yours, len(examples)))
        return tag('<div class="mm-examples">{}</div>', _group("Or try a held-out image", own_images, lead))
    numbered = list(enumerate(examples))
    own = [(i, e) for i, e in numbered if dataset in e.datasets]
    others: list[tuple[int, Example]] = []
    for kind in dict.fromkeys(e.kind for e in examples if dataset not in e.datasets):
        others += [(i, e) for i, e in numbered if e.kind == kind][: FOREIGN if own else 4]
    if not own:
        lead = "There are no examples for this model. Examples of other kinds:"
        groups = _group("Or try an example", others, lead)
    else:
        lead = " ".join(filter(None, ("Test images, labelled with their true class.", LACKING.get(dataset or ""))))
        first = _group("Or try an example", own, lead)
        groups = first + _group("Or an image the model was not trained for", others)
    return tag('<div class="mm-examples">{}{}</div>', groups, _sources({e.kind for e in examples}))


def _sources(kinds: Container[str]) -> Markup:
    found = [(kind, source, licence) for _, kind, source, licence in KINDS.values() if kind in kinds]
    licences = {licence for _, _, licence in found}
    rows = bullets(
        f"{kind}: {source}" + (f", {licence}" if len(licences) > 1 else "") for kind, source, licence in found
    )
    said = f", all {next(iter(licences))}" if len(licences) == 1 else " and licences"
    return tag('<details class="mm-more"><summary>Sources{}</summary>{}</details>', said, rows)


def _group(title: str, examples: list[tuple[int, Example]], lead: str = "") -> Markup:
    """Renders a heading and its images; without a lead, captioned by kind of image instead of class."""
    cells = join(
        tag(
            '<li><button type="button" data-mm-example="{}" aria-label="{}, {}">'
            '<img src="{}" alt="" width="120" height="120"><span>{}</span></button></li>',
            i,
            e.what,
            e.kind,
            e.thumbnail,
            e.what if lead else e.kind,
        )
        for i, e in examples
    )
    text = tag("<p>{}</p>", lead) if lead else NOTHING
    return tag("<h3>{}</h3>{}<ul>{}</ul>", title, text, cells) if cells else NOTHING
