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

<<<<<<< HEAD
from ..config import ORGANISATION
from .facts import ModelFacts, read_facts
=======
from ..config import ORGANISATION, MedMambaConfig
from ..data import registry
from ..evaluation import RESULTS_NAME, evaluations
from ..inference.ood import Unusual, UnusualError, load_unusual
from ..metrics import Evaluation
from ..pretrained import read_config
from ..utils.checksums import WEIGHTS_NAME
from . import backbone
from .licences import HUB_LICENCES, Terms, terms_of
>>>>>>> 7e17932 (General backbones: tiny-medical and nano-medical, with cards, transfer tables and the commands that made them)
from .sections import sections

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData

CARD_NAME = "README.md"
<<<<<<< HEAD
=======
EXAMPLE_NAME = "attribution.json"
TRANSFER_NAME = "transfer.json"
>>>>>>> 7e17932 (General backbones: tiny-medical and nano-medical, with cards, transfer tables and the commands that made them)
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
}
<<<<<<< HEAD
START, END = "<!-- figures: generated from results.json, do not edit -->", "<!-- end of figures -->"
MARK = "{figures}"  # where a section has the tables of metrics
=======
TOLERANCE = 5e-5  # figures are stored with four decimals in the card
_START, _END = "<!-- figures: generated from results.json, do not edit -->", "<!-- end of figures -->"


@dataclass(frozen=True)
class ModelFacts:
    """What a card is written from.

    Attributes:
        config: of the model.
        terms: under which the weights may be used.
        entry: the dataset in the registry, None if it is not there.
        results: results.json, {} where there is none.
        evaluations: by split, of results.json.
        pictures: file names of the pictures in the folder.
        example: where the image in attribution.png is from.
        unusual: the warning for images of another kind.
        transfer: what was measured of a backbone, see `hub.transfer_table.summary`.
    """

    config: MedMambaConfig
    terms: Terms
    entry: registry.DatasetEntry | None = None
    results: dict[str, Any] = field(default_factory=dict)
    evaluations: dict[str, Evaluation] = field(default_factory=dict)
    pictures: tuple[str, ...] = ()
    example: str = ""
    unusual: Unusual | None = None
    transfer: tuple[dict[str, Any], ...] = ()

    @property
    def is_backbone(self) -> bool:
        """Whether the model has no classifier."""
        return not self.config.num_classes

    @property
    def split(self) -> str | None:
        """The split whose figures count: test, else whatever there is."""
        return "test" if "test" in self.evaluations else next(iter(self.evaluations), None)

    @property
    def dataset(self) -> str:
        return self.entry.title if self.entry else str(self.config.training.get("dataset") or "own data")


class CardError(ValueError):
    """A model folder that lacks what a card must say; the message says what to add."""


def read_facts(folder: str | os.PathLike, licence: str | None = None, permission: str = "") -> ModelFacts:
    """Reads a model folder.

    Args:
        licence: Hub identifier of the licence of the weights; default: that of the data, from the registry.
        permission: who allowed weights to be published that carry no licence, and when.

    Raises:
        CardError: unreadable results, or a licence that the data do not allow.
        ConfigError: no configuration that can be read.
    """
    folder = Path(folder)
    config = read_config(folder)
    results: dict[str, Any] = {}
    if (folder / RESULTS_NAME).is_file():
        try:
            results = json.loads((folder / RESULTS_NAME).read_text(encoding="utf-8"))
        except ValueError as error:
            raise CardError(f"{folder / RESULTS_NAME} is not valid JSON ({error}); evaluate again") from error
    try:
        by_split = evaluations(results)
    except (KeyError, TypeError, AttributeError) as error:
        raise CardError(f"{folder / RESULTS_NAME} was not written by medmamba ({error!r}); evaluate again") from error
    try:
        entry = registry.get(str(config.training.get("dataset", "")))
    except registry.RegistryError:
        entry = None
    try:
        unusual = load_unusual(folder) if (folder / WEIGHTS_NAME).is_file() else None
    except UnusualError as error:
        raise CardError(str(error)) from error
    return ModelFacts(
        config,
        terms_of(config, entry, licence, permission),
        entry,
        results,
        by_split,
        tuple(name for name in PICTURES if (folder / name).is_file()),
        _read_example(folder),
        unusual,
        _read_transfer(folder),
    )


def _read_example(folder: Path) -> str:
    path = folder / EXAMPLE_NAME
    return str(json.loads(path.read_text(encoding="utf-8")).get("credit", "")) if path.is_file() else ""
>>>>>>> 7e17932 (General backbones: tiny-medical and nano-medical, with cards, transfer tables and the commands that made them)


