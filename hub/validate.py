"""Validation of a model folder before it is published."""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

from medmamba import MedMamba
from medmamba.cards import (
    CARD_NAME,
    TRANSFER_NAME,
    CardError,
    LicenceError,
    ModelFacts,
    check_card,
    default_repo,
    is_dense,
    read_facts,
    render_card,
    write_card,
)
from medmamba.config import ConfigError
from medmamba.inference.fitted import FINGERPRINT
from medmamba.inference.similar import NAME as GALLERY_NAME
from medmamba.pretrained import PretrainedError
from medmamba.pretrained.sources import PICKLES
from medmamba.utils.checksums import CHECKSUM_KEY, CONFIG_NAME, WEIGHTS_NAME

from .dense_models import validate_dense
from .golden import GOLDEN_NAME, GoldenError, check_golden, write_golden

# What a model folder may hold beside config.json and model.safetensors.
TEXTS = (".json", ".jsonl", ".md", ".csv", ".txt", ".ipynb")
SUFFIXES = (*TEXTS, ".png", ".jpg", ".onnx")
# Absolute paths of a private machine.
PRIVATE_PATH = re.compile(r"(?<![\w:/.])(/(?:home|Users|root|work|mnt|tmp|data)/[^\s\"',]+|[A-Z]:\\\\[^\s\"',]+)")


@dataclass
class Report:
    """Result of `validate`.

    Attributes:
        files: names to upload, in order.
        problems: each prevents publication.
        warnings: worth reviewing.
        facts: source of the model card; None if the folder cannot be read.
        card: README.md to upload: that of the folder or, if it was never edited, regenerated for the target repository.
        model: as loaded; None if that failed.
        golden: content of golden.json.
    """

    folder: Path
    files: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    facts: ModelFacts | None = None
    card: str = ""
    model: MedMamba | None = None
    golden: dict = field(default_factory=dict)


