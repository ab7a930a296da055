"""Where a run stands, on disk: always either the state before or the state after, never half of one."""

from __future__ import annotations

import contextlib
import json
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..utils.files import write_atomically, write_text
from .identity import differences

__all__ = [
    "CheckpointStore",
    "ResumeError",
    "another_run",
    "check_same_run",
    "write_text",
]  # write_text: where it was before

FORMAT = 1
LAST = "last.pt"
RUN = "run.json"
LOCK = "run.lock"


class ResumeError(RuntimeError):
    """A checkpoint that is damaged or belongs to another run."""


class CheckpointStore:
    """`last.pt`, the state of the run, and `best-<epoch>.safetensors`, the weights of its best epoch so far.

    `last.pt` names the best file it belongs with; others are removed only after it is safely in place.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def __bool__(self) -> bool:
        """Whether there is a state to go on from."""
        return (self.folder / LAST).is_file()

    def load(self) -> dict[str, Any] | None:
        """The state of the run; None if there is none yet.

        Raises:
            ResumeError: damaged, or of another format.
        """
        if not self:
            return None
        path = self.folder / LAST
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError) as error:
            raise ResumeError(f"{path} is damaged ({error}); start again with restart=True (--restart)") from error
        if not isinstance(state, dict) or state.get("format") != FORMAT:
            raise ResumeError(f"{path} was written by another version; start again with restart=True (--restart)")
        return state

    def note_run(self, identity: dict[str, Any], table: dict[str, str]) -> None:
        """Keeps what the run is made of (see `identity`), to say what has changed when it is to go on."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(self.folder / RUN, json.dumps({"identity": identity, "data": table}))

    def noted_run(self) -> tuple[dict[str, Any], dict[str, str]] | None:
        """What `note_run` was given; None where there is none that can be read."""
        try:
            found = json.loads((self.folder / RUN).read_text(encoding="utf-8"))
            return dict(found["identity"]), dict(found["data"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def save(self, state: dict[str, Any]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self.folder / LAST, lambda path: torch.save({"format": FORMAT, **state}, path))
        best = self._best(state["best"]["epoch"]) if state.get("best") else None
        for file in self.folder.glob("best-*.safetensors"):
            if file != best:
                file.unlink()

    def save_best(self, epoch: int, tensors: dict[str, Tensor]) -> None:
        from safetensors.torch import save_file

        self.folder.mkdir(parents=True, exist_ok=True)
        # `contiguous`: convolution weights may be channels_last in memory, which the format does not know.
        tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        write_atomically(self._best(epoch), lambda path: save_file(tensors, path))

    def load_best(self, epoch: int) -> dict[str, Tensor]:
        from safetensors.torch import load_file

        return load_file(self._best(epoch))

    def clear(self) -> None:
        """Removes everything that this class wrote."""
        patterns = (LAST, RUN, "best-*.safetensors", "*.part", ".*.part")  # what a killed process left too
        for file in [file for pattern in patterns for file in self.folder.glob(pattern)]:
            file.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # the lock of this run lies in it, or somebody else's file
            self.folder.rmdir()

    def _best(self, epoch: int) -> Path:
        return self.folder / f"best-{epoch:04d}.safetensors"


def check_same_run(store: CheckpointStore, identity: dict[str, Any], table: dict[str, str]) -> None:
    """
    Raises:
        ResumeError: the store holds a run of other inputs; the message says which, and how to go on.
    """
    noted = store.noted_run()
    if (
        not store or noted is None
    ):  # nothing to go on from, or the trainer compares with what the checkpoint itself says
        return
    if changed := differences(identity, noted[0], table, noted[1]):
        raise another_run(store, changed)


def another_run(store: CheckpointStore, changed: str) -> ResumeError:
    return ResumeError(
        f"{store.folder} holds an unfinished run with another {changed}. To go on with it, put that back as it was; "
        "else use another output folder, or start again with restart=True (--restart)"
    )
