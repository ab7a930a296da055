"""What a model card is written from: the configuration, results and pictures in a model folder."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..config import MedMambaConfig
from ..data import registry
from ..evaluation import RESULTS_NAME, evaluations
from ..evaluation.corruptions import Corruptions, load_corruptions
from ..evaluation.decide import DECISIONS_NAME
from ..inference import Unusual, UnusualError, load_unusual
from ..metrics import Evaluation
from ..pretrained import read_config
from ..utils.checksums import WEIGHTS_NAME, file_hash
from ..utils.strict_json import StrictJsonError, read_json
from .licences import Terms, terms_of

EXAMPLE_NAME = "attribution.json"
TRANSFER_NAME = "transfer.json"
SHORTCUTS_NAME = "shortcuts.json"
PICTURES = ("confusion.png", "reliability.png", "roc.png", "attribution.png")
MAX_FILE = 64 * 2**20  # bytes


@dataclass(frozen=True)
class ModelFacts:
    """What a card is written from.

    Attributes:
        config: configuration of the model.
        terms: terms of use of the weights.
        entry: registry entry of the dataset; None if it has none.
        results: content of results.json; {} where there is none.
        evaluations: evaluations in results.json, by split.
        pictures: file names of the pictures in the folder.
        example: source of the image in attribution.png.
        unusual: OOD detector, if the model has one.
        transfer: rows of transfer.json, for a backbone; see `hub.transfer_table.summary`.
        corruptions: errors on corrupted images, if measured for these weights; see `hub.corruptions`.
        decided: content of decisions.json, how the decisions in the configuration fare; {} where there is none.
        shortcuts: rows of shortcuts.json by classifier, see `hub.shortcuts`; {} where there is none.
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
    corruptions: Corruptions | None = None
    decided: dict[str, Any] = field(default_factory=dict)
    shortcuts: dict[str, Any] = field(default_factory=dict)

    @property
    def is_backbone(self) -> bool:
        """Whether the model has no classifier."""
        return not self.config.num_classes

    @property
    def split(self) -> str | None:
        """Split whose metrics are reported: "test" if evaluated, else the first that was."""
        return "test" if "test" in self.evaluations else next(iter(self.evaluations), None)

    @property
    def unit(self) -> str:
        """What images are grouped by: "lesion", or "patient" where the registry does not say."""
        return (self.entry.group_unit if self.entry else None) or "patient"

    @property
    def dataset(self) -> str:
        """Name of the dataset for people."""
        return self.entry.title if self.entry else str(self.config.training.get("dataset") or "own data")


class CardError(ValueError):
    """A model folder without what a card must state; the message says what to add."""


def read_facts(folder: str | os.PathLike, licence: str | None = None, permission: str = "") -> ModelFacts:
    """Reads a model folder.

    Args:
        licence: Hub identifier of the licence of the weights; default: that of the data, from the registry.
        permission: who permitted the publication of weights without a licence, and when.

    Raises:
        CardError: results that cannot be read.
        LicenceError: a licence that is unknown, or that the data do not allow.
        ConfigError: a configuration that cannot be read.
    """
    folder = Path(folder)
    config = read_config(folder)
    results = read_results(folder)
    try:
        entry = registry.get(str(config.training.get("dataset", "")))
    except registry.RegistryError:
        entry = None
    try:
        by_split = _with_units(results, entry)
    except (KeyError, TypeError, AttributeError) as error:
        raise CardError(f"{folder / RESULTS_NAME} was not written by medmamba ({error!r}); evaluate again") from error
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
        str(_read_object(folder / EXAMPLE_NAME, "draw the example again").get("credit", "")),
        unusual,
        tuple(_read_object(folder / TRANSFER_NAME, "write it again: python -m hub.transfer table").get("rows", ())),
        _corruptions(folder),
        _read_object(folder / DECISIONS_NAME, "write it again: medmamba decide ... --write"),
        dict(_read_object(folder / SHORTCUTS_NAME, "measure again: python -m hub.shortcuts").get("rows", {})),
    )


def _corruptions(folder: Path) -> Corruptions | None:
    """Returns the errors on corrupted images in the folder; None where there are none, or of other weights."""
    try:
        found = load_corruptions(folder)
    except ValueError as error:
        raise CardError(str(error)) from error
    if found is None or not (folder / WEIGHTS_NAME).is_file():
        return None
    return found if found.weights == file_hash(folder / WEIGHTS_NAME) else None


def read_results(folder: str | os.PathLike) -> dict[str, Any]:
    """Returns the content of `results.json` in a model folder, {} where there is none.

    Raises:
        CardError: not strict JSON, or not an object.
    """
    return _read_object(Path(folder) / RESULTS_NAME, "evaluate the model again")


def _with_units(results: dict[str, Any], entry: registry.DatasetEntry | None) -> dict[str, Evaluation]:
    """Returns the evaluations by split, with the unit of the registry ("lesion") where the results record none."""
    found = evaluations(results)
    if not entry or not entry.group_pattern or not entry.group_unit:
        return found
    return {
        split: evaluation if "unit" in results["splits"][split] else replace(evaluation, unit=entry.group_unit)
        for split, evaluation in found.items()
    }


def _read_object(path: Path, advice: str) -> dict[str, Any]:
    """Returns the JSON object in a file, {} where there is no file.

    Raises:
        CardError: not strict JSON, or not an object.
    """
    if not path.is_file():
        return {}
    try:
        found = read_json(path, MAX_FILE)
    except StrictJsonError as error:
        raise CardError(f"{path} is not valid JSON ({error}); {advice}") from error
    if not isinstance(found, dict):
        raise CardError(f"{path} holds {type(found).__name__}, expected an object; {advice}")
    return found
