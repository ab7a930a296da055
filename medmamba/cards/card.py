"""Writes model cards: the README.md of a model folder, from its config.json and results.json.

>>> from medmamba.cards import write_card
>>> write_card("runs/bloodmnist", repo_id="medmamba/bloodmnist")

All metrics in a card come from results.json; `check_card` reports those that differ from it.
"""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import ORGANISATION
from . import backbone
from .facts import ModelFacts, read_facts
from .sections import sections

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData

CARD_NAME = "README.md"
NOTICE = "For research only. Not a medical device; not for diagnosis or treatment."
# Score in results.json: its metric type on the Hub, and its name for people.
METRICS = {
    "accuracy": ("accuracy", "Accuracy"),
    "balanced_accuracy": ("balanced_accuracy", "Balanced accuracy"),
    "auroc": ("roc_auc", "AUROC, macro"),
    "f1": ("f1", "F1, macro"),
    "precision": ("precision", "Precision, macro"),
    "sensitivity": ("recall", "Sensitivity, macro"),
    "specificity": ("specificity", "Specificity, macro"),
    "ece": ("ece", "Expected calibration error"),
    "quadratic_kappa": ("quadratic_kappa", "Quadratic-weighted kappa"),
    "mae": ("mae", "Mean absolute error in grades"),
    "subset_accuracy": ("subset_accuracy", "Subset accuracy"),
}
START, END = "<!-- metrics: generated from results.json, do not edit -->", "<!-- end of metrics -->"
MARK = "{metrics}"  # where a section has the tables of metrics


def write_card(
    folder: str | os.PathLike, repo_id: str | None = None, licence: str | None = None, permission: str = ""
) -> Path:
    """Writes README.md into a model folder and returns its path; see `read_facts` for further arguments and errors.

    Args:
        repo_id: "org/name" under which the model is or will be loaded; default: "medmamba/" and the folder's name.
    """
    folder = Path(folder)
    card = render_card(read_facts(folder, licence, permission), repo_id or default_repo(folder))
    (folder / CARD_NAME).write_text(card, encoding="utf-8")
    return folder / CARD_NAME


def default_repo(folder: Path) -> str:
    """Returns the repository of a model unless another is given: "medmamba/" and the name of its folder."""
    return f"{ORGANISATION}/{folder.resolve().name}"


def render_card(facts: ModelFacts, repo_id: str) -> str:
    """Returns the text of a card, front matter included."""
    body = "\n\n".join(f"## {title}\n\n{text}" for title, text in card_sections(facts, repo_id) if text)
    purpose = f", a {facts.dataset}" if facts.is_backbone else f" for {facts.dataset}"
    title = f"# {repo_id.split('/')[-1]}: MedMamba-{facts.config.architecture}{purpose}"
    return f"---\n{card_data(facts, repo_id).to_yaml()}\n---\n\n{title}\n\n> {NOTICE}\n\n{with_metrics(facts, body)}\n"


def card_sections(facts: ModelFacts, repo_id: str) -> list[tuple[str, str]]:
    """Returns title and text of every section, those of a backbone if the model has no classifier."""
    return backbone.sections(facts, repo_id) if facts.is_backbone else sections(facts, repo_id)


def pipeline(facts: ModelFacts) -> str:
    """Returns the task under which the Hub lists a model."""
    return "image-feature-extraction" if facts.is_backbone else "image-classification"


def card_data(facts: ModelFacts, repo_id: str) -> ModelCardData:
    """Returns the metadata that the Hub reads, with every score of `METRICS` and its interval in `model-index`."""
    from huggingface_hub import ModelCardData

    training, terms = facts.config.training, facts.terms
    tags = ["medmamba", "mamba", "state-space-model", "medical-imaging", "arxiv:2403.03849"]
    tags += ["non-commercial"] if terms.non_commercial else []
    tags += [facts.entry.name] if facts.entry else []
    # No "datasets": they would have to be identifiers of the Hub; model-index names the dataset.
    optional: dict[str, Any] = {
        "license_name": terms.name,
        "license_link": terms.link,
        "base_model": _base_model(training),
        "metrics": [METRICS[name][0] for name in ("accuracy", "auroc", "f1")] if facts.split else None,
    }
    if facts.split:
        optional |= {"model_name": repo_id.split("/")[-1], "eval_results": _eval_results(facts)}
    return ModelCardData(
        license=terms.licence,
        library_name="medmamba",
        pipeline_tag=pipeline(facts),
        tags=tags,
        **{key: value for key, value in optional.items() if value is not None},
    )


def _base_model(training: dict[str, Any]) -> str | None:
    """Returns the Hub id of the model that training started from; None for a local folder such as "runs/joint".

    The two look alike, so an id counts only if the run recorded it as one, or if it belongs to this organisation.
    """
    found = str(training.get("base_model") or "")
    if not found and str(training.get("init") or "").startswith(f"{ORGANISATION}/"):
        found = str(training["init"])
    found = found.partition("@")[0]  # without a revision
    return found if re.fullmatch(r"[\w.-]+/[\w.-]+", found) else None


def _eval_results(facts: ModelFacts) -> list[Any]:
    from huggingface_hub import EvalResult

    assert facts.split is not None
    evaluation = facts.evaluations[facts.split]
    found = []
    for score, (kind, name) in METRICS.items():
        estimate = evaluation.overall.get(score)
        if estimate is None or math.isnan(estimate.value):  # not defined for these data
            continue
        interval = None
        if not math.isnan(estimate.low):
            interval = {"low": round(estimate.low, 4), "high": round(estimate.high, 4), "level": evaluation.level}
        found.append(
            EvalResult(
                task_type="image-classification",
                task_name=f"{facts.dataset} classification",
                dataset_type=facts.entry.name if facts.entry else _slug(facts.dataset),
                dataset_name=facts.dataset,
                dataset_split=facts.split,
                metric_type=kind,
                metric_name=name,
                metric_value=round(estimate.value, 4),
                metric_args={"interval": interval} if interval else None,
            )
        )
    return found


def with_metrics(facts: ModelFacts, body: str) -> str:
    """Returns the body of a card with the tables of metrics, between two comments, in place of `MARK`."""
    if not facts.split or MARK not in body:
        return body
    return body.replace(MARK, f"{START}\n\n{facts.evaluations[facts.split].to_markdown().strip()}\n\n{END}")


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
