"""`medmamba predict --record`: a page for the record of the images of one call."""

from __future__ import annotations

import argparse
import dataclasses
import os
from pathlib import Path
from typing import Any


def check_record(args: argparse.Namespace) -> None:
    """Raises ValueError for options that cannot be combined with a page, or a path that cannot be written."""
    from ..reporting.record import check_record_path

    for name in ("out", "per", "ray"):
        if getattr(args, name):
            raise ValueError(f"--record cannot be combined with --{name}: leave one of them out")
    check_record_path(Path(args.record))


def shortened(result: Any, top_k: int | None) -> Any:
    """Returns a prediction with its most probable classes only; failures as they are."""
    return dataclasses.replace(result, top=result.top[:top_k]) if hasattr(result, "top") else result


class Page:
    """Collects the images of a page; reads each once more, for its picture."""

    def __init__(
        self,
        path: Path,
        name: str,
        folder: str | os.PathLike,
        config: Any,
        frame: int | None,
        window: tuple[float, float] | None,
    ) -> None:
        from ..reporting.record import RecordedModel

        self.path, self.frame, self.window = path, frame, window
        self.model = RecordedModel.of(name, folder, config)
        self.entries: list[Any] = []

    def add(self, source: Any, result: Any) -> None:
        """Adds an image.

        Raises:
            ValueError: there are too many for a page.
        """
        from ..imaging.ahead import read_source
        from ..inference.predict import Failure
        from ..reporting.record import MOST_IMAGES, Entry

        if len(self.entries) == MOST_IMAGES:
            raise ValueError(f"a page for the record shows at most {MOST_IMAGES} images: give fewer, or use --out")
        image = None if isinstance(result, Failure) else read_source(source, self.frame, self.window)
        self.entries.append(Entry.of(source, result, image))

    def write(self) -> Path:
        """Writes the page; returns its path."""
        from ..reporting.record import write_record

        return write_record(self.path, self.model, self.entries)
