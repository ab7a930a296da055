"""Fine-tuning jobs: `medmamba train` in a subprocess, with progress and cancellation."""

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

from medmamba.cli.training_options import STOPPED
from medmamba.data import DatasetError, ImageDataset, make_splits, open_dataset, val_from_train
from medmamba.evaluation import RESULTS_NAME, evaluations
from medmamba.metrics import Evaluation
from medmamba.utils.text import json_text

from .options import Limits

FRACTIONS = (0.6, 0.2, 0.2)
PATTERN_SECONDS = 3.0
_PERCENT = re.compile(rb"(\d+)%\|")
_LOSS = re.compile(rb"epoch (\d+) loss (\d+\.\d+)")


@dataclass(frozen=True)
class Plan:
    """An uploaded dataset that has passed validation.

    Attributes:
        data: the zip file.
        index: the dataset with the splits that will be used.
        made: whether the splits were created here rather than given by the file.
        val_taken: whether val was taken from train, because the file has only train and test.
        pattern: regular expression for patients in file names; "" if none was given.
        patients: another rule for patients, see `medmamba.data.with_patients`; "" if none was given.
    """

    data: Path
    index: ImageDataset
    made: bool
    val_taken: bool = False
    pattern: str = ""
    patients: str = ""

    @property
    def batch_size(self) -> int:
        """Batch size for about ten steps per epoch on small datasets."""
        return min(32, max(4, self.index.split_sizes.get("train", 0) // 10))


@dataclass
class Progress:
    """Progress of a job.

    Attributes:
        share: completed fraction, 0 to 1.
        history: one row per epoch, as in `history.csv`.
        losses: (epochs passed, running training loss).
        seconds: elapsed time.
        left: estimated remaining seconds, or None if unknown.
    """

    share: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)
    losses: list[tuple[float, float]] = field(default_factory=list)
    seconds: float = 0.0
    left: float | None = None


class JobError(RuntimeError):
    """Training failed; the message says why."""


def plan(path: Path, limits: Limits, pattern: str = "", patients: str = "") -> Plan:
    """Validates a zip of class folders without unpacking it.

    Args:
        pattern: regular expression whose group 1 in a file name is the patient; all images of one stay in one split.
        patients: another rule for them, see `medmamba.data.with_patients`.

    Raises:
        DatasetError: too large, unsafe (path traversal, links, nested archives, zip bombs) or not an image dataset.
    """
    names = check_archive(path, limits)
    if pattern:
        check_pattern(pattern, names)
    index = open_dataset(path, patient_pattern=pattern or None, patients=patients or None)
    check_size(index, limits, "medmamba train")
    made, val_taken = not any(index.splits), False
    if made:
        rarest = min(index.class_counts)
        if rarest < 5:
            raise DatasetError(f"a class has only {rarest} images; at least five per class are needed for a split")
        index = make_splits(index, FRACTIONS)
    elif val_taken := set(index.split_sizes) == {"train", "test"}:
        index = val_from_train(index)  # as `medmamba train` does
    for split in ("train", "val"):
        if not index.split_sizes.get(split):
            raise DatasetError(f"there are split folders, but none called {split!r}; add it, or use class folders only")
    return Plan(path, index, made, val_taken, pattern, patients)


def check_archive(path: Path, limits: Limits) -> list[str]:
    """Returns the file names in a zip file, without unpacking it.

    Raises:
        DatasetError: it is too large, packed or unpacked, or not a zip file.
    """
    if path.stat().st_size > limits.zip_mb * 2**20:
        raise DatasetError(f"{path.name} is larger than {limits.zip_mb} MB; resize the images or use fewer")
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(info.file_size for info in archive.infolist())
            count = len(archive.infolist())
            names = [info.filename.rpartition("/")[2] for info in archive.infolist()]
    except zipfile.BadZipFile as error:
        raise DatasetError(f"{path.name} is not a complete zip file; create it again") from error
    if unpacked > limits.zip_unpacked_mb * 2**20:
        raise DatasetError(
            f"{path.name} unpacks to more than {limits.zip_unpacked_mb} MB; resize the images or use fewer"
        )
    if count > 4 * limits.zip_images:
        raise DatasetError(f"{path.name} holds {count} files; the limit is {limits.zip_images} images")
    return names


def check_size(index: ImageDataset, limits: Limits, command: str) -> None:
    """Raises DatasetError if a dataset has too many images or classes for the app; `command` has no such limit."""
    if len(index) > limits.zip_images:
        raise DatasetError(f"{len(index)} images; the limit here is {limits.zip_images}. `{command}` has no limit")
    if len(index.classes) > limits.zip_classes:
        raise DatasetError(f"{len(index.classes)} classes; the limit here is {limits.zip_classes}")


def check_pattern(pattern: str, names: list[str]) -> None:
    """Tries a visitor's pattern on all names in a process of its own: matching can take exponential time.

    Raises:
        DatasetError: it takes longer than `PATTERN_SECONDS`.
    """
    code = (
        "import json, re, sys\npattern, names = json.load(sys.stdin)\n"
        "try: compiled = re.compile(pattern)\nexcept re.error: sys.exit()\n"
        "for name in names: compiled.search(name)"
    )
    try:
        subprocess.run(
            [sys.executable, "-I", "-c", code],
            input=json_text([pattern, names]).encode(),
            timeout=PATTERN_SECONDS,
            capture_output=True,
        )
    except subprocess.TimeoutExpired:
        raise DatasetError("the pattern takes too long to match; use a simpler one") from None


class Job:
    """A running fine-tuning process. Ends on its own, by `stop`, or with the app."""

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
        if plan.pattern:
            command += [f"--patient-pattern={plan.pattern}"]
        if plan.patients:
            command += [f"--patients={plan.patients}"]
        # Output goes to a file of the session: no visitor data reaches the log of the server.
        with open(self._errors, "wb") as errors:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=errors
            )
        if hasattr(os, "setpriority"):
            with contextlib.suppress(OSError):  # the process may have ended already
                os.setpriority(os.PRIO_PROCESS, self._process.pid, 10)  # keep pages responsive
        atexit.register(self.stop)

    @property
    def running(self) -> bool:
        """Whether the process is running."""
        return self._process.poll() is None

    def progress(self) -> Progress:
        """Returns the current progress."""
        found = self._progress
        found.seconds = time.monotonic() - self._started
        path = self.out / "history.jsonl"
        if path.is_file():
            found.history = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        tail = self._tail()
        if found.history or _LOSS.search(tail):  # earlier progress bars show the reading of images
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
        """Waits for the end; returns the results on "val" and, if that split exists, "test".

        Raises:
            JobError: training failed; the message says why.
        """
        code = self._process.wait()
        if code == 0 and (self.out / RESULTS_NAME).is_file():
            return evaluations(json.loads((self.out / RESULTS_NAME).read_text(encoding="utf-8")))
        if code == STOPPED:
            raise JobError(
                f"the first epoch did not finish within the limit of {self._minutes:g} minutes; use fewer images "
                "or a smaller model"
            )
        raise JobError(self._message())

    def stop(self) -> None:
        """Kills the process if it is still running."""
        if self.running:
            self._process.kill()
            self._process.wait()
        atexit.unregister(self.stop)

    def _tail(self) -> bytes:
        with open(self._errors, "rb") as stream:
            stream.seek(max(os.path.getsize(self._errors) - 4096, 0))
            return stream.read()

    def _message(self) -> str:
        """Returns the last error message of the command, without paths."""
        lines = self._tail().decode("utf-8", "replace").replace("\r", "\n").splitlines()
        reasons = [line.removeprefix("medmamba train: ") for line in lines if line.startswith("medmamba train: ")]
        text = reasons[-1] if reasons else "the training process ended without an error message, possibly out of memory"
        return text.replace(str(self.plan.data), self.plan.data.name).replace(str(self.out.parent), "")
