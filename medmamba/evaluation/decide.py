"""Fits the decisions of a model on validation images, checks them on test images, and stores both."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..decision import (
    DecisionError,
    Decisions,
    Rule,
    choose_abstention,
    choose_method,
    choose_point,
    confidence_of,
    errors_of,
    fit_sets,
    group,
    input_checksum,
)
from ..decision.checking import check
from ..decision.record import Entry
from ..decision.tables import abstention_table, coverage_table, points_table, shown
from ..inference.fingerprint import fingerprint
from ..inference.fitted import in_force
from ..pretrained import read_config
from ..pretrained.config_file import write_config
from ..utils.checksums import CHECKSUM_KEY, CONFIG_NAME, WEIGHTS_NAME, file_hash
from ..utils.files import staged, write_text
from ..utils.strict_json import read_json
from ..utils.weights import read_weights
from .observed import Observed, observe

DECISIONS_NAME = "decisions.json"


def fit_decisions(
    observed: Observed,
    points: Sequence[tuple[Sequence[str], Rule]] = (),
    *,
    coverage: float | None = None,
    score: str = "lac",
    by_class: bool | str = "auto",
    answer_share: float | None = None,
    risk: float | None = None,
    prevalence: float | None = None,
    name: str = "",
) -> Decisions:
    """Fits operating points, sets and abstentions on what a model says of validation images.

    Args:
        observed: of `observe`, of images that did not train the model.
        points: classes, of which any makes an image positive, and the rule of each operating point.
        coverage: of the conformal sets; None: no sets.
        score, by_class: see `medmamba.decision.fit_sets`.
        answer_share: share of the images that get an answer; or
        risk: of the answers given; None for both: no abstention.
        prevalence: where the rule "cost" is to be used.
        name: of the operating point, where there is one.

    Returns:
        The decisions, not yet bound to a model: see `decide_model`.

    Raises:
        DecisionError: classes that are not there, or too few images for what is asked.
    """
    if name and len(points) != 1:
        raise DecisionError("a name is for one operating point")
    p, task, groups, classes = observed.probabilities, observed.task, observed.groups, observed.classes
    entries: list[Entry] = [
        choose_point(
            p, observed.labels, classes, wanted, rule, task=task, groups=groups, name=name, prevalence=prevalence
        )
        for wanted, rule in points
    ]
    if coverage is not None:
        entries.append(
            fit_sets(
                p,
                observed.labels,
                classes,
                coverage=coverage,
                score=score,
                by_class=by_class,
                groups=groups,
                task=task,
            )
        )
    if answer_share is not None or risk is not None:
        errors = errors_of(p, observed.labels, task, observed.threshold)
        sure = confidence_of(p, observed.unusual, task)
        if answer_share is not None:
            entries.append(choose_abstention(errors, sure, coverage=answer_share, groups=groups))
        if risk is not None:
            entries.append(choose_abstention(errors, sure, risk=risk, groups=groups))
    patients = None
    if groups is not None and len(set(groups)) < len(groups):
        method, losses = choose_method(p, groups, observed.labels, task)
        combined = group(p, groups, observed.labels, method, task)
        patients = {"method": method, "losses": losses, "groups": len(combined)}
    data = {"name": observed.name, "split": observed.split, "images": len(observed)}
    if groups is not None:
        data["patients"] = len(group(p, groups))
    return Decisions(patients=patients, data=data).with_entries(*entries)


def check_decisions(
    decisions: Decisions,
    observed: Observed,
    *,
    prevalence: float | None = None,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, Any]:
    """Returns how decisions fare on labelled images that chose nothing, as plain data for `decisions.json`.

    Args:
        prevalence: for predictive values and decision curves; default: that of the images.
        resamples, level, seed: of the bootstrap of decision curves, the area under the risk-coverage curve and metrics
            of patients.

    Returns:
        "operating_points" and "sets" and "abstentions" with intervals by name, "selective" (risk-coverage),
        "patients" (metrics of one answer per patient), "data" (what they were checked on).
    """
    p, truth = observed.probabilities, observed.labels
    found = check(
        decisions,
        p,
        truth,
        observed.classes,
        task=observed.task,
        groups=observed.groups,
        unusual=observed.unusual,
        prevalence=prevalence,
        threshold=observed.threshold,
        resamples=resamples,
        level=level,
        seed=seed,
    )
    groups = observed.groups
    found["data"] = {"name": observed.name, "split": observed.split, "images": len(observed)}
    if groups is not None:
        found["data"]["patients"] = len(group(p, groups))
    return found


def decide_model(
    model: Any,
    data: Any,
    points: Sequence[tuple[Sequence[str], Rule]] = (),
    *,
    split: str | None = "val",
    keep: bool = True,
    reading: Mapping[str, Any] | None = None,
    **options: Any,
) -> Decisions:
    """Fits decisions on validation images and stores them in `model.config`, from where `predict` takes them.

    Args:
        model: a `MedMamba`; `model.save_pretrained` then writes them.
        data: anything that `medmamba.data.open_dataset` takes.
        points: see `fit_decisions`.
        split: "val", or None for all images of data that only hold validation images.
        keep: keeps decisions that the model has, where they are of the same data.
        reading: further arguments of `observe`, such as `dataset` and `patient_pattern`.
        options: further arguments of `fit_decisions`.

    Raises:
        DatasetError, DecisionError, NotFiniteError: see `observe` and `fit_decisions`.
    """
    observed = observe(model, data, split, **(reading or {}))
    config = in_force(model).config
    found = bound(fit_decisions(observed, points, **options), config, keep)
    model.config = model.config.replace(decisions=found.to_dict())
    return found


def bound(found: Decisions, config: Any, keep: bool = True) -> Decisions:
    """Returns decisions bound to the input of a configuration, added to those it has of the same data."""
    found = dataclasses.replace(found, input=input_checksum(config), weights=None)
    before = Decisions.from_config(config)
    if keep and before.input == found.input and dict(before.data) == dict(found.data):
        return dataclasses.replace(before.with_entries(*found.entries), patients=found.patients, weights=None)
    return found


def write_decisions(folder: str | os.PathLike, decisions: Decisions, checked: Mapping[str, Any] | None = None) -> Path:
    """Writes decisions into `config.json` of a model folder, and their check into `decisions.json`; returns the folder.

    The weights are not touched. Where nothing was checked, an earlier `decisions.json` is removed.

    Raises:
        DecisionError: the decisions are of another preprocessing, calibration or other classes than the folder.
        ConfigError: a configuration that cannot be read.
    """
    folder = Path(folder)
    config = read_config(folder)
    if decisions.input != input_checksum(config):
        raise DecisionError(f"these decisions are of another preprocessing or calibration than that in {folder}")
    weights = fingerprint(read_weights(folder))
    record = dataclasses.replace(decisions, weights=weights).to_dict()
    sha256 = read_json(folder / CONFIG_NAME).get(CHECKSUM_KEY) or file_hash(folder / WEIGHTS_NAME)
    with staged(folder, last=(CONFIG_NAME,)) as staging:
        write_config(config.replace(decisions=record), staging, sha256)
        if checked is not None:
            text = json.dumps(checked, indent=1, ensure_ascii=False, allow_nan=False)
            write_text(staging / DECISIONS_NAME, text + "\n")
    if checked is None:
        (folder / DECISIONS_NAME).unlink(missing_ok=True)
    return folder


def describe(decisions: Decisions, classes: Sequence[str], checked: Mapping[str, Any] | None = None) -> str:
    """Returns decisions as Markdown, with what they do on the images that checked them."""
    data = decisions.data
    of = f"{data['images']} images" + (f" of {data['patients']} patients" if data.get("patients") else "")
    lines = [f"Chosen on {of}, {data['name']} ({data['split']})."]
    if checked:
        lines.append(
            f"Checked on {checked['data']['images']} images, {checked['data']['name']} "
            f"({checked['data']['split']}), which chose nothing; in brackets 95 % intervals."
        )
    if decisions.points:
        lines += ["", *points_table(decisions.points, checked)]
    for sets in decisions.sets:
        lines += ["", f"**{sets.name}** ({sets.score.upper()}). {sets.statement(classes)}"]
        if checked and sets.name in checked["sets"]:
            lines += ["", *coverage_table(checked["sets"][sets.name])]
    if decisions.abstentions:
        lines += ["", *abstention_table(decisions.abstentions, checked)]
    if decisions.patients:
        lines += [
            "",
            f"Images of a patient are combined by {decisions.patients['method']} (lowest log loss on validation).",
        ]
    return "\n".join(lines) + "\n"


__all__ = [
    "DECISIONS_NAME",
    "abstention_table",
    "bound",
    "check_decisions",
    "coverage_table",
    "decide_model",
    "describe",
    "fit_decisions",
    "points_table",
    "shown",
    "write_decisions",
]
