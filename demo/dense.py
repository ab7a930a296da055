"""Segmentation models and detectors of the app: which are offered, loading them, and predicting with them."""

from __future__ import annotations

import importlib.util
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import medmamba
from medmamba.cards import DenseFacts, LicenceError, is_dense, read_dense_facts
from medmamba.pretrained import PretrainedError, fetch
from medmamba.pretrained.folder import LOADERS
from medmamba.utils.devices import pick_device
from medmamba.utils.extras import missing_text

from .gpu import on_gpu
from .service import Service, View
from .store import display_name

NEEDED = {"medmamba-segmenter": "segmentation_models_pytorch", "medmamba-detector": "torchvision"}
"""Kind of model, and the package that loading it imports."""
DEFAULT = "medmamba/pad-lesions"
"""Is first, since there are examples of its images."""
MAX_LOADED = 3
LEAST_SCORE = 0.05
"""Score from which boxes are kept, so that the slider has something to move over."""


@dataclass(frozen=True, eq=False)
class Offered:
    """A segmentation model or detector that is offered, loaded or not.

    Attributes:
        title: displayed name.
        folder: location of its files.
        facts: configuration, results and licence from its folder.
    """

    title: str
    folder: Path
    facts: DenseFacts

    @property
    def detects(self) -> bool:
        """Whether it is a detector."""
        return self.facts.task == "detection"

    @property
    def dataset(self) -> str:
        """What it was trained on, as the record of its training names it."""
        return str(self.facts.training.get("dataset") or "")

    @property
    def threshold(self) -> float:
        """Probability or score from which the model itself counts a pixel or a box."""
        config = self.facts.config
        return float(config.score if self.detects else config.thresholds[0])


@dataclass(frozen=True, eq=False)
class Dense(Offered):
    """A segmentation model or detector in memory.

    Attributes:
        model: a `MedMambaSegmenter` or `MedMambaDetector` on the device of the app.
    """

    model: Any


@dataclass(frozen=True, eq=False)
class Outlined:
    """What a model found in a file.

    Attributes:
        found: a `Segmentation`, or a `Detection`.
        dense: the model.
        threshold: that was applied.
        milliseconds: from file to result.
    """

    found: Any
    dense: Dense
    threshold: float
    milliseconds: float


class DenseModels:
    """Loads models for masks and boxes by name, and predicts with them in the prediction thread of the app.

    Args:
        names: names or folders to offer.
        device: "auto" or a torch device.
        service: whose thread is used.

    Raises:
        ValueError: two models have the same name.
    """

    def __init__(self, names: Sequence[str], device: str, service: Service):
        self._sources: dict[str, str] = {}
        for name in names:
            if self._sources.setdefault(display_name(name), name) != name:
                raise ValueError(f"two models are called {display_name(name)!r}; rename one of the folders")
        self._device, self._service = device, service
        self._offered: dict[str, Offered] = {}
        self._loaded: OrderedDict[str, Dense] = OrderedDict()
        self._lock = threading.Lock()
        self._forward = on_gpu(20)(self._predict)

    @property
    def titles(self) -> list[str]:
        """Displayed names, the default first."""
        return list(self._sources)

    def about(self, title: str | None) -> Offered:
        """Returns what is known of a model without loading it; None or "": of the first.

        Raises:
            ValueError: no such model.
            PretrainedError, ConfigError: its files cannot be read.
            ImportError: a package that it needs is not installed.
        """
        title = title or next(iter(self._sources), "")
        if title not in self._sources:
            raise ValueError(f"no model {title!r} here; available: {', '.join(self._sources)}")
        if title not in self._offered:
            folder = fetch(self._sources[title])
            try:
                facts = read_dense_facts(folder)
            except LicenceError:  # no licence stated; the page says so
                facts = read_dense_facts(folder, licence="other")
            if not can_load(facts.kind):
                raise ImportError(missing_text(NEEDED[facts.kind], facts.task, "segment"))
            self._offered[title] = Offered(title, folder, facts)
        return self._offered[title]

    def get(self, title: str | None) -> Dense:
        """Returns a model by its displayed name; None or "": the first.

        Raises:
            ValueError: no such model.
            PretrainedError, ConfigError, ImportError: it cannot be loaded.
        """
        offered = self.about(title)
        title = offered.title
        with self._lock:  # concurrent requests for one model share a single load
            if title not in self._loaded:
                model = getattr(medmamba, LOADERS[offered.facts.kind]).from_pretrained(offered.folder)
                device = pick_device(self._device)
                self._loaded[title] = Dense(title, offered.folder, offered.facts, model.to(device))
                while len(self._loaded) > MAX_LOADED:
                    self._loaded.popitem(last=False)
            self._loaded.move_to_end(title)
            return self._loaded[title]

    def predict(self, title: str | None, path: Path, view: View, threshold: float | None, **options: Any) -> Outlined:
        """Segments, or detects in, one file.

        Args:
            title: displayed name of the model; None: the first.
            threshold: probability of a pixel, or score of a box, from which it counts; None: that of the model.
            options: of `predict` of the model.

        Raises:
            ImageError: the file cannot be read.
            ValueError, PretrainedError, ConfigError, ImportError: as `get`, or an option out of range.
        """
        return self._service.run(self._forward, title, path, view, threshold, options)

    def _predict(
        self, title: str | None, path: Path, view: View, threshold: float | None, options: dict[str, Any]
    ) -> Outlined:
        dense, began = self.get(title), time.perf_counter()
        given = dict(frame=view.frame, window=view.window, **options)
        if dense.detects:
            limit = dense.threshold if threshold is None else threshold
            found = dense.model.predict(path, score=limit, **given)
        else:
            found = dense.model.predict(path, **given)
            limit = dense.threshold
            if threshold is not None and not found.exclusive:
                found, limit = found.with_thresholds(threshold), threshold
        return Outlined(found, dense, limit, 1e3 * (time.perf_counter() - began))


def split_models(names: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Returns the classifiers among some models, and the models for masks and boxes, both in order.

    A model that cannot be looked at now counts as a classifier; what is wrong is reported when it is used.
    """
    dense = tuple(name for name in names if _is_dense(name))
    return tuple(name for name in names if name not in dense), dense


def bundled_dense() -> tuple[str, ...]:
    """Returns the names of the bundled models for masks and boxes, where the packages that they need are installed.

    The default is first.
    """
    if not all(map(can_load, NEEDED)):
        return ()
    names = [name for name, folder in medmamba.bundled_models().items() if is_dense(folder)]
    return tuple(sorted(names, key=lambda name: name != DEFAULT))


def can_load(kind: str) -> bool:
    """Returns whether the package for a kind of model is installed, without importing it, which takes seconds."""
    return importlib.util.find_spec(NEEDED[kind]) is not None


def _is_dense(name: str) -> bool:
    for local in (True, False):
        try:
            return is_dense(fetch(name, local_files_only=local))
        except (PretrainedError, OSError, ValueError):
            continue
    return False
