"""What every tab works with."""

from __future__ import annotations

from dataclasses import dataclass, field

from .options import Options
from .service import Service
from .sessions import Session, Sessions
from .store import Loaded, ModelStore, display_name


@dataclass
class Context:
    """One running app."""

    options: Options
    store: ModelStore
    sessions: Sessions
    service: Service = field(init=False)

    def __post_init__(self) -> None:
        self.service = Service(self.store)
        self._sources = {display_name(name): name for name in self.store.names}

    @property
    def default_title(self) -> str:
        return display_name(self.store.names[0])

    def titles(self, session: Session | None) -> list[str]:
        """Names of the models on offer, a visitor's own first. Never the server's paths."""
        return [*(session.models if session else ()), *self._sources]

    def source(self, session: Session | None, title: str | None) -> str:
        """What `ModelStore.get` takes.

        Raises:
            ValueError: no such model is on offer to this visitor.
        """
        title = title or self.default_title
        if session and title in session.models:
            return str(session.models[title])
        if title not in self._sources:
            raise ValueError(f"no model {title!r} here; there are {', '.join(self.titles(session))}")
        return self._sources[title]

    def load(self, session: Session | None, title: str | None) -> Loaded:
        """The model of that name.

        Raises:
            ValueError: as `source`, or it cannot be loaded.
        """
        return self.store.get(self.source(session, title), title or self.default_title)
