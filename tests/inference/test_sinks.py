"""Files of results: written as they come, gone on with, each image once."""

import csv
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from medmamba.inference.predict import Failure
from medmamba.inference.seen import Seen
from medmamba.inference.sinks import SinkError, open_sink
from medmamba.inference.to_file import predict_to_file
from medmamba.utils.files import LockedError

KINDS = ["r.jsonl", "r.csv", "r.parquet", "parts/"]


def need(kind):
    if kind in KINDS[2:]:
        pytest.importorskip("pyarrow")


def names_in(path):
    if str(path).endswith(".jsonl"):
        return [json.loads(line)["source"] for line in path.read_text().splitlines()]
    if str(path).endswith(".csv"):
        return [row["source"] for row in csv.DictReader(path.open(newline=""))]
    import pyarrow.parquet

    return pyarrow.parquet.read_table(path)["source"].to_pylist()


def row(name):
    top = [("b", 0.75), ("a", 0.25)]
    found = {"source": name, "label": "b", "probability": 0.75, "top": top, "logits": [0.0, 1.1], "unusual": None}
    return {**found, "image_notes": ["x"]} if "bad" not in name else {"source": name, "error": f"{name}: no\nimage"}


@pytest.fixture
def files(tmp_path):
    for i in range(6):
        array = np.random.default_rng(i).integers(0, 256, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(array).save(tmp_path / f"{i}.png")
    (tmp_path / "bad.png").write_text("no image")
    return [str(tmp_path / f"{name}.png") for name in (0, 1, "bad", 2, 3, 4, 5)]


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_added_once(kind, tmp_path, monkeypatch):
    need(kind)
    path = tmp_path / kind
    names = ["a", "=b", 'ü,"c"', "bad", "line\nbreak", "\udcff", "d"]
    for first, last in ((0, 3), (0, 5), (2, 7), (0, 7)):
        with open_sink(f"{path}/" if kind.endswith("/") else path, ["a", "b"], {"model": "1"}) as sink:
            for name in names[first:last]:
                if sink.take(name):
                    sink.write(row(name))
            assert not sink.take(names[first])
    assert len(names_in(path)) == len(names) == len(set(names_in(path)))
    assert names_in(path)[0] == "a" and names_in(path)[-1] == "d"
    with (
        pytest.raises(SinkError, match=r"begun with something else \(model\)"),
        open_sink(path, ["a", "b"], {"model": "2"}),
    ):
        pass
    with (
        pytest.raises(SinkError, match=r"begun with something else \(labels\)"),
        open_sink(path, ["a"], {"model": "1"}),
    ):
        pass


@pytest.mark.parametrize("kind", KINDS[:2])
def test_a_line_that_was_cut_off_is_answered_again(kind, tmp_path):
    path = tmp_path / kind
    with open_sink(path, ["a", "b"], {}) as sink:
        for name in "xyz":
            sink.take(name)
            sink.write(row(name))
    whole = path.read_bytes()
    for cut in (1, 5, len(whole) - whole.rstrip().rfind(b"\n") - 2):
        path.write_bytes(whole[:-cut])
        with open_sink(path, ["a", "b"], {}) as sink:
            assert sink.answered == 2 and not sink.take("y") and sink.take("z")
            sink.write(row("z"))
        assert path.read_bytes() == whole


def test_what_is_not_ours_is_left_alone(tmp_path):
    (tmp_path / "r.jsonl").write_text('{"source": "a"}\n')
    with pytest.raises(SinkError, match="choose another file"), open_sink(tmp_path / "r.jsonl", ["a"], {}):
        pass
    assert (tmp_path / "r.jsonl").read_text() == '{"source": "a"}\n'
    with pytest.raises(SinkError, match="ending in"):
        open_sink(tmp_path / "r.xlsx", ["a"], {})
    with (
        open_sink(tmp_path / "new.jsonl", ["a"], {}),
        pytest.raises(LockedError, match="another process"),
        open_sink(tmp_path / "new.jsonl", ["a"], {}),
    ):
        pass


def test_parquet_stopped_before_its_parts_were_removed(tmp_path, monkeypatch):
    pytest.importorskip("pyarrow")
    from medmamba.inference.sinks import ParquetSink

    path = tmp_path / "r.parquet"
    with monkeypatch.context() as patch:
        patch.setattr(ParquetSink, "_remove_parts", lambda self: None)
        with open_sink(path, ["a", "b"], {}) as sink:
            sink.take("x")
            sink.write(row("x"))
    with open_sink(path, ["a", "b"], {}) as sink:
        assert not sink.take("x") and sink.take("y")
        sink.write(row("y"))
    assert names_in(path) == ["x", "y"] and not path.with_name("r.parquet.parts").exists()


def test_seen_names(monkeypatch):
    monkeypatch.setattr("medmamba.inference.seen._RECENT", 7)
    seen = Seen()
    assert all(seen.add(str(i)) for i in range(100)) and len(seen) == 100
    assert not any(seen.add(str(i)) for i in range(100)) and "99" in seen and "100" not in seen


@pytest.mark.parametrize("kind", KINDS)
def test_prediction_to_a_file_goes_on(kind, tiny_model, files, tmp_path):
    need(kind)
    out = tmp_path / "out" / kind
    first = predict_to_file(tiny_model, files[:3], f"{out}/" if kind.endswith("/") else out, workers=0)
    assert (first.answered, first.before, first.unread) == (3, 0, 1)
    both = predict_to_file(tiny_model, [*files, files[0]], out, workers=0)
    assert (both.answered, both.before, both.unread) == (4, 4, 0)
    assert names_in(out) == files
    with pytest.raises(SinkError, match="window"):
        predict_to_file(tiny_model, files, out, window=(1.0, 2.0))
    tiny_model.head.bias.data += 1
    with pytest.raises(SinkError, match="model"):
        predict_to_file(tiny_model, files, out)


def test_rows_are_those_of_prediction(tiny_model, files, tmp_path):
    predict_to_file(tiny_model, files, tmp_path / "r.jsonl", workers=0, batch_size=2)
    rows = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    from medmamba.inference.predict import iter_predict

    for found, expected in zip(rows, iter_predict(tiny_model, files, batch_size=2), strict=True):
        if isinstance(expected, Failure):
            assert found["error"] == expected.error
        else:
            assert found["logits"] == pytest.approx(expected.logits) and found["label"] == expected.label


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.skipif(os.name == "nt", reason="kill -9")
def test_killed_again_and_again(kind, tmp_path):
    """The command is killed at any time, and in the end every image is answered once, as by one run."""
    need(kind)
    (tmp_path / "in").mkdir()
    for i in range(240):
        array = np.random.default_rng(i).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(array).save(tmp_path / "in" / f"{i:03}.png")
    (tmp_path / "in" / "bad.png").write_text("no image")
    command = [
        sys.executable,
        "-c",
        RUN,
        "predict",
        str(tmp_path / "in"),
        "--workers",
        "1",
        "--batch-size",
        "4",
        "--out",
    ]
    out = tmp_path / kind.rstrip("/")
    given = f"{out}/" if kind.endswith("/") else str(out)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for delay in (0.05, 0.4, 0.9):
        process = subprocess.Popen([*command, given], env=environment, stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 60
        while not _begun(out) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    done = subprocess.run([*command, given], env=environment, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1, done.stderr  # the bad image was answered in this run, or before
    names = names_in(out)
    assert sorted(names) == sorted(str(file) for file in (tmp_path / "in").iterdir())
    again = subprocess.run([*command, given], env=environment, stderr=subprocess.PIPE, text=True, check=False)
    assert "0 images answered, 241 had been answered before" in again.stderr


# Rows are written at once, so that being killed finds something in the file.
RUN = (
    "import sys, medmamba.inference.sinks as s; s.Sink.rows_at_once = 1; s.PartsSink.rows_at_once = 20; "
    "from medmamba.cli.main import main; sys.exit(main(sys.argv[1:]))"
)


def _begun(out):
    if out.suffix == ".parquet":
        out = out.with_name(out.name + ".parts")
    return any(out.glob("part-*.parquet")) if out.is_dir() else out.exists() and out.stat().st_size > 200
