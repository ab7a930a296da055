"""Files that a list of a dataset names."""

from __future__ import annotations

import os
from pathlib import Path

from ..data import DatasetError


def under(root: Path, name: str) -> Path:
    """Returns a path that a file of a dataset names, inside of the dataset's folder.

    Raises:
        DatasetError: it leads outside of the folder, or there is no such file.
    """
    path = root / name
    if os.path.isabs(name) or ".." in Path(name).parts:
        raise DatasetError(f"{name!r} leads out of the folder of the dataset; give paths relative to {root}")
    if not path.is_file():
        raise DatasetError(f"{root}: no file {name}; paths are relative to this folder")
    return path
