"""Files that are whole or absent, and locks that outlive no process."""

import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from medmamba.training.checkpoint import CheckpointStore
from medmamba.utils.files import LockedError, is_disk_full, locked, staged, write_atomically, write_text

ROOT = Path(__file__).parents[2]
LIMITED = """
import resource, sys, torch
from pathlib import Path
from safetensors.torch import save_file
from medmamba.training.checkpoint import CheckpointStore
from medmamba.utils.files import DiskFullError, write_atomically, staged
folder = Path(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, 2**16))
big = {"w": torch.zeros(2**16)}
def stage():
    with staged(folder / "model") as place:
        (place / "small").write_text("fits")
        save_file(big, place / "model.safetensors")
store = CheckpointStore(folder)
for job in (
    lambda: store.save({"model": big, "best": None}),
    lambda: store.save_best(3, big),
    lambda: write_atomically(folder / "note", lambda path: path.write_bytes(bytes(2**17))),
    stage,
):
    try:
        job()
    except DiskFullError as error:
        print(error)
    else:
        raise SystemExit("written")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit for the size of files")
def test_a_full_disk_is_said_and_leaves_the_old_files(tmp_path):
    """A limit for the size of files ends a write in the middle, as a full disk does."""
    store = CheckpointStore(tmp_path)
    store.save({"model": {"w": torch.ones(3)}, "best": None})
    write_text(tmp_path / "note", "before")
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    run = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert len(lines) == 4 and all("no space to write" in line and "Make room" in line for line in lines)
    assert not list((tmp_path / "model").iterdir())
    (tmp_path / "model").rmdir()
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_errors_of_full_disks_are_told_from_others():
    assert is_disk_full(OSError(28, "No space left on device"))
    assert is_disk_full(RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 704 vs 598"))
    assert is_disk_full(RuntimeError('I/O error: Os { code: 28, kind: StorageFull, message: "No space left" }'))
    assert not is_disk_full(PermissionError(13, "Permission denied")) and not is_disk_full(ValueError("x"))


def test_an_interrupted_write_changes_nothing(tmp_path):
    path = write_text(tmp_path / "a.txt", "old\n")

    def interrupted(partial: Path) -> None:
        partial.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, interrupted)
    assert path.read_text() == "old\n" and [file.name for file in tmp_path.iterdir()] == ["a.txt"]
    with pytest.raises(FileNotFoundError):
        write_text(tmp_path / "absent" / "a.txt", "x")


def test_two_writers_of_one_name_do_not_mix(tmp_path):
    """Each writes beside the other, whole; the last one to finish is what stays."""
    both = threading.Barrier(2)

    def slow(letter: str) -> None:
        def write(partial: Path) -> None:
            with partial.open("w") as file:
                file.write(letter * 1000)
                both.wait(timeout=120)
                file.write(letter * 1000)

        write_atomically(tmp_path / "x", write)

    threads = [threading.Thread(target=slow, args=(letter,)) for letter in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "x").read_text() in ("a" * 2000, "b" * 2000)


@pytest.mark.skipif(sys.platform == "win32", reason="permissions of Unix")
def test_permissions_are_those_of_a_new_file_or_of_the_old_one(tmp_path):
    (tmp_path / "new").touch()
    expected = stat.S_IMODE((tmp_path / "new").stat().st_mode)
    assert stat.S_IMODE(write_text(tmp_path / "x", "1").stat().st_mode) == expected
    (tmp_path / "x").chmod(0o600)
    assert stat.S_IMODE(write_text(tmp_path / "x", "2").stat().st_mode) == 0o600
    with staged(tmp_path / "folder") as place:
        os.close(os.open(place / "secret", os.O_CREAT | os.O_WRONLY, 0o600))
    assert stat.S_IMODE((tmp_path / "folder" / "secret").stat().st_mode) == expected


def test_staged_files_come_in_order_or_not_at_all(tmp_path, monkeypatch):
    (tmp_path / "weights").write_text("old")

    def fail() -> None:
        with staged(tmp_path, last=["config", "weights"]) as place:
            (place / "weights").write_text("new")
            raise ValueError

    with pytest.raises(ValueError):
        fail()
    assert [file.name for file in tmp_path.iterdir()] == ["weights"] and (tmp_path / "weights").read_text() == "old"
    moved = []
    replace = os.replace
    monkeypatch.setattr("os.replace", lambda a, b: (moved.append(Path(b).name), replace(a, b)))
    with staged(tmp_path, last=["config", "weights", "absent"]) as place:
        for name in ("weights", "zebra", "config", "apple"):
            (place / name).write_text("new")
    assert moved == ["apple", "zebra", "config", "weights"]
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(moved)


# The module alone: the whole package takes seconds to import.
HOLD = """
import importlib.util, sys, time
spec = importlib.util.spec_from_file_location("files", "medmamba/utils/files.py")
files = importlib.util.module_from_spec(spec)
spec.loader.exec_module(files)
with files.locked(sys.argv[1], "x is in use"):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_lock_is_given_back_when_its_process_is_killed(tmp_path):
    path = tmp_path / "deep" / "run.lock"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        message = rf"x is in use by another process \(process {holder.pid} on "
        with pytest.raises(LockedError, match=message), locked(path, "x is in use", timeout=0):
            pass
    finally:
        holder.kill()
        holder.wait()
    with locked(path, "x is in use", timeout=0, remove=True):
        assert path.exists()
        with pytest.raises(LockedError), locked(path, "x", timeout=0):  # in the same process too
            pass
    assert not path.exists()


def test_a_lock_that_its_holder_removes_is_still_one_lock(tmp_path):
    """Holders remove the file when they end, while others already wait for it: never two at a time."""
    inside, most, guard = 0, 0, threading.Lock()

    def take() -> None:
        nonlocal inside, most
        for _ in range(15):
            with locked(tmp_path / "in" / "lock", "x", remove=True, timeout=240):
                with guard:
                    inside += 1
                    most = max(most, inside)
                with guard:
                    inside -= 1

    threads = [threading.Thread(target=take) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1 and not list((tmp_path / "in").iterdir())
