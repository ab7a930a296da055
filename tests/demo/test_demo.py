"""The web app without a browser: endpoints through gradio_client, safety, sessions, pieces of pages."""

import contextvars
import dataclasses
import io
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from demo_helpers import save_model, serving
from PIL import Image

import medmamba
from medmamba.inference.ood import fit_unusual, load_unusual
from medmamba.inference.ood_fit import pooled_features
from medmamba.inference.predict import UNUSUAL
from medmamba.kernels import resolve_backend

pytest.importorskip("gradio", reason='needs pip install "medmamba[demo]"')
httpx = pytest.importorskip("httpx")
gradio_client = pytest.importorskip("gradio_client")

from demo import (  # noqa: E402
    app,
    charts,
    context,
    examples,
    gpu,
    guard,
    html,
    jobs,
    options,
    service,
    sessions,
    store,
)
from demo.options import EXAMPLES, Limits  # noqa: E402
from demo.service import inspect, reduced  # noqa: E402
from demo.tabs import answers, finetune, models  # noqa: E402
from demo.tabs import classify as tab_classify  # noqa: E402

NEUTROPHIL = EXAMPLES / "blood_neutrophil.webp"
SECRET = "DOE^JANE-4711"


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("app")


@pytest.fixture(scope="module")
def url(model_folder, root):
    with serving([model_folder], root, batch_files=4, image_mb=1) as address:
        yield address


@pytest.fixture(scope="module")
def client(url):
    return gradio_client.Client(url, verbose=False)


def classify(client, path, *arguments):
    return client.predict(gradio_client.handle_file(str(path)), *arguments, api_name="/classify")


@pytest.fixture
def dicom_with_patient(tmp_path):
    pydicom = pytest.importorskip("pydicom")
    ds = pydicom.dcmread(pydicom.data.get_testdata_file("CT_small.dcm", download=False))
    ds.PatientName, ds.PatientID = SECRET, "ID-" + SECRET
    path = tmp_path / "scan.dcm"
    ds.save_as(path)
    return path


# --- endpoints ---


def test_the_endpoints_are_these_and_documented(client, url):
    named = client.view_api(return_format="dict", print_info=False)["named_endpoints"]
    assert set(named) == {"/models", "/classify", "/classify_batch", "/explain"}
    names = [p["parameter_name"] for p in named["/classify"]["parameters"]]
    assert names == ["file", "model", "frame", "window_center", "window_width"]
    info = httpx.get(f"{url}gradio_api/info").text
    assert "not a medical device" in info and "Hounsfield" in info


def test_the_answer_is_that_of_the_package(client, model_folder):
    found = classify(client, NEUTROPHIL)
    expected = dict(medmamba.MedMamba.from_pretrained(model_folder).predict(NEUTROPHIL).top)
    assert found["probabilities"] == pytest.approx(expected, abs=1e-5)
    assert found["label"] == max(expected, key=expected.get)
    assert found["model"] == "blood" and found["architecture"] == "test" and found["calibrated"] is True
    assert (
        found["backend"] == resolve_backend(torch.device("cpu"), torch.float32)
        and "Not a medical device" in found["notice"]
    )
    assert isinstance(found["unsure"], bool) and isinstance(found["unusual"], bool) and found["milliseconds"] > 0


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tiff", "bmp"])
def test_every_format(client, tmp_path, suffix):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / f"image.{suffix}")
    assert len(classify(client, tmp_path / f"image.{suffix}")["probabilities"]) == 8


def test_sixteen_bits_and_their_window(client, tmp_path, model_folder):
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    whole, narrow = classify(client, tmp_path / "deep.png"), classify(client, tmp_path / "deep.png", "", None, 900, 500)
    image = medmamba.imaging.load.load_image(tmp_path / "deep.png", window=(900, 500))
    expected = dict(medmamba.MedMamba.from_pretrained(model_folder).predict(image).top)
    assert narrow["probabilities"] == pytest.approx(expected, abs=1e-5)
    assert whole["probabilities"] != narrow["probabilities"]


