"""The example images that come with the app, and which of them are of the kind that a model knows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from .html import NOTHING, Markup, bullets, data_uri, join, tag
from .options import EXAMPLES

KINDS = {
    "blood": ("bloodmnist", "blood cell", "Acevedo et al. 2020, doi:10.17632/snkd93bnjr.1"),
    "breast": ("breastmnist", "breast ultrasound", "Al-Dhabyani et al. 2020, doi:10.1016/j.dib.2019.104863"),
    "chest": ("pneumoniamnist", "chest X-ray", "Kermany et al. 2018, doi:10.17632/rscbjbr9sj.2"),
}
"""First word of a file name: the dataset in whose test split the image is, what to call it, and its source."""
LICENCE = "CC BY 4.0"
SUFFIXES = (".webp", ".jpg", ".jpeg", ".png")
FOREIGN = 1
"""So many images of each other kind are offered, to see what the app says of them."""


@dataclass(frozen=True)
class Example:
    """An image; `what` is its true class, `kind` the kind of image, `dataset` where it is from."""

    path: Path
    what: str
    kind: str
    dataset: str
    thumbnail: str


def load_examples() -> list[Example]:
    """All of them, by name."""
    found = []
    for path in sorted(p for p in EXAMPLES.iterdir() if p.suffix in SUFFIXES):
        first, _, what = path.stem.partition("_")
        dataset, kind, _ = KINDS[first]
        with Image.open(path) as picture:
            small = picture.convert("RGB")
        small.thumbnail((120, 120))
        what = what.rstrip("0123456789").strip("_").replace("_", " ")
        found.append(Example(path, what, kind, dataset, data_uri(np.asarray(small), exact=False)))
    return found


def examples_html(examples: list[Example], dataset: str | None) -> Markup:
    """Thumbnails that are buttons: what the model knows, then what it does not know.

    Args:
        dataset: that the model was trained on.
    """
    numbered = list(enumerate(examples))
    own = [(i, e) for i, e in numbered if e.dataset == dataset]
    others: list[tuple[int, Example]] = []
    for kind in dict.fromkeys(e.kind for e in examples if e.dataset != dataset):
        others += [(i, e) for i, e in numbered if e.kind == kind][: FOREIGN if own else 4]
    if not own:
        lead = "No example comes with the app that is of this model’s kind. Of other kinds:"
        groups = _group("Or try an example", others, lead)
    else:
        first = _group("Or try an example", own, "Test images, with their true class.")
        groups = first + _group("Or something it was not made for", others)
    return tag('<div class="mm-examples">{}{}</div>', groups, _sources())


def _sources() -> Markup:
    rows = bullets(f"{kind}: {source}" for _, kind, source in KINDS.values())
    return tag('<details class="mm-more"><summary>Sources, all {}</summary>{}</details>', LICENCE, rows)


def _group(title: str, examples: list[tuple[int, Example]], lead: str = "") -> Markup:
    """A heading and its images; without a lead, by the kind of image instead of the class."""
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
