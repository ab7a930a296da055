"""The server answers as the app's API does, one bad file among many harms only itself, and it says how it is."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import medmamba
from medmamba.config import DEFAULT_MODEL
from medmamba.serving.answers import Answers, check_model
from medmamba.serving.record import check_view
from medmamba.serving.upload import Upload

ROOT = Path(medmamba.__file__).parents[1]
NEUTROPHIL = ROOT / "demo" / "examples" / "blood_neutrophil.webp"


def assert_same(one: dict, other: dict) -> None:
    """Compares records but for the time; sums over other batches differ in the last bits."""
    for name in ("probability", "probabilities"):
        assert one[name] == pytest.approx(other[name], abs=1e-6)
    rest = [
        {k: v for k, v in r.items() if k not in ("milliseconds", "probability", "probabilities")} for r in (one, other)
    ]
    assert rest[0] == rest[1]


@pytest.fixture(scope="module")
def stack(tmp_path_factory) -> Path:
    """Two pages of 12 bits in 16."""
    path = tmp_path_factory.mktemp("images") / "stack.tif"
    values = np.random.default_rng(0).integers(348, 3205, (2, 40, 40)).astype(np.uint16)
    pages = [Image.fromarray(page) for page in values]
    pages[0].save(path, save_all=True, append_images=pages[1:])
    return path


def upload(path: Path, frame: int | None = None, window=None) -> Upload:
    return Upload(path.name, path.read_bytes(), frame, window, time.monotonic())


def test_a_bad_file_in_a_batch_is_an_error_of_its_own_request(stack):
    answers = Answers(DEFAULT_MODEL, "cpu")
    text = Upload("notes.txt", b"hello", None, None, 0.0)
    found = answers([upload(NEUTROPHIL), text, upload(stack), upload(stack, 1)])
    assert [status for status, _ in found] == [200, 422, 422, 200]
    assert found[0][1]["label"] == "neutrophil"
    assert "notes.txt" in found[1][1]["detail"]
    assert found[2][1]["detail"] == "this file has 2 frames; set frame, 0 to 1"
    assert found[3][1]["frame"] == 1 and found[3][1]["frames"] == 2
    (alone,) = answers([upload(stack, 1)])
    both = alone[1]["probabilities"], found[3][1]["probabilities"]
    assert both[0] == pytest.approx(both[1], abs=1e-6)


def test_records_are_those_of_the_app(stack):
    pytest.importorskip("gradio", reason='needs pip install "medmamba[demo]"')
    from demo.api import _record
    from demo.service import Service, View
    from demo.store import ModelStore

    service = Service(ModelStore((DEFAULT_MODEL,), "cpu"))
    answers = Answers(DEFAULT_MODEL, "cpu")
    for path, frame, window in ((NEUTROPHIL, None, None), (stack, 0, None), (stack, 1, (1500.0, 900.0))):
        expected = _record(service.classify(DEFAULT_MODEL, path, View(frame, window)), service.store.get(DEFAULT_MODEL))
        ((status, found),) = answers([upload(path, frame, window)])
        assert status == 200 and list(found) == list(expected)
        assert_same(found, expected)


@pytest.mark.parametrize("view", [(None, 1.0, None), (None, 1.0, 0.0), (1.5, None, None), (-1.0, None, None)])
def test_views_that_make_no_sense_are_refused(view):
    with pytest.raises(ValueError, match=r"window|frame"):
        check_view(*view)


def test_a_model_that_cannot_be_served_is_refused_before_anything_listens(tmp_path):
    medmamba.create_model("test", num_classes=0).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no classifier"):
        check_model(str(tmp_path))


@contextlib.contextmanager
def running(*options: str) -> Iterator[str]:
    httpx = pytest.importorskip("httpx")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "medmamba", "serve", "--port", str(port), "--device", "cpu", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=environment, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    url = f"http://127.0.0.1:{port}"
    try:
        limit = time.monotonic() + 240
        while True:
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < limit
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{url}/health").status_code == 200:
                    break
            time.sleep(0.1)
        yield url
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(240)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
    with pytest.raises(httpx.TransportError):  # nothing is left that listens
        httpx.get(f"{url}/health")


@pytest.mark.slow
def test_many_clients_at_once_get_the_answers_of_one(stack):
    pytest.importorskip("litserve")
    import httpx

    with running("--max-mb", "1", "--wait", "50") as url:

        def ask(number: int) -> httpx.Response:
            path, fields = [(NEUTROPHIL, {}), (stack, {"frame": 1}), (stack, {}), (ROOT / "README.md", {})][number % 4]
            with path.open("rb") as file:
                return httpx.post(f"{url}/classify", files={"file": (path.name, file)}, data=fields, timeout=240)

        alone = [ask(number) for number in range(4)]
        assert [response.status_code for response in alone] == [200, 200, 422, 422]
        with ThreadPoolExecutor(16) as pool:
            found = list(pool.map(ask, range(48)))
        for number, response in enumerate(found):
            expected = alone[number % 4]
            assert response.status_code == expected.status_code
            if response.status_code == 200:
                assert_same(response.json(), expected.json())
            else:
                assert response.json() == expected.json()
        large = httpx.post(f"{url}/classify", files={"file": ("a.png", bytes(2**20 + 1))})
        assert large.status_code == 413 and "1 MiB" in large.json()["detail"]
        lines = dict(line.rsplit(" ", 1) for line in httpx.get(f"{url}/metrics").text.splitlines() if line[0] != "#")
        assert float(lines['medmamba_requests_total{status="200"}']) == 26
        assert float(lines["medmamba_request_seconds_count"]) == 53
        assert float(lines["medmamba_requests_in_progress"]) == 0
        (model,) = httpx.get(f"{url}/models").json()
        assert model["classes"] == medmamba.MedMamba.from_pretrained(DEFAULT_MODEL).config.labels
