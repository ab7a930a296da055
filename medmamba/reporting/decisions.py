"""The section of a report on decisions: operating points, sets with a guarantee, abstaining, patients."""

from __future__ import annotations

from typing import Any

from ..decision import Decisions
from ..evaluation.decide import abstention_table, check_decisions, coverage_table, points_table, shown
from ..evaluation.observed import Observed
from ..inference.fitted import in_force
from .blocks import Block, Text, from_markdown, picture
from .figures import INSIDE, net_benefit_figure, risk_coverage_figure
from .study import Study


def decisions(study: Study) -> list[Block]:
    """Returns what was decided on validation images, and how it fares on the evaluated ones; [] if nothing was."""
    found = Decisions.from_config(in_force(study.model).config)
    if not found.names:
        return []
    checked = check_decisions(
        found, _observed(study), resamples=study.scored.evaluation.resamples, seed=study.scored.evaluation.seed
    )
    chosen = found.data
    same = (chosen.get("name"), chosen.get("split")) == (study.index.name, study.split)
    how = "the same images, so that the figures are too good" if same else "images that chose nothing"
    blocks: list[Block] = [
        Text(
            f"All thresholds were chosen on {chosen.get('images')} images of {chosen.get('name')}, split "
            f"{chosen.get('split')!r}, and are checked here on {how}."
        )
    ]
    if found.points:
        blocks += from_markdown(points_table(found.points, checked))
        # Points of the same classes have the same curve.
        rows = checked["operating_points"].values()
        curves = {" or ".join(row["classes"]): row["net_benefit"] for row in rows if "net_benefit" in row}
        if curves:
            caption = "Decision curves: net benefit of acting on the model, on nobody and on everybody, by threshold."
            blocks.append(picture(net_benefit_figure(curves), caption, 62 if len(curves) <= INSIDE else 80))
        blocks.append(Text("PPV and NPV are for the prevalence among the evaluated images; elsewhere they differ."))
    classes = study.scored.evaluation.classes
    for sets in found.sets:
        row = checked["sets"][sets.name]
        blocks += [Text(f"{sets.name}: {sets.statement(classes)}"), *from_markdown(coverage_table(row))]
    if found.abstentions:
        blocks += from_markdown(abstention_table(found.abstentions, checked))
    blocks += _abstaining(checked["selective"])
    if patients := checked.get("patients"):
        said = ", ".join(f"{name.replace('_', ' ')} {shown(patients['overall'][name])}" for name in _OF_PATIENTS)
        blocks.append(
            Text(
                f"One answer per patient ({patients['method']}, {patients['groups']} patients or other groups): {said}."
            )
        )
    return blocks


_OF_PATIENTS = ("accuracy", "balanced_accuracy", "auroc")


def _abstaining(selective: dict[str, Any]) -> list[Block]:
    interval = f" ({selective['low']:.3f} to {selective['high']:.3f})" if "low" in selective else ""
    text = (
        "Leaving out the least sure images one by one: the share of wrong answers among those that remain. Its mean, "
        f"the area under the curve, is {selective['aurc']:.3f}{interval}."
    )
    return [Text(text), picture(risk_coverage_figure(selective), "Risk-coverage curve.", 55)]


def _observed(study: Study) -> Observed:
    scored, detector = study.scored, study.model.unusual
    return Observed(
        logits=scored.logits,
        labels=scored.labels,
        patients=tuple(study.index.patients),
        unusual=detector.is_unusual(study.signatures) if detector else None,
        classes=tuple(scored.evaluation.classes),
        task=scored.evaluation.task,
        temperature=scored.evaluation.context["temperature"],
        name=study.index.name,
        split=study.split,
        threshold=scored.evaluation.threshold or 0.5,
    )
