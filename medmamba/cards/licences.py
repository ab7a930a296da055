"""Under which terms weights may be published, from the terms of the data they were trained on."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from ..config import MedMambaConfig
from ..data import registry
from ..data.registry import DatasetEntry

UPSTREAM_URL = "https://github.com/YubiaoYue/MedMamba"
# https://huggingface.co/docs/hub/repositories-licenses, those that weights or data are likely to be under
# fmt: off
HUB_LICENCES = frozenset({
    "apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "bsd-3-clause-clear", "openrail", "openrail++", "afl-3.0",
    "isc", "mpl-2.0", "gpl-2.0", "gpl-3.0", "lgpl-2.1", "lgpl-3.0", "agpl-3.0", "cc0-1.0", "cc-by-2.0", "cc-by-2.5",
    "cc-by-3.0", "cc-by-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0",
    "cc-by-nd-4.0", "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0", "cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0",
    "cdla-sharing-1.0", "cdla-permissive-1.0", "cdla-permissive-2.0", "odc-by", "odbl", "pddl", "c-uda",
    "etalab-2.0", "eupl-1.2", "unlicense", "other",
})
# fmt: on


class LicenceError(ValueError):
    """Terms that are missing, unknown, or wider than those of the data."""


@dataclass(frozen=True)
class Terms:
    """Terms of a set of weights.

    Attributes:
        licence: Hub identifier; "other" with `name` and `link`.
        non_commercial: whether commercial use is excluded.
        reason: where these terms come from, for people.
        needs_permission: the weights belong to others who gave no licence, and nobody's permission is on record.
    """

    licence: str
    name: str | None = None
    link: str | None = None
    non_commercial: bool = False
    reason: str = ""
    needs_permission: bool = False


def terms_of(
    config: MedMambaConfig, entry: DatasetEntry | None, licence: str | None = None, permission: str = ""
) -> Terms:
    """Returns the terms of a model's weights: those of the data, unless the weights are somebody else's.

    Args:
        entry: the dataset, where the registry knows it.
        licence: Hub identifier that the publisher wants instead.
        permission: who allowed unlicensed weights to be published, and when.

    Raises:
        LicenceError: no licence can be found, the Hub does not know it, or the data do not allow it.
    """
    if licence is not None and licence not in HUB_LICENCES:
        raise LicenceError(f"the Hub does not know a licence {licence!r}; it knows {', '.join(sorted(HUB_LICENCES))}")
    if config.training.get("origin"):
        return _terms_of_converted(config, permission)
    if entry is None:
        stated = licence or hub_licence(config.training.get("licence"))
        if stated is None:
            raise LicenceError(
                f"the terms of the data ({config.training.get('dataset') or 'unnamed'}) are not on record; say under "
                "which licence the weights may be used, e.g. --license cc-by-4.0"
            )
        named: dict[str, Any] = {}
        if stated == "other":  # which the Hub accepts only with a name and a link
            record = config.training
            named = {"name": record.get("licence_name"), "link": record.get("licence_link")}
        return Terms(stated, **named, non_commercial="-nc-" in f"{stated}-", reason="as its publisher states")
    reason = f"trained on {entry.title}, whose images are under {entry.licence.id or 'terms of their own'}"
    of_data = hub_licence(entry.licence.id)
    non_commercial = bool(entry.licence.non_commercial)
    if start := _non_commercial_start(config):
        reason += f", from weights trained on {start.title}, which is under {start.licence.id}"
        non_commercial, of_data = True, "cc-by-nc-4.0" if of_data == "cc-by-4.0" else of_data
    unlicensed = [start for start in _starts(config) if start.licence.id is None]
    if unlicensed and not non_commercial:
        reason += f", from weights that have also seen images of {unlicensed[0].title}, which have no standard licence"
        return Terms("other", "mixed-see-card", "README.md", reason=reason)
    if of_data is None or of_data == "other":
        if licence not in (None, "other"):
            raise LicenceError(
                f"{entry.title} has terms of its own ({entry.licence.note}); {licence} is not among them"
            )
        name = re.sub(r"[^a-z0-9.-]+", "-", (entry.licence.id or f"{entry.name}-terms").lower())
        return Terms("other", name, entry.licence.url or entry.source.url, non_commercial, reason)
    if licence and non_commercial and "-nc-" not in f"{licence}-":
        raise LicenceError(f"{licence} would allow commercial use, and these weights were {reason}")
    return Terms(licence or of_data, non_commercial=non_commercial or "-nc-" in f"{licence}-", reason=reason)


def hub_licence(spdx: str | None) -> str | None:
    """Returns the Hub's identifier of an SPDX licence: "other" if the Hub has none, None if there is no licence."""
    if not spdx:
        return None
    return spdx.lower() if spdx.lower() in HUB_LICENCES else "other"


def _non_commercial_start(config: MedMambaConfig) -> DatasetEntry | None:
    """Returns a non-commercial dataset that the weights were trained on before, according to their record."""
    return next((entry for entry in _starts(config) if entry.licence.non_commercial), None)


def _starts(config: MedMambaConfig) -> list[DatasetEntry]:
    """Returns the registry's datasets that the weights were trained on before, according to their record."""
    found = []
    for name in [str(config.training.get("init") or ""), *config.training.get("pretraining", [])]:
        try:
            found.append(registry.get(re.split(r"[/@]", name)[1 if re.match(r"[\w.-]+/[\w.-]", name) else 0]))
        except registry.RegistryError:
            continue
    return found


def _terms_of_converted(config: MedMambaConfig, permission: str) -> Terms:
    origin = config.training["origin"]
    link = origin.get("url") or UPSTREAM_URL
    if permission:
        return Terms("other", "by-permission-of-the-authors", link, reason=f"published with permission: {permission}")
    return Terms(
        "other",
        "no-licence-stated",
        link,
        reason="the authors of the checkpoint stated no licence, so all rights are theirs",
        needs_permission=True,
    )
