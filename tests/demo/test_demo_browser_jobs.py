"""The web app in a real Chromium: explaining and fine-tuning."""

import zipfile
from pathlib import Path

import numpy as np
import pytest
from browser_cases import MARKS, answer_of, to_tab
from demo_cases import NEUTROPHIL

import medmamba

pytest.importorskip("gradio", reason='needs pip install "medmamba[demo]"')
pytest.importorskip("playwright.sync_api", reason="needs playwright")

from demo.options import SAMPLE_SET

pytestmark = MARKS


# --- Explain ---


@pytest.mark.slow
def test_explaining_an_answer(open_page):
    page = open_page()
    to_tab(page, "Explain")
    page.get_by_text("Nothing to explain yet").wait_for()
    to_tab(page, "Classify")
    answer_of(page, NEUTROPHIL)
    page.get_by_role("button", name="Explain this prediction").click()
    page.get_by_text("Ready", exact=True).wait_for()
    page.get_by_label("GradientSHAP").uncheck()
    page.get_by_label("Check the maps").check()
    page.locator("#mm-run-explain").click()
    page.get_by_text("Can these maps be trusted?").wait_for()
    page.locator("#mm-downloads button").first.wait_for()
    assert page.locator(".mm-verdicts strong", has_text="Better than chance:").count() == 2
    assert not page.locator(".mm-trust").is_visible(), "the numbers are folded"
    page.get_by_text("Results of each check").click()
    assert page.locator(".mm-map").count() == 2 and page.locator("#mm-trust .mm-chart").count() == 2
    trust = page.locator(".mm-trust").inner_text()
    assert "Deletion AUC" in trust and "Same map with random weights" in trust
    slider = page.locator("[data-mm-opacity]")
    slider.fill("10")
    assert page.locator(".mm-over").first.evaluate("e => getComputedStyle(e).opacity") == "0.1"
    with page.expect_download() as download:
        page.get_by_role("button", name="Maps (NumPy)").click()
    assert len(np.load(download.value.path()).files) == 3
    for method in page.locator("#mm-methods input").all():
        method.uncheck()
    page.locator("#mm-run-explain").click()
    page.get_by_text("No method selected").wait_for()


@pytest.mark.slow
def test_an_explanation_can_be_cancelled(open_page):
    page = open_page()
    answer_of(page, NEUTROPHIL)
    page.get_by_role("button", name="Explain this prediction").click()
    page.get_by_text("Ready", exact=True).wait_for()
    for method in page.locator("#mm-methods input").all():
        method.check()
    page.get_by_label("Check the maps").check()
    page.locator("#mm-run-explain").click()
    page.locator("#mm-stop-explain").click()
    page.locator("#mm-run-explain").wait_for()
    assert page.locator(".mm-trust thead th").count() < 9


# --- Fine-tune ---


@pytest.mark.slow
def test_fine_tuning_and_trying_the_new_model(open_page):
    page = open_page()
    to_tab(page, "Fine-tune")
    assert page.locator("#mm-run-train").is_disabled()
    page.locator("#mm-sample").click()
    page.locator("#mm-set").get_by_text("64 images, 2 classes").wait_for()
    epochs = page.get_by_label("number input for Epochs")
    epochs.fill("2")
    epochs.press("Tab")
    page.locator("#mm-run-train").click()
    page.get_by_role("progressbar", name="Training").wait_for()
    page.locator("#mm-try").wait_for(timeout=240_000)
    assert page.locator(".mm-confusion td[style]").count() == 4
    with page.expect_download() as download:
        page.get_by_role("button", name="Download the model").click()
    path = Path(download.value.path()).rename(Path(download.value.path()).with_suffix(".zip"))
    assert {"model/config.json", "model/model.safetensors"} <= set(zipfile.ZipFile(path).namelist())
    assert medmamba.MedMamba.from_pretrained(path).config.labels == ["normal", "pneumonia"]
    page.locator("#mm-try").click()
    page.get_by_role("button", name="pneumonia, your test image").first.click()
    page.locator(".mm-truth", has_text="this test image shows pneumonia").wait_for()
    assert "Yours: chest_xray_sample" in page.locator(".mm-answer").inner_text()
    assert 0 <= page.locator("#mm-result").bounding_box()["y"] < 540, "in view, though the button was far down"


@pytest.mark.slow
def test_fine_tuning_can_be_cancelled_and_refuses_what_is_no_set(open_page, tmp_path):
    page = open_page()
    to_tab(page, "Fine-tune")
    with zipfile.ZipFile(tmp_path / "evil.zip", "w") as archive:
        archive.writestr("../../a/1.png", b"x")
    page.locator("#mm-zip input[type=file]").set_input_files(tmp_path / "evil.zip")
    page.get_by_text("leads out of the archive").wait_for()
    # The drop zone takes another file at once.
    page.locator("#mm-zip input[type=file]").set_input_files(SAMPLE_SET)
    page.locator("#mm-set", has_text="Images of one patient may be in several splits").wait_for()
    page.get_by_text("Which images are of one patient").click()
    field = page.get_by_label("Pattern (regular expression)")
    field.fill("(nothing)")
    field.press("Enter")
    page.locator("#mm-set", has_text="matches none of the 64 file names").wait_for()
    assert page.locator("#mm-run-train").is_disabled()
    field.fill(r"(\d)\.")
    page.locator("#mm-apply-pattern").click()
    page.locator("#mm-set", has_text="with up to").wait_for()
    page.locator("#mm-run-train").click()
    page.locator("#mm-stop-train").click()
    page.get_by_text("Nothing was saved").wait_for()


@pytest.mark.slow
def test_one_model_is_trained_at_a_time_and_others_are_told(open_page):
    first, second = open_page(), open_page()
    for page in (first, second):
        to_tab(page, "Fine-tune")
        page.locator("#mm-sample").click()
        page.locator("#mm-set .mm-card").wait_for()
        page.locator("#mm-run-train").click()
        if page is first:
            first.locator("#mm-training h2", has_text="Reading the images").wait_for()
    second.get_by_text("Waiting for another training to finish").wait_for()
    second.locator("#mm-stop-train").click()  # must not end the other
    first.locator("#mm-training h2", has_text="Epoch").wait_for()
    assert "Waiting" in second.locator("#mm-training").inner_text()
    first.locator("#mm-stop-train").click()
    for page in (first, second):
        page.get_by_text("Nothing was saved").wait_for()
        assert page.locator("#mm-run-train").is_visible()
