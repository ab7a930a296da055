"""Remembers that a set has passed the search for leakage, which decodes every image."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from ..utils.files import write_text
from ..utils.text import json_text

NAME = "checked.json"
_KEPT = 100


class Checked:
    """Whether the images of a run have passed `check_leakage` before; true or false like a bool.

    Args:
        folder: of decoded images, in which this is noted; None: nothing is remembered.
        identity: of the run: its images by content, and the code that reads them.
        allow, duplicates: as for `check_leakage`.
    """

    def __init__(
        self, folder: Path | None, identity: dict[str, Any], allow: Collection[str] = (), duplicates: bool = True
    ) -> None:
        self._file = None if folder is None else folder / NAME
        self._key = " ".join([identity["data"], identity["reader"], str(duplicates), *sorted(allow)])

    def __bool__(self) -> bool:
        return self._key in self._keys()

    def note(self) -> None:
        """Notes that they have passed; a folder that cannot be written is reported by the cache itself."""
        if self._file is None:
            return
        with contextlib.suppress(OSError):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            write_text(self._file, json_text([*self._keys()[-_KEPT:], self._key]))

    def _keys(self) -> list[str]:
        if self._file is None:
            return []
        try:
            found = json.loads(self._file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return []
        return [key for key in found if isinstance(key, str)] if isinstance(found, list) else []
