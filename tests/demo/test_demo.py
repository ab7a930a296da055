"""The web app without a browser: endpoints through gradio_client, safety, sessions, pieces of pages."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from demo_cases import NEUTROPHIL, classify
from demo_helpers import serving
from PIL import Image, ImageFile

import medmamba
from medmamba.kernels import resolve_backend

pytest.importorskip("gradio", reason='needs pip install "medmamba[demo]"')
httpx = pytest.importorskip("httpx")
gradio_client = pytest.importorskip("gradio_client")

from demo import (  # noqa: E402
    app,
)


def test_the_endpoints_are_these_and_documented(client, url):
    named = client.view_api(return_format="dict", print_info=False)["named_endpoints"]
    assert set(named) == {"/models", "/classify", "/classify_batch", "/explain", "/evaluate"}
    names = [p["parameter_name"] for p in named["/classify"]["parameters"]]
    assert names == ["file", "model", "frame", "window_center", "window_width", "anyway"]
    info = httpx.get(f"{url}gradio_api/info").text
    assert "not a medical device" in info and "Hounsfield" in info and "github.com" not in info
    for name, endpoint in json.loads(info)["named_endpoints"].items():
        assert "Returns: " in endpoint["description"] and "Args:" not in endpoint["description"], name
        said = [p["python_type"]["description"] for p in endpoint["parameters"]]
        assert all(said) and len(set(said)) == len(said) and not any("FileData" in text for text in said), name


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
        text = re.sub(r"\d\.\d+(e-?\d+)?", "", text)  # digits of a probability are no patient
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


def test_a_bomb_of_pixels_is_refused_before_it_is_decoded(client, tmp_path, monkeypatch):
    Image.new("1", (20000, 20000)).save(tmp_path / "bomb.png")
    decoded, load = [], ImageFile.ImageFile.load
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: (decoded.append(self.size), load(self))[1])
    with pytest.raises(Exception, match="limit of 67 million"):
        classify(client, tmp_path / "bomb.png")
    assert decoded == []
    classify(client, NEUTROPHIL)
    assert decoded, "the server runs in this process, where this would have been seen"


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
        text = httpx.get(f"{url}gradio_api/call/classify/{event}", timeout=240).text
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


@pytest.mark.slow
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