def test_dicom_gives_an_answer_and_nothing_of_the_patient(client, dicom_with_patient, root, capfd):
    found = classify(client, dicom_with_patient, "", None, 40, 400)
    assert "window 40/400 applied" in " ".join(found["notes"])
    record = client.predict(gradio_client.handle_file(str(dicom_with_patient)), method="gradcam", api_name="/explain")[
        0
    ]
    output = capfd.readouterr()
    for text in (json.dumps(found), json.dumps(record), output.out, output.err):
        assert "DOE" not in text and "4711" not in text
    written = [p for p in root.rglob("*") if p.is_file() and p.suffix in (".json", ".txt", ".csv")]
    assert all(b"4711" not in p.read_bytes() for p in written)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.png", b"no image", "text file"),
        ("b.txt", b"text", "this is a text file, not an image"),
        ("c.jpg", b"", "empty"),
        ("d.png", b"PK\x03\x04" + bytes(600), "ZIP"),
        ("e.png", b"\x80\x04\x95" + bytes(600), "not a supported image"),  # a pickle
    ],
)
def test_bad_files_say_why_without_the_servers_paths(client, tmp_path, root, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(Exception) as error:
        classify(client, tmp_path / name)
    assert says in str(error.value)
    assert str(root) not in str(error.value) and "Traceback" not in str(error.value)


def test_files_are_limited_in_size_at_the_door_and_behind_it(client, model_folder, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (700, 700, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "large.png")  # 1.5 MB, and an image that could be read
    for method in ("/classify", "/explain"):
        with pytest.raises(Exception, match="larger than 1 MB"):
            client.predict(gradio_client.handle_file(str(tmp_path / "large.png")), api_name=method)
    with serving([model_folder], tmp_path / "app", image_mb=1, zip_mb=1) as url:
        with open(tmp_path / "large.png", "rb") as stream:
            answer = httpx.post(f"{url}gradio_api/upload", files={"files": stream})
        assert answer.status_code == 413 and not list((tmp_path / "app").rglob("large.png"))


def test_a_bomb_of_pixels_is_refused_before_it_is_decoded(client, tmp_path):
    Image.new("1", (20000, 20000)).save(tmp_path / "bomb.png")
    began = time.monotonic()
    with pytest.raises(Exception, match="limit of 67 million"):
        classify(client, tmp_path / "bomb.png")
    assert time.monotonic() - began < 10


def test_wrong_arguments_are_explained(client):
    for arguments, says in (
        (("nobody/knows",), "no model 'nobody/knows'"),
        (("", None, 40), "or neither"),
        (("", 3), "frame"),
        (("/etc",), "no model '/etc'"),
    ):
        with pytest.raises(Exception, match=says):
            classify(client, NEUTROPHIL, *arguments)


def test_paths_of_the_server_cannot_be_read(url, client, model_folder):
    for path in ("/etc/passwd", str(model_folder / "config.json"), str(Path(app.__file__))):
        assert httpx.get(f"{url}gradio_api/file={path}").status_code in (403, 404)
        body = {"data": [{"path": path, "meta": {"_type": "gradio.FileData"}}, "", None, None, None]}
        event = httpx.post(f"{url}gradio_api/call/classify", json=body).json()["event_id"]
        text = httpx.get(f"{url}gradio_api/call/classify/{event}", timeout=30).text
        assert "event: error" in text and "root:" not in text


def test_batch(client, tmp_path, model_folder):
    (tmp_path / "=1+1.png").write_bytes(NEUTROPHIL.read_bytes())
    (tmp_path / "bad.png").write_bytes(b"nothing")
    files = [gradio_client.handle_file(str(p)) for p in (NEUTROPHIL, tmp_path / "bad.png", tmp_path / "=1+1.png")]
    records, text = client.predict(files, api_name="/classify_batch")
    assert records[0]["label"] == records[2]["label"] and "error" in records[1]
    rows = text.splitlines()
    assert len(rows) == 4 and rows[0].startswith("image,label,probability,unsure,unusual,basophil")
    assert not any(row.startswith(("=", "+", "-", "@")) for row in rows), "spreadsheets would run these"
    with pytest.raises(Exception, match="the limit is 4"):
        client.predict(files[:1] * 5, api_name="/classify_batch")


def test_explain(client, model_folder):
    handle = gradio_client.handle_file(str(NEUTROPHIL))
    record, picture, maps = client.predict(
        handle, method="occlusion", target="monocyte", check=True, api_name="/explain"
    )
    assert record["explanations"][0]["label"] == "monocyte" and record["trust"][0]["curves"]["deletion"]
    assert Image.open(picture).format == "PNG"
    expected = medmamba.explain.explain(medmamba.MedMamba.from_pretrained(model_folder), NEUTROPHIL, "occlusion", 5)
    np.testing.assert_allclose(np.load(maps)["attribution"], expected.attribution, atol=1e-5)
    with pytest.raises(Exception, match="unknown method"):
        client.predict(handle, method="magic", api_name="/explain")


def test_the_snippet_in_the_guide_runs(url, tmp_path, monkeypatch, capsys):
    pydicom = pytest.importorskip("pydicom")
    guide = (Path(__file__).resolve().parents[2] / "docs" / "app.md").read_text(encoding="utf-8")
    (snippet,) = re.findall(r"```python\n(.*?)```", guide, re.DOTALL)
    assert "http://127.0.0.1:7860/" in snippet
    shutil.copy(NEUTROPHIL, tmp_path / "cell.webp")
    Image.open(NEUTROPHIL).save(tmp_path / "a.png")
    shutil.copy(pydicom.data.get_testdata_file("CT_small.dcm", download=False), tmp_path / "b.dcm")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(snippet.replace("http://127.0.0.1:7860/", url), "app.md", "exec"), names)
    assert names["found"]["label"] in capsys.readouterr().out and len(names["records"]) == 2
    assert Image.open(names["overlay"]).format == "PNG"


def test_models_endpoint(client):
    (record,) = client.predict(api_name="/models")
    assert record["name"] == "blood" and record["dataset"] == "BloodMNIST" and len(record["classes"]) == 8


# --- the server ---


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


def test_the_queue_is_bounded(model_folder, tmp_path, monkeypatch):
    gate = threading.Event()
    answer = service.Service.classify
    monkeypatch.setattr(service.Service, "classify", lambda *a, **k: gate.wait(20) and answer(*a, **k))
    with serving([model_folder], tmp_path, queue=2) as url:
        client = gradio_client.Client(url, verbose=False)
        image = gradio_client.handle_file(str(NEUTROPHIL))
        waiting = [client.submit(image, api_name="/classify") for _ in range(6)]
        time.sleep(1)
        gate.set()
        outcomes = [job.exception(20) for job in waiting]
    refused = [str(error) for error in outcomes if error]
    assert 1 <= len(refused) < 6 and all("full" in text.lower() for text in refused)


def test_twenty_clients_at_once_get_their_own_answers(url):
    """A small version of benchmarks/demo.py."""
    images = sorted(EXAMPLES.glob("*.webp"))

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
    assert "does not look like the training images" in page and "0.900" in page
    assert "AUROC against Other 0.900" in answers.card_html(answers_.store.default)


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


# --- sessions ---


class Request:
    def __init__(self, session_hash):
        self.session_hash = session_hash


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
    until = time.monotonic() + 10
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


# --- fine-tuning: what is let in ---


def make_zip(path: Path, names: list[str], content: bytes | None = None) -> Path:
    buffer = io.BytesIO()
    Image.new("L", (32, 32), 90).save(buffer, "PNG")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names:
            archive.writestr(name, buffer.getvalue() if content is None else content)
    return path


GOOD = [f"{c}/{i}.png" for c in "ab" for i in range(6)]


@pytest.mark.parametrize(
    ("names", "content", "limits", "says"),
    [
        (["../evil.png", *GOOD], None, {}, "leads out of the archive"),
        (["/etc/evil.png", *GOOD], None, {}, "leads out of the archive"),
        (["a/inner.zip", *GOOD], None, {}, "is an archive itself"),
        (["a/bomb.png", *GOOD], bytes(8 * 2**20), {}, "zip bomb"),
        (GOOD, bytes(2**20), {"zip_unpacked_mb": 4}, "unpacks to more than"),
        (GOOD, None, {"zip_images": 5}, "limit here is 5"),
        (GOOD, None, {"zip_classes": 1}, "limit here is 1"),
        (["a/1.png", "a/2.png"], None, {}, "only one class"),
        (["a/1.png", "b/2.png"], None, {}, "only 1 images"),
        (["1.png"], None, {}, "class folder"),
        ([f"train/{name}" for name in GOOD], None, {}, "called 'val'"),
    ],
)
def test_zips_that_are_refused(tmp_path, names, content, limits, says):
    path = make_zip(tmp_path / "set.zip", names, content)
    with pytest.raises(medmamba.data.DatasetError, match=says):
        jobs.plan(path, Limits(**limits))


def test_the_sample_set_is_taken():
    found = jobs.plan(options.SAMPLE_SET, Limits())
    assert found.index.classes == ("normal", "pneumonia") and found.made and len(found.index) == 64
    assert b"CC BY 4.0" in zipfile.ZipFile(options.SAMPLE_SET).read("CREDITS.txt")


def test_a_job_ends_in_a_model(tmp_path, model_folder):
    path = make_zip(tmp_path / "set.zip", [])
    rng = np.random.default_rng(0)
    with zipfile.ZipFile(path, "w") as archive:
        for label, level in (("dark", 40), ("light", 210)):
            for i in range(10):
                buffer = io.BytesIO()
                Image.fromarray(rng.normal(level, 12, (32, 32)).clip(0, 255).astype("uint8")).save(buffer, "PNG")
                archive.writestr(f"{label}/{i}.png", buffer.getvalue())
    job = jobs.Job(jobs.plan(path, Limits()), str(model_folder), 2, tmp_path, Limits(), "cpu")
    try:
        found = job.result()
        progress = job.progress()
    finally:
        job.stop()
    assert load_unusual(job.out).means.shape == (2, 64), "its own warning for unusual images"
    assert found["test"].n_images == 4 and len(progress.history) == 2
    model = medmamba.MedMamba.from_pretrained(job.out)
    assert model.config.labels == ["dark", "light"]


@pytest.mark.slow
def test_a_job_that_fails_says_why_without_paths(tmp_path, model_folder):
    path = make_zip(tmp_path / "set.zip", GOOD)  # all images are the same: duplicates between the splits
    job = jobs.Job(jobs.plan(path, Limits()), str(model_folder), 1, tmp_path, Limits(), "cpu")
    with pytest.raises(jobs.JobError) as error:
        job.result()
    assert "set.zip" in str(error.value) and str(tmp_path) not in str(error.value)


@pytest.mark.slow
def test_a_job_keeps_to_its_time_and_still_ends_in_a_model(tmp_path, model_folder):
    limits = Limits(train_minutes=0.15)
    job = jobs.Job(jobs.plan(options.SAMPLE_SET, limits), str(model_folder), 1000, tmp_path, limits, "cpu")
    try:
        assert job.result()["test"].n_images == 12
    finally:
        job.stop()
    assert 1 <= len(job.progress().history) < 1000


@pytest.mark.slow
def test_a_job_without_time_for_an_epoch_says_so(tmp_path, model_folder):
    limits = Limits(train_minutes=0.001)
    job = jobs.Job(jobs.plan(options.SAMPLE_SET, limits), str(model_folder), 30, tmp_path, limits, "cpu")
    with pytest.raises(jobs.JobError, match=r"within the limit of 0\.001 minutes; use fewer images"):
        job.result()
    assert not job.progress().history


def test_a_job_can_be_ended(tmp_path, model_folder):
    job = jobs.Job(jobs.plan(options.SAMPLE_SET, Limits()), str(model_folder), 30, tmp_path, Limits(), "cpu")
    assert job.running
    job.stop()
    assert not job.running
    with pytest.raises(jobs.JobError):
        job.result()


# --- pieces of pages ---


@pytest.mark.parametrize(
    ("value", "shown"), [(0.5, "50.0%"), (1.0, "100%"), (0.99996, ">99.9%"), (0.0001, "<0.1%"), (0.0, "0.0%")]
)
def test_percent(value, shown):
    assert html.percent(value) == shown


def test_charts_are_drawn_inside_their_frame():
    drawing = charts.chart([charts.Line("a", [1, 2, 3], [0.1, float("nan"), 5.0])], "Title", "x", "y")
    points = [tuple(map(float, p.split(","))) for p in drawing.split('points="')[1].split('"')[0].split()]
    assert len(points) == 2 and all(0 <= x <= charts.WIDTH and 0 <= y <= charts.HEIGHT for x, y in points)
    assert charts.ticks(0, 1) == [0, 0.5, 1] or len(charts.ticks(0, 1)) >= 3


def test_inspect_and_reduce(tmp_path, dicom_with_patient):
    found = inspect(dicom_with_patient)
    assert found.windows is not None and found.windows.value_range == (-896.0, 1167.0)
    assert inspect(NEUTROPHIL).windows is None
    large = medmamba.imaging.load.load_image(np.zeros((300, 2000, 3), np.uint8))
    assert reduced(large).size == (154, 1024) and reduced(large, 4000) is large


def test_licences_as_people_write_them():
    names = ["cc-by-4.0", "CC-BY-NC-4.0", "apache-2.0", "LicenseRef-Kvasir", None]
    assert [html.licence_name(n) for n in names] == [
        "CC BY 4.0", "CC BY-NC 4.0", "apache-2.0", "custom terms", "not stated",
    ]  # fmt: skip


def test_windows_on_offer(tmp_path, dicom_with_patient):
    names = dict(tab_classify.presets(inspect(dicom_with_patient)))
    assert names["Lung (-600 / 1500)"] == (-600, 1500), "those in use for CT"
    pydicom = pytest.importorskip("pydicom")
    ds = pydicom.dcmread(dicom_with_patient)
    ds.WindowCenter, ds.WindowWidth = [50, 60], [350, 300]
    ds.WindowCenterWidthExplanation = [SECRET, "SOFT TISSUE"]
    ds.save_as(tmp_path / "windows.dcm")
    found = inspect(tmp_path / "windows.dcm")
    names = [name for name, _ in tab_classify.presets(found)]
    assert names[:2] == ["Window (50 / 350)", "Soft tissue (60 / 300)"], "free text of a header is not shown"
    assert tab_classify.default_window(found) == (50, 350)


# --- several models ---


@pytest.fixture(scope="module")
def zoo(tmp_path_factory) -> list[Path]:
    """Two sizes of one dataset, another dataset with a measured warning, and a model of nobody's."""
    root = tmp_path_factory.mktemp("zoo")
    folders = [
        save_model(root / "blood-large", variant="nano"),
        save_model(root / "blood-small"),
        save_model(root / "breast", dataset="breastmnist"),
        save_model(root / "mine", dataset=None),
    ]
    x = np.random.default_rng(0).normal(size=(20, 64))
    warning = fit_unusual(x, np.arange(20) % 2, x)
    row = {"auroc": 0.912, "n": 5, "called_unusual": 0.8}
    measured = {"own": {"n": 1234, "called_unusual": 0.04}, "auroc": {"BloodMNIST": row}}
    dataclasses.replace(warning, measured=measured).save(folders[2])
    return folders


def context_of(folders, tmp_path) -> context.Context:
    names = tuple(map(str, folders))
    return context.Context(
        options.Options(names, "cpu"), store.ModelStore(names, "cpu"), sessions.Sessions(Limits(), tmp_path / "root")
    )


def test_menus_name_what_models_are_for(zoo, tmp_path):
    found = context_of(zoo, tmp_path)
    assert found.choices(None)[0] == ("Blood cell microscopy · blood-large", "blood-large")
    assert found.choices(None)[3] == ("mine", "mine"), "no dataset is known"
    assert found.default_title == "blood-large" and found.lightest_title != "blood-large"
    assert finetune.first_base(found) == found.lightest_title, "a CPU trains the small one"
    session = found.sessions.of(Request("one"))
    session.models["Yours: set"] = zoo[3]
    assert found.choices(session)[0] == ("Yours: set", "Yours: set")


def test_two_models_of_one_name_are_refused(zoo, tmp_path):
    twin = save_model(tmp_path / "elsewhere" / "breast")
    with pytest.raises(ValueError, match="two models are called 'breast'"):
        context_of([*zoo, twin], tmp_path)


def test_a_damaged_model_does_not_keep_the_others_from_being_offered(zoo, tmp_path):
    broken = save_model(tmp_path / "broken")
    (broken / "config.json").write_text("{")
    found = context_of([*zoo, broken], tmp_path)
    assert "broken" in found.titles(None) and "broken" not in found.known
    with pytest.raises(ValueError, match="not valid JSON"):
        found.load(None, "broken")
    page = models.models_html(list(found.known.values()))
    assert page.count("<tr>") == 17


def test_the_datasets_and_the_models_for_them(zoo, tmp_path):
    known = list(context_of(zoo, tmp_path).known.values())
    page = models.models_html(known)
    assert page.count("<tr>") == 17 and "0.978" in page
    rows = page.split("<tr>")
    assert "BreastMNIST" in rows[2] and "BloodMNIST" in rows[3], "what has weights comes first"
    assert [rows[3].count(f'data-mm-use="{name}"') for name in ("blood-large", "blood-small", "breast")] == [1, 1, 0]
    warnings = models.warnings_html(known)
    assert "0.912" in warnings and "80% flagged" in warnings and "1,234" in warnings
    assert models.warnings_html(known[:2]) == ""


def test_every_model_answers_and_has_a_card(zoo):
    answers_ = service.Service(store.ModelStore(tuple(map(str, zoo)), "cpu"))
    for folder in zoo:
        found = answers_.classify(str(folder), NEUTROPHIL)
        loaded = answers_.store.get(str(folder))
        assert found.prediction.label in loaded.config.labels
        card = answers.card_html(loaded)
        assert loaded.title in card and f"MedMamba-{loaded.config.architecture}" in card


def test_programs_choose_among_models(zoo, tmp_path):
    with serving(zoo, tmp_path) as url:
        client = gradio_client.Client(url, verbose=False)
        records = {record["name"]: record for record in client.predict(api_name="/models")}
        assert list(records) == ["blood-large", "blood-small", "breast", "mine"]
        assert records["breast"]["unusual"]["auroc"]["BloodMNIST"]["auroc"] == 0.912
        assert [r["architecture"] for r in records.values()] == ["nano", "test", "test", "test"]
        assert classify(client, NEUTROPHIL)["model"] == "blood-large"
        assert set(classify(client, NEUTROPHIL, "breast")["probabilities"]) == {"malignant", "normal, benign"}


def test_examples_are_those_that_a_model_knows():
    found = examples.load_examples()
    assert {e.dataset for e in found} == {"bloodmnist", "breastmnist", "pneumoniamnist"}, "CC BY images alone"
    blood, other = examples.examples_html(found, "bloodmnist").split("Or an image the model was not trained for")
    assert blood.count("<button") == 8 and other.count("<button") == 2 and "breast ultrasound" in other
    breast = examples.examples_html(found, "breastmnist").split("Or an image")[0]
    assert "malignant" in breast and "benign" in breast and "neutrophil" not in breast
    assert "There are no examples for this model" in examples.examples_html(found, "dermamnist")
    numbers = sorted(int(n) for n in re.findall(r'data-mm-example="(\d+)"', blood + other))
    assert len(set(numbers)) == 10 and all(0 <= n < len(found) for n in numbers)
    assert blood.count("CC BY 4.0") + other.count("CC BY 4.0") == 1 and "doi:10.17632/snkd93bnjr.1" in other
    credits = (EXAMPLES / "README.md").read_text()
    assert all(f"`{e.path.name.split('_')[0]}_*{e.path.suffix}`" in credits for e in found), "each has its source"
