"""What to do about a model that is not there, where its dataset is in the registry."""

from __future__ import annotations

from ..config import ORGANISATION
from ..data import registry


def how_to_make(repo: str) -> str:
    """Returns how to train the model "medmamba/DATASET", or whom to ask for its images; "" for other names."""
    owner, _, name = repo.partition("/")
    try:
        entry = registry.get(name)
    except registry.RegistryError:
        return ""
    if owner != ORGANISATION:
        return ""
    if not entry.source.public:
        return f" The images of {entry.title} are not public. {entry.source.contact}"
    return (
        f" To make it from the public images, in a clone of medmamba: `python -m hub.make {entry.name}` (--dry-run "
        "says what that takes)."
    )
