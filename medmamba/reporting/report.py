"""Writes a report on a model that reviewers and ethics boards can read, and a page on drift."""

from __future__ import annotations

import datetime
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .._version import __version__
from ..cards.card import NOTICE
from ..evaluation.drift import Drift
from ..inference.ood import Unusual
from ..utils.extras import require
from ..utils.strict_json import StrictJsonError, read_json
from .blocks import Block, Bullets, Section, Table, Text, picture
from .checklists import CHECKLISTS
from .figures import score_figure
from .page import render, write
from .sections import report_sections
from .study import Study, make_study

REPORT_NAME = "report"
DRIFT_PAGE = "drift"
_MOST_CLASSES = 6  # in the table of predicted classes, those that changed most, for one page


def write_report(
    model: str | os.PathLike,
    data: str | os.PathLike,
    out: str | os.PathLike,
    *,
    split: str | None = "test",
    pdf: bool = True,
    statements: str | os.PathLike | Mapping[str, Mapping[str, str]] | None = None,
    **options: Any,
) -> dict[str, Path]:
    """Evaluates a model and writes `report.html`, one file with all it shows, and `report.pdf`.

    The sections: summary, model and intended use, data and splits, training, performance, operating points and sets
    where the model has them, calibration, subgroups, corrupted images, unusual images, explanations with their checks,
    errors, limits, and which items of TRIPOD+AI and CLAIM are covered. It shows some of the images: do not publish a
    report on images that may not be published.

    Args:
        model: a bundled name, "org/name[@revision]" or a folder.
        data: folder, `.csv`, `.npz` or `.zip` of labelled images.
        out: folder for the report.
        split: "train", "val", "test"; None: all images.
        pdf: also writes the PDF, which needs `pip install "medmamba[report]"`.
        statements: what only authors can say, by checklist and number of the item, such as {"TRIPOD+AI": {"17":
            "Approved by ..."}}, or a JSON file of that.
        options: `by`, `metadata`, `cuts`, `corruptions`, `corruption_images`, `dataset`, `patient_pattern`, `device`,
            `resamples`, `seed` and `progress` as for `evaluate_model`; `explain`, how many images are explained (2);
            `methods`, the attribution methods (Grad-CAM); `external`, whether the data are of another source than
            those that the model was trained on.

    Returns:
        The paths by suffix, "html" and "pdf".

    Raises:
        ImportError: weasyprint, captum, accelerate or matplotlib is missing.
        ValueError: statements on items that do not exist.
    """
    for module, purpose in (("accelerate", "a report"), ("matplotlib", "a report"), ("captum", "a report")):
        require(module, purpose)
    if pdf:
        require("weasyprint", "a report as PDF (leave it out with pdf=False)", "report")
    said = _statements(statements)
    study = make_study(model, data, split=split, **options)
    return write(Path(out), REPORT_NAME, report_html(study, said), pdf)


def report_html(study: Study, statements: Mapping[str, Mapping[str, str]] | None = None) -> str:
    """Returns a report as one HTML page that needs no other file.

    Args:
        study: from `study.make_study`, or from `study.study_of` for an evaluation that was made already.
        statements: what only authors can say, see `write_report`.

    Raises:
        ImportError: jinja2 or matplotlib is missing.
    """
    sections = report_sections(study, _statements(statements))
    title = f"Evaluation of {Path(str(study.name)).name} on {study.index.name}"
    about = {
        "Model": f"{study.name}, weights SHA-256 {study.weights[:16]}…",
        "Data": f"{study.index.name}, split {study.split}, {len(study.index)} images",
        **_about(),
    }
    return render(title, sections, notice=NOTICE, about=about)


def write_drift(
    drift: Drift, out: str | os.PathLike, detector: Unusual | None = None, pdf: bool = True
) -> dict[str, Path]:
    """Writes a page on the result of `detect_drift`: `drift.html`, `drift.pdf` and `drift.json`; returns the paths."""
    header, rows = drift.rows()
    blocks: list[Block] = [Text(drift.summary()), Table(header, rows, small=True)]
    if detector is not None and drift.scores:
        stored = np.array(drift.reference_scores) if drift.reference_scores else None
        drawn = score_figure(stored, np.array(drift.scores), detector.threshold)
        blocks.append(picture(drawn, "Distance to the training images.", 58))
    if drift.prevalence:
        changes = sorted(drift.prevalence.items(), key=lambda item: -abs(item[1][1] - item[1][0]))[:_MOST_CLASSES]
        shares = [[name, f"{before:.1%}", f"{now:.1%}"] for name, (before, now) in changes]
        blocks.append(Table(["Predicted class", "Reference images", "New images"], shares, small=True))
    if drift.evaluation is not None:
        names = ("accuracy", "balanced_accuracy", "auroc", "ece")
        found = [[name.replace("_", " "), str(drift.evaluation.overall[name])] for name in names]
        blocks.append(Table(["With labels", "Value (95% interval)"], found))
    notes = [
        "In a large sample small differences are significant, in a small one large ones are not: read the sizes.",
        "Several images of one patient count as independent here, which makes p-values too small.",
        *drift.notes,
    ]
    if drift.failures:
        notes.append(f"{len(drift.failures)} images could not be read, such as {': '.join(drift.failures[0])}.")
    blocks.append(Bullets(notes))
    name = "/".join(Path(drift.data).parts[-2:])
    about = {"Model": drift.model, "Images": f"{name}, {drift.n_images} images", **_about()}
    sections = [Section("drift", "Comparison", tuple(blocks))]
    html = render(f"Drift: {name}", sections, notice=NOTICE, about=about, compact=True)
    paths = write(Path(out), DRIFT_PAGE, html, pdf)
    return {**paths, "json": drift.save(out)}


def _about() -> dict[str, str]:
    software = f"medmamba {__version__}, PyTorch {torch.__version__}, Python {platform.python_version()}"
    return {"Made": f"{datetime.date.today().isoformat()}, with {software}"}


def _statements(given: str | os.PathLike | Mapping[str, Mapping[str, str]] | None) -> dict[str, dict[str, str]]:
    if given is None:
        return {}
    if isinstance(given, Mapping):
        found: Any = given
    else:
        try:
            found = read_json(given)
        except StrictJsonError as error:
            raise ValueError(f"{given} is not JSON: {error}") from error
    if not isinstance(found, Mapping) or not all(isinstance(part, Mapping) for part in found.values()):
        raise ValueError('statements must be {"TRIPOD+AI": {"17": "..."}, "CLAIM": {...}}')
    if unknown := set(found) - set(CHECKLISTS):
        raise ValueError(f"unknown checklist {', '.join(sorted(unknown))}; known: {', '.join(CHECKLISTS)}")
    for name, part in found.items():
        if wrong := [number for number in part if number not in CHECKLISTS[name]]:
            raise ValueError(f"{name} has no item {', '.join(wrong)}; its items are {', '.join(CHECKLISTS[name])}")
    return {name: {str(number): str(text) for number, text in part.items()} for name, part in found.items()}