def validate(
    folder: Path, repo_id: str, *, licence: str | None = None, permission: str = "", private: bool = False
) -> Report:
    """Checks a folder and reports all problems at once. Writes README.md and golden.json if they are missing.

    Args:
        licence, permission: see `medmamba.cards.read_facts`.
        private: the target repository is private, where weights without a licence are allowed.
    """
    report = Report(folder)
    _check_files(report)
    if report.problems:
        return report
    if is_dense(folder):
        validate_dense(report, repo_id, licence)
        return report
    try:
        report.model = MedMamba.from_pretrained(folder)  # strict
        report.facts = read_facts(folder, licence, permission)
    except (ConfigError, PretrainedError, CardError, LicenceError) as error:
        report.problems.append(str(error))
        return report
    _check_config(report)
    _check_licence(report, private)
    card = (folder / CARD_NAME).read_text(encoding="utf-8") if (folder / CARD_NAME).is_file() else ""
    if not card:
        card = write_card(folder, repo_id, licence, permission).read_text(encoding="utf-8")
        report.warnings.append(f"{CARD_NAME} was generated for {repo_id}: review it before others read it")
    elif _is_untouched(folder, card) and (fresh := render_card(report.facts, repo_id)) != card:
        card = fresh
        report.warnings.append(
            f"the card is regenerated for {repo_id}; to review it: python -m hub.card --repo {repo_id}"
        )
    report.card = card
    report.problems += check_card(card, report.facts)
    if (loads := _loads(card)) and repo_id not in loads:
        report.problems.append(f"{CARD_NAME} shows how to load {loads[0]}, not {repo_id}; regenerate the card")
    _check_results(report)
    _check_golden(report)
    report.files = sorted(p.name for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
    return report


def _is_untouched(folder: Path, card: str) -> bool:
    """Returns whether the card is unedited, as generated for the default or an earlier repository."""
    try:
        facts = read_facts(folder)
    except LicenceError:
        return False
    return any(card == render_card(facts, repo) for repo in {default_repo(folder), *_loads(card)})


def _loads(card: str) -> list[str]:
    """Returns the repositories that a card loads in its examples."""
    return re.findall(r'from_pretrained\("([^"]+)"\)', card)


def _check_files(report: Report) -> None:
    for path in sorted(report.folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            report.warnings.append(f"{path.name}/ is a folder and will not be uploaded")
        elif path.suffix in PICKLES:
            report.problems.append(f"{path.name} is a pickle, which can execute code when loaded: remove it")
        elif path.suffix == ".safetensors" and path.name not in (WEIGHTS_NAME, GALLERY_NAME):
            report.problems.append(f"{path.name}: weights must be in {WEIGHTS_NAME}")
        elif path.suffix not in (*SUFFIXES, ".safetensors"):
            report.problems.append(f"{path.name} does not belong in a model repository: remove it")
        elif path.suffix in TEXTS and (found := PRIVATE_PATH.search(path.read_text("utf-8", errors="replace"))):
            report.problems.append(f"{path.name} contains a path of your machine, {found[1]}: remove it")
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if not (report.folder / name).is_file():
            report.problems.append(f"{name} is missing: train or convert a model into this folder first")


def _check_config(report: Report) -> None:
    assert report.model is not None
    config = report.model.config
    if config.num_classes and config.labels == [f"class_{i}" for i in range(config.num_classes)]:
        report.problems.append("the classes have no names: set id2label in config.json")
    if not config.num_classes:
        report.warnings.append("the model has no classifier")
        if not report.facts or not report.facts.transfer:
            report.warnings.append(f"{TRANSFER_NAME} is missing: measure the backbone with python -m hub.transfer")
    if not config.training.get("dataset"):
        report.problems.append("config.json does not say what the model was trained on: set training.dataset")
    if CHECKSUM_KEY not in json.loads((report.folder / CONFIG_NAME).read_text(encoding="utf-8")):
        report.problems.append(f"config.json has no {CHECKSUM_KEY}: save the model again with save_pretrained")


def _check_licence(report: Report, private: bool) -> None:
    assert report.facts is not None
    if report.facts.terms.needs_permission:
        what = "the authors of these weights stated no licence, so all rights are reserved"
        if private:
            report.warnings.append(f"{what}: keep the repository private until they agree")
        else:
            report.problems.append(
                f"{what}. With their permission, pass --permission 'who gave it, and when'; without, use --private"
            )


def _check_results(report: Report) -> None:
    facts = report.facts
    assert facts is not None
    if not facts.split:
        if not facts.is_backbone and not facts.config.training.get("origin"):
            report.problems.append(f"results.json is missing: medmamba evaluate {report.folder} --data ... --out ...")
        return
    if list(facts.evaluations[facts.split].classes) != facts.config.labels:
        report.problems.append("results.json and config.json have different classes: evaluate again")
    if facts.results.get("training", facts.config.training) != facts.config.training:
        report.problems.append("results.json and config.json are of different training runs: evaluate again")
    # The fingerprint of the weights is added on saving, after evaluation.
    calibration = {key: value for key, value in facts.config.calibration.items() if key != FINGERPRINT}
    if facts.results.get("calibration", calibration) != calibration:
        report.problems.append("results.json and config.json have different calibrations: evaluate again")
    if facts.split != "test":
        report.warnings.append(f"results are for the {facts.split} split; there is no test split")
    if not facts.evaluations[facts.split].resamples:
        report.problems.append("the results have no confidence intervals: evaluate again with resamples")
    for name in ("confusion.png", "reliability.png"):
        if name not in facts.pictures and (name != "confusion.png" or facts.config.task != "multilabel"):
            report.problems.append(f"{name} is missing: medmamba evaluate writes it")
    if "attribution.png" not in facts.pictures:
        report.warnings.append("the card has no attribution example: python -m hub.card FOLDER --example IMAGE")
    if not facts.config.calibration:
        report.warnings.append("the model is not calibrated")


def _check_golden(report: Report) -> None:
    model, path = report.model, report.folder / GOLDEN_NAME
    assert model is not None
    if not model.config.num_classes:
        return
    if not path.is_file():
        report.golden = write_golden(model, report.folder)
        return
    try:
        report.golden = json.loads(path.read_text(encoding="utf-8"))
        check_golden(model, report.golden, str(path))
    except (GoldenError, KeyError, ValueError) as error:
        report.problems.append(str(error))
