"""What a visitor has on the server: a folder of their own, deleted when they leave or stay idle."""

from __future__ import annotations

import atexit
import contextlib
import os
import secrets
import shutil
import threading
import time
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .options import Limits

if TYPE_CHECKING:
    from .jobs import Plan


class Session:
    """One browser tab.

    Attributes:
        folder: holds everything kept for this visitor; no address leads there.
        outbox: holds what this visitor may download, under an address that cannot be guessed.
        uploads: the server's copies of what this visitor brought.
        images: the current images, in the order they were given. current: index of the one that is shown.
        models: folders of the models that were fine-tuned here, by the name shown.
        data: the set to fine-tune on.
        stop_explaining, stop_training: set to end what is running.
    """

    def __init__(self, folder: Path, outbox: Path):
        self.folder = folder
        self.outbox = outbox
        self.uploads: set[Path] = set()
        self.images: list[Path] = []
        self.current = 0
        self.models: dict[str, Path] = {}
        self.data: Plan | None = None
        self.stop_explaining = threading.Event()
        self.stop_training = threading.Event()
        self.used = time.monotonic()

    def new_folder(self) -> Path:
        """An empty folder that goes with the session."""
        path = self.folder / secrets.token_urlsafe(12)
        path.mkdir(parents=True)
        return path

    def new_download(self, name: str) -> Path:
        """Where to write a file that the visitor may download; it goes with the session."""
        folder = self.outbox / secrets.token_urlsafe(12)
        folder.mkdir(parents=True)
        return folder / name

    def keep_images(self, uploads: list[str]) -> None:
        """Makes these files the current images and deletes the ones before.

        Copies, because the server's upload folder is shared: the same file uploaded by two people is one file there.
        """
        before = {path.parent for path in self.images}
        kept = []
        self.uploads.update(map(Path, uploads))
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

    def stop(self) -> None:
        self.stop_explaining.set()
        self.stop_training.set()

    def close(self) -> None:
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.rmtree(self.outbox, ignore_errors=True)


class Sessions:
    """All visitors, by the session identifier that the browser or API client chose at random.

    A thread looks every minute for what was left behind, so that files go even when nobody comes any more.

    Args:
        root: everything lies below this folder, which is deleted at the end; Gradio's uploads in `root / "uploads"`.
        sweep_seconds: between two looks.
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
        """The session that a `gradio.Request` belongs to; a new one for a new visitor."""
        # Requests without an identifier have nothing in common: each gets a session of its own.
        key = str(getattr(request, "session_hash", None) or secrets.token_urlsafe(16))
        with self._lock:
            session = self._sessions.pop(key, None)
            if session is None:
                names = secrets.token_urlsafe(16), secrets.token_urlsafe(16)
                session = Session(self.root / names[0], self.uploads / names[1])
            self._sessions[key] = session  # the one used last is last
            session.used = time.monotonic()
            dropped = [self._sessions.pop(k) for k in list(self._sessions)[: -self.limits.sessions]]
        self._end(dropped)
        return session

    def close(self, request: Any) -> None:
        """Forgets a visitor who left."""
        with self._lock:
            session = self._sessions.pop(str(getattr(request, "session_hash", None) or ""), None)
        self._end([session] if session else [])

    def sweep(self) -> None:
        """Forgets visitors who were idle for long, and deletes uploads that are older than anything needs them."""
        with self._lock:
            idle = time.monotonic() - 60 * self.limits.idle_minutes
            dropped = [self._sessions.pop(k) for k, s in list(self._sessions.items()) if s.used < idle]
            outboxes = {s.outbox for s in self._sessions.values()}
        self._end(dropped)
        delete_older(self.uploads, 60 * self.limits.upload_minutes, outboxes)

    def close_all(self) -> None:
        self._ended.set()
        with self._lock:
            sessions, self._sessions = list(self._sessions.values()), {}
        for session in sessions:
            session.stop()
        shutil.rmtree(self.root, ignore_errors=True)

    def _end(self, sessions: list[Session]) -> None:
        """Deletes all that these visitors brought, but not what another brought as well: equal files are one file."""
        with self._lock:
            shared = {path for s in self._sessions.values() for path in s.uploads}
        for session in sessions:
            session.close()
            for path in session.uploads - shared:
                if path.is_relative_to(self.uploads):  # not an example of the app's own
                    with contextlib.suppress(OSError):
                        path.unlink()
                        path.parent.rmdir()

    def _sweep_for_ever(self, seconds: float) -> None:
        while not self._ended.wait(seconds):
            self.sweep()


def delete_older(folder: Path, seconds: float, keep: Collection[Path] = ()) -> None:
    """Deletes files that were last changed longer ago than this, and the folders that become empty.

    Args:
        keep: folders directly below `folder` in which nothing is deleted.
    """
    limit = time.time() - seconds
    for where, _, names in os.walk(folder, topdown=False):
        if any(Path(where).is_relative_to(other) for other in keep):
            continue
        changed = Path(where).stat().st_mtime if Path(where).is_dir() else limit
        for name in names:
            path = Path(where, name)
            with contextlib.suppress(OSError):  # another thread was faster
                if path.stat().st_mtime < limit:
                    path.unlink()
        with contextlib.suppress(OSError):  # not empty
            if Path(where) != folder and changed < limit:  # else an upload may be on its way there
                Path(where).rmdir()
