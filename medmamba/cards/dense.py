"""Cards of segmentation models and detectors, written from their `config.json` and `results.json`."""

from __future__ import annotations

import json
import math
import os
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config import ORGANISATION
from ..pretrained import model_kind
from ..pretrained.folder import read_folder_config
from ..pretrained.weights_file import read_header
from ..utils.checksums import WEIGHTS_NAME
from ..utils.strict_json import StrictJsonError, read_json
from .card import CARD_NAME, NOTICE
from .facts import MAX_FILE, RESULTS_NAME, CardError
from .licences import HUB_LICENCES, LicenceError, Terms, hub_licence
from .sections import PAPER

TASKS = {"medmamba-segmenter": "segmentation", "medmamba-detector": "detection"}
PIPELINES = {"medmamba-segmenter": "image-segmentation", "medmamba-detector": "object-detection"}
_ORDER = {"train": 0, "val": 1, "test": 2}
LOADERS = {"medmamba-segmenter": "MedMambaSegmenter", "medmamba-detector": "MedMambaDetector"}


@dataclass(frozen=True)
class DenseFacts:
    """What the card of a segmentation model or detector is written from.

    Attributes:
        kind: "medmamba-segmenter" or "medmamba-detector".
        config: `SegmenterConfig` or `DetectorConfig`.
        terms: terms of use of the weights, as `config.training` states them.
        parameters: number of trained values.
        results: content of results.json; {} where there is none.
    """

    kind: str
    config: Any
    terms: Terms
    parameters: int
    results: dict[str, Any] = field(default_factory=dict)

    @property
    def task(self) -> str:
        """ "segmentation" or "detection"."""
        return TASKS[self.kind]

    @property
    def training(self) -> dict[str, Any]:
        """Provenance of the weights."""
        return self.config.training

    @property
    def dataset(self) -> str:
        """Name of the dataset for people."""
        return str(self.training.get("title") or self.training.get("dataset") or "own data")

    def scores(self, split: str) -> list[tuple[str, dict[str, float | None]]]:
        """Returns (name, {"value", "low", "high"}) of each metric of a split; [] where it was not evaluated."""
        found = self.results.get("splits", {}).get(split)
        if not found:
            return []
        if self.kind == "medmamba-detector":
            return list(found["metrics"].items())
        several = len(found["classes"]) > 1
        return [
            (f"{name}, {label}" if several else name, value)
            for label in found["classes"]
            for name, value in found["metrics"][label].items()
        ]


def is_dense(folder: str | os.PathLike) -> bool:
    """Returns whether a folder holds a segmentation model or a detector."""
    return model_kind(folder) in TASKS


def read_dense_facts(folder: str | os.PathLike, licence: str | None = None) -> DenseFacts:
    """Reads what a card needs from a model folder.

    Args:
        licence: Hub identifier that the publisher wants; None: as `config.training` states it.

    Raises:
        ConfigError: config.json is invalid.
        CardError: results.json is invalid, or the folder holds another kind of model.
        LicenceError: no licence is stated, or the Hub does not know it.
    """
    folder = Path(folder)
    kind = model_kind(folder)
    if kind == "medmamba-segmenter":
        from ..segmentation.config import SegmenterConfig as config_class
    elif kind == "medmamba-detector":
        from ..detection.config import DetectorConfig as config_class  # type: ignore[assignment]
    else:
        raise CardError(f"{folder} holds neither a segmentation model nor a detector")
    config = read_folder_config(folder, config_class)
    results = {}
    if (folder / RESULTS_NAME).is_file():
        try:
            results = read_json(folder / RESULTS_NAME, MAX_FILE)
        except StrictJsonError as error:
            raise CardError(f"{folder / RESULTS_NAME} is not valid JSON: {error}") from error
        if not isinstance(results, dict):
            raise CardError(f"{folder / RESULTS_NAME} holds no object")
    count = sum(math.prod(entry.shape) for entry in read_header(folder / WEIGHTS_NAME).values())
    return DenseFacts(kind, config, _terms(config.training, licence), count, results)


def _terms(training: dict[str, Any], licence: str | None) -> Terms:
    stated = licence or hub_licence(training.get("licence"))
    if stated is None or stated not in HUB_LICENCES:
        raise LicenceError(
            f"the terms of the data ({training.get('dataset') or 'unnamed'}) are not on record; say under which "
            "licence the weights may be used, e.g. --license cc-by-4.0"
        )
    named: dict[str, Any] = (
        {"name": training.get("licence_name"), "link": training.get("licence_link")} if stated == "other" else {}
    )
    commercial = bool(training.get("non_commercial")) or "-nc-" in f"{stated}-"
    return Terms(stated, **named, non_commercial=commercial, reason=str(training.get("licence_reason") or ""))


def write_dense_card(folder: str | os.PathLike, repo_id: str | None = None, licence: str | None = None) -> Path:
    """Writes README.md into the folder of a segmentation model or detector; returns its path.

    Raises: as `read_dense_facts`.
    """
    folder = Path(folder)
    text = render_dense_card(read_dense_facts(folder, licence), repo_id or f"{ORGANISATION}/{folder.resolve().name}")
    (folder / CARD_NAME).write_text(text, encoding="utf-8")
    return folder / CARD_NAME


