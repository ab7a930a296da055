"""python -m hub.make NAME: from a public dataset of the registry to a model folder that hub.publish takes.

    python -m hub.make kvasir --dry-run     what it takes in download, disk and GPU hours
    python -m hub.make kvasir               downloads, checks, splits, trains, evaluates, writes card and results
    python -m hub.make chestmnist --size 64 a MedMNIST set from its file of 64 pixels

Images go to OUT/downloads and OUT/data, the model to OUT/models/NAME. Every stage resumes: run the same command again.
Exit code 3: stopped by --max-seconds before the end.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medmamba.cards import default_repo, write_card
from medmamba.cli.training_options import STOPPED
from medmamba.config import MedMambaConfig
from medmamba.data import ImageDataset, check_dataset, make_splits, open_dataset, published_split, registry
from medmamba.data.registry import DatasetEntry
from medmamba.pretrained import fetch as fetch_model
from medmamba.pretrained import hub_name, read_config
from medmamba.training import load_recipe, train
from medmamba.training.recipe import Recipe, parse_setting

from .make_download import fetch, records
from .make_layouts import arrange
from .make_plan import plan
from .make_sources import SIZES, MakeError, Source, source_of
from .validate import validate

# What selects the epoch, where accuracy says little: most labels of an image are absent; grades have distances.
SELECT = {"multilabel": ("auroc", "loss"), "ordinal": ("quadratic_kappa", "loss")}
FRACTIONS = (0.7, 0.1, 0.2)  # of sets whose published split does not apply


@dataclass(frozen=True)
class Making:
    """One run of `make`.

    Attributes:
        entry: what the registry knows of the dataset.
        source: where its images come from.
        out: folder for everything.
        npz_size: size of the MedMNIST file in pixels.
        init: model to start from; None: from scratch.
        settings: changes to the recipe.
        allow: statuses of `check_dataset` to accept beside the complete set, such as "partial".
        options: passed to `medmamba.train`.
    """

    entry: DatasetEntry
    source: Source
    out: Path
    npz_size: int = 224
    recipe: str = "finetune"
    variant: str = "tiny"
    init: str | Path | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    allow: Collection[str] = ()
    mirror: str = ""
    progress: bool = True
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def downloads(self) -> Path:
        """Folder of the files as they come."""
        return self.out / "downloads" / self.name

    @property
    def arranged(self) -> Path:
        """Folder of the images in one shape, another one for other content of the downloads."""
        parts = (f"{name} {row['sha256']}" for name, row in sorted(records(self.downloads).items()))
        return self.out / "data" / f"{self.name}-{hashlib.sha256(' '.join(parts).encode()).hexdigest()[:8]}"

    @property
    def name(self) -> str:
        """Name of the dataset, with the source where there are two."""
        return f"{self.entry.name}-original" if self.source.by_group else self.entry.name

    @property
    def model(self) -> Path:
        """Folder of the model."""
        return self.out / "models" / self.name

    @property
    def full_recipe(self) -> Recipe:
        """The recipe with the settings of this run, its size set."""
        settings = {"select": SELECT[self.entry.task], **self.settings} if self.entry.task in SELECT else self.settings
        found = load_recipe(self.recipe, **settings)
        if found.size is None:
            side = _config_of(self.init).preprocess.input_size[0] if self.init else 224
            found = found.replace(size=side)
        return found


def make(making: Making, say: Callable[[str], None] = print) -> bool:
    """Makes a model; returns whether it is finished, False if it was stopped and can be resumed.

    Raises:
        MakeError, DatasetError, LeakageError, ...: what is wrong and what to do; complete stages are kept.
    """
    entry = making.entry
    say(f"[1/5] download: {', '.join(file.name for file in making.source.downloads)}")
    files = fetch(making.source.downloads, making.downloads, making.mirror, making.progress, say)
    say(f"[2/5] arrange as {making.source.layout}")
    place, notes = arrange(making.source, files, entry, making.arranged)
    say("[3/5] check and split")
    index, rule, found = prepare(making, place)
    for note in [*notes, *found]:
        say(f"  {note}")
    sizes = ", ".join(f"{name} {count:,}" for name, count in index.split_sizes.items())
    say(f"  {len(index):,} images, {len(index.classes)} classes; {sizes}; {rule}")
    say(f"[4/5] train and evaluate: {making.recipe} from {making.init or 'scratch'}, in {making.model}")
    published = rule.startswith(("published", "official"))
    result = train(
        index,
        making.model,
        making.full_recipe,
        making.variant,
        making.init,
        dataset=entry.name,
        # A published split is taken as it is, with the patients and duplicates that it has on two sides.
        allow_leakage=("patients", "duplicates", "conflicts") if published else (),
        init_name=None if making.init is None else hub_name(making.init) or Path(making.init).name,
        notes={
            "split": rule,
            "images": {name: _of_file(row) for name, row in records(making.downloads).items()},
            "check": found,
            **({"note": note} if (note := _note(making)) else {}),
            "pretraining": _pretraining(making.init),
        },
        progress=making.progress,
        **making.options,
    )
    if not result.finished:
        return False
    say("[5/5] card")
    repo = default_repo(making.model)
    if not (making.model / "README.md").is_file():
        write_card(making.model, repo)
    report = validate(making.model, repo)
    if report.problems:
        raise MakeError(
            f"{making.model} is not ready to be published:\n" + "\n".join(f"  - {p}" for p in report.problems)
        )
    if result.test:
        shown = ("accuracy", "balanced_accuracy", "auroc", "quadratic_kappa")
        say(
            "test: " + ", ".join(f"{name} {result.test.overall[name]}" for name in shown if name in result.test.overall)
        )
    say(f"ready: python -m hub.publish {making.model} --repo {repo}")
    return True


def _config_of(init: str | Path) -> MedMambaConfig:
    """Returns the configuration of a model without loading its weights."""
    return read_config(fetch_model(init))


def has_seen(init: str | Path | None, entry: DatasetEntry) -> bool:
    """Returns whether a model was trained on images of this dataset, by its record: then perhaps on its test images.

    The general backbones have seen training images of several sets, in splits that are not the published ones.
    """
    if init is None:
        return False
    record = _config_of(init).training
    names = [record.get("dataset"), *record.get("datasets", []), *record.get("pretraining", [])]
    for name in filter(None, names):
        with contextlib.suppress(registry.RegistryError):
            if registry.get(str(name)).name == entry.name:
                return True
    return False


def prepare(making: Making, place: Path) -> tuple[ImageDataset, str, list[str]]:
    """Returns the checked images with their split, how it was made, and what the check says.

    Raises:
        DatasetError: classes or images are missing, or there are too many, and `making.allow` does not accept it.
    """
    entry = making.entry
    index = open_dataset(place, dataset=entry)
    check = check_dataset(index, entry)
    accepted = {*making.allow, *(("other split",) if making.source.by_group else ())}
    if not check.ok and check.status not in accepted:
        raise MakeError(
            f"{entry.title}: the images are not the published set ({check.status}): {'; '.join(check.messages)}. "
            f"Delete {making.downloads} to download it again, or accept it: --allow {check.status.replace(' ', '-')}"
        )
    complete = check.ok and not making.source.by_group
    if entry.split_rule.kind == "official" and not making.source.by_group:
        return published_split(index, entry), "official split", list(check.messages)
    if complete and entry.split_rule.kind == "random":
        return published_split(index, entry), f"published: {entry.split_rule.note}", list(check.messages)
    unit = entry.group_unit if entry.group_pattern else None
    rule = f"made by make_splits {FRACTIONS}, seed 0" + (f", by {unit}" if unit else "")
    return make_splits(index, FRACTIONS, seed=0), rule, list(check.messages)


def _note(making: Making) -> str:
    """Returns what the card must say about the data."""
    seen = "The initial weights had seen images of this dataset, perhaps test images: the metrics may be too high."
    return " ".join(filter(None, [making.source.note, seen if has_seen(making.init, making.entry) else ""]))


def _pretraining(init: str | Path | None) -> list[str]:
    """Returns the datasets that the initial weights were trained on."""
    record = _config_of(init).training if init is not None else {}
    return [
        str(name)
        for name in record.get("datasets") or record.get("pretraining") or filter(None, [record.get("dataset")])
    ]


def _of_file(row: dict[str, Any]) -> dict[str, Any]:
    return {key: row[key] for key in ("url", "bytes", "md5", "sha256", "published_md5")}


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    args = _parser().parse_args(argv)
    try:
        entry = registry.get(args.dataset)
        source = source_of(entry, args.size, args.original)
        init = None if args.init == "scratch" else args.init or f"medmamba/{args.variant}-medical"
        if args.init is None and has_seen(init, entry):
            print(
                f"{init} has seen images of {entry.title}, perhaps test images of the published split: training starts "
                "from scratch. Another start: --init MODEL"
            )
            init = None
        recipe = args.recipe or ("finetune" if init else "default")
        making = Making(
            entry,
            source,
            args.out,
            args.size,
            recipe,
            args.variant,
            init,
            dict(parse_setting(text) for text in args.set),
            {name.replace("-", " ") for name in args.allow},
            args.mirror,
            not args.quiet,
            {"seed": args.seed, "device": args.device, "max_seconds": args.max_seconds},
        )
        if args.dry_run:
            needs = plan(
                entry, source, making.full_recipe, args.variant, npz_size=args.size, downloads=making.downloads,
                mirror=args.mirror, rate=args.rate,
            )  # fmt: skip
            print(f"{entry.title} ({entry.licence.id or 'licence not stated'}), layout known from: {source.known_from}")
            for file in source.downloads:
                print(f"  {file.name}: {file.url}, {f'MD5 {file.md5}' if file.md5 else 'no published checksum'}")
            print(*needs.lines(), sep="\n")
            return 0
        if not make(making):
            print("stopped; run the same command again to go on")
            return STOPPED
    except (MakeError, ValueError, OSError, ImportError) as error:  # DatasetError and its like are ValueErrors
        print(f"hub.make: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m hub.make", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dataset", metavar="NAME", help=f"one of: {', '.join(registry.names())}")
    parser.add_argument("--out", type=Path, default=Path("make"), metavar="DIR", help="(%(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="only print what it takes")
    parser.add_argument("--size", type=int, default=224, choices=SIZES, help="of the MedMNIST file (%(default)s)")
    parser.add_argument("--original", action="store_true", help="dermamnist: HAM10000 at full size, split by lesion")
    parser.add_argument("--variant", default="tiny", help="tiny or nano (%(default)s)")
    parser.add_argument(
        "--init", metavar="MODEL", help="start from this model, or 'scratch' (medmamba/VARIANT-medical)"
    )
    parser.add_argument("--recipe", help="default: finetune, or default from scratch")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="recipe settings")
    parser.add_argument(
        "--allow", nargs="+", default=[], choices=("partial", "larger", "other-split"), help="accept such images"
    )
    parser.add_argument("--mirror", default="", metavar="URL", help="fetch URL/HOST/PATH instead of https://HOST/PATH")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    parser.add_argument("--device", default="auto", help="(%(default)s)")
    parser.add_argument("--max-seconds", type=float, metavar="S", help="stop training after about S seconds")
    parser.add_argument("--rate", type=float, metavar="IMG/S", help="training rate of your GPU, for --dry-run")
    parser.add_argument("--quiet", action="store_true", help="show no progress bars")
    return parser


if __name__ == "__main__":
    sys.exit(main())
