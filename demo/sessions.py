"""What a visitor has on the server: a folder of their own, deleted when they leave or stay idle."""

from __future__ import annotations

import atexit
import os
import secrets
import shutil
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .options import Limits

if TYPE_CHECKING:
    from .jobs import Plan


class Session:
    """One browser tab.

    Attributes:
        folder: holds everything kept for this visitor.
        images: the current images, in the order they were given. current: index of the one that is shown.
        models: folders of the models that were fine-tuned here, by the name shown.
        data: the set to fine-tune on.
        stop: set to end what is running.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.images: list[Path] = []
        self.current = 0
        self.models: dict[str, Path] = {}
        self.data: Plan | None = None
        self.stop = threading.Event()
        self.used = time.monotonic()

    def new_folder(self) -> Path:
        """An empty folder that goes with the session."""
        path = self.folder / secrets.token_urlsafe(12)
        path.mkdir(parents=True)
        return path

    def keep_images(self, uploads: list[str]) -> None:
        """Makes these files the current images and deletes the ones before.

        Copies, because the server's upload folder is shared: the same file uploaded by two people is one file there.
        """
        before = {path.parent for path in self.images}
        kept = []
        for upload in uploads:
            path = self.new_folder() / Path(upload).name
            try:
                os.link(upload, path)
            except OSError:  # another file system
                shutil.copyfile(upload, path)
            kept.append(path)
        self.images, self.current = kept, 0
        for folder in before:
            shutil.rmtree(folder, ignore_errors=True)

    def close(self) -> None:
        self.stop.set()
        shutil.rmtree(self.folder, ignore_errors=True)


class Sessions:
    """All visitors, by the session identifier that the browser or API client chose at random.

    Args:
        root: everything lies below this folder, which is deleted at the end; Gradio's uploads in `root / "uploads"`.
    """

    def __init__(self, limits: Limits, root: Path):
        self.limits = limits
        self.root = root
        self.uploads = self.root / "uploads"
        self.uploads.mkdir(parents=True, exist_ok=True)
        self._sessions: dict[str, Session] = {}
        self._lock = threading.Lock()
        self._swept = time.monotonic()
        atexit.register(self.close_all)

    def __len__(self) -> int:
        return len(self._sessions)

    def of(self, request: Any) -> Session:
        """The session that a `gradio.Request` belongs to; a new one for a new visitor."""
        key = str(getattr(request, "session_hash", None) or "")
        self.sweep()
        with self._lock:
            session = self._sessions.pop(key, None) or Session(self.root / secrets.token_urlsafe(16))
            self._sessions[key] = session  # the one used last is last
            session.used = time.monotonic()
            dropped = [self._sessions.pop(k) for k in list(self._sessions)[: -self.limits.sessions]]
        for old in dropped:
            old.close()
        return session

    def close(self, request: Any) -> None:
        """Forgets a visitor who left."""
        with self._lock:
            session = self._sessions.pop(str(getattr(request, "session_hash", None) or ""), None)
        if session:
            session.close()

    def sweep(self) -> None:
        """Deletes what has not been used for long; at most once a minute, at no cost else."""
        now = time.monotonic()
        if now - self._swept < 60:
            return
        self._swept = now
        with self._lock:
            idle = now - 60 * self.limits.idle_minutes
            dropped = [self._sessions.pop(k) for k, s in list(self._sessions.items()) if s.used < idle]
        for session in dropped:
            session.close()
        delete_older(self.uploads, 60 * self.limits.upload_minutes)

    def close_all(self) -> None:
        with self._lock:
            sessions, self._sessions = list(self._sessions.values()), {}
        for session in sessions:
            session.stop.set()
        shutil.rmtree(self.root, ignore_errors=True)


def delete_older(folder: Path, seconds: float) -> None:
    """Deletes files that were last changed longer ago than this, and the folders that become empty."""
    limit = time.time() - seconds
    for where, _, names in os.walk(folder, topdown=False):
        for name in names:
            path = Path(where, name)
            try:
                if path.stat().st_mtime < limit:
                    path.unlink()
            except OSError:  # another thread was faster
                continue
        if Path(where) != folder:
            try:
                Path(where).rmdir()
            except OSError:  # not empty
                continue
