"""Atomic file writes, staged folders, and locks between processes."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import socket
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) if hasattr(errno, "EDQUOT") else (errno.ENOSPC, errno.EFBIG)
# How PyTorch and safetensors, which write files by themselves, say that a write has failed.
_FOREIGN = ("no space left", "storagefull", "quota exceeded", "file too large", "inline_container", "file write failed")


class DiskFullError(OSError):
    """A file could not be written because the disk, or the space that the user may take, is full."""


class LockedError(RuntimeError):
    """Another process holds what was to be locked."""


def write_atomically(path: str | os.PathLike, write: Callable[[Path], object]) -> Path:
    """Calls `write(partial)` and puts the finished file in the place of `path`.

    Whatever interrupts it, `path` holds the old content or the new, never a part of it, and no partial file is left
    behind unless the process is killed. The name of the partial file is unique, so that two writers do not mix.

    Raises:
        DiskFullError: no space; the old file is still there.
        OSError: the folder does not exist or may not be written.
    """
    path = Path(path)
    with clear_space_errors(path):
        partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.part")
        mode = _mode(path, partial)
        try:
            write(partial)
            partial.chmod(mode)
            replace_synced(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    return path


def replace_synced(partial: Path, path: Path) -> None:
    """Puts a finished file of the same folder in the place of `path`, safe from a loss of power."""
    _sync(partial)
    os.replace(partial, path)
    _sync(path.parent)


def write_text(path: str | os.PathLike, text: str) -> Path:
    """Writes UTF-8 text with "\\n" line ends, as `write_atomically` does."""
    return write_atomically(path, lambda partial: partial.write_text(text, encoding="utf-8", newline="\n"))


@contextlib.contextmanager
def staged(folder: str | os.PathLike, last: Sequence[str] = ()) -> Iterator[Path]:
    """Yields an empty folder whose files go to `folder` when the block ends well, and nowhere when it does not.

    Args:
        folder: made if it does not exist. Files there with other names stay.
        last: names that are moved at the end, in this order; a reader that finds the last one finds all of them.

    Raises:
        DiskFullError: no space; nothing has been moved.
    """
    folder = Path(folder)
    with clear_space_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=".saving-", dir=folder))
        try:
            yield staging
            names = sorted(file.name for file in staging.iterdir())
            names = [name for name in names if name not in last] + [name for name in last if name in names]
            for name in names:
                (staging / name).chmod(_mode(folder / name, staging / ".new"))
                _sync(staging / name)
            for name in names:
                os.replace(staging / name, folder / name)
            _sync(folder)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


@contextlib.contextmanager
def locked(path: str | os.PathLike, taken: str, timeout: float = -1, remove: bool = False) -> Iterator[None]:
    """Holds the lock file `path`, which no other process or thread can hold at the same time.

    The operating system gives the lock back when a process ends, however it ends, so nothing is left to clean up.

    Args:
        path: lock file; its folder is made.
        taken: what `LockedError` says first, for example "runs/a is being trained".
        timeout: seconds to wait for another holder; 0: not at all; below 0: as long as it takes.
        remove: delete the file in the end.

    Raises:
        LockedError: another process holds it; the message names that process if known.
        OSError: the file cannot be made.
    """
    import filelock

    path = Path(path)
    limit = None if timeout < 0 else time.monotonic() + timeout
    for _ in range(100):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(path, timeout=-1 if limit is None else max(limit - time.monotonic(), 0))
        try:
            lock.acquire()
        except FileNotFoundError:
            continue  # the folder has just been removed
        except filelock.Timeout:
            raise LockedError(f"{taken} by another process{_holder(path)}") from None
        if path.exists():
            break
        lock.release()  # of a file that its last holder removed: others no longer look at it
    else:
        raise LockedError(f"{path} cannot be locked: it is removed again and again")
    try:
        with contextlib.suppress(OSError):  # Windows locks the content too
            path.write_text(f"{os.getpid()} {socket.gethostname()}", encoding="utf-8")
        yield
    finally:
        removed = remove and _removed(path)  # while still locked: afterwards it may be the next holder's
        lock.release()
        if remove and not removed and os.name == "nt":
            _removed(path)


def is_disk_full(error: BaseException) -> bool:
    """Returns whether an error raised by any library while writing means that the disk is full."""
    if isinstance(error, OSError) and error.errno in _FULL:
        return True
    text = str(error).lower()
    return any(part in text for part in _FOREIGN)


@contextlib.contextmanager
def clear_space_errors(path: Path) -> Iterator[None]:
    """Turns what libraries raise on a full disk into one clear error."""
    try:
        yield
    except DiskFullError:
        raise
    except Exception as error:
        if not is_disk_full(error):
            raise
        place = next(parent for parent in (path, *path.absolute().parents) if parent.is_dir())
        free = shutil.disk_usage(place).free / 2**20
        raise DiskFullError(
            errno.ENOSPC,
            f"no space to write {path} ({free:.0f} MiB free on the disk, or a limit of yours is reached); what was "
            "there before is unchanged. Make room or use another folder, then run the same again",
        ) from error


def _mode(path: Path, trial: Path) -> int:
    """Permissions of the file `path`, else those that a new file gets, for which `trial` is made and removed.

    Some libraries write files that only their owner can read.
    """
    try:
        return path.stat().st_mode & 0o777
    except OSError:
        os.close(os.open(trial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        try:
            return trial.stat().st_mode & 0o777
        finally:
            trial.unlink()


def _sync(path: Path) -> None:
    """Makes a file, or the names in a folder, safe from a loss of power, where the system can."""
    folder = path.is_dir()
    if folder and os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY if folder or os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(handle)
    except OSError as error:
        if not folder or error.errno in _FULL:  # some network file systems cannot do this for folders
            raise
    finally:
        os.close(handle)


def _removed(path: Path) -> bool:
    try:
        path.unlink()
    except OSError:  # Windows keeps a file that is open
        return False
    return True


def _holder(path: Path) -> str:
    try:
        process, host = path.read_text(encoding="utf-8").split()
    except (OSError, ValueError):
        return ""
    return f" (process {process} on {host})"
