"""The section of a model card on decisions: operating points, sets, abstaining, patients."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..decision import Decisions
from ..decision.tables import abstention_table, coverage_table, points_table, risk_table, risk_text, shown
from ..metrics import TITLES

if TYPE_CHECKING:
    from .facts import ModelFacts

PATIENT_METRICS = ("accuracy", "balanced_accuracy", "auroc")
METHODS = {
    "mean_logit": "the mean of their logits",
    "max": "the largest probability of each class",
    "noisy_or": "a noisy or of their probabilities",
}


def decisions_section(facts: ModelFacts) -> str:
    """Returns the section as Markdown; "" for a model without decisions."""
    found, checked = Decisions.from_config(facts.config), facts.decided
    if not found.entries:
        return ""
    images = f"{found.data['images']:,} validation images"
    text = [f'Chosen on {images} alone, and stored in `config.json`: `model.predict(image, decide="all")`.']
    if checked:
        test = checked["data"]
        of = f" of {test['patients']} {facts.unit}s" if test.get("patients") else ""
        text[0] += (
            f" Checked on the {test['images']:,} images{of} of the {test['split']} split, which chose nothing; in "
            "brackets 95 % intervals. What holds at another site depends on its images and its prevalence."
        )
    if found.points:
        text += ["### Operating points", "\n".join(points_table(found.points, checked)), _cost(found, facts)]
    for sets in found.sets:
        text += ["### Sets of classes with a guarantee", sets.statement(facts.config.labels)]
        if checked.get("sets", {}).get(sets.name):
            text.append("\n".join(coverage_table(checked["sets"][sets.name])))
    text += _abstaining(found, facts)
    text += _patients(found, facts)
    return "\n\n".join(part for part in text if part)


def _cost(found: Decisions, facts: ModelFacts) -> str:
    """Returns in words what the first operating point costs on the images that checked it."""
    rows = facts.decided.get("operating_points", {})
    if not (row := rows.get(found.points[0].name)):
        return ""
    point = found.points[0]
    positive, negative, called = row["tp"] + row["fn"], row["fp"] + row["tn"], row["tp"] + row["fp"]
    return (
        f"`{point.name}` finds {row['tp']} of {positive} positive images and calls {row['fp']} of {negative} others "
        f"positive as well: {row['fp'] / row['tp']:.1f} false alarms for each find, {called} images to look at in all."
        if row["tp"]
        else f"`{point.name}` finds none of {positive} positive images."
    )


def _abstaining(found: Decisions, facts: ModelFacts) -> list[str]:
    checked = facts.decided
    if not found.abstentions:
        return []
    text = ["### Abstaining", "\n".join(abstention_table(found.abstentions, checked))]
    if curve := checked.get("selective"):
        text.append(
            f"An image flagged as unusual gets no answer first, then those of low probability. {risk_text(curve)} By "
            f"the probability alone it is {curve['plain_confidence']:.4f}."
        )
        text.append("\n".join(risk_table(curve)))
    return text


def _patients(found: Decisions, facts: ModelFacts) -> list[str]:
    row = facts.decided.get("patients")
    if not row:
        return []
    header = ["", *(TITLES[name] for name in PATIENT_METRICS)]
    lines = [header, ["---"] * len(header)]
    for name, metrics in ((f"one answer per {facts.unit}", row["overall"]), ("one answer per image", row["images"])):
        lines.append([name, *(shown(metrics[metric]) for metric in PATIENT_METRICS)])
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    how = METHODS[row["method"]]
    return [
        f"### One answer for each {facts.unit}",
        f"The images of a {facts.unit} are combined by {how}, which had the lowest log loss on validation; "
        f"{row['groups']} {facts.unit}s.",
        table,
    ]
