"""Loads the models of the app on first use and caches them."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from medmamba import MedMamba
from medmamba.cards import LicenceError, ModelFacts, read_facts
from medmamba.config import MedMambaConfig
from medmamba.explain import Speed, measure_speed
from medmamba.inference.fitted import in_force
from medmamba.inference.ood import Unusual
from medmamba.inference.predict import predict_logits
from medmamba.inference.similar import NAME as GALLERY
from medmamba.inference.similar import Gallery, load_gallery
from medmamba.kernels import resolve_backend
from medmamba.metrics.calibration import Calibration
from medmamba.pretrained import PretrainedError, fetch
from medmamba.utils.devices import pick_device

MAX_LOADED = 6


@dataclass(eq=False)
class Loaded:
    """A model in memory.

    Attributes:
        source: name or folder it was loaded from.
        title: displayed name.
        folder: location of its files.
        model: as loaded, for explanations.
        fused: fused for faster prediction.
        facts: configuration, results and licence from its folder.
        licence_known: False if no licence was stated.
    """

    source: str
    title: str
    folder: Path
    model: MedMamba
    fused: MedMamba
    facts: ModelFacts
    licence_known: bool

    @property
    def unusual(self) -> Unusual | None:
        """Out-of-distribution detector on features, or None if the model has none."""
        return self.model.unusual

    @property
    def config(self) -> MedMambaConfig:
        return self.model.config

    @property
    def device(self) -> torch.device:
        return self.model.patch_embed.proj.weight.device

    @property
    def backend(self) -> str:
        """Name of the scan backend in use."""
        return resolve_backend(self.device, self.model.patch_embed.proj.weight.dtype)

    @cached_property
    def calibration(self) -> Calibration | None:
        """Calibration, or None if the model was not calibrated."""
        return Calibration.from_dict(self.config.calibration, self.config.task) if self.config.calibration else None

    @cached_property
    def speed(self) -> Speed:
        """Seconds per image of an explanation on this machine, measured on first use."""
        return measure_speed(self.model)

    @cached_property
    def gallery(self) -> Gallery | None:
        """Training images to show as similar ones, or None if the model has none.

        Raises:
            SimilarError: the file is damaged.
        """
        return load_gallery(self.folder)

    @property
    def compares(self) -> bool:
        """Whether answers need the features of the image, to find training images like it."""
        return (self.folder / GALLERY).is_file()

    @property
    def decide(self) -> str | None:
        """The argument `decide` of `predict`: all decisions that are valid for the model, or None if it has none."""
        return "all" if in_force(self.fused).config.decisions else None

    @property
    def calibrated(self) -> bool:
        """Whether a temperature was fitted, so that scores can be shown as probabilities."""
        return self.calibration is not None and self.calibration.method == "temperature"


class ModelStore:
    """Loads models by name or folder and keeps the most recently used ones in memory.

    Args:
        names: models available to all visitors, the default first.
        device: "auto" or a torch device.

    Raises:
        PretrainedError, ConfigError: the default model cannot be loaded.
        ValueError: no such device.
    """

    def __init__(self, names: tuple[str, ...], device: str = "auto"):
        self.names = names
        self.device = pick_device(device)
        self._loaded: OrderedDict[str, Loaded] = OrderedDict()
        self._lock = threading.Lock()
        self.default = self.get(names[0])
        if self.device.type == "cpu":  # warm-up: the first run takes several times as long
            config = self.default.config
            predict_logits(self.default.fused, torch.zeros(1, config.in_chans, *config.preprocess.input_size))

    def get(self, source: str, title: str | None = None) -> Loaded:
        """Returns the model, loading it unless it is in memory.

        Raises:
            PretrainedError, ConfigError: it cannot be loaded.
        """
        with self._lock:  # concurrent requests for one model share a single load
            if source in self._loaded:
                self._loaded.move_to_end(source)
                return self._loaded[source]
            loaded = self._load(source, title or display_name(source))
            self._loaded[source] = loaded
            while len(self._loaded) > MAX_LOADED:
                self._loaded.popitem(last=False)
            return loaded

    def forget(self, source: str) -> None:
        """Drops a model from memory."""
        with self._lock:
            self._loaded.pop(source, None)

    def _load(self, source: str, title: str) -> Loaded:
        folder = fetch(source, sidecars=True)
        model = MedMamba.from_pretrained(folder).to(self.device)
        if not model.config.num_classes:
            raise PretrainedError(f"{title} has no classifier: train one with `medmamba train --from {title}`")
        try:
            facts, known = read_facts(folder), True
        except LicenceError:
            facts, known = read_facts(folder, licence="other"), False
        return Loaded(source, title, folder, model, model.fuse(), facts, known)


def display_name(source: str) -> str:
    """Returns the displayed name of a model: a folder without its path."""
    return Path(source).name if Path(source).is_dir() else source
