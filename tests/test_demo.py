"""The web app from outside: its API through gradio_client, its pages in a real browser."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import medmamba
from medmamba import registry

pytest.importorskip("gradio", reason='needs pip install "medmamba[demo]"')
gradio_client = pytest.importorskip("gradio_client")

from demo import app as demo_app  # noqa: E402

EXAMPLES = Path(demo_app.__file__).parent / "examples"
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    entry = registry.get("bloodmnist")
    model = medmamba.create_model("test", entry.num_classes, id2label=entry.id2label, training={"dataset": entry.name})
    return model.save_pretrained(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def url(model_folder):
    demo = demo_app.build_demo(demo_app.Predictor(str(model_folder), "cpu"))
    _, address, _ = demo.launch(prevent_thread_lock=True, quiet=True, allowed_paths=[str(EXAMPLES)])
    yield address
    demo.close()


@pytest.fixture(scope="module")
def client(url):
    return gradio_client.Client(url, verbose=False)


def classify(client, path):
    return client.predict(gradio_client.handle_file(str(path)), api_name="/classify")


def test_the_answer_is_that_of_the_package(client, model_folder):
    image = EXAMPLES / "blood_neutrophil.webp"
    label, seen, footer = classify(client, image)
    expected = dict(medmamba.MedMamba.from_pretrained(model_folder).predict(image).top)
    assert {c["label"]: c["confidence"] for c in label["confidences"]} == pytest.approx(expected, abs=1e-5)
    assert Image.open(seen).size == (32, 32)
    assert "MedMamba-test" in footer and "backend" in footer and str(model_folder) in footer


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tiff", "bmp"])
def test_every_format(client, tmp_path, suffix):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / f"image.{suffix}")
    assert len(classify(client, tmp_path / f"image.{suffix}")[0]["confidences"]) == 8


def test_sixteen_bits_are_not_cut_off(client, tmp_path):
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    seen = np.asarray(Image.open(classify(client, tmp_path / "deep.png")[1]))
    assert len(np.unique(seen)) > 30 and (seen == 255).mean() < 0.1


def test_dicom(client, tmp_path):
    pydicom = pytest.importorskip("pydicom")
    path = pydicom.data.get_testdata_file("CT_small.dcm", download=False)
    _, _, footer = classify(client, path)
    assert "CompressedSamples" not in footer, "the name of the patient"
    assert "window" in footer


@pytest.mark.parametrize(("name", "content"), [("a.png", b"no image"), ("b.txt", b"text"), ("c.jpg", b"")])
def test_bad_files_say_why(client, tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(Exception) as error:
        classify(client, tmp_path / name)
    assert "/tmp/" not in str(error.value) and "Traceback" not in str(error.value)


def test_an_unknown_model_is_explained(capsys):
    assert demo_app.main(["--model", "/nowhere/at/all"]) == 2
    assert "no such folder" in capsys.readouterr().err


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    if not CHROMIUM:
        pytest.skip("needs Chromium: apt install chromium, or the environment variable CHROMIUM")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    flags += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield chromium
        chromium.close()


def drive(browser, url: str, image: Path) -> str:
    """Uploads an image and waits for the answer; returns the text of the page."""
    page = browser.new_page()
    outside: list[str] = []
    page.on("request", lambda r: outside.append(r.url) if not r.url.startswith((url, "data:", "blob:")) else None)
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(url)
    page.get_by_text("Not a medical device").wait_for()
    page.locator("input[type=file]").first.set_input_files(image)
    page.get_by_test_id("label-output-value").wait_for(timeout=30_000)
    page.get_by_text("Answered by").wait_for()
    text = page.inner_text("body")
    assert outside == [] and errors == []
    page.close()
    return text


@pytest.mark.browser
def test_a_person_classifies_an_image(browser, url):
    text = drive(browser, url, EXAMPLES / "blood_neutrophil.webp")
    assert "neutrophil" in text and "%" in text


@pytest.mark.browser
@pytest.mark.skipif(not medmamba.bundled_models(), reason="no model comes with this copy")
def test_the_bundled_model_recognises_its_example(browser):
    name = next(iter(medmamba.bundled_models()))
    if "bloodmnist" not in name:
        pytest.skip("the examples are blood cells")
    demo = demo_app.build_demo(demo_app.Predictor(name, "cpu"))
    _, address, _ = demo.launch(prevent_thread_lock=True, quiet=True, allowed_paths=[str(EXAMPLES)])
    try:
        text = drive(browser, address, EXAMPLES / "blood_eosinophil.webp")
    finally:
        demo.close()
    assert text.index("eosinophil", text.index("Probability")) < text.index("basophil", text.index("Probability"))
