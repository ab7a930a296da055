"""The server of the app: limits, load, and sessions that end."""

import contextvars
import dataclasses
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from demo_cases import NEUTROPHIL, Request, classify
from demo_helpers import save_model, serving
from PIL import Image

import medmamba
from medmamba.inference.ood import fit_unusual
from medmamba.inference.ood_fit import pooled_features
from medmamba.inference.predict import UNUSUAL

pytest.importorskip("gradio", reason='needs pip install "medmamba[demo]"')
httpx = pytest.importorskip("httpx")
gradio_client = pytest.importorskip("gradio_client")

from demo import (  # noqa: E402
    app,
    gpu,
    guard,
    options,
    service,
    sessions,
    store,
)
from demo.options import EXAMPLES, Limits  # noqa: E402
from demo.tabs import answers  # noqa: E402

# --- the server -----------------------------------------------------------------------------------------------------


def test_pages_are_kept_to_this_server(url):
    response = httpx.get(url)
    assert "default-src 'self'" in response.headers["content-security-policy"]
    assert response.headers["referrer-policy"] == "no-referrer"
    config = httpx.get(f"{url}config").json()
    assert config["analytics_enabled"] is False and config["run_history"] is False


@pytest.mark.parametrize("opened", [False, True])
def test_defaults_are_private_and_open_shows_an_answer(opened, monkeypatch):
    names = ["GRADIO_ANALYTICS_ENABLED", "GRADIO_ANALYTICS_MAX_EVENTS", "GRADIO_ANALYTICS_CACHE_FREQUENCY"]
    for name in (*names, "GRADIO_TEMP_DIR", "HF_HUB_DISABLE_TELEMETRY"):
        monkeypatch.setenv(name, "")  # put back afterwards
    launched, events = {}, []

    class Demo:
        local_url = "http://127.0.0.1:7860/"

        def launch(self, **options):
            launched.update(options)

        def block_thread(self):
            events.append("waits")

    monkeypatch.setattr(app, "build_demo", lambda *_: Demo())
    monkeypatch.setattr(app.webbrowser, "open", events.append)
    assert app.main(["--model", "anything", *(["--open"] if opened else [])]) == 0
    assert launched["server_name"] == "127.0.0.1" and launched["share"] is False
    assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"
    assert "medmamba-" in os.environ["GRADIO_TEMP_DIR"], "a folder of its own"
    assert events == [*(["http://127.0.0.1:7860/?example"] if opened else []), "waits"]


def test_nothing_is_kept_of_each_request(model_folder, tmp_path, monkeypatch):
    """Gradio's statistics, which would grow with every request, are bounded and never summarised."""
    for name in ("GRADIO_ANALYTICS_ENABLED", "GRADIO_ANALYTICS_MAX_EVENTS", "GRADIO_ANALYTICS_CACHE_FREQUENCY"):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")
    app.prepare()
    demo = app.build_demo(options.Options((str(model_folder),), "cpu"), tmp_path)
    assert demo._queue.ANALYTICS_MAX_EVENTS == 100 and demo._queue.ANAYLTICS_CACHE_FREQUENCY >= 10**6


def test_waiting_threads_sleep():
    """Which they must be told before PyTorch is loaded."""
    code = "import demo, os, sys; print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules)"
    clean = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
    found = subprocess.run([sys.executable, "-c", code], cwd=Path(app.__file__).parents[1], env=clean,
                           capture_output=True, text=True, check=True)  # fmt: skip
    assert found.stdout.split() == ["passive", "False"]


def test_an_unknown_model_is_explained(capsys, monkeypatch):
    for name in ("GRADIO_TEMP_DIR", "GRADIO_ANALYTICS_MAX_EVENTS", "GRADIO_ANALYTICS_CACHE_FREQUENCY"):
        monkeypatch.setenv(name, "")
    assert app.main(["--model", "/nowhere/at/all"]) == 2
    assert "no such folder" in capsys.readouterr().err


def test_requests_of_one_address_are_limited(model_folder, tmp_path):
    with serving([model_folder], tmp_path, requests_per_minute=3) as url:
        codes = [httpx.post(f"{url}gradio_api/call/models", json={"data": []}).status_code for _ in range(5)]
        assert codes == [200, 200, 200, 429, 429]
        assert httpx.get(url).status_code == 200, "pages still open"


