"""Checks a model card against the files of its model folder."""

from __future__ import annotations

import math
import re
from typing import Any

from .card import CARD_NAME, END, MARK, METRICS, NOTICE, START, card_sections, pipeline, with_metrics
from .facts import ModelFacts
from .licences import HUB_LICENCES

TOLERANCE = 5e-5  # of metrics, which cards store with four decimals


def check_card(text: str, facts: ModelFacts) -> list[str]:
    """Returns all problems of a card: metadata the Hub rejects, missing sections, metrics not those of results.json.

    Prose may be edited, metrics may not.
    """
    from huggingface_hub import ModelCard

    try:
        data = ModelCard(text).data
    except Exception as error:  # invalid YAML or model-index
        return [f"{CARD_NAME}: the metadata cannot be read: {error}"]
    return [f"{CARD_NAME}: {p}" for p in (*_check_metadata(data, facts), *_check_text(text, facts))]


def _check_metadata(data: Any, facts: ModelFacts) -> list[str]:
    problems = []
    for key, wanted in (("library_name", "medmamba"), ("pipeline_tag", pipeline(facts))):
        if data.get(key) != wanted:
            problems.append(f"{key} must be {wanted}, is {data.get(key)}")
    if not isinstance(data.get("tags"), list) or not all(isinstance(tag, str) for tag in data.get("tags", [])):
        problems.append("tags must be a list of strings")
    licence = data.get("license")
    if licence not in HUB_LICENCES:
        problems.append(f"license must be an identifier the Hub knows, is {licence}")
    if licence == "other" and not (data.get("license_name") and data.get("license_link")):
        problems.append("license: other needs license_name and license_link")
    if (licence, data.get("license_name")) != (facts.terms.licence, facts.terms.name):
        problems.append(
            f"license is {data.get('license_name') or licence}, and the weights are under "
            f"{facts.terms.name or facts.terms.licence}: {facts.terms.reason}"
        )
    stated = {result.metric_type: result.metric_value for result in data.get("eval_results") or []}
    if facts.split:
        overall = facts.evaluations[facts.split].overall
        expected = {
            METRICS[name][0]: e.value for name, e in overall.items() if name in METRICS and not math.isnan(e.value)
        }
        for kind in sorted(expected.keys() | stated.keys()):
            if kind not in stated:
                problems.append(f"model-index lacks {kind}")
            elif kind not in expected:
                problems.append(f"model-index claims {kind}, which results.json does not have")
            elif abs(float(stated[kind]) - expected[kind]) > TOLERANCE:
                problems.append(f"model-index says {kind} {stated[kind]}, results.json says {expected[kind]:.4f}")
    elif stated:
        problems.append("model-index has metrics, but there is no results.json")
    return problems


def _check_text(text: str, facts: ModelFacts) -> list[str]:
    problems = []
    if NOTICE not in text:
        problems.append(f'the notice is missing: "{NOTICE}"')
    headings = set(re.findall(r"^## (.+)$", text, re.M))
    for title, content in card_sections(facts, "org/name"):
        if content and title not in headings:
            problems.append(f'the section "{title}" is missing')
    if re.search(r"\[More Information Needed\]|\bTODO\b|\bFIXME\b", text):
        problems.append("it still has a placeholder")
    for name in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text):
        if "://" not in name and name not in facts.pictures:
            problems.append(f"it shows {name}, which is not in the folder")
    if facts.split:
        generated = re.search(f"{re.escape(START)}(.*?){re.escape(END)}", with_metrics(facts, MARK), re.S)
        present = re.search(f"{re.escape(START)}(.*?){re.escape(END)}", text, re.S)
        if present is None or generated is None or present[1].split() != generated[1].split():
            problems.append("its table of metrics differs from results.json; write the card again")
    return problems
