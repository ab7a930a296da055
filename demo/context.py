"""The context shared by all tabs: options, models, sessions and the prediction service."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from medmamba.cards import LicenceError, ModelFacts, read_facts
from medmamba.inference.ood import Unusual, load_unusual
from medmamba.inference.suggest import Suggestion
from medmamba.pretrained import fetch
from medmamba.utils.checksums import WEIGHTS_NAME

from .options import Options
from .service import Service, View
from .sessions import Session, Sessions
from .store import Loaded, ModelStore, display_name


@dataclass(frozen=True, eq=False)
class Known:
    """A model that is present on this machine.

    Attributes:
        title: displayed name.
        facts: configuration, results and licence from its folder.
        bytes: size of the weights.
        folder: location of its files.
    """

    title: str
    facts: ModelFacts
    bytes: int
    folder: Path

    @cached_property
    def unusual(self) -> Unusual | None:
        """Its out-of-distribution detector, read on first use; None if it has none, or a damaged one."""
        try:
            return load_unusual(self.folder)
        except (OSError, ValueError):  # reported when the model is used
            return None


@dataclass
class Context:
    """State of a running app.

    Raises:
        ValueError: two models have the same name.
    """

    options: Options
    store: ModelStore
    sessions: Sessions
    service: Service = field(init=False)
    known: dict[str, Known] = field(init=False)

    def __post_init__(self) -> None:
        self.service = Service(self.store)
        self._sources: dict[str, str] = {}
        for name in self.store.names:
            if self._sources.setdefault(display_name(name), name) != name:
                raise ValueError(f"two models are called {display_name(name)!r}; rename one of the folders")
        self.known = {found.title: found for found in known_models(self.store.names)}

    @property
    def default_title(self) -> str:
        return display_name(self.store.names[0])

    @property
    def starts(self) -> list[tuple[str, str]]:
        """(label, name) pairs of what training can start from: the general backbones, then the models."""
        backbones = [(f"General backbone · {name.rpartition('/')[2]}", name) for name in self.options.backbones]
        return [*backbones, *self.choices(None)]

    def first_start(self, light: bool) -> str:
        """Returns the name of what training starts from by default: a general backbone, or a model if there is none.

        Args:
            light: of several, the smallest, which trains in minutes on a CPU; otherwise the first.
        """
        if not self.options.backbones:
            return self.lightest_title if light else self.default_title
        return min(self.options.backbones, key=weights_size) if light else self.options.backbones[0]

    @property
    def lightest_title(self) -> str:
        """Name of the smallest model, which fine-tunes in minutes on a CPU."""
        return min(self.known.values(), key=lambda known: known.bytes).title if self.known else self.default_title

    def titles(self, session: Session | None) -> list[str]:
        """Returns the names of the available models, the visitor's own first; never paths of the server."""
        return [*(session.models if session else ()), *self._sources]

    def choices(self, session: Session | None) -> list[tuple[str, str]]:
        """Returns (label, name) pairs for a model menu."""
        return [(self._label(title), title) for title in self.titles(session)]

    def _label(self, title: str) -> str:
        known = self.known.get(title)
        if known is None or known.facts.entry is None:
            return title
        modality = known.facts.entry.modality
        return f"{modality[:1].upper()}{modality[1:]} · {title}"

    def source(self, session: Session | None, title: str | None) -> str:
        """Resolves a name to the source that `ModelStore.get` takes.

        Raises:
            ValueError: no such model is available to this visitor.
        """
        title = title or self.default_title
        if session and title in session.models:
            return str(session.models[title])
        if title not in self._sources:
            raise ValueError(f"no model {title!r} here; available: {', '.join(self.titles(session))}")
        return self._sources[title]

    def start(self, title: str) -> str:
        """Resolves a name of `starts` to what `medmamba train --from` takes.

        Raises:
            ValueError: no such start.
        """
        return title if title in self.options.backbones else self.source(None, title)

    def suggest(self, title: str, path: Path, view: View | None = None, ask: bool = False) -> Suggestion | None:
        """Returns the model for an image that this one refused, or None.

        Args:
            ask: ask the best candidates themselves, instead of comparing pixels alone.
        """
        others = {k.title: (k.facts.config, k.unusual) for k in self.known.values() if k.title != title}
        load = (lambda name: self.load(None, name).fused) if ask else None
        return self.service.suggest(path, view, others, load)

    def load(self, session: Session | None, title: str | None) -> Loaded:
        """Loads a model by name.

        Raises:
            ValueError: no such model, or it cannot be loaded.
        """
        return self.store.get(self.source(session, title), title or self.default_title)


def weights_size(name: str) -> int:
    """Returns the size in bytes of the weights of a model that is present on this machine.

    Raises:
        PretrainedError: it is not.
    """
    return (fetch(name, local_files_only=True) / WEIGHTS_NAME).stat().st_size


def known_models(names: tuple[str, ...]) -> list[Known]:
    """Returns the models that are already on this machine, without network access."""
    found = []
    for name in names:
        try:
            folder = fetch(name, local_files_only=True, sidecars=True)
            try:
                facts = read_facts(folder)
            except LicenceError:  # no licence stated; the page says so
                facts = read_facts(folder, licence="other")
            found.append(Known(display_name(name), facts, (folder / WEIGHTS_NAME).stat().st_size, folder))
        except (OSError, ValueError):  # missing or damaged: reported when it is used
            continue
    return found