def render_dense_card(facts: DenseFacts, repo_id: str) -> str:
    """Returns the text of a card, front matter included."""
    parts = [
        ("Model", _model(facts)),
        ("How to use", _use(facts, repo_id)),
        ("Intended use", _intended(facts)),
        ("Training data", _data(facts)),
        ("Evaluation", _evaluation(facts)),
        ("Limits", _limits(facts)),
        ("How to reproduce", _reproduce(facts)),
        ("Licence", _licence(facts)),
        ("Citation", _citation(facts)),
    ]
    body = "\n\n".join(f"## {title}\n\n{text}" for title, text in parts if text)
    title = f"# {repo_id.split('/')[-1]}: {facts.task} of {', '.join(facts.config.classes)} with MedMamba"
    return f"---\n{_metadata(facts, repo_id)}\n---\n\n{title}\n\n> {NOTICE}\n\n{body}\n"


def _metadata(facts: DenseFacts, repo_id: str) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    tags = ["medmamba", "mamba", "state-space-model", "medical-imaging", "arxiv:2403.03849", facts.task]
    tags += ["non-commercial"] if facts.terms.non_commercial else []
    optional: dict[str, Any] = {"license_name": facts.terms.name, "license_link": facts.terms.link}
    if scores := facts.scores("test"):
        optional["model_name"] = repo_id.split("/")[-1]
        optional["eval_results"] = [
            EvalResult(
                task_type=PIPELINES[facts.kind],
                dataset_type=str(facts.training.get("dataset") or "own data"),
                dataset_name=facts.dataset,
                dataset_split="test",
                metric_type=name.replace(" ", "_").replace(",", ""),
                metric_name=name,
                metric_value=round(score["value"], 4),
            )
            for name, score in scores
            if score["value"] is not None
        ]
    return ModelCardData(
        license=facts.terms.licence,
        library_name="medmamba",
        pipeline_tag=PIPELINES[facts.kind],
        tags=tags,
        **{key: value for key, value in optional.items() if value is not None},
    ).to_yaml()


def _model(facts: DenseFacts) -> str:
    config = facts.config
    height, width = config.preprocess.input_size
    if facts.kind == "medmamba-segmenter":
        what = f"a decoder of segmentation_models_pytorch ({config.decoder})"
        chosen = f" Thresholds, chosen on validation images: {_by_class(config.classes, config.thresholds)}."
        chosen = "" if config.exclusive else chosen
    else:
        what = "a feature pyramid under torchvision's FCOS"
        chosen = f" Boxes are reported from a score of {config.score:.2f}, chosen on validation images."
    return (
        f"MedMamba-{config.encoder.architecture} as the encoder of {what}, {facts.parameters / 1e6:.1f}M parameters, "
        f"in the `medmamba` implementation. It takes images of any size, resizes them to {height}x{width} pixels, "
        f"and answers in pixels of the image.{chosen}"
    )


def _by_class(classes: tuple[str, ...], values: tuple[float, ...]) -> str:
    return ", ".join(f"{label} {value:.2f}" for label, value in zip(classes, values, strict=True))


def _use(facts: DenseFacts, repo_id: str) -> str:
    command = "segment" if facts.kind == "medmamba-segmenter" else "detect"
    lines = (
        [
            "print(found.regions)  # area and score of each",
            'found.save("mask.png")  # also .nii.gz, and .dcm with source=',
        ]
        if command == "segment"
        else ["print(found.boxes)  # label, score, left, top, right, bottom"]
    )
    return (
        "```bash\n"
        'pip install "medmamba[segment]"\n'
        f"medmamba {command} predict IMAGES --model {repo_id} --out OUT\n"
        "```\n\n"
        "```python\n"
        f"from medmamba import {LOADERS[facts.kind]}\n\n"
        f'model = {LOADERS[facts.kind]}.from_pretrained("{repo_id}")\n'
        'found = model.predict("image.png")\n' + "\n".join(lines) + '\nfound.overlay().save("overlay.png")\n```'
    )


def _intended(facts: DenseFacts) -> str:
    return (
        "Research and teaching on images like those it was trained on, and as a start for training on your own.\n\n"
        "Not for clinical use: not for diagnosis, triage, screening, measurement or treatment. It is no medical device "
        "and has no regulatory clearance. Areas in mm² are as wrong as the outline and the pixel spacing of the file."
    )


def _data(facts: DenseFacts) -> str:
    training = facts.training
    sizes = training.get("split_sizes") or {}
    text = (
        f"{facts.dataset[:1].upper()}{facts.dataset[1:]}: "
        + ", ".join(
            f"{count:,} {split}" for split, count in sorted(sizes.items(), key=lambda item: _ORDER.get(item[0], 3))
        )
        + " images."
    )
    if training.get("split"):
        text += f" Split {training['split']}."
    if training.get("init"):
        text += f" The encoder starts from `{Path(str(training['init'])).name}`."
    return text + (f" {training['notes']}" if training.get("notes") else "")


