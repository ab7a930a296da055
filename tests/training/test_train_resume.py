"""Training that is stopped, killed, damaged or started again in the same folder."""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from training_cases import COMMON, QUICK, SCRIPT, same_weights, scores

import medmamba
from medmamba.training import (
    ResumeError,
    train,
)
from medmamba.training.checkpoint import CheckpointStore
from medmamba.training.trainer import Trainer


@pytest.mark.slow
def test_stopped_at_every_step_and_resumed_gives_the_same_weights(folder, finished, tmp_path):
    """18 steps; each call gets a deadline that is past, so it does one step, saves and stops."""
    calls, result = 0, None
    while result is None or not result.finished:
        result = train(folder, tmp_path, "default", "test", max_seconds=0.0, **QUICK, **COMMON)
        calls += 1
    assert calls >= 18
    assert scores(result.history) == scores(finished.history) and same_weights(result.out, finished.out)


def start(folder: Path, out: Path, **options) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT, str(folder), str(out), repr({**COMMON, **options})]
    return subprocess.Popen(command, env=environment, cwd=Path(medmamba.__file__).parents[1])


def wait_for(condition, process: subprocess.Popen, seconds: float = 120) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "the run ended before it was to be interrupted"
        assert time.monotonic() < limit
        time.sleep(0.02)


@pytest.mark.slow
def test_killed_and_resumed_gives_the_same_weights(folder, tmp_path):
    """SIGKILL, which nobody can catch, in the middle of an epoch, after different numbers of checkpoints."""
    options = {**QUICK, "epochs": 8}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the process that is killed: sums in another order differ in the last bit
    try:
        whole = train(folder, tmp_path / "whole", "default", "test", **options, **COMMON)
        out = tmp_path / "killed"
        for epoch in (1, 4):
            process = start(folder, out, **options)
            wait_for(lambda: _lines(out / "history.csv") > epoch, process)  # noqa: B023
            process.send_signal(signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL
            assert not (out / "model.safetensors").exists()
        result = train(folder, out, "default", "test", **options, **COMMON)
    finally:
        torch.set_num_threads(threads)
    assert scores(result.history) == scores(whole.history) and same_weights(result.out, whole.out)
    assert result.test == dataclasses.replace(whole.test, context=result.test.context)


@pytest.mark.slow
def test_sigterm_stops_in_good_order(folder, tmp_path):
    process = start(folder, tmp_path, **{**QUICK, "epochs": 200})
    wait_for(lambda: _lines(tmp_path / "history.csv") > 1, process)
    process.terminate()
    assert process.wait(timeout=240) == 0
    state = CheckpointStore(tmp_path / "checkpoint").load()
    assert state is not None and 1 <= state["epoch"] < 200


def _lines(path: Path) -> int:
    return len(path.read_text().splitlines()) if path.exists() else 0


def test_a_finished_run_is_not_repeated_nor_overwritten(folder, finished, monkeypatch):
    monkeypatch.setattr(Trainer, "fit", lambda self: pytest.fail("trained again"))
    again = train(folder, finished.out, "default", "test", **QUICK, **COMMON)
    assert again.finished and again.best_epoch == finished.best_epoch and again.test == finished.test
    with pytest.raises(FileExistsError, match="--restart"):
        train(folder, finished.out, "default", "test", seed=5, **QUICK, **COMMON)


def test_another_run_in_the_folder_is_refused_unless_restarted(folder, tmp_path):
    train(folder, tmp_path, "default", "test", max_seconds=0.0, **QUICK, **COMMON)
    changed = {**QUICK, "lr": 1e-3, "max_seconds": 0.0}
    with pytest.raises(ResumeError, match="another recipe"):
        train(folder, tmp_path, "default", "test", **changed, **COMMON)
    assert not train(folder, tmp_path, "default", "test", restart=True, **changed, **COMMON).finished


def test_a_damaged_checkpoint_is_said_to_be_one(folder, tmp_path):
    train(folder, tmp_path, "default", "test", max_seconds=0.0, **QUICK, **COMMON)
    last = tmp_path / "checkpoint" / "last.pt"
    last.write_bytes(last.read_bytes()[:1000])
    with pytest.raises(ResumeError, match="damaged"):
        train(folder, tmp_path, "default", "test", **QUICK, **COMMON)


def test_checkpoints_run_no_code(tmp_path):
    """A pickle that calls a function is rejected, not executed."""
    marker = tmp_path / "executed"

    class Malicious:
        def __reduce__(self):
            return Path.touch, (marker,)

    (tmp_path / "checkpoint").mkdir()
    torch.save({"format": 1, "x": Malicious()}, tmp_path / "checkpoint" / "last.pt")
    with pytest.raises(ResumeError):
        CheckpointStore(tmp_path / "checkpoint").load()
    assert not marker.exists()