def test_the_address_behind_a_proxy_is_the_one_it_wrote():
    scope = {"headers": [(b"x-forwarded-for", b"6.6.6.6, 1.2.3.4")], "client": ("10.0.0.1", 1)}
    assert guard.Guard(None, 1, behind_proxy=True)._address(scope) == "1.2.3.4"
    assert guard.Guard(None, 1)._address(scope) == "10.0.0.1"


@pytest.mark.slow
def test_the_queue_is_bounded(model_folder, tmp_path, monkeypatch):
    gate = threading.Event()
    answer = service.Service.classify
    monkeypatch.setattr(service.Service, "classify", lambda *a, **k: gate.wait(240) and answer(*a, **k))
    with serving([model_folder], tmp_path, queue=2) as url:
        client = gradio_client.Client(url, verbose=False)
        image = gradio_client.handle_file(str(NEUTROPHIL))
        waiting = [client.submit(image, api_name="/classify") for _ in range(6)]
        while not any(job.done() for job in waiting):  # the first to end is one that was refused: the others wait
            time.sleep(0.05)
        gate.set()
        outcomes = [job.exception(120) for job in waiting]
    refused = [str(error) for error in outcomes if error]
    assert 1 <= len(refused) < 6 and all("full" in text.lower() for text in refused)


@pytest.mark.slow
def test_twenty_clients_at_once_get_their_own_answers(url):
    """A small version of benchmarks/demo.py."""
    images = sorted(EXAMPLES.glob("blood_*.webp"))

    def ask(number: int) -> list[str]:
        client = gradio_client.Client(url, verbose=False)
        return [classify(client, images[(number + i) % len(images)])["label"] for i in range(3)]

    with ThreadPoolExecutor(20) as pool:
        found = list(pool.map(ask, range(20)))
    assert all(found[i] == found[i + 8] for i in range(8)), "the same images, the same answers"


def test_images_unlike_the_training_images_are_marked(tmp_path):
    folder = save_model(tmp_path / "blood")
    model = medmamba.MedMamba.from_pretrained(folder)
    own = sorted(EXAMPLES.glob("blood_*.webp"))
    with pooled_features(model) as pooled:
        model.predict(own)
    features = pooled.array()
    warning = fit_unusual(features, np.arange(8) % 2, features)
    measured = {
        "own": {"n": 5, "called_unusual": 0.0},
        "auroc": {"Other": {"auroc": 0.9, "n": 5, "called_unusual": 1.0}},
    }
    dataclasses.replace(warning, measured=measured).save(folder)
    answers_ = service.Service(store.ModelStore((str(folder),), "cpu"))
    known, noise = tmp_path / "known.png", tmp_path / "noise.png"
    Image.open(own[0]).save(known)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(noise)
    found = answers_.classify_files(str(folder), [known, tmp_path / "absent.png", noise])
    assert found[0].unusual is False and found[2].unusual is True
    assert all(UNUSUAL not in f.prediction.image_notes for f in (found[0], found[2])), "the page says it elsewhere"
    assert found[2].seen.shape == (48, 48, 3) and found[2].prediction.unusual is True
    page = answers.answer_html(answers_.classify(str(folder), noise), answers_.store.default)
    assert "does not look like the training images" in page and "flagged 100% of the images of 1 other dataset." in page
    assert "100% of Other" in answers.card_html(answers_.store.default)


def test_one_thread_answers_everybody(model_folder, monkeypatch):
    """Else the libraries below PyTorch keep buffers for every thread that the server ever had."""
    answers_, threads, contexts = service.Service(store.ModelStore((str(model_folder),), "cpu")), set(), []
    visitor = contextvars.ContextVar("visitor")

    def load(*arguments, **named):
        threads.add(threading.get_ident())
        contexts.append(visitor.get())
        return medmamba.imaging.load.load_image(*arguments, **named)

    monkeypatch.setattr(service, "load_image", load)

    def ask(number):
        visitor.set(number)
        answers_.classify(str(model_folder), NEUTROPHIL)
        answers_.classify_files(str(model_folder), [NEUTROPHIL])

    for number in range(3):
        thread = threading.Thread(target=ask, args=(number,))
        thread.start()
        thread.join()
    assert len(threads) == 1 and contexts == [0, 0, 1, 1, 2, 2]


