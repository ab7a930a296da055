"""Checkpoints of a run, written atomically: on disk is always a complete state."""

from __future__ import annotations

import contextlib
import json
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..utils.files import write_atomically, write_text
from ..utils.text import json_text
from .identity import differences

FORMAT = 1
LAST = "last.pt"
RUN = "run.json"
LOCK = "run.lock"


class ResumeError(RuntimeError):
    """A checkpoint that is damaged or belongs to another run."""


class CheckpointStore:
    """Stores the state of the run in `last.pt` and the weights of its best epoch in `best-<epoch>.safetensors`.

    `last.pt` names its best file; other best files are removed only once it is in place.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def __bool__(self) -> bool:
        """Returns whether there is a state to resume."""
        return (self.folder / LAST).is_file()

    def load(self) -> dict[str, Any] | None:
        """Returns the state of the run; None if there is none yet.

        Raises:
            ResumeError: the file is damaged or of another format.
        """
        if not self:
            return None
        path = self.folder / LAST
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError) as error:
            raise ResumeError(f"{path} is damaged ({error}); start over with restart=True (--restart)") from error
        if not isinstance(state, dict) or state.get("format") != FORMAT:
            raise ResumeError(f"{path} was written by another version; start over with restart=True (--restart)")
        return state

    def note_run(self, identity: dict[str, Any], table: dict[str, str]) -> None:
        """Stores the inputs of the run (see `identity`), so that a later call can report what has changed."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(self.folder / RUN, json_text({"identity": identity, "data": table}))

    def noted_run(self) -> tuple[dict[str, Any], dict[str, str]] | None:
        """Returns what `note_run` stored; None if it is missing or unreadable."""
        try:
            found = json.loads((self.folder / RUN).read_text(encoding="utf-8"))
            return dict(found["identity"]), dict(found["data"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def save(self, state: dict[str, Any]) -> None:
        """Writes `last.pt`, then removes best files that it does not name."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self.folder / LAST, lambda path: torch.save({"format": FORMAT, **state}, path))
        best = self._best(state["best"]["epoch"]) if state.get("best") else None
        for file in self.folder.glob("best-*.safetensors"):
            if file != best:
                file.unlink()

    def save_best(self, epoch: int, tensors: dict[str, Tensor]) -> None:
        """Writes the weights of the best epoch; call before the `save` that names them."""
        from safetensors.torch import save_file

        self.folder.mkdir(parents=True, exist_ok=True)
        # `contiguous`: convolution weights may be channels_last in memory, which safetensors cannot store.
        tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        write_atomically(self._best(epoch), lambda path: save_file(tensors, path))

    def load_best(self, epoch: int) -> dict[str, Tensor]:
        """Returns the weights that `save_best` wrote."""
        from safetensors.torch import load_file

        return load_file(self._best(epoch))

    def clear(self) -> None:
        """Removes everything that this class wrote."""
        patterns = (LAST, RUN, "best-*.safetensors", "*.part", ".*.part")  # partial files of a killed process too
        for file in [file for pattern in patterns for file in self.folder.glob(pattern)]:
            file.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # it may hold the lock of this run or other files
            self.folder.rmdir()

    def _best(self, epoch: int) -> Path:
        return self.folder / f"best-{epoch:04d}.safetensors"


def check_same_run(store: CheckpointStore, identity: dict[str, Any], table: dict[str, str]) -> None:
    """Checks that the stored run, if any, has the same inputs.

    Raises:
        ResumeError: the store holds a run with other inputs; the message says which, and what to do.
    """
    noted = store.noted_run()
    if not store or noted is None:  # nothing to resume, or the trainer compares with the identity in the checkpoint
        return
    if changed := differences(identity, noted[0], table, noted[1]):
        raise another_run(store, changed)


def another_run(store: CheckpointStore, changed: str) -> ResumeError:
    """Returns the error for a store that holds a run with other inputs; `changed` is from `differences`."""
    return ResumeError(
        f"{store.folder} holds an unfinished run with another {changed}. To resume it, restore that; otherwise use "
        "another output folder, or start over with restart=True (--restart)"
    )
