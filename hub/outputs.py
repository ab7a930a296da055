"""python -m hub.outputs: what a model answers to every image of a split, as a table that others can analyse.

    python -m hub.outputs hub/models/pad-ufes-20 --data DATA/pad_ufes_20 --dataset pad-ufes-20 --by age,gender \
        --cuts age=60 --out hub/results/outputs/pad-ufes-20.csv

One row per image: file name, split, patient, true class, the groups asked for, and the logit of each class, before the
division by the temperature in the model's config.json. Reliability diagrams, operating points, subgroups and intervals
follow from it without the images (`medmamba.metrics`, `medmamba.decision`); the tutorials do so.
"""

from __future__ import annotations

import argparse
import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath

from medmamba import MedMamba
from medmamba.cli.evaluate import cut_points, names
from medmamba.data import ImageDataset, open_dataset
from medmamba.data.metadata import metadata_file, read_columns
from medmamba.evaluation import evaluate_model
from medmamba.utils.files import write_text

LOGIT = "logit: "  # and the name of a class: head of a column
DECIMALS = 3


def rows_of(
    model: MedMamba,
    dataset: ImageDataset,
    split: str,
    groups: Mapping[str, Sequence[str | None]],
    device: str = "auto",
    progress: bool = False,
) -> list[dict[str, str]]:
    """Returns one row per image of a dataset for a single-label task, in its order.

    Args:
        split: what the rows call it, such as "test" or "external".
        groups: more columns, a value per image; None where unknown.
    """
    scored = evaluate_model(model, dataset, None, device=device, resamples=0, progress=progress)
    classes = model.config.labels
    found = []
    for i, (record, label, logits) in enumerate(zip(dataset.records, scored.labels, scored.logits, strict=True)):
        row = {"image": PurePath(str(record.source)).name, "split": split, "patient": record.patient or ""}
        row |= {"label": classes[int(label)]} | {name: values[i] or "" for name, values in groups.items()}
        row |= {LOGIT + name: f"{value:.{DECIMALS}f}" for name, value in zip(classes, logits, strict=True)}
        found.append(row)
    return found


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m hub.outputs", description="What a model answers, as a table.")
    parser.add_argument("model", help="model folder or bundled name")
    parser.add_argument("--data", required=True, help="the dataset, with splits")
    parser.add_argument("--splits", type=names, default=["test"], help="names such as val,test (default: test)")
    parser.add_argument("--external", help="images of other sources, all of them")
    parser.add_argument("--dataset", help="name in the registry")
    parser.add_argument("--patient-pattern", help="regular expression whose group 1 in a file name is the patient")
    parser.add_argument("--by", type=names, default=[], help="columns of the metadata.csv in the data")
    parser.add_argument("--cuts", type=cut_points, action="append", default=[], help="as for medmamba evaluate")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, required=True, help="CSV file")
    args = parser.parse_args(argv)
    model = MedMamba.from_pretrained(args.model)
    index = open_dataset(args.data, dataset=args.dataset, patient_pattern=args.patient_pattern)
    parts = {name: index.split(name) for name in args.splits}
    if args.external:
        parts["external"] = open_dataset(args.external, dataset=args.dataset)
    table: list[dict[str, str]] = []
    for name, part in parts.items():
        groups: Mapping[str, Sequence[str | None]] = {}
        if args.by and name != "external":
            groups = read_columns(metadata_file(args.data), part, args.by, dict(args.cuts)).values
        table += rows_of(model, part, name, groups, args.device, progress=True)
    text = io.StringIO()
    writer = csv.DictWriter(text, table[0], restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_text(args.out, text.getvalue())
    print(f"{args.out}: {len(table)} images")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