def _evaluation(facts: DenseFacts) -> str:
    test = facts.results.get("splits", {}).get("test")
    rows = facts.scores("test")
    if not rows:
        return "Nothing was measured on a test split for this card."
    lines = ["| metric | test | 95 % interval | validation |", "|---|---|---|---|"]
    val = dict(facts.scores("val"))
    for name, score in rows:
        other = val.get(name, {}).get("value")
        lines.append(f"| {name} | {_number(score['value'])} | {_interval(score)} | {_number(other)} |")
    text = (
        f"{test['n']} test images, which selected nothing: the epoch and what is thresholded were chosen on validation "
        f"images. Intervals by a bootstrap over {test['units']}."
    )
    if facts.kind == "medmamba-segmenter":
        text += (
            f" Dice and IoU are means over images at their own size; `hd95` is in {test['hd95_unit']}; lesions are "
            "matched from an IoU of 0.1."
        )
    return "\n\n".join([text, "\n".join(lines), *_beside(facts)])


def _beside(facts: DenseFacts) -> list[str]:
    """Returns what `config.training` has of other seeds and of peers, each with seed, metric, val and test."""
    paragraphs, seeds = [], facts.training.get("seeds") or []
    if seeds:
        values = [run["test"] for run in seeds]
        each = ", ".join(f"seed {run['seed']} {_number(run['val'])} / {_number(run['test'])}" for run in seeds)
        spread = f"{_number(statistics.mean(values))} ± {statistics.stdev(values):.3f}"
        paragraphs.append(
            f"{len(seeds)} seeds were trained; this is seed {facts.training['seed']}, the best on validation images. "
            f"The `{seeds[0]['metric']}` on validation / test: {each}; mean on test {spread}."
        )
    peers: dict[str, list[dict[str, Any]]] = {}
    for run in facts.training.get("beside") or []:
        peers.setdefault(run["model"], []).append(run)
    for name, found in peers.items():
        val, test = (_over_seeds([run[split] for run in found]) for split in ("val", "test"))
        which = f"seed {found[0]['seed']}" if len(found) == 1 else f"{len(found)} seeds"
        paragraphs.append(
            f"Beside it, in the same trainer and for as many epochs: {name}, `{found[0]['metric']}` on validation / "
            f"test {val} / {test} ({which})."
        )
    return paragraphs


def _over_seeds(values: list[float]) -> str:
    """Returns the value of one run, or mean and standard deviation of several."""
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return _number(statistics.mean(values)) + spread


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def _interval(score: dict[str, float | None]) -> str:
    low, high = score["low"], score["high"]
    return "–" if low is None or high is None else f"{_number(low)} to {_number(high)}"


def _limits(facts: DenseFacts) -> str:
    training = facts.training
    limits = [
        *(() if training.get("seeds") else ("One training run with one seed; the spread over seeds is not known.",)),
        f"Trained on {training.get('device') or 'a machine that is not on record'}, "
        f"{training.get('epochs', '?')} epochs at {facts.config.preprocess.input_size[0]} pixels.",
        "No images of another source were tried; expect worse on them.",
        "Groups of patients (age, sex, skin tone, ...) were not analysed separately.",
        *training.get("limits", ()),
    ]
    return "\n".join(f"- {limit}" for limit in limits)


def _reproduce(facts: DenseFacts) -> str:
    command = facts.training.get("command")
    return f"```bash\n{command}\n```" if command else ""


def _licence(facts: DenseFacts) -> str:
    terms = facts.terms
    name = terms.name or terms.licence
    text = f"Weights: [{name}]({terms.link})" if terms.link else f"Weights: {name}"
    return f"{text}{f' ({terms.reason})' if terms.reason else ''}. Code: Apache-2.0."


def _citation(facts: DenseFacts) -> str:
    cited = "\n".join(f"- {source}" for source in facts.training.get("citation", ()))
    return f"The architecture:\n\n```bibtex\n{PAPER}\n```" + (f"\n\nThe images:\n\n{cited}" if cited else "")


def check_dense_card(text: str, facts: DenseFacts, repo_id: str) -> list[str]:
    """Returns the problems of a card: metadata the Hub rejects, another licence, or metrics not those of results.json.

    Args:
        text: of README.md.
        facts: of the folder.
        repo_id: under which it is published.
    """
    from huggingface_hub import ModelCard

    try:
        data = ModelCard(text).data
    except Exception as error:  # invalid YAML or model-index
        return [f"{CARD_NAME}: the metadata cannot be read: {error}"]
    expected = ModelCard(render_dense_card(facts, repo_id)).data
    return [
        f"{CARD_NAME}: {name} is {data.get(name)}, expected {expected.get(name)}"
        for name in ("license", "license_name", "library_name", "pipeline_tag", "eval_results")
        if json.dumps(data.get(name), default=vars) != json.dumps(expected.get(name), default=vars)
    ]