def _read_transfer(folder: Path) -> tuple[dict[str, Any], ...]:
    path = folder / TRANSFER_NAME
    return tuple(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else ()


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
<<<<<<< HEAD
    """Returns the text of a card, front matter included."""
    body = "\n\n".join(f"## {title}\n\n{text}" for title, text in sections(facts, repo_id) if text)
    title = f"# {repo_id.split('/')[-1]}: MedMamba-{facts.config.architecture} for {facts.dataset}"
    return f"---\n{card_data(facts, repo_id).to_yaml()}\n---\n\n{title}\n\n> {NOTICE}\n\n{with_metrics(facts, body)}\n"
=======
    """Front matter and text."""
    body = "\n\n".join(f"## {title}\n\n{text}" for title, text in _sections(facts, repo_id) if text)
    purpose = f", a {facts.dataset}" if facts.is_backbone else f" for {facts.dataset}"
    title = f"# {repo_id.split('/')[-1]}: MedMamba-{facts.config.architecture}{purpose}"
    return f"---\n{card_data(facts, repo_id).to_yaml()}\n---\n\n{title}\n\n> {NOTICE}\n\n{_figures(facts, body)}\n"
>>>>>>> 7e17932 (General backbones: tiny-medical and nano-medical, with cards, transfer tables and the commands that made them)


def _sections(facts: ModelFacts, repo_id: str) -> list[tuple[str, str]]:
    return backbone.sections(facts, repo_id) if facts.is_backbone else sections(facts, repo_id)


def _pipeline(facts: ModelFacts) -> str:
    """The task by which the Hub lists a model."""
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
        pipeline_tag=_pipeline(facts),
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


<<<<<<< HEAD
def with_metrics(facts: ModelFacts, body: str) -> str:
    """Returns the body of a card with the tables of metrics, between two comments, in place of `MARK`."""
    if not facts.split or MARK not in body:
=======
def check_card(text: str, facts: ModelFacts) -> list[str]:
    """Everything that is wrong with a card: metadata the Hub refuses, missing sections, figures that are not those of
    results.json. Prose may be edited; figures may not."""
    from huggingface_hub import ModelCard

    try:
        data = ModelCard(text).data
    except Exception as error:  # YAML, or a model-index that cannot be read
        return [f"{CARD_NAME}: the metadata cannot be read: {error}"]
    return [f"{CARD_NAME}: {p}" for p in (*_check_metadata(data, facts), *_check_text(text, facts))]


def _check_metadata(data: Any, facts: ModelFacts) -> list[str]:
    problems = []
    for key, wanted in (("library_name", "medmamba"), ("pipeline_tag", _pipeline(facts))):
        if data.get(key) != wanted:
            problems.append(f"{key} must be {wanted}, is {data.get(key)}")
    if not isinstance(data.get("tags"), list) or not all(isinstance(tag, str) for tag in data.get("tags", [])):
        problems.append("tags must be a list of words")
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
    told = {result.metric_type: result.metric_value for result in data.get("eval_results") or []}
    if facts.split:
        overall = facts.evaluations[facts.split].overall
        expected = {METRICS[name][0]: e.value for name, e in overall.items() if name in METRICS and e.value == e.value}
        for kind in sorted(expected.keys() | told.keys()):
            if kind not in told:
                problems.append(f"model-index lacks {kind}")
            elif kind not in expected:
                problems.append(f"model-index claims {kind}, which results.json does not have")
            elif abs(float(told[kind]) - expected[kind]) > TOLERANCE:
                problems.append(f"model-index says {kind} {told[kind]}, results.json says {expected[kind]:.4f}")
    elif told:
        problems.append("model-index has figures, and there is no results.json to have them from")
    return problems


def _check_text(text: str, facts: ModelFacts) -> list[str]:
    problems = []
    if NOTICE not in text:
        problems.append(f'the notice is missing: "{NOTICE}"')
    headings = set(re.findall(r"^## (.+)$", text, re.M))
    for title, content in _sections(facts, "org/name"):
        if content and title not in headings:
            problems.append(f'the section "{title}" is missing')
    if re.search(r"\[More Information Needed\]|\bTODO\b|\bFIXME\b", text):
        problems.append("it still has a placeholder to fill in")
    for name in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text):
        if "://" not in name and name not in facts.pictures:
            problems.append(f"it shows {name}, which is not in the folder")
    if facts.split:
        generated = re.search(f"{re.escape(_START)}(.*?){re.escape(_END)}", _figures(facts, _MARK), re.S)
        present = re.search(f"{re.escape(_START)}(.*?){re.escape(_END)}", text, re.S)
        if present is None or generated is None or present[1].split() != generated[1].split():
            problems.append("its table of figures is not that of results.json; write the card again")
    return problems


_MARK = "{figures}"


def _figures(facts: ModelFacts, body: str) -> str:
    if not facts.split or _MARK not in body:
>>>>>>> 7e17932 (General backbones: tiny-medical and nano-medical, with cards, transfer tables and the commands that made them)
        return body
    return body.replace(MARK, f"{START}\n\n{facts.evaluations[facts.split].to_markdown().strip()}\n\n{END}")


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
