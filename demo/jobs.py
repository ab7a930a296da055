"""A fine-tuning run: `medmamba train` in a process of its own, which can be watched and ended at any time."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import re
import subprocess
import sys
import time
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medmamba.cli.train import STOPPED
from medmamba.data import DatasetError, ImageDataset, make_splits, open_dataset, val_from_train
from medmamba.evaluation import RESULTS_NAME, evaluations
from medmamba.metrics import Evaluation

from .options import Limits

FRACTIONS = (0.6, 0.2, 0.2)
_PERCENT = re.compile(rb"(\d+)%\|")
_LOSS = re.compile(rb"epoch (\d+) loss (\d+\.\d+)")


@dataclass(frozen=True)
class Plan:
    """An uploaded set that was looked through and may be trained on.

    Attributes:
        data: the zip file.
        index: with its splits, as they will be used.
        made: whether the splits are made here rather than in the file.
        val_taken: whether the file has train and test alone, so that val is a part of its train.
    """

    data: Path
    index: ImageDataset
    made: bool
    val_taken: bool = False

    @property
    def batch_size(self) -> int:
        """Small sets need small batches: about ten steps an epoch."""
        return min(32, max(4, self.index.split_sizes.get("train", 0) // 10))


@dataclass
class Progress:
    """How far a job is.

    Attributes:
        share: of the whole, 0 to 1.
        history: one row per epoch, as in `history.csv`.
        losses: (epochs passed, running loss of the epoch) as last shown.
        seconds: since the start. left: estimate, None before there is one.
    """

    share: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)
    losses: list[tuple[float, float]] = field(default_factory=list)
    seconds: float = 0.0
    left: float | None = None


class JobError(RuntimeError):
    """Training ended with this message."""


def plan(path: Path, limits: Limits) -> Plan:
    """Looks through a zip of class folders without unpacking it.

    Raises:
        DatasetError: too large, unsafe (paths out of it, links, archives in it, bombs) or not a set of images.
    """
    if path.stat().st_size > limits.zip_mb * 2**20:
        raise DatasetError(f"{path.name} is larger than {limits.zip_mb} MB; reduce the images or take fewer")
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(info.file_size for info in archive.infolist())
            count = len(archive.infolist())
    except zipfile.BadZipFile as error:
        raise DatasetError(f"{path.name} is not a complete zip file; pack the folder again") from error
    if unpacked > limits.zip_unpacked_mb * 2**20:
        raise DatasetError(f"{path.name} unpacks to more than {limits.zip_unpacked_mb} MB; reduce the images")
    if count > 4 * limits.zip_images:
        raise DatasetError(f"{path.name} holds {count} files; the limit is {limits.zip_images} images")
    index = open_dataset(path)
    if len(index) > limits.zip_images:
        raise DatasetError(f"{len(index)} images; the limit here is {limits.zip_images}. `medmamba train` has none")
    if len(index.classes) > limits.zip_classes:
        raise DatasetError(f"{len(index.classes)} classes; the limit here is {limits.zip_classes}")
    made, val_taken = not any(index.splits), False
    if made:
        rarest = min(index.class_counts)
        if rarest < 5:
            raise DatasetError(f"a class has only {rarest} images; five of each are the least that can be divided")
        index = make_splits(index, FRACTIONS)
    elif val_taken := set(index.split_sizes) == {"train", "test"}:
        index = val_from_train(index)  # as the command does by itself
    for split in ("train", "val"):
        if not index.split_sizes.get(split):
            raise DatasetError(
                f"there are split folders, but none called {split!r}; add it, or use class folders alone"
            )
    return Plan(path, index, made, val_taken)


class Job:
    """One run. Ends by itself, by `stop`, or with the app."""

    def __init__(self, plan: Plan, base: str, epochs: int, folder: Path, limits: Limits, device: str):
        self.out = folder / "model"
        self.epochs = epochs
        self.plan = plan
        self._minutes = limits.train_minutes
        self._started = time.monotonic()
        self._progress = Progress()
        self._errors = folder / "stderr.txt"
        command = [sys.executable, "-m", "medmamba", "train", "--data", str(plan.data), "--out", str(self.out)]
        command += ["--recipe", "finetune", "--from", base, "--epochs", str(epochs), "--device", device]
        command += ["--batch-size", str(plan.batch_size), "--set", f"warmup_epochs={min(2, epochs - 1)}"]
        command += ["--max-seconds", str(60 * limits.train_minutes), "--finish-early"]
        command += ["--checkpoint-seconds", "3600"]
        if plan.made:
            command += ["--split", ",".join(map(str, FRACTIONS))]
        # Its input is closed and its output kept: nothing of a visitor's data reaches the server's log.
        with open(self._errors, "wb") as errors:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=errors
            )
        if hasattr(os, "setpriority"):
            with contextlib.suppress(OSError):  # it may have ended already
                os.setpriority(os.PRIO_PROCESS, self._process.pid, 10)  # pages answer first
        atexit.register(self.stop)

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def progress(self) -> Progress:
        """What can be known now."""
        found = self._progress
        found.seconds = time.monotonic() - self._started
        path = self.out / "history.jsonl"
        if path.is_file():
            found.history = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        tail = self._tail()
        if found.history or _LOSS.search(tail):  # before, the bars are those of reading the images
            if percent := _PERCENT.findall(tail):
                found.share = max(found.share, int(percent[-1]) / 100)
            if loss := _LOSS.findall(tail):
                point = (found.share * self.epochs, float(loss[-1][1]))
                if not found.losses or point[0] > found.losses[-1][0]:
                    found.losses.append(point)
        if found.share > 0.02:
            found.left = found.seconds / found.share - found.seconds
        return found

    def result(self) -> dict[str, Evaluation]:
        """Scores of "val" and, where there is such a split, "test".

        Raises:
            JobError: training failed; the message says why.
        """
        code = self._process.wait()
        if code == 0 and (self.out / RESULTS_NAME).is_file():
            return evaluations(json.loads((self.out / RESULTS_NAME).read_text(encoding="utf-8")))
        if code == STOPPED:
            raise JobError(
                f"the first epoch did not end within the {self._minutes:g} minutes there are; take fewer images "
                "or a smaller model"
            )
        raise JobError(self._message())

    def stop(self) -> None:
        """Ends the process, if it still runs."""
        if self.running:
            self._process.kill()
            self._process.wait()
        atexit.unregister(self.stop)

    def _tail(self) -> bytes:
        with open(self._errors, "rb") as stream:
            stream.seek(max(os.path.getsize(self._errors) - 4096, 0))
            return stream.read()

    def _message(self) -> str:
        """The last line that the command wrote as its reason, without paths."""
        lines = self._tail().decode("utf-8", "replace").replace("\r", "\n").splitlines()
        reasons = [line.removeprefix("medmamba train: ") for line in lines if line.startswith("medmamba train: ")]
        text = reasons[-1] if reasons else "the training process ended without a reason; is there memory enough?"
        return text.replace(str(self.plan.data), self.plan.data.name).replace(str(self.out.parent), "")