def test_functions_on_zero_gpu(model_folder, monkeypatch):
    """Away from such a machine, its decorator runs a function where it is."""
    pytest.importorskip("spaces", reason="needs pip install spaces")
    monkeypatch.setattr(gpu, "ZERO_GPU", True)
    monkeypatch.setattr(service, "ZERO_GPU", True)
    answers_ = service.Service(store.ModelStore((str(model_folder),), "cpu"))
    assert answers_.classify(str(model_folder), NEUTROPHIL).prediction.label
    found = list(answers_.explain(str(model_folder), NEUTROPHIL, service.View(), ["gradcam"], None, True, print))
    assert len(found) == 2 and found[1].trust


# --- sessions -------------------------------------------------------------------------------------------------------


def test_a_visitors_files_go_with_the_visitor(tmp_path):
    kept = sessions.Sessions(Limits(), tmp_path / "root")
    upload = tmp_path / "a.png"
    upload.write_bytes(b"pixels")
    one, two = kept.of(Request("one")), kept.of(Request("two"))
    one.keep_images([str(upload)])
    two.keep_images([str(upload)])
    assert one is kept.of(Request("one")) and one.images[0] != two.images[0]
    first = one.images[0]
    one.keep_images([str(upload)])
    assert not first.exists() and one.images[0].exists(), "an image that was replaced is deleted"
    kept.close(Request("one"))
    assert one.stop_training.is_set() and one.stop_explaining.is_set() and not one.folder.exists()
    assert two.images[0].exists() and upload.exists()
    kept.close_all()
    assert not (tmp_path / "root").exists()


def old_file(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")
    for each in (path, path.parent):
        os.utime(each, (1, 1))
    return path


def test_idle_and_surplus_visitors_are_forgotten(tmp_path, monkeypatch):
    kept = sessions.Sessions(Limits(sessions=2, idle_minutes=1, upload_minutes=1), tmp_path / "root")
    first = kept.of(Request("1"))
    folder = first.new_folder()
    kept.of(Request("2")), kept.of(Request("3"))
    assert len(kept) == 2 and not folder.exists()
    later = time.monotonic() + 3600
    monkeypatch.setattr(time, "monotonic", lambda: later)
    kept.of(Request("4"))
    kept.sweep()
    assert len(kept) == 1
    kept.close_all()


def test_what_belongs_to_nobody_goes_by_itself(tmp_path):
    kept = sessions.Sessions(Limits(upload_minutes=1), tmp_path / "root", sweep_seconds=0.05)
    forgotten, fresh = old_file(kept.uploads / "hash" / "a.png"), kept.uploads / "other" / "b.png"
    fresh.parent.mkdir()
    fresh.write_bytes(b"x")
    download = old_file(kept.of(Request("1")).new_download("model.zip"))
    until = time.monotonic() + 120
    while forgotten.parent.exists() and time.monotonic() < until:
        time.sleep(0.02)
    assert not forgotten.parent.exists(), "without anybody asking for anything"
    assert fresh.exists() and download.exists(), "this may still be downloaded"
    kept.close(Request("1"))
    assert not download.exists()
    kept.close_all()


def test_the_servers_copies_go_with_the_visitor_unless_another_has_the_same(tmp_path):
    kept = sessions.Sessions(Limits(), tmp_path / "root")
    mine, shared = old_file(kept.uploads / "1" / "mine.png"), old_file(kept.uploads / "2" / "shared.png")
    kept.of(Request("one")).keep_images([str(mine), str(shared)])
    kept.of(Request("two")).keep_images([str(shared), str(NEUTROPHIL)])
    kept.close(Request("one"))
    assert not mine.parent.exists() and shared.exists()
    kept.close(Request("two"))
    assert not shared.exists() and NEUTROPHIL.exists(), "the app's own examples stay"
    kept.close_all()
