"""Images that a model does not know are refused, with the model to try, and answered if somebody asks for it."""

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from demo_helpers import serving
from PIL import Image

pytest.importorskip("gradio", reason='needs pip install "medmamba[demo]"')

from demo import api, guard
from demo.service import Answer
from demo.tabs import answers, refusals
from medmamba.inference.predict import Prediction
from medmamba.inference.suggest import Suggestion
from medmamba.serving.record import Applied, Server, classification

ROOT = Path(__file__).resolve().parents[2]
BLOOD, CHEST = ROOT / "hub" / "models" / "bloodmnist-nano", ROOT / "hub" / "models" / "pneumoniamnist"
XRAY = ROOT / "demo" / "examples" / "chest_normal.jpeg"


def answer(level):
    prediction = Prediction(
        "a.png", "x", 0.9, [("x", 0.9), ("y", 0.1)], [], [1.0, 0.0], bool(level), unusual_level=level
    )
    return Answer(prediction, False, bool(level), np.zeros((8, 8, 3), np.uint8), 1.0)


def test_only_far_images_are_refused_in_tables_and_records(tiny_model):
    paths, found = [Path("a.png"), Path("b.png")], [answer("far"), answer("near")]
    assert [one.refused for one in found] == [True, False]
    lines = answers.batch_csv(paths, found, ["x", "y"]).splitlines()
    assert lines[1].startswith("a.png,,,,True,,,") and "refused" in lines[1] and lines[2].startswith("b.png,x,0.9")
    assert answers.batch_csv(paths, found, ["x", "y"], anyway=True).splitlines()[1].startswith("a.png,x,0.9")
    table = str(answers.batch_html(paths, found))
    assert "1 refused" in table and table.count(">refused<") == 1
    about = Server("m", tiny_model.config, True, "native", "cpu")
    record = classification(found[0].prediction, Applied(), 1.0, about, refused=True, suggestion="other")
    assert record["label"] is None and record["probabilities"] == {} and record["suggestion"] == "other"
    assert record["refused"] and record["unusual_level"] == "far"
    assert classification(found[1].prediction, Applied(), 1.0, about)["label"] == "x"


def test_the_advice_names_kind_and_model():
    text = refusals.advice(Suggestion("pneumoniamnist", "paediatric chest X-ray", 0.4))
    assert "paediatric chest X-ray" in text and "try pneumoniamnist." in text


def test_calls_of_the_former_length_still_work():
    path, body = "/gradio_api/call/classify", {"data": ["f", "m", None, None, None]}
    assert guard.refused(path, json.dumps(body).encode(), api.ENDPOINTS) == ""
    found = json.loads(guard.completed(path, json.dumps(body).encode(), api.ENDPOINTS))
    assert found["data"] == ["f", "m", None, None, None, None]
    full = json.dumps({"data": ["f", "m", None, None, None, True]}).encode()
    assert guard.completed(path, full, api.ENDPOINTS) == full
    assert "needs 6 values" in guard.refused(path, b'{"data": ["f"]}', api.ENDPOINTS)
    assert guard.completed("/gradio_api/call/models", b'{"data": []}', api.ENDPOINTS) == b'{"data": []}'


@pytest.fixture(scope="module")
def bundled(tmp_path_factory):
    """A server with the bundled model of blood cells and that of chest X-rays."""
    if not CHEST.is_dir():
        pytest.skip("needs the models of a clone")
    with serving([BLOOD, CHEST], tmp_path_factory.mktemp("app")) as address:
        yield address


@pytest.mark.slow
def test_an_x_ray_is_refused_by_the_model_of_blood_cells(bundled, browser):
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(60_000)
    page.goto(bundled)
    page.get_by_text("No image yet").wait_for()
    page.locator("#mm-drop input[type=file]").set_input_files(XRAY)
    result = page.locator("#mm-result")
    result.get_by_text("Not answered").wait_for()
    assert "paediatric chest X-ray" in result.inner_text() and not page.locator("#mm-explain-this").is_visible()
    result.get_by_role("button", name="Answer anyway").click()
    result.get_by_text("does not look like the training images").wait_for()
    assert page.locator("#mm-explain-this").is_visible()
    page.locator("#mm-drop input[type=file]").set_input_files(XRAY)
    result.get_by_text("Not answered").wait_for()  # of a new image it is asked again
    result.get_by_role("button", name="Try pneumoniamnist").click()
    result.get_by_role("heading", name="normal").wait_for()
    assert "pneumoniamnist" in page.locator("#mm-model input").input_value()
    page.close()


@pytest.mark.slow
def test_the_api_refuses_and_answers_anyway(bundled):
    client = pytest.importorskip("gradio_client").Client(bundled, verbose=False)
    handle = pytest.importorskip("gradio_client").handle_file
    found = client.predict(handle(XRAY), api_name="/classify")
    assert found["refused"] and found["label"] is None and found["suggestion"] == "pneumoniamnist"
    assert client.predict(handle(XRAY), anyway=True, api_name="/classify")["label"]
    records, table = client.predict([handle(XRAY)], api_name="/classify_batch")
    assert records[0]["refused"] and "refused" in table


@pytest.mark.slow  # the last one: another server takes the folder of uploads over
def test_patients_by_folder_and_by_column_with_a_preview(page_url, open_page, tmp_path):
    rows = ["file,patient"]
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for label in ("ill", "well"):
            for i in range(12):
                name = f"{label}{i}.png"
                Image.fromarray(np.full((16, 16, 3), 5 * i, np.uint8)).save(tmp_path / name)
                archive.write(tmp_path / name, f"{label}/{label}-p{i // 2}/{name}")
                rows.append(f"{name},case{i // 3}{label}")
    (tmp_path / "about.csv").write_text("\n".join(rows))
    page = open_page(page_url)
    page.get_by_role("tab", name="Fine-tune").click()
    page.locator("#mm-zip input[type=file]").set_input_files(tmp_path / "set.zip")
    seen = page.locator("#mm-set")
    seen.get_by_text("Images of one patient may be in several splits").wait_for()
    page.locator("#mm-patients button").first.click()
    page.get_by_label("Folders in the class folders").check()
    page.locator("#mm-apply-pattern").click()
    seen.get_by_text("12, with up to 2 images each").wait_for()
    assert "ill-p0" in seen.inner_text() and "kept together" in seen.inner_text()
    page.get_by_label("A column of a CSV file").check()
    page.locator("#mm-patient-table input[type=file]").set_input_files(tmp_path / "about.csv")
    page.locator("#mm-patient-column input").wait_for()
    page.locator("#mm-apply-pattern").click()
    seen.get_by_text("8, with up to 3 images each").wait_for()
    assert "case0ill" in seen.inner_text()
