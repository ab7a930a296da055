"""Visitor sessions: a private folder per visitor, deleted when they leave or become idle."""

from __future__ import annotations

import atexit
import contextlib
import os
import secrets
import shutil
import threading
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .options import Limits

if TYPE_CHECKING:
    from medmamba.data import ImageDataset
    from medmamba.evaluation import Review
    from medmamba.explain import Comparison
    from medmamba.inference.predict import Failure, Prediction

    from .examples import Example
    from .jobs import Plan
    from .labelled import LabelledSet
    from .service import Answer, View


class Session:
    """One browser tab.

    Attributes:
        folder: private files of this visitor, not reachable by any URL.
        outbox: downloads of this visitor, under unguessable URLs.
        uploads: the server's copies of the uploaded files.
        images: the current images, in upload order.
        current: index of the displayed image.
        prediction: of that image, or None.
        features: (C,) of that image, see `service.Answer`.
        anyway: (model, image) pairs that are to be answered although the model does not know such images.
        view: frame and window with which the displayed image was read, or None for those of the file.
        comparison: the last explanation, or None.
        results: answers for the images, if there are several.
        labels: true classes set by the visitor, by index of the image.
        views: folders of pictures that the viewer shows.
        outlined: the image of the Segment tab, or None.
        models: folders of the models fine-tuned in this session, by displayed name.
        examples: test images of those models, by displayed name.
        data: the dataset to fine-tune on.
        patients: a CSV file that tells the patients of its images.
        stop_explaining: set to cancel a running explanation.
        stop_training: set to cancel a running training.
        labelled: the labelled images to evaluate on.
        review: the last evaluation.
        stop_evaluating: set to cancel a running evaluation.
        pages: the last page for the record or report (HTML) of a tab, by the name of the tab.
        compared: the images to compare models on: a labelled set, or files.
        stop_comparing: set to cancel a running comparison.
    """

    def __init__(self, folder: Path, outbox: Path):
        self.folder = folder
        self.outbox = outbox
        self.uploads: set[Path] = set()
        self.images: list[Path] = []
        self.current = 0
        self.prediction: Prediction | None = None
        self.features: np.ndarray | None = None
        self.anyway: set[tuple[str, Path]] = set()
        self.view: View | None = None
        self.comparison: Comparison | None = None
        self.results: list[Answer | Failure] = []
        self.labels: dict[int, str] = {}
        self.views: list[Path] = []
        self.outlined: Path | None = None
        self.models: dict[str, Path] = {}
        self.examples: dict[str, list[Example]] = {}
        self.data: Plan | None = None
        self.patients: Path | None = None
        self.stop_explaining = threading.Event()
        self.stop_training = threading.Event()
        self.labelled: LabelledSet | None = None
        self.review: Review | None = None
        self.stop_evaluating = threading.Event()
        self.pages: dict[str, Path] = {}
        self.compared: ImageDataset | list[Path] | None = None
        self.stop_comparing = threading.Event()
        self.used = time.monotonic()

    def new_folder(self) -> Path:
        """Creates an empty folder that is deleted with the session."""
        path = self.folder / secrets.token_urlsafe(12)
        path.mkdir(parents=True)
        return path

    def new_download(self, name: str) -> Path:
        """Returns a path for a download, deleted with the session."""
        folder = self.outbox / secrets.token_urlsafe(12)
        folder.mkdir(parents=True)
        return folder / name

    def keep_images(self, uploads: list[str]) -> None:
        """Sets the current images and deletes the previous ones."""
        before = {path.parent for path in self.images}
        self.images, self.current = self.kept(uploads), 0
        self.prediction = self.comparison = self.features = None
        self.results, self.labels, self.view = [], {}, None
        for folder in before:
            shutil.rmtree(folder, ignore_errors=True)

    def kept(self, uploads: Sequence[str]) -> list[Path]:
        """Returns copies of uploaded files, each in a folder of its own, deleted with the session."""
        return [self._keep(upload) for upload in uploads]

    def keep_outlined(self, upload: str) -> None:
        """Sets the image of the Segment tab and deletes the previous one."""
        before = self.outlined
        self.outlined = self._keep(upload)
        if before is not None:
            shutil.rmtree(before.parent, ignore_errors=True)

    def _keep(self, upload: str) -> Path:
        """Links or copies an upload, because that folder is shared: identical ones of two visitors are one file."""
        self.uploads.add(Path(upload))
        path = self.new_folder() / Path(upload).name
        try:
            os.link(upload, path)
        except OSError:  # another file system
            shutil.copyfile(upload, path)
        return path

    def stop(self) -> None:
        """Cancels whatever is running for this visitor."""
        self.stop_explaining.set()
        self.stop_training.set()
        self.stop_evaluating.set()
        self.stop_comparing.set()

    def close(self) -> None:
        """Cancels running work and deletes the files of this visitor."""
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.rmtree(self.outbox, ignore_errors=True)


class Sessions:
    """All sessions, by the random identifier that the browser or API client chose.

    A background thread deletes idle sessions and stale uploads every minute.

    Args:
        root: parent of all files, deleted at exit; Gradio's uploads are in `root / "uploads"`.
        sweep_seconds: interval between clean-ups.
    """

    def __init__(self, limits: Limits, root: Path, sweep_seconds: float = 60):
        self.limits = limits
        self.root = root
        self.uploads = self.root / "uploads"
        self.uploads.mkdir(parents=True, exist_ok=True)
        self._sessions: dict[str, Session] = {}
        self._lock = threading.Lock()
        self._ended = threading.Event()
        threading.Thread(target=self._sweep_for_ever, args=(sweep_seconds,), name="sweeper", daemon=True).start()
        atexit.register(self.close_all)

    def __len__(self) -> int:
        return len(self._sessions)

    def of(self, request: Any) -> Session:
        """Returns the session of a `gradio.Request`, creating it for a new visitor."""
        # Each request without an identifier gets its own session.
        key = str(getattr(request, "session_hash", None) or secrets.token_urlsafe(16))
        with self._lock:
            session = self._sessions.pop(key, None)
            if session is None:
                names = secrets.token_urlsafe(16), secrets.token_urlsafe(16)
                session = Session(self.root / names[0], self.uploads / names[1])
            self._sessions[key] = session  # most recently used last
            session.used = time.monotonic()
            dropped = [self._sessions.pop(k) for k in list(self._sessions)[: -self.limits.sessions]]
        self._end(dropped)
        return session

    def close(self, request: Any) -> None:
        """Closes the session of a visitor who left."""
        with self._lock:
            session = self._sessions.pop(str(getattr(request, "session_hash", None) or ""), None)
        self._end([session] if session else [])

    def sweep(self) -> None:
        """Closes idle sessions and deletes stale uploads."""
        with self._lock:
            idle = time.monotonic() - 60 * self.limits.idle_minutes
            dropped = [self._sessions.pop(k) for k, s in list(self._sessions.items()) if s.used < idle]
            outboxes = {s.outbox for s in self._sessions.values()}
        self._end(dropped)
        delete_older(self.uploads, 60 * self.limits.upload_minutes, outboxes)

    def close_all(self) -> None:
        """Ends the clean-up thread and all sessions, and deletes all files."""
        self._ended.set()
        with self._lock:
            sessions, self._sessions = list(self._sessions.values()), {}
        for session in sessions:
            session.stop()
        shutil.rmtree(self.root, ignore_errors=True)

    def _end(self, sessions: list[Session]) -> None:
        """Deletes the files of these sessions, except uploads shared with another session."""
        with self._lock:
            shared = {path for s in self._sessions.values() for path in s.uploads}
        for session in sessions:
            session.close()
            for path in session.uploads - shared:
                if path.is_relative_to(self.uploads):  # not a bundled example
                    with contextlib.suppress(OSError):
                        path.unlink()
                        path.parent.rmdir()

    def _sweep_for_ever(self, seconds: float) -> None:
        while not self._ended.wait(seconds):
            self.sweep()


def delete_older(folder: Path, seconds: float, keep: Collection[Path] = ()) -> None:
    """Deletes files last modified more than `seconds` ago, and folders left empty.

    Args:
        keep: folders directly below `folder` to leave untouched.
    """
    limit = time.time() - seconds
    for where, _, names in os.walk(folder, topdown=False):
        if any(Path(where).is_relative_to(other) for other in keep):
            continue
        changed = Path(where).stat().st_mtime if Path(where).is_dir() else limit
        for name in names:
            path = Path(where, name)
            with contextlib.suppress(OSError):  # deleted by another thread meanwhile
                if path.stat().st_mtime < limit:
                    path.unlink()
        with contextlib.suppress(OSError):  # not empty
            if Path(where) != folder and changed < limit:  # recent: an upload may be in progress
                Path(where).rmdir()
